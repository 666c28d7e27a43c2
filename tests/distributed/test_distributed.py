"""Two real processes over gloo against one process on the joined batch."""

import weakref

import ranks
import pytest
import tiny_models
import torch

from gapo_kernels import GeometricAnchor
from gapo_kernels import distributed as library

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

# The processes are forked from a server that has imported what they need, once for all tests.
torch.multiprocessing.set_forkserver_preload(
    ["ranks", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]
    + [f"transformers.models.{name}.modeling_{name}" for name in tiny_models.NAMES]
)


@pytest.fixture
def on_two_ranks(tmp_path):
    """Runs a function of ranks.py on both; what each of them returned."""

    def start(name, **options):
        arguments = dict(args=(name, str(tmp_path), options), nprocs=ranks.RANKS, start_method="forkserver")
        torch.multiprocessing.start_processes(ranks.run, **arguments)
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks.RANKS)]

    return start


def assert_steps_equal(
    found,
    name,
    steps=2,
    lr=0.05,
    dtype=torch.float64,
    compute_dtype=None,
    tolerance=1e-12,
    frozen=False,
    spare=False,
    **options,
):
    """Gaps of each rank's own pairs, loss as the ranks' mean, gradients and statistics alike on both."""
    model = ranks.build(name, dtype, frozen, spare)
    anchor = GeometricAnchor.from_model(model, rho=ranks.RHO, compute_dtype=compute_dtype, **options)
    expected = ranks.one_process(model, anchor, steps, lr, compute_dtype)
    exact = dict(atol=tolerance, rtol=0)
    for first, second, (gap, loss, gradients, stats) in zip(*found, expected, strict=True):
        torch.testing.assert_close(torch.cat([first[0], second[0]]), gap, **exact)
        torch.testing.assert_close((first[1] + second[1]) / 2, loss, **exact)
        for rank in (first, second):
            assert rank[2].keys() == gradients.keys()
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(rank[2][parameter], gradient, **exact, msg=lambda m: f"{parameter}: {m}")
            assert rank[3] == pytest.approx(stats, rel=tolerance)
        assert gap.abs().max() > 1e-3 and loss.isfinite()


DDP = [
    dict(),
    dict(geometry="sam", scope=1),
    dict(direction="gaussian", scope="all"),
    dict(model="gemma2", checkpointing=True),
    dict(ddp_options=dict(static_graph=True)),
    dict(ddp_options=dict(find_unused_parameters=True)),
    dict(compiled="inside"),
    dict(compiled="outside", scope=1),
    dict(model="gpt2", step_options=dict(share_backward=True)),
    dict(model="gpt2", step_options=dict(share_backward=True), ddp_options=dict(find_unused_parameters=True)),
]


@pytest.mark.parametrize("options", DDP, ids=str)
def test_ddp(on_two_ranks, options):
    found = on_two_ranks("ddp", **options)
    skipped = ("model", "checkpointing", "compiled", "ddp_options", "step_options")
    rest = {key: value for key, value in options.items() if key not in skipped}
    assert_steps_equal(found, options.get("model", "llama"), **rest)


@pytest.mark.parametrize("kind, sharding", [("ddp", {}), ("fsdp", dict(mesh_shape=(2, 1))), ("fsdp", {})])
def test_ranks_round_as_one_process_does(on_two_ranks, kind, sharding):
    """Stochastically: the bits are those of a weight's place in its whole parameter, whoever has it."""
    options = dict(compute_dtype=torch.bfloat16, seed=3)
    found = on_two_ranks(kind, **sharding, **options)
    anchor = GeometricAnchor.from_model(model := tiny_models.build("llama"), rho=ranks.RHO, **options)
    for first, second, (gap, loss, _, stats) in zip(*found, ranks.one_process(model, anchor, steps=2, lr=0.05), strict=True):
        torch.testing.assert_close(torch.cat([first[0], second[0]]), gap, atol=1e-12, rtol=0)
        torch.testing.assert_close((first[1] + second[1]) / 2, loss, atol=1e-12, rtol=0)
        assert first[3] == second[3] == pytest.approx(stats, rel=1e-12)


FSDP = [
    dict(reshard="default"),
    dict(reshard=True, geometry="sam"),
    dict(reshard=False, gathered=True),
    dict(reshard=False, model="gemma2", checkpointing=True),
    dict(model="gpt2", scope="all"),
    dict(scope=1),
    dict(scope=1, reshard=True),
    dict(scope=1, reshard=False, checkpointing=True),
    dict(geometry="sam", direction="gaussian"),
    dict(frozen=True),
    dict(frozen=True, reshard=False, checkpointing=True, scope="all"),
    dict(spare=True),
    dict(mesh_shape=(1, 2)),
    dict(mesh_shape=(2, 1)),
    dict(offload=True),
]


@pytest.mark.parametrize("options", FSDP, ids=str)
def test_fsdp2(on_two_ranks, options):
    found = on_two_ranks("fsdp", **options)
    skipped = ("model", "checkpointing", "mesh_shape", "reshard", "gathered", "offload")
    rest = {key: value for key, value in options.items() if key not in skipped}
    assert_steps_equal(found, options.get("model", "llama"), **rest)


@pytest.mark.parametrize("masters, computed", [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("reshard, checkpointing", [(True, False), (False, False), (False, True)])
def test_fsdp2_mixed_precision(on_two_ranks, masters, computed, reshard, checkpointing):
    """Gaps and gradients are one process's bit for bit if it makes the same casts; the statistics and the mean of losses but
    for their own last digits."""
    policy = dict(param_dtype=computed, reduce_dtype=masters)
    found = on_two_ranks("fsdp", dtype=masters, policy=policy, reshard=reshard, checkpointing=checkpointing)
    assert_steps_equal(found, "llama", tolerance=2e-7, dtype=masters, compute_dtype=computed)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_autocast_leaves_alone_makes_no_gap(on_two_ranks, kind):
    for none, some, warned, warned_without in on_two_ranks("autocast_gaps", kind=kind):
        assert not none.any() and some.all() and (warned, warned_without) == (0, 1)


@pytest.mark.parametrize("name", tiny_models.NAMES)
@pytest.mark.parametrize("kind", ["ddp", "given", "fsdp"])
def test_no_third_copy_of_the_weights(on_two_ranks, kind, name):
    for found, restored in on_two_ranks("originals", kind=kind, model=name):
        assert len(found) > 20 and all(found) and restored


def test_no_third_copy_of_a_weight_whose_gradient_is_still_held(on_two_ranks):
    for found, restored in on_two_ranks("originals", kind="ddp", model="llama", alone=True):
        assert len(found) > 20 and all(found) and restored


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_accumulate(on_two_ranks, kind):
    found = on_two_ranks("accumulates", kind=kind)
    model = tiny_models.build("llama")
    ((_, _, gradients, _),) = ranks.one_process(model, GeometricAnchor.from_model(model, rho=ranks.RHO))
    for rank in found:
        for name, gradient in gradients.items():
            torch.testing.assert_close(rank[name], 2 * gradient, atol=1e-12, rtol=0)


FAILURES = [
    ("first", "MemoryError"),
    ("anchor", "ValueError"),
    ("layer", "ValueError"),
    ("probe", "FloatingPointError"),
    ("Ctrl-C", "KeyboardInterrupt"),
    ("two Ctrl-C", "KeyboardInterrupt"),
]


@pytest.mark.parametrize("where, error", FAILURES)
def test_fsdp2_restores_its_shards(on_two_ranks, where, error):
    for found in on_two_ranks("fsdp_fails_inside", where=where):
        assert found[:3] == (error, True, True) and found[3] < 1e-12


@pytest.mark.parametrize("where", ["layer", "head"])
def test_fsdp2_after_one_rank_has_failed_at_the_anchor(on_two_ranks, where):
    """FSDP2 there would take the next forward for the rest of that one, its collectives out of step."""
    for rank, (failed, off) in enumerate(on_two_ranks("fsdp_fails_on_one_rank", where=where)):
        assert failed == (rank == 1) and off < 1e-12


def test_ranks_that_are_parallel_among_few(on_two_ranks):
    for off, (non_member, no_group, not_sharded) in on_two_ranks("of_their_own"):
        assert off == 0
        assert non_member == "process_group is GroupMember.NON_GROUP_MEMBER: this rank is none of the group's"
        assert no_group == "process_group must be a torch.distributed process group, got str"
        assert "norm.weight is not sharded, and the model's other parameters are over 1 of 2 ranks" in not_sharded


@pytest.mark.parametrize("which, direction", [("probe", "pessimistic"), ("final", "pessimistic"), ("final", "gaussian")])
def test_fsdp2_after_a_backward_that_was_cut_off(on_two_ranks, which, direction):
    """torch's own state is in the middle of that backward: the next probe would miss gradients, without a word."""
    for message, kept, off in on_two_ranks("fsdp_after_a_failed_backward", which=which, direction=direction):
        assert message is not None and "reset_iter_state" in message
        assert kept and off < 1e-12


def test_what_fsdp2_gathers_in_the_backward_waits_for_the_weights(on_two_ranks):
    assert on_two_ranks("fsdp_streams") == [2, 2]


def test_fsdp2_mixed_precision_is_perturbed_on_its_own_grid(on_two_ranks):
    for on_grid, unchanged, restored, changed in on_two_ranks("fsdp_mixed_precision"):
        assert on_grid and restored and 0 < changed < 1
        assert 0.01 < 1 - unchanged and abs(1 - unchanged - changed) < 0.05


@pytest.mark.parametrize(
    "what, message",
    [
        ("sync", "leave gradient synchronisation on"),
        ("all-reduce", "leave gradient synchronisation on"),
        ("waiting", "wait in FSDP2's own buffers"),
        ("hook", "would run the hooks of register_post_accumulate_grad_hook"),
    ],
)
def test_fsdp2_refuses_what_would_make_the_probe_wrong(on_two_ranks, what, message):
    for found in on_two_ranks("fsdp_refused", what=what):
        assert message in found


def test_a_shared_backward_falls_back_on_one_rank(on_two_ranks):
    for ordinary, shared in on_two_ranks("sharing_saturated"):
        for one, other in zip(ordinary, shared):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind, message", [("fsdp", "sharded parameters"), ("static graph", "static_graph=True")])
def test_a_shared_backward_refuses_what_would_wait_for_a_real_one(on_two_ranks, kind, message):
    for found in on_two_ranks("sharing_refused", kind=kind):
        assert message in found


def test_fsdp2_leaves_gradients_outside_of_the_model_alone(on_two_ranks):
    for untouched, trained, gap in on_two_ranks("fsdp_leaf_outside"):
        assert untouched == 5.0 and trained and gap > 1e-3


@pytest.mark.parametrize("fails, direction", [(None, "pessimistic"), (0, "pessimistic"), (1, "pessimistic"), (0, "gaussian")])
def test_ranks_move_to_the_same_bfloat16_weights(on_two_ranks, fails, direction):
    """Also after a use that one of them alone takes back."""
    one, other = on_two_ranks("ddp_bfloat16", fails=fails, direction=direction)
    assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_ddp_broadcasts_buffers_before_the_clean_forward(on_two_ranks):
    """And not before the anchor's, which would then compute another function."""
    for rank, (gaps, met, own) in enumerate(on_two_ranks("buffers_that_differ")):
        assert met == [[1.0, 1.0]] * 3 and not torch.cat(gaps).any() and own == 1.0 + rank


@pytest.mark.parametrize("kind", ["whole", "gaussian", "fsdp"])
def test_all_ranks_refuse_seeds_that_differ(on_two_ranks, kind):
    for message in on_two_ranks("seeds_that_differ", kind=kind):
        assert f"seed to be the same on all ranks, got 0 to {2**64 - 1}: pass one" in message


def test_a_parameter_that_one_rank_does_not_use(on_two_ranks):
    one, other = on_two_ranks("unused_on_one_rank")
    assert all(torch.equal(a, b) for a, b in zip(one, other))
    assert [bool(delta.any()) for delta in one] == [True, True, False, True, True]
    # asam's delta is theta^2 g: with the averaged g known in closed form, the directions are, too
    torch.manual_seed(0)
    theta = [torch.randn(3, 2, dtype=torch.float64).t() for _ in range(5)]
    kept = torch.randn(2, 3, dtype=torch.float64)
    shared = 2 * ((theta[3] + theta[4]) * kept).sum() * kept
    g = [4.5 * theta[0] ** 2, theta[1], torch.zeros(2, 3, dtype=torch.float64), shared, shared]
    norm = torch.cat([t * d for t, d in zip(theta, g)]).norm()
    for found, t, d in zip(one, theta, g):
        torch.testing.assert_close(found, ranks.RHO * t**2 * d / norm, atol=1e-12, rtol=0)


def test_given_gradients_are_averaged(on_two_ranks):
    one, other = on_two_ranks("given_gradients")
    mean = torch.cat([torch.full((4,), 1.5), torch.arange(3) / 2]).double()
    torch.testing.assert_close(torch.cat(one), ranks.RHO * mean / mean.norm(), atol=1e-12, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("probe", ["loss", "margin"])
@pytest.mark.parametrize("kind", ["ddp", None, (1, 2), (2, 1)], ids=str)
def test_a_pair_weighs_alike_on_every_rank(on_two_ranks, kind, probe):
    (one, norm), (other, same_norm) = on_two_ranks("uneven", kind=kind, probe=probe)
    gap, expected_norm = ranks.uneven(0, probe=probe)
    assert len(one) == 1 and len(other) == ranks.PAIRS - 2 and gap.abs().min() > 1e-3
    torch.testing.assert_close(torch.cat([one, other]), gap, atol=1e-12, rtol=0)
    assert norm == pytest.approx(expected_norm, rel=1e-12) and same_norm == norm


def test_averages_of_large_numbers_and_of_other_dtypes(on_two_ranks):
    for large, wide in on_two_ranks("averaged_gradients"):
        assert torch.equal(large, torch.full((4,), 4e4, dtype=torch.float16))
        assert torch.equal(wide, torch.full((3,), 2.5, dtype=torch.float64))


def test_averages_hold_one_bucket(monkeypatch):
    """Two ranks that are alike, on one."""
    buckets, held = [], []

    def all_reduce(tensor, operation=None, group=None):
        if operation is None:
            buckets.append(weakref.ref(tensor))
            held.append([bucket().nbytes for bucket in buckets if bucket() is not None])
            tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(library, "ranks", lambda group: 2)
    monkeypatch.setattr(library, "BUCKET_BYTES", 100)
    params = [torch.zeros(10) for _ in range(7)]
    means, averaged, _ = library.averaged([torch.full((10,), 2.0) for _ in params], params, None, ours=True)
    assert averaged and all(torch.equal(mean, torch.full((10,), 2.0)) for mean in means)
    assert held == [[80], [80], [80], [40]]


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_in_other_orders_of_memory_are_averaged_where_they_lie(on_two_ranks, apart):
    for experts, matrix, in_place in on_two_ranks("gradients_in_other_orders", apart=apart):
        assert torch.equal(experts, torch.arange(30.0).mul(1.5).view(2, 3, 5).transpose(1, 2))
        assert torch.equal(matrix, torch.arange(15.0).mul(1.5).view(3, 5)) and in_place


def test_another_dtype_than_the_policys_is_refused(on_two_ranks):
    for said in on_two_ranks("another_dtype_than_the_policys"):
        assert "as its MixedPrecisionPolicy says: expected compute_dtype None or torch.bfloat16, got torch.float32" in said


def test_a_group_of_each_rank_alone(on_two_ranks):
    one, other = on_two_ranks("given_gradients", alone=True)
    for moved, grads in ((one, [torch.full((4,), 1.0), torch.zeros(3)]), (other, [torch.full((4,), 2.0), torch.arange(3.0)])):
        own = torch.cat(grads).double()
        torch.testing.assert_close(torch.cat(moved), ranks.RHO * own / own.norm(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scope, counts", [(1, (0, 1)), ("backbone", (1, 2))])
def test_the_probes_backward_stops_where_the_scope_does(on_two_ranks, scope, counts):
    assert on_two_ranks("fsdp_backwards", scope=scope) == [counts, counts]


def test_shards_draw_numbers_of_their_own(on_two_ranks):
    one, other = on_two_ranks("fsdp_noise")
    assert one.shape == other.shape and (one != 0).all() and (other != 0).all()
    assert (one.sign() == other.sign()).float().mean() < 0.7


def test_all_ranks_refuse_what_is_not_finite_on_one(on_two_ranks):
    for message in on_two_ranks("not_finite_on_one_rank"):
        assert "the weights were left where they are" in message


@pytest.mark.parametrize(
    "options",
    [
        dict(sizes=(20, 17)),
        dict(sizes=(2, 35), softcap=2.0, logit_scale=0.5, max_logits_bytes=1000),
        dict(sizes=(2, 35), softcap=2.0, logit_scale=0.5, max_logits_bytes=100),
        dict(sizes=(20, 17), budgets=(2**30, 1600)),
        dict(sizes=(20, 17), budgets=(100, 480)),  # within a row, and more
        dict(sizes=(20, 17), loss_options=dict(reduction="none", sft_weight=0.2, loss_type="hinge")),
        dict(sizes=(20, 17), dtype="bfloat16"),
        dict(sizes=(20, 17), masked=17),  # all of a shard
        dict(sizes=(20, 17), masked=17, max_logits_bytes=100),  # and, of that, all of its slices
    ],
    ids=str,
)
def test_a_head_sharded_by_vocabulary(on_two_ranks, options):
    expected = ranks.vocabulary_parallel(None, **options)
    found = on_two_ranks("vocabulary_parallel", **options)
    exact = dict(atol=2e-2, rtol=2e-2) if "dtype" in options else dict(atol=1e-10, rtol=0)
    first = options["sizes"][0]
    for part, (fields, (d_hidden, d_weight, d_bias)) in enumerate(expected):
        for rank, rows in zip(found, (slice(0, first), slice(first, None))):
            for one, other in zip(rank[part][0], fields, strict=True):
                torch.testing.assert_close(one, other, **exact)
            wanted = (d_hidden, d_weight[rows], d_bias[rows])
            for one, other in zip(rank[part][1], wanted, strict=True):
                torch.testing.assert_close(one, other, **exact)


def test_a_head_that_is_a_dtensor(on_two_ranks):
    for messages, loss, expected, gradient, wanted in on_two_ranks("vocabulary_parallel_dtensor"):
        of_dtensor, of_mesh, of_others = messages
        assert "vocab_parallel_group" in of_dtensor and "got DeviceMesh; pass mesh.get_group()" in of_mesh
        assert "weight is a DTensor" in of_others
        torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


def test_labels_outside_of_a_sharded_vocabulary(on_two_ranks):
    for message, losses in on_two_ranks("vocabulary_parallel_label_out_of_range"):
        assert "labels must be in [0, 10)" in message and "got 10 at row 1, position 2" in message
        assert [loss.isnan().tolist() for loss in losses] == [[False, True]] * 2


def test_a_sharded_head_reduces_twice_a_few_numbers_a_row_and_then_d_hidden(on_two_ranks):
    for forward, with_gradient, backward in on_two_ranks("vocabulary_parallel_collectives"):
        sizes, rows = (2, ranks.RANKS), [(10,), (2, 10)]  # and budgets
        assert forward == [sizes, *rows] and with_gradient == [sizes, *rows, (10, 4)] and backward == [sizes]
