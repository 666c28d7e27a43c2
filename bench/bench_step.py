"""A whole GAPO step on SmolLM2-135M-Instruct: probe, anchor, loss and backward, 8 real pairs, float32.

Contenders, on the same pairs and weights and in turns, every head the same eager one unless said otherwise:
    authors     the authors' recipe: probe forward and backward, anchor forward, clean forward and backward; plain steps
                over the parameters, tensor by tensor
    ours        gapo_step: two forwards, two backwards
    ours-fused  gapo_step with sequence_logps
    ours-linear gapo_step with linear_sequence_logps
"""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from bench import harness
from bench.bench_logits import eager_logps
from gapo_kernels import GeometricAnchor, gapo_step, linear_sequence_logps, sequence_logps

BETA, GAMMA, RHO, PAIRS = 2.0, 0.5, 0.05, 8


def preference_batch(tokenizer, device):
    preferences = pytest.importorskip("gapo_trainer.preferences")
    pairs = preferences.tokenize_pairs(
        preferences.flip_labels(preferences.load_preferences("train"), 0.0, 0), tokenizer, 512
    )
    batch = preferences.PreferenceCollator(tokenizer.pad_token_id)(pairs[:PAIRS])
    return [batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")]


def authors_step(model, margin, moved):
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
    model.zero_grad()
    del saved
    loss = -F.logsigmoid(BETA * (margin() - anchor_margin) - GAMMA).mean()
    loss.backward()
    return loss.detach()


def our_step(logps, anchor):
    loss = gapo_step(logps, anchor, beta=BETA, gamma=GAMMA).loss
    loss.backward()
    return loss.detach()


@contextmanager
def passes_timed(anchor):
    """Seconds of each use's passes over the weights: all of `perturbed` but the probe's backward and the body."""
    spent, perturbed, gradients = [], anchor.perturbed, anchor._gradients

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


def bench_step(benchmark, record, request):
    smollm2 = pytest.importorskip("gapo_trainer.smollm2")
    device = harness.device()
    model, tokenizer = smollm2.load_smollm2()
    model = model.float().to(device).eval()
    ids, mask, labels = preference_batch(tokenizer, device)
    anchor = GeometricAnchor.from_model(model, rho=RHO)

    def logits():
        return model(input_ids=ids, attention_mask=mask).logits

    def margin():
        chosen, rejected = eager_logps(logits(), labels, sliced=True).chunk(2)
        return chosen - rejected

    def linear():
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return linear_sequence_logps(hidden, model.lm_head.weight, labels)

    contenders = {
        "authors": lambda: authors_step(model, margin, anchor.params),
        "ours": lambda: our_step(lambda: eager_logps(logits(), labels, sliced=True), anchor),
        "ours-fused": lambda: our_step(lambda: sequence_logps(logits(), labels), anchor),
        "ours-linear": lambda: our_step(linear, anchor),
    }
    # The same work first: a loss or gradient that differs is not measured.
    values, gradients = {}, {}
    for name, step in contenders.items():
        model.zero_grad()
        values[name] = step().item()
        gradients[name] = torch.cat([p.grad.flatten()[:100] for p in model.parameters()])
    for name in contenders:
        assert values[name] == pytest.approx(values["authors"], rel=1e-5), name
        worst = (gradients[name] - gradients["authors"]).norm() / gradients["authors"].norm()
        assert worst < 1e-3, f"{name}: {worst}"

    peaks = {}
    for name, step in contenders.items():
        model.zero_grad()
        peak = harness.peak_bytes(step)
        peaks[name] = None if peak is None else peak / 2**20
    rounds = request.config.getoption("--step-rounds")
    with passes_timed(anchor) as passes:
        times = harness.interleaved(contenders, rounds, warmup=0, reset=model.zero_grad)
    result = {
        "name": f"SmolLM2-135M float32, {PAIRS} pairs, {tuple(ids.shape)} tokens",
        "rounds": rounds,
        "times": {name: harness.summary(seconds) for name, seconds in times.items()},
        "ratios": {name: harness.ratio(times["authors"], times[name]) for name in contenders if name != "authors"},
        "passes": harness.summary(passes),
        "passes_share_of_step": harness.ratio(passes[1::6], times["ours"])["median"],
        "peak_mib": peaks,
    }
    benchmark.pedantic(contenders["ours"], setup=model.zero_grad, rounds=1)
    benchmark.extra_info.update(result)
    record("step", result)
