"""Which parameters of a model an anchor moves, and which of its layers it therefore need not run again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from gapo_kernels import distributed
from gapo_kernels.interrupts import interrupt_held

# transformers' decoders whose layers pass on their output and nothing else: no keys and values shared between layers
# (gemma3n), no router's logits (mixtral). Replaying layers was compared with running them on each of these.
PLAIN_DECODERS = (
    "bloom cohere falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_neox granite llama ministral mistral nemotron olmo "
    "olmo2 olmo3 opt phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2"
).split()

logger = logging.getLogger(__name__)
DATA_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
NamedParameters = list[tuple[str, nn.Parameter]]


class Scope(NamedTuple):
    named: NamedParameters
    unmoved: list[nn.Module]  # decoder layers whose output no moved parameter has a part in, from the first on


def find(model: nn.Module, scope: str | int) -> Scope:
    """The parameters of "backbone", "all" or of the decoder layers from a number on, the final norm and the head."""
    copied, model = any(isinstance(module, nn.DataParallel) for module in model.modules()), _unwrapped(model)
    if scope == "all":
        return Scope(list(model.named_parameters()), [])
    if hasattr(model, "get_base_model"):  # PEFT keeps its adapters inside of the model that it wraps
        model = model.get_base_model()
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"expected a model with a backbone (transformers' base_model_prefix, or .model), got "
            f"{type(model).__name__}; pass scope='all', or the parameters to GeometricAnchor"
        )
    if scope == "backbone":
        return Scope(list(backbone.named_parameters()), [])
    if isinstance(scope, bool) or not isinstance(scope, int):
        raise ValueError(f"scope must be 'backbone', 'all' or the first layer's number, got {scope!r}")
    return _upper(model, backbone, scope, copied)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without what makes it data parallel, be that compiled or not."""
    while isinstance(inner := getattr(model, "_orig_mod", model), DATA_PARALLEL):
        model = inner.module
    return model


def _upper(model: nn.Module, backbone: nn.Module, first: int, copied: bool) -> Scope:
    backbone = _first_module(backbone, ("decoder",)) or backbone  # OPT
    layers = _first_module(backbone, ("layers", "h", "blocks"))
    norm = _first_module(backbone, ("norm", "ln_f", "norm_f", "final_layernorm", "final_layer_norm"))
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
    named += [(f"head.{n}", p) for n, p in head.named_parameters()]
    others = [child for child in backbone.children() if child is not layers and child is not norm]
    below = {id(p) for module in (*layers[:first], *others) for p in module.parameters()}
    below |= {id(p) for p in backbone.parameters(recurse=False)}
    moved = {id(p) for _, p in named if p.requires_grad}
    kind = getattr(getattr(model, "config", None), "model_type", None)
    # A tied head moves the embedding that the lower layers read, as a shared block does: then they have to run again.
    why = "they read a parameter that moves, as they do where the head is tied" if moved & below else ""
    why = "the model is compiled" if _compiled(model) else why
    why = "fully_shard has hooks on them" if distributed.is_sharded_model(model) else why
    why = "DataParallel runs copies of them, in threads" if copied else why
    if kind not in PLAIN_DECODERS:
        why = f"model_type {kind!r} is none of those whose layers are known to pass on their output alone"
    if why and first:
        logger.info("the layers below %d run at the anchor, too: %s", first, why)
    return Scope(named, [] if why else list(layers[:first]))


def _compiled(model: nn.Module) -> bool:
    """Whether torch.compile has a part in the model: what it traced does not see a layer's forward change."""
    return hasattr(model, "_orig_mod") or any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _first_module(parent: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((getattr(parent, name) for name in names if isinstance(getattr(parent, name, None), nn.Module)), None)


class UnmovedLayers:
    """Layers that compute the same at the anchor as before: recorded in the clean forward, replayed in the anchor's.

    The outputs, and what enters the first of them, are held in between; the kept graph of trained float32 layers holds them
    anyway. The same inputs must come in the same order.

    Args:
        layers: from the first on.
        watched: () -> the random states as they are then, whose drawn() tells whether the layers have drawn since.
    """

    def __init__(self, layers: list[nn.Module], watched: Callable[[], Any]) -> None:
        # Somebody's hooks may do anything. Those on a layer would be applied again to what is replayed, those within it
        # would not see the anchor's forward: then it runs again.
        hooked = bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks) or any(
            module._forward_hooks or module._forward_pre_hooks for layer in layers for module in layer.modules()
        )
        self._layers = [] if hooked else layers
        self._inputs: list[object] = []  # of the first layer: hidden states
        self._outputs: list[list[object]] = [[] for _ in self._layers]
        self._cached = False  # whether keys and values came from a call before: a layer that is replayed leaves none
        self._watched, self._randomness = watched, None
        # Whether they have: what logps_fn itself does, seeding say, may leave the states as if nothing had been drawn.
        self.drawn = False

    @contextmanager
    def recorded(self) -> Iterator[None]:
        handles = []
        # A Ctrl-C between two lines would leave a hook in place, and with it the outputs of every forward to come.
        with interrupt_held() if self._layers else nullcontext():
            try:
                for layer in self._layers[:1]:
                    handles.append(layer.register_forward_pre_hook(self._enter))
                for number, layer in enumerate(self._layers):
                    handles.append(layer.register_forward_hook(self._keep(number), with_kwargs=True))
                yield
            except BaseException:
                self._forget()  # a traceback may keep this object for long
                raise
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        # Layers that ran inside of compiled code were not seen: then all of them run again.
        seen = len({len(kept) for kept in self._outputs}) == 1 and self._outputs[0]
        layers = self._layers if seen and not self._cached else []
        own = [layer.__dict__.get("forward") for layer in layers]
        outputs = [iter(list(kept)) for kept in self._outputs]
        inputs, changes = iter(list(self._inputs)), []
        try:
            for layer, recorded in zip(layers, outputs):
                check = _entering(inputs, changes) if layer is layers[0] else None
                layer.forward = _replay(recorded, check, changes if layer is layers[-1] else None)
            yield
            if layers and any(next(recorded, None) is not None for recorded in outputs):
                raise RuntimeError(
                    "logps_fn ran the model less often at the anchor than before; both runs must compute the same"
                )
        finally:
            for layer, forward in zip(layers, own):
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.forward = forward
            self._forget()

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            self._randomness = self._watched()

    def _keep(self, number: int):
        def hook(module, args, kwargs, output):
            if not torch.compiler.is_compiling():
                if number == 0:
                    self._inputs.append(_detached(_hidden_states(args, kwargs)))
                self._outputs[number].append(_detached(output))
                if number == len(self._layers) - 1:
                    self.drawn = self.drawn or self._randomness.drawn()
                self._cached = self._cached or _from_before(number, args, kwargs)

        return hook

    def _forget(self) -> None:
        for kept in (self._inputs, *self._outputs):
            kept.clear()


def _replay(outputs: Iterator[object], check: Callable[[object], None] | None, changes: list[Tensor | None] | None):
    """check: of the first layer, of what enters it. changes: of the last one, what the check has found."""

    def forward(*args, **kwargs):
        try:
            output = next(outputs)
        except StopIteration:
            raise RuntimeError(
                "logps_fn ran the model more often at the anchor than before; both runs must compute the same"
            ) from None
        if check is not None:
            check(_hidden_states(args, kwargs))
        changed = changes.pop() if changes else None
        return output if changed is None else _mapped(output, lambda tensor: tensor.masked_fill(changed, torch.nan))

    return forward


def _entering(inputs: Iterator[object], changes: list[Tensor | None]) -> Callable[[object], None]:
    return lambda hidden: changes.append(_changed(hidden, next(inputs)))


def _may_wait(device: torch.device) -> bool:
    return device.type == "cpu"


def _changed(hidden: object, before: object) -> Tensor | None:
    """Raises where the hidden states are not those of the run before; whether they are not, on a GPU, which nobody waits
    for."""
    if not isinstance(hidden, Tensor) or not isinstance(before, Tensor):
        return None
    same_shape = hidden.shape == before.shape
    if same_shape and not _may_wait(hidden.device):
        return (hidden != before).any()
    # NaN is not equal to itself, and shows anyway.
    if not same_shape or not torch.equal(hidden, before) and not before.isnan().any():
        raise RuntimeError(
            f"logps_fn gave the model other inputs at the anchor than before, hidden states of shape {tuple(hidden.shape)} "
            f"where they were of {tuple(before.shape)}, or of other values; both runs must compute the same, in the same order"
        )
    return None


def _hidden_states(args: tuple, kwargs: dict) -> object:
    return args[0] if args else kwargs.get("hidden_states")


def _from_before(number: int, args: tuple, kwargs: dict) -> bool:
    """Whether a decoder layer, which has just run, has keys and values of other tokens than this call's."""
    caches = [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]
    hidden = _hidden_states(args, kwargs)
    return any(not isinstance(hidden, Tensor) or cache.get_seq_length(number) > hidden.shape[1] for cache in caches)


def _detached(output: object) -> object:
    return _mapped(output, Tensor.detach)


def _mapped(output: object, function: Callable[[Tensor], Tensor]) -> object:
    """What a layer returns, with the function applied to its tensors."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, tuple) and type(output) is tuple:
        return tuple(_mapped(item, function) for item in output)
    return output
