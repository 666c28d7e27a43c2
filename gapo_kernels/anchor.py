"""`GeometricAnchor`: the weights' pessimistic neighbour theta~ = theta + delta, measured and then taken back exactly.

delta comes from g, the gradient of a probe objective (arXiv 2602.04909; norms over all parameters in scope):

    asam:  delta = rho * theta^2 * g / (||theta * g||_2 + 1e-12)        sam:  delta = rho * g / (||g||_2 + 1e-12)

|delta / theta| is of the order of rho / sqrt(parameters): far less than a bfloat16's last bit. So on a 16-bit grid the
anchor is rounded stochastically, around the value that the forward computes with: SR(cast(theta) + delta), whose mean
is cast(theta) + delta. Of weights finer than that grid the cast is on it: they themselves move by as much as their casts do,
for whatever reads them uncast.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from gapo_kernels import displacement, distributed, ownership, validation
from gapo_kernels.autocast import cast_in, without_autocast
from gapo_kernels.interrupts import interrupt_held
from gapo_kernels.scope import find as find_scope
from gapo_kernels.validation import HALF

GEOMETRIES = ("asam", "sam")
DIRECTIONS = ("pessimistic", "gaussian")
ROUNDINGS = ("stochastic", "nearest")
EPSILON = 1e-12


class _Claim:
    """A use's parameters, and their memory, while they are moved: anchors in other threads, or inside of this use, may share
    them."""

    current: list[_Claim] = []  # appending and removing are each one step, which nothing interrupts

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = frozenset(map(id, params))
        self._memory = [local for local in map(distributed.local, params) if local.data_ptr()]  # 0: empty, or without any

    def check(self) -> None:
        if any(other is not self and self._meets(other) for other in tuple(self.current)):
            raise RuntimeError("perturbed() inside perturbed(): the weights are at an anchor already")

    def _meets(self, other: _Claim) -> bool:
        pairs = displacement.sharing([*self._memory, *other._memory])
        return not self._params.isdisjoint(other._params) or any(a < len(self._memory) <= b for a, b in pairs)

    def take(self) -> None:
        self.current.append(self)  # before the check: of two threads, none or one gets through
        self.check()

    def release(self) -> None:
        if self in self.current:
            self.current.remove(self)
        self._memory = []  # a traceback may keep this object for long


class _Alarm:
    """An anchor's, which rings once."""

    rung = False


class AnchorStats:
    """What the last perturbation did. Kept on the device; reading a field waits for it, and draws the anchor's warning if
    rounding has lost the perturbation."""

    def __init__(self, grad_norm: float, squares: Tensor, elements: int, alarm: _Alarm | None) -> None:
        """alarm: None where rounding is by lot, which loses nothing on average."""
        self.grad_norm = grad_norm
        self._squares = squares  # (3,) float64: ||delta||^2, ||theta~ - theta||^2, the number of changed weights
        self._elements, self._alarm = elements, alarm

    @property
    def _may_warn(self) -> bool:
        return self._alarm is not None and not self._alarm.rung

    def _warn_of_loss(self, squares: Sequence[float]) -> None:
        """Once, when rounding to nearest has taken more than half of the perturbation, be it to 32 bits, as rounding by lot
        does, too."""
        if self._may_warn and squares[1] < 0.25 * squares[0]:
            self._alarm.rung = True
            warnings.warn(
                f"of a perturbation with norm {math.sqrt(squares[0]):.3g} only {math.sqrt(squares[1]):.3g} was left after "
                "rounding to the weights' dtype: the Anchor Gap is mostly lost. Use rounding='stochastic' for 16-bit weights, "
                "or a larger rho",
                stacklevel=1,
            )

    def _read(self) -> list[float]:
        squares = self._squares.tolist()
        self._warn_of_loss(squares)
        return squares

    @property
    def intended_norm(self) -> float:
        """||delta||_2 as computed."""
        return math.sqrt(self._read()[0])

    @property
    def applied_norm(self) -> float:
        """||theta~ - cast(theta)||_2 as the forward had it, after rounding to the grid of the compute dtype."""
        return math.sqrt(self._read()[1])

    @property
    def changed_fraction(self) -> float:
        """The share of the weights in scope whose theta~ was not cast(theta)."""
        return self._read()[2] / max(1, self._elements)

    def __repr__(self) -> str:
        names = ("grad_norm", "intended_norm", "applied_norm", "changed_fraction")
        return f"AnchorStats({', '.join(f'{name}={getattr(self, name):.6g}' for name in names)})"


class GeometricAnchor:
    """Moves parameters to the geometric anchor and back, bit for bit (module docstring for the equations).

    Args:
        params: parameters, or (name, parameter) pairs as from `named_parameters()`. Those that require grad are moved;
            one that occurs twice (tied) is moved once. Parameters under `fully_shard` need `from_model`.
        rho: radius of the perturbation, >= 0.
        geometry: "asam" (scale-adaptive) or "sam".
        direction: "pessimistic", along the objective's gradient; "gaussian", standard normal noise instead of it.
        rounding: "stochastic", unbiased, for weights on a 16-bit grid; or "nearest", which loses most of the
            perturbation there. On float32 and float64 grids both round to nearest.
        compute_dtype: the dtype that the forward computes with; default: the parameter's own, or that of FSDP2's
            MixedPrecisionPolicy. With float32 masters and compute_dtype=torch.bfloat16 every weight moves from one
            bfloat16 value to another, and keeps the difference between itself and its cast.
        process_group: the data-parallel ranks over which the probe's gradient is averaged; default: those of the
            DistributedDataParallel that `from_model` is given, or all ranks, if torch.distributed runs. A group of one
            rank alone averages nothing.
        seed: of the random numbers (stochastic rounding, gaussian direction), together with the step counter; the
            same on every rank.

    Raises:
        ValueError, TypeError: no parameter requires grad, or an argument outside of what is said above; a 16-bit
            MixedPrecisionPolicy whose dtype is not compute_dtype.
        NotImplementedError: parameters sharded by something other than `fully_shard` (FSDP2).
    """

    stats: AnchorStats | None = None
    unmoved_layers: Sequence[nn.Module] = ()
    replicas: Sequence[nn.Module] = ()  # the model's DistributedDataParallel
    graph_was_checked = False  # by gapo_step

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        *,
        rho: float = 0.05,
        geometry: str = "asam",
        direction: str = "pessimistic",
        rounding: str = "stochastic",
        compute_dtype: torch.dtype | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        validation.check_number(rho, "rho")
        if rho < 0:
            raise ValueError(f"rho must be >= 0, got {rho}")
        validation.check_choice(geometry, GEOMETRIES, "geometry")
        validation.check_choice(direction, DIRECTIONS, "direction")
        validation.check_choice(rounding, ROUNDINGS, "rounding")
        validation.check_group(process_group, "process_group")
        if not _is_int(seed):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if not isinstance(compute_dtype, (torch.dtype, type(None))):
            raise TypeError(f"compute_dtype must be a torch.dtype or None, got {type(compute_dtype).__name__}")
        if compute_dtype is not None and compute_dtype not in (*HALF, torch.float32, torch.float64):
            raise ValueError(f"compute_dtype must be torch.float16, bfloat16, float32 or float64, got {compute_dtype}")
        self.rho, self.geometry, self.direction, self.rounding, self.seed = rho, geometry, direction, rounding, seed
        self.compute_dtype, self.process_group = compute_dtype, process_group
        self.names, self.params = _collect(params)
        self._sharded: distributed.ShardedModel | None = None
        if not isinstance(params, _OfShardedModel):
            for name, param in zip(self.names, self.params):
                if distributed.is_sharded(param):
                    raise ValueError(
                        f"{name} is a DTensor (FSDP2): use GeometricAnchor.from_model(model), which reaches the "
                        "modules that must gather their parameters anew after each move"
                    )
        self._grids()  # raises where a grid does not fit
        self._step = 0
        self._alarm = _Alarm()

    @classmethod
    def from_model(cls, model: nn.Module, *, scope: str | int = "backbone", **kwargs) -> GeometricAnchor:
        """An anchor over a transformers causal language model, PEFT-wrapped, under DDP or `fully_shard` as well.

        Args:
            model: its backbone is found as transformers declares it (`base_model_prefix`). Under FSDP2 the root module.
            scope: "backbone", all but the LM head (a tied embedding is part of the backbone); "all"; or an int k:
                decoder layers k .. L-1, the final norm and the head. `gapo_step` then runs the layers below k once
                instead of twice, for the model types in `gapo_kernels.scope.PLAIN_DECODERS` and unless the head is
                tied or the model compiled; what speaks against it now goes to the log (at level INFO).
            **kwargs: GeometricAnchor's.
        """
        distributed.check_model(model)
        sharded = distributed.ShardedModel(model) if distributed.is_sharded_model(model) else None
        found = find_scope(model, scope)
        if kwargs.get("process_group") is None:
            kwargs["process_group"] = distributed.own_group(model)
        anchor = cls(found.named if sharded is None else _OfShardedModel(found.named), **kwargs)
        anchor.unmoved_layers = found.unmoved
        anchor.replicas = distributed.replicas(model)
        if sharded is not None:
            anchor._shard(sharded)
        return anchor

    @property
    def computes_in_float16(self) -> bool:
        """Whether the forward does, with any of the parameters."""
        return torch.float16 in self._grids()

    def state_dict(self) -> dict[str, int]:
        """The step counter and seed behind the random numbers. A training step that failed after its use of the anchor
        (in the backward, the optimizer) is repeated exactly if this state from before it is loaded."""
        return {"step": self._step, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if not isinstance(state, dict) or not all(_is_int(state.get(key)) for key in ("step", "seed")):
            raise ValueError(f"expected what state_dict() returns, the ints 'step' and 'seed', got {state}")
        self._step, self.seed = state["step"], state["seed"]

    @contextmanager
    def perturbed(
        self,
        objective: Tensor | None = None,
        *,
        grads: Sequence[Tensor | None] | None = None,
        retain_graph: bool = True,
    ) -> Iterator[GeometricAnchor]:
        """Inside the context the weights, or their casts, are theta~; after it, whatever happened, they are theta bit for bit.

        Autograd is not told of the move, so a graph built before the context stays usable after it. Nothing is
        written to `.grad`, but of what asked for it (`retain_grad()` on a tensor of the graph). A Ctrl-C inside waits
        until the weights are back; a second one does not wait, and they are put back all the same. The original weights
        wait in the memory of the objective's gradients: beyond those nothing of the model's size is held (with `grads`
        or noise one copy of the parameters that move).

        Args:
            objective: scalar with a graph; theta~ is uphill of it. direction="gaussian" needs none.
            grads: its gradients instead, in the order of `self.params`; None for a parameter without. They are only
                read. With several ranks they are averaged, too.
            retain_graph: keep the objective's graph for a later backward.

        Raises:
            ValueError: neither or both of objective and grads (of noise: grads), no parameter in scope has a gradient, or two
                Parameters lie in the same memory.
            TypeError: the objective is no tensor, or a gradient no floating-point one.
            FloatingPointError: the gradients' norm is not finite; the weights were not moved.
            RuntimeError: these parameters are at an anchor already, of this or another thread; ranks' seeds differ.
        """
        claim = _Claim(self.params)
        claim.check()  # before the probe's backward, and once more after it
        grids = self._grids()
        self._warn_of_autocast(grids, objective)
        directions, free = self._directions(objective, grads, retain_graph)
        for number, param in enumerate(self.params):
            if not param.requires_grad:  # frozen since
                directions[number] = None
        if all(direction is None for direction in directions):
            raise ValueError("no parameter of the anchor has a gradient under the objective")
        elements = sum(param.numel() for param in self.params)
        with interrupt_held():
            move = None
            try:
                claim.take()
                move = displacement.Displacement(
                    self.params,
                    directions,
                    free=free,
                    grids=grids,
                    geometry=self.geometry,
                    stochastic=self.rounding == "stochastic",
                )
                norm = self._finite_norm(move)
                by_lot = self.rounding == "stochastic" and any(grid in HALF for grid in grids)
                squares = move.exchange(self.rho / (norm + EPSILON), self.seed % 2**64, self._step)
                self.stats = AnchorStats(norm, squares, elements, None if by_lot else self._alarm)
                self._warn_at_once()
                self._drop_copies()
                with self.buffers_held():
                    yield self
            finally:
                try:
                    if move is not None:
                        move.restore()
                finally:
                    claim.release()
                    self.leave_forward()
                    self._drop_copies()
        self._step += 1  # only now: a use that failed is repeated with the same noise

    def leave_forward(self) -> None:
        """Under FSDP2, has what an exception has left of a forward forgotten. Before a forward and after it, not inside."""
        if self._sharded is not None:
            self._sharded.leave_forward()

    @contextmanager
    def buffers_held(self) -> Iterator[None]:
        """DistributedDataParallel broadcasts the first rank's buffers before the forward that follows one with grad. That
        is the anchor's, which must compute the same function as the clean one; here it waits for the next clean one."""
        before = [(ddp, ddp.require_forward_param_sync) for ddp in self.replicas]
        with interrupt_held(in_body=False) if before else nullcontext():
            try:
                for ddp, _ in before:
                    ddp.require_forward_param_sync = False
                yield
            finally:
                for ddp, value in before:
                    ddp.require_forward_param_sync = value

    def _shard(self, sharded: distributed.ShardedModel) -> None:
        self._sharded, managed = sharded, sharded.compute_dtypes()
        meshes, whole = set(), []
        for name, param in zip(self.names, self.params):
            if distributed.is_sharded(param):
                distributed.shard_dimension(param)  # raises where it is split over several
                if id(param) not in managed:
                    raise NotImplementedError(
                        f"{name} is a DTensor that fully_shard does not manage; the anchor supports FSDP2's parameters only"
                    )
                meshes.add(param.device_mesh)
            else:
                whole.append(name)
        everyone = distributed.ranks(None)
        if whole and self.process_group is None and any(mesh.size() < everyone for mesh in meshes):
            raise ValueError(
                f"{whole[0]} is not sharded, and the model's other parameters are over {min(mesh.size() for mesh in meshes)} "
                f"of {everyone} ranks: expected process_group=, the ranks that average its gradient, got None"
            )
        self._grids()  # raises where a policy casts to another dtype

    def _grids(self) -> list[torch.dtype]:
        """The grid of each parameter's anchor: that of the dtype which the forward computes with, or the parameter's own
        if that is coarser. Asked anew each time: model.to(dtype) keeps its Parameter objects."""
        grids = []
        gathered_dtypes = {} if self._sharded is None else self._sharded.compute_dtypes()
        for name, param in zip(self.names, self.params):
            distributed.check_whole(name, param)
            gathered = gathered_dtypes.get(id(param))
            if gathered in HALF and param.dtype not in HALF and self.compute_dtype not in (None, gathered):
                raise ValueError(
                    f"{name} is gathered in {gathered}, as its MixedPrecisionPolicy says: expected compute_dtype None or "
                    f"{gathered}, got {self.compute_dtype}"
                )
            wanted = self.compute_dtype or gathered or param.dtype
            if {wanted, param.dtype} == set(HALF):
                raise ValueError(
                    f"{name} is {param.dtype} and cannot hold the values of compute_dtype {wanted}; expected the same "
                    "16-bit dtype, or float32 parameters"
                )
            finer = torch.promote_types(wanted, param.dtype) == wanted
            grids.append(param.dtype if finer else wanted)
        return grids

    def _directions(
        self, objective: Tensor | None, grads: Sequence[Tensor | None] | None, retain_graph: bool
    ) -> tuple[list[Tensor | None], list[bool]]:
        """g for every parameter, or its shard, averaged over the ranks; and of each whether its memory may be written."""
        if self._sharded is not None:
            self._sharded.check_no_backward_was_cut_off()
        if not isinstance(objective, (Tensor, type(None))):
            raise TypeError(f"the objective must be a tensor, got {type(objective).__name__}")
        if self.direction == "gaussian":
            if grads is not None:
                raise ValueError("direction='gaussian' draws its own: expected no grads, got some")
            self._agree(distributed.largest(self._numbers(), self.params, self.process_group))
            return displacement.noise(self.params, self._step, self.seed % 2**64), [True] * len(self.params)
        if (objective is None) == (grads is None):
            raise ValueError(f"expected an objective or its grads, got {'neither' if grads is None else 'both'}")
        ours = grads is None
        if ours:
            with without_autocast(objective.device):
                directions = self._gradients(objective, retain_graph)
        elif not isinstance(grads, Sequence) or len(grads) != len(self.params):
            raise ValueError(
                f"grads must be a sequence with one entry for each of the {len(self.params)} parameters, got "
                f"{len(grads) if isinstance(grads, Sequence) else validation.describe(grads)}"
            )
        else:
            directions = list(grads)
        del grads
        with interrupt_held():  # no_grad inside, cut off, would stay
            for number, (name, param) in enumerate(zip(self.names, self.params)):
                grad, directions[number] = directions[number], None
                _check_gradient(grad, name, param)
                directions[number] = _plain(grad, param)
                del grad
        whole = [number for number, param in enumerate(self.params) if not distributed.is_sharded(param)]
        means, averaged, numbers = distributed.averaged(
            _taken(directions, whole),
            [self.params[number] for number in whole],
            self.process_group,
            ours,
            self._numbers(),
        )
        if len(whole) < len(self.params):
            numbers = distributed.largest(numbers, self.params, self.process_group)
        self._agree(numbers)
        for number in whole:
            directions[number] = means.pop(0)
        free = ownership.exclusive(directions) if ours else [False] * len(directions)
        for number in whole if averaged else ():
            free[number] = True
        return directions, free

    def _numbers(self) -> tuple[int, int, int]:
        """As int64, of which ranks find the largest: the step, the seed, and what is the larger the less the seed is."""
        seed = self.seed % 2**64 - 2**63
        return self._step, seed, ~seed

    def _agree(self, largest: Sequence[int]) -> None:
        """With the largest of `_numbers` on any rank."""
        step, most, least = largest
        if most != ~least:
            raise RuntimeError(
                f"expected the anchor's seed to be the same on all ranks, got {~least + 2**63} to {most + 2**63}: pass one "
                "seed everywhere, or load one rank's state_dict() on all"
            )
        self._step = step  # of a rank whose last use failed where others' did not: theirs

    def _gradients(self, objective: Tensor, retain_graph: bool) -> list[Tensor | None]:
        if objective.dim() != 0:
            raise ValueError(f"the objective must be a scalar, got shape {tuple(objective.shape)}")
        if not objective.requires_grad:
            raise ValueError("the objective must have a graph, got a constant; was it computed under no_grad?")
        if _cuda_graphs_pend(objective.device) and any(distributed.compiled(objective)):
            raise RuntimeError(
                "expected an objective whose graph keeps its memory, got compiled code that runs as CUDA graphs: the next "
                "run writes over its gradients, where the original weights would wait. Call torch._dynamo.reset() and "
                "compile with mode='max-autotune-no-cudagraphs' or the default one"
            )
        if self._sharded is not None:
            return self._sharded.gradients(objective, self.params, retain_graph)
        with distributed.no_iteration_of_ddp(objective):
            moving = [param for param in self.params if param.requires_grad]
            found = torch.autograd.grad(objective, moving, retain_graph=retain_graph, allow_unused=True) if moving else ()
        found = list(found)
        return [found.pop(0) if param.requires_grad else None for param in self.params]

    def _finite_norm(self, move: displacement.Displacement) -> float:
        """||theta * g|| (or ||g||). Its check is the step's one wait for the device, but for ranks that compare their seeds
        and which gradients they have; what was left unread of the last use comes along."""
        square = move.squared_norm()
        unread = self.stats is not None and self.stats._may_warn
        pending = [self.stats._squares.to(square.device)] if unread else []
        square, *last = torch.cat([square[None], *pending]).tolist()
        if unread:
            self.stats._warn_of_loss(last)
        norm = math.sqrt(square) if square >= 0 else square  # NaN stays NaN
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the norm of the probe's gradient is {norm}; the weights were left where they are. Look for NaN "
                "or inf in the batch's loss, lower the learning rate, or skip the batch"
            )
        return norm

    def _warn_at_once(self) -> None:
        """On the CPU, where reading costs nothing; elsewhere who reads `stats` is told, or the next use, which waits anyway."""
        if self.stats._squares.device.type == "cpu":
            self.stats._read()

    def _drop_copies(self) -> None:
        """What was made of the weights as they stood before a move: autocast's casts, FSDP's gathered parameters."""
        torch.clear_autocast_cache()
        if self._sharded is not None:
            self._sharded.reshard()

    def _warn_of_autocast(self, grids: list[torch.dtype], objective: Tensor | None) -> None:
        """Where it is on, or at the first use the objective's graph shows casts of parameters, to another dtype than the
        anchor's."""
        finer = [grid for grid in grids if grid not in HALF]
        masters = self.compute_dtype in HALF and any(param.dtype not in HALF for param in self.params)
        if not (masters or finer):
            return
        # Offloaded weights are elsewhere.
        device, dtype = (objective if isinstance(objective, Tensor) else self.params[0]).device.type, None
        # Beside weights of 16 bits the finer ones may be norms, which it leaves alone: then the graph has to tell.
        if torch.is_autocast_enabled(device) and (masters or len(finer) == len(grids)):
            dtype = torch.get_autocast_dtype(device)
        elif self.stats is None and isinstance(objective, Tensor):
            dtype = cast_in(objective, self.params, {} if self._sharded is None else self._sharded.gathered())
        if dtype is not None and dtype != self.compute_dtype:
            moved = self.compute_dtype if masters else finer[0]
            warnings.warn(
                f"autocast computes with {dtype} while the anchor moves the parameters in {moved}: the gap is mostly "
                f"the casts' rounding. Pass compute_dtype={dtype} to the anchor, or train without autocast",
                stacklevel=1,
            )


def _cuda_graphs_pend(device: torch.device) -> bool:
    """Whether compiled code has run forward as CUDA graphs on the device, and its backward is still to come."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None or device.index is None:  # a CPU's
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
    except AssertionError:  # a thread that nothing was compiled in
        return False
    return getattr(manager, "running_forwards_with_pending_backwards", False)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _OfShardedModel(list):
    """Named parameters of a model whose FSDP modules are known."""


def _taken(directions: list[Tensor | None], numbers: list[int]) -> list[Tensor | None]:
    """The directions with these numbers, moved out of the list: nothing else may refer to them."""
    taken = []
    for number in numbers:
        taken.append(directions[number])
        directions[number] = None
    return taken


def _check_gradient(grad: Tensor | None, name: str, param: Tensor) -> None:
    if grad is None:
        return
    if not isinstance(grad, Tensor) or grad.dtype not in distributed.DTYPES:
        raise TypeError(f"the gradient of {name} must be a floating-point tensor or None, got {validation.describe(grad)}")
    if grad.shape != param.shape:
        raise ValueError(f"the gradient of {name} must have shape {tuple(param.shape)}, got {tuple(grad.shape)}")
    if grad.device != param.device:
        raise ValueError(f"the gradient of {name} must be on the device {param.device}, got {grad.device}")


def _plain(grad: Tensor | None, param: Tensor) -> Tensor | None:
    """A gradient as the dense tensor that lies beside the parameter's own memory."""
    if grad is None:
        return None
    if distributed.is_sharded(param):
        if distributed.is_sharded(grad):
            with torch.no_grad():  # else to_local makes a view, and one that holds on to its base
                return grad.redistribute(placements=param.placements).to_local()
        raise TypeError("the gradient of a DTensor parameter must be a DTensor, got a plain tensor")
    if grad.layout != torch.strided:
        return grad.to_dense()
    return grad.detach() if grad.requires_grad else grad


def _collect(params: Iterable) -> tuple[list[str], list[nn.Parameter]]:
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "params must be an iterable of parameters or (name, parameter) pairs, as model.named_parameters() is, got "
            f"{type(params).__name__}; of a whole model GeometricAnchor.from_model makes an anchor"
        )
    names, kept, seen = [], [], set()
    for number, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (f"parameter {number}", item)
        if not isinstance(param, Tensor):
            raise TypeError(f"params must be parameters or (name, parameter) pairs, got {type(item).__name__}")
        if param.requires_grad and id(param) not in seen:
            if not param.is_floating_point():
                raise TypeError(f"{name} must be real and floating-point to be moved, got {param.dtype}")
            seen.add(id(param))
            names.append(name)
            kept.append(param)
    if not kept:
        raise ValueError("params must hold at least one parameter that requires grad, got none")
    return names, kept
