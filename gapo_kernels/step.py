"""`gapo_step`: probe, anchor and loss on one kept graph."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch._functorch.config
import torch.compiler.config
from torch import Tensor

from gapo_kernels import distributed, leaf_uses, validation
from gapo_kernels.anchor import GeometricAnchor
from gapo_kernels.interrupts import interrupt_held
from gapo_kernels.objective import gapo_objective, sft_terms
from gapo_kernels.outputs import GAPOOutput
from gapo_kernels.scope import UnmovedLayers
from gapo_kernels.shared_backward import SharedBackward

PROBES = ("loss", "margin")
# Other libraries' functions whose backward writes over what it saved, without autograd's knowledge: Liger-Kernel's. Some do
# where their output is a scalar, whose gradient they multiply into what the forward has made.
WRITE_OVER_SAVED = tuple(f"Liger{name}Function" for name in "SiLUMul GELUMul MLP VocabParallelCE".split())
SCALE_SAVED = tuple(
    f"Liger{name}Function" for name in "CrossEntropy FusedLinearCrossEntropy FusedLinearJSD FusedLinearKLDiv".split()
)


def gapo_step(
    logps_fn: Callable[[], Tensor | tuple[Tensor, Tensor]],
    anchor: GeometricAnchor | None,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    probe: str = "loss",
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    sft_weight: float = 0.0,
    allow_dropout: bool = False,
    share_backward: bool = False,
) -> GAPOOutput:
    """One GAPO step's loss (arXiv 2602.04909) with two forwards; the caller runs `out.loss.backward()`.

    logps_fn runs once with grad. Its graph serves the probe's gradient, from which the anchor is made, and is kept for
    the final backward, so a second clean forward is not needed: the gradients are bitwise the same. It runs once more
    without grad at the anchor, for M~. The weights are theta again when this function returns or raises.

    Both runs must compute the same function, so a run that draws random numbers (dropout in train mode) is refused:
    between two masks the gap would be mostly their difference. Switch dropout off (`model.eval()`, or its probabilities
    to 0), or pass allow_dropout=True: the anchor's run then draws the same masks again. The kept graph is walked twice:
    checkpoint activations with use_reentrant=False; a compiled model's first run must be in here, with an anchor (or in
    here after torch._dynamo.reset()), so that its graph may be walked twice, too.

    With an anchor of scope k from `GeometricAnchor.from_model`, the decoder layers below k run once: the anchor's run
    takes their outputs from the first.

    Args:
        logps_fn: () -> (2B,) differentiable sequence log-probs under the current weights, chosen then rejected (as from
            `sequence_logps`); or (logps, counts), counts (2B,) the number of predicted tokens.
        anchor: what moves the weights; None trains and evaluates without an anchor, the SimPO loss.
        beta, gamma: the logistic's argument is z = beta * gap - gamma.
        probe: the objective uphill of which the anchor lies: "loss", J = mean -log sigma(beta M - gamma), as the
            authors' code has it, or "margin", J = -mean M, as the paper has it; over the pairs of all the anchor's ranks.
        label_smoothing, loss_type: of the final loss, as in `fused_gapo_loss` (the hinge has no smoothing).
        sft_weight: adds sft_weight * NLL over the chosen tokens; needs counts and length-normalised logps.
        allow_dropout: let logps_fn draw random numbers, and have the anchor's run draw the same ones.
        share_backward: take the gradients of activations, which are linear in one number a sequence, from the probe's
            backward: the final one then computes gradients of weights alone. About a backward's half is saved, and the
            gradients are the same to rounding, not to the bit. It keeps the layers' inputs and their outputs' gradients
            until then, in the place of the graph, and makes all of the parameters' at once. For models that keep
            sequences apart, in a batch (S, T): the 1st step is compared with log2(S) real backwards, the 4th, 16th, ...
            with one; a change in between, of the sequences' order in the model say, goes unseen until the next. Without
            a probe nothing is shared, and where it gave a pair no weight (below 1e-20) logps_fn may run once more, for a
            real backward. No other loss of the same forward, no hooks but on parameters, and gradients of
            torch.nn.Parameter alone.

    Returns:
        GAPOOutput; only its `loss` carries gradient.

    Raises:
        ValueError: sft_weight without counts, shapes or hyperparameters out of range, no parameter has a gradient.
        FloatingPointError: the probe's gradient is not finite; the weights are where they were.
        RuntimeError: logps_fn draws random numbers, without allow_dropout; its graph cannot be walked twice
            (inplace_backward=True, a layer that writes over what it saved); with share_backward, mixes sequences.
        NotImplementedError: share_backward with an anchor of scope k, FSDP2, packed rows, checkpointed activations,
            a compiled model, float16, or a layer that is another library's own function.
    """
    validation.check_hyperparameters(beta, gamma, label_smoothing, loss_type, sft_weight=sft_weight)
    validation.check_choice(probe, PROBES, "probe")
    validation.check_flags(allow_dropout=allow_dropout, share_backward=share_backward)
    if not callable(logps_fn):
        raise TypeError(f"logps_fn must be a function without arguments, got {type(logps_fn).__name__}")
    if not isinstance(anchor, (GeometricAnchor, type(None))):
        raise TypeError(f"anchor must be a GeometricAnchor or None, got {type(anchor).__name__}")
    if anchor is not None:
        anchor.leave_forward()  # of a step whose first forward was cut off
    watched = partial(_Randomness, set() if anchor is None else _devices(anchor.params))
    randomness = None if anchor is None else watched()
    unmoved = UnmovedLayers([] if anchor is None else anchor.unmoved_layers, watched)
    walked_twice = anchor is not None and anchor.direction != "gaussian"
    buffers = _kept_buffers if walked_twice else nullcontext
    with buffers(), unmoved.recorded():
        margin, logps, counts = _margin(logps_fn())
    if sft_weight and counts is None:
        raise ValueError("sft_weight needs token counts: logps_fn must return (logps, counts), got logps alone")
    pairs = margin.shape[0]
    valid = torch.ones_like(margin, dtype=torch.bool) if counts is None else (counts > 0).view(2, pairs).all(0)

    options = dict(beta=beta, gamma=gamma, label_smoothing=label_smoothing, loss_type=loss_type)
    sharing = None
    if share_backward and walked_twice and logps.grad_fn is not None:
        sharing = SharedBackward(logps, anchor, anchor.params)
    counter = None if anchor is None else anchor.state_dict()
    try:
        anchor_margin = torch.zeros_like(margin)
        if anchor is not None:
            drawn = unmoved.drawn or randomness.drawn()
            if drawn and not allow_dropout:
                raise RuntimeError(
                    "logps_fn drew random numbers (is dropout active?): its two runs would differ by more than the "
                    "anchor. Switch dropout off, model.eval() or its probabilities to 0, or pass allow_dropout=True to "
                    "draw the same numbers in both runs"
                )
            objective = _probe(probe, margin, beta, gamma, valid) if walked_twice else None
            if objective is not None:
                if anchor.computes_in_float16:
                    warnings.warn(
                        "the probe's gradient is computed in float16 without loss scaling: what is below 6e-8 is lost, and "
                        "with it that part of the anchor. Train in bfloat16, or scale a probe of your own, which leaves "
                        "the anchor the same: anchor.perturbed(scale * objective)",
                        stacklevel=2,
                    )
                weight = distributed.weight_of_rank(valid, anchor.params, anchor.process_group)
                objective = objective if weight is None else objective * weight.to(objective.dtype)
            recorded = nullcontext() if sharing is None else sharing.recorded()
            kept, again = sharing is None or sharing.needs_graph, False
            if kept and objective is not None:
                _check_walked_twice(margin, not anchor.graph_was_checked)
                anchor.graph_was_checked = True
            # In here, too: a backward of dynamic shapes is compiled when it first runs.
            graph = margin if objective is None else objective  # shows autocast's casts
            with anchor.buffers_held():
                with buffers(), recorded, anchor.perturbed(graph, retain_graph=kept), torch.no_grad():
                    if sharing is not None and not sharing.tells_apart(valid):
                        sharing, again = None, not kept
                    with randomness.repeated() if drawn else unmoved.replayed():
                        anchor_margin = _margin(logps_fn())[0]
                if again:  # the graph that was not kept, on this rank alone perhaps
                    with randomness.repeated() if drawn else nullcontext():
                        logps = _margin(logps_fn())[1]
        if sharing is None:
            return _packed(logps, anchor_margin, counts, valid, sft_weight, options)
        sharing.compare(logps)
        logps = logps.detach().requires_grad_()
        out = _packed(logps, anchor_margin, counts, valid, sft_weight, options)
        return out._replace(loss=sharing.loss(out.loss, logps))
    except BaseException:
        if anchor is not None:  # a step that failed is repeated with the same random numbers
            anchor.load_state_dict(counter)
        raise


@contextmanager
def _kept_buffers() -> Iterator[None]:
    """What is compiled in here keeps its buffers, so that its graph may be walked twice.

    The tag is for the compiler's cache on disk, of whose keys the setting is no part. Both by hand: config.patch makes a
    ContextVar in each call, and the thread's context never lets go of one.
    """
    functorch, compiler = torch._functorch.config, torch.compiler.config
    before = functorch.donated_buffer, compiler.cache_key_tag
    with interrupt_held(in_body=False):
        try:
            functorch.donated_buffer, compiler.cache_key_tag = False, f"{before[1]} gapo_kernels: a probe walks it, too"
            yield
        finally:
            functorch.donated_buffer, compiler.cache_key_tag = before


def _check_walked_twice(result: Tensor, is_first: bool) -> None:
    """RuntimeError for a graph with a node whose first backward writes over what it saved, unnoticed by the second.

    torch's own check of compiled code goes by the setting that `_kept_buffers` changes. Where none was compiled, an anchor's
    first step stands for all.
    """
    for node in distributed.nodes(result) if is_first or "torch._dynamo" in sys.modules else ():
        of_class = getattr(node, "_forward_cls", None)
        if of_class is None:
            continue
        if getattr(getattr(of_class, "metadata", None), "bw_donated_idxs", None):
            raise RuntimeError(
                "expected a graph that two backwards can walk, got compiled code whose first backward uses up its buffers, "
                "for it first ran outside of gapo_step, or without a probe: run it inside first, or call "
                "torch._dynamo.reset() before"
            )
        found, is_ours = of_class.__name__, getattr(node, "inplace_backward", False)
        writes = is_ours or found in WRITE_OVER_SAVED or found in SCALE_SAVED and not node._input_metadata[0].shape
        if writes and not leaf_uses.is_checkpointed(node):
            remedy = "checkpoint its layer's activations, or leave it out of the model"
            if is_ours:
                found, remedy = "inplace_backward=True", "leave that out of logps_fn"
            raise RuntimeError(
                f"expected a graph that two backwards can walk, got {found}, whose backward writes over what it saved: {remedy}"
            )


def _packed(
    logps: Tensor, anchor_margin: Tensor, counts: Tensor | None, valid: Tensor, sft_weight: float, options: dict
) -> GAPOOutput:
    """The loss and the output's other fields."""
    pairs = anchor_margin.shape[0]
    margin = logps[:pairs] - logps[pairs:]
    loss, weight = gapo_objective(margin, anchor_margin, valid=valid, **options)
    sft_loss = torch.zeros_like(loss)
    if sft_weight:
        sft_loss, _ = sft_terms((logps * counts)[:pairs], counts[:pairs], valid, sft_weight)
        loss = loss + sft_weight * sft_loss
    fields = (*logps.split(pairs), margin, anchor_margin, margin - anchor_margin, weight, sft_loss, valid)
    return GAPOOutput(loss, *(field.detach() for field in fields))


def _margin(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """M (B,) with the logps (2B,) and counts (2B,) that it came from."""
    if isinstance(result, tuple) and len(result) != 2:
        raise TypeError(f"logps_fn must return log-probs, or log-probs and counts, got a tuple of {len(result)}")
    logps, counts = result if isinstance(result, tuple) else (result, None)
    if not isinstance(logps, Tensor) or not logps.is_floating_point():
        raise TypeError(f"logps_fn must return floating-point log-probs, got {validation.describe(logps)}")
    if logps.dim() != 1 or logps.shape[0] == 0 or logps.shape[0] % 2:
        raise ValueError(
            f"logps_fn must return log-probs of shape (2B,), chosen then rejected, got {tuple(logps.shape)}"
        )
    if counts is not None and not isinstance(counts, Tensor):
        raise TypeError(f"logps_fn must return counts as a tensor, got {validation.describe(counts)}")
    if counts is not None and counts.shape != logps.shape:
        raise ValueError(f"counts must have the log-probs' shape, {tuple(logps.shape)}, got {tuple(counts.shape)}")
    if logps.dtype in validation.HALF:
        logps = logps.float()
    chosen, rejected = logps.chunk(2)
    return chosen - rejected, logps, counts


def _devices(params: Sequence[Tensor]) -> set[torch.device]:
    """Those that a forward may draw on: offloaded weights are elsewhere than what computes with them."""
    found = {param.device for param in params}
    for module in (torch.cuda, torch.xpu):
        if module.is_initialized():
            kind = module.__name__.rpartition(".")[2]
            found |= {torch.device(kind, number) for number in range(module.device_count())}
    return found


class _Randomness:
    """Torch's random states on the CPU and on other devices, as they were when this was made."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._devices = [(torch.get_device_module(device), device) for device in devices if device.type != "cpu"]
        self._before = self._states()

    def _states(self) -> list[Tensor]:
        """On the host: reading them waits for no device."""
        return [torch.get_rng_state(), *(module.get_rng_state(device) for module, device in self._devices)]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for (module, device), state in zip(self._devices, states[1:], strict=True):
            module.set_rng_state(state, device)

    def drawn(self) -> bool:
        return not all(map(torch.equal, self._before, self._states()))

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Draws the same numbers again as since this was made."""
        after = self._states()
        self._set(self._before)
        try:
            yield
        finally:
            self._set(after)


def _probe(probe: str, margin: Tensor, beta: float, gamma: float, valid: Tensor) -> Tensor:
    if probe == "loss":
        return gapo_objective(margin, beta=beta, gamma=gamma, valid=valid)[0]
    return -margin.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)
