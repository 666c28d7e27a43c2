"""Standard normal noise for parameters, one launch over all of the same dtype: the values of `philox.normal`.

Floor: the noise is written, once. A counter serves four elements in two pairs; a program writes those of its 1024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapo_kernels import philox
from gapo_kernels.kernels import config
from gapo_kernels.kernels.primitives import TYPES, int32, joined, on_device, round_to_nearest

COUNTERS = tl.constexpr(1024)
ELEMENTS = tl.constexpr(4096)

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
):
    i_tile = tl.program_id(0).to(tl.int64)
    row = table + tl.load(parameter_of_tile + i_tile) * COLUMNS
    i_own = i_tile - tl.load(row + FIRST_TILE)
    first = tl.load(row + FIRST)
    seed = joined(seed_low, seed_high)
    b_counter = (first // 4 + i_own * COUNTERS).to(tl.int32) + tl.arange(0, COUNTERS)
    stream, number = tl.load(row + STREAM).to(tl.int32), tl.load(row + NUMBER).to(tl.int32)
    b_word, b_word1, b_word2, b_word3 = tl.philox(seed, b_counter, stream, number, step)
    b_0, b_1 = box_muller(b_word, b_word1)
    b_2, b_3 = box_muller(b_word2, b_word3)
    b_noise = tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))
    o_element = i_own * ELEMENTS - first % 4 + tl.arange(0, ELEMENTS)
    target = tl.load(row + ADDRESS).to(tl.pointer_type(DTYPE))
    m_element = (o_element >= 0) & (o_element < tl.load(row + NUMEL))
    tl.store(target + o_element, round_to_nearest(b_noise, DTYPE), mask=m_element)


def fill_with_noise(values: Sequence[Tensor], places: Sequence[tuple[int, int, int]], step: int, seed: int) -> None:
    """perturbation.Perturbation's."""
    groups: dict[torch.dtype, list[tuple[int, ...]]] = {}
    tiles: dict[torch.dtype, int] = {}
    for flat, (first, number, shard) in zip(values, places):
        if flat.numel():
            before = tiles.get(flat.dtype, 0)
            row = (flat.data_ptr(), flat.numel(), first, number, 2 * shard + philox.NOISE, before)
            groups.setdefault(flat.dtype, []).append(row)
            counters = -(-(first + flat.numel()) // 4) - first // 4
            tiles[flat.dtype] = before + triton.cdiv(counters, COUNTERS.value)
    device = values[0].device
    for dtype, rows in groups.items():
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type != "cpu").to(device, non_blocking=True)
        starts = [row[FIRST_TILE.value] for row in rows] + [tiles[dtype]]
        own = torch.tensor(starts, dtype=torch.int32, pin_memory=device.type != "cpu").to(device, non_blocking=True).diff()
        parameter_of_tile = torch.repeat_interleave(own, output_size=tiles[dtype])
        with on_device(device):
            noise_kernel[(tiles[dtype],)](
                table,
                parameter_of_tile,
                int32(seed),
                int32(seed >> 32),
                int32(step),
                DTYPE=TYPES[dtype],
                num_warps=4,
                **config.OPTIONS,
            )
