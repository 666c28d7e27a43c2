"""Compiles kernels for GPUs that are not there, through the JIT's own specialisation of the launchers' arguments, and
reads what came out: registers, spills, loops.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gapo_kernels import kernels
from gapo_kernels.kernels import config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"


class _Driver:
    """Answers what the JIT asks before it compiles; nothing is ever launched."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def as_if_on(target: str):
    """Triton compiles for `target`, and the launchers take its parameters."""
    manager, architecture = triton.runtime.driver, config.architecture
    before = manager._active
    manager.set_active(_Driver(TARGETS[target]))
    config.architecture = lambda device: target
    config.forget()
    try:
        yield
    finally:
        manager._active = before
        config.architecture = architecture
        config.forget()


def compile_launches(launch: Callable[[], object], target: str) -> dict[str, object]:
    """Kernel name -> compiled kernel, for every kernel that `launch` would have started on `target`."""
    compiled = {}
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()  # of compiled code, per device number and arguments: the target is not among them
        name = self.fn.__name__
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            raise RuntimeError(f"{name} for {target} does not compile: {type(error).__name__}: {error}") from error
        self.device_caches.clear()
        if compiled.setdefault(name, kernel).hash != kernel.hash:  # of which one would go unread
            raise AssertionError(f"expected one binary of {name} in a case, got two")
        return kernel

    JITFunction.run = warm_up
    try:
        with as_if_on(target):
            launch()
    finally:
        JITFunction.run = run
    return compiled


def jit_functions() -> dict[str, JITFunction]:
    """Of the whole library, by name: kernels end in _kernel, the others are inlined into them."""
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return {function.fn.__name__: function for function in found}


class Artefact(NamedTuple):
    """What is read from a compiled kernel."""

    hash: str  # of the source, the target and all that the JIT specialised on
    num_warps: int
    resources: dict[str, int]  # REG, STACK, LOCAL, ... of CUDA; vgpr_count, vgpr_spill_count, ... of AMD
    instructions: list[str]
    loops: list[list[str]]  # the instructions of each innermost loop
    in_loops: list[str]  # and of any
    ttgir: str

    @property
    def hot_loop(self) -> list[str]:
        """The loop over whole tiles: the longest one."""
        return max(self.loops, key=len, default=[])


def read(kernel: object, target: str) -> Artefact:
    if target.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        found, listing = amd_resources(code), parse_amdgcn(code)
    else:
        found = cuda_resources(_output_of("cuobjdump", kernel.asm["cubin"], "-res-usage"))
        # As cuobjdump calls it, less encodings and the analysis of data flow: a quarter of the time.
        listing = parse_sass(_output_of("nvdisasm", kernel.asm["cubin"], "-pb", "-novliw", "-ndf", "-c"))
    return Artefact(kernel.hash, kernel.metadata.num_warps, found, *listing, kernel.asm["ttgir"])


def _output_of(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BINARIES / tool, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassembler_found() -> bool:
    return shutil.which(str(BINARIES / "nvdisasm")) is not None


def cuda_resources(listing: str) -> dict[str, int]:
    """REG, STACK, SHARED, ... as the binary states them."""
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", listing)}


def amd_resources(amdgcn: str) -> dict[str, int]:
    """Spills and registers, from the assembly's metadata."""
    names = ("vgpr_spill_count", "sgpr_spill_count", "vgpr_count", "private_segment_fixed_size")
    return {name: int(re.search(rf"\.{name}:\s*(\d+)", amdgcn).group(1)) for name in names}


def loops_within_loops(ttgir: str) -> int:
    """How many loops of a kernel lie in another one, by the indentation of its intermediate code."""
    found, around = 0, []
    for line in ttgir.splitlines():
        if re.search(r"\bscf\.(?:for|while)\b", line):
            indentation = len(line) - len(line.lstrip())
            while around and around[-1] >= indentation:
                around.pop()
            found += bool(around)
            around.append(indentation)
    return found


class Listing(NamedTuple):
    instructions: list[str]
    loops: list[list[str]]  # innermost ones
    in_loops: list[str]  # what lies in any loop


def parse_sass(listing: str) -> Listing:
    """Of loops: what lies between a branch back and its target, less the branch to itself behind every kernel's end."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)(?:\s+[&?][a-z].*?)?\s*;", listing, re.MULTILINE)
    place = {int(address, 16): number for number, (address, _) in enumerate(lines)}
    instructions = [instruction for _, instruction in lines]
    spans: list[tuple[int, int]] = []
    for number, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", instruction)
        if branch and (target := place[int(branch.group(1), 16)]) < number:
            spans.append((target, number))
    innermost = [span for span in spans if not any(span != o and span[0] <= o[0] and o[1] <= span[1] for o in spans)]
    in_loops = sorted({number for start, stop in spans for number in range(start, stop + 1)})
    loops = [instructions[start : stop + 1] for start, stop in innermost]
    return Listing(instructions, loops, [instructions[number] for number in in_loops])


def parse_amdgcn(assembly: str) -> Listing:
    """The same of AMD's assembly, in which LLVM says of every block which loop it lies in: branches back there may also be a
    layout's whim, and the head of a loop stand below its end."""
    instructions: list[str] = []
    loops: dict[str, list[str]] = {}
    innermost: list[str] = []
    label, loop = "", None
    for line in assembly.splitlines():
        if found := re.match(r"\.L(BB\w+):|; %bb\.\d+:", line):
            label, loop = found.group(1), None
        if found := re.search(r"in Loop: Header=(BB\w+)", line):
            loop = found.group(1)
        if found := re.search(r"=>\s*This (Inner )?Loop Header", line):
            loop = label
            innermost += [label] if found.group(1) else []
        if found := re.match(r"\t([a-z]\w+.*?)\s*(?:;.*)?$", line):  # directives begin with a dot
            instructions.append(found.group(1))
            loops.setdefault(loop, []).append(found.group(1))
    in_loops = [instruction for head, loop in loops.items() if head is not None for instruction in loop]
    return Listing(instructions, [loops[head] for head in innermost], in_loops)


def count(instructions: list[str], pattern: str) -> int:
    """How many instructions' opcodes begin with `pattern`, a regular expression, and a whole word of it."""
    return sum(re.match(rf"(?:@!?U?P\w+\s+)?(?:{pattern})(?!\w)", i) is not None for i in instructions)
