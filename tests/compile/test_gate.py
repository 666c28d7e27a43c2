"""The compile gate: what the compilers make of every kernel, for GPUs that are not there.

No spills; loads and stores of 16 bytes, or as many narrower ones as memory that is not aligned takes, and no step across
threads, in the loops that stream; registers and instructions within bounds; one binary for all sizes. The launchers'
arguments go through the JIT's own specialisation; only the launch is left out. A failure names the kernel, the target, the
dtype, the case, and what was counted.
"""

import os
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter replaces its compiler: run in a plain process", allow_module_level=True)
pytest.importorskip("triton", reason="nothing to compile without Triton")
if sys.platform != "linux":
    pytest.skip("Triton's compilers come with it on Linux only", allow_module_level=True)

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

import artefacts
import gate
from gapo_kernels.kernels import config, gradient, noise, pairs, perturbation, statistics, tuning
from launches import (
    BF16,
    DTYPES,
    F32,
    JOBS,
    Job,
    LOSS_SIZES,
    ORDINARY,
    PERTURBATION_CASES,
    PERTURBATION_SIZES,
    UNALIGNED,
    UNALIGNED_CASES,
    candidates,
    compile_job,
    linear_path,
    loss_path,
    perturbation_path,
)

if not artefacts.disassembler_found():  # a gate that looked at nothing must not pass
    pytest.fail(f"expected nvdisasm in {artefacts.BINARIES}, where Triton's wheels have it, got none", pytrace=False)

LOSS_KERNELS = {"statistics_kernel", "pairs_kernel", "logps_kernel", "gradient_kernel"}
LINEAR_KERNELS = LOSS_KERNELS - {"pairs_kernel"}
PERTURBATION_KERNELS = {"norm_kernel", "exchange_kernel", "restore_kernel", "noise_kernel"}
# What config.TABLE calls the kernels that it has evidence of.
TABLE_NAMES = {"statistics_kernel": "statistics", "gradient_kernel": "gradient", "exchange_kernel": "perturbation"}


@pytest.fixture(scope="module")
def running(request):
    """Job -> its future, for all that the selected tests ask for: compiled on every core while the first ones run."""
    jobs = [item.callspec.params["job"] for item in request.session.items if "job" in getattr(item, "fixturenames", ())]
    workers = min(8, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:  # torch's threads bear no fork
        yield {job: pool.submit(compile_job, job) for job in dict.fromkeys(jobs)}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def compiled(job, running):
    """Case -> kernel's name -> artefacts.Artefact."""
    return running[job].result()


def jobs(*groups, what=None):
    chosen = [job for job in JOBS if job.group in groups and (what is None or job.what in what)]
    return pytest.mark.parametrize("job", chosen, ids=str)


def block_of(name, target, dtype):
    return config.entry(TABLE_NAMES[name], target, dtype).block if name in TABLE_NAMES else None


def complain(job, case, name, problems):
    return [f"{name} for {job.target} in {job.what}, {case}: {problem}" for problem in problems]


def compiled_anew(job, case, compiled):
    """Kernels whose binary is not the ordinary case's."""
    pairs = [(name, artefact, compiled[ORDINARY][name]) for name, artefact in compiled[case].items()]
    anew = [name for name, artefact, ordinary in pairs if artefact.hash != ordinary.hash]
    return [problem for name in anew for problem in complain(job, case, name, ["is compiled anew"])]


def test_every_kernel_is_here():
    kernels = {name for name in artefacts.jit_functions() if name.endswith("_kernel")}
    assert kernels == LOSS_KERNELS | PERTURBATION_KERNELS


@jobs("loss", "linear")
def test_logits_kernels(job, compiled):
    dtype, found = DTYPES[job.what], []
    for case, kernels in compiled.items():
        assert kernels.keys() == (LINEAR_KERNELS if job.group == "linear" else LOSS_KERNELS)
        if case in LOSS_SIZES:  # a new batch, length, vocabulary or stride
            found += compiled_anew(job, case, compiled)
            continue
        for name, artefact in kernels.items():
            staged = name == "gradient_kernel" and case == UNALIGNED and job.group == "loss"  # the head's is in place
            block = block_of(name, job.target, dtype)
            problems = gate.problems(name, artefact, job.target, dtype.itemsize, block, staged)
            found += complain(job, case, name, problems)
    assert not found, "\n".join(found)


@jobs("perturbation", what=PERTURBATION_CASES)
def test_perturbation_kernels(job, compiled):
    found = []
    for case, kernels in compiled.items():
        assert kernels.keys() == PERTURBATION_KERNELS
        if case in PERTURBATION_SIZES:  # a new seed, step, number or size of parameters
            found += compiled_anew(job, case, compiled)
            continue
        (theta, direction, grid), options = PERTURBATION_CASES[job.what]
        aligned = job.what not in UNALIGNED_CASES
        asam, masters = options.get("geometry") != "sam", grid.itemsize < theta.itemsize
        weights = gate.Weights(direction.itemsize, asam, aligned, "first" in options, masters)
        for name, artefact in kernels.items():
            itemsize = direction.itemsize if name == "noise_kernel" else theta.itemsize
            problems = gate.problems(name, artefact, job.target, itemsize, weights=weights)
            found += complain(job, case, name, problems)
    assert not found, "\n".join(found)


@pytest.mark.skipif(not triton.__version__.startswith("3.9."), reason="the evidence is Triton 3.9's")
@jobs("loss", "perturbation", what=("bfloat16", "float32"))
def test_the_evidence_is_what_is_compiled(job, compiled):
    """config.TABLE's registers and instructions, so that neither kernels nor choices change without them."""
    dtype = DTYPES[job.what]
    for name in compiled[ORDINARY].keys() & TABLE_NAMES.keys():
        artefact, entry = compiled[ORDINARY][name], config.entry(TABLE_NAMES[name], job.target, dtype)
        expected = gate.stream(name, artefact, job.target, dtype.itemsize, entry.block)
        found = gate.instructions_per_element(artefact, expected)
        assert artefact.num_warps == entry.num_warps
        registers = artefact.resources[gate.dialect(job.target).registers]
        assert registers == entry.registers, f"{name} for {job.target}"
        assert abs(found - entry.instructions) <= 0.051, f"{name} for {job.target}: {found:.2f} instructions"


@jobs("candidates")
def test_candidates_of_tuning(job, compiled):
    """What tuning may choose spills nothing either, and moves 16 bytes at a time; only registers may be more."""
    dtype, every, found = DTYPES[job.what], candidates(job.target, job.what), []
    assert compiled.keys() == every.keys() and len(every) >= 10
    for case, kernels in compiled.items():
        _, parameters = every[case]
        for name, artefact in kernels.items():
            assert artefact.num_warps == parameters["num_warps"]
            expected = gate.stream(name, artefact, job.target, dtype.itemsize, parameters.get("BLOCK"))
            problems = gate.spill_problems(artefact, job.target)
            problems += gate.loop_problems(artefact, job.target, expected) if expected else []
            found += complain(job, case, name, problems)
    assert not found, "\n".join(found)


@jobs("perturbation", what=PERTURBATION_CASES)
def test_a_thread_stores_what_it_loaded(job, compiled):
    """`original` may lie over `direction`: no thread may store there what another has still to load."""
    ir = compiled[ORDINARY]["exchange_kernel"].ttgir
    accesses = [line for line in ir.splitlines() if re.search(r"\b(?:tt|amdg)\.\w*(load|store)\b.*tensor<", line)]
    layouts = {layout for line in accesses for layout in re.findall(r"(#\w+)>(?!>)", line)}
    assert len(accesses) >= 16 and len(layouts) == 1, (len(accesses), layouts)
    # Of one element a thread two layouts may be alike: there the loops show that nothing moves.
    assert "convert_layout" not in ir or job.what in UNALIGNED_CASES


def test_what_was_tuned_is_compiled(tmp_path, monkeypatch):
    """The file's choice for an architecture reaches the compiler; another architecture's launches are as they were."""
    chosen = {"BLOCK": 8192, "num_warps": 8}
    monkeypatch.setenv("GAPO_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "workload", lambda *arguments: lambda: None)
    with artefacts.as_if_on("sm_90"):
        cpu, measure = torch.device("cpu"), lambda run: float(config._forced["statistics"] != chosen)
        tuning.tune(cpu, [BF16], ["statistics"], measure=measure)
    monkeypatch.setenv("GAPO_KERNELS_AUTOTUNE", "1")
    for target, expected in (("sm_90", chosen), ("sm_80", config.entry("statistics", "sm_80", BF16).parameters)):
        artefact = compile_one(linear_path(BF16), "statistics_kernel", target)
        assert artefact.num_warps == expected["num_warps"]
        assert f"tensor<{expected['BLOCK'] // 8}x8xbf16" in artefact.ttgir


@pytest.mark.parametrize("others", [0, 6])
@pytest.mark.parametrize("combinations", ["one", "many"])
def test_one_launch_per_pass(combinations, others):
    """However many parameters there are, one for each combination of dtypes, grid and alignment, and of the noise for each
    of dtype and alignment; and one program that loads what restores before the weights move. Noise has half as large tiles."""
    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append((self.kernel.__name__, *grid))
            return lambda *args, **kwargs: None

    def tensor(dtype, offset):
        return torch.empty(offset + 8193, dtype=dtype)[offset:]

    every = [(BF16, BF16, BF16, 0)]
    if combinations == "many":
        dtypes = (F32, BF16)
        every = [(theta, g, grid, offset) for theta in dtypes for g in dtypes for grid in dtypes for offset in (0, 1)]
    moves = [
        perturbation.Move(tensor(theta, offset), tensor(direction, 0), tensor(theta, 0), grid, number)
        for number, (theta, direction, grid, offset) in enumerate(every * (1 + others))  # each of them far from its like
    ]
    noise_of = {(theta, offset) for theta, _, _, offset in every}
    with pytest.MonkeyPatch.context() as patch:
        for name in PERTURBATION_KERNELS:
            module = noise if name == "noise_kernel" else perturbation
            patch.setattr(module, name, Counted(getattr(module, name)))
        subject = perturbation.Perturbation(moves, "asam", True)
        subject.squared_norm()
        subject.exchange(0.1, 5, 2)
        subject.restore()
        subject.fill_with_noise([move.theta for move in moves], [(0, move.number, 0) for move in moves], 2, 5)
    passes = [("norm_kernel", 2), ("restore_kernel", None), ("exchange_kernel", 2), ("restore_kernel", 2)]
    expected = [(name, tiles * (1 + others) if tiles else 1) for name, tiles in passes for _ in every]
    own = len(every) // len(noise_of) * (1 + others)
    assert launched == expected + [("noise_kernel", 3 * own)] * len(noise_of)


# The gate itself: a kernel that is wrong in a known way is caught, and for that. ----------------------------------------


def compile_one(launch, name, target="sm_90"):
    return artefacts.read(artefacts.compile_launches(launch, target)[name], target)


def assert_said(complaints, problems):
    for complaint in complaints:
        assert any(complaint in problem for problem in problems), (complaint, problems)


def test_spills_and_too_many_registers_are_caught():
    """The library's own forward, with too much in each thread's hands."""
    with config.forced(statistics={"BLOCK": 32768, "num_warps": 4}):
        artefact = compile_one(loss_path(F32), "statistics_kernel")
    problems = gate.problems("statistics_kernel", artefact, "sm_90", 4, 32768)
    said = ["registers, ceiling 64", "STACK", "instructions that spill"]
    assert_said([*said, "LDL in the hot loop"] if gate.NEW_ENOUGH else said, problems)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_narrow_accesses_of_the_library_are_caught(target):
    """More warps than a group of weights has 16 bytes for."""
    with config.forced(perturbation={"num_warps": 8}):
        artefact = compile_one(perturbation_path(BF16, BF16, BF16), "exchange_kernel", target)
    problems = gate.problems("exchange_kernel", artefact, target, 2)
    assert_said(["loads in the hot loop, 0 of them 16 bytes", "stores in the hot loop, 0 of them 16 bytes"], problems)


@pytest.mark.parametrize("target, step", [("sm_120", "SHFL"), ("gfx942", "_dpp")])
def test_vectors_of_unaligned_weights_are_caught(monkeypatch, target, step):
    """Spread over threads, across which they are then added up."""
    monkeypatch.setattr(config, "UNALIGNED", {"VEC": 8, "num_warps": 4})
    artefact = compile_one(perturbation_path(BF16, BF16, BF16, offset=1), "exchange_kernel", target)
    problems = gate.problems("exchange_kernel", artefact, target, 2, weights=gate.Weights(2, aligned=False))
    assert_said([step], [problem for problem in problems if "in the hot loop" in problem])


@triton.jit
def summed_across(b_x, o_column, b_label, m, inverse_s, scale):
    """What not to do: a sum across threads for each tile of a gradient."""
    return (tl.exp2(b_x.to(m.dtype) - m) * inverse_s - tl.sum(b_x.to(m.dtype))) * scale


@pytest.mark.parametrize("target, step, detour", [("sm_90", "SHFL", "STS|STSM"), ("gfx942", "_dpp", "s_barrier")])
def test_more_than_a_staged_gradients_detour_is_caught(monkeypatch, target, step, detour):
    monkeypatch.setattr(gradient, "softmax_minus_onehot", summed_across)
    monkeypatch.setattr(gradient, "gradient_kernel", triton.jit(gradient.gradient_kernel.fn))
    artefact = compile_one(loss_path(BF16, offset=3), "gradient_kernel", target)
    problems = gate.problems("gradient_kernel", artefact, target, 2, 4096, staged=True)
    assert_said([step, f"{detour} in the hot loop, at most 2 expected"], problems)


@triton.jit
def restored_twice(x, out, size, TILE: tl.constexpr, PAIR: tl.constexpr):
    """What not to do: beside a whole tile's wide accesses and the loop over a tile's part both once more, by elements."""
    o_tile, o_pair = tl.arange(0, TILE), tl.arange(0, PAIR)
    if size == TILE:
        tl.store(out + o_tile, tl.load(x + o_tile))
        tl.store(out + 3 * o_tile, tl.load(x + 3 * o_tile))
    for step in tl.static_range(1, 3):
        for i in range(0, size, PAIR):
            m_pair = o_pair < size - i
            tl.store(out + i + step * o_pair, tl.load(x + i + step * o_pair, mask=m_pair), mask=m_pair)


@pytest.mark.parametrize("target, warps", [("sm_90", 4), ("gfx942", 2)])
def test_more_accesses_than_those_of_a_tile_are_caught(target, warps):
    def launch():
        x, out = torch.zeros(8192, dtype=torch.int16), torch.zeros(8192, dtype=torch.int16)
        restored_twice[(1,)](x, out, 8192, TILE=8192, PAIR=2048, num_warps=warps, **config.OPTIONS)

    artefact = compile_one(launch, "restored_twice", target)
    complaints = [f"8 of 16 bytes and at most {others} others expected" for others in (7, 1)]
    complaints += [f"{what} in the loop over a tile's part, 16 expected" for what in ("loads", "stores")]
    assert_said(complaints, gate.restore_problems(artefact, target, 2, aligned=True))


@triton.jit
def label_behind_a_sum(o_row, end, labels, ignore_index, SHIFT: tl.constexpr):
    """What not to do: a sum across threads for each of the rows."""
    m_row = o_row < end
    b_label = tl.load(labels + o_row + SHIFT, mask=m_row, other=0)
    return b_label + tl.sum(b_label, 0), m_row & (b_label != ignore_index)


@pytest.mark.parametrize("target, step", [("sm_90", "SHFL"), ("gfx942", "_dpp")])
@pytest.mark.parametrize("name", ["pairs_kernel", "logps_kernel"])
def test_steps_across_threads_for_each_row_are_caught(monkeypatch, name, target, step):
    monkeypatch.setattr(pairs, "predicted_label", label_behind_a_sum)
    for function in ("sequence_sum", "pairs_kernel", "logps_kernel"):
        monkeypatch.setattr(pairs, function, triton.jit(getattr(pairs, function).fn))
    problems = gate.problems(name, compile_one(loss_path(F32), name, target), target, 4)
    assert_said([step], [problem for problem in problems if "in a loop over rows" in problem])


def test_two_binaries_of_one_kernel_are_caught():
    """Of which one would go unread."""
    with pytest.raises(AssertionError, match="expected one binary of statistics_kernel in a case, got two"):
        artefacts.compile_launches(lambda: (loss_path(BF16)(), loss_path(F32)()), "sm_90")


def test_no_number_is_specialised(monkeypatch):
    """Also those that are the same in every case above, the first tile of a second launch say."""
    seen, specialised = set(), []

    def record(self, *args, grid, warmup, **kwargs):
        given = dict(zip(self.arg_names, args)) | kwargs
        numbers = [p for p in self.params if isinstance(given[p.name], (int, float)) and not p.is_constexpr]
        seen.add(self.fn.__name__)
        specialised.extend((self.fn.__name__, p.name) for p in numbers if not p.do_not_specialize)

    monkeypatch.setattr(JITFunction, "run", record)
    with artefacts.as_if_on("sm_90"):
        for launch in (loss_path(BF16), loss_path(BF16, packed=True, others=True), perturbation_path(BF16, BF16, BF16)):
            launch()
    assert seen == LOSS_KERNELS | PERTURBATION_KERNELS and not specialised


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    monkeypatch.setattr(pairs, "sequence_sum", None)
    monkeypatch.setattr(pairs, "logps_kernel", triton.jit(pairs.logps_kernel.fn))
    with pytest.raises(RuntimeError, match=r"loss-sm_90-float32, .*: logps_kernel for sm_90 does not compile: \w+: "):
        compile_job(Job("loss", "sm_90", "float32"))


def test_a_size_that_is_specialised_is_caught(monkeypatch):
    """Batches of 1 have a binary of their own if the JIT is let."""
    sizes = [loss_path(BF16, pairs=1, length=1), loss_path(BF16)]
    monkeypatch.setattr(statistics, "statistics_kernel", triton.jit(statistics.statistics_kernel.fn))
    assert len({compile_one(size, "statistics_kernel", "gfx942").hash for size in sizes}) == 2


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


@triton.jit
def rescaled(x, out, size, BLOCK: tl.constexpr):
    """What not to do: a running maximum, and with it an exponential more, for each element."""
    m = tl.full([BLOCK], -1e30, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for i in range(0, size, BLOCK):
        b_x = tl.load(x + i + tl.arange(0, BLOCK)).to(tl.float32)
        b_new = tl.maximum(m, b_x)
        s = s * tl.exp(m - b_new) + tl.exp(b_x - b_new)
        m = b_new
    tl.store(out, tl.max(m, 0) + tl.log(tl.sum(s, 0)))


@triton.jit
def pipelined(x, out, size, BLOCK: tl.constexpr):
    """What not to do: the loop's loads staged through shared memory, and no exponential at all."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, size, BLOCK, num_stages=3):
        b_sum += tl.load(x + i + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out, tl.sum(b_sum, 0))


@triton.jit
def zeroing(x, out, size, BLOCK: tl.constexpr):
    """What not to do: zeros behind a barrier and with a mask on every element, in a loop beside the longest."""
    o = tl.arange(0, BLOCK)
    for i in range(0, size, BLOCK):
        tl.store(x + i + o, tl.exp(tl.load(x + i + o).to(tl.float32)).to(x.dtype.element_ty))
    for i in range(0, size, BLOCK):
        tl.debug_barrier()
        tl.store(out + i + o, tl.zeros([BLOCK], out.dtype.element_ty), mask=i + o < size)


@triton.jit
def nested(x, out, size, BLOCK: tl.constexpr):
    """What not to do: a step across threads between two loops, in the outer one of which every tile may end."""
    o = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(0, size, BLOCK):
        for j in range(i, tl.minimum(i + BLOCK, size), BLOCK):
            b_sum += tl.exp(tl.load(x + j + o).to(tl.float32))
        b_sum = b_sum / tl.sum(b_sum, 0)
    tl.store(out, tl.sum(b_sum, 0))


@triton.jit
def atomic(x, out, size, BLOCK: tl.constexpr):
    """What not to do: sums in global memory."""
    o = tl.arange(0, BLOCK)
    for i in range(0, size, BLOCK):
        tl.atomic_add(out + o, tl.exp(tl.load(x + i + o).to(tl.float32)), sem="relaxed")


@triton.jit
def twice(x, out, size, BLOCK: tl.constexpr):
    """What not to do: the row read once more, an element at a time."""
    o = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(0, size, BLOCK):
        b_sum += tl.exp(tl.load(x + i + o).to(tl.float32))
    s = tl.sum(b_sum, 0)
    for i in range(size):
        s += tl.load(x + i).to(tl.float32)
    tl.store(out, s)


# A kernel, and what must be said of it.
@pytest.mark.parametrize(
    "bad, target, complaints",
    [
        (
            masked_everywhere,
            "sm_90",
            ["loads in the hot loop, 0 of them 16 bytes, 4 expected", "SHFL", "BAR", "instructions for each element"],
        ),
        (
            masked_everywhere,
            "gfx942",
            ["loads in the hot loop, 0 of them 16 bytes, 2 expected", "_dpp in the", "s_barrier in the", "ds_read"],
        ),
        (masked_everywhere, "sm_100", ["loads in the hot loop, 0 of them 16 bytes, 4 expected", "CREDUX", "BAR"]),
        (rescaled, "sm_90", ["64 exponentials in the hot loop, 32"]),
        (pipelined, "sm_90", ["0 loads in the hot loop", "LDS", "LDGSTS", "BAR", "0 exponentials in the hot loop, 32"]),
        (
            zeroing,
            "sm_90",
            ["stores in another loop, 0 of them 16 bytes, 0", "BAR.SYNC.DEFER_BLOCKING in another", "1 loops beside"],
        ),
        (atomic, "sm_90", ["ADD.F32"]),
        (atomic, "gfx942", ["atomic_add_f32 in the hot loop"]),
        (twice, "sm_90", ["FADD in another loop"]),
        (twice, "gfx942", ["v_add_f32"]),
        (nested, "sm_90", ["1 loops within loops, 0 expected"]),
        (nested, "gfx942", ["1 loops within loops, 0 expected"]),
        (zeroing, "gfx942", ["stores in another loop, 0 of them 16 bytes, 0", "1 s_barrier in another loop"]),
    ],
)
def test_bad_kernels_are_caught(bad, target, complaints):
    def launch():
        x, out = torch.zeros(50257, dtype=torch.bfloat16), torch.zeros(1)
        bad[(1,)](x, out, 50257, BLOCK=4096, num_warps=4, **config.OPTIONS)

    artefact = compile_one(launch, bad.__name__, target)
    expected = gate.stream("statistics_kernel", artefact, target, 2, 4096)
    if (bad, target) == (zeroing, "sm_90") and not gate.NEW_ENOUGH:  # which makes the zeros' loop the longest
        complaints = ["0 loads in the hot loop, 0 of them 16 bytes, 4 expected"]
    assert_said(complaints, gate.loop_problems(artefact, target, expected))


def test_loops_are_found():
    """Innermost ones; forward branches and the one to itself after the end left out."""
    listing = """		Function : example
        /*0000*/                   MOV R1, c[0x0][0x28] ;           /* 0x00000a0000017a02 */
                                                                    /* 0x000fc40000000f00 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;          /* 0x0000000000027805 */
        /*0020*/                   LDG.E.128 R4, [R2.64] ;          /* 0x0000000000027805 */
        /*0030*/               @P1 BRA 0x50 ;                       /* 0x0000006000001947 */
        /*0040*/                   MUFU.EX2 R4, R4 ;                /* 0x0000006000001947 */
        /*0050*/              @!P0 BRA 0x20 ;                       /* 0x0000006000001947 */
        /*0060*/               @P2 BRA 0x10 ;                       /* 0x0000006000001947 */
        /*0070*/                   STG.E.128 [R2.64], R4 ;          /* 0x0000006000001947 */
        /*0080*/                   LDG.E.U16 R4, [R2.64] ;          /* 0x0000006000001947 */
        /*0090*/                   BRA.U !UP0, 0x80 ;               /* 0x0000006000001947 */
        /*00a0*/                   EXIT ;                           /* 0x000000000000794d */
        /*00b0*/                   BRA 0xb0;                        /* 0xfffffff000007947 */
"""
    instructions, (first, second), in_loops = artefacts.parse_sass(listing)
    assert in_loops == [instructions[1], *first, "@P2 BRA 0x10", *second]
    assert first == ["LDG.E.128 R4, [R2.64]", "@P1 BRA 0x50", "MUFU.EX2 R4, R4", "@!P0 BRA 0x20"]
    assert second == ["LDG.E.U16 R4, [R2.64]", "BRA.U !UP0, 0x80"]
    load, wide = gate.CUDA.load, gate.CUDA.wide_load
    assert artefacts.count(first, load) == artefacts.count(first, wide) == 1
    assert artefacts.count(second, load) == 1 and artefacts.count(second, wide) == 0
    assert artefacts.count(first, "BRA") == 2 and artefacts.count(first, "MUFU") == 1


def test_loops_of_amd_are_found():
    """By LLVM's marks: a branch back may also belong to a block that was laid out later, and a loop's head lie below it."""
    listing = """.LBB0_1:
\ts_mov_b32 s0, 0
.LBB0_2:                                ; %.lr.ph
                                        ; =>This Inner Loop Header: Depth=1
\t.loc\t1 90 5 is_stmt 1                ; statistics.py:90:5
\tbuffer_load_dwordx4 v[12:15], v10, s[4:7], 0 offen
\ts_cbranch_scc0 .LBB0_3
\tv_exp_f32_e32 v1, v1
.LBB0_3:                                ;   in Loop: Header=BB0_2 Depth=1
\ts_cbranch_scc1 .LBB0_2
; %bb.4:                                ; %._crit_edge
\tglobal_load_ushort v1, v[2:3], off
\ts_branch .LBB0_6
.LBB0_5:                                ;   in Loop: Header=BB0_6 Depth=1
\ts_cbranch_scc1 .LBB0_1
.LBB0_6:                                ; =>This Inner Loop Header: Depth=1
\ts_branch .LBB0_5
"""
    (load, *_, last), below = artefacts.parse_amdgcn(listing).loops
    assert below == ["s_cbranch_scc1 .LBB0_1", "s_branch .LBB0_5"]
    assert load == "buffer_load_dwordx4 v[12:15], v10, s[4:7], 0 offen" and last == "s_cbranch_scc1 .LBB0_2"
    instructions = artefacts.parse_amdgcn(listing).instructions
    assert len(instructions) == 9 and artefacts.count(instructions, gate.AMD.exp2) == 1
    assert artefacts.count(instructions, gate.AMD.load) == 2 and artefacts.count(instructions, gate.AMD.wide_load) == 1


@jobs("linear", what=["bfloat16"])
def test_every_loop_of_the_source_is_found(job, compiled):
    """gradient_kernel has three: over the tiles, over the zeros of a row that predicts nothing, and for packed rows the
    search for a row's sequence; statistics_kernel the first and the last."""
    kernels = compiled[UNALIGNED]
    code = gate.dialect(job.target)
    tiles = [loop for loop in kernels["gradient_kernel"].loops if artefacts.count(loop, code.store)]
    tiles, zeros = sorted(tiles, key=len, reverse=True)
    assert artefacts.count(tiles, code.load) and not artefacts.count(zeros, code.load)
    assert len(kernels["gradient_kernel"].loops) == 3 and len(kernels["statistics_kernel"].loops) == 2
