"""From hidden states and the LM head: loss, d hidden and d weight, against what else computes them.

Contenders, on the same tensors and in turns:
    ours            fused_linear_gapo_loss
    ours-64mib      the same with at most 64 MiB of logits at a time
    eager           F.linear of all rows that have a next token, then log_softmax and gather
    compiled        torch.compile of eager
    liger           LigerFusedLinearDPOLoss(average_log_prob=True), the anchor as the reference; on a GPU a pair at a time, its
                    default, on a CPU all pairs at once
    liger-all       the same with all pairs at once (GPU only)
    liger-compiled  liger with compiled=True, its default
    trl             the log-probabilities of TRL's fused LM head (ChunkedLogProbFunction) as its trainers call it, then the
                    formula
    trl-1024        the same with the vocabulary in chunks of 1024 instead of 32768
    lce             PyTorch's linear_cross_entropy as it is, with all logits at once, then the formula
    lce-chunked     the same in chunks of its own choice (GPU only)
    lce-64mib       the same with as much logits at a time as ours-64mib
    cce             cut-cross-entropy, then the formula (GPU only)
    gemms           the floor: four GEMMs on the kept rows into tensors that are already there

On real pairs also the head's part of a whole step, one forward and two backwards on its graph, each to the hidden states
and the weight (as with a tied embedding): with d log-prob / d hidden made once and scaled by each backward, as
linear_sequence_logps does, and with d hidden made anew in each.

gamma is 0: liger's loss has none. trl, lce and cce are given the kept rows only, on every device, and where all are
kept nothing is picked; eager and liger take whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from bench import data, harness, peers
from gapo_kernels import fused_linear_gapo_loss, ops, reference
from gapo_kernels.linear import linear_logps_backward, linear_logps_forward

SUITE = "linear"
ROUNDS = 18
CLOSE = 1.15  # on a CPU: where nothing is ignored all do the same four GEMMs, whose own time varies by as much
GAMMA = 0.0
SMALL_BUDGET = 2**26
GOALS = {"eager": 2, "trl": 2, "liger": 2.2, "liger-compiled": 2.2}
UNCOMPILED = frozenset({"liger", "trl", "lce", "lce-64mib"})
CPU_UNCOMPILED = UNCOMPILED | {"trl-1024"}
CPU_PEERS = CPU_UNCOMPILED | {"compiled", "liger-compiled"}
GPU_PEERS = UNCOMPILED | {"lce-chunked", "cce"}


@dataclass(frozen=True)
class Case:
    pairs: int
    length: int | None  # None: that of the real pairs
    width: int
    vocabulary: int
    dtype: torch.dtype
    ignored: float | None  # share of the rows, at the start of each sequence, as a prompt; None: as the real pairs have it
    data: str = "random"
    peers: frozenset[str] = CPU_PEERS
    importance: int = 0  # 0 has a goal; the larger, the sooner it is left out where time is short
    seconds: float = 70.0
    goals: dict[str, float] = field(default_factory=dict)  # contender: how many times ours its time is to be, at least
    floor_goals: dict[str, float] = field(default_factory=dict)  # "whole": the least share of the floor
    budget: int | None = None  # bytes of logits that ours holds at a time; None: its default, 2^30

    def __str__(self) -> str:
        if self.data != "random":
            return f"{self.data}, {self.pairs} pairs, {str(self.dtype)[6:]}"
        shape = [2 * self.pairs, self.length, self.width, self.vocabulary]
        held = "" if self.budget is None else f", {self.held} of logits"
        return f"{shape} {str(self.dtype)[6:]} {self.ignored:.0%} ignored{held}"

    @property
    def held(self) -> str:
        return f"{self.budget / 2**30:g} GiB"


class Batch(NamedTuple):
    hidden: torch.Tensor  # (2B, T, H)
    weight: torch.Tensor  # (V, H)
    labels: torch.Tensor  # (2B, T)
    anchor_hidden: torch.Tensor  # (2B, T, H)


F32, BF16 = torch.float32, torch.bfloat16


def cases(where: torch.device, quick: bool = False) -> list[Case]:
    if quick:
        tiny = Case(1, 8, 16, 211, F32, 0.5)
        return [tiny, Case(1, None, 576, 49152, F32, None, "smollm2", frozenset())]
    if where.type == "cpu":
        base = Case(1, 128, 576, 16384, F32, 0.5, peers=CPU_UNCOMPILED | {"compiled"}, importance=2, seconds=15)
        wanted = [
            Case(4, 256, 576, 49152, F32, 0.5, seconds=240, goals=GOALS),
            Case(4, 256, 576, 49152, F32, 0.0, importance=1, seconds=50),
            Case(1, 256, 576, 49152, F32, 0.0, importance=1, seconds=50),
            Case(4, None, 576, 49152, F32, None, "smollm2", CPU_UNCOMPILED, 1, seconds=50),
            *harness.sweep(base, vocabulary=[4096, 49152], length=[64, 256], ignored=[0.0, 0.9], pairs=[2, 4]),
        ]
    else:
        base = Case(2, 1024, 4096, 128256, BF16, 0.5, peers=GPU_PEERS, importance=1, seconds=5)
        # Compiling takes long, and is left to the cases with a goal.
        goals = dict(goals={"trl": 1.25, "liger": 1.5, "liger-all": 1.5, "liger-compiled": 1.5}, floor_goals={"whole": 1 / 1.15})
        goals |= dict(peers=GPU_PEERS | {"liger-all", "liger-compiled"}, importance=0)
        wanted = [
            replace(base, ignored=0.0, **goals | dict(peers=goals["peers"] | {"compiled"})),
            # A pair's logits are 1.96 GiB: with less, some are made twice.
            replace(base, ignored=0.0, length=4096, budget=2**31, **goals),
            base,
            replace(base, ignored=0.0, length=4096, **goals),
            replace(base, length=4096),
            replace(base, ignored=0.0, pairs=4, vocabulary=151936),  # the shape of the measurements that TRL published
            Case(16, None, 576, 49152, BF16, None, "smollm2", GPU_PEERS, 1, seconds=5),
            *(
                replace(one, importance=2)
                for one in harness.sweep(base, ignored=[0.9], pairs=[1, 4], length=[256], vocabulary=[32000])
            ),
        ]
    return harness.distinct(wanted)


def make_batch(case: Case, where: torch.device, quick: bool) -> Batch:
    if case.data == "smollm2":
        states = data.smollm2_states(case.pairs, where, quick)
        hidden, weight, anchor_hidden = (
            tensor.to(case.dtype, copy=True) for tensor in (states.hidden, states.weight, states.anchor_hidden)
        )
        return Batch(hidden.requires_grad_(), weight.requires_grad_(), states.labels, anchor_hidden)
    generator = torch.Generator(where).manual_seed(0)
    shape = (2 * case.pairs, case.length, case.width)
    hidden = torch.empty(shape, dtype=case.dtype, device=where).normal_(generator=generator)
    anchor_hidden = torch.empty_like(hidden).normal_(std=0.1, generator=generator).add_(hidden)
    weight = torch.empty(case.vocabulary, case.width, dtype=case.dtype, device=where)
    weight.normal_(std=3 / case.width**0.5, generator=generator)
    labels = torch.randint(case.vocabulary, shape[:2], device=where, generator=generator)
    labels[:, : int(case.ignored * case.length)] = -100
    # The step along a label's row of the head that adds to its logit.
    rows = weight[peers.shifted(labels).clamp(min=0)].float()
    step = peers.pessimism(labels).unsqueeze(-1) * rows / rows.square().sum(-1, keepdim=True)
    anchor_hidden += step.to(case.dtype)
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), labels, anchor_hidden)


def clone(batch: Batch) -> Batch:
    hidden, weight, labels, anchor_hidden = (tensor.detach().clone() for tensor in batch)
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), labels, anchor_hidden)


def size_of(batch: Batch) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in batch)


def ours(**options) -> peers.Loss:
    def loss(batch):
        hidden, weight, labels, anchor_hidden = batch
        return fused_linear_gapo_loss(
            hidden, weight, labels, anchor_hidden=anchor_hidden, beta=peers.BETA, gamma=GAMMA, **options
        ).loss

    return loss


def reference_of(batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """Loss, d hidden and d weight in float32; a pair at a time, to save memory."""
    pairs = batch.labels.shape[0] // 2
    total, d_hidden = 0.0, torch.empty_like(batch.hidden, dtype=F32)
    weight = batch.weight.detach().to(F32, copy=True).requires_grad_()
    for pair in range(pairs):
        both = [pair, pairs + pair]
        hidden = batch.hidden.detach()[both].float().requires_grad_()
        out = reference.fused_linear_gapo_loss(
            hidden,
            weight,
            batch.labels[both],
            anchor_hidden=batch.anchor_hidden[both].float(),
            beta=peers.BETA,
            gamma=GAMMA,
        )
        (out.loss / pairs).backward()
        d_hidden[both] = hidden.grad
        total += out.loss.item() / pairs
    return total, [d_hidden.detach(), weight.grad]


def expected(batch: Batch) -> peers.Expected:
    """Against float64, compiled code is off by 1e-5 in float32. In 16 bits the GEMMs round the logits, the others the
    log-probabilities as well."""
    labels = batch.labels[batch.labels >= 0].unique()

    def labelled(leaf: int, gradient: torch.Tensor) -> None:
        if leaf == 1:
            gradient[labels] = 0.0

    tolerances = (5e-5, 5e-5) if batch.hidden.dtype == F32 else (5e-2, 0.25)
    return peers.Expected(*reference_of(batch), labelled, *tolerances)


def gemms_of(batch: Batch) -> harness.Contender:
    """The GEMMs that no implementation can do without, forward and backward."""
    mask = batch.labels[:, 1:] != -100
    weight = batch.weight.detach()
    rows, anchor_rows = (hidden[:, :-1][mask] for hidden in (batch.hidden.detach(), batch.anchor_hidden))
    logits = rows.new_empty(rows.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(rows), torch.empty_like(weight)

    def gemms(_):
        torch.mm(anchor_rows, weight.T, out=logits)
        torch.mm(rows, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, rows, out=d_weight)

    return harness.Contender(gemms)


def head_of_step(batch: Batch, where: torch.device, rounds: int, seconds: float) -> dict:
    """Of one forward and two backwards: summaries with d hidden shared and not, and their ratio. Raises AssertionError if
    the gradients differ."""
    scale = torch.full(batch.labels.shape[:1], 0.1, dtype=F32, device=where)
    options, layout, backend = (None, 1.0, 2**30, None), (True, -100), ops.resolve_backend("auto", where)
    both, weight_only = [True, True, False], [False, True, False]

    def step(needs: list[bool]) -> harness.Contender:
        def run(inputs: Batch) -> list[torch.Tensor]:
            hidden, weight, labels, _ = (tensor.detach() for tensor in inputs)
            operands = (hidden, weight, labels, None, None)
            ending = (True, *layout, needs, True, backend)
            _, _, _, *saved = linear_logps_forward(*operands, None, None, *options, *ending)
            for factor in (1, 2):
                found = None  # the first backward's, before the second's
                found = linear_logps_backward(
                    factor * scale, *operands, *saved, *options, *layout, both, False, None, backend
                )
            return found[:2]

        return harness.Contender(run)

    contenders = {"shared": step(both), "unshared": step(weight_only)}
    for what, *pair in zip(("hidden", "weight"), *(contender.run(batch) for contender in contenders.values())):
        shared, unshared = (gradient.float() for gradient in pair)
        error = ((shared - unshared).norm() / unshared.norm()).item()
        if not error <= (1e-5 if batch.hidden.dtype == F32 else 2e-2):
            raise AssertionError(f"d {what} of a step with d hidden shared is off by {error:.2g}")
    del pair, shared, unshared
    times = harness.interleaved(contenders, harness.copies(batch, size_of(batch), clone, where), where, rounds, seconds=seconds)
    return {
        **{name: harness.summary(spent) for name, spent in times.items()},
        **harness.ratio(times["unshared"], times["shared"]),
        "spread": harness.ratio_spread(times["unshared"], times["shared"]),
    }


def losses(
    case: Case, batch: Batch, where: torch.device
) -> tuple[dict[str, peers.Loss], dict[str, Callable[[], peers.Loss]]]:
    """Our own, and functions that make the others'."""
    pick = peers.of_kept_rows if (batch.labels[:, 1:] == -100).any() else peers.of_all_rows
    pairs_at_once = case.pairs if where.type == "cpu" else 1
    makers = {
        "eager": lambda: peers.eager_from_hidden(GAMMA),
        "compiled": lambda: peers.compiled(peers.eager_from_hidden(GAMMA)),
        "liger": lambda: peers.liger_from_hidden(GAMMA, compiled=False, pairs=pairs_at_once),
        "liger-all": lambda: peers.liger_from_hidden(GAMMA, compiled=False, pairs=case.pairs),
        "liger-compiled": lambda: peers.liger_from_hidden(GAMMA, compiled=True, pairs=pairs_at_once),
        "trl": lambda: peers.trl_from_hidden(GAMMA, pick),
        "trl-1024": lambda: peers.trl_from_hidden(GAMMA, pick, vocabulary_chunk=1024),
        "lce": lambda: peers.linear_cross_entropy(GAMMA, pick, chunked=False),
        "lce-chunked": lambda: peers.linear_cross_entropy(GAMMA, pick),
        "lce-64mib": lambda: peers.linear_cross_entropy(GAMMA, pick, SMALL_BUDGET),
        "cce": lambda: peers.cut_cross_entropy(GAMMA, pick),
    }
    budget = {} if case.budget is None else {"max_logits_bytes": case.budget}
    own = {"ours": ours(**budget), "ours-64mib": ours(max_logits_bytes=SMALL_BUDGET)}
    others = {name: make for name, make in makers.items() if name == "eager" or name in case.peers}
    return own, others


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
    batch = make_batch(case, where, quick)
    found = peers.checked(*losses(case, batch, where), batch, [batch.hidden, batch.weight], expected(batch), where)

    def drop_gradients(used: Batch) -> None:
        used.hidden.grad = used.weight.grad = None

    contenders = {
        name: harness.Contender(lambda inputs, loss=loss: loss(inputs).backward(), restore=drop_gradients)
        for name, loss in found.losses.items()
    }
    times = harness.interleaved(
        {**contenders, "gemms": gemms_of(batch)},
        harness.copies(batch, size_of(batch), clone, where),
        where,
        rounds,
        warmup=1 if where.type == "cuda" else 0,  # a call is long on a CPU, and each has run
        seconds=case.seconds if seconds is None else seconds,
        least=harness.REPEATS * (1 if case.importance else 2),
        close=None if where.type == "cuda" else CLOSE,
        further=() if harness.allocator_settings() else case.goals,
    )
    if also is not None:
        also(contenders["ours"], batch)
    more = {}
    if case.data != "random":
        more["head_of_step"] = head_of_step(batch, where, rounds, case.seconds if seconds is None else seconds)
    targets = batch.labels[:, 1:]
    return harness.result(
        SUITE,
        str(case),
        {
            "pairs": case.pairs,
            "length": targets.shape[1] + 1,
            "width": batch.weight.shape[1],
            "vocabulary": batch.weight.shape[0],
            "dtype": str(case.dtype)[6:],
            "ignored": (targets == -100).float().mean().item() if case.ignored is None else case.ignored,
            "data": case.data,
            **({} if case.budget is None else {"budget": case.held}),
        },
        times,
        ["gemms"],
        peak_beyond_inputs_mib=found.peaks or (peers.quick_peaks(__name__, case, found.losses) if quick else {}),
        errors=found.errors,
        absent=found.absent,
        goals=case.goals,
        floor_goals=case.floor_goals,
        **more,
    )


def bench_linear(case, measured):
    measured(case)
