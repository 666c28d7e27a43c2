"""The torch implementation of the three passes over the weights: norm, exchange, restore.

`kernels/perturbation.py` has the same `Perturbation` in Triton. Everything here is element by element in chunks whose
scratch stays in the L2 cache: beyond that scratch nothing is allocated, and each pass reads and writes every tensor once.
Floor, b bytes a weight: the norm reads 2 b, the exchange reads 2 b and writes 2 b, the restoration reads b and writes b.

Where theta is finer than the grid, float32 masters of a forward in bfloat16 say, theta + (theta~ - cast(theta)) is stored:
its cast is theta~, and what reads it uncast, as an embedding does that is tied to a cast head, finds theta moved by as much
as its cast. Where the cast would be another neighbour, of a theta half-way between two say, theta~ itself is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gapo_kernels import philox, threads
from gapo_kernels.validation import HALF

# Elements. Two of these, in float32, fit the L2 cache; drawing random numbers takes so many calls that larger ones pay.
CHUNK, ROUNDED_CHUNK = 24 * philox.TILE, 48 * philox.TILE
SQUARED_TOGETHER = 4 * philox.TILE
MOST_THREADS = 48  # with scratch of their own, however short the chunks: together below 64 MiB
# float16: the least normal number, 2^-14, and below the leading bit ten more.
_FLOAT16_LEAST_NORMAL, _FLOAT16_LARGEST_POWER, _FLOAT16_DIGITS = 2.0**-14, 2.0**15, 2.0**10


class Move(NamedTuple):
    """One parameter, or shard of one, as flat memory."""

    theta: Tensor  # (n,) what is moved
    direction: Tensor  # (n,) g, of any floating dtype
    original: Tensor  # (n,) of theta's dtype, takes theta's old values; may be direction's memory
    grid: torch.dtype  # what the forward computes with: cast to it, what is stored is theta~, around theta cast to it
    number: int  # the parameter's, for the random numbers, as the two below
    first: int = 0  # of a shard: the whole parameter's elements before these
    shard: int = 0  # its number, where it is no run of rows


class Chunk(NamedTuple):
    move: Move
    number: int  # among all chunks
    start: int
    stop: int


def accumulation_dtype(move: Move) -> torch.dtype:
    return torch.promote_types(move.theta.dtype, torch.float32)


class Perturbation:
    """theta -> theta~ = theta + delta and back, with delta = step_size * theta^2 * g (asam) or step_size * g (sam)."""

    @staticmethod
    def fill_with_noise(values: Sequence[Tensor], places: Sequence[tuple[int, int, int]], step: int, seed: int) -> None:
        """Standard normal noise into flat tensors (n,): a function of (seed, step) and their places, (the first's number
        among the elements of the whole parameter, the parameter's number, the shard's)."""
        for flat, (first, number, shard) in zip(values, places):
            for start in range(0, flat.numel(), CHUNK):
                chunk = flat[start : start + CHUNK]
                place = (first + start, chunk.numel(), number, shard)
                chunk.copy_(philox.normal(*place, step, seed, flat.device))

    def __init__(self, moves: Sequence[Move], geometry: str, stochastic: bool) -> None:
        self._asam, self._stochastic = geometry == "asam", stochastic
        self._device = moves[0].theta.device
        self._chunks: list[Chunk] = []
        # Elements that are wide, or rounded by arithmetic instead of integers, take up to twice the scratch.
        wide = any(move.theta.dtype == torch.float64 or move.grid == torch.float16 for move in moves)
        self._threads = MOST_THREADS // 2 if wide else MOST_THREADS
        for move in moves:
            size = _shortened(ROUNDED_CHUNK if stochastic and move.grid in HALF and not wide else CHUNK)
            begin, end = -move.first % SQUARED_TOGETHER, move.theta.numel()  # random numbers come in tiles of the whole
            for start, stop in pairwise(sorted({0, *range(min(begin, end), end, size), end})):
                self._chunks.append(Chunk(move, len(self._chunks), start, stop))
        self._size = max((chunk.stop - chunk.start for chunk in self._chunks), default=0)
        # Set for a chunk when its original is complete and before theta changes: a failure in between costs nothing.
        self._exchanged = bytearray(len(self._chunks))

    def squared_norm(self) -> Tensor:
        """|| theta * g ||^2 (asam) or || g ||^2, () float64."""
        squares: list[list[float]] = [[]] * len(self._chunks)

        def drain(queue: Iterator[Chunk]) -> None:
            scratch = _Scratch(self._device, self._size)
            for chunk in queue:
                scaled, _, wide = scratch.of(chunk)
                theta = _widened(chunk, wide) if self._asam else None
                squares[chunk.number] = _squares(self._scaled(chunk, scaled, theta))

        threads.share(self._chunks, drain, self._device, self._threads)
        return torch.tensor(math.fsum(chain(*squares)), dtype=torch.float64, device=self._device)

    def exchange(self, step_size: float | Tensor, seed: int, step: int) -> Tensor:
        """Moves the weights. (3,) float64: ||delta||^2, ||theta~ - cast(theta)||^2, the number of weights that changed."""
        stats: list[tuple[list[float], ...]] = [([],) * 3] * len(self._chunks)

        def drain(queue: Iterator[Chunk]) -> None:
            scratch = _Scratch(self._device, self._size)
            for chunk in queue:
                stats[chunk.number] = self._move(chunk, step_size, seed, step, scratch)

        threads.share(self._chunks, drain, self._device, self._threads)
        sums = [math.fsum(chain(*column)) for column in zip(*stats)] or [0.0] * 3
        return torch.tensor(sums, dtype=torch.float64, device=self._device)

    def restore(self) -> None:
        """Puts back what `exchange` has moved, also if that failed half-way, and only then lets through what was raised
        meanwhile. May be called again: for what could not be put back."""
        failures: list[BaseException] = []

        def drain(queue: Iterator[Chunk]) -> None:
            for chunk in queue:
                move = chunk.move
                try:
                    move.theta[chunk.start : chunk.stop].copy_(move.original[chunk.start : chunk.stop])
                    self._exchanged[chunk.number] = False
                except BaseException as error:
                    failures.append(error)

        threads.share([chunk for chunk in self._chunks if self._exchanged[chunk.number]], drain, self._device)
        if failures:
            raise failures[0]

    def _scaled(self, chunk: Chunk, out: Tensor, theta: Tensor | None) -> Tensor:
        """theta * g, or g, in `out`, which is as wide as `theta`."""
        direction = chunk.move.direction[chunk.start : chunk.stop]
        if self._asam and direction.dtype == out.dtype:
            return torch.mul(direction, theta, out=out)
        out.copy_(direction)
        return out.mul_(theta) if self._asam else out

    def _move(
        self, chunk: Chunk, step_size: float | Tensor, seed: int, step: int, scratch: _Scratch
    ) -> tuple[list[float], ...]:
        """`exchange` of one chunk, and its three sums over it, in parts."""
        delta, anchor, wide = scratch.of(chunk)
        move = chunk.move
        theta, original = (t[chunk.start : chunk.stop] for t in (move.theta, move.original))
        base = _widened(chunk, wide)
        self._scaled(chunk, delta, base).mul_(step_size)
        if self._asam:
            delta.mul_(base)
        intended = _squares(delta)
        if theta.dtype == delta.dtype == move.grid:  # nothing to round: no buffer between, which is a third faster
            original.copy_(theta)
            self._exchanged[chunk.number] = True
            torch.add(delta, original, out=theta)
            torch.sub(theta, original, out=delta)
        else:
            masters = move.grid not in (theta.dtype, delta.dtype)
            if masters:
                base = wide.copy_(theta.to(move.grid))
            self._round_(torch.add(delta, base, out=anchor), chunk, seed, step, scratch)
            torch.sub(anchor, base, out=delta)
            if masters:
                shifted = torch.add(theta, delta, out=wide).to(theta.dtype)
                torch.where(shifted.to(move.grid) == anchor, shifted, anchor, out=anchor)
            original.copy_(theta)
            self._exchanged[chunk.number] = True
            theta.copy_(anchor)
        applied = _squares(delta)
        signs = delta.sign_()
        changed = torch.dot(signs, signs).item()  # the number that are not 0, by a third of its time; exact up to 2^24
        return intended, applied, [changed]

    def _round_(self, x: Tensor, chunk: Chunk, seed: int, step: int, scratch: _Scratch) -> None:
        """x, theta + delta of a chunk, to the grid, in place."""
        move = chunk.move
        if move.grid in HALF and self._stochastic:
            place = (move.first + chunk.start, chunk.stop - chunk.start, move.number, move.shard)
            bits = philox.bits16(*place, step, seed, self._device, *scratch.random())
            rounded = round_stochastically_(x.float(), move.grid, bits)  # in place, unless theta is float64
            if rounded is not x:
                x.copy_(rounded)
        elif move.grid != x.dtype:
            x.copy_(x.to(move.grid))


def _shortened(size: int) -> int:
    """A chunk's elements where many threads have scratch of their own: in all no more than four threads' full chunks, or a
    part for each thread."""
    parts = size // SQUARED_TOGETHER
    return max(1, parts * 4 // max(4, torch.get_num_threads())) * SQUARED_TOGETHER


class _Scratch:
    """A thread's three buffers for each dtype, and those of its random numbers."""

    def __init__(self, device: torch.device, size: int) -> None:
        # Random numbers come in whole tiles, and a shard's first elements may reach into one more.
        self._device, self._size = device, (-(-size // philox.TILE) + 1) * philox.TILE
        self._buffers: dict[torch.dtype, tuple[Tensor, ...]] = {}
        self._random: tuple[philox.Buffers, Tensor] | None = None

    def of(self, chunk: Chunk) -> tuple[Tensor, ...]:
        dtype = accumulation_dtype(chunk.move)
        if dtype not in self._buffers:
            self._buffers[dtype] = tuple(torch.empty(self._size, dtype=dtype, device=self._device) for _ in range(3))
        return tuple(buffer[: chunk.stop - chunk.start] for buffer in self._buffers[dtype])

    def random(self) -> tuple[philox.Buffers, Tensor]:
        if self._random is None:
            self._random = philox.Buffers(), torch.empty(self._size, dtype=torch.int32, device=self._device)
        return self._random


def _widened(chunk: Chunk, wide: Tensor) -> Tensor:
    """theta in wide's dtype: itself, or there. An operation on two dtypes takes torch several times as long."""
    theta = chunk.move.theta[chunk.start : chunk.stop]
    return theta if theta.dtype == wide.dtype else wide.copy_(theta)


def _squares(x: Tensor) -> list[float]:
    """Sums of x^2 of a chunk's parts, which are the same however long the chunks. Not of a whole chunk: how many float32
    sums a dot product keeps, and so its error, is the math library's choice (6e-7 over a whole chunk on one CPU, 3e-5
    where all elements are alike)."""
    return [torch.dot(part, part).item() for part in x.split(SQUARED_TOGETHER)]


def round_stochastically_(x: Tensor, grid: torch.dtype, bits: Tensor) -> Tensor:
    """x (n,) float32, in place, to one of its two neighbours on a 16-bit grid, the nearer the likelier: E = x.

    `bits` (n,) int32 in [0, 2^16), used up.
    """
    if grid == torch.bfloat16:  # a float32 without its lower 16 bits: a carry goes to the next larger magnitude
        x.view(torch.int32).add_(bits).bitwise_and_(-0x10000)
        return x
    magnitude = x.abs()
    # The power of two at or below |x|, or the least normal number, whose spacing the subnormal ones share.
    power = magnitude.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    power = power.clamp_(_FLOAT16_LEAST_NORMAL, _FLOAT16_LARGEST_POWER)
    quotient = magnitude.div_(power).mul_(_FLOAT16_DIGITS)  # exact: both are powers of two
    whole = quotient.floor()
    up = bits.float().add_(0.5).mul_(2.0**-16) < quotient - whole
    return x.copy_(torch.copysign((whole + up).mul_(power).div_(_FLOAT16_DIGITS), x))
