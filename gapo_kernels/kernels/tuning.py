"""Launch parameters by timing, opt-in: with GAPO_KERNELS_AUTOTUNE=1, or by calling `tune`.

With the variable set, a kernel's first launch in a dtype takes what an earlier run found on the same kind of GPU with
the same Triton and the same kernels, or else times config.py's choice and a few others, on data of its own, and writes
down the fastest. No launch after it asks again. So a choice, and with it the last bits of the results, stays the same
from run to run as long as its file does, and is that of all processes which share the file, whoever wrote it first: one
JSON file in $GAPO_KERNELS_CACHE_DIR, by default $XDG_CACHE_HOME/gapo-kernels or ~/.cache/gapo-kernels, which may be
deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import lru_cache
from itertools import product
from pathlib import Path
from time import sleep

import torch
import triton
from triton.errors import TritonError

import gapo_kernels
from gapo_kernels.kernels import config

# (BLOCK, num_warps) to try beside the table's choice. As compiled in bfloat16, and for sm_90 and gfx942 in float32
# (tests/compile), none spills and all move 16 bytes at a time; the gradient in (8192, 4) is left out for its 168 registers.
TILES = {
    "statistics": ((2048, 4), (4096, 4), (8192, 4), (4096, 8), (8192, 8)),
    "gradient": ((2048, 4), (4096, 4), (4096, 8), (8192, 8)),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VOCABULARY = 128256
# What a candidate must save to be taken instead of the table's choice: less is noise.
MARGIN = 0.02
SCRATCH_BYTES = 2**28


def candidates(kernel: str, architecture: str, dtype: torch.dtype) -> list[dict[str, int]]:
    """The table's choice, then the others."""
    first = config.entry(kernel, architecture, dtype).parameters
    if kernel == "perturbation":  # more warps than the table's make narrower accesses; a quarter of them spills
        half = {"num_warps": first["num_warps"] // 2}
        half_spills = architecture.startswith("sm_10") or architecture.startswith("sm_") and dtype == torch.float16
        return [first] if half_spills else [first, half]
    others = ({"BLOCK": block, "num_warps": warps} for block, warps in TILES[kernel])
    return [first, *(parameters for parameters in others if parameters != first)]


def tuned(kernel: str, device: torch.device, dtype: torch.dtype) -> dict[str, int] | None:
    """The choice that is on file, or else a new one; None where nothing can be timed now."""
    name, known = _name(kernel, dtype), _known(cache_file(device), device)
    if name in known:
        return known[name]["parameters"]
    if not _can_time(device):
        return None
    try:
        return _save(device, _timed(device, dtype, kernel), first=True)[name]["parameters"]
    except torch.OutOfMemoryError as error:
        warnings.warn(f"no memory to tune {name}, which runs untuned: {error}", stacklevel=2)
        return None


def tune(
    device: torch.device | str,
    dtypes: Sequence[torch.dtype] = DTYPES,
    kernels: Sequence[str] = tuple(config.TABLE),
    scratch_bytes: int = SCRATCH_BYTES,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, dict]:
    """Times every candidate on `device`, a GPU, and adds the choices to its file.

    dtypes: of the logits and, for "perturbation", the weights. scratch_bytes: of what is timed; the gradient takes as much
    again. Fewer rows than 32 for each multiprocessor are split over programs, as in a small batch. measure: one call's time in
    milliseconds; by default the median of Triton's do_bench, which flushes the L2 cache.

    Returns {"statistics bfloat16": {"parameters": {...}, "milliseconds": [[parameters, time], ...]}, ...}.
    """
    device = torch.empty(0, device=device).device  # with its number, as launches ask for it
    found = {}
    try:
        for kernel, dtype in product(kernels, dtypes):  # each is kept, whatever becomes of the next
            found |= (one := _timed(device, dtype, kernel, scratch_bytes, measure))
            _save(device, one)
    finally:
        config.forget()
    return found


def _timed(
    device: torch.device,
    dtype: torch.dtype,
    kernel: str,
    scratch_bytes: int = SCRATCH_BYTES,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, dict]:
    measure = measure or _median
    times = []
    # Triton launches on the current device.
    with nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
        run = workload(kernel, device, dtype, scratch_bytes)
        for parameters in candidates(kernel, config.architecture(device), dtype):
            try:
                with config.forced(**{kernel: parameters}):
                    times.append((parameters, measure(run)))
            except TritonError:  # more shared memory or threads than this GPU has
                if not times:  # the table's choice: any launch would fail
                    raise
    best, time = min(times, key=lambda pair: pair[1])
    if time > (1 - MARGIN) * times[0][1]:
        best = times[0][0]
    return {_name(kernel, dtype): {"parameters": best, "milliseconds": [list(pair) for pair in times]}}


def _name(kernel: str, dtype: torch.dtype) -> str:
    return f"{kernel} {str(dtype).removeprefix('torch.')}"


def _can_time(device: torch.device) -> bool:
    return device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _median(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")


def workload(kernel: str, device: torch.device, dtype: torch.dtype, scratch_bytes: int) -> Callable[[], object]:
    """Launches the kernel, on random numbers that leave the caller's generators alone."""
    from gapo_kernels.kernels import gradient, perturbation, statistics

    def normal(*shape: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(0)
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    if kernel == "perturbation":
        weights = max(1, scratch_bytes // (3 * dtype.itemsize))
        move = perturbation.Move(normal(weights), normal(weights), normal(weights), dtype, number=0)
        subject = perturbation.Perturbation([move], "asam", stochastic=True)
        return lambda: (subject.squared_norm(), subject.exchange(1e-3, seed=0, step=0), subject.restore())
    logits = normal(1, max(1, scratch_bytes // (VOCABULARY * dtype.itemsize)), VOCABULARY)
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64, device=device)
    if kernel == "statistics":
        return lambda: statistics.launch_statistics(logits, None, labels, None, False, -100)
    row_max = torch.zeros(labels.numel(), dtype=torch.promote_types(dtype, torch.float32), device=device)
    row_sum, scale = torch.full_like(row_max, VOCABULARY), torch.ones_like(row_max[:1])
    return lambda: gradient.logps_backward(scale, logits, labels, None, row_max, row_sum, False, -100, inplace=False)


def _identity(device: torch.device) -> dict[str, str]:
    """All that a choice depends on: others are in other files."""
    source = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        source.update(file.read_bytes())
    properties = None if device.type == "cpu" else torch.get_device_module(device).get_device_properties(device)
    return {
        "device": getattr(properties, "name", device.type),
        "architecture": config.architecture(device),
        "triton": triton.__version__,
        "gapo_kernels": gapo_kernels.__version__,
        "source": source.hexdigest(),
    }


def cache_file(device: torch.device) -> Path | None:
    """Where the choices for this kind of device are kept; None where no directory is named and there is no home."""
    directory = os.environ.get("GAPO_KERNELS_CACHE_DIR")
    if not directory:
        try:
            directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gapo-kernels"
        except RuntimeError:
            return None
    identity = _identity(device)
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return Path(directory) / f"{re.sub(r'[^A-Za-z0-9]+', '-', identity['device'])}-{digest}.json"


_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def _read(file: Path, device: torch.device) -> dict[str, dict]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["identity"] != _identity(device):
        raise ValueError("it is of another GPU, Triton or version")
    for name, choice in content["choices"].items():
        kernel, dtype = name.split()
        parameters = choice["parameters"]
        allowed = candidates(kernel, config.architecture(device), getattr(torch, dtype))
        if parameters not in allowed or any(type(value) is not int for value in parameters.values()):  # 8192.0 == 8192
            raise ValueError(f"{name} has {parameters}, which is no candidate")
    return content["choices"]


@lru_cache(maxsize=None)
def _known(file: Path | None, device: torch.device) -> dict[str, dict]:
    """The file's choices, read once, and those made since."""
    if file is None:
        warnings.warn("the cache of launch parameters is ignored: there is no home directory", stacklevel=2)
        return {}
    try:
        return _read(file, device)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except _UNREADABLE as error:
        warnings.warn(f"{file} is ignored: {type(error).__name__}: {error}", stacklevel=2)
        return {}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the folder can be locked; whoever has waited a second does not wait longer."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)  # and unlocks
            for _ in range(100):
                with suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                sleep(0.01)
        yield


def _save(device: torch.device, choices: dict[str, dict], first: bool = False) -> dict[str, dict]:
    """Adds them to the file, and returns what holds from now on. first: what another process has written of these since
    stays, so that ranks which time the same kernel at the same time launch it alike."""
    file = cache_file(device)
    known = _known(file, device)
    known.update(choices)
    if file is None:
        return choices
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file.parent):
            with suppress(*_UNREADABLE):
                others = _read(file, device)
                if first:
                    choices = choices | {name: others[name] for name in choices if name in others}
                known.update(others | choices)
            content = json.dumps({"identity": _identity(device), "choices": known}, indent=1)
            temporary.write_text(content, encoding="utf-8")
            os.replace(temporary, file)  # whole or not at all for whoever reads it at the same time
    except OSError as error:
        warnings.warn(f"{file} cannot be written: {type(error).__name__}: {error}", stacklevel=2)
        with suppress(OSError):
            temporary.unlink()
    return choices
