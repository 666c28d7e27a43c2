"""From hidden states and the LM head: loss, d hidden and d weight, against what else computes them.

Contenders, on the same tensors and in turns:
    ours            fused_linear_gapo_loss
    ours-64mib      the same with at most 64 MiB of logits at a time
    eager           F.linear, then the eager formula of bench_logits.py
    compiled        torch.compile of eager
    liger           LigerFusedLinearDPOLoss(average_log_prob=True), a pair at a time, the anchor as the reference
    liger-compiled  the same with compiled=True, its default
    trl             the log-probabilities of TRL's fused LM head (ChunkedLogProbFunction), then the formula
    lce             PyTorch's linear_cross_entropy in chunks of its own choice, then the formula
    lce-64mib       the same with as much logits at a time as ours-64mib
    gemms           a floor: four GEMMs on the kept rows into tensors that are already there

gamma is 0: liger's loss has none. trl and lce are given the kept rows only, on every device; eager and liger take whole
sequences. What is not installed or does not run is listed as absent, with the reason.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from bench import harness
from gapo_kernels import fused_linear_gapo_loss

BETA, GAMMA = 2.0, 0.0
SMALL_BUDGET = 2**26
TRL_VOCABULARY_CHUNK = 32768  # what its trainers use


@dataclass(frozen=True)
class Case:
    pairs: int
    length: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    ignored: float  # share of the rows, at the start of each sequence, as a prompt

    def __str__(self) -> str:
        shape = [2 * self.pairs, self.length, self.width, self.vocabulary]
        return f"{shape} {str(self.dtype)[6:]} {self.ignored:.0%} ignored"


class Batch(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    anchor_hidden: torch.Tensor


CPU_CASES = [
    Case(4, 256, 576, 49152, torch.float32, 0.5),
    Case(4, 256, 576, 49152, torch.float32, 0.0),
    Case(1, 256, 576, 49152, torch.float32, 0.0),
]
GPU_CASES = [
    Case(2, 1024, 4096, 128256, torch.bfloat16, 0.0),
    Case(2, 1024, 4096, 128256, torch.bfloat16, 0.5),
    Case(2, 4096, 4096, 128256, torch.bfloat16, 0.0),
    Case(2, 4096, 4096, 128256, torch.bfloat16, 0.5),
]


def make_batch(case: Case, device: torch.device) -> Batch:
    torch.manual_seed(0)
    shape = (2 * case.pairs, case.length, case.width)
    hidden = torch.empty(shape, dtype=case.dtype, device=device).normal_()
    anchor_hidden = hidden + 0.1 * torch.randn_like(hidden)
    weight = torch.empty(case.vocabulary, case.width, dtype=case.dtype, device=device).normal_(std=3 / case.width**0.5)
    labels = torch.randint(case.vocabulary, shape[:2], device=device)
    labels[:, : int(case.ignored * case.length)] = -100
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), labels, anchor_hidden)


def formula(token_logps, batch):
    """The loss from token_logps(hidden, labels): (2B, T - 1), whatever it holds where a label is ignored."""

    def margin(hidden):
        mask = batch.labels[:, 1:] != -100
        logps = token_logps(hidden, batch.labels).float().masked_fill(~mask, 0)
        chosen, rejected = (logps.sum(-1) / mask.sum(-1)).chunk(2)
        return chosen - rejected

    with torch.no_grad():
        anchor_margin = margin(batch.anchor_hidden)
    return -F.logsigmoid(BETA * (margin(batch.hidden) - anchor_margin) - GAMMA).mean()


def of_kept_rows(row_logps):
    """token_logps from row_logps(hidden, targets), which sees the kept rows only."""

    def token_logps(hidden, labels):
        targets = labels[:, 1:]
        mask = targets != -100
        logps = row_logps(hidden[:, :-1][mask], targets[mask])
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps)

    return token_logps


def ours(**options):
    def loss(batch):
        hidden, weight, labels, anchor_hidden = batch
        return fused_linear_gapo_loss(
            hidden, weight, labels, anchor_hidden=anchor_hidden, beta=BETA, gamma=GAMMA, **options
        ).loss

    return loss


def eager():
    def loss(batch):
        def token_logps(hidden, labels):
            logps = F.linear(hidden, batch.weight)[:, :-1].log_softmax(-1)
            return logps.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)

        return formula(token_logps, batch)

    return loss


def compiled():
    return torch.compile(eager(), dynamic=False)


def liger(**options):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    dpo = LigerFusedLinearDPOLoss(beta=BETA, average_log_prob=True, **options)

    def loss(batch):
        hidden, weight, labels, anchor_hidden = batch
        value, _ = dpo(
            weight, hidden[:, :-1], labels[:, 1:], ref_input=anchor_hidden[:, :-1], ref_weight=weight.detach()
        )
        return value

    return loss


def trl():
    from trl.kernels import ChunkedLogProbFunction

    def loss(batch):
        def row_logps(hidden, targets):
            # temperature 1, no soft cap, logits as they are, no entropy or the like
            options = (1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ())
            return ChunkedLogProbFunction.apply(hidden, batch.weight, None, targets, *options)[0]

        return formula(of_kept_rows(row_logps), batch)

    return loss


def linear_cross_entropy(budget=None):
    def loss(batch):
        rows = None if budget is None else max(1, budget // (batch.weight.shape[0] * batch.weight.element_size()))
        chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

        def row_logps(hidden, targets):
            return -F.linear_cross_entropy(hidden, batch.weight, targets, reduction="none", options=chunks)

        return formula(of_kept_rows(row_logps), batch)

    return loss


PEERS = {
    "compiled": compiled,
    "liger": lambda: liger(compiled=False),
    "liger-compiled": lambda: liger(compiled=True),
    "trl": trl,
    "lce": linear_cross_entropy,
    "lce-64mib": lambda: linear_cross_entropy(SMALL_BUDGET),
}


def peers_that_run(batch):
    """{name: loss} and, of the others, {name: reason}."""
    running, absent = {}, {}
    for name, make in PEERS.items():
        try:
            loss = make()
            loss(batch).backward()
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]  # less its paths
            absent[name] = f"{type(error).__name__}: {re.sub(r'[ (]+/[^ ]*', '', first)}"
        else:
            running[name] = loss
    return running, absent


def versions():
    found = {}
    for package in ("liger-kernel", "trl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def floor_of(batch):
    """The GEMMs that no implementation can do without, forward and backward."""
    mask = batch.labels[:, 1:] != -100
    weight = batch.weight.detach()
    rows, anchor_rows = (hidden[:, :-1][mask] for hidden in (batch.hidden.detach(), batch.anchor_hidden))
    logits = rows.new_empty(rows.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(rows), torch.empty_like(weight)

    def gemms():
        torch.mm(anchor_rows, weight.T, out=logits)
        torch.mm(rows, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, rows, out=d_weight)

    return gemms


@pytest.mark.parametrize("case", CPU_CASES if harness.device().type == "cpu" else GPU_CASES, ids=str)
def bench_linear_forward_backward(case, benchmark, record, request):
    torch._dynamo.reset()
    batch = make_batch(case, harness.device())
    leaves = (batch.hidden, batch.weight)

    def drop_gradients():
        for leaf in leaves:
            leaf.grad = None

    peers, absent = peers_that_run(batch)
    losses = {"ours": ours(), "ours-64mib": ours(max_logits_bytes=SMALL_BUDGET), "eager": eager(), **peers}
    contenders = {name: (lambda loss=loss: loss(batch).backward()) for name, loss in losses.items()}

    # The same work first: a loss that differs is not measured. Against float64, compiled code is off by 1e-5 in float32;
    # lce rounds each log-probability to bfloat16.
    tolerance = 5e-5 if case.dtype == torch.float32 else 5e-2
    expected, gradients = None, None
    for name, loss in losses.items():
        drop_gradients()
        value = loss(batch)
        value.backward()
        if expected is None:
            expected, gradients = value.item(), [leaf.grad for leaf in leaves]
        assert value.item() == pytest.approx(expected, rel=tolerance), name
        for leaf, gradient in zip(leaves, gradients):
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=tolerance * gradient.abs().max().item())
    del gradients, value

    gradient_bytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    beyond = {}
    for name, contender in contenders.items():
        drop_gradients()
        peak = harness.peak_bytes(contender)
        beyond[name] = None if peak is None else (peak - gradient_bytes) / 2**20
    drop_gradients()
    rounds = request.config.getoption("--rounds")
    times = harness.interleaved({**contenders, "gemms": floor_of(batch)}, rounds, reset=drop_gradients)
    benchmark.pedantic(contenders["ours"], setup=drop_gradients, rounds=3)
    ratios = {name: harness.ratio(times[name], times["ours"]) for name in contenders if name != "ours"}
    result = {
        "name": str(case),
        "rounds": rounds,
        "versions": versions(),
        "absent": absent,
        "times": {name: harness.summary(seconds) for name, seconds in times.items()},
        "ratios": {**ratios, "ours over gemms": harness.ratio(times["ours"], times["gemms"])},
        "peak_beyond_gradients_mib": beyond,
    }
    benchmark.extra_info.update(result)
    record("linear", result)
