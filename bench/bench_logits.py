"""Logits path: loss from policy and anchor logits, forward and backward, against the eager formula.

Contenders, on the same tensors and in turns:
    ours        fused_gapo_loss
    eager       what preference trainers do, the authors' included: logits[:, :-1].log_softmax(-1).gather(labels[:, 1:])
    eager-view  a stronger eager: the labels are shifted instead of the logits, which saves the copy of the slice
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from bench import harness
from gapo_kernels import fused_gapo_loss

BETA, GAMMA = 2.0, 0.5


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int]  # (2B, T, V)
    dtype: torch.dtype
    ignored: float  # share of the rows, at the start of each sequence, as a prompt

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype)[6:]} {self.ignored:.0%} ignored"


CPU_CASES = [
    Case((4, 256, 32000), torch.float32, 0.0),
    Case((4, 256, 32000), torch.float32, 0.5),
    Case((4, 256, 32000), torch.bfloat16, 0.5),
    Case((4, 128, 128256), torch.float32, 0.5),
]
GPU_CASES = [
    Case((8, 1024, 32000), torch.bfloat16, 0.0),
    Case((8, 1024, 128256), torch.bfloat16, 0.0),
    Case((8, 1024, 128256), torch.bfloat16, 0.5),
    Case((8, 1024, 151936), torch.bfloat16, 0.0),
    Case((8, 1024, 50257), torch.bfloat16, 0.0),
    Case((8, 1024, 128256), torch.float32, 0.0),
]


def eager_logps(logits, labels, sliced):
    if sliced:
        logits, targets = logits[:, :-1], labels[:, 1:]
    else:
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    mask = targets != -100
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logps * mask).sum(-1) / mask.sum(-1)


def eager_loss(logits, anchor_logits, labels, sliced=True):
    with torch.no_grad():
        anchor_chosen, anchor_rejected = eager_logps(anchor_logits, labels, sliced).chunk(2)
    chosen, rejected = eager_logps(logits, labels, sliced).chunk(2)
    gap = (chosen - rejected) - (anchor_chosen - anchor_rejected)
    return -F.logsigmoid(BETA * gap - GAMMA).mean()


@pytest.mark.parametrize("case", CPU_CASES if harness.device().type == "cpu" else GPU_CASES, ids=str)
def bench_forward_backward(case, benchmark, record, request):
    torch.manual_seed(0)
    device = harness.device()
    sequences, length, vocabulary = case.shape
    logits = torch.empty(case.shape, dtype=case.dtype, device=device).normal_(std=3)
    anchor_logits = logits + 0.01 * torch.randn_like(logits)
    logits.requires_grad_()
    labels = torch.randint(vocabulary, (sequences, length), device=device)
    labels[:, : int(case.ignored * length)] = -100

    def drop_gradient():
        logits.grad = None

    losses = {
        "ours": lambda: fused_gapo_loss(logits, labels, anchor_logits=anchor_logits, beta=BETA, gamma=GAMMA).loss,
        "eager": lambda: eager_loss(logits, anchor_logits, labels),
        "eager-view": lambda: eager_loss(logits, anchor_logits, labels, sliced=False),
    }
    contenders = {name: (lambda loss=loss: loss().backward()) for name, loss in losses.items()}

    # The same work first: a loss that differs is not measured.
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
    values, gradients = {}, {}
    for name, contender in contenders.items():
        values[name] = losses[name]().item()
        drop_gradient()
        contender()
        gradients[name] = logits.grad[:, -2].float()
    for name in contenders:
        assert values[name] == pytest.approx(values["ours"], rel=tolerance), name
        torch.testing.assert_close(
            gradients[name], gradients["ours"], rtol=0, atol=tolerance * gradients["ours"].abs().max().item()
        )
    del gradients

    gradient_bytes = logits.numel() * logits.element_size()
    beyond = {}
    for name, contender in contenders.items():
        drop_gradient()
        peak = harness.peak_bytes(contender)
        beyond[name] = None if peak is None else (peak - gradient_bytes) / 2**20
    rounds = request.config.getoption("--rounds")
    times = harness.interleaved(contenders, rounds, reset=drop_gradient)
    benchmark.pedantic(contenders["ours"], setup=drop_gradient, rounds=3)
    result = {
        "name": str(case),
        "rounds": rounds,
        "times": {name: harness.summary(seconds) for name, seconds in times.items()},
        "ratios": {name: harness.ratio(times[name], times["ours"]) for name in contenders if name != "ours"},
        "peak_beyond_gradient_mib": beyond,
    }
    if device.type == "cuda":
        result["fraction_of_copy_bandwidth"] = _bandwidth_fraction(case, logits, result["times"]["ours"]["median_ms"])
    benchmark.extra_info.update(result)
    record("logits", result)


def _bandwidth_fraction(case: Case, logits: torch.Tensor, milliseconds: float) -> float:
    """The time at the bandwidth of a copy measured here, for the bytes that must move, over our time."""
    source = torch.empty(2**30, dtype=torch.uint8, device=logits.device)
    target = torch.empty_like(source)
    copies = harness.interleaved({"copy": lambda: target.copy_(source)}, rounds=15)["copy"]
    bandwidth = 2 * source.numel() / sorted(copies)[len(copies) // 2]
    everything = logits.numel() * logits.element_size()
    kept = everything * (1 - case.ignored)
    return (3 * kept + everything) / bandwidth / (milliseconds / 1e3)
