"""`GeometricAnchor`: the weights' pessimistic neighbour theta~ = theta + delta, measured and then taken back exactly.

delta comes from g, the gradient of a probe objective (arXiv 2602.04909; norms over all parameters in scope):

    asam:  delta = rho * theta^2 * g / (||theta * g||_2 + 1e-12)        sam:  delta = rho * g / (||g||_2 + 1e-12)
"""

from __future__ import annotations

import random
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gapo_kernels import validation

GEOMETRIES = ("asam", "sam")
DIRECTIONS = ("pessimistic", "gaussian")
ROUNDINGS = ("stochastic", "nearest")
EPSILON = 1e-12
HALF = (torch.float16, torch.bfloat16)
# What marks a parameter as a shard, by attribute: their classes are slow to import and may be missing.
SHARDED = {
    "device_mesh": "a DTensor (FSDP2)",
    "_fsdp_flattened": "sharded by FSDP",
    "ds_id": "partitioned by DeepSpeed",
}
RESTORE_ATTEMPTS = 3
# Parameters that some anchor has moved right now, by id: two anchors may share them.
_MOVED: set[int] = set()


class AnchorStats:
    """What the last perturbation did. Kept on the device; reading a field waits for it."""

    def __init__(self, grad_norm: Tensor, intended: Tensor, applied: Tensor, changed: Tensor, elements: int) -> None:
        self._tensors = (grad_norm, intended, applied, changed)
        self._elements = elements

    @property
    def grad_norm(self) -> float:
        """||theta * g||_2 for asam, ||g||_2 for sam: what delta was divided by."""
        return self._tensors[0].item()

    @property
    def intended_norm(self) -> float:
        """||delta||_2 as computed."""
        return self._tensors[1].item()

    @property
    def applied_norm(self) -> float:
        """||theta~ - theta||_2 as it stood in the weights, after rounding to their dtype."""
        return self._tensors[2].item()

    @property
    def changed_fraction(self) -> float:
        """The share of the weights in scope that differed from theta."""
        return self._tensors[3].item() / max(1, self._elements)

    def __repr__(self) -> str:
        names = ("grad_norm", "intended_norm", "applied_norm", "changed_fraction")
        return f"AnchorStats({', '.join(f'{name}={getattr(self, name):.6g}' for name in names)})"


class GeometricAnchor:
    """Moves parameters to the geometric anchor and back, bit for bit (module docstring for the equations).

    Args:
        params: parameters, or (name, parameter) pairs as from `named_parameters()`. Those that require grad are moved;
            one that occurs twice (tied) is moved once.
        rho: radius of the perturbation, >= 0.
        geometry: "asam" (scale-adaptive) or "sam".
        direction: "pessimistic", along the objective's gradient; "gaussian", standard normal noise instead of it.
        rounding: "stochastic" or "nearest". Float32 and float64 parameters always round to nearest.
        compute_dtype: the dtype that the forward computes with; default: the parameter's own.
        process_group: data-parallel group over which the gradient is averaged.
        seed: of the random numbers (gaussian direction), together with the step counter.

    Raises:
        ValueError, TypeError: no parameter requires grad, or an argument outside of what is said above.
        NotImplementedError: what this version does not do: stochastic rounding of 16-bit parameters, a compute_dtype
            that differs from the parameters', process groups, several ranks, sharded parameters.
    """

    stats: AnchorStats | None = None

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
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if not isinstance(compute_dtype, (torch.dtype, type(None))):
            raise TypeError(f"compute_dtype must be a torch.dtype or None, got {type(compute_dtype).__name__}")
        self.rho, self.geometry, self.direction, self.rounding, self.seed = rho, geometry, direction, rounding, seed
        self.compute_dtype = compute_dtype
        self.names, self.params = _collect(params)
        self._check_grid()
        if process_group is not None:
            raise NotImplementedError("process_group is not available yet: train on one process, without it")
        _check_one_rank()
        self._step = 0
        self._active = False

    @classmethod
    def from_model(cls, model: nn.Module, *, scope: str | int = "backbone", **kwargs) -> GeometricAnchor:
        """An anchor over a transformers causal language model (PEFT-wrapped ones too).

        Args:
            model: its backbone is found as transformers declares it (`base_model_prefix`).
            scope: "backbone", all but the LM head (a tied embedding is part of the backbone); "all"; or an int k:
                decoder layers k .. L-1, the final norm and the head.
            **kwargs: GeometricAnchor's.
        """
        if scope == "all":
            return cls(model.named_parameters(), **kwargs)
        if hasattr(model, "get_base_model"):  # PEFT keeps its adapters inside of the model that it wraps
            model = model.get_base_model()
        backbone = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
        if not isinstance(backbone, nn.Module):
            raise ValueError(
                f"expected a model with a backbone (transformers' base_model_prefix, or .model), got "
                f"{type(model).__name__}; pass scope='all', or the parameters to GeometricAnchor"
            )
        if scope == "backbone":
            return cls(backbone.named_parameters(), **kwargs)
        if isinstance(scope, bool) or not isinstance(scope, int):
            raise ValueError(f"scope must be 'backbone', 'all' or the first layer's number, got {scope!r}")
        return cls(_upper_parameters(model, backbone, scope), **kwargs)

    def state_dict(self) -> dict[str, int]:
        """The step counter and seed behind the random numbers."""
        return {"step": self._step, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._step, self.seed = state["step"], state["seed"]

    @contextmanager
    def perturbed(
        self,
        objective: Tensor | None = None,
        *,
        grads: Sequence[Tensor | None] | None = None,
        retain_graph: bool = True,
    ) -> Iterator[GeometricAnchor]:
        """Inside the context the weights are theta~; after it, whatever happened, they are theta bit for bit.

        Autograd is not told of the move, so a graph built before the context stays usable after it. Nothing is
        written to `.grad`. A Ctrl-C inside waits until the weights are back; a second one does not wait, and they are
        put back all the same. Beyond the gradients this holds one copy of the parameters that it moves.

        Args:
            objective: scalar with a graph; theta~ is uphill of it. Not used by direction="gaussian".
            grads: its gradients instead, in the order of `self.params`; None for a parameter without. They are only
                read, and must not share memory with other parameters.
            retain_graph: keep the objective's graph for a later backward.

        Raises:
            ValueError: neither or both of objective and grads, or no parameter in scope has a gradient.
            FloatingPointError: the gradients' norm is not finite; the weights were not moved.
            RuntimeError: the anchor is in use already.
            NotImplementedError: more than one rank, each of which would move to an anchor of its own; or parameters
                that have been cast to 16 bits meanwhile.
        """
        if self._active or not _MOVED.isdisjoint(map(id, self.params)):
            raise RuntimeError("perturbed() inside perturbed(): the weights are at an anchor already")
        _check_one_rank()
        self._check_grid()  # again: model.to(dtype) keeps its Parameter objects
        self._warn_of_autocast()
        directions = self._directions(objective, grads, retain_graph)
        norm = self._norm(directions)
        originals: list[tuple[nn.Parameter, Tensor]] = []
        with _interrupt_held():
            try:
                self._active = True
                _MOVED.update(map(id, self.params))
                self._move(directions, norm, originals)
                yield self
            finally:
                try:
                    _restore(originals)
                finally:
                    self._active = False
                    _MOVED.difference_update(map(id, self.params))
        self._step += 1  # only now: a use that failed is repeated with the same noise

    def _check_grid(self) -> None:
        for name, param in zip(self.names, self.params):
            if self.compute_dtype not in (None, param.dtype):
                raise NotImplementedError(
                    f"compute_dtype {self.compute_dtype} differs from {name}'s {param.dtype}; an anchor on another grid "
                    "than the parameters' own is not available yet: leave compute_dtype out"
                )
            if param.dtype in HALF and self.rounding == "stochastic":
                raise NotImplementedError(
                    f"{name} is {param.dtype}; stochastic rounding of 16-bit parameters is not available yet: use "
                    "float32 parameters, or rounding='nearest' (which loses most of the perturbation)"
                )

    def _directions(
        self, objective: Tensor | None, grads: Sequence[Tensor | None] | None, retain_graph: bool
    ) -> list[Tensor | None]:
        if self.direction == "gaussian":
            return self._noise()
        if (objective is None) == (grads is None):
            raise ValueError(f"expected an objective or its grads, got {'neither' if grads is None else 'both'}")
        if grads is None:
            if objective.dim() != 0:
                raise ValueError(f"the objective must be a scalar, got shape {tuple(objective.shape)}")
            if not objective.requires_grad:
                raise ValueError("the objective must have a graph, got a constant; was it computed under no_grad?")
            grads = torch.autograd.grad(objective, self.params, retain_graph=retain_graph, allow_unused=True)
        elif len(grads) != len(self.params):
            raise ValueError(
                f"grads must have one entry for each of the {len(self.params)} parameters, got {len(grads)}"
            )
        for name, param, grad in zip(self.names, self.params, grads):
            if grad is not None and grad.shape != param.shape:
                raise ValueError(
                    f"the gradient of {name} must have shape {tuple(param.shape)}, got {tuple(grad.shape)}"
                )
        if all(grad is None for grad in grads):
            raise ValueError("no parameter of the anchor has a gradient under the objective")
        return [None if grad is None else grad.detach() for grad in grads]

    def _noise(self) -> list[Tensor]:
        """Standard normal noise, a function of (seed, step) alone: drawn on the CPU, so the same on every device."""
        # Hashed: of a longer seed the CPU's generator uses the lower 32 bits alone.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self._step}").getrandbits(32))
        return [
            torch.randn(param.shape, generator=generator, dtype=torch.float32).to(param.device) for param in self.params
        ]

    def _norm(self, directions: list[Tensor | None]) -> Tensor:
        """The norm of theta * g (or g) over all parameters, float64. Its check is the step's one wait for the device."""
        device = self.params[0].device
        norms = [
            _norm(self._scaled(param, direction)).to(device)
            for param, direction in zip(self.params, directions)
            if direction is not None
        ]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if not norm.isfinite():
            raise FloatingPointError(
                f"the norm of the probe's gradient is {norm.item()}; the weights were left where they are. Look for NaN "
                "or inf in the batch's loss, lower the learning rate, or skip the batch"
            )
        return norm

    def _scaled(self, param: Tensor, direction: Tensor) -> Tensor:
        """theta * g for asam, g for sam, in at least float32."""
        direction = direction.to(torch.promote_types(param.dtype, torch.float32))
        return direction * param.detach() if self.geometry == "asam" else direction

    def _move(
        self, directions: list[Tensor | None], norm: Tensor, originals: list[tuple[nn.Parameter, Tensor]]
    ) -> None:
        """Adds delta to every parameter that has a direction; uses up the directions and fills originals."""
        step_size = self.rho / (norm + EPSILON)
        norms = []
        changed = torch.zeros((), dtype=torch.int64, device=norm.device)
        for index, param in enumerate(self.params):
            direction, directions[index] = directions[index], None
            if direction is None:
                continue
            scaled = self._scaled(param, direction)
            delta = scaled * step_size.to(param.device, scaled.dtype)
            del direction, scaled
            if self.geometry == "asam":
                delta *= param.detach()
            original = param.detach().clone()
            originals.append((param, original))
            param.data.copy_(delta + original)  # .data: autograd's version counter must not see the move
            applied = param.detach().to(delta.dtype) - original
            norms.append(torch.stack([_norm(delta), _norm(applied)]).to(norm.device))
            changed += applied.count_nonzero().to(norm.device)
        torch.clear_autocast_cache()  # holds casts of the weights as they were
        intended, applied = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        self.stats = AnchorStats(norm, intended, applied, changed, sum(param.numel() for param in self.params))

    def _warn_of_autocast(self) -> None:
        device = self.params[0].device.type
        if torch.is_autocast_enabled(device) and self.params[0].dtype not in HALF:
            warnings.warn(
                f"autocast computes with {torch.get_autocast_dtype(device)} while the anchor moves the parameters in "
                f"{self.params[0].dtype}: the gap is mostly the casts' rounding. Train without autocast",
                stacklevel=1,
            )


def _norm(tensor: Tensor) -> Tensor:
    """||tensor||_2 in float64. By rows: one float32 sum over 49152 x 576 elements is wrong by 2e-3 on CPUs."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(tensor, dim=-1).double())


def _restore(originals: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Puts every original back, and only then lets through what was raised meanwhile."""
    failure = None
    for param, original in reversed(originals):  # last first: right for parameters that share memory, too
        for _ in range(RESTORE_ATTEMPTS):
            try:
                param.data.copy_(original)
                break
            except BaseException as error:
                failure = error
    originals.clear()  # a traceback may keep the list for long
    torch.clear_autocast_cache()  # holds casts of theta~
    if failure is not None:
        raise failure


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Holds a Ctrl-C back until the block is left: anywhere in a `with` statement's own entry and exit it would skip
    the restoration. A second Ctrl-C passes at once."""
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous) or threading.current_thread() is not threading.main_thread():
        yield  # nothing raises KeyboardInterrupt here
        return
    held = []

    def hold(signum, frame):
        held.append(signum)
        if len(held) > 1:
            previous(signum, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is hold:
            signal.signal(signal.SIGINT, previous)
        if held:
            previous(signal.SIGINT, None)


def _check_one_rank() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise NotImplementedError(
                f"torch.distributed runs {ranks} ranks, and each would move to an anchor of its own: averaging the "
                "probe's gradient over ranks is not available yet; train on one process"
            )


def _collect(params: Iterable) -> tuple[list[str], list[nn.Parameter]]:
    names, kept, seen = [], [], set()
    for number, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (f"parameter {number}", item)
        if not isinstance(param, Tensor):
            raise TypeError(f"params must be parameters or (name, parameter) pairs, got {type(item).__name__}")
        for mark, what in SHARDED.items():
            if getattr(param, mark, None) not in (None, False):
                raise NotImplementedError(f"{name} is {what}; sharded parameters are not available yet: use whole ones")
        if param.requires_grad and id(param) not in seen:
            seen.add(id(param))
            names.append(name)
            kept.append(param)
    if not kept:
        raise ValueError("params must hold at least one parameter that requires grad, got none")
    return names, kept


def _upper_parameters(model: nn.Module, backbone: nn.Module, first: int) -> list[tuple[str, nn.Parameter]]:
    """Decoder layers from `first` on, the final norm and the head."""
    layers = _first_module(backbone, ("layers", "h", "blocks"))
    norm = _first_module(backbone, ("norm", "ln_f", "final_layernorm", "final_layer_norm"))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else getattr(model, "lm_head", None)
    if not isinstance(layers, nn.ModuleList) or norm is None or head is None:
        raise ValueError(
            f"expected a decoder with a list of layers, a final norm and a head, got {type(model).__name__}; pass the "
            "parameters to GeometricAnchor"
        )
    if not 0 <= first < len(layers):
        raise ValueError(f"scope as a layer's number must be in [0, {len(layers)}), got {first}")
    named = [
        (f"layers.{i}.{n}", p) for i, layer in enumerate(layers) if i >= first for n, p in layer.named_parameters()
    ]
    named += [(f"norm.{n}", p) for n, p in norm.named_parameters()]
    return named + [(f"head.{n}", p) for n, p in head.named_parameters()]


def _first_module(parent: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((getattr(parent, name) for name in names if isinstance(getattr(parent, name, None), nn.Module)), None)
