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
    detour: dict[str, int]  # through shared memory, of a staged gradient: for each 16 bytes at most as many


CUDA = Dialect(
    threads=32,
    registers="REG",
    spills=("STACK", "LOCAL"),
    spill="LDL|STL",
    load="LDG",
    wide_load=r"LDG\.E\.128",
    store="STG",
    wide_store=r"STG\.E\.128",
    across=r"SHFL|BAR|LDS|LDSM|STS|STSM|LDGSTS|SYNCS|WARPSYNC|VOTEU?|MATCH|C?RED\w*|ATOM\w*|LD|ST",
    floating=r"[FD](?:ADD|MUL|FMA|MNMX|SETP|SET)\w*|H(?:ADD|MUL|MNMX|SETP|SET)\w*|MUFU",  # by HFMA2 constants are loaded, too
    exp2=r"MUFU\.EX2",
    multiply_add=r"[FD](?:FMA|MUL)\w*",
    detour={"BAR": 2, "STS|STSM": 1, "LDS|LDSM": 1},
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
    detour={"s_barrier": 1, r"ds_write\w*": 4, r"ds_read\w*": 2},
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
# float64, for gradcheck: exp is a polynomial in registers of two words.
FLOAT64_REGISTERS = {
    **REGISTERS,
    "statistics_kernel": {"REG": 128, "vgpr_count": 144},
    "gradient_kernel": {"REG": 152, "vgpr_count": 128},
    "norm_kernel": {"REG": 104, "vgpr_count": 104},
    "restore_kernel": {"REG": 152, "vgpr_count": 152},
}
FLOAT64_STAGED_REGISTERS = {"REG": 128, "vgpr_count": 224}
FLOAT64_INSTRUCTIONS = {"statistics_kernel": 72, "gradient_kernel": 52, "norm_kernel": 8, "exchange_kernel": 36}
CUT_REGISTERS = {"REG": 144, "vgpr_count": 152}  # of the exchange
MASTERS_INSTRUCTIONS = {"exchange_kernel": 37}  # what the cast takes away is kept
if not NEW_ENOUGH:  # Triton 3.6: the instructions of float64 on sm_120; the exchange with 154 registers, 150 in float64
    FLOAT64_INSTRUCTIONS = {"statistics_kernel": 180, "gradient_kernel": 128, "norm_kernel": 14, "exchange_kernel": 54}
    FLOAT64_REGISTERS["exchange_kernel"] = {"REG": 152, "vgpr_count": 192}
    CUT_REGISTERS["REG"], MASTERS_INSTRUCTIONS["exchange_kernel"] = 160, 39
# An address for each element.
UNALIGNED_INSTRUCTIONS = {"norm_kernel": 12, "exchange_kernel": 44}
ROW_LOADS = 7  # of restore_kernel and noise_kernel: the tile's flag, its move's number, and that move's row of the table


class Stream(NamedTuple):
    """What a hot loop does in one iteration, in each thread."""

    elements: int
    loads: int  # of 16 bytes
    stores: int  # of 16 bytes
    exponentials: int  # of float32: float64's have no instruction
    ceiling: float  # instructions for each element
    zeros: int = 0  # stores of 16 bytes that zero a tile, in a loop of their own, which the compiler may unroll
    narrow_loads: int = 0  # of fewer bytes: a direction's that is narrower than theta, or of unaligned weights
    narrow_stores: int = 0  # a staged gradient's, or of unaligned weights
    detours: int = 0  # 16 bytes that go through shared memory


class Weights(NamedTuple):
    """What the passes over the weights are compiled for, beside theta's bytes."""

    direction: int  # bytes of an element
    asam: bool = True
    aligned: bool = True
    cut: bool = False  # of shards that begin within a tile
    masters: bool = False  # theta is finer than the grid


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
    ceilings = FLOAT64_INSTRUCTIONS if itemsize == 8 else INSTRUCTIONS
    if name not in ceilings:
        return None
    ceiling = STAGED_INSTRUCTIONS if staged and itemsize < 8 else ceilings[name]
    threads = dialect(target).threads * artefact.num_warps
    if name in ("norm_kernel", "exchange_kernel"):
        weights = weights or Weights(itemsize)
        if weights.masters:
            ceiling = MASTERS_INSTRUCTIONS.get(name, ceiling)
        elements, exchanges = 2 * philox.LANES // threads, name == "exchange_kernel"
        if not weights.aligned:
            loads, stores = (1 + (exchanges or weights.asam)) * elements, 2 * elements * exchanges
            ceiling = UNALIGNED_INSTRUCTIONS[name]
            return Stream(elements, 0, 0, 0, ceiling, narrow_loads=loads, narrow_stores=stores)
        of_theta = elements * itemsize // 16
        of_direction = elements * max(weights.direction, itemsize) // 16
        narrow = weights.direction < itemsize
        loads = of_theta * (exchanges or weights.asam) + of_direction * (not narrow)
        return Stream(elements, loads, 2 * of_theta * exchanges, 0, ceiling, narrow_loads=of_direction * narrow)
    elements = block // threads
    accesses, exponentials = elements * itemsize // 16, elements * (itemsize < 8)
    if name == "statistics_kernel":
        return Stream(elements, accesses, 0, exponentials, ceiling)
    if staged:
        return Stream(elements, accesses, 0, exponentials, ceiling, zeros=accesses, narrow_stores=elements, detours=accesses)
    return Stream(elements, accesses, accesses, exponentials, ceiling, zeros=accesses)


def unrolled(artefact: Artefact, target: str, expected: Stream) -> Stream:
    """`expected` of a loop without exponentials, which the compiler may unroll."""
    loads, stores = expected.loads + expected.narrow_loads, expected.stores + expected.narrow_stores
    if not loads or expected.exponentials:
        return expected
    code = dialect(target)
    times, rest = divmod(count(artefact.hot_loop, code.load), loads)
    # More accesses are more rounds only if there is as much more arithmetic, a square to add or rho theta^2 g to form;
    # float64's exponentials are a lot more.
    each = count(artefact.hot_loop, code.multiply_add) / (max(1, times) * expected.elements)
    least = 3 if stores else 1
    if rest or times < 2 or count(artefact.hot_loop, code.store) != times * stores or not least <= each <= 4:
        return expected
    accesses = "elements loads narrow_loads stores narrow_stores".split()
    return expected._replace(**{name: times * getattr(expected, name) for name in accesses})


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
    accesses = [
        ("loads", code.load, code.wide_load, expected.loads, expected.narrow_loads),
        ("stores", code.store, code.wide_store, expected.stores, expected.narrow_stores),
    ]
    for what, any_width, wide, wanted, narrow in accesses:
        found, found_wide = count(loop, any_width), count(loop, wide)
        if not (found_wide == wanted and found == wanted + narrow):
            others = f" and {narrow} narrower" if narrow else ""
            problems.append(f"{found} {what} in the hot loop, {found_wide} of them 16 bytes, {wanted}{others} expected")
    for step, times in code.detour.items() if expected.detours else ():
        if (found := count(loop, step)) > (most := times * expected.detours):
            problems.append(f"{found} {step} in the hot loop, at most {most} expected")
        loop = [instruction for instruction in loop if not count([instruction], step)]
    problems += unwanted_problems(loop, f"{code.spill}|{code.across}", "the hot loop")
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


def restore_problems(artefact: Artefact, target: str, itemsize: int, aligned: bool) -> list[str]:
    """restore_kernel has a whole tile in hand at once, and goes through a tile's part in a loop, behind masks."""
    code, loop = dialect(target), [instruction for loop in artefact.loops for instruction in loop]
    threads = code.threads * artefact.num_warps
    width, part = 16 if aligned else itemsize, 2 * philox.LANES // threads
    wanted, problems = philox.TILE * itemsize // (width * threads), []
    accesses = [("loads", code.load, code.wide_load, ROW_LOADS), ("stores", code.store, code.wide_store, 1)]
    for what, any_width, wide, others in accesses:
        inside, everywhere = count(loop, any_width), count(artefact.instructions, any_width)
        found = everywhere - inside
        found_wide = count(artefact.instructions, wide) - count(loop, wide)
        if found_wide != wanted * aligned or not wanted <= found <= wanted + others:
            expected = f"{wanted} of {width} bytes and at most {others} others expected"
            problems.append(f"{found} {what}, {found_wide} of them 16 bytes, {expected}")
        if inside != part:
            problems.append(f"{inside} {what} in the loop over a tile's part, {part} expected")
    # One barrier behind the loop: then the tile's mark is taken back.
    unwanted = unwanted_problems(artefact.instructions, code.across, "the kernel")
    problems += [problem for problem in unwanted if not re.match(r"1 (?:BAR|s_barrier)\b", problem)]
    return problems + unwanted_problems(loop, code.across, "the loop over a tile's part")


def noise_problems(artefact: Artefact, target: str, itemsize: int, aligned: bool) -> list[str]:
    """noise_kernel has its tile in hand at once; its branch around whole tiles is made of predicates."""
    code = dialect(target)
    store, width = (code.wide_store, 16) if aligned else (code.store, itemsize)
    wanted = philox.NOISE_TILE * itemsize // (width * code.threads * artefact.num_warps)
    stores, most = count(artefact.instructions, store), wanted if aligned else 2 * wanted  # the other branch's, too
    problems = [] if wanted <= stores <= most else [f"{stores} stores of {width} bytes, {wanted} expected"]
    if not aligned and (wide := count(artefact.instructions, code.wide_store)):
        problems.append(f"{wide} stores of 16 bytes, 0 expected")
    # What it loads of the noise for the sake of a layout must be gone.
    if (loads := count(artefact.instructions, code.load)) > ROW_LOADS:
        problems.append(f"{loads} loads, at most {ROW_LOADS} expected")
    return problems + unwanted_problems(artefact.instructions, code.across, "the kernel")


def row_loops_problems(artefact: Artefact, target: str) -> list[str]:
    """pairs_kernel and logps_kernel add up some numbers a row, which every thread takes some of."""
    code = dialect(target)
    return unwanted_problems(artefact.in_loops, f"{code.spill}|{code.across}", "a loop over rows")


def without_cut(artefact: Artefact, target: str) -> tuple[Artefact, list[str]]:
    """An exchange of shards that begin within a tile, less its loop over such a tile's groups; and what is wrong with that:
    it goes element by element, behind masks."""
    code, masked = dialect(target), artefact.hot_loop
    expected = 2 * 2 * philox.LANES // (code.threads * artefact.num_warps)
    problems = unwanted_problems(masked, f"{code.spill}|{code.across}", "the loop over a cut tile")
    found = {"loads": count(masked, code.load), "stores": count(masked, code.store)}
    problems += [f"{n} {what} in the loop over a cut tile, {expected} expected" for what, n in found.items() if n != expected]
    return artefact._replace(loops=[loop for loop in artefact.loops if loop is not masked]), problems


def spill_problems(artefact: Artefact, target: str) -> list[str]:
    code = dialect(target)
    problems = [f"{artefact.resources[n]} {n} (spilled)" for n in code.spills if artefact.resources[n]]
    if found := count(artefact.instructions, code.spill):
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
    """All that is wrong with a kernel of the library."""
    found = spill_problems(artefact, target)
    ceilings = (FLOAT64_REGISTERS if itemsize == 8 else REGISTERS)[name]
    if staged:
        ceilings = FLOAT64_STAGED_REGISTERS if itemsize == 8 else STAGED_MORE.get((target, itemsize), STAGED_REGISTERS)
    if name == "exchange_kernel" and weights and weights.cut:
        ceilings = CUT_REGISTERS
        artefact, more = without_cut(artefact, target)
        found += more
    found += register_problems(artefact, target, ceilings)
    if expected := stream(name, artefact, target, itemsize, block, staged, weights):
        found += loop_problems(artefact, target, expected)
    aligned = weights is None or weights.aligned
    if name == "restore_kernel":
        found += restore_problems(artefact, target, itemsize, aligned)
    elif name == "noise_kernel":
        found += noise_problems(artefact, target, itemsize, aligned)
    elif name in ("pairs_kernel", "logps_kernel"):
        found += row_loops_problems(artefact, target)
    return found
