"""The grids of floating-point dtypes: which numbers a dtype has, what may become of one that is rounded to it, its bits."""

import torch
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bits of the significand behind the leading one, and the least normal number's exponent.
DIGITS = {F64: (52, -1022), F32: (23, -126), BF16: (7, -126), F16: (10, -14)}


def bits(x: Tensor) -> Tensor:
    return x.view(INTEGERS[x.itemsize])


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Between neighbours in dtype around x (float64)."""
    digits, least = DIGITS[dtype]
    exponent = (torch.frexp(x).exponent - 1).clamp(min=least)
    return torch.ldexp(torch.ones_like(x), exponent - digits)


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    return min(dtypes, key=lambda dtype: DIGITS[dtype][0])


def cast_to_grid(theta: Tensor, grid: torch.dtype) -> Tensor:
    """What an anchor on that grid lies around: a copy in float64."""
    narrower = DIGITS[grid][0] < DIGITS[theta.dtype][0] or grid == F16
    return (theta.to(grid) if narrower else theta).to(F64, copy=True)


def moved_on_grid(before: Tensor, theta: Tensor, grid: torch.dtype = BF16) -> bool:
    """Whether some have moved, and by whole steps of the grid: what a cast takes away is what it took before, or, of few,
    nothing."""
    rest, rest_before = (x.double() - x.to(grid).double() for x in (theta, before))
    same = (rest - rest_before).abs() <= 2 * spacing(theta.double().abs().maximum(before.double().abs()), theta.dtype)
    return bool((same | (rest == 0)).all() and (same & (theta != before)).any())


def assert_rounded(
    theta: Tensor, before: Tensor, grid: torch.dtype, base: Tensor, delta: Tensor, stochastic: bool
) -> None:
    """theta, cast to the grid or the coarser one of its own dtype, is base + delta (float64): the nearest of its numbers,
    or with stochastic rounding to 16 bits one of the two neighbours. What the cast takes away is what it took before."""
    on = coarsest(grid, theta.dtype)
    anchor, wanted = cast_to_grid(theta, on), base + delta
    if on != theta.dtype:
        kept, moved = before.double() + (anchor - base), anchor != base
        error, far = (theta.double() - kept).abs(), (kept - anchor).abs() >= 0.499 * spacing(anchor.abs() * 0.999, on)
        as_kept = error <= 2 * spacing(kept.abs().maximum((anchor - base).abs()), theta.dtype)
        assert torch.equal(theta[~moved], before[~moved]), "what did not move has changed"
        assert (as_kept | far & (theta.double() == anchor)).all(), "what the cast takes away has changed"
    assert torch.equal(anchor[delta == 0], base[delta == 0]), "what needs no rounding was rounded"
    # Half a step, or one; plus float32's errors in x itself.
    steps = 1.0 if stochastic and on in (BF16, F16) and grid == on else 0.5
    slack = 1e-14 if on == F64 else 4e-7
    bound = steps * spacing(wanted.abs().maximum(anchor.abs()), on) + slack * (base.abs() + delta.abs())
    assert ((anchor - wanted).abs() <= bound).all()
