"""Standard normal noise for parameters, one launch over all of the same dtype and alignment: the values of `philox.normal`.

Floor: the noise is written, once. A program writes a tile: four groups of the lanes that its counters serve.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapo_kernels import philox
from gapo_kernels.kernels import config
from gapo_kernels.kernels.primitives import (
    TYPES,
    from_host,
    int32,
    joined,
    lanes_beside,
    on_device,
    round_to_nearest,
    vector_offsets,
)

LANES = tl.constexpr(philox.LANES)
TILE = tl.constexpr(philox.NOISE_TILE)

# The table's columns, int64, a row for each parameter.
COLUMNS = tl.constexpr(6)
ADDRESS = tl.constexpr(0)
NUMEL = tl.constexpr(1)
FIRST = tl.constexpr(2)  # of the whole parameter's elements
NUMBER = tl.constexpr(3)
STREAM = tl.constexpr(4)
FIRST_TILE = tl.constexpr(5)


@triton.jit
def cosine_and_sine(b_turns):
    """Of b_turns in [0, 1], float32 to 2e-7. Taylor's series on an eighth of a turn to either side: what the libraries do
    with larger angles takes memory on the stack."""
    b_quarter = tl.floor(4 * b_turns + 0.5)
    b_x = (b_turns - 0.25 * b_quarter) * 6.283185307179586
    b_y = b_x * b_x
    b_sine = b_y * (0.008333333333333333 + b_y * (-0.0001984126984126984 + b_y * 2.7557319223985893e-06))
    b_sine = b_x + b_x * b_y * (-0.16666666666666666 + b_sine)
    b_cosine = b_y * (-0.001388888888888889 + b_y * (2.48015873015873e-05 - b_y * 2.755731922398589e-07))
    b_cosine = 1 - 0.5 * b_y + b_y * b_y * (0.041666666666666664 + b_cosine)
    m_odd = (b_quarter == 1) | (b_quarter == 3)
    b_cos, b_sin = tl.where(m_odd, b_sine, b_cosine), tl.where(m_odd, b_cosine, b_sine)
    b_cos = tl.where((b_quarter == 1) | (b_quarter == 2), -b_cos, b_cos)
    return b_cos, tl.where((b_quarter == 2) | (b_quarter == 3), -b_sin, b_sin)


@triton.jit
def box_muller(b_word, b_other):
    """Two float32 blocks, standard normal, from two of 32 random bits."""
    b_u = (b_word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # Close to 1, where a fast float32 logarithm has no digits, it needs all of them.
    b_radius = tl.sqrt(-2.0 * tl.log(b_u.to(tl.float64))).to(tl.float32)
    b_cos, b_sin = cosine_and_sine((b_other.to(tl.float32) + 0.5) * 2.3283064365386963e-10)
    return b_radius * b_cos, b_radius * b_sin


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def noise_kernel(
    table,  # (parameters, COLUMNS) int64
    parameter_of_tile,  # (tiles,) int32
    seed_low,  # int32, as the two below, the bits of an unsigned one
    seed_high,
    step,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whole tiles begin at multiples of 16 bytes
    VEC: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    row = table + tl.load(parameter_of_tile + i_tile) * COLUMNS
    first, numel = tl.load(row + FIRST), tl.load(row + NUMEL)
    i_own = i_tile - tl.load(row + FIRST_TILE) + first // TILE
    o_tile = i_own * TILE - first  # below 0 where the parameter's part begins within the tile
    # The address is complete before it is a pointer: see primitives.row_address.
    target = (tl.load(row + ADDRESS) + o_tile * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        target = tl.multiple_of(target, 16)
    o_lane = vector_offsets(LANES, VEC)
    b_lane = lanes_beside(tl.load(target + o_lane, mask=(o_tile + o_lane >= 0) & (o_tile + o_lane < numel)))
    seed = joined(seed_low, seed_high)
    stream, number = tl.load(row + STREAM).to(tl.int32), tl.load(row + NUMBER).to(tl.int32)
    b_word, b_word1, b_word2, b_word3 = tl.philox(seed, (i_own * LANES).to(tl.int32) + b_lane, stream, number, step)
    b_0, b_1 = box_muller(b_word, b_word1)
    b_2, b_3 = box_muller(b_word2, b_word3)
    b_groups = (b_0, b_1, b_2, b_3)
    whole = (o_tile >= 0) & (o_tile + TILE <= numel)
    for k in tl.static_range(4):
        b_noise = round_to_nearest(b_groups[k], DTYPE)
        o_group = k * LANES + o_lane
        if whole:
            tl.store(target + o_group, b_noise)
        else:
            m_group = (o_tile + o_group >= 0) & (o_tile + o_group < numel)
            tl.store(target + o_group, b_noise, mask=m_group)


def fill_with_noise(values: Sequence[Tensor], places: Sequence[tuple[int, int, int]], step: int, seed: int) -> None:
    """perturbation.Perturbation's."""
    groups: dict[tuple[torch.dtype, bool], list[tuple[int, ...]]] = {}
    tiles: dict[tuple[torch.dtype, bool], int] = {}
    for flat, (first, number, shard) in zip(values, places):
        if flat.numel():
            group = flat.dtype, (flat.data_ptr() - first * flat.itemsize) % 16 == 0
            before = tiles.get(group, 0)
            row = (flat.data_ptr(), flat.numel(), first, number, 2 * shard + philox.NOISE, before)
            groups.setdefault(group, []).append(row)
            tiles[group] = before + triton.cdiv(first + flat.numel(), philox.NOISE_TILE) - first // philox.NOISE_TILE
    device = values[0].device
    for group, rows in groups.items():
        dtype, aligned = group
        table = from_host(rows, torch.int64, device)
        starts = [row[FIRST_TILE.value] for row in rows] + [tiles[group]]
        own = from_host(starts, torch.int32, device).diff()
        parameter_of_tile = torch.repeat_interleave(own, output_size=tiles[group])
        with on_device(device):
            noise_kernel[(tiles[group],)](
                table,
                parameter_of_tile,
                int32(seed),
                int32(seed >> 32),
                int32(step),
                DTYPE=TYPES[dtype],
                ALIGNED=aligned,
                VEC=16 // dtype.itemsize,
                **config.launch("perturbation", device, dtype),
            )
