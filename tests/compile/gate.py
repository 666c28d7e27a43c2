"""What no kernel of the library may do, and what those that stream may cost; each complaint names what it counted."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import triton

from artefacts import Artefact, count, loops_within_loops
from gapo_kernels import philox


class Dialect(NamedTuple):
    """How an instruction set says it: regular expressions for opcodes."""

    threads: int  # of a warp
    registers: str
    spills: tuple[str, ...]  # resources that must be 0
    spill: str
    load: str
    wide_load: str  # of 16 bytes
    store: str
    wide_store: str
    across: str  # steps across threads, atomics, and accesses that are none of the above
    floating: str  # arithmetic with floating-point numbers
    exp2: str
    multiply_add: str


CUDA = Dialect(
    threads=32,
    registers="REG",
    spills=("STACK", "LOCAL"),
    spill="LDL|STL",
    load="LDG",
    wide_load=r"LDG\.E\.128",
    store="STG",
    wide_store=r"STG\.E\.128",
    across=r"SHFL|BAR|LDS|LDSM|STS|STSM|LDGSTS|SYNCS|WARPSYNC|VOTE|MATCH|RED\w*|ATOM\w*|LD|ST",
    floating=r"[FD](?:ADD|MUL|FMA|MNMX|SETP|SET)\w*|H(?:ADD|MUL|MNMX|SETP|SET)\w*|MUFU",  # by HFMA2 constants are loaded, too
    exp2=r"MUFU\.EX2",
    multiply_add=r"(?:FFMA|FMUL)\w*",
)
AMD = Dialect(
    threads=64,
    registers="vgpr_count",
    spills=("vgpr_spill_count", "private_segment_fixed_size"),  # scalars spill into vector registers' lanes: no memory
    spill=r"scratch_\w+",
    load=r"(?:global|buffer|flat)_load\w*",
    wide_load="(?:global|buffer)_load_dwordx4",
    store=r"(?:global|buffer|flat)_store\w*",
    wide_store="(?:global|buffer)_store_dwordx4",
    across=r"ds_\w+|s_barrier|\w+_dpp|v_permlane\w+|(?:global|buffer|flat)_atomic\w*",
    floating=r"v_(?:pk_)?(?:add|sub|mul|fma|fmac|max|min|exp|cmp_\w+)_(?:f|bf)(?:16|32|64)\w*",
    exp2=r"v_exp_f32\w*",
    multiply_add=r"v_(?:pk_)?(?:fma|mul)\w*",
)


def dialect(target: str) -> Dialect:
    return AMD if target.startswith("gfx") else CUDA


# Registers of a thread. 64 leave room for 1024 threads on a multiprocessor, or for all that AMD's can hold; 144 for the 12
# warps that the exchange, with four or eight 16-byte loads in flight in each thread, needs.
REGISTERS = {
    "statistics_kernel": {"REG": 64, "vgpr_count": 64},
    "gradient_kernel": {"REG": 64, "vgpr_count": 64},
    "norm_kernel": {"REG": 64, "vgpr_count": 64},
    "exchange_kernel": {"REG": 144, "vgpr_count": 128},
    "restore_kernel": {"REG": 96, "vgpr_count": 64},
    "noise_kernel": {"REG": 144, "vgpr_count": 128},
    "pairs_kernel": {"REG": 104, "vgpr_count": 128},
    "logps_kernel": {"REG": 96, "vgpr_count": 128},
}
# Instructions for each element in the hot loop. config.TABLE has what they are; bandwidth leaves room for twice as many and
# more. The ceilings show what crept in, with any release of Triton.
INSTRUCTIONS = {"statistics_kernel": 8.5, "gradient_kernel": 14, "norm_kernel": 8, "exchange_kernel": 36}
NEW_ENOUGH = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
if not NEW_ENOUGH:  # Triton 3.6, on AMD: 177 for float16, and 14.5 in two candidates of tuning
    REGISTERS["exchange_kernel"]["vgpr_count"] = 192
    INSTRUCTIONS["gradient_kernel"] = 15
# A gradient that begins elsewhere in 16 bytes than its logits is stored element by element, on CUDA after a detour through
# shared memory, which takes registers and instructions of its own.
STAGED_REGISTERS, STAGED_INSTRUCTIONS = {"REG": 96, "vgpr_count": 128}, 24
# By target and a logit's bytes. float32 takes 100 on sm_120: two programs of 8 warps run side by side up to 128.
STAGED_MORE = {("sm_120", 4): {"REG": 104}}
TABLE_LOADS = 7  # of noise_kernel: the tile's row, and its columns
# Bytes that a thread may put on the stack where nothing is asked of the speed. The perturbation of unaligned weights has an
# address for each access, of which Triton 3.6 spills two; float64, for gradcheck, has 24 (sm_120) in the loss.
UNALIGNED_SPILLS, FLOAT64_SPILLS = 16, 32


class Stream(NamedTuple):
    """What a hot loop does in one iteration, in each thread."""

    elements: int
    loads: int  # of 16 bytes
    stores: int | None  # of 16 bytes; None: however it likes
    exponentials: int
    ceiling: float  # instructions for each element
    zeros: int = 0  # stores of 16 bytes that zero a tile, in a loop of their own, which the compiler may unroll
    narrow_loads: int = 0  # of fewer bytes: a direction's that is narrower than theta


class Weights(NamedTuple):
    """What the passes over the weights are compiled for, beside theta's bytes."""

    direction: int  # bytes of an element
    asam: bool = True


def stream(
    name: str,
    artefact: Artefact,
    target: str,
    itemsize: int,
    block: int | None,
    staged: bool = False,
    weights: Weights | None = None,
) -> Stream | None:
    """Of a kernel of the library. `itemsize`: of a logit or of theta. `block`: elements of a row in flight per program."""
    ceiling = STAGED_INSTRUCTIONS if staged else INSTRUCTIONS.get(name)
    if ceiling is None:
        return None
    threads = dialect(target).threads * artefact.num_warps
    if name in ("norm_kernel", "exchange_kernel"):
        weights = weights or Weights(itemsize)
        elements = 2 * philox.LANES // threads
        of_theta = elements * itemsize // 16
        of_direction = elements * max(weights.direction, itemsize) // 16
        exchanges, narrow = name == "exchange_kernel", weights.direction < itemsize
        loads = of_theta * (exchanges or weights.asam) + of_direction * (not narrow)
        return Stream(elements, loads, 2 * of_theta * exchanges, 0, ceiling, narrow_loads=of_direction * narrow)
    elements = block // threads
    accesses = elements * itemsize // 16
    if name == "statistics_kernel":
        return Stream(elements, accesses, 0, elements, ceiling)
    return Stream(elements, accesses, None if staged else accesses, elements, ceiling, zeros=accesses)


def unrolled(artefact: Artefact, target: str, expected: Stream) -> Stream:
    """`expected` of a loop that only loads, which the compiler may unroll."""
    loads = expected.loads + expected.narrow_loads
    if not loads or expected.stores != 0 or expected.exponentials:
        return expected
    code = dialect(target)
    times, rest = divmod(count(artefact.hot_loop, code.load), loads)
    # More loads are more rounds only if there are as many more sums of squares.
    if rest or times < 2 or count(artefact.hot_loop, code.multiply_add) < times * expected.elements:
        return expected
    return expected._replace(
        elements=times * expected.elements, loads=times * expected.loads, narrow_loads=times * expected.narrow_loads
    )


def instructions_per_element(artefact: Artefact, expected: Stream) -> float:
    return len(artefact.hot_loop) / expected.elements


def unwanted_problems(loop: list[str], unwanted: str, where: str) -> list[str]:
    opcodes = Counter(re.sub(r"^@\S+ ", "", i).split()[0] for i in loop if count([i], unwanted))
    return [f"{found} {opcode} in {where}" for opcode, found in opcodes.items()]


def loop_problems(artefact: Artefact, target: str, expected: Stream) -> list[str]:
    """What is wrong with the hot loop."""
    code, loop = dialect(target), artefact.hot_loop
    problems = []
    expected = unrolled(artefact, target, expected)
    accesses = [("loads", code.load, code.wide_load, expected.loads, expected.narrow_loads)]
    if expected.stores is not None:
        accesses.append(("stores", code.store, code.wide_store, expected.stores, 0))
    for what, any_width, wide, wanted, narrow in accesses:
        found, found_wide = count(loop, any_width), count(loop, wide)
        if not (found_wide == wanted and found == wanted + narrow):
            problems.append(f"{found} {what} in the hot loop, {found_wide} of them 16 bytes, {wanted} expected")
    unwanted = code.spill if expected.stores is None else f"{code.spill}|{code.across}"
    problems += unwanted_problems(loop, unwanted, "the hot loop")
    # One an element, and those by which a running sum is scaled when its maximum grows: not one for each element.
    if not expected.exponentials <= (found := count(loop, code.exp2)) <= 1.5 * expected.exponentials:
        problems.append(f"{found} exponentials in the hot loop, {expected.exponentials} expected")
    if (each := instructions_per_element(artefact, expected)) > expected.ceiling:
        problems.append(f"{each:.1f} instructions for each element in the hot loop, ceiling {expected.ceiling}")
    # Only innermost loops are read: what lies between one and a loop around it would go unseen.
    if nested := loops_within_loops(artefact.ttgir):
        problems.append(f"{nested} loops within loops, 0 expected")
    return problems + other_loop_problems(artefact, target, expected)


def other_loop_problems(artefact: Artefact, target: str, expected: Stream) -> list[str]:
    """What is wrong with the loops beside the hot one: over the zeros of a row that predicts nothing, and for packed
    rows the search for a row's sequence, a lone load.
    """
    code, problems, zeroing = dialect(target), [], 0
    for loop in artefact.loops:
        if loop is artefact.hot_loop:
            continue
        # Where numbers are added up, multiplied or compared, a row is read once more.
        problems += unwanted_problems(loop, f"{code.spill}|{code.across}|{code.floating}", "another loop")
        loads, wide_loads = count(loop, code.load), count(loop, code.wide_load)
        stores, wide_stores = count(loop, code.store), count(loop, code.wide_store)
        if loads > 1 or loads and stores:
            problems.append(f"{loads} loads in another loop, {wide_loads} of them 16 bytes, at most 1 expected")
        if stores:
            zeroing += 1
            if stores != wide_stores or not expected.zeros or stores % expected.zeros:
                wanted = f"a multiple of {expected.zeros}" if expected.zeros else 0
                problems.append(f"{stores} stores in another loop, {wide_stores} of them 16 bytes, {wanted} expected")
    if zeroing != (wanted := int(expected.zeros > 0)):
        problems.append(f"{zeroing} loops beside the hot one store, {wanted} expected")
    return problems


def whole_tile_problems(name: str, artefact: Artefact, target: str, itemsize: int) -> list[str]:
    """restore_kernel and noise_kernel have their whole tile in hand at once."""
    code, restores = dialect(target), name == "restore_kernel"
    wanted = (philox.TILE if restores else philox.NOISE_TILE) * itemsize // (16 * code.threads * artefact.num_warps)
    if not restores:  # whose branch around whole tiles is made of predicates
        stores = count(artefact.instructions, code.wide_store)
        problems = [f"{stores} stores of 16 bytes, {wanted} expected"] if stores != wanted else []
        # Of its table; what it loads of the noise for the sake of a layout must be gone.
        if (loads := count(artefact.instructions, code.load)) > TABLE_LOADS:
            problems.append(f"{loads} loads, at most {TABLE_LOADS} expected")
        return problems + unwanted_problems(artefact.instructions, code.across, "the kernel")
    unmasked = [instruction for instruction in artefact.instructions if not instruction.startswith("@")]
    found = {"loads": count(unmasked, code.wide_load), "stores": count(unmasked, code.wide_store)}
    problems = [f"{n} {what} of 16 bytes, {wanted} expected" for what, n in found.items() if n < wanted]
    # One barrier: behind it the tile's mark is taken back.
    unwanted = unwanted_problems(artefact.instructions, code.across, "the kernel")
    return problems + [problem for problem in unwanted if not re.match(r"1 (?:BAR|s_barrier)\b", problem)]


def spill_problems(artefact: Artefact, target: str, allowed: int = 0) -> list[str]:
    code = dialect(target)
    limits = {name: allowed // 4 if name.endswith("_count") else allowed for name in code.spills}  # a register has 4 bytes
    problems = [f"{n} {artefact.resources[n]} (spilled)" for n in code.spills if artefact.resources[n] > limits[n]]
    if found := 0 if allowed else count(artefact.instructions, code.spill):
        problems.append(f"{found} instructions that spill")
    return problems


def register_problems(artefact: Artefact, target: str, ceilings: dict[str, int]) -> list[str]:
    name = dialect(target).registers
    found, ceiling = artefact.resources[name], ceilings[name]
    return [f"{found} registers, ceiling {ceiling}"] if found > ceiling else []


def problems(
    name: str,
    artefact: Artefact,
    target: str,
    itemsize: int,
    block: int | None = None,
    staged: bool = False,
    weights: Weights | None = None,
) -> list[str]:
    """All that is wrong with a kernel of the library on memory of its dtype's alignment."""
    found = spill_problems(artefact, target)
    ceilings = STAGED_MORE.get((target, itemsize), STAGED_REGISTERS) if staged else REGISTERS[name]
    found += register_problems(artefact, target, ceilings)
    if expected := stream(name, artefact, target, itemsize, block, staged, weights):
        found += loop_problems(artefact, target, expected)
    if name in ("restore_kernel", "noise_kernel"):
        found += whole_tile_problems(name, artefact, target, itemsize)
    return found
