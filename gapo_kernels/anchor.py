"""`GeometricAnchor`: the weights' pessimistic neighbour theta~ = theta + delta, measured and then taken back exactly.

delta comes from g, the gradient of a probe objective (arXiv 2602.04909; norms over all parameters in scope):

    asam:  delta = rho * theta^2 * g / (||theta * g||_2 + 1e-12)        sam:  delta = rho * g / (||g||_2 + 1e-12)
"""

from __future__ import annotations

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
        ValueError: no parameter requires grad, or an argument outside of what is said above.
        NotImplementedError: what this version does not do: stochastic rounding of 16-bit parameters, a compute_dtype
            that differs from the parameters', process groups.
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
        self.rho, self.geometry, self.direction, self.rounding, self.seed = rho, geometry, direction, rounding, seed
        self.names, self.params = _collect(params)
        for name, param in zip(self.names, self.params):
            if compute_dtype not in (None, param.dtype):
                raise NotImplementedError(
                    f"compute_dtype {compute_dtype} differs from {name}'s {param.dtype}; an anchor on another grid than "
                    "the parameters' own is not available yet: leave compute_dtype out"
                )
            if param.dtype in HALF and rounding == "stochastic":
                raise NotImplementedError(
                    f"{name} is {param.dtype}; stochastic rounding of 16-bit parameters is not available yet: use "
                    "float32 parameters, or rounding='nearest' (which loses most of the perturbation)"
                )
        if process_group is not None:
            raise NotImplementedError("process_group is not available yet: train on one process")
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
        written to `.grad`.

        Args:
            objective: scalar with a graph; theta~ is uphill of it. Not needed for direction="gaussian".
            grads: its gradients instead, in the order of `self.params`; None for a parameter without.
            retain_graph: keep the objective's graph for a later backward.

        Raises:
            ValueError: neither or both of objective and grads, or no parameter in scope has a gradient.
            FloatingPointError: the gradients' norm is not finite; the weights were not moved.
            RuntimeError: the anchor is in use already.
        """
        if self._active:
            raise RuntimeError("perturbed() inside perturbed(): the weights are at the anchor already")
        directions = self._directions(objective, grads, retain_graph)
        step_size = self._step_size(directions)
        originals: list[tuple[nn.Parameter, Tensor]] = []
        self._active = True
        try:
            self._move(directions, step_size, originals)
            del directions
            yield self
        finally:
            _restore(originals)
            self._active = False

    def _directions(
        self, objective: Tensor | None, grads: Sequence[Tensor | None] | None, retain_graph: bool
    ) -> list[Tensor | None]:
        if self.direction == "gaussian":
            return self._noise()
        if (objective is None) == (grads is None):
            raise ValueError(f"expected an objective or its grads, got {'neither' if grads is None else 'both'}")
        if grads is None:
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
        generator = torch.Generator().manual_seed((self.seed * 2**32 + self._step) % 2**63)
        return [
            torch.randn(param.shape, generator=generator, dtype=torch.float32).to(param.device) for param in self.params
        ]

    @torch.no_grad()
    def _step_size(self, directions: list[Tensor | None]) -> Tensor:
        """rho / (norm + 1e-12), float64, with the norm kept for the statistics."""
        norms = [
            torch.linalg.vector_norm(self._scaled(param, direction)).double().to(self.params[0].device)
            for param, direction in zip(self.params, directions)
            if direction is not None
        ]
        self._norm = torch.linalg.vector_norm(torch.stack(norms))
        if not self._norm.isfinite():
            raise FloatingPointError(
                f"the norm of the probe's gradient is {self._norm.item()}; the weights were left where they are. Look for "
                "NaN or inf in the batch's loss, lower the learning rate, or skip the batch"
            )
        return self.rho / (self._norm + EPSILON)

    def _scaled(self, param: Tensor, direction: Tensor) -> Tensor:
        """theta * g for asam, g for sam, in at least float32."""
        direction = direction.to(_wide(param))
        return direction * param.detach() if self.geometry == "asam" else direction

    @torch.no_grad()
    def _move(
        self, directions: list[Tensor | None], step_size: Tensor, originals: list[tuple[nn.Parameter, Tensor]]
    ) -> None:
        device = self.params[0].device
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        elements = 0
        for param, direction in zip(self.params, directions):
            elements += param.numel()
            if direction is None:
                continue
            delta = self._scaled(param, direction)
            if self.geometry == "asam":
                delta = delta * param.detach()
            delta = delta * step_size.to(device=param.device, dtype=delta.dtype)
            original = param.detach().clone()
            originals.append((param, original))
            param.data.copy_(original.to(delta.dtype) + delta)
            applied = param.detach().to(delta.dtype) - original
            sums = (delta.square().sum(), applied.square().sum(), (applied != 0).sum())
            totals += torch.stack([value.double() for value in sums]).to(device)
        intended, applied = totals[:2].sqrt()
        self.stats = AnchorStats(self._norm, intended, applied, totals[2], elements)
        self._step += 1


def _wide(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _restore(originals: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Puts every original back, and only then lets an interrupt through that came meanwhile."""
    interrupt = None
    while originals:
        try:
            param, original = originals[-1]
            param.data.copy_(original)
            originals.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _collect(params: Iterable) -> tuple[list[str], list[nn.Parameter]]:
    names, kept, seen = [], [], set()
    for number, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (f"parameter {number}", item)
        if not isinstance(param, Tensor):
            raise TypeError(f"params must be parameters or (name, parameter) pairs, got {type(item).__name__}")
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
