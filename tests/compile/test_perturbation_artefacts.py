"""What the compiler makes of norm, exchange and restore, for GPUs that are not there: no spills, 16-byte accesses, one
binary for every seed, step and size. As in test_artefacts.py, only the launch is left out.
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

import artefacts
from gapo_kernels import philox
from gapo_kernels.kernels import perturbation
from gapo_kernels.perturbation import Move

pytestmark = pytest.mark.skipif(not artefacts.disassembler_found(), reason="this Triton has no nvdisasm")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
KERNELS = {"norm_kernel", "exchange_kernel", "restore_kernel"}
# theta, direction, grid.
DTYPES = {
    "float32": (F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16),
    "float16": (F16, F16, F16),
    "float32 on bfloat16": (F32, F32, BF16),
}
# On sm_90 46, 111 and 78 with Triton 3.9; 3.5 and 3.6 take up to 142 for the exchange, on sm_100. 144 leave 12 warps on a
# multiprocessor, with four or eight 16-byte loads in flight in each thread.
REGISTERS = {"norm_kernel": 64, "exchange_kernel": 144, "restore_kernel": 96}
# A weight, in the loop: 12 (float32), 19 (bfloat16), 23 (float32 on bfloat16), 33 (float16); Philox comes before it and
# adds 7. Bandwidth leaves about 75 to a bfloat16 weight.
EXCHANGE_INSTRUCTIONS, NORM_INSTRUCTIONS = 36, 8
# Loads of one address by all threads: a parameter's row, the tile's number or flag, the step size.
SCALAR_LOADS = {"norm_kernel": 5, "exchange_kernel": 9, "restore_kernel": 6}
SCALAR_STORES = {"norm_kernel": 1, "exchange_kernel": 4, "restore_kernel": 1}


def launches(dtypes, geometry="asam", stochastic=True, n=3 * 8192 + 17, offset=0, seed=5, step=2, moves=1):
    """Calls the three launchers, on memory that nobody touches."""
    theta_dtype, direction_dtype, grid = dtypes

    def tensor(dtype):
        return torch.empty(offset + n, dtype=dtype)[offset:]

    def launch():
        subject = perturbation.Perturbation(
            [Move(tensor(theta_dtype), tensor(direction_dtype), tensor(theta_dtype), grid, i, 0) for i in range(moves)],
            geometry,
            stochastic,
        )
        subject.squared_norm()
        subject.exchange(0.1, seed, step)
        subject.restore()

    return launch


def compile_for(target, dtypes, **options):
    return artefacts.compile_launches(launches(dtypes, **options), artefacts.TARGETS[target])


def unpredicated(instructions, opcode):
    """What runs without a mask."""
    return [instruction for instruction in instructions if re.match(rf"{opcode}\b", instruction)]


def spills(kernel):
    used = artefacts.resources(kernel)
    problems = [f"{space} {used[space]} (registers spilled)" for space in ("STACK", "LOCAL") if used[space]]
    instructions = artefacts.parse_sass(kernel.asm["sass"]).instructions
    for opcode in ("LDL", "STL"):
        if found := artefacts.count(instructions, opcode):
            problems.append(f"{found} {opcode}")
    return problems


def cuda_problems(name, kernel, dtypes):
    """What is wrong with a CUDA kernel on aligned memory."""
    problems = spills(kernel)
    registers = artefacts.resources(kernel)["REG"]
    if registers > REGISTERS[name]:
        problems.append(f"{registers} registers, ceiling {REGISTERS[name]}")
    # Masked accesses are predicated; what is not is the whole tile, and scalars.
    instructions = artefacts.parse_sass(kernel.asm["sass"]).instructions
    for opcode, scalars in (("LDG", SCALAR_LOADS[name]), ("STG", SCALAR_STORES[name])):
        found = unpredicated(instructions, opcode)
        narrow = [instruction for instruction in found if f"{opcode}.E.128" not in instruction]
        if len(narrow) > scalars:
            problems.append(f"{len(narrow)} {opcode} of less than 16 bytes without a mask, {scalars} are for scalars")
        if len(narrow) == len(found) and (opcode, name) != ("STG", "norm_kernel"):
            problems.append(f"no {opcode}.E.128")
    if name == "restore_kernel":
        return problems

    loop = artefacts.hot_loop(kernel)
    elements = 2 * philox.LANES // (32 * perturbation.LAUNCH["num_warps"])
    wide = {"LDG": 2 * elements * dtypes[0].itemsize // 16, "STG": 2 * elements * dtypes[0].itemsize // 16}
    if name == "norm_kernel":
        wide["STG"] = 0
    for opcode, expected in wide.items():
        found, found_wide = artefacts.count(loop, opcode), artefacts.count(loop, f"{opcode}.E.128")
        if (found, found_wide) != (expected, expected):
            problems.append(
                f"{found} {opcode} in the hot loop, {found_wide} of them 16 bytes wide, {expected} expected"
            )
    for opcode in ("SHFL", "BAR", "LDS", "STS", "STSM", "LDGSTS"):
        if found := artefacts.count(loop, opcode):
            problems.append(f"{found} {opcode} in the hot loop")
    ceiling = NORM_INSTRUCTIONS if name == "norm_kernel" else EXCHANGE_INSTRUCTIONS
    if len(loop) > ceiling * elements:
        problems.append(f"{len(loop) / elements:.1f} instructions a weight in the hot loop, ceiling {ceiling}")
    return problems


def amd_problems(name, kernel, dtypes):
    used = artefacts.amd_resources(kernel)
    problems = [f"{what} {used[what]}" for what in ("vgpr_spill_count", "private_segment_fixed_size") if used[what]]
    # 256 threads to a group of 1024: 8 bytes each of a 16-bit dtype in the exchange.
    width = "dwordx2" if name == "exchange_kernel" and dtypes[0].itemsize == 2 else "dwordx4"
    for what in ("load", "store"):
        found = len(re.findall(rf"\b(?:global|buffer)_{what}_{width}\b", kernel.asm["amdgcn"]))
        if not found and (what, name) != ("store", "norm_kernel"):
            problems.append(f"no {what}_{width}")
    return problems


@pytest.mark.parametrize("target, dtypes", list(itertools.product(artefacts.TARGETS, DTYPES)))
def test_kernels(target, dtypes):
    compiled = compile_for(target, DTYPES[dtypes])
    assert compiled.keys() == KERNELS
    check = cuda_problems if target.startswith("sm_") else amd_problems
    problems = [
        f"{name}: {problem}" for name, kernel in compiled.items() for problem in check(name, kernel, DTYPES[dtypes])
    ]
    assert not problems, "\n".join(problems)


OTHERS = {
    "float64": dict(dtypes=(F64, F64, F64)),
    "float32 on float16": dict(dtypes=(F32, F32, F16)),
    "float32 gradients": dict(dtypes=(BF16, F32, BF16)),
    "bfloat16 gradients": dict(dtypes=(F32, BF16, BF16)),
    "wider grid": dict(dtypes=(BF16, BF16, F32)),
    "sam": dict(dtypes=(BF16, BF16, BF16), geometry="sam"),
    "nearest": dict(dtypes=(BF16, BF16, BF16), stochastic=False),
    "unaligned": dict(dtypes=(BF16, BF16, BF16), offset=1),
}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("case", OTHERS)
def test_other_branches(target, case):
    """They compile, and nothing that matters is spilled."""
    compiled = compile_for(target, **OTHERS[case])
    assert compiled.keys() == KERNELS
    for name, kernel in compiled.items():
        if target == "sm_90" and case == "unaligned":  # an address each; Triton 3.6 spills two of them
            assert artefacts.resources(kernel)["STACK"] <= 16, name
        elif target == "sm_90":
            assert not spills(kernel), name
        else:
            assert artefacts.amd_resources(kernel)["vgpr_spill_count"] == 0, name


@pytest.mark.parametrize("dtypes, offset", [*itertools.product(DTYPES, [0]), ("bfloat16", 1)])
def test_a_thread_stores_what_it_loaded(dtypes, offset):
    """`original` may lie over `direction`: no thread may store there what another has still to load."""
    ir = compile_for("sm_90", DTYPES[dtypes], offset=offset)["exchange_kernel"].asm["ttgir"]
    accesses = [line for line in ir.splitlines() if re.search(r"\btt\.(load|store)\b.*tensor<", line)]
    layouts = {layout for line in accesses for layout in re.findall(r"ptr<\w+>, (#\w+)>", line)}
    assert len(accesses) >= 16 and len(layouts) == 1, layouts
    assert "convert_layout" not in ir


def test_one_binary_for_all():
    """A new seed, step, number or size of parameters must not compile again: the JIT's cache keys are the same."""
    keys = set()
    for options in (
        dict(),
        dict(seed=0, step=0),
        dict(seed=1, step=1),
        dict(seed=2**64 - 1, step=2**32 - 1),
        dict(seed=2**31, step=16),
        dict(seed=2**63 + 2**32, n=1),
        dict(n=16 * 8192, moves=2),
        dict(n=5, moves=16),
    ):
        compiled = compile_for("sm_90", (BF16, BF16, BF16), **options)
        keys.add(tuple(sorted((name, kernel.hash) for name, kernel in compiled.items())))
    assert len(keys) == 1


def test_one_launch_per_pass():
    """However many parameters there are, of one combination of dtypes and alignment."""
    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *args, **kwargs: None

    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(perturbation, name, Counted(getattr(perturbation, name)))
        launches((BF16, BF16, BF16), n=8193, moves=7)()
    assert launched == [(14,)] * 3


# The checks themselves: kernels that are wrong in a known way are caught, and for that. ---------------------------------


def test_narrow_accesses_are_caught(monkeypatch):
    dtypes = (BF16, BF16, BF16)
    monkeypatch.setitem(perturbation.LAUNCH, "num_warps", 8)
    problems = cuda_problems("exchange_kernel", compile_for("sm_90", dtypes)["exchange_kernel"], dtypes)
    for complaint in ("LDG of less than 16 bytes", "STG of less than 16 bytes", "no LDG.E.128", "LDG in the hot loop"):
        assert any(complaint in problem for problem in problems), (complaint, problems)


def test_spills_are_caught(monkeypatch):
    monkeypatch.setitem(perturbation.LAUNCH, "num_warps", 1)
    problems = spills(compile_for("sm_90", (F32, F32, BF16))["exchange_kernel"])
    for complaint in ("registers spilled", "LDL", "STL"):
        assert any(complaint in problem for problem in problems), (complaint, problems)
