"""The Anchor Gap of a real model on bfloat16's grid: stochastic rounding keeps it, rounding to nearest loses it."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from gapo_kernels import GeometricAnchor, gapo_objective, linear_sequence_logps

RHO, PAIRS, SEEDS = 0.025, 16, 5


@contextmanager
def computing_with(params, values):
    """The parameters' memory replaced while a graph is built: what autocast or FSDP2 do with masters."""
    masters = [p.data for p in params]
    try:
        for p, value in zip(params, values):
            p.data = value
        yield
    finally:
        for p, master in zip(params, masters):
            p.data = master


@pytest.fixture(scope="module")
def smollm2():
    """margin() of 16 real pairs with float32 activations, the model, and its probe's gradients on bfloat16's grid."""
    smollm2 = pytest.importorskip("gapo_trainer.smollm2")
    preferences = pytest.importorskip("gapo_trainer.preferences")
    try:
        model, tokenizer = smollm2.load_smollm2()
    except (ModuleNotFoundError, FileNotFoundError) as missing:
        pytest.skip(str(missing))
    model = model.float().eval()
    pairs = preferences.flip_labels(preferences.load_preferences("train")[:PAIRS], 0.0, 0)
    batch = preferences.PreferenceCollator(tokenizer.pad_token_id)(preferences.tokenize_pairs(pairs, tokenizer, 64))

    def margin():
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        chosen, rejected = linear_sequence_logps(hidden, model.lm_head.weight, batch["labels"]).chunk(2)
        return chosen - rejected

    anchor = GeometricAnchor.from_model(model, rho=RHO)
    with computing_with(anchor.params, [p.data.bfloat16().float() for p in anchor.params]):
        clean = margin()
        grads = torch.autograd.grad(gapo_objective(clean, beta=2.0, gamma=0.5)[0], anchor.params)
    return margin, model, clean.detach(), grads


@pytest.fixture(scope="module")
def gap(smollm2):
    margin, model, clean, grads = smollm2

    def measure(masters, seed=0, **options):
        """Gaps with the given float32 masters, the forward computing with their bfloat16 casts (or not, at theta~)."""
        anchor = GeometricAnchor.from_model(model, rho=RHO, seed=seed, **options)
        with computing_with(anchor.params, [m.clone() for m in masters]), torch.no_grad():
            with anchor.perturbed(grads=grads):
                if options["compute_dtype"] == torch.bfloat16:
                    with computing_with(anchor.params, [p.data.bfloat16().float() for p in anchor.params]):
                        return clean - margin()
                return clean - margin()

    return measure


def error(found, truth):
    return ((found - truth).norm() / truth.norm()).item()


def test_gaps_in_bfloat16(smollm2, gap):
    model = smollm2[1]
    masters = [p.detach().clone() for p in model.model.parameters()]
    grid = [m.bfloat16().float() for m in masters]
    truth = gap(grid, compute_dtype=torch.float32)
    assert truth.mean() > 0.02
    on_grid = [error(gap(grid, seed, compute_dtype=torch.bfloat16), truth) for seed in range(SEEDS)]
    assert sum(on_grid) / SEEDS <= 0.12, on_grid
    assert any((m != g).any() for m, g in zip(masters, grid))  # the masters are float32 indeed
    of_masters = [error(gap(masters, seed, compute_dtype=torch.bfloat16), truth) for seed in range(SEEDS)]
    assert sum(of_masters) / SEEDS <= 0.12, of_masters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that most of the perturbation is lost
        nearest = [
            error(gap(weights, compute_dtype=torch.bfloat16, rounding="nearest"), truth) for weights in (grid, masters)
        ]
    assert min(nearest) > 0.5, nearest
    assert all(torch.equal(p, m) for p, m in zip(model.model.parameters(), masters))
    print(f"errors: on the grid {on_grid}, of masters {of_masters}, to nearest {nearest}")
