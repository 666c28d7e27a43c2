"""What only a GPU can show: no host sync, CUDA graphs, labels out of range without a stop, sizes with real memory.

Under Triton's interpreter much of it shows on a pretend GPU as well (pretend_gpu/).
"""

import os
import warnings

import pretend_gpu
import pytest
import torch

import tiny_models
from batches import assert_same, in_float64, make_batch, run_logps, run_loss
from gapo_kernels import (
    GeometricAnchor,
    fused_gapo_loss,
    fused_linear_gapo_loss,
    gapo_step,
    linear_sequence_logps,
    reference,
    sequence_logps,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and not pretend_gpu.INSTALLED:
    pytest.skip("there is no pretend GPU for the interpreter", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("no GPU in this machine", allow_module_level=True)

pytestmark = pytest.mark.kernels
needs_a_real_one = pytest.mark.skipif(INTERPRETED, reason="needs a real GPU")


@pytest.fixture
def batch():
    return make_batch(4, 5, 5003, dtype=torch.float32, device="cuda")


def test_auto_is_triton_on_a_gpu(batch):
    found = run_loss(batch, "auto", anchor_logits=batch.anchor_logits)
    assert_same(found, run_loss(batch, "triton", anchor_logits=batch.anchor_logits), tolerance=0)


def test_torch_back_end_on_a_gpu(batch):
    found = run_loss(batch, "torch", anchor_logits=batch.anchor_logits)
    assert_same(found, in_float64(run_loss, batch, anchor_logits=batch.anchor_logits), tolerance=1e-5)


def test_dropout_on_the_gpu_of_weights_that_are_not_is_refused():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    x = torch.randn(3, device="cuda")
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="drew random numbers"):
        gapo_step(lambda: torch.dropout(weight.to("cuda") @ x, 0.5, train=True), GeometricAnchor([weight]))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("packed", [False, True])
def test_no_host_sync(packed):
    batch = make_batch(4, 5, 5003, dtype=torch.bfloat16, packed=packed, device="cuda")
    logits = batch.logits.requires_grad_()

    def step():
        out = fused_gapo_loss(
            logits, batch.labels, anchor_logits=batch.anchor_logits, cu_seqlens=batch.cu_seqlens, sft_weight=0.1
        )
        logps = sequence_logps(logits, batch.labels, cu_seqlens=batch.cu_seqlens)
        (out.loss + logps.sum()).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.grad.abs().max() > 0


@needs_a_real_one
def test_cuda_graph(batch):
    """Captured once, replayed on other numbers and other labels."""
    logits = batch.logits.clone().requires_grad_()
    labels = batch.labels.clone()

    def step():
        out = fused_gapo_loss(logits, labels, anchor_logits=batch.anchor_logits, sft_weight=0.1)
        return out, torch.autograd.grad(out.loss, logits)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, gradient = step()

    other = make_batch(4, 5, 5003, dtype=torch.float32, device="cuda", seed=1)
    with torch.no_grad():
        logits.copy_(other.logits)
        labels.copy_(other.labels)
    for _ in range(2):  # the ticket of the last program must be back at zero for the second replay
        graph.replay()
    expected = run_loss(other, "triton", anchor_logits=batch.anchor_logits, sft_weight=0.1)
    torch.testing.assert_close(out.loss.detach(), expected.fields["loss"], rtol=0, atol=0)
    assert torch.equal(gradient, expected.gradient)
    assert gradient.abs().max() > 1e-6


def test_label_out_of_range(batch, monkeypatch):
    """NaN in its pair and no stop; with GAPO_KERNELS_DEBUG=1 the error that a CPU gives."""
    clean = run_loss(batch, "triton", reduction="none")
    labels = batch.labels.clone()
    labels[1, 1] = 5003
    wrong = batch._replace(labels=labels)
    monkeypatch.delenv("GAPO_KERNELS_DEBUG", raising=False)
    for backend in ("triton", "torch"):
        found = run_loss(wrong, backend, reduction="none")
        assert found.fields["loss"].isnan().tolist() == [False, True]
    found = run_loss(wrong, "triton", reduction="none")
    assert torch.equal(found.fields["loss"][0], clean.fields["loss"][0])
    assert torch.equal(found.gradient[[0, 2]], clean.gradient[[0, 2]])
    monkeypatch.setenv("GAPO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5003\).*got 5003 at row 1, position 1"):
        run_loss(wrong, "triton")


@pytest.mark.parametrize("budget", [2**20, 2**30])
def test_d_weight_of_a_bfloat16_head_is_as_close_as_an_eager_path(budget):
    torch.manual_seed(0)
    rows = (4, 9) if INTERPRETED else (8, 65)
    hidden, anchor = (torch.randn(*rows, 64, device="cuda").bfloat16() for _ in range(2))
    weight, labels = torch.randn(5003, 64, device="cuda").bfloat16() * 0.3, torch.randint(5003, rows, device="cuda")

    def d_weight(function, dtype, **options):
        leaf = weight.to(dtype).requires_grad_()
        out = function(hidden.to(dtype), leaf, labels, anchor_hidden=anchor.to(dtype), **options)
        return torch.autograd.grad(out.loss, leaf)[0].double()

    def eager(hidden, weight, labels, anchor_hidden):
        logits, anchor_logits = ((h @ weight.t()).float() for h in (hidden, anchor_hidden))
        return reference.fused_gapo_loss(logits, labels, anchor_logits=anchor_logits.detach())

    truth = d_weight(reference.fused_linear_gapo_loss, torch.float64)
    error = (d_weight(fused_linear_gapo_loss, torch.bfloat16, max_logits_bytes=budget) - truth).norm()
    assert 0 < error <= 1.2 * (d_weight(eager, torch.bfloat16) - truth).norm()


def test_label_out_of_range_of_a_head():
    hidden, weight = torch.randn(4, 5, 16, device="cuda"), torch.randn(37, 16, device="cuda")
    labels = torch.randint(37, (4, 5), device="cuda")
    labels[1, 2] = 37
    for budget in (40 if INTERPRETED else 4, 2**30):  # ten logits, or one
        out = fused_linear_gapo_loss(hidden, weight, labels, reduction="none", max_logits_bytes=budget)
        logps = linear_sequence_logps(hidden, weight, labels, max_logits_bytes=budget)
        assert out.loss.isnan().tolist() == [False, True] and logps.isnan().tolist() == [False, True, False, False]


@needs_a_real_one
@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_past_2_to_the_31(inplace):
    """2^31 logits and more, in memory: the last sequence is what it is alone."""
    vocabulary, length = 131_075, 4097
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    logits = torch.empty(4, length, vocabulary, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    logits[:, ::512].normal_(generator=generator)
    labels = torch.full((4, length), -100, device="cuda")
    labels[:, ::512] = torch.arange(4 * 9, device="cuda").view(4, 9) * 3000
    assert logits.numel() > 2**31
    last = logits[3, ::512].clone()
    logits.requires_grad_()
    logps = sequence_logps(logits, labels, shift=False, inplace_backward=inplace)
    upstream = torch.tensor([1.0, 1.0, 1.0, 2.0], device="cuda")
    (gradient,) = torch.autograd.grad(logps, logits, upstream)
    alone = make_batch(1, 9, 5, device="cuda")._replace(logits=last[None], labels=labels[3:, ::512])
    expected = run_logps(alone, "triton", upstream[3:], shift=False)
    torch.testing.assert_close(logps.detach()[3:], expected.fields["logps"], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[3, ::512], expected.gradient[0], rtol=2**-7, atol=1e-8)
    assert (gradient[3, 1::512] == 0).all() and expected.gradient.abs().max() > 0.01


@needs_a_real_one
def test_same_bits_beside_other_work(batch):
    """Programs end in another order on a busy GPU; the last one out adds up in the same one."""
    big = make_batch(64, 17, 5003, dtype=torch.float32, device="cuda")
    first = run_loss(big, "triton", anchor_logits=big.anchor_logits)
    other = torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(other):
            torch.randn(2048, 2048, device="cuda") @ torch.randn(2048, 2048, device="cuda")
        assert_same(run_loss(big, "triton", anchor_logits=big.anchor_logits), first, tolerance=0)


def waits(run):
    """How often the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "called a synchronizing CUDA operation" in str(warning.message)]


@pytest.mark.parametrize("options", [{}, {"direction": "gaussian"}, {"rounding": "nearest"}], ids=str)
def test_a_step_waits_once(options):
    """For the norm of the probe's gradient, without which no weight is moved; the statistics wait until they are read."""
    torch.manual_seed(0)
    embed, head = torch.nn.Embedding(37, 16).cuda(), torch.nn.Linear(16, 37).cuda()
    ids = torch.randint(37, (4, 6), device="cuda")
    anchor = GeometricAnchor([*embed.parameters(), *head.parameters()], rho=0.3, compute_dtype=torch.bfloat16, **options)

    def step():
        out = gapo_step(lambda: sequence_logps(head(embed(ids)), ids), anchor)
        out.loss.backward()

    step()  # compiles
    assert len(found := waits(step)) == 1, found
    assert len(waits(lambda: anchor.stats.changed_fraction)) == 1 and anchor.stats.changed_fraction > 0


@pytest.mark.parametrize("packed", [False, True])
def test_the_linear_path_waits_for_the_kept_rows_alone(packed):
    """However many there are, twice: for which rows are kept, and where each sequence's end."""
    weight, found = torch.randn(37, 16, device="cuda"), []
    for sequences, length in ((4, 6), (8, 17)):
        hidden = torch.randn(sequences, length, 16, device="cuda")
        labels = torch.randint(37, (sequences, length), device="cuda")
        cu_seqlens = None
        if packed:
            hidden, labels = hidden.flatten(0, 1), labels.flatten()
            cu_seqlens = torch.arange(0, sequences * length + 1, length, device="cuda")

        def run():
            leaf, anchor = hidden.clone().requires_grad_(), hidden + 0.1
            fused_linear_gapo_loss(leaf, weight, labels, anchor_hidden=anchor, cu_seqlens=cu_seqlens).loss.backward()
            return leaf.grad

        assert run().abs().max() > 1e-4  # and compiles
        found.append(len(waits(run)))
    assert found == [2, 2]


@pytest.mark.parametrize("path", ["logits", "linear"])
def test_rows_outside_of_cu_seqlens_are_no_sequences(path):
    """A GPU is not waited for to see that there are none: they count as ignored."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 16, device="cuda"), torch.randn(37, 16, device="cuda")
    labels = torch.randint(37, (20,), device="cuda")
    cu_seqlens = torch.tensor([2, 8, 12, 16, 18], device="cuda")

    def run(rows, cu_seqlens):
        leaf = hidden[rows].clone().requires_grad_()
        if path == "linear":
            out = fused_linear_gapo_loss(leaf, weight, labels[rows], anchor_hidden=leaf.detach() + 0.1, cu_seqlens=cu_seqlens)
        else:
            logits = leaf @ weight.t()
            out = fused_gapo_loss(logits, labels[rows], anchor_logits=logits.detach() * 0.9, cu_seqlens=cu_seqlens)
        return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]

    (loss, gradient), (expected, inside) = run(slice(0, 20), cu_seqlens), run(slice(2, 18), cu_seqlens - 2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[2:18], inside)
    assert (gradient[[0, 1, 18, 19]] == 0).all() and inside.abs().max() > 1e-3


def step_on(device, name, dtype, **options):
    """Gaps, loss and gradients of a whole step, by way of hidden states or of logits; the weights are back after it."""
    step = {key: options.pop(key) for key in ("share_backward",) if key in options}
    model = tiny_models.build(name, dtype).to(device)
    ids, labels = (tensor.to(device) for tensor in tiny_models.preference_batch())
    anchor = GeometricAnchor.from_model(model, rho=0.3, **options)
    before = [param.detach().clone() for param in model.parameters()]

    def logps():
        if name == "llama":
            hidden = model.model(ids, use_cache=False).last_hidden_state
            return linear_sequence_logps(hidden, model.lm_head.weight, labels)
        return sequence_logps(model(ids, use_cache=False).logits, labels)

    out = gapo_step(logps, anchor, **step)
    out.loss.backward()
    assert all(map(torch.equal, model.parameters(), before))
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [t.detach().double().cpu() for t in (out.gap, out.loss, torch.cat(gradients))]


@pytest.mark.parametrize("options", [{}, {"share_backward": True}, {"scope": 1}, {"geometry": "sam"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_is_that_of_a_cpu(name, options):
    # transformers computes Llama's norms in float32, whose last bits depend on the device
    exact = {"llama": 1e-5, "gpt2": 1e-9}[name]
    for found, expected in zip(*(step_on(d, name, torch.float64, **options) for d in ("cuda", "cpu")), strict=True):
        torch.testing.assert_close(found, expected, atol=exact, rtol=exact)
        assert expected.abs().max() > 1e-3


def test_a_bfloat16_step_draws_the_bits_of_a_cpu():
    """And where the norm's last digits tip a weight over, which is rare."""
    moved = {}
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(300, 70).bfloat16().to(device)) for _ in range(2)]
        grads = [torch.randn(300, 70).bfloat16().to(device) for _ in params]
        anchor = GeometricAnchor(params, rho=30.0, seed=3)
        before = [param.detach().clone() for param in params]
        with anchor.perturbed(grads=grads):
            moved[device] = torch.cat([param.detach().float().cpu().flatten() for param in params])
        assert all(map(torch.equal, params, before)) and 0.05 < anchor.stats.changed_fraction < 1
    assert (moved["cuda"] != moved["cpu"]).float().mean() < 1e-3


@needs_a_real_one
def test_compiled_code_that_runs_as_cuda_graphs_is_refused():
    model = tiny_models.build("llama", torch.float32).cuda()
    ids, labels = (tensor.cuda() for tensor in tiny_models.preference_batch())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = torch.compile(model, mode="reduce-overhead")
    anchor = GeometricAnchor.from_model(model, rho=0.3)
    with pytest.raises(RuntimeError, match="runs as CUDA graphs"):
        for _ in range(3):  # torch warms up before it records
            gapo_step(lambda: sequence_logps(compiled(ids, use_cache=False).logits, labels), anchor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@needs_a_real_one
def test_out_of_memory_at_the_anchor_brings_the_weights_back():
    params = [torch.nn.Parameter(torch.randn(3000, 70, device="cuda", dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    anchor, before, hoard = GeometricAnchor(params, rho=3.0), [p.detach().clone() for p in params], []
    grads = [torch.randn_like(param) for param in params]
    size = 2**30
    try:
        with pytest.raises(torch.OutOfMemoryError), anchor.perturbed(grads=grads):
            assert not any(map(torch.equal, params, before))
            while True:
                try:
                    hoard.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                except torch.OutOfMemoryError:
                    if size < 2**16:
                        raise
                    size //= 2
    finally:
        hoard.clear()
        torch.cuda.empty_cache()
    assert all(map(torch.equal, params, before))


@needs_a_real_one
def test_autotuning(batch, tmp_path, monkeypatch):
    """Measured once; the results are those of the choice, with the same bits; CUDA's random numbers stay as they are."""
    from gapo_kernels.kernels import config, tuning

    def run():
        return run_loss(batch, "triton", anchor_logits=batch.anchor_logits)

    device, state = batch.logits.device, torch.cuda.get_rng_state()
    monkeypatch.setenv("GAPO_KERNELS_CACHE_DIR", str(tmp_path))
    config.forget()
    try:
        with monkeypatch.context() as patch:
            patch.setenv("GAPO_KERNELS_AUTOTUNE", "1")
            found = run()
            choices = dict(tuning._known(tuning.cache_file(device), device))
            patch.setattr(tuning, "_median", None)
            assert_same(run(), found, tolerance=0)
        assert choices.keys() == {"statistics float32", "gradient float32"}
        assert all(time > 0 for choice in choices.values() for _, time in choice["milliseconds"])
        assert torch.equal(torch.cuda.get_rng_state(), state)
        with config.forced(**{name.split()[0]: choice["parameters"] for name, choice in choices.items()}):
            assert_same(run(), found, tolerance=0)
        tuned = tuning.tune(device, [torch.bfloat16], ["perturbation"], scratch_bytes=2**24)
        candidates = tuning.candidates("perturbation", config.architecture(device), torch.bfloat16)
        assert tuned["perturbation bfloat16"]["parameters"] in candidates
    finally:
        config.forget()
