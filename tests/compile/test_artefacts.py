"""What the compiler makes of the kernels, for GPUs that are not there: no spills, wide loads, lean hot loops.

The launchers' arguments go through the JIT's own specialisation; only the launch is left out (artefacts.py).
"""

import itertools
import os
import re
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter replaces its compiler: run in a plain process", allow_module_level=True)
pytest.importorskip("triton", reason="nothing to compile without Triton")
if sys.platform != "linux":
    pytest.skip("Triton's compilers come with it on Linux only", allow_module_level=True)

import torch
import triton
import triton.language as tl

import artefacts
from gapo_kernels import kernels
from gapo_kernels.kernels import config

pytestmark = pytest.mark.skipif(not artefacts.disassembler_found(), reason="this Triton has no nvdisasm")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = {"statistics_kernel", "pairs_kernel", "logps_kernel", "gradient_kernel"}

# Instructions per logit in the hot loops: 7.4 and 10.3 in bfloat16 on sm_90. With bandwidth as the floor there is room
# for twice as many; the ceilings are there to show what crept in.
FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS = 8.5, 12
# 64 registers keep 1024 threads on a multiprocessor.
REGISTERS = {"statistics_kernel": 64, "gradient_kernel": 64}
# A gradient that begins elsewhere in 16 bytes than its logits is stored element by element, after a detour through
# shared memory that takes registers and instructions of its own.
UNALIGNED_REGISTERS, UNALIGNED_INSTRUCTIONS = 96, 15


def launches(dtype, pairs=2, length=3, vocabulary=50257, offset=0, large=False, packed=False, others=False):
    """Calls every launcher, on memory that nobody touches.

    `large`: logits in more than 2 GiB of storage, and the gradient over them. `others`: the other branch of everything
    that is compiled in.
    """
    sequences = 2 * pairs
    rows = sequences * length
    storage = torch.empty(2**31 // dtype.itemsize + 1 if large else offset + rows * vocabulary, dtype=dtype)
    logits = storage[offset : offset + rows * vocabulary].view(sequences, length, vocabulary)
    labels = torch.zeros(sequences, length, dtype=torch.int64)
    cu_seqlens = None
    if packed:
        logits, labels = logits.flatten(0, 1), labels.flatten()
        cu_seqlens = torch.arange(0, rows + 1, length, dtype=torch.int32)
    anchor, margin = (None, torch.zeros(pairs)) if others else (logits, None)
    scalars = (2.0, 0.5, 0.1, "hinge" if others else "sigmoid", not others, 0.2, not others, -100)

    def launch():
        _, row_max, row_sum = kernels.loss_forward(
            logits, labels, anchor, margin, cu_seqlens, *scalars, "none" if others else "mean"
        )
        kernels.logps_forward(logits, labels, cu_seqlens, not others, not others, -100)
        kernels.logps_backward(
            torch.zeros(sequences), logits, labels, cu_seqlens, row_max, row_sum, not others, -100, inplace=large
        )

    return launch


# An odd vocabulary on an aligned base is the ordinary case (GPT-2's); then what the JIT specialises on: pointers that
# are not aligned, sizes of 1, storage beyond 2 GiB (AMD addresses less by buffer and 32-bit offset, more by pointer),
# and every compiled-in choice the other way round.
CASES = {
    "odd vocabulary": dict(),
    "unaligned base": dict(offset=3),
    "B = 1, T = 1": dict(pairs=1, length=1),
    "V = 128256": dict(vocabulary=128256),
    "beyond 2 GiB": dict(large=True),
    "packed, hinge, summed, given margin": dict(packed=True, others=True),
}
GRID = [
    pytest.param(target, dtype, case, id=f"{target}-{str(dtype).removeprefix('torch.')}-{case}")
    for target, dtype, case in itertools.product(artefacts.TARGETS, DTYPES, CASES)
    # The whole grid on sm_90; elsewhere the first case in every dtype and the others in bfloat16.
    if target == "sm_90" or case == "odd vocabulary" or dtype == torch.bfloat16
]


def elements_per_iteration(launch_config, threads=32):
    return launch_config["BLOCK"] // (threads * launch_config["num_warps"])


def loop_problems(kernel, launch_config, ceiling, wide, staged=False):
    """What is wrong with a kernel's hot loop, in words. `wide`: opcodes that must move 16 bytes, each time."""
    loop = artefacts.hot_loop(kernel)
    elements = elements_per_iteration(launch_config)
    problems = []
    for opcode in wide:
        found, found_wide = artefacts.count(loop, opcode), artefacts.count(loop, f"{opcode}.E.128")
        if found == 0 or found_wide != found:
            problems.append(f"{found} {opcode} in the hot loop, {found_wide} of them {opcode}.E.128")
    across_threads = () if staged else ("SHFL", "BAR", "LDS", "STS", "LDGSTS")
    for opcode in (*across_threads, "LDL", "STL"):
        if found := artefacts.count(loop, opcode):
            problems.append(f"{found} {opcode} in the hot loop")
    if artefacts.count(loop, "MUFU.EX2") < elements:
        problems.append(f"{artefacts.count(loop, 'MUFU.EX2')} MUFU.EX2 for {elements} logits in the hot loop")
    if len(loop) > ceiling * elements:
        problems.append(f"{len(loop) / elements:.1f} instructions a logit in the hot loop, ceiling {ceiling}")
    return problems


def cuda_problems(name, kernel, aligned=True):
    """What is wrong with a CUDA kernel: spills, registers, its hot loop. `aligned`: gradient and logits alike."""
    used = artefacts.resources(kernel)
    problems = [f"{space} {used[space]} (registers spilled)" for space in ("STACK", "LOCAL") if used[space]]
    instructions = artefacts.parse_sass(kernel.asm["sass"]).instructions
    for opcode in ("LDL", "STL"):
        if found := artefacts.count(instructions, opcode):
            problems.append(f"{found} {opcode}")
    staged = name == "gradient_kernel" and not aligned
    ceiling = UNALIGNED_REGISTERS if staged else REGISTERS.get(name, 255)
    if used["REG"] > ceiling:
        problems.append(f"{used['REG']} registers, ceiling {ceiling}")
    if name == "statistics_kernel":
        problems += loop_problems(kernel, config.FORWARD, FORWARD_INSTRUCTIONS, ["LDG"])
    elif staged:
        problems += loop_problems(kernel, config.BACKWARD, UNALIGNED_INSTRUCTIONS, ["LDG"], staged=True)
    elif name == "gradient_kernel":
        problems += loop_problems(kernel, config.BACKWARD, BACKWARD_INSTRUCTIONS, ["LDG", "STG"])
    return problems


def amd_problems(name, kernel, dtype, aligned=True):
    """What is wrong with a HIP kernel: spills to memory, narrow loads and stores."""
    used = artefacts.amd_resources(kernel)
    # scalar registers spill into vector registers' lanes, which costs no memory
    problems = [f"{what} {used[what]}" for what in ("vgpr_spill_count", "private_segment_fixed_size") if used[what]]
    launch_config = {"statistics_kernel": config.FORWARD, "gradient_kernel": config.BACKWARD}.get(name)
    if launch_config:
        # once in the loop, once for the tile after it
        needed = 2 * elements_per_iteration(launch_config, threads=64) * dtype.itemsize // 16
        for what in ("load", "store"):
            found = len(re.findall(rf"\b(?:global|buffer)_{what}_dwordx4\b", kernel.asm["amdgcn"]))
            asked = what == "load" or name == "gradient_kernel" and aligned
            if asked and found < needed:
                problems.append(f"{found} 16-byte {what}s, {needed} expected")
    return problems


@pytest.mark.parametrize("target, dtype, case", GRID)
def test_kernels(target, dtype, case):
    compiled = artefacts.compile_launches(launches(dtype, **CASES[case]), artefacts.TARGETS[target])
    assert compiled.keys() == KERNELS
    problems = []
    for name, kernel in compiled.items():
        aligned = case != "unaligned base"
        if target.startswith("sm_"):
            found = cuda_problems(name, kernel, aligned)
        else:
            found = amd_problems(name, kernel, dtype, aligned)
        problems += [f"{name} for {target} in {dtype}, {case}: {problem}" for problem in found]
    assert not problems, "\n".join(problems)


def test_float64_compiles():
    """For gradcheck on a GPU: nothing is asked of its speed."""
    for target in ("sm_90", "gfx942"):
        compiled = artefacts.compile_launches(launches(torch.float64), artefacts.TARGETS[target])
        assert compiled.keys() == KERNELS


def test_one_binary_for_all_sizes():
    """A new batch, length, vocabulary or stride must not compile again: the JIT's cache keys are the same."""
    keys = set()
    for sizes in (dict(), dict(pairs=1, length=1), dict(pairs=8, length=16, vocabulary=32000), dict(vocabulary=1)):
        compiled = artefacts.compile_launches(launches(torch.bfloat16, **sizes), artefacts.TARGETS["sm_90"])
        keys.add(tuple(sorted((name, kernel.hash) for name, kernel in compiled.items())))
    assert len(keys) == 1


# The checks themselves: a kernel that is wrong in a known way is caught, and for that. ---------------------------------


def compile_one(name, dtype=torch.bfloat16, target="sm_90"):
    return artefacts.compile_launches(launches(dtype), artefacts.TARGETS[target])[name]


def test_spills_and_too_many_registers_are_caught(monkeypatch):
    monkeypatch.setitem(config.FORWARD, "BLOCK", 32768)
    problems = cuda_problems("statistics_kernel", compile_one("statistics_kernel", torch.float32))
    for complaint in ("registers, ceiling 64", "registers spilled", "LDL in the hot loop"):
        assert any(complaint in problem for problem in problems), (complaint, problems)


@triton.jit
def pipelined(x, out, size, BLOCK: tl.constexpr):
    """What not to do: the loop's loads staged through shared memory."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, size, BLOCK, num_stages=3):
        b_sum += tl.exp2(tl.load(x + i + tl.arange(0, BLOCK)).to(tl.float32))
    tl.store(out, tl.sum(b_sum, 0))


@triton.jit
def masked_everywhere(x, out, size, BLOCK: tl.constexpr):
    """What not to do: a mask on every element in the loop, and a maximum across the block."""
    m = -1e30
    s = 0.0
    for i in range(0, size, BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_x = tl.load(x + o, mask=o < size, other=-float("inf")).to(tl.float32)
        b_new = tl.maximum(m, tl.max(b_x, 0))
        s = s * tl.exp(m - b_new) + tl.sum(tl.exp(b_x - b_new), 0)
        m = b_new
    tl.store(out, m + tl.log(s))


# A kernel and what must be said of it.
@pytest.mark.parametrize(
    "bad, complaints",
    [
        (masked_everywhere, ["LDG in the hot loop, 0 of them", "SHFL in", "BAR in", "instructions a logit"]),
        (pipelined, ["0 LDG in the hot loop", "LDS in", "LDGSTS in", "BAR in"]),
    ],
)
def test_bad_kernels_are_caught(bad, complaints):
    def launch():
        bad[(1,)](torch.zeros(50257, dtype=torch.bfloat16), torch.zeros(1), 50257, **config.FORWARD, **config.OPTIONS)

    kernel = artefacts.compile_launches(launch, artefacts.TARGETS["sm_90"])[bad.__name__]
    problems = loop_problems(kernel, config.FORWARD, FORWARD_INSTRUCTIONS, ["LDG"])
    for complaint in complaints:
        assert any(complaint in problem for problem in problems), (complaint, problems)


def test_loops_are_found():
    """Innermost ones, by label and by address, forward branches and the self-branch after the end left out."""
    listing = """Function:example
--:-:-:-:1\tMOV R1, c[0x0][0x28];
LBB1:
--:-:-:-:1\tIADD3 R2, R2, 0x1, RZ;
LBB0:
--:-:2:-:1\tLDG.E.128 R4, [R2.64];
--:-:-:-:1\t@P1 BRA LBB2;
--:-:-:-:1\tMUFU.EX2 R4, R4;
LBB2:
--:-:-:-:5\t@!P0 BRA LBB0;
--:-:-:-:5\t@P2 BRA LBB1;
--:-:-:-:1\tSTG.E.128 [R2.64], R4;
--:-:-:-:1\tLDG.E.U16 R4, [R2.64];
--:-:-:-:5\tBRA.U !UP0, 0x80;
--:-:-:Y:5\tEXIT;
LBB3:
--:-:-:Y:0\tBRA LBB3;
"""
    first, second = artefacts.loops(listing)
    assert first == ["LDG.E.128 R4, [R2.64]", "@P1 BRA LBB2", "MUFU.EX2 R4, R4", "@!P0 BRA LBB0"]
    assert second == ["LDG.E.U16 R4, [R2.64]", "BRA.U !UP0, 0x80"]
    assert artefacts.count(first, "LDG") == artefacts.count(first, "LDG.E.128") == 1
    assert artefacts.count(second, "LDG.E.128") == 0 and artefacts.count(first, "BRA") == 2


@pytest.mark.parametrize("target", [target for target in artefacts.TARGETS if target.startswith("sm_")])
def test_every_loop_of_the_source_is_found(target):
    """gradient_kernel has two: over the tiles, and over the zeros of a row that predicts nothing."""
    compiled = artefacts.compile_launches(launches(torch.bfloat16), artefacts.TARGETS[target])
    tiles, zeros = sorted(artefacts.loops(compiled["gradient_kernel"].asm["sass"]), key=len, reverse=True)
    assert artefacts.count(tiles, "LDG") and artefacts.count(tiles, "STG")
    assert artefacts.count(zeros, "STG") and not artefacts.count(zeros, "LDG")
    assert len(artefacts.loops(compiled["statistics_kernel"].asm["sass"])) == 1
