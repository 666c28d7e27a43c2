"""torch.compile: one graph, the same numbers, no recompilation when the batch or the sequence length changes."""

import os

import pytest
import tiny_models
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from batches import make_batch, run_logps, run_loss
from gapo_kernels import GeometricAnchor, distributed, fused_gapo_loss, gapo_objective, gapo_step, reference, sequence_logps

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiled in a plain process; test_ops.py checks the interpreter's operators", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def fresh_cache():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    """(compiled function, counter): traced, with forward and backward graphs; aot_eager leaves out code generation."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True), counter


def gradient_of(loss, logits):
    return torch.autograd.grad(loss.sum(), logits)[0]


# Keywords that take other branches in Python: both layouts, both reductions, with an anchor, in place, and the hinge.
@pytest.mark.parametrize(
    "packed, anchored, options",
    [
        (False, True, dict(label_smoothing=0.1, sft_weight=0.3)),
        (True, True, dict(reduction="none", length_normalized=False, beta=0.3)),
        (False, False, dict(loss_type="hinge", gamma=3.0, shift=False)),
        (True, False, dict(inplace_backward=True)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_loss_equals_eager(packed, anchored, options, dtype):
    batch = make_batch(4, 3, 67, packed=packed, device=DEVICE).to(dtype)

    def step(logits, anchor_logits):
        out = fused_gapo_loss(
            logits.sin() * 3,  # not a leaf, so that it may be overwritten
            batch.labels,
            anchor_logits=anchor_logits if anchored else None,
            cu_seqlens=batch.cu_seqlens,
            **options,
        )
        return out

    logits = batch.logits.requires_grad_()
    expected = step(logits, batch.anchor_logits)
    expected_gradient = gradient_of(expected.loss, logits)
    assert expected_gradient.abs().max() > 1e-3
    function, counter = compiled(step)
    found = function(logits, batch.anchor_logits)
    assert counter.frame_count == 1
    for name, field in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name), field, rtol=1e-6, atol=0, msg=name)
    assert [field.requires_grad for field in found] == [True] + [False] * 8
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-9
    torch.testing.assert_close(gradient_of(found.loss, logits), expected_gradient, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_logps_equal_eager(packed, inplace):
    batch = make_batch(3, 3, 67, packed=packed, device=DEVICE)

    def step(logits):
        return sequence_logps(
            logits * 2, batch.labels, cu_seqlens=batch.cu_seqlens, inplace_backward=inplace, return_counts=True
        )

    logits = batch.logits.requires_grad_()
    expected, counts = step(logits)
    function, counter = compiled(step)
    found, found_counts = function(logits)
    assert counter.frame_count == 1
    assert torch.equal(found, expected) and torch.equal(found_counts, counts)
    expected_gradient = gradient_of(expected, logits)
    assert expected_gradient.abs().max() > 1e-3
    assert torch.equal(gradient_of(found, logits), expected_gradient)


def test_generated_code_equals_eager():
    """The default compiler too, which places the in-place operator itself."""
    batch = make_batch(4, 3, 67, device=DEVICE)

    def step(logits):
        return fused_gapo_loss(
            logits.sin() * 3, batch.labels, anchor_logits=batch.anchor_logits, inplace_backward=True
        ).loss

    logits = batch.logits.requires_grad_()
    expected = step(logits)
    try:
        found = torch.compile(step, fullgraph=True)(logits)
        gradient = gradient_of(found, logits)
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("torch.compile's default back end needs a C++ compiler, and there is none")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, gradient_of(expected, logits))


def test_generated_code_of_a_decoders_layers_in_a_step():
    """Layer by layer: the second runs what was generated for the first. In float32, in which norms compute anyway."""
    ids, labels = (tensor.to(DEVICE) for tensor in tiny_models.preference_batch())
    results = []
    for generated in (False, True):
        model = tiny_models.build("llama", torch.float32, layers=2, width=32).to(DEVICE)
        for layer in model.model.layers if generated else ():
            layer.compile()
        anchor = GeometricAnchor.from_model(model, rho=0.3)
        try:
            out = gapo_step(lambda: sequence_logps(model(ids, use_cache=False).logits, labels), anchor)
        except torch._inductor.exc.InvalidCxxCompiler:
            pytest.skip("torch.compile's default back end needs a C++ compiler, and there is none")
        assert len(list(distributed.compiled(out.loss))) == 2 * generated and out.gap.abs().min() > 1e-3
        out.loss.backward()
        results.append([out.loss.detach(), out.anchor_margin, *(param.grad for param in model.parameters())])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# One compilation for the first shape, one with sizes left open for the second, none for any after. (A size of 1 is
# torch.compile's own special case, also where it counts pairs.)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("run", [run_loss, run_logps])
def test_no_recompilation_when_the_shape_changes(run, packed):
    def step(logits, anchor_logits, labels, cu_seqlens):
        if run is run_logps:
            return sequence_logps(logits, labels, cu_seqlens=cu_seqlens)
        return fused_gapo_loss(logits, labels, anchor_logits=anchor_logits, cu_seqlens=cu_seqlens).loss

    function, counter = compiled(step)
    compilations = []
    for sequences, length in [(4, 3), (6, 5), (8, 2), (4, 7), (4, 9), (10, 4)]:
        batch = make_batch(sequences, length, 67, packed=packed, device=DEVICE)
        logits = batch.logits.requires_grad_()
        found = function(logits, batch.anchor_logits, batch.labels, batch.cu_seqlens)
        compilations.append(counter.frame_count)
        options = dict(anchor_logits=batch.anchor_logits) if run is run_loss else {}
        expected = run(batch, "auto", **options)
        torch.testing.assert_close(found.detach(), expected.fields["loss" if run is run_loss else "logps"])
        torch.testing.assert_close(gradient_of(found, logits), expected.gradient)
    assert compilations[0] == 1 and compilations[-1] <= 2, compilations


def test_objective_compiles():
    margin = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64, requires_grad=True)
    function, counter = compiled(lambda m: gapo_objective(m, m.detach() * 0.5, label_smoothing=0.1))
    loss, weight = function(margin)
    expected, expected_weight = gapo_objective(margin, margin.detach() * 0.5, label_smoothing=0.1)
    assert counter.frame_count == 1
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(weight, expected_weight)
    torch.testing.assert_close(gradient_of(loss, margin), gradient_of(expected, margin))


def test_reference_compiles():
    """The eager specification too, without a graph break: its checks of values step aside."""
    batch = make_batch(4, 3, 7)
    function, counter = compiled(
        lambda x: reference.fused_gapo_loss(x, batch.labels, anchor_logits=batch.anchor_logits, sft_weight=0.2)
    )
    found = function(batch.logits)
    assert counter.frame_count == 1
    expected = reference.fused_gapo_loss(batch.logits, batch.labels, anchor_logits=batch.anchor_logits, sft_weight=0.2)
    for name, field in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name), field, msg=name)


def test_inplace_backward_with_new_shapes():
    """The check for shared memory must not sort strides that are symbolic."""
    compiled = torch.compile(
        lambda logits, labels: fused_gapo_loss(logits * 1, labels, inplace_backward=True).loss, fullgraph=True
    )
    for length in (5, 6, 9):
        logits = torch.randn(4, length, 23, requires_grad=True)
        labels = torch.randint(23, (4, length))
        (found,) = torch.autograd.grad(compiled(logits, labels), logits)
        (expected,) = torch.autograd.grad(fused_gapo_loss(logits, labels).loss, logits)
        torch.testing.assert_close(found, expected)
