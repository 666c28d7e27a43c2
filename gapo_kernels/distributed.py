"""What ranks must agree on: the probe's gradient is averaged before it is normalised, norms are summed over shards.

Data parallel with whole parameters (DDP) averages here, over a process group. Under FSDP2 (fully_shard) the parameters
are DTensors whose gradients FSDP averages itself, in a real backward: autograd.grad does not reach them.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gapo_kernels import dense, ownership
from gapo_kernels.interrupts import interrupt_held

BUCKET_BYTES = 32 * 2**20
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of gradients; ranks that differ take the later one
# What marks a parameter that is not whole, by attribute: their classes are slow to import and may be missing.
UNSUPPORTED = {
    "_fsdp_flattened": "sharded by FSDP's first version; shard with torch.distributed.fsdp.fully_shard (FSDP2) instead",
    "ds_id": "partitioned by DeepSpeed ZeRO-3, which is not supported; use fully_shard (FSDP2) or DDP instead",
}


def check_model(model: torch.nn.Module) -> None:
    """Refuses a model under FSDP's first version, which by default hides the Parameters that it shards."""
    for module in model.modules():
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
            raise NotImplementedError(f"the model is {UNSUPPORTED['_fsdp_flattened']}")


def check_whole(name: str, param: Tensor) -> None:
    """Refuses a parameter that only its engine can gather, whenever that engine took it over."""
    for mark, what in UNSUPPORTED.items():
        value = getattr(param, mark, None)
        if value is not None and value is not False:  # DeepSpeed's numbers begin at 0
            raise NotImplementedError(f"{name} is {what}")


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    return getattr(param, "device_mesh", None) is not None


def local(param: Tensor) -> Tensor:
    """The memory of a parameter on this rank; writing to it does not touch autograd's version counter."""
    return param.data.to_local() if is_sharded(param) else param.data


def shard_dimension(param: Tensor) -> int | None:
    """The mesh dimension that a DTensor is split over; None for a whole parameter or a replica."""
    if not is_sharded(param):
        return None
    split = [i for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    if len(split) > 1:
        raise NotImplementedError(
            f"expected a parameter split over one mesh dimension (FSDP2, with or without replicas), got placements "
            f"{param.placements}; tensor parallel layers are not supported by the anchor"
        )
    return split[0] if split else None


def shard_group(param: Tensor) -> torch.distributed.ProcessGroup | None:
    """The ranks that hold the other shards."""
    dimension = shard_dimension(param)
    return None if dimension is None else param.device_mesh.get_group(dimension)


def place_of_shard(param: Tensor) -> tuple[int, int]:
    """(the whole parameter's elements before this rank's, 0) where these lie one after another, as the rows do that FSDP2
    takes apart by itself; else (0, the shard's number)."""
    dimension = shard_dimension(param)
    if dimension is None:
        return 0, 0
    shard = param.device_mesh.get_local_rank(dimension)
    if not param.placements[dimension].is_shard(0):
        return 0, shard
    rows, ranks = param.shape[0], param.device_mesh.size(dimension)
    return min(shard * -(-rows // ranks), rows) * param.shape[1:].numel(), 0


def summed(value: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    if group is not None:
        torch.distributed.all_reduce(value, group=group)
    return value


def ranks(group: torch.distributed.ProcessGroup | None) -> int:
    """The size of a group, or of the default one; 1 where torch.distributed does not run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(group)


def replicas(model: nn.Module) -> list[nn.Module]:
    """Every DistributedDataParallel in the model, or that it is."""
    return [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]


def own_group(model: nn.Module) -> torch.distributed.ProcessGroup | None:
    """That of a DistributedDataParallel around the model, compiled or not; None for all ranks, or without one."""
    ddp = getattr(model, "_orig_mod", model)
    if not isinstance(ddp, nn.parallel.DistributedDataParallel) or ddp.process_group is torch.distributed.group.WORLD:
        return None
    return ddp.process_group


def weight_of_rank(
    valid: Tensor, params: Sequence[Tensor], group: torch.distributed.ProcessGroup | None
) -> Tensor | None:
    """How many of `valid` (B,) are set over the mean of that on the ranks that average the gradients of `params`, ():
    times that, the ranks' own means have the mean over all pairs as their average. None of one rank alone."""
    groups = _groups(params, group)
    if not groups:
        return None
    count = valid.sum()
    total = count.clone()
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
    return (count * math.prod(map(ranks, groups))).double() / total.clamp(min=1)


def largest(
    numbers: Sequence[int], params: Sequence[Tensor], group: torch.distributed.ProcessGroup | None
) -> Sequence[int]:
    """Of each of the numbers (int64) the largest on the ranks that average the gradients of `params`."""
    groups = _groups(params, group)
    if not groups:
        return numbers
    device = next((param.device_mesh.device_type for param in params if is_sharded(param)), params[0].device)
    found = torch.tensor(numbers, dtype=torch.int64, device=device)
    for group in groups:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    return found.tolist()


def _groups(
    params: Sequence[Tensor], group: torch.distributed.ProcessGroup | None
) -> list[torch.distributed.ProcessGroup | None]:
    """Of several ranks each, which average the gradients of `params`; None is the default one."""
    mesh = next((param.device_mesh for param in params if is_sharded(param)), None)
    groups = [group] if mesh is None else [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    return [group for group in groups if ranks(group) > 1]


def averaged(
    grads: list[Tensor | None],
    params: Sequence[Tensor],
    group: torch.distributed.ProcessGroup | None,
    ours: bool,
    numbers: Sequence[int] = (),
) -> tuple[list[Tensor | None], bool, Sequence[int]]:
    """The gradients' mean over the group's ranks; a rank without one counts as zeros, None where no rank has one. And
    whether they were averaged: then their memory is nobody else's, though what has communicated it may hold on to it for
    a moment. And the largest of each of the numbers (int64) on any rank.

    Uses up `grads`. With `ours` their memory is written where nobody else refers to it; beyond that memory this holds
    BUCKET_BYTES.
    """
    size = ranks(group)
    if size == 1 or not grads:
        return grads, False, numbers
    kinds = [0 if grad is None else 1 + DTYPES.index(grad.dtype) for grad in grads]
    orders = [dense.strides(param) for param in params]
    # Strides along one element say nothing. ~: of the least on any rank.
    told = [[stride for size, stride in zip(param.shape, order) if size != 1] for param, order in zip(params, orders)]
    order = zlib.crc32(repr(told).encode())
    most = torch.tensor([*kinds, *numbers, order, ~order], dtype=torch.int64, device=params[0].device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
    free = ownership.exclusive(grads) if ours else [False] * len(params)
    means: list[Tensor | None] = []
    *most, largest_order, least_order = most.tolist()
    if largest_order != ~least_order:  # the parameters lie in another order on another rank
        orders = [torch.empty(param.shape, device="meta").stride() for param in params]
    for number, (param, kind) in enumerate(zip(params, most)):
        grad, grads[number] = grads[number], None
        dtype = DTYPES[kind - 1]
        if kind and grad is None:
            grad = torch.empty_strided(param.shape, orders[number], dtype=dtype, device=param.device).zero_()
        elif kind and not (free[number] and grad.dtype == dtype):
            grad = torch.empty_strided(param.shape, orders[number], dtype=dtype, device=param.device).copy_(grad)
        elif kind:
            grad, _ = dense.ordered_as(orders[number], grad, exclusive=True)
        means.append(grad)
    del grad
    for bucket in _buckets([mean for mean in means if mean is not None]):
        _average(list(map(dense.flat, bucket)), size, group)
    return means, True, most[len(params) :]


def _average(parts: list[Tensor], size: int, group: torch.distributed.ProcessGroup | None) -> None:
    """In place, of parts that a bucket is made of."""
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    flat /= size  # before: a sum may overflow where the mean does not
    torch.distributed.all_reduce(flat, group=group)
    if len(parts) > 1:
        for part, mean in zip(parts, flat.split([part.numel() for part in parts])):
            part.copy_(mean)


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, together at most BUCKET_BYTES; a larger gradient alone."""
    bucket: list[Tensor] = []
    held = 0
    for grad in grads:
        size = grad.numel() * grad.element_size()
        if bucket and (held + size > BUCKET_BYTES or (grad.dtype, grad.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, held = [], 0
        bucket.append(grad)
        held += size
    if bucket:
        yield bucket


def compiled(result: Tensor) -> Iterator[object]:
    """What torch.compile noted of its own nodes in a result's graph."""
    for node in nodes(result) if "torch._dynamo" in sys.modules else ():
        metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
        if hasattr(metadata, "bw_donated_idxs"):
            yield metadata


def nodes(result: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """Of a result's graph, each once."""
    seen, ahead = set(), [result.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        ahead.extend(following for following, _ in node.next_functions)


def _leaves(result: Tensor) -> Iterator[Tensor]:
    """What a backward from `result` would write to the .grad of."""
    return (node.variable for node in nodes(result) if hasattr(node, "variable"))


@contextmanager
def no_iteration_of_ddp(objective: Tensor) -> Iterator[None]:
    """For a gradient on a graph that is kept. DDP with static_graph=True takes the first backward through its outputs for
    the first iteration, at whose end it averages every .grad, and the backward of the loss would be left as it is."""
    waiting = []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        outputs = [node.ddp_weakref() for node in nodes(objective) if hasattr(node, "ddp_weakref")]
        waiting = [ddp for ddp in outputs if ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued]
    try:
        for ddp in waiting:
            ddp._static_graph_delay_allreduce_enqueued = True
        yield
    finally:
        for ddp in waiting:
            ddp._static_graph_delay_allreduce_enqueued = False


def _waits(group) -> bool:
    """Whether an FSDP2 parameter group holds gradients that are yet to be reduced."""
    partial = getattr(group, "_partial_reduce_output", None)
    return partial is not None or any(param.unsharded_accumulated_grad is not None for param in group.fsdp_params)


def is_sharded_model(model: nn.Module) -> bool:
    """Also while it has all its parameters gathered, and none is a DTensor."""
    return any(hasattr(module, "_get_fsdp_state") for module in model.modules()) or any(
        map(is_sharded, model.parameters())
    )


class ShardedModel:
    """A model under fully_shard: its probe's gradients, and the copies of its shards that must not grow stale."""

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.reshard()
        self._params = list(model.parameters())  # those that are frozen now may not be so later

    def reshard(self) -> None:
        """Drops the gathered parameters: what was gathered before a change of the shards is stale after it.

        FSDPModule.reshard() would keep those of a module whose forward was cut off by an exception. What is being
        gathered ahead (prefetched) was begun before the change, too.
        """
        for group in self._groups():
            group.wait_for_unshard()
            group._to_sharded()
        # A backward gathers on streams of FSDP's own, which wait for a change of the shards before a forward only.
        states = (module._get_fsdp_state() for module in self._modules)
        for state in {id(state._comm_ctx): state for state in states}.values():
            context = state._comm_ctx
            if hasattr(context, "all_gather_copy_in_stream"):  # made with the first forward
                now = state._device_handle.current_stream()
                context.all_gather_copy_in_stream.wait_stream(now)
                context.all_gather_stream.wait_stream(now)

    def compute_dtypes(self) -> dict[int, torch.dtype | None]:
        """For every sharded parameter's id the dtype of its MixedPrecisionPolicy, if that has one."""
        return {id(p.sharded_param): group.mp_policy.param_dtype for group in self._groups() for p in group.fsdp_params}

    def gathered(self) -> dict[int, int]:
        """From the ids of the parameters that forwards compute with, and that a graph has, to those of the sharded ones."""
        params = [param for group in self._groups() for param in group.fsdp_params]
        return {id(p._unsharded_param): id(p.sharded_param) for p in params if hasattr(p, "_unsharded_param")}

    def leave_forward(self) -> None:
        """Where none is under way: FSDP2 would take the next one for the rest of one that an exception has cut off, its
        collectives out of step with the other ranks'."""
        states = [module._get_fsdp_state() for module in self._modules]
        if not any(state._training_state.name == "FORWARD" for state in states):
            return
        for module, state in zip(self._modules, states):
            if hasattr(module, "reset_iter_state"):
                if state._is_root:
                    module.reset_iter_state()
            else:
                state._training_state = type(state._training_state).IDLE
                state._state_ctx.iter_forward_root = None
                state._comm_ctx.post_forward_order.clear()
        for group in self._groups():  # torch's own does the same
            group._training_state = type(group._training_state).IDLE
            group._post_forward_indices.clear()
        self.reshard()

    def check_no_backward_was_cut_off(self) -> None:
        if any(context.post_backward_final_callback_queued for context in self._contexts()):
            raise RuntimeError(
                "an exception cut off an earlier backward of this model, which leaves FSDP2 in its middle: the next one "
                "would miss gradients. Call model.reset_iter_state() before the next step, or build the model anew where "
                "torch does not have it"
            )

    def gradients(self, objective: Tensor, params: Sequence[nn.Parameter], retain_graph: bool) -> list[Tensor | None]:
        """The objective's gradients, averaged by FSDP; every .grad is what it was before."""
        contexts, gathered, wanted = self._contexts(), self.gathered(), set(map(id, params))
        of_graph = list(_leaves(objective))
        leaves = list({id(leaf): leaf for leaf in (*self._params, *of_graph)}.values())
        # The backward goes no further down than these lie.
        inputs = [leaf for leaf in of_graph if gathered.get(id(leaf), id(leaf)) in wanted]
        if any(leaf._post_accumulate_grad_hooks for leaf in leaves):
            raise RuntimeError(
                "under FSDP2 the probe's backward would run the hooks of register_post_accumulate_grad_hook (an optimizer "
                "step, say) on the probe's gradient; remove them"
            )
        if not all(group.reduce_grads and group.all_reduce_grads for group in self._groups()):
            raise RuntimeError(
                "set_requires_gradient_sync(False) or set_requires_all_reduce(False) keeps the probe's gradient from being "
                "averaged over the ranks; leave gradient synchronisation on in GAPO steps"
            )
        if any(_waits(group) for group in self._groups()):
            raise RuntimeError(
                "gradients of an earlier backward without synchronisation wait in FSDP2's own buffers, where the probe's "
                "backward would add to them; leave gradient synchronisation on in all backwards between optimizer steps"
            )
        aside = [leaf.grad for leaf in leaves]
        last = {context: context.is_last_backward for context in contexts}
        with interrupt_held():  # between two lines of the way back it would lose the .grad of some
            try:
                for context in contexts:
                    context.is_last_backward = True  # else its reductions may still be under way
                for leaf in leaves:
                    leaf.grad = None
                objective.backward(retain_graph=retain_graph, inputs=inputs or None)
                return [param.grad for param in params]
            finally:
                for leaf, grad in zip(leaves, aside):
                    leaf.grad = grad
                for context in contexts:
                    context.is_last_backward = last[context]

    def _contexts(self) -> set:
        return {module._get_fsdp_state()._state_ctx for module in self._modules}

    def _groups(self) -> Iterator:
        for module in self._modules:
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from (group for group in groups if group is not None)
