"""What each of two processes runs. Every function gets (rank, folder) and saves what it found as folder/RANK.pt."""

import os
import signal
import sys
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import distributed, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
import tiny_models
from grids import moved_on_grid

import gapo_kernels.distributed
from gapo_kernels import (
    GeometricAnchor,
    fused_linear_gapo_loss,
    gapo_step,
    linear_sequence_logps,
    perturbation,
    sequence_logps,
    validation,
)
from gapo_kernels.displacement import Displacement
from gapo_kernels.distributed import averaged

RANKS, PAIRS, RHO = 2, 4, 0.3


def run(rank, name, folder, options):
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(folder, "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        torch.save(globals()[name](rank, **options), os.path.join(folder, f"{rank}.pt"))
        distributed.barrier()
        # Without the teardown: gloo's threads abort one process in some dozens there ("terminate called without an active
        # exception"), when all is done.
        os._exit(0)
    finally:
        distributed.destroy_process_group()


def batch(rank=None, drop=()):
    """All pairs, or this rank's half of them."""
    ids, labels = tiny_models.preference_batch(PAIRS)
    rows = range(PAIRS) if rank is None else range(rank * PAIRS // RANKS, (rank + 1) * PAIRS // RANKS)
    rows = [*rows, *(row + PAIRS for row in rows)]
    return ids[rows], labels[rows]


def build(name, dtype=torch.float64, frozen=False, spare=False):
    """frozen: the embedding and half of the first layer; spare: with a weight that no batch uses."""
    model = tiny_models.build(name, dtype)
    if name == "gemma2" and dtype == torch.float64:  # whose norms' last bits in float32 depend on the shape of the batch
        tiny_models.stay_in_float64(model)
    if frozen:
        model.get_input_embeddings().requires_grad_(False)
        model.model.layers[0].mlp.requires_grad_(False)
    if spare:
        model.model.layers[1].spare = nn.Parameter(torch.ones(6, 2, dtype=dtype))
    return model


def logps_of(model, rank=None):
    ids, labels = batch(rank)
    return lambda: sequence_logps(model(input_ids=ids).logits, labels)


def one_process(model, anchor, steps=1, lr=0.0, compute_dtype=None):
    """What the joined batch gives on one process: per step (gap, loss, gradients by name, statistics)."""
    logps = logps_of(model)
    if compute_dtype is not None:  # as MixedPrecisionPolicy has it: every parameter is cast, on each rank for its own pairs

        def logps():
            halves = []
            for ids, labels in map(batch, range(RANKS)):
                cast = {name: param.to(compute_dtype) for name, param in model.named_parameters()}
                logits = torch.func.functional_call(model, cast, kwargs=dict(input_ids=ids)).logits
                halves.append(sequence_logps(logits, labels).view(2, -1))
            return torch.cat(halves, 1).flatten()

    return _train(model, anchor, logps, steps, lr)


def _train(model, anchor, logps, steps, lr, whole=lambda tensor: tensor, **options):
    found = []
    for _ in range(steps):
        model.zero_grad()
        out = gapo_step(logps, anchor, **options)
        out.loss.backward()
        gradients = {
            n.removeprefix("_orig_mod.").removeprefix("module."): whole(p.grad)
            for n, p in model.named_parameters()
            if p.grad is not None
        }
        stats = (anchor.stats.grad_norm, anchor.stats.intended_norm, anchor.stats.changed_fraction)
        found.append((out.gap, out.loss.detach(), {n: g.clone() for n, g in gradients.items()}, stats))
        with torch.no_grad():
            for param in model.parameters():
                if param.grad is not None:
                    param -= lr * param.grad
    return found


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def ddp(
    rank, model="llama", steps=2, lr=0.05, checkpointing=False, compiled=False, ddp_options={}, step_options={}, **options
):
    model = build(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled == "inside":
        model.compile(backend="aot_eager")
    wrapped = nn.parallel.DistributedDataParallel(model, **ddp_options)
    if compiled == "outside":
        wrapped = torch.compile(wrapped, backend="aot_eager")
    anchor = GeometricAnchor.from_model(wrapped, rho=RHO, **options)
    return _train(wrapped, anchor, logps_of(wrapped, rank), steps, lr, **step_options)


def ddp_bfloat16(rank, fails=None, **options):
    """The anchors' bits on every rank, from gradients that differ before they are averaged. fails: the rank whose use before
    that does."""
    torch.manual_seed(0)
    model = nn.Linear(300, 70).bfloat16()
    anchor = GeometricAnchor(model.named_parameters(), rho=50.0, seed=3, **options)
    theta = [p.detach().clone() for p in anchor.params]
    torch.manual_seed(rank)
    for failing in (rank == fails, False):
        with suppress(MemoryError), anchor.perturbed(model(torch.randn(5, 300).bfloat16()).float().square().sum()):
            if failing:
                raise MemoryError("at the anchor")
            moved = [p.detach().clone() for p in anchor.params]
        assert all(torch.equal(p, t) for p, t in zip(anchor.params, theta))
    assert anchor.state_dict()["step"] == 2
    return moved


def seeds_that_differ(rank, kind):
    param = nn.Parameter(torch.ones(4))
    anchor = GeometricAnchor([param], seed=rank - 1, direction="gaussian" if kind == "gaussian" else "pessimistic")
    objective = param.sum()
    if kind == "fsdp":
        model = _shard(tiny_models.build("llama"))
        anchor, objective = GeometricAnchor.from_model(model, scope="all", seed=rank - 1), logps_of(model, rank)().sum()
    try:
        with anchor.perturbed(objective):
            return "entered"
    except RuntimeError as error:
        return str(error)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(tiny_models.VOCABULARY, 6), nn.Linear(6, tiny_models.VOCABULARY)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, ids):
        return self.head(self.embed(ids) * self.scale)


def buffers_that_differ(rank):
    """Gaps of a radius of 0 and the buffer that each forward had, where every step leaves a rank one of its own; and one that
    a forward at an anchor of one's own had."""
    (ids, labels), model = batch(rank), Scaled().double()
    ddp = nn.parallel.DistributedDataParallel(model)
    anchor, gaps, met = GeometricAnchor.from_model(ddp, scope="all", rho=0.0), [], []
    for _ in range(3):
        model.scale.fill_(1.0 + rank)
        runs = []

        def logps():
            result = sequence_logps(ddp(ids), labels)
            runs.append(model.scale.item())
            return result

        out = gapo_step(logps, anchor)
        out.loss.backward()
        gaps.append(out.gap)
        met.append(runs)
    with anchor.perturbed(grads=[torch.ones_like(param) for param in anchor.params]), torch.no_grad():
        model.scale.fill_(1.0 + rank)
        ddp(ids)
    return gaps, met, model.scale.item()


def unused_on_one_rank(rank):
    """A parameter that only rank 1's objective depends on, one that nobody's does, and two that share a gradient."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 2, dtype=torch.float64).t()) for _ in range(5)]
    kept = torch.randn(2, 3, dtype=torch.float64)
    objective = (params[0] ** 3).sum() * (rank + 1) + ((params[3] + params[4]) * kept).sum() ** 2
    if rank == 1:
        objective = objective + (params[1] ** 2).sum()
    theta = [p.detach().clone() for p in params]
    anchor = GeometricAnchor(params, rho=RHO)
    with anchor.perturbed(objective):
        return [p.detach() - t for p, t in zip(params, theta)]


def given_gradients(rank, alone=False):
    """grads= are averaged, too, over the group's ranks, and left as they were."""
    group = [distributed.new_group([member]) for member in range(RANKS)][rank] if alone else None
    params = [nn.Parameter(torch.ones(4, dtype=torch.float64)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    grads = [torch.full((4,), 1.0 + rank, dtype=torch.float64), torch.arange(3, dtype=torch.float64) * rank]
    before = [g.clone() for g in grads]
    anchor = GeometricAnchor(params, rho=RHO, geometry="sam", process_group=group)
    with anchor.perturbed(grads=grads):
        moved = [p.detach() - 1 for p in params]
    assert all(torch.equal(g, b) for g, b in zip(grads, before))
    return moved


def averaged_gradients(rank):
    """Of float16 numbers whose sum is none, and of one in another dtype than its parameter that rank 1 lacks."""
    params = [nn.Parameter(torch.ones(4, dtype=torch.float16)), nn.Parameter(torch.ones(3))]
    grads = [torch.full((4,), 4e4, dtype=torch.float16), None if rank else torch.full((3,), 5.0, dtype=torch.float64)]
    return averaged(grads, params, None, ours=False)[0]


def gradients_in_other_orders(rank, apart=False):
    """Than their parameters': on both ranks, as experts' are, and on one. And whether the mean lies where the gradient did.
    apart: one of the parameters lies in another order on the other rank."""
    params = [nn.Parameter(torch.ones(2, 5, 3)), nn.Parameter(torch.ones(5, 3).t())]
    grads = [torch.arange(30.0).mul(1 + rank).view(2, 3, 5).transpose(1, 2), torch.arange(15.0).mul(1 + rank).view(3, 5)]
    if rank:
        grads[1] = grads[1].t().contiguous().t()
    if rank and apart:
        params[1] = nn.Parameter(torch.ones(3, 5))
    places = [grad.data_ptr() for grad in grads]
    means, ours, _ = averaged(grads, params, None, ours=True)
    return *means, ours and places == [mean.data_ptr() for mean in means]


def another_dtype_than_the_policys(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = _shard(tiny_models.build("llama", torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    GeometricAnchor.from_model(model, compute_dtype=torch.bfloat16)
    try:
        GeometricAnchor.from_model(model, compute_dtype=torch.float32)
    except ValueError as error:
        return str(error)


def not_finite_on_one_rank(rank):
    param = nn.Parameter(torch.ones(4))
    try:
        with GeometricAnchor([param]).perturbed(grads=[torch.full((4,), float("nan") if rank else 1.0)]):
            return "entered"
    except FloatingPointError as error:
        return str(error)


def _shard(model, mesh_shape=None, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("shard",) if mesh_shape is None else ("replicate", "shard")
    mesh = init_device_mesh("cpu", mesh_shape or (RANKS,), mesh_dim_names=names)
    for layer in model.model.layers if hasattr(model, "model") else model.transformer.h:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp(
    rank,
    model="llama",
    steps=2,
    lr=0.05,
    checkpointing=False,
    mesh_shape=None,
    reshard="default",
    dtype=torch.float64,
    policy=None,
    gathered=False,
    frozen=False,
    spare=False,
    offload=False,
    **options,
):
    """gathered: the anchor is made of a model that an evaluation has left whole."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    model = build(model, dtype, frozen, spare)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sharding = {} if reshard == "default" else {"reshard_after_forward": reshard}
    if policy is not None:
        sharding["mp_policy"] = MixedPrecisionPolicy(**policy)
    if offload:
        sharding["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    model = _shard(model, mesh_shape, **sharding)
    if gathered:
        with torch.no_grad():
            logps_of(model, rank)()
        assert not any(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
    anchor = GeometricAnchor.from_model(model, rho=RHO, **options)
    return _train(model, anchor, logps_of(model, rank), steps, lr, full)


def originals(rank, kind, model, alone=False, **options):
    """For each parameter, whether its original weights wait in the memory of its gradient, or of its given one's average.
    alone: each is averaged by itself, and what communicates it holds on to it, as gloo's threads do for a moment."""
    if alone:
        gapo_kernels.distributed.BUCKET_BYTES, held, all_reduce = 0, [], distributed.all_reduce
        distributed.all_reduce = lambda tensor, *given, **more: held.append(tensor) or all_reduce(tensor, *given, **more)
    model = tiny_models.build(model, torch.bfloat16)
    model = _shard(model, **options) if kind == "fsdp" else nn.parallel.DistributedDataParallel(model)
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    found, start = [], perturbation.Perturbation.__init__

    def recording(self, moves, *arguments):
        found.extend(move.original.data_ptr() == move.direction.data_ptr() for move in moves if move.theta.numel())
        start(self, moves, *arguments)

    perturbation.Perturbation.__init__ = recording
    before = [full(p.detach()).clone() for p in anchor.params]
    if kind == "given":
        with anchor.perturbed(grads=[torch.randn_like(p) for p in anchor.params]):
            pass
    else:
        gapo_step(logps_of(model, rank), anchor)
    return found, all(torch.equal(full(p.detach()), b) for p, b in zip(anchor.params, before))


def autocast_gaps(rank, kind):
    """Gaps of a radius of 0 and of one that is none, under autocast in the forward, with float32 masters; and how often an
    anchor without a compute_dtype warns."""
    model = tiny_models.build("llama", torch.float32)
    model = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else _shard(model)
    logps, gaps = logps_of(model, rank), []

    def under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return logps()

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for rho in (0.0, 3.0):
            anchor = GeometricAnchor.from_model(model, rho=rho, scope="all", compute_dtype=torch.bfloat16)
            gaps.append(gapo_step(under_autocast, anchor).gap)
        before = len(found)
        gapo_step(under_autocast, GeometricAnchor.from_model(model))
    said = ["autocast computes with" in str(one.message) for one in found]
    return *gaps, sum(said[:before]), sum(said[before:])


def uneven(rank, kind="one process", **options):
    """The gaps of the pairs that count, one of them on the first rank and the others on the second, or all on one process,
    and the norm of the probe's gradient."""
    model = tiny_models.build("llama")
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind != "one process":
        model = _shard(model, kind)
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    ids, labels = tiny_models.preference_batch(PAIRS)
    labels[PAIRS + 1] = -100
    pairs = range(PAIRS) if kind == "one process" else [range(2), range(2, PAIRS)][rank]
    rows = [*pairs, *(pair + PAIRS for pair in pairs)]
    ids, labels = ids[rows], labels[rows]
    out = gapo_step(lambda: sequence_logps(model(ids).logits, labels, return_counts=True), anchor, **options)
    return out.gap[out.valid], anchor.stats.grad_norm


def accumulates(rank, kind):
    """Two micro-steps, the first of which DDP does not average: gradients add up, and the probe leaves them alone."""
    model = tiny_models.build("llama")
    model = _shard(model) if kind == "fsdp" else nn.parallel.DistributedDataParallel(model)
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    logps = logps_of(model, rank)
    for last in (False, True):
        with nullcontext() if kind == "fsdp" or last else model.no_sync():
            gapo_step(logps, anchor).loss.backward()
    return {n.removeprefix("module."): full(p.grad) for n, p in model.named_parameters()}


def fsdp_noise(rank):
    """The noise under this rank's half of a weight."""
    model = _shard(tiny_models.build("llama"))
    anchor = GeometricAnchor.from_model(model, rho=RHO, geometry="sam", direction="gaussian")
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().to_local().clone()
    with anchor.perturbed():
        return weight.detach().to_local() - before


def fsdp_fails_inside(rank, where):
    model = _shard(tiny_models.build("llama"), reshard_after_forward=False)
    layers = model.model.layers
    for layer, following in zip(layers, layers[1:]):
        layer.set_modules_to_forward_prefetch([following])
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    before = [p.detach().to_local().clone() for p in anchor.params]
    logps, calls = logps_of(model, rank), []
    signals = {"Ctrl-C": 1, "two Ctrl-C": 2}.get(where, 0)  # the first waits for the weights, the second cuts the forward off
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signals or where == "layer":

        def out_of_memory(*_):
            if len(calls) == 2:
                calls.append(1)
                for _ in range(signals):
                    signal.raise_signal(signal.SIGINT)
                if not signals:
                    raise ValueError("in the middle of the anchor's forward")

        layers[1].mlp.register_forward_pre_hook(out_of_memory)

    def cut_off(*_):
        raise MemoryError("in the middle of the first forward")

    def failing():
        calls.append(1)
        if where == "first" and len(calls) == 1:
            handle = layers[1].mlp.register_forward_pre_hook(cut_off)
            try:
                return logps()
            finally:
                handle.remove()
        if len(calls) == 2:
            moved = any(not torch.equal(p.detach().to_local(), b) for p, b in zip(anchor.params, before))
            assert moved
            if where == "anchor":
                raise ValueError("at the anchor")
            return logps() * float("nan")
        return logps() * (float("nan") if where == "probe" else 1)

    try:
        gapo_step(failing, anchor)
        error = None
    except BaseException as raised:
        error = type(raised).__name__
    # Of the first forward what was gathered is still so: nothing had moved.
    restored = where == "first" or all(torch.equal(p.detach().to_local(), b) for p, b in zip(anchor.params, before))
    step = _next_step(model, anchor, rank)
    ids, _ = batch(rank)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        expected = tiny_models.build("llama")(input_ids=ids).logits
    return error, restored, torch.equal(logits, expected), step


def _next_step(model, anchor, rank):
    """How far loss, gaps and gradients of a step are off those of one process. No .grad may be there before."""
    assert all(param.grad is None for param in model.parameters())
    out = gapo_step(logps_of(model, rank), anchor)
    out.loss.backward()
    mean = out.loss.detach() / RANKS
    distributed.all_reduce(mean)
    whole = tiny_models.build("llama")
    ((gap, loss, gradients, _),) = one_process(whole, GeometricAnchor.from_model(whole, rho=RHO))
    off = [full(param.grad) - gradients[name] for name, param in model.named_parameters()]
    return max(one.abs().max().item() for one in (*off, out.gap - gap.chunk(RANKS)[rank], mean - loss))


def fsdp_fails_on_one_rank(rank, where):
    """After the last parameters are gathered, so that the other rank's forward goes on; then both skip the batch."""
    model = _shard(tiny_models.build("llama"))
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    logps, state, calls = logps_of(model, rank), anchor.state_dict(), []

    def out_of_memory(*_):
        calls.append(1)
        if len(calls) == 2 and rank == 1:
            raise MemoryError("at the anchor")

    handle = (model.lm_head if where == "head" else model.model.layers[-1].mlp).register_forward_pre_hook(out_of_memory)
    try:
        gapo_step(logps, anchor)
        failed = False
    except MemoryError:
        failed = True
    handle.remove()
    anchor.load_state_dict(state)
    return failed, _next_step(model, anchor, rank)


def of_their_own(rank):
    """Each rank's DDP over itself alone, another rank's group, and FSDP2 over this rank with a parameter left whole."""
    groups = [distributed.new_group([member]) for member in range(RANKS)]
    model = tiny_models.build("llama")
    ddp = nn.parallel.DistributedDataParallel(model, process_group=groups[rank])
    anchor = GeometricAnchor.from_model(ddp, rho=RHO)
    gap = gapo_step(logps_of(ddp, rank), anchor).gap
    alone = tiny_models.build("llama")
    expected = gapo_step(logps_of(alone, rank), GeometricAnchor.from_model(alone, rho=RHO, process_group=groups[rank])).gap
    messages = []
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    for options in (dict(process_group=groups[1 - rank]), dict(process_group="dp")):
        try:
            GeometricAnchor.from_model(model, **options)
        except TypeError as error:
            messages.append(str(error))
    sharded = tiny_models.build("llama")
    mesh = DeviceMesh.from_group(groups[rank], "cpu")
    norm = sharded.model.norm.weight
    fully_shard(sharded, mesh=mesh, ignored_params={norm})
    try:
        GeometricAnchor.from_model(sharded)
    except ValueError as error:
        messages.append(str(error))
    GeometricAnchor.from_model(sharded, process_group=groups[rank])
    return (gap - expected).abs().max().item(), messages


def fsdp_after_a_failed_backward(rank, which, **options):
    """What the next step says, and after the remedy its gap less the true one, the largest."""
    model = _shard(tiny_models.build("llama"))
    anchor = GeometricAnchor.from_model(model, rho=RHO, **options)
    logps, failing = logps_of(model, rank), [which == "probe"]

    def fail(gradient):
        if failing[0]:
            raise MemoryError("in a backward")

    handle = model.model.layers[0].register_forward_hook(
        lambda module, args, output: output.register_hook(fail) and None if output.requires_grad else None
    )
    try:
        out = gapo_step(logps, anchor)
        failing[0] = True
        out.loss.backward()
    except MemoryError:
        failing[0] = False
    handle.remove()
    before = [p.detach().to_local().clone() for p in anchor.params]
    try:
        gapo_step(logps, anchor)
        message = None
    except RuntimeError as error:
        message = str(error)
    kept = all(torch.equal(p.detach().to_local(), b) for p, b in zip(anchor.params, before))
    if not hasattr(model, "reset_iter_state"):
        return message, kept, 0.0
    model.reset_iter_state()
    whole = tiny_models.build("llama")
    of_whole = GeometricAnchor.from_model(whole, rho=RHO, **options)
    of_whole.load_state_dict(anchor.state_dict())
    expected = gapo_step(logps_of(whole), of_whole).gap.chunk(RANKS)[rank]
    return message, kept, (gapo_step(logps, anchor).gap - expected).abs().max().item()


def fsdp_streams(rank):
    """How many of the streams that a backward gathers on wait for the weights to be back."""
    model = _shard(tiny_models.build("llama"))
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    gapo_step(logps_of(model, rank), anchor).loss.backward()  # makes the streams
    context, waited, restore = model._get_fsdp_state()._comm_ctx, set(), Displacement.restore

    class Stream:
        def wait_stream(self, other):
            waited.add(self)

    def restore_with_other_streams(move):
        restore(move)
        context.all_gather_copy_in_stream, context.all_gather_stream = Stream(), Stream()

    Displacement.restore = restore_with_other_streams
    gapo_step(logps_of(model, rank), anchor)
    return len(waited)


def fsdp_mixed_precision(rank):
    """float32 masters gathered as bfloat16: the anchor's shards move on bfloat16's grid, and so by as much as what is
    gathered."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = _shard(tiny_models.build("llama", torch.float32), mp_policy=policy)
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    before = [p.detach().to_local().clone() for p in anchor.params]
    logps, seen = logps_of(model, rank), []

    def recording():
        shards = [p.detach().to_local().clone() for p in anchor.params]
        seen.append(shards)
        return logps()

    gapo_step(recording, anchor)
    clean, moved = seen
    assert all(torch.equal(a, b) for a, b in zip(clean, before))
    on_grid = all(map(moved_on_grid, before, moved))
    unchanged = torch.cat([(m.bfloat16() == b.bfloat16()).flatten() for m, b in zip(moved, before)]).float().mean().item()
    restored = all(torch.equal(p.detach().to_local(), b) for p, b in zip(anchor.params, before))
    return on_grid, unchanged, restored, anchor.stats.changed_fraction


def fsdp_backwards(rank, scope):
    """How many backwards have come to the lower layer: after a step, and after the loss's own."""
    model = _shard(tiny_models.build("llama"))
    anchor, seen = GeometricAnchor.from_model(model, rho=RHO, scope=scope), []

    def watch(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.append(1))

    model.model.layers[0].mlp.register_forward_hook(watch)
    loss, probed = gapo_step(logps_of(model, rank), anchor).loss, len(seen)
    loss.backward()
    return probed, len(seen)


def fsdp_refused(rank, what):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = _shard(tiny_models.build("llama"), mesh_shape=(2, 1) if what == "all-reduce" else None)
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    if what == "sync":
        model.set_requires_gradient_sync(False)
    elif what == "all-reduce":
        model.set_requires_all_reduce(False)
    elif what == "waiting":
        policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
        model = _shard(tiny_models.build("llama"), mp_policy=policy)
        anchor = GeometricAnchor.from_model(model, rho=RHO)
        model.set_requires_gradient_sync(False)
        logps_of(model, rank)().sum().backward()
        model.set_requires_gradient_sync(True)
    else:
        model.lm_head.weight.register_post_accumulate_grad_hook(lambda param: None)
    try:
        gapo_step(logps_of(model, rank), anchor)
    except RuntimeError as error:
        return str(error)


def sharing_saturated(rank):
    """Steps of which one rank's probe has a pair without weight: it falls back to a real backward, the other does not."""
    model = tiny_models.build("gpt2")
    model.register_buffer("of_ddp", torch.zeros(3))  # which DDP broadcasts
    wrapped = nn.parallel.DistributedDataParallel(model)
    anchor = GeometricAnchor.from_model(wrapped, rho=RHO)
    found, inner = [], logps_of(wrapped, rank)
    for shared in (False, True):
        for step in range(3):
            wrapped.zero_grad()
            offset = torch.zeros(PAIRS // RANKS * 2)
            offset[0] = 200.0 * (step == 1 and rank == 1)
            gapo_step(lambda: inner() + offset, anchor, share_backward=shared).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    return found


def sharing_refused(rank, kind):
    model = tiny_models.build("gpt2")
    if kind == "fsdp":
        model = _shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model, static_graph=True)
    try:
        gapo_step(logps_of(model, rank), GeometricAnchor.from_model(model, rho=RHO), share_backward=True)
    except NotImplementedError as error:
        return str(error)


def fsdp_leaf_outside(rank):
    """A scale of the user's own, which the anchor knows nothing of: the probe adds nothing to its gradient."""
    model = _shard(tiny_models.build("llama"))
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    logps = logps_of(model, rank)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    scale.grad = torch.full((), 5.0, dtype=torch.float64)
    out = gapo_step(lambda: logps() * scale, anchor)
    untouched = scale.grad.item()
    scale.grad = None
    out.loss.backward()
    return untouched, scale.grad.item() != 0, out.gap.abs().max().item()


def vocabulary_parallel(rank, sizes, dtype="float64", loss_options={}, masked=0, budgets=None, **options):
    """Loss and log-probs with the head's rows sharded over the ranks: (fields, gradients) of each.

    `masked`: that many tokens at the end of the vocabulary are masked out, as those that only pad it are.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    vocabulary, width, length = sum(sizes), 5, 6
    hidden, anchor = (torch.randn(2 * PAIRS, length, width, dtype=torch.float64).to(dtype) for _ in range(2))
    weight, bias = torch.randn(vocabulary, width).to(dtype), torch.randn(vocabulary).to(dtype)
    bias[vocabulary - masked :] = -torch.inf
    labels = torch.randint(vocabulary - masked, (2 * PAIRS, length))
    labels[:, 0], labels[1] = -100, -100  # one empty completion
    mine = slice(0, vocabulary)
    if rank is not None:
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        options["vocab_parallel_group"] = distributed.group.WORLD
        if budgets is not None:
            options["max_logits_bytes"] = budgets[rank]
    found = []
    for loss in (True, False):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight[mine], bias[mine])]
        if loss:
            both = dict(options, bias=leaves[2], anchor_hidden=anchor)
            out = fused_linear_gapo_loss(*leaves[:2], labels, **both, **loss_options)
            out.loss.sum().backward()
        else:
            out = (linear_sequence_logps(*leaves[:2], labels, bias=leaves[2], **options),)
            (out[0] * torch.linspace(-1, 2, 2 * PAIRS, dtype=out[0].dtype)).sum().backward()
        found.append(([field.detach() for field in out], [leaf.grad for leaf in leaves]))
    return found


def vocabulary_parallel_dtensor(rank):
    """A head that is a DTensor: refused without its group or with a mesh; with it, the gradient is a DTensor, too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    labels = torch.randint(11, (2, 3))
    mesh = init_device_mesh("cpu", (RANKS,))
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    messages = []
    alone = [torch.distributed.new_group([one]) for one in range(RANKS)][rank]
    for group in (None, mesh, alone):  # the last one is not the group that the rows are sharded over
        try:
            linear_sequence_logps(hidden, sharded, labels, vocab_parallel_group=group)
        except TypeError as error:
            messages.append(str(error))
    out = fused_linear_gapo_loss(hidden, sharded, labels, vocab_parallel_group=mesh.get_group())
    out.loss.backward()
    weight.requires_grad_()
    expected = fused_linear_gapo_loss(hidden, weight, labels)
    expected.loss.backward()
    return messages, out.loss.detach(), expected.loss.detach(), sharded.grad.full_tensor(), weight.grad


def vocabulary_parallel_label_out_of_range(rank):
    """The error, and the losses of two pairs on a device whose labels are not looked at."""
    hidden, weight, labels = torch.randn(4, 3, 4), torch.randn(5, 4), torch.ones(4, 3, dtype=torch.int64)
    options = dict(vocab_parallel_group=distributed.group.WORLD, reduction="none")
    labels[1, 2] = 10
    try:
        fused_linear_gapo_loss(hidden, weight, labels, **options)
        message = "accepted"
    except ValueError as error:
        message = str(error)
    validation.check_values = lambda *arguments: None
    losses = []
    for label in (10, -7):
        labels[1, 2] = label
        losses.append(fused_linear_gapo_loss(hidden, weight, labels, **options).loss)
    return message, losses


def vocabulary_parallel_collectives(rank):
    """The shapes of what is all-reduced for the log-probs of 2 * 5 tokens, without and with gradients."""
    hidden, weight, labels = torch.randn(2, 6, 4), torch.randn(5, 4), torch.ones(2, 6, dtype=torch.int64)
    shapes, all_reduce = [], distributed.all_reduce

    def counted(tensor, *args, **options):
        shapes[-1].append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **options)

    torch.distributed.all_reduce = counted
    for needed in (False, True):
        shapes.append([])
        hidden.requires_grad_(needed)
        logps = linear_sequence_logps(hidden, weight, labels, vocab_parallel_group=distributed.group.WORLD)
    shapes.append([])
    logps.sum().backward()
    return shapes
