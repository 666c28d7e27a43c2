"""The anchor's three passes over the weights: norm, exchange, restore, each against plain code.

Contenders, on parameters shaped like a model's, with values and gradients of its size, in turns:
    ours     the back end that GeometricAnchor uses, each pass on its own
    eager    tensor by tensor, as the authors' recipe has it: norm of theta * g; clone, add; copy back
    foreach  the same with torch._foreach_*

Float32 and bfloat16 to nearest compute the same step; in bfloat16 ours computes delta in float32. Rounding bfloat16
stochastically, eager draws 16 bits a weight and there is no foreach form. Ours reads gradients and writes the original
weights in the same memory; the others allocate a copy of the weights, and their temporaries.

Floor: the bytes of each pass, of b a weight, at the bandwidth of a copy: norm 2 b read, exchange 2 b read and 2 b written,
restore b read and b written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from bench import harness
from gapo_kernels import displacement, perturbation

SUITE = "anchor"
ROUNDS = 9
PASSES = ("norm", "exchange", "restore")
# width, layers, width of the MLP, of keys and values, vocabulary; embedding and head tied
SHAPES = {
    "SmolLM2-135M": (576, 30, 1536, 192, 49152),
    "Llama-1B": (2048, 16, 8192, 512, 128256),
    "tiny": (128, 2, 384, 64, 4096),  # what is compared element by element: some tensors larger than what is done at a time
}
STEP_SIZE = 0.05  # delta is a twentieth of theta^2 g: large enough to be seen in bfloat16
BYTES_A_WEIGHT = {"norm": 2, "exchange": 4, "restore": 2}  # in units of the dtype's own
GPU_GOAL = 0.8  # the exchange's least share of a copy's bandwidth, of the larger model


@dataclass(frozen=True)
class Case:
    model: str
    dtype: torch.dtype
    rounding: str  # "nearest" or "stochastic"
    which: str  # of PASSES
    importance: int = 0
    seconds: float = 12.0  # for the three passes together

    def __str__(self) -> str:
        return f"{self.model} {str(self.dtype)[6:]} {self.rounding}, {self.which}"


F32, BF16 = torch.float32, torch.bfloat16
KINDS = ((F32, "nearest"), (BF16, "nearest"), (BF16, "stochastic"))


def cases(where: torch.device, quick: bool = False) -> list[Case]:
    models = ["tiny"] if quick else ["SmolLM2-135M"] if where.type == "cpu" else ["Llama-1B", "SmolLM2-135M"]
    return [
        Case(model, *kind, which, importance=2 * number)
        for number, model in enumerate(models)
        for kind in KINDS
        for which in PASSES
    ]


def shapes_of(model: str) -> list[tuple[int, ...]]:
    """A Llama's parameters."""
    width, layers, inner, keys, vocabulary = SHAPES[model]
    layer = [(width, width), (keys, width), (keys, width), (width, width)]
    layer += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(vocabulary, width), *(shape for _ in range(layers) for shape in layer), (width,)]


class Weights:
    """Parameters and gradients, and what each contender needs between its passes."""

    def __init__(self, case: Case, where: torch.device) -> None:
        generator = torch.Generator(where).manual_seed(0)
        self.thetas, self.gradients = (
            [
                torch.empty(shape, dtype=case.dtype, device=where).normal_(std=std, generator=generator)
                for shape in shapes_of(case.model)
            ]
            for std in (0.5, 1.0)
        )
        self.dtype, self.stochastic = case.dtype, case.rounding == "stochastic"

    def elements(self) -> int:
        return sum(theta.numel() for theta in self.thetas)


class Ours:
    """Uses the gradients' memory up, as the anchor does: from the first exchange on they hold the weights."""

    def __init__(self, weights: Weights) -> None:
        moves = [
            perturbation.Move(theta.view(-1), g.view(-1), g.view(-1), weights.dtype, number)
            for number, (theta, g) in enumerate(zip(weights.thetas, [g.clone() for g in weights.gradients]))
        ]
        back_end = displacement._back_end(weights.thetas[0].device)
        self._passes = back_end(moves, "asam", weights.stochastic)

    def norm(self, _=None) -> torch.Tensor:
        return self._passes.squared_norm()

    def exchange(self, _=None) -> None:
        self._passes.exchange(STEP_SIZE, 0, 0)

    def restore(self, _=None) -> None:
        self._passes.restore()


class Eager:
    def __init__(self, weights: Weights) -> None:
        self._thetas, self._gradients, self._stochastic = weights.thetas, weights.gradients, weights.stochastic
        self._saved: Sequence[torch.Tensor] = ()

    def norm(self, _=None) -> torch.Tensor:
        return torch.stack([(p * g).norm() for p, g in zip(self._thetas, self._gradients)]).norm() ** 2

    def exchange(self, _=None) -> None:
        self._saved = [p.clone() for p in self._thetas]
        for p, g in zip(self._thetas, self._gradients):
            if self._stochastic:
                moved = p.float() + p.float() ** 2 * g.float() * STEP_SIZE
                bits = torch.randint(2**16, p.shape, dtype=torch.int32, device=p.device)
                moved.view(torch.int32).add_(bits).bitwise_and_(-(2**16))
                p.copy_(moved)
            else:
                p.add_(p**2 * g * STEP_SIZE)

    def restore(self, _=None) -> None:
        for p, original in zip(self._thetas, self._saved):
            p.copy_(original)
        self._saved = ()


class Foreach(Eager):
    def norm(self, _=None) -> torch.Tensor:
        return torch.stack(torch._foreach_norm(torch._foreach_mul(self._thetas, self._gradients))).norm() ** 2

    def exchange(self, _=None) -> None:
        self._saved = [p.clone() for p in self._thetas]
        deltas = torch._foreach_mul(self._thetas, self._thetas)
        torch._foreach_mul_(deltas, self._gradients)
        torch._foreach_add_(self._thetas, deltas, alpha=STEP_SIZE)

    def restore(self, _=None) -> None:
        torch._foreach_copy_(self._thetas, self._saved)
        self._saved = ()


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of tensors of one shape, small enough for what arithmetic in float64 takes beside them."""
    return zip(*(tensor.view(-1).split(2**24) for tensor in tensors))


def check(name: str, contender: Ours | Eager, weights: Weights) -> None:
    """AssertionError unless norm, anchor and restoration are what they should be."""
    originals = [theta.clone() for theta in weights.thetas]
    parts = [each for tensors in zip(weights.thetas, originals, weights.gradients) for each in pieces(*tensors)]
    exact = sum(torch.linalg.vector_norm(x.float() * g.float(), dtype=torch.float64) ** 2 for _, x, g in parts).item()
    off = abs(contender.norm().item() / exact - 1)
    if not off <= (1e-4 if name == "ours" else 2e-2):  # torch's own sum of a large float32 tensor is off by 1e-3
        raise AssertionError(f"{name}'s squared norm is off by {off:.2g}")
    contender.exchange()
    # To nearest, half of a last digit; drawn by lot, a whole one; and in bfloat16 eager rounds each of its products.
    digits = 2.0 if weights.stochastic or name != "ours" else 0.51
    for theta, original, g in parts:
        delta = STEP_SIZE * original.double() ** 2 * g.double()
        intended = original.double() + delta
        spacing = torch.maximum(original.double().abs(), intended.abs()) * torch.finfo(weights.dtype).eps
        if not ((theta.double() - intended).abs() <= digits * spacing + 0.01 * delta.abs()).all():
            raise AssertionError(f"{name} moves the weights to another place")
    if all(map(torch.equal, weights.thetas, originals)):
        raise AssertionError(f"{name} moves nothing")
    contender.restore()
    if not all(map(torch.equal, weights.thetas, originals)):
        raise AssertionError(f"{name} does not restore the weights")


class Passes(NamedTuple):
    """What was measured of all passes together."""

    times: dict[str, dict[str, list[float]]]  # {pass: {contender: seconds}}
    peaks: dict[str, dict[str, float | None]]  # {pass: {contender: MiB}}
    absent: dict[str, str]
    elements: int
    tensors: int
    copies: list[float]  # seconds of a copy, in turn with them
    copied: int  # bytes that it reads and writes


@lru_cache(maxsize=1)
def all_passes(case: Case, rounds: int, where: torch.device, quick: bool) -> Passes:
    """The contenders in turns, each through its three passes: every pass finds the weights where the last one left them,
    and nothing of them in the caches."""
    weights = Weights(case, where)
    makers = {"ours": Ours, "eager": Eager, "foreach": Foreach}
    absent = {}
    if weights.stochastic:
        del makers["foreach"]
        absent["foreach"] = "has no random rounding"
    contenders = {name: make(weights) for name, make in makers.items()}
    for name, one in contenders.items():
        check(name, one, weights)
    copy, copied = harness.copying(where, quick)
    copies = []
    times = {which: {name: [] for name in contenders} for which in PASSES}
    peaks = {which: {} for which in PASSES}
    for name, one in contenders.items():
        for which in PASSES:
            peaks[which][name] = harness.mebibytes(harness.peak_bytes(getattr(one, which), where))
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= harness.REPEATS and time.perf_counter() - begin > case.seconds:
            break
        for name, one in contenders.items():
            for which in PASSES:
                times[which][name].append(harness.timed(getattr(one, which), where))
        copies.append(copy.seconds(None, where))
    return Passes(times, peaks, absent, weights.elements(), len(weights.thetas), copies, copied)


def measure(
    case: Case,
    rounds: int = ROUNDS,
    where: torch.device | None = None,
    *,
    seconds: float | None = None,
    quick: bool = False,
    also: harness.Also | None = None,
) -> dict:
    """One case's result (harness.py says what it holds); the first of three measures them all. seconds: the case's own are
    kept. also: called in the end with the contender that is ours, and inputs for it."""
    where = where or harness.device()
    found = all_passes(replace(case, which=PASSES[0]), rounds, where, quick)
    if also is not None:
        one = Ours(Weights(case, where))
        contenders = {
            "norm": harness.Contender(one.norm),
            "exchange": harness.Contender(one.exchange, restore=one.restore),
            "restore": harness.Contender(one.restore, prepare=one.exchange),
        }
        also(contenders[case.which], None)
    size = found.elements * case.dtype.itemsize * BYTES_A_WEIGHT[case.which]
    return harness.result(
        SUITE,
        str(case),
        {
            "model": case.model,
            "parameters": found.elements,
            "tensors": found.tensors,
            "dtype": str(case.dtype)[6:],
            "rounding": case.rounding,
            "pass": case.which,
            "data": "random",
        },
        found.times[case.which] | {"copy": [size / found.copied * spent for spent in found.copies]},
        ["copy"],
        copy_bandwidth_gb_per_s=found.copied / statistics.median(found.copies) / 1e9,
        peak_beyond_gradients_mib=found.peaks[case.which],
        absent=found.absent,
        floor_goals={"whole": GPU_GOAL} if where.type == "cuda" and case.which == "exchange" and not case.importance else {},
    )


def bench_anchor(case, measured):
    measured(case, shared=True)  # the first of three measures them all
