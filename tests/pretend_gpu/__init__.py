"""A GPU for machines that have none: torch's "cuda", computed on the CPU, with kernels in Triton's interpreter.

What a GPU is asked for happens, on real tensors of its own device: dispatch by device, operands on different devices,
backwards on a thread of the engine, and whatever makes the host wait (`torch.cuda.set_sync_debug_mode`). Nothing runs side
by side, so that streams and events are nothing, and no time says anything.

Only where torch was built without CUDA, and before torch is imported: `install()`. It compiles device.cpp, with a C++
compiler, into build/. Where there is none, or it fails, there is no such GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

SOURCE = Path(__file__).with_name("device.cpp")
BUILD = Path(__file__).parents[2] / "build" / "pretend_gpu"
MODES = ("default", "warn", "error")
INSTALLED = False
PROPERTIES = SimpleNamespace(
    name="Pretend H100",
    major=9,
    minor=0,
    multi_processor_count=4,  # enough to split rows of small vocabularies
    total_memory=2**33,
    L2_cache_size=2**20,
    warp_size=32,
)


def install() -> bool:
    """Whether there is a pretend GPU from now on."""
    global INSTALLED
    INSTALLED = _install()
    return INSTALLED


def _install() -> bool:
    compiler = shutil.which("g++") or shutil.which("clang++")
    spec = importlib.util.find_spec("torch")
    if compiler is None or spec is None or sys.platform != "linux" or "torch" in sys.modules:
        return False
    folder = Path(spec.origin).parent
    build = runpy.run_path(str(folder / "version.py"))
    if build.get("cuda") or build.get("hip"):
        return False
    try:
        library = _compiled(compiler, folder, build["__version__"])
    except subprocess.CalledProcessError as error:
        warnings.warn(f"no pretend GPU: {error}", stacklevel=3)
        return False
    for dependency in ("libgomp.so.1", "libc10.so", "libtorch_cpu.so", "libtorch.so"):
        if (folder / "lib" / dependency).exists():
            ctypes.CDLL(str(folder / "lib" / dependency), ctypes.RTLD_GLOBAL)
    device = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    _dress_torch(device)
    return True


def _compiled(compiler: str, folder: Path, version: str) -> Path:
    key = hashlib.sha256(SOURCE.read_bytes() + version.encode() + str(folder).encode()).hexdigest()[:16]
    library = BUILD / f"device-{key}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = BUILD / f"{key}-{os.getpid()}.so"  # of several processes each compiles its own
        libraries = [f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
        options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{folder / 'include'}"]
        subprocess.run([compiler, *options, str(SOURCE), "-o", str(unfinished), *libraries], check=True)
        unfinished.replace(library)
    return library


class _Nothing:
    """A stream, an event, or the choice of a device: nothing is there to be waited for."""

    cuda_stream = 0

    def __init__(self, *_, **__): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def __getattr__(self, name):
        return lambda *_, **__: None

    def elapsed_time(self, _):
        return 1.0


def _dress_torch(device: ctypes.CDLL) -> None:
    """Gives torch.cuda what a build without CUDA leaves out."""
    import torch

    mode = {"now": "default"}

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    def heard(what):
        if mode["now"] == "warn":
            warnings.warn(f"called a synchronizing CUDA operation: {what.decode()}", stacklevel=2)

    def set_sync_debug_mode(wanted):
        mode["now"] = MODES[wanted] if isinstance(wanted, int) else wanted
        device.pretend_gpu_report_waits(heard, mode["now"] == "error")

    set_sync_debug_mode("default")
    stand_ins = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_properties": lambda _=None: PROPERTIES,
        "get_device_capability": lambda _=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda _=None: PROPERTIES.name,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda _=None: (2**30, PROPERTIES.total_memory),
        "memory_allocated": lambda _=None: 0,
        "max_memory_allocated": lambda _=None: 0,
        "reset_peak_memory_stats": lambda _=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda _=None: None,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda state, _=None: torch.set_rng_state(state),
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "_sleep": lambda _: None,
        **{name: type(name, (_Nothing,), {}) for name in ("device", "device_of", "stream", "Stream", "Event")},
        **dict.fromkeys(("current_stream", "default_stream"), _Nothing),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    generator = torch.Generator

    class Kind(type(generator)):
        def __instancecheck__(cls, instance):
            return isinstance(instance, generator)

    class Generator(generator, metaclass=Kind):
        def __new__(cls, device="cpu"):
            return generator.__new__(generator)

    torch.Generator = Generator
    storage_copy = torch.UntypedStorage.__deepcopy__

    def deepcopy(storage, memo):
        if storage.device.type == "cpu":
            return storage_copy(storage, memo)
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return memo.setdefault(id(storage), whole.clone().untyped_storage())

    torch.UntypedStorage.__deepcopy__ = deepcopy


def let_the_interpreter_in() -> None:
    """Kernels compute in the tensors' own memory, which Triton's interpreter would copy to the host and back."""
    import torch
    from triton.runtime.interpreter import GridExecutor

    def alias(argument):
        return torch.ops.pretend_gpu.on_cpu(argument) if isinstance(argument, torch.Tensor) else argument

    def arguments(_, args, kwargs):
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        if len(devices := {tensor.device for tensor in tensors}) > 1:
            raise RuntimeError(f"expected all of a kernel's tensors on the same device, got {sorted(map(str, devices))}")
        return [alias(one) for one in args], {name: alias(one) for name, one in kwargs.items()}

    GridExecutor._init_args_hst = arguments
    GridExecutor._restore_args_dev = lambda *_: None
