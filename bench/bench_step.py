"""A whole GAPO step: probe, anchor, loss and backward, against the authors' recipe.

Contenders, on the same tokens and weights and in turns:
    authors          the authors' recipe: probe forward and backward, anchor forward, clean forward and backward; plain steps
                     over the parameters, tensor by tensor; eager head; in the model's own dtype
    authors-float32  the same in float32, where the model is in 16 bits: there the authors have a recipe of its own
    authors-tf32     that one on a GPU's TF32 units
    ours             gapo_step with linear_sequence_logps
    ours-logits      gapo_step with sequence_logps
    ours-eager-head  gapo_step with the authors' eager head: two forwards and two backwards instead of three and two
    ours-shared, ours-shared-eager-head  the same two with share_backward: two forwards and one and a half backwards

`gap_errors` are || gaps - truth || / || truth || over the pairs, the truth computed in float32: what a recipe's speed
costs; an anchor that does not move has 100 %, more than ours may have. `of_authors` is a recipe's time over the
authors', round by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from bench import data, harness, llama
from bench.peers import BETA, eager_logps
from gapo_kernels import GeometricAnchor, gapo_step, linear_sequence_logps, sequence_logps

SUITE = "step"
ROUNDS = 9
GAMMA, RHO = 0.5, 0.05
# How far a recipe's loss, whole gradient and gaps may be off, relatively, before it is not the same work. What the authors'
# own in 16 bits, and an eager head's log-probs, make of the gaps weighs the pairs otherwise: gap_errors says how much.
LIMITS, LIMITS_OF_16_BITS, EAGER_LIMITS = (1e-5, 1e-3, 1e-2), (0.1, 0.5, 0.75), (0.3, 0.9, float("inf"))
SMOLLM2 = "SmolLM2-135M"
# Random weights in the shape of Llama-3.2-1B, and in none at all.
LLAMAS = {
    "Llama-1B": dict(
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
    ),
    "Llama-tiny": dict(
        vocab_size=211,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
    ),
}


@dataclass(frozen=True)
class Case:
    model: str  # SMOLLM2 with real pairs, or one of LLAMAS with random tokens
    pairs: int
    length: int | None  # None: that of the real pairs
    dtype: torch.dtype
    importance: int = 0
    seconds: float = 120.0
    goals: dict[str, float] = field(default_factory=dict)  # contender: how many times ours its time is to be, at least
    share_goals: dict[str, float] = field(default_factory=dict)  # contender: the largest share of the authors' time

    def __str__(self) -> str:
        length = "" if self.length is None else f" of 2 x {self.length} tokens"
        return f"{self.model} {str(self.dtype)[6:]}, {self.pairs} pairs{length}"


F32, BF16 = torch.float32, torch.bfloat16


def cases(where: torch.device, quick: bool = False) -> list[Case]:
    if quick:
        return [Case("Llama-tiny", 2, 12, F32), Case("Llama-tiny", 2, 12, BF16)]
    if where.type == "cpu":
        return [Case(SMOLLM2, 8, None, F32, seconds=700, share_goals={"ours-eager-head": 0.85})]
    goals = {"authors": 1.25, "authors-float32": 4}
    return [Case("Llama-1B", 2, 1024, BF16, seconds=25, goals=goals), Case(SMOLLM2, 16, None, BF16, 1, seconds=8)]


def load(case: Case, where: torch.device) -> tuple[torch.nn.Module, data.Tokens]:
    """The model in float32, with values that the case's dtype has, and its batch. Raises Unavailable."""
    if case.model == SMOLLM2:
        model, tokenizer = data.load_smollm2(where)
        tokens = data.preference_batch(tokenizer, case.pairs, where)
    else:
        torch.manual_seed(0)
        with where:
            model = random_llama(shape := LLAMAS[case.model]).eval()
            ids = torch.randint(shape["vocab_size"], (2 * case.pairs, case.length))
        labels = ids.clone()
        labels[:, : case.length // 2] = -100
        tokens = data.Tokens(ids, torch.ones_like(ids), labels)
    for param in model.parameters():
        param.data.copy_(param.data.to(case.dtype))
    return model, tokens


def in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Its parameters alone, as from_pretrained has it: rotary frequencies in 16 bits would make another model of it."""
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model


def in_tf32(step: Callable[[], object]) -> Callable[[], object]:
    def run():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return step()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def random_llama(shape: dict[str, int]) -> torch.nn.Module:
    """transformers' own, or where that is missing the same in plain torch."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return llama.Llama(**shape)
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=True))


class Recipe:
    """One model with its anchor: the steps on it, each of which returns loss () and gaps (B,) and leaves gradients."""

    def __init__(self, model: torch.nn.Module, tokens: data.Tokens) -> None:
        self.model, self._tokens = model, tokens
        self.anchor = GeometricAnchor.from_model(model, rho=RHO)

    def _logits(self) -> torch.Tensor:
        return self.model(input_ids=self._tokens.ids, attention_mask=self._tokens.mask).logits

    def eager_logps(self) -> torch.Tensor:
        return eager_logps(self._logits(), self._tokens.labels, sliced=True)

    def fused_logps(self) -> torch.Tensor:
        return sequence_logps(self._logits(), self._tokens.labels)

    def linear_logps(self) -> torch.Tensor:
        hidden = self.model.model(input_ids=self._tokens.ids, attention_mask=self._tokens.mask).last_hidden_state
        return linear_sequence_logps(hidden, self.model.lm_head.weight, self._tokens.labels)

    def ours(self, logps: Callable[[], torch.Tensor], **options) -> tuple[torch.Tensor, torch.Tensor]:
        out = gapo_step(logps, self.anchor, beta=BETA, gamma=GAMMA, **options)
        out.loss.backward()
        return out.loss.detach(), out.gap

    def authors(self) -> tuple[torch.Tensor, torch.Tensor]:
        def margin():
            chosen, rejected = self.eager_logps().chunk(2)
            return chosen - rejected

        moved = self.anchor.params
        objective = -F.logsigmoid(BETA * margin() - GAMMA).mean()
        objective.backward()
        with torch.no_grad():
            norm = torch.stack([(p * p.grad).norm() for p in moved]).norm() + 1e-12
            saved = [p.detach().clone() for p in moved]
            for p in moved:
                p.add_(p**2 * p.grad * (RHO / norm))
            anchor_margin = margin()
            for p, original in zip(moved, saved):
                p.copy_(original)
        self.zero_grad()
        del saved
        gap = margin() - anchor_margin
        loss = -F.logsigmoid(BETA * gap - GAMMA).mean()
        loss.backward()
        return loss.detach(), gap.detach()

    def zero_grad(self, _=None) -> None:
        self.model.zero_grad()

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.model.parameters()]

    @contextmanager
    def passes_timed(self):
        """Seconds of each use's passes over the weights: all of `perturbed` but the probe's backward and the body."""
        anchor, spent = self.anchor, []
        perturbed, gradients = anchor.perturbed, anchor._gradients

        def without_probe(*args):
            begin = time.perf_counter()
            result = gradients(*args)
            spent[-1] -= time.perf_counter() - begin
            return result

        @contextmanager
        def timed(*args, **options):
            spent.append(0.0)
            begin = time.perf_counter()
            with perturbed(*args, **options):
                spent[-1] += time.perf_counter() - begin
                yield
                begin = time.perf_counter()
            spent[-1] += time.perf_counter() - begin

        anchor.perturbed, anchor._gradients = timed, without_probe
        try:
            yield spent
        finally:
            del anchor.perturbed, anchor._gradients


RECIPES: dict[str, Callable[[Recipe], tuple[torch.Tensor, torch.Tensor]]] = {
    "authors": lambda recipe: recipe.authors(),
    "ours": lambda recipe: recipe.ours(recipe.linear_logps),
    "ours-logits": lambda recipe: recipe.ours(recipe.fused_logps),
    "ours-eager-head": lambda recipe: recipe.ours(recipe.eager_logps),
    "ours-shared": lambda recipe: recipe.ours(recipe.linear_logps, share_backward=True),
    "ours-shared-eager-head": lambda recipe: recipe.ours(recipe.eager_logps, share_backward=True),
}


def distance(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """|| a - b || / || b || over all of them."""
    off, size = (
        torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in each]).norm()
        for each in ((a.float() - b.float() for a, b in zip(tensors, others, strict=True)), others)
    )
    return (off / size).item()


def distances(
    loss: torch.Tensor,
    gaps: torch.Tensor,
    gradients: list[torch.Tensor],
    other_loss: torch.Tensor,
    truth: torch.Tensor,
    other_gradients: list[torch.Tensor],
) -> dict[str, float]:
    """How far a step's results are from others', relatively."""
    return {
        "loss": abs(loss.item() / other_loss.item() - 1),
        "gradient": distance(gradients, other_gradients),
        "gaps": distance([gaps.double()], [truth]),
    }


def within(off: dict[str, float], limits: tuple[float, ...]) -> bool:
    return all(value <= limit for value, limit in zip(off.values(), limits, strict=True))


def said(off: dict[str, float]) -> str:
    return ", ".join(f"{what} by {value:.2g}" for what, value in off.items())


def measure(
    case: Case,
    rounds: int = ROUNDS,
    where: torch.device | None = None,
    *,
    seconds: float | None = None,
    quick: bool = False,
    also: harness.Also | None = None,
) -> dict:
    """One case's result (harness.py says what it holds). seconds: about how long the timed rounds may take. also: called
    in the end with the contender that is ours, and inputs for it."""
    where = where or harness.device()
    model, tokens = load(case, where)
    exact = Recipe(model, tokens)
    recipe = exact if case.dtype == F32 else Recipe(in_dtype(deepcopy(model), case.dtype), tokens)
    steps = {name: (recipe, partial(run, recipe)) for name, run in RECIPES.items()}
    if recipe is not exact:
        steps["authors-float32"] = (exact, exact.authors)
        if where.type == "cuda":
            steps["authors-tf32"] = (exact, in_tf32(exact.authors))
    loss, truth = exact.ours(exact.eager_logps)
    truth, gradients = truth.double(), exact.gradients()
    exact.zero_grad()
    for name, run in RECIPES.items() if recipe is not exact else ():  # in float32, where no rounding hides what is left out
        off = {}
        with suppress(RuntimeError):  # which in 16 bits is said below
            found, gaps = run(exact)
            off = distances(found, gaps, exact.gradients(), loss, truth, gradients)
        exact.zero_grad()
        if off and not within(off, LIMITS):
            raise AssertionError(f"{name} in float32 differs from ours, eager head: {said(off)}")

    # The same work first: a loss or gradient that differs is not measured. What cannot be had here, of the authors' in
    # float32 the memory, say, leaves the others.
    judge, first = ("authors" if recipe is exact else "authors-float32"), "ours, eager head in float32"
    errors, peaks, absent = {}, {}, {}
    for name in sorted(steps, key=lambda name: name != judge):
        owner, step = steps[name]
        results = []
        try:
            if "shared" in name:  # whose first step is compared with a real backward
                step()
                owner.zero_grad()
            peaks[name] = harness.mebibytes(harness.peak_bytes(lambda: results.append(step()), where))
        except RuntimeError as error:  # NotImplementedError and want of memory among them
            owner.zero_grad()
            if name in ("authors", "ours"):
                raise
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del steps[name]
            continue
        found, gaps = results[0]
        limits = LIMITS
        if recipe is not exact and name != judge:
            limits = EAGER_LIMITS if "authors" in name or "eager" in name else LIMITS_OF_16_BITS
        off = distances(found, gaps, owner.gradients(), loss, truth, gradients)
        if not within(off, limits):
            differs = f"differs from {first}: {said(off)}"
            if name in ("authors", "ours", judge):
                raise AssertionError(f"{name} {differs}")
            absent[name] = differs
            owner.zero_grad()
            del steps[name], peaks[name]
            continue
        errors[name] = off["gaps"]
        if name == judge:
            first, loss, gradients = judge, found, owner.gradients()
        owner.zero_grad()
    del gradients

    contenders = {
        name: harness.Contender(lambda _, step=step: step(), restore=owner.zero_grad)
        for name, (owner, step) in steps.items()
    }
    with recipe.passes_timed() if where.type == "cpu" else nullcontext() as passes:
        times = harness.interleaved(
            contenders,
            [None],
            where,
            rounds,
            warmup=1 if where.type == "cuda" else 0,  # a call is long on a CPU, and each has run
            seconds=case.seconds if seconds is None else seconds,
            least=harness.REPEATS,
        )
    if also is not None:
        also(contenders["ours"], None)
    others = [name for name in times if name != "authors"]
    more = {
        "of_authors": {
            name: {
                **harness.ratio(times[name], times["authors"]),
                "spread": harness.ratio_spread(times[name], times["authors"]),
            }
            for name in others
        }
    }
    if passes:
        more["passes"] = harness.summary(passes)
        more["passes_share_of_step"] = statistics.median(passes) / statistics.median(times["ours"])
    return harness.result(
        SUITE,
        str(case),
        {
            "model": case.model,
            "parameters": sum(param.numel() for param in model.parameters()),
            "pairs": case.pairs,
            "length": tokens.ids.shape[1],
            "vocabulary": model.lm_head.weight.shape[0],
            "dtype": str(case.dtype)[6:],
            "ignored": (tokens.labels[:, 1:] == -100).float().mean().item(),
            "data": "smollm2" if case.model == SMOLLM2 else "random",
            "implementation": type(model).__module__.split(".")[0],
        },
        times,
        [],
        peak_beyond_weights_mib=peaks,
        gap_errors=errors,
        absent=absent,
        goals=case.goals,
        share_goals=case.share_goals,
        **more,
    )


def bench_step(case, measured):
    measured(case)
