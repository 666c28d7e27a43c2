"""The three passes over the weights, norm, exchange, restore, each one launch over all parameters of the same dtypes.

    delta  = step_size * theta^2 * g (asam)  or  step_size * g (sam)
    theta~ = round(cast(theta) + delta)         cast and round: to the grid of the dtype that the forward computes with

The same as `gapo_kernels/perturbation.py`, which also says what is stored where theta is finer than the grid, bit for bit
but for fused multiply-adds. Floor, b bytes a weight: the norm reads 2 b (sam: b), the exchange reads 2 b and writes 2 b, the
restoration reads b and writes b; beyond that a tile of 8192 weights costs about 100 bytes of tables and partial sums.

A program handles one tile of philox.py, so that one call of the generator, on the counters of a group's 1024 lanes, serves
the tile's eight groups and every access is to 1024 neighbouring elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapo_kernels import philox
from gapo_kernels.kernels import config
from gapo_kernels.kernels.noise import fill_with_noise
from gapo_kernels.kernels.primitives import (
    TYPES,
    from_host,
    int32,
    joined,
    lanes_beside,
    on_device,
    round_to_nearest,
    vector_offsets,
    widen,
)
from gapo_kernels.perturbation import Move, accumulation_dtype

GROUP = tl.constexpr(philox.LANES)
PAIR = tl.constexpr(2 * philox.LANES)
TILE = tl.constexpr(philox.TILE)
ROUNDING = tl.constexpr(philox.ROUNDING)

# The table's columns, int64, a row for each parameter, or shard of one: counted is from the whole one's first element.
COLUMNS = tl.constexpr(9)  # with 8, rows of 64 bytes, NVIDIA's assembler spills in the exchange for sm_100
THETA_ADDRESS = tl.constexpr(0)
DIRECTION_ADDRESS = tl.constexpr(1)
ORIGINAL_ADDRESS = tl.constexpr(2)
END = tl.constexpr(3)
NUMBER = tl.constexpr(4)
SHARD = tl.constexpr(5)
TILES_BEFORE = tl.constexpr(6)
FIRST = tl.constexpr(7)
TILES = tl.constexpr(8)


@triton.jit
def place_of_tile(table, move_of_tile, i_tile, CUT: tl.constexpr):
    """The row of the tile's parameter, the tile's number in it, and which of its elements are there: those from `missing`
    to below `left`. CUT: parameters may begin within a tile."""
    row = table + tl.load(move_of_tile + i_tile) * COLUMNS
    i_own = i_tile - tl.load(row + TILES_BEFORE)
    left = tl.minimum(tl.load(row + END) - i_own * TILE, TILE).to(tl.int32)
    missing = tl.maximum(tl.load(row + FIRST) - i_own * TILE, 0).to(tl.int32) if CUT else 0
    return row, i_own, missing, left


@triton.jit
def tile_pointer(row, COLUMN: tl.constexpr, i_own, missing, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tile's element number `missing`. The address is complete before it is a pointer: see primitives.row_address."""
    o_first = i_own * TILE + missing
    pointer = (tl.load(row + COLUMN) + o_first * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def round_stochastically(b_x, b_random, GRID: tl.constexpr):
    """float32 to one of its two neighbours on a 16-bit grid, in float32; b_random in [0, 2^16)."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_random = b_random.to(tl.int32)
    if GRID == tl.bfloat16:  # a carry goes to the next larger magnitude
        return ((b_bits + b_random) & -0x10000).to(tl.float32, bitcast=True)
    else:
        # Normal numbers have 13 bits more than float16: up where these exceed b_random / 8.
        b_normal = (b_bits + (0x1FFF - (b_random >> 3))) & -0x2000
        # Subnormal ones are multiples of 2^-24; no step rounds.
        b_quotient = tl.abs(b_x) * 16777216.0
        b_whole = tl.floor(b_quotient)
        b_up = (b_random.to(tl.float32) + 0.5) * 0.0000152587890625 < b_quotient - b_whole
        b_subnormal = (b_whole + tl.where(b_up, 1.0, 0.0)) * 5.9604644775390625e-08
        b_subnormal = b_subnormal.to(tl.int32, bitcast=True) | (b_bits & -0x80000000)
        return tl.where(b_quotient < 1024.0, b_subnormal, b_normal).to(tl.float32, bitcast=True)


@triton.jit
def words_of_tile(row, i_own, seed_low, seed_high, step, b_load):
    """Four words for each lane of a group, in the registers of the thread that holds the elements of `b_load` (a load)."""
    b_lane = lanes_beside(b_load)
    seed = joined(seed_low, seed_high)
    stream = (2 * tl.load(row + SHARD) + ROUNDING).to(tl.int32)
    number = tl.load(row + NUMBER).to(tl.int32)
    return tl.philox(seed, (i_own * GROUP).to(tl.int32) + b_lane, stream, number, step)


@triton.jit
def perturb(
    b_theta,
    b_g,
    b_random,
    step_size,
    GRID: tl.constexpr,
    ACC: tl.constexpr,
    ASAM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """What is stored; over axis 1 the sums of delta^2 and (theta~ - cast(theta))^2, and how many differ."""
    b_old = widen(b_theta, ACC)
    b_delta = widen(b_g, ACC)
    if ASAM:
        b_delta *= b_old
    b_delta *= step_size
    if ASAM:
        b_delta *= b_old
    b_base = b_old
    MASTERS: tl.constexpr = GRID != b_theta.dtype and GRID != ACC
    if MASTERS:
        b_base = widen(round_to_nearest(b_old, GRID), ACC)
    if STOCHASTIC:
        b_new = round_stochastically((b_base + b_delta).to(tl.float32), b_random, GRID).to(ACC)
    else:
        b_new = widen(round_to_nearest(b_base + b_delta, GRID), ACC)
    b_moved = b_new - b_base
    if GRID == tl.bfloat16 and b_theta.dtype == tl.bfloat16:  # nothing is left to round
        b_stored = (b_new.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        b_stored = b_new
        if MASTERS:
            b_shifted = widen(round_to_nearest(b_old + b_moved, b_theta.dtype), ACC)
            b_stored = tl.where(widen(round_to_nearest(b_shifted, GRID), ACC) == b_new, b_shifted, b_new)
        b_stored = round_to_nearest(b_stored, b_theta.dtype)
    return (
        b_stored,
        tl.sum(b_delta * b_delta, 1),
        tl.sum(b_moved * b_moved, 1),
        tl.sum(tl.where(b_moved != 0, 1.0, 0.0).to(ACC), 1),
    )


@triton.jit
def exchange_masked(
    theta,
    direction,
    original,
    o_masked,
    m_masked,
    b_random,
    step_size,
    GRID: tl.constexpr,
    ACC: tl.constexpr,
    ASAM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The sums of `perturb`; zeros where masked: 0 moves by 0, which no rounding changes."""
    b_theta = tl.load(theta + o_masked, mask=m_masked, other=0)
    b_g = tl.load(direction + o_masked, mask=m_masked, other=0)
    b_new, b_intended, b_applied, b_changed = perturb(b_theta, b_g, b_random, step_size, GRID, ACC, ASAM, STOCHASTIC)
    tl.store(original + o_masked, b_theta, mask=m_masked)
    tl.store(theta + o_masked, b_new, mask=m_masked)
    return b_intended, b_applied, b_changed


@triton.jit(do_not_specialize=["first"])
def norm_kernel(
    table,  # (moves, COLUMNS) int64
    move_of_tile,  # (tiles,) int32
    partial,  # (tiles,) float64
    first,  # the launch's first tile
    THETA: tl.constexpr,
    DIRECTION: tl.constexpr,
    ACC: tl.constexpr,
    ASAM: tl.constexpr,
    CUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
):
    i_tile = first + tl.program_id(0).to(tl.int64)
    row, i_own, missing, left = place_of_tile(table, move_of_tile, i_tile, CUT)
    left -= missing
    direction = tile_pointer(row, DIRECTION_ADDRESS, i_own, missing, DIRECTION, ALIGNED)
    theta = tile_pointer(row, THETA_ADDRESS, i_own, missing, THETA, ALIGNED) if ASAM else direction
    o_pair = vector_offsets(PAIR, VEC)
    whole = left // PAIR * PAIR
    b_sum = tl.zeros([PAIR // VEC], ACC)
    for start in range(0, whole, PAIR):
        b_scaled = widen(tl.load(direction + start + o_pair), ACC)
        if ASAM:
            b_scaled *= widen(tl.load(theta + start + o_pair), ACC)
        b_sum += tl.sum(b_scaled * b_scaled, 1)
    if whole < left:
        m_pair = o_pair < left - whole
        b_scaled = widen(tl.load(direction + whole + o_pair, mask=m_pair, other=0), ACC)
        if ASAM:
            b_scaled *= widen(tl.load(theta + whole + o_pair, mask=m_pair, other=0), ACC)
        b_sum += tl.sum(b_scaled * b_scaled, 1)
    tl.store(partial + i_tile, tl.sum(b_sum, 0).to(tl.float64))


@triton.jit(do_not_specialize=["first", "tiles", "seed_low", "seed_high", "step"])
def exchange_kernel(
    table,  # (moves, COLUMNS) int64
    move_of_tile,  # (tiles,) int32
    exchanged,  # (tiles,) int8, set to 1
    partials,  # (3, tiles) float64
    step_size,  # () float64
    first,  # the launch's first tile
    tiles,
    seed_low,  # int32, as the two below, the bits of an unsigned one
    seed_high,
    step,
    THETA: tl.constexpr,
    DIRECTION: tl.constexpr,
    GRID: tl.constexpr,
    ACC: tl.constexpr,
    ASAM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
):
    i_tile = first + tl.program_id(0).to(tl.int64)
    row, i_own, missing, left = place_of_tile(table, move_of_tile, i_tile, CUT)
    theta = tile_pointer(row, THETA_ADDRESS, i_own, 0, THETA, ALIGNED)
    direction = tile_pointer(row, DIRECTION_ADDRESS, i_own, 0, DIRECTION, ALIGNED)
    original = tile_pointer(row, ORIGINAL_ADDRESS, i_own, 0, THETA, ALIGNED)
    b_step = tl.load(step_size).to(ACC)
    o_group = vector_offsets(GROUP, VEC)
    if STOCHASTIC:
        m_load = o_group < left
        if CUT:
            m_load &= o_group >= missing
        b_load = tl.load(theta + o_group, mask=m_load, other=0)
        b_word, b_word1, b_word2, b_word3 = words_of_tile(row, i_own, seed_low, seed_high, step, b_load)
    else:
        b_word, b_word1, b_word2, b_word3 = o_group, o_group, o_group, o_group

    whole = left // PAIR * PAIR
    if CUT:  # one tile of a shard
        whole = tl.where(missing > 0, 0, whole)
    b_intended = tl.zeros([GROUP // VEC], ACC)
    b_applied = tl.zeros([GROUP // VEC], ACC)
    b_changed = tl.zeros([GROUP // VEC], ACC)
    for start in range(0, whole, PAIR):
        # Both groups are loaded before one is stored: the compiler cannot know that they do not overlap.
        o_even = start + o_group
        o_odd = o_even + GROUP
        b_theta0, b_theta1 = tl.load(theta + o_even), tl.load(theta + o_odd)
        b_g0, b_g1 = tl.load(direction + o_even), tl.load(direction + o_odd)
        b_new, b_i, b_a, b_c = perturb(b_theta0, b_g0, b_word & 0xFFFF, b_step, GRID, ACC, ASAM, STOCHASTIC)
        tl.store(original + o_even, b_theta0)
        tl.store(theta + o_even, b_new)
        b_intended, b_applied, b_changed = b_intended + b_i, b_applied + b_a, b_changed + b_c
        b_new, b_i, b_a, b_c = perturb(b_theta1, b_g1, b_word >> 16, b_step, GRID, ACC, ASAM, STOCHASTIC)
        tl.store(original + o_odd, b_theta1)
        tl.store(theta + o_odd, b_new)
        b_intended, b_applied, b_changed = b_intended + b_i, b_applied + b_a, b_changed + b_c
        b_word, b_word1, b_word2, b_word3 = b_word1, b_word2, b_word3, b_word
    if CUT:
        for start in range(whole, left, PAIR):
            for k in tl.static_range(2):
                o_masked = start + k * GROUP + o_group
                m_group = (o_masked >= missing) & (o_masked < left)
                b_bits = (b_word >> 16 * k) & 0xFFFF
                b_i, b_a, b_c = exchange_masked(
                    theta, direction, original, o_masked, m_group, b_bits, b_step, GRID, ACC, ASAM, STOCHASTIC
                )
                b_intended, b_applied, b_changed = b_intended + b_i, b_applied + b_a, b_changed + b_c
            b_word, b_word1, b_word2, b_word3 = b_word1, b_word2, b_word3, b_word
    elif whole < left:
        for k in tl.static_range(2):
            o_masked = whole + k * GROUP + o_group
            b_bits = (b_word >> 16 * k) & 0xFFFF
            b_i, b_a, b_c = exchange_masked(
                theta, direction, original, o_masked, o_masked < left, b_bits, b_step, GRID, ACC, ASAM, STOCHASTIC
            )
            b_intended, b_applied, b_changed = b_intended + b_i, b_applied + b_a, b_changed + b_c
    tl.store(exchanged + i_tile, 1)
    tl.store(partials + i_tile, tl.sum(b_intended, 0).to(tl.float64))
    tl.store(partials + tiles + i_tile, tl.sum(b_applied, 0).to(tl.float64))
    tl.store(partials + 2 * tiles.to(tl.int64) + i_tile, tl.sum(b_changed, 0).to(tl.float64))


@triton.jit(do_not_specialize=["first"])
def restore_kernel(
    table,  # (moves, COLUMNS) int64
    move_of_tile,  # (tiles,) int32
    exchanged,  # (tiles,) int8, cleared
    first,  # the launch's first tile
    BITS: tl.constexpr,
    CUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
):
    i_tile = first + tl.program_id(0).to(tl.int64)
    if tl.load(exchanged + i_tile) == 0:
        return
    row, i_own, missing, left = place_of_tile(table, move_of_tile, i_tile, CUT)
    left -= missing
    theta = tile_pointer(row, THETA_ADDRESS, i_own, missing, BITS, ALIGNED)
    original = tile_pointer(row, ORIGINAL_ADDRESS, i_own, missing, BITS, ALIGNED)
    if left == TILE:
        o_tile = vector_offsets(TILE, VEC)
        tl.store(theta + o_tile, tl.load(original + o_tile))
    else:
        o_pair = vector_offsets(PAIR, VEC)
        for start in range(0, left, PAIR):
            m_pair = o_pair < left - start
            tl.store(theta + start + o_pair, tl.load(original + start + o_pair, mask=m_pair), mask=m_pair)
    tl.debug_barrier()  # one thread stores: no other may have its load of the flag still before it
    tl.store(exchanged + i_tile, 0)


_BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


class _Launch:
    """The moves that one launch takes, and its tiles among all tiles."""

    def __init__(self, move: Move, cut: bool, aligned: bool, first: int) -> None:
        self.theta, self.direction, self.grid = move.theta.dtype, move.direction.dtype, move.grid
        self.accumulation, self._device = accumulation_dtype(move), move.theta.device
        self.cut, self.aligned, self.first, self.tiles = cut, aligned, first, 0

    @property
    def layout(self) -> dict[str, object]:
        parameters = config.launch("perturbation", self._device, self.theta)
        vectors = {"VEC": 16 // self.theta.itemsize} if self.aligned else config.UNALIGNED
        return {"CUT": self.cut, "ALIGNED": self.aligned, **parameters, **vectors}


def _origins(move: Move) -> list[int]:
    """The addresses that theta's, the direction's and the original's whole parameter would begin at."""
    return [t.data_ptr() - move.first * t.itemsize for t in (move.theta, move.direction, move.original)]


class Perturbation:
    """theta -> theta~ = theta + delta and back, with delta = step_size * theta^2 * g (asam) or step_size * g (sam)."""

    fill_with_noise = staticmethod(fill_with_noise)

    def __init__(self, moves: Sequence[Move], geometry: str, stochastic: bool) -> None:
        self._asam, self._stochastic = geometry == "asam", stochastic
        self._device = moves[0].theta.device
        self._moves = tuple(moves)  # the table holds addresses: their memory must live
        groups: dict[tuple, list[Move]] = {}
        for move in moves:
            if move.theta.numel():
                addresses = (*_origins(move), *(t.data_ptr() for t in (move.theta, move.direction, move.original)))
                kind = move.first % philox.TILE != 0, all(address % 16 == 0 for address in addresses)
                groups.setdefault((move.theta.dtype, move.direction.dtype, move.grid, *kind), []).append(move)
        rows, self._launches, self._tiles = [], [], 0
        for (*_, cut, aligned), group in groups.items():
            launch = _Launch(group[0], cut, aligned, self._tiles)
            for move in group:
                before, end = move.first // philox.TILE, move.first + move.theta.numel()
                tiles = triton.cdiv(end, philox.TILE) - before
                rows.append((*_origins(move), end, move.number, move.shard, self._tiles - before, move.first, tiles))
                self._tiles += tiles
            launch.tiles = self._tiles - launch.first
            self._launches.append(launch)
        if not rows:
            return
        self._table = from_host(rows, torch.int64, self._device)
        # output_size: else the host would wait for the sum.
        self._move_of_tile = torch.repeat_interleave(self._table[:, TILES.value].int(), output_size=self._tiles)
        self._exchanged = torch.zeros(self._tiles, dtype=torch.int8, device=self._device)

    def squared_norm(self) -> Tensor:
        """|| theta * g ||^2 (asam) or || g ||^2, () float64."""
        partial = torch.empty(self._tiles, dtype=torch.float64, device=self._device)
        with on_device(self._device):
            for launch in self._launches:
                norm_kernel[(launch.tiles,)](
                    self._table,
                    self._move_of_tile,
                    partial,
                    launch.first,
                    THETA=TYPES[launch.theta],
                    DIRECTION=TYPES[launch.direction],
                    ACC=TYPES[launch.accumulation],
                    ASAM=self._asam,
                    **launch.layout,
                )
        return partial.sum()

    def exchange(self, step_size: float | Tensor, seed: int, step: int) -> Tensor:
        """Moves the weights. (3,) float64: ||delta||^2, ||theta~ - cast(theta)||^2, the number of weights that changed."""
        if not isinstance(step_size, Tensor):  # a fill: torch.tensor would wait for the device
            step_size = torch.full((), step_size, dtype=torch.float64, device=self._device)
        partials = torch.empty(3, self._tiles, dtype=torch.float64, device=self._device)
        # Compiled and loaded while there is memory for it: what goes wrong at the anchor may be that there is none left.
        self._launch_restore(programs=1)
        with on_device(self._device):
            for launch in self._launches:
                half = launch.grid in (torch.float16, torch.bfloat16)
                exchange_kernel[(launch.tiles,)](
                    self._table,
                    self._move_of_tile,
                    self._exchanged,
                    partials,
                    step_size,
                    launch.first,
                    self._tiles,
                    int32(seed),
                    int32(seed >> 32),
                    int32(step),
                    THETA=TYPES[launch.theta],
                    DIRECTION=TYPES[launch.direction],
                    GRID=TYPES[launch.grid],
                    ACC=TYPES[launch.accumulation],
                    ASAM=self._asam,
                    STOCHASTIC=self._stochastic and half,
                    **launch.layout,
                )
        return partials.sum(1)

    def restore(self) -> None:
        """Puts back what `exchange` has moved, also if that failed half-way. May be called again after a failure."""
        self._launch_restore()

    def _launch_restore(self, programs: int | None = None) -> None:
        """programs: of each launch, instead of all: before the exchange they find nothing to do."""
        with on_device(self._device):
            for launch in self._launches:
                restore_kernel[(programs or launch.tiles,)](
                    self._table,
                    self._move_of_tile,
                    self._exchanged,
                    launch.first,
                    BITS=_BITS[launch.theta.itemsize],
                    **launch.layout,
                )
