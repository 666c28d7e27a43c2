"""Philox-4x32-10, the counter-based generator of Salmon et al. (SC'11, "Parallel random numbers: as easy as 1, 2, 3").

The random bits of an element are a function of (seed, step, parameter, element): the same on every rank and device,
however the parameter's rows are sharded, in any order, and again after a resume. (Shards that are no runs of rows count their
own elements, and the shard's number comes in.) `kernels/perturbation.py` and `kernels/noise.py` draw the same words with
tl.philox.

An element's place in its parameter says which bits are its own. For rounding, elements come in tiles of 8 groups of 1024;
counter number 1024 * tile + lane serves the 8 elements at that lane of the tile's groups: group k takes the lower (k even)
or upper (k odd) 16 bits of word k // 2. (For noise tiles have 4 groups: see `normal`.) So neighbouring elements have
neighbouring counters, whatever computes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUPS, LANES = 8, 1024
TILE = GROUPS * LANES
NOISE_TILE = 4 * LANES

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# What a stream is for, the lowest bit of the counter's second word: both may be drawn in the same step.
ROUNDING, NOISE = 0, 1


class Buffers:
    """Memory for `philox`, kept from one call to the next: fresh tensors of this size would be most of its time."""

    def __init__(self) -> None:
        self._rows: tuple[Tensor, ...] = ()

    def like(self, c0: Tensor) -> tuple[Tensor, ...]:
        """Six int64 tensors of c0's shape."""
        if not self._rows or self._rows[0].numel() < c0.numel() or self._rows[0].device != c0.device:
            self._rows = tuple(torch.empty(c0.numel(), dtype=torch.int64, device=c0.device) for _ in range(6))
        return tuple(row[: c0.numel()].view(c0.shape) for row in self._rows)


def philox(c0: Tensor, c1: int, c2: int, c3: int, seed: int, buffers: Buffers | None = None) -> tuple[Tensor, ...]:
    """Four words for every counter, each of c0's shape, int64 in [0, 2^32), in memory of `buffers`.

    `c0`: int64 in [0, 2^32); `seed`: 64 bits.
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    *words, high0, high1 = (buffers or Buffers()).like(c0)
    words[0].copy_(c0)
    for word, c in zip(words[1:], (c1, c2, c3)):
        word.fill_(c & _LOW)
    for _ in range(ROUNDS):
        # In int64 the products wrap to the same 64 bits. Above bit 32 words may hold anything until they are multiplied.
        torch.bitwise_right_shift(words[0].mul_(_MULTIPLIERS[0]), 32, out=high0)
        torch.bitwise_right_shift(words[2].mul_(_MULTIPLIERS[1]), 32, out=high1)
        words[1].bitwise_xor_(high1).bitwise_xor_(k0).bitwise_and_(_LOW)
        words[3].bitwise_xor_(high0).bitwise_xor_(k1).bitwise_and_(_LOW)
        words = [words[1], words[2], words[3], words[0]]
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    words[1].bitwise_and_(_LOW)
    words[3].bitwise_and_(_LOW)
    return tuple(words)


def bits16(
    start: int,
    count: int,
    number: int,
    shard: int,
    step: int,
    seed: int,
    device: torch.device,
    buffers: Buffers | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(count,) int32 in [0, 2^16) for the elements [start, start + count) of a parameter.

    `out`: int32 memory for all tiles that they touch.
    """
    first, last = start // TILE, -(-(start + count) // TILE)
    tiles = last - first
    c0 = torch.arange(first * LANES, last * LANES, device=device).view(tiles, LANES)
    if out is None:
        out = torch.empty(tiles * TILE, dtype=torch.int32, device=device)
    bits = out[: tiles * TILE].view(tiles, GROUPS, LANES)
    for i, word in enumerate(philox(c0, 2 * shard + ROUNDING, number, step, seed, buffers)):
        bits[:, 2 * i] = word  # the lower 32 bits
        torch.bitwise_right_shift(bits[:, 2 * i], 16, out=bits[:, 2 * i + 1])
    begin = start - first * TILE
    return bits.bitwise_and_(0xFFFF).view(-1)[begin : begin + count]


def normal(start: int, count: int, number: int, shard: int, step: int, seed: int, device: torch.device) -> Tensor:
    """(count,) float32, standard normal, for the elements [start, start + count) of a parameter.

    Box-Muller: counter number 1024 * tile + lane serves the 4 elements at that lane of the tile's groups of 1024, two from
    each pair of words.
    """
    first, last = start // NOISE_TILE, -(-(start + count) // NOISE_TILE)
    c0 = torch.arange(first * LANES, last * LANES, device=device).view(-1, LANES)
    uniform = [((word.float() + 0.5) * 2.0**-32) for word in philox(c0, 2 * shard + NOISE, number, step, seed)]
    values = []
    for u, v in (uniform[:2], uniform[2:]):
        radius, angle = u.double().log_().mul_(-2).sqrt_(), v.double().mul_(2 * math.pi)
        values += [radius * angle.cos(), radius * angle.sin()]
    begin = start - first * NOISE_TILE
    return torch.stack(values, 1).view(-1)[begin : begin + count].float()
