"""gapo_objective: the scalar math of z, loss and weight, in float64."""

import math

import pytest
import torch

from gapo_kernels import gapo_objective

MARGIN = [1.5, -0.7, 0.2, -3.0, 4.0]
ANCHOR = [0.3, 0.4, -1.1, 0.5, -2.0]
LOSSES = [
    dict(),
    dict(label_smoothing=0.1),
    dict(beta=0.3, gamma=-1.0),
    dict(loss_type="hinge"),
    dict(loss_type="hinge", beta=0.8, gamma=0.0),
]


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def test_values_by_hand():
    # z = 2 * (1.5 - 0.3) - 0.5 = 1.9 and 2 * (-0.7 - 0.4) - 0.5 = -2.7
    margin, anchor = tensor(MARGIN[:2]), tensor(ANCHOR[:2])
    sigma = [1 / (1 + math.exp(-1.9)), 1 / (1 + math.exp(2.7))]

    loss, weight = gapo_objective(margin, anchor, reduction="none")
    torch.testing.assert_close(loss, tensor([-math.log(p) for p in sigma]))
    torch.testing.assert_close(weight, tensor([2 * (1 - p) for p in sigma]))

    loss, weight = gapo_objective(margin, anchor, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss, tensor([-0.9 * math.log(p) - 0.1 * math.log(1 - p) for p in sigma]))
    torch.testing.assert_close(weight, tensor([2 * (0.9 - p) for p in sigma]))

    loss, weight = gapo_objective(margin, anchor, loss_type="hinge", reduction="none")
    torch.testing.assert_close(loss, tensor([0.0, 3.7]))
    torch.testing.assert_close(weight, tensor([0.0, 2.0]))


@pytest.mark.parametrize("options", LOSSES)
def test_weight_is_minus_the_derivative(options):
    margin = tensor(MARGIN).requires_grad_()
    loss, weight = gapo_objective(margin, tensor(ANCHOR), reduction="none", **options)
    (derivative,) = torch.autograd.grad(loss.sum(), margin)
    assert weight.abs().max() > 0.05
    assert not weight.requires_grad
    torch.testing.assert_close(weight, -derivative, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", LOSSES)
def test_mean_is_the_mean_of_none(options):
    margin = tensor(MARGIN).requires_grad_()
    single, weight = gapo_objective(margin, tensor(ANCHOR), reduction="none", **options)
    mean, mean_weight = gapo_objective(margin, tensor(ANCHOR), **options)
    assert mean.shape == () and single.shape == (5,)
    torch.testing.assert_close(mean, single.mean())
    assert torch.equal(weight, mean_weight)  # w_i is that of the pair's own loss, before the mean
    (gradient,) = torch.autograd.grad(mean, margin)
    torch.testing.assert_close(gradient, -weight / 5, rtol=1e-12, atol=1e-14)


def test_without_anchor_the_gap_is_the_margin():
    loss, weight = gapo_objective(tensor(MARGIN))
    expected, expected_weight = gapo_objective(tensor(MARGIN), torch.zeros(5, dtype=torch.float64))
    assert torch.equal(loss, expected) and torch.equal(weight, expected_weight)
    assert loss != gapo_objective(tensor(MARGIN), tensor(ANCHOR))[0]


def test_the_anchor_is_a_constant():
    margin, anchor = tensor(MARGIN).requires_grad_(), tensor(ANCHOR).requires_grad_()
    gapo_objective(margin, anchor)[0].backward()
    assert anchor.grad is None
    assert margin.grad.abs().max() > 1e-4


def test_extreme_gaps():
    """Where sigma(z) is 0 or 1 in float64, and where exp(-z) overflows, the loss stays linear or exactly small."""
    margin = tensor([1e4, -1e4, 30.0, math.inf, -math.inf]).requires_grad_()
    loss, weight = gapo_objective(margin, beta=1.0, gamma=0.0, reduction="none")
    small = math.exp(-30.0)
    torch.testing.assert_close(loss, tensor([0.0, 1e4, math.log1p(small), 0.0, math.inf]), rtol=1e-12, atol=0)
    torch.testing.assert_close(weight, tensor([0.0, 1.0, small / (1 + small), 0.0, 1.0]), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss[:4].sum(), margin)
    torch.testing.assert_close(gradient[:4], -weight[:4], rtol=1e-12, atol=0)


@pytest.mark.parametrize("eps", [0.1, 0.49])
def test_label_smoothing_at_extreme_gaps(eps):
    loss, weight = gapo_objective(tensor([1e4, -1e4]), beta=1.0, gamma=0.0, label_smoothing=eps, reduction="none")
    torch.testing.assert_close(loss, tensor([eps * 1e4, (1 - eps) * 1e4]), rtol=1e-12, atol=0)
    torch.testing.assert_close(weight, tensor([-eps, 1 - eps]), rtol=1e-12, atol=0)


def test_pairs_marked_invalid_are_inert():
    # A NaN and an infinity in inert pairs reach neither the loss nor the gradient; the mean is over the other three.
    margin = tensor([1.5, math.nan, 0.2, math.inf, 4.0]).requires_grad_()
    valid = torch.tensor([True, False, True, False, True])
    loss, weight = gapo_objective(margin, tensor(ANCHOR), valid=valid)
    expected, expected_weight = gapo_objective(margin.detach()[valid], tensor(ANCHOR)[valid])
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(weight[valid], expected_weight)
    assert weight[~valid].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(loss, margin)
    torch.testing.assert_close(gradient[valid], -expected_weight / 3)
    assert gradient[~valid].tolist() == [0, 0]
    single, _ = gapo_objective(margin, tensor(ANCHOR), valid=valid, reduction="none")
    assert single[~valid].tolist() == [0, 0]


def test_no_valid_pair_is_a_zero_loss_with_zero_gradient():
    margin = tensor(MARGIN).requires_grad_()
    loss, weight = gapo_objective(margin, valid=torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and weight.tolist() == [0] * 5 and margin.grad.tolist() == [0] * 5


@pytest.mark.parametrize("options", LOSSES)
def test_nan_stays_in_its_pair(options):
    margin = tensor([1.5, math.nan, -0.2]).requires_grad_()
    loss, weight = gapo_objective(margin, reduction="none", **options)
    mean, _ = gapo_objective(margin, **options)
    assert loss.isnan().tolist() == weight.isnan().tolist() == [False, True, False]
    assert mean.isnan()
    (gradient,) = torch.autograd.grad(mean, margin)
    assert gradient[[0, 2]].isfinite().all()
    assert gradient[0] != 0 or gradient[2] != 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_margins_compute_in_float32(dtype):
    margin = tensor(MARGIN, dtype).requires_grad_()
    loss, weight = gapo_objective(margin, tensor(ANCHOR, dtype))
    expected, expected_weight = gapo_objective(margin.detach().double(), tensor(ANCHOR, dtype).double())
    assert loss.dtype == weight.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.double(), expected_weight, rtol=1e-6, atol=0)
    loss.backward()
    assert margin.grad.dtype == dtype


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (["not a tensor"], {}, TypeError, "margin must be a floating-point tensor, got str"),
        ([torch.ones(2, dtype=torch.int64)], {}, TypeError, "got a torch.int64 tensor"),
        ([torch.ones(2, 2)], {}, ValueError, r"margin must have shape \(B,\).*got \(2, 2\)"),
        ([torch.ones(0)], {}, ValueError, r"B >= 1, got \(0,\)"),
        ([torch.ones(2), torch.ones(3)], {}, ValueError, r"anchor_margin must have shape \(2,\).*got \(3,\)"),
        ([torch.ones(2)], {"valid": torch.ones(2)}, TypeError, "valid must be a bool tensor, got a torch.float32"),
        ([torch.ones(2)], {"valid": torch.ones(3) > 0}, ValueError, r"valid must have shape \(2,\).*got \(3,\)"),
        ([torch.ones(2)], {"beta": 0.0}, ValueError, "beta must be > 0, got 0.0"),
        ([torch.ones(2)], {"gamma": math.inf}, ValueError, "gamma must be finite, got inf"),
        ([torch.ones(2)], {"label_smoothing": 0.5}, ValueError, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ([torch.ones(2)], {"loss_type": "ipo"}, ValueError, "loss_type must be one of 'sigmoid', 'hinge', got 'ipo'"),
        ([torch.ones(2)], {"reduction": "sum"}, ValueError, "reduction must be one of 'mean', 'none', got 'sum'"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_got(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gapo_objective(*arguments, **options)
