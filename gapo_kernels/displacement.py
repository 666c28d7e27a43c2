"""One use of the anchor: parameters and directions become flat memory, which a back end moves and puts back.

Where the originals go decides the memory: into the gradients' own buffers when those are nobody else's, so that no third
copy of the model exists.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from gapo_kernels import dense, distributed, perturbation

RESTORE_ATTEMPTS = 3
logger = logging.getLogger(__name__)


class Displacement:
    """Moves parameters along their directions, and puts them back bit for bit.

    Args:
        params: the anchor's parameters; DTensors count as their local shards.
        directions: for each its g (a shard's own part), or None: not moved. Used up.
        free: for each whether its direction's memory is nobody else's and may take the original weights.
        grids: for each parameter the dtype that the forward computes with.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        directions: list[Tensor | None],
        *,
        free: Sequence[bool],
        grids: Sequence[torch.dtype],
        geometry: str,
        stochastic: bool,
    ) -> None:
        self._staged: list[tuple[Tensor, Tensor]] = []  # (parameter, its contiguous stand-in)
        tensors = [distributed.local(param) for param in params]
        self._memory = list(zip(params, tensors))
        _check_apart(tensors)
        groups: dict[tuple, list[perturbation.Move]] = {}
        weights = ([], []) if all(free) else _spans(tensors)
        for number, (param, tensor) in enumerate(zip(params, tensors)):
            direction, directions[number] = directions[number], None
            if direction is None:
                continue
            exclusive = free[number]
            if not exclusive and _reaches_into(direction, *weights):
                direction, exclusive = direction.clone(), True  # of a weight that may move first
            in_place = dense.is_dense(tensor)
            moved = tensor if in_place else self._stage(tensor)
            direction, exclusive = dense.ordered_as(moved.stride(), direction, exclusive)
            theta, flat = dense.flat(moved), dense.flat(direction)
            fits = exclusive and in_place and flat.element_size() == theta.element_size()
            original = flat.view(theta.dtype) if fits else torch.empty_like(theta)
            place = distributed.place_of_shard(param)
            move = perturbation.Move(theta, flat, original, grids[number], number, *place)
            groups.setdefault((tensor.device, distributed.shard_group(param)), []).append(move)
        self._parts = [
            (_back_end(device)(moves, geometry, stochastic), group) for (device, group), moves in groups.items()
        ]
        self._device = tensors[0].device
        self._on_host = any(device.type == "cpu" for device, _ in groups)

    def squared_norm(self) -> Tensor:
        """|| theta * g ||^2 or || g ||^2 over all parameters and shards, () float64."""
        return self._total([part.squared_norm() for part, _ in self._parts])

    def exchange(self, step_size: float, seed: int, step: int) -> Tensor:
        """theta becomes theta~. (3,) float64: ||delta||^2, ||theta~ - cast(theta)||^2, the number of changed weights."""
        if self._on_host:
            _let_devices_finish()
        stats = [part.exchange(step_size, seed, step) for part, _ in self._parts]
        for tensor, stand_in in self._staged:
            tensor.copy_(stand_in)
        return self._total(stats)

    def restore(self) -> None:
        """Puts everything back, and only then lets through what was raised meanwhile."""
        failure = None
        waiting = [_let_devices_finish] if self._on_host else []
        staged = (_Copy(*pair) for pair in self._staged)
        memory = (_Memory(*pair) for pair in self._memory)
        for work in (*waiting, *(part.restore for part, _ in self._parts), *staged, *memory):
            for _ in range(RESTORE_ATTEMPTS):
                try:
                    work()
                    break
                except BaseException as error:
                    failure = error
        self._parts.clear()  # a traceback may keep this object for long
        self._staged.clear()
        self._memory.clear()
        if failure is not None:
            raise failure

    def _stage(self, tensor: Tensor) -> Tensor:
        stand_in = tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()
        self._staged.append((tensor, stand_in))
        return stand_in

    def _total(self, values: list[Tensor]) -> Tensor:
        """Sums over the shards of each part and over the parts."""
        summed = [distributed.summed(value, group) for value, (_, group) in zip(values, self._parts)]
        return torch.stack([value.to(self._device) for value in summed]).sum(0)


def _let_devices_finish() -> None:
    """Before weights on the host are written: copies of them may be queued for a device that computes with them, as FSDP2's
    offload has it. The current one's: others get theirs from a process of their own."""
    for module in (torch.cuda, torch.xpu):
        if module.is_initialized():
            module.synchronize()


class _Copy:
    def __init__(self, target: Tensor, source: Tensor) -> None:
        self._target, self._source = target, source

    def __call__(self) -> None:
        self._target.copy_(self._source)


class _Memory:
    """A parameter's own: where somebody has set its `.data` since, that is undone."""

    def __init__(self, param: nn.Parameter, tensor: Tensor) -> None:
        self._param, self._tensor = param, tensor

    def __call__(self) -> None:
        if not distributed.is_sharded(self._param) and _place(self._param) != _place(self._tensor):
            self._param.data = self._tensor


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def noise(params: Sequence[nn.Parameter], step: int, seed: int) -> list[Tensor]:
    """Standard normal noise for every parameter, or this rank's part of that for the whole one: a function of (seed, step)
    and its place alone. Of the parameter's dtype, as gradients are: so its memory may take the original weights."""
    tensors = [distributed.local(param) for param in params]
    drawn = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        numbers = [number for number, tensor in enumerate(tensors) if tensor.device == device]
        places = []
        for number in numbers:
            first, shard = distributed.place_of_shard(params[number])
            places.append((first, number, shard))
        _back_end(device).fill_with_noise([drawn[number].view(-1) for number in numbers], places, step, seed)
    return drawn


def _check_apart(tensors: Sequence[Tensor]) -> None:
    """Raises where two parameters, or elements of one, share memory: their deltas would overwrite each other."""
    for number, tensor in enumerate(tensors):
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
            raise ValueError(
                f"parameter {number} of the anchor, of shape {tuple(tensor.shape)}, was expanded, so that elements share "
                "memory: use a contiguous Parameter"
            )
    for one, other in sharing(tensors):
        raise ValueError(
            f"parameters {one} and {other} of the anchor, of shapes {tuple(tensors[one].shape)} and "
            f"{tuple(tensors[other].shape)}, share memory but are two Parameters: tie them by using one Parameter"
        )


def _spans(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Where their memory begins, in order, and the end of all up to each."""
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)) for tensor in tensors if tensor.numel())
    return [start for start, _ in spans], list(accumulate((stop for _, stop in spans), max))


def _reaches_into(tensor: Tensor, starts: list[int], ends: list[int]) -> bool:
    """Whether its memory, from end to end, may be some of theirs."""
    if not tensor.numel():
        return False
    before = bisect_left(starts, tensor.data_ptr() + _extent(tensor))
    return before > 0 and ends[before - 1] > tensor.data_ptr()


def sharing(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """The numbers of those that share memory, the lower one first."""
    spans = [(t.data_ptr(), t.data_ptr() + _extent(t), number) for number, t in enumerate(tensors) if t.numel()]
    begun: list[tuple[int, int]] = []  # (end, number) of those that may reach into the next
    for start, stop, number in sorted(spans):
        begun = [(end, other) for end, other in begun if end > start]
        for _, other in begun:
            if _share_bytes(tensors[other], tensors[number]):
                yield min(number, other), max(number, other)
        begun.append((stop, number))


def _share_bytes(one: Tensor, other: Tensor) -> bool:
    """Of two tensors whose memory overlaps from end to end: columns of one matrix, say, lie between one another."""
    if all(_extent(tensor) == tensor.numel() * tensor.element_size() for tensor in (one, other)):
        return True
    if _columns_apart(one, other):
        return False
    first = min(one.data_ptr(), other.data_ptr())
    last = max(tensor.data_ptr() + _extent(tensor) for tensor in (one, other))
    taken = torch.zeros(last - first, dtype=torch.bool, device="cpu")

    def its(tensor: Tensor) -> Tensor:
        size = tensor.element_size()
        strides = [stride * size for stride in tensor.stride()]
        return taken.as_strided((*tensor.shape, size), (*strides, 1), tensor.data_ptr() - first)

    its(one).fill_(True)
    return bool(its(other).any())


def _columns_apart(one: Tensor, other: Tensor) -> bool:
    """Whether they are columns of one matrix that lie beside each other, as those of a fused projection do."""
    if one.dim() < 2 or other.dim() < 2:
        return False
    row, other_row = (tensor.stride(0) * tensor.element_size() for tensor in (one, other))
    if row != other_row or row == 0:
        return False
    spans = sorted((tensor.data_ptr() % row, _extent(tensor[0])) for tensor in (one, other))
    (start, size), (following, last) = spans
    # Within a row, and where the second ends in the next one, before the first begins there.
    return start + size <= following and following + last <= start + row


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) + 1) * tensor.element_size()


@lru_cache
def _back_end(device: torch.device) -> type:
    if device.type in ("cuda", "xpu"):
        try:
            from gapo_kernels.kernels.perturbation import Perturbation

            return Perturbation
        except ImportError as error:
            logger.warning("the anchor moves %s parameters with torch: Triton cannot be imported (%s)", device, error)
    return perturbation.Perturbation
