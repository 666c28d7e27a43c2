"""Compiles kernels for GPUs that are not there, through the JIT's own specialisation of the launchers' arguments."""

from __future__ import annotations

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

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


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
def _active_driver(target: GPUTarget):
    manager = triton.runtime.driver
    before = manager._active
    manager.set_active(_Driver(target))
    try:
        yield
    finally:
        manager._active = before


def compile_launches(launch: Callable[[], object], target: GPUTarget) -> dict[str, object]:
    """Kernel name -> compiled kernel, for every kernel that `launch` would have started on `target`."""
    compiled = {}
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[self.fn.__name__] = kernel
        return kernel

    for function in _jit_functions():  # compiled code is cached per function, device number and arguments
        function.device_caches.clear()
    JITFunction.run = warm_up
    try:
        with _active_driver(target):
            launch()
    finally:
        JITFunction.run = run
        for function in _jit_functions():
            function.device_caches.clear()
    return compiled


def _jit_functions() -> list[JITFunction]:
    from gapo_kernels.kernels import gradient, pairs, perturbation, statistics

    modules = (gradient, pairs, perturbation, statistics)
    return [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]


def resources(kernel: object) -> dict[str, int]:
    """REG, STACK, SHARED, ... of a CUDA kernel, as its binary states them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def disassembler_found() -> bool:
    return shutil.which(str(Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm")) is not None


def amd_resources(kernel: object) -> dict[str, int]:
    """Spills and registers of a HIP kernel, from its assembly's metadata."""
    names = ("vgpr_spill_count", "sgpr_spill_count", "vgpr_count", "private_segment_fixed_size")
    return {name: int(re.search(rf"\.{name}:\s*(\d+)", kernel.asm["amdgcn"]).group(1)) for name in names}


class Listing(NamedTuple):
    """A kernel's machine code as Triton lists it."""

    instructions: list[str]
    labels: dict[str, int]  # label -> the instruction that follows it


def parse_sass(sass: str) -> Listing:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, sass.splitlines()):
        if line.startswith("Function:"):
            continue
        if label := re.fullmatch(r"\.?(L\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif line:
            # "15:-:-:-:5\t@P0 BRA LBB1;": the scheduler's control bits, then the instruction
            instructions.append(line.split("\t")[-1].rstrip(";").strip())
    return Listing(instructions, labels)


def loops(sass: str) -> list[list[str]]:
    """The instructions of each innermost loop, outer loops and the self-branch behind every kernel's end left out.

    A loop is what lies between a branch back and its target, which the listing gives as a label or, for branches on a
    uniform predicate (sm_100), as an address: instructions are 16 bytes long.
    """
    instructions, labels = parse_sass(sass)
    spans: list[tuple[int, int]] = []
    for number, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA[.\w]*\s.*?(?:(0x[0-9a-f]+)|`?\(?\.?(L\w+)\)?)$", instruction)
        if not branch:
            continue
        address, label = branch.groups()
        target = int(address, 16) // 16 if address else labels[label]
        if target < number:
            spans.append((target, number))
    innermost = [span for span in spans if not any(span != o and span[0] <= o[0] and o[1] <= span[1] for o in spans)]
    return [instructions[start : stop + 1] for start, stop in innermost]


def hot_loop(kernel: object) -> list[str]:
    """The loop over whole tiles: the longest innermost one."""
    return max(loops(kernel.asm["sass"]), key=len, default=[])


def count(instructions: list[str], opcode: str) -> int:
    """How many instructions are `opcode`, with any further suffix: LDG.E.128 also counts LDG.E.128.CONSTANT."""
    return sum(re.match(rf"(?:@!?U?P\w+\s+)?{re.escape(opcode)}(?![\w])", i) is not None for i in instructions)
