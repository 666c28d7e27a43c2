"""Who else computes the loss, at the best settings that they document; and the check that all compute the same.

A peer is made by a function without arguments, which imports what it needs, and is itself a function from a batch to
the scalar loss. What cannot be imported, does not run or computes something else is listed as absent, with the reason.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness

BETA = 2.0
TO_BEGIN = 90.0  # seconds that a peer may take to be imported and compiled
Loss = Callable[[Any], Tensor]
# How much lower a chosen label's logit is at the anchor, and a rejected one's higher, beside some noise: what leaves the
# anchor out is then off by more than 16 bits round.
PESSIMISM = 0.25


def pessimism(labels: Tensor) -> Tensor:
    """(2B, 1): what the anchor adds to labels' logits."""
    added = torch.full((labels.shape[0], 1), PESSIMISM, device=labels.device)
    added[: labels.shape[0] // 2] *= -1
    return added


def gapo_loss(margin: Tensor, anchor_margin: Tensor, gamma: float) -> Tensor:
    return -F.logsigmoid(BETA * (margin - anchor_margin) - gamma).mean()


def sequence_margin(logps: Tensor, mask: Tensor) -> Tensor:
    """(B,) from token log-probs (2B, T), whatever they hold where `mask` is False."""
    means = logps.float().masked_fill(~mask, 0).sum(-1) / mask.sum(-1)
    chosen, rejected = means.chunk(2)
    return chosen - rejected


def eager_logps(logits: Tensor, labels: Tensor, sliced: bool) -> Tensor:
    """(2B,). sliced: what preference trainers do, the authors' included. Otherwise the labels are shifted instead of the
    logits, which saves the copy of the slice."""
    if sliced:
        logits, targets = logits[:, :-1], labels[:, 1:]
    else:
        targets = shifted(labels)
    mask = targets != -100
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logps * mask).sum(-1) / mask.sum(-1)


def shifted(labels: Tensor) -> Tensor:
    """(2B, T): at each position what it predicts, -100 at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def compiled(loss: Loss) -> Loss:
    """Autotuned; without CUDA graphs, which own their outputs and copy the inputs."""
    return torch.compile(loss, dynamic=False, mode="max-autotune-no-cudagraphs")


class Expected:
    """What a contender must compute, from the reference.

    gradients: of the leaves, in at least float32. labelled: of a leaf's number and a gradient, zeroes in place what a label
    alone makes large there: what remains has to be right by itself, or a softmax could be left out of it. tolerance: of
    ours, relative for the loss and what remains, of the largest entry for whole gradients; loose: of the others, which may
    keep log-probs in 16 bits.
    """

    def __init__(
        self,
        loss: float,
        gradients: Sequence[Tensor],
        labelled: Callable[[int, Tensor], object],
        tolerance: float,
        loose: float,
    ) -> None:
        self.loss, self.gradients, self.tolerance, self.loose = loss, gradients, tolerance, loose
        self._labelled = labelled
        self._sizes = [self._sizes_of(number, one.clone()) for number, one in enumerate(gradients)]

    def _sizes_of(self, number: int, gradient: Tensor) -> tuple[float, float]:
        """The largest magnitude, and the norm of what remains without what labels make. Writes over `gradient`."""
        largest = torch.linalg.vector_norm(gradient, torch.inf)
        self._labelled(number, gradient)
        return largest.item(), torch.linalg.vector_norm(gradient, dtype=torch.float64).item()

    def errors(self, loss: float, gradients: Sequence[Tensor]) -> dict[str, float]:
        relative = []
        for number, (found, exact) in enumerate(zip(gradients, self.gradients, strict=True)):
            off = self._sizes_of(number, found.float() - exact)
            relative += [one / size if size else float(one > 0) for one, size in zip(off, self._sizes[number])]
        # torch's: Python's loses a NaN
        return {"loss": abs(loss - self.loss) / abs(self.loss), "gradient": torch.tensor(relative).max().item()}


class Checked(NamedTuple):
    losses: dict[str, Loss]  # those that compute what is expected
    absent: dict[str, str]  # of the others, why not
    peaks: dict[str, float | None]  # MiB at the worst moment beyond the inputs; none on a CPU, where `Peaks` has them
    errors: dict[str, dict[str, float]]  # {"loss", "gradient"}, as the tolerances count them


def checked(
    own: dict[str, Loss],
    peers: dict[str, Callable[[], Loss]],
    batch: Any,
    leaves: Sequence[Tensor],
    expected: Expected,
    where: torch.device,
    *,
    restore: Callable[[str], object] = lambda name: None,
) -> Checked:
    """AssertionError where one of `own` differs. restore: called with the name after each call."""
    found = Checked({}, {}, {}, {})

    def drop_gradients() -> None:
        for leaf in leaves:
            leaf.grad = None

    for name, make in {**{name: (lambda loss=loss: loss) for name, loss in own.items()}, **peers}.items():
        values: list[float] = []

        def call(loss: Loss) -> None:
            value = loss(batch)
            value.backward()
            values.append(value.item())

        try:
            with harness.deadline(TO_BEGIN, harness.TooLong):
                loss = make()
                call(loss)
            if where.type == "cuda":
                restore(name)
                drop_gradients()
                found.peaks[name] = harness.mebibytes(harness.peak_bytes(lambda: call(loss), where))
            error = expected.errors(values[-1], [leaf.grad for leaf in leaves])
            limit = expected.tolerance if name in own else expected.loose
            if not all(value <= limit for value in error.values()):
                raise AssertionError(f"its loss is off by {error['loss']:.2g}, its gradient by {error['gradient']:.2g}")
        except (Exception, harness.TooLong) as problem:
            if name in own:
                raise
            found.absent[name] = reason(problem)
            found.peaks.pop(name, None)
        else:
            found.losses[name], found.errors[name] = loss, error
        restore(name)
        drop_gradients()
    return found


_measured: tuple[Any, dict[str, Callable[[], Loss]]] | None = None  # a batch and who makes a loss of it, for `peak_here`


def begin_here(suite: str, case: Any, quick: bool = False) -> None:
    global _measured
    _measured = None  # its memory first
    if "torch._dynamo" in sys.modules:  # the losses of all cases have the same code, which is not compiled for many
        torch._dynamo.reset()
    module, cpu = importlib.import_module(suite), torch.device("cpu")
    batch = module.make_batch(case, cpu, quick)
    own, others = module.losses(case, batch, cpu)
    _measured = batch, {name: (lambda loss=loss: loss) for name, loss in own.items()} | others


def peak_here(name: str) -> float | None:
    batch, makers = _measured

    def drop_gradients() -> None:
        for tensor in batch:
            tensor.grad = None

    try:
        with harness.deadline(TO_BEGIN, harness.TooLong):
            loss = makers[name]()
            loss(batch).backward()  # compiles
        drop_gradients()
        return harness.mebibytes(harness.peak_bytes(lambda: loss(batch).backward(), torch.device("cpu")))
    except (Exception, harness.TooLong):
        return None
    finally:
        drop_gradients()


def quick_peaks(suite: str, case: Any, names: Iterable[str]) -> dict[str, float | None]:
    """In this process: where figures do not count."""
    begin_here(suite, case, quick=True)
    return {name: peak_here(name) for name in names}


class Peaks:
    """MiB at the worst moment of a call beyond the inputs, on a CPU, in a process in which large tensors do not lie in the
    heap, where it would depend on the holes that others have left. It goes on from case to case: importing the peers takes
    longer than most calls."""

    def __init__(self) -> None:
        self._process: ProcessPoolExecutor | None = None

    def of(self, suite: str, case: Any, names: Iterable[str]) -> dict[str, float | None]:
        """{contender: MiB, None where that cannot be known}."""
        found: dict[str, float | None] = dict.fromkeys(names)
        self._process = self._process or harness.another_process(map_large=True)
        try:
            self._process.submit(begin_here, suite, case).result()
            for name in found:
                found[name] = self._process.submit(peak_here, name).result()
        except Exception:  # it may die
            self.close()
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown()
            self._process = None


def reason(error: BaseException) -> str:
    if isinstance(error, harness.TooLong):
        return f"did not finish its first call within {TO_BEGIN:.0f} s"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {re.sub(r'[ (]+/[^ ]*', '', first)}"  # less its paths


# ---- from logits: (logits, labels, anchor_logits), as bench_logits.py has them ----


def eager_from_logits(gamma: float, sliced: bool) -> Loss:
    def loss(batch):
        def margin(logits):
            chosen, rejected = eager_logps(logits, batch.labels, sliced).chunk(2)
            return chosen - rejected

        with torch.no_grad():
            anchor_margin = margin(batch.anchor_logits)
        return gapo_loss(margin(batch.logits), anchor_margin, gamma)

    return loss


def trl_from_logits(gamma: float) -> Loss:
    """TRL's selective log-softmax: its fused log-prob kernel on a GPU, row by row in torch elsewhere. Given shifted labels
    and their mask, so that the slice of the logits is not copied, nor by the kernel time spent on ignored rows."""
    from trl.trainer.utils import selective_log_softmax

    def loss(batch):
        targets = shifted(batch.labels)
        mask = targets != -100

        def margin(logits):
            return sequence_margin(selective_log_softmax(logits, targets.clamp(min=0), row_mask=mask), mask)

        with torch.no_grad():
            anchor_margin = margin(batch.anchor_logits)
        return gapo_loss(margin(batch.logits), anchor_margin, gamma)

    return loss


def liger_from_logits(gamma: float) -> Loss:
    """Liger's cross-entropy kernel, a row at a time. It writes the gradient over the logits: they must be restored."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    def loss(batch):
        targets = shifted(batch.labels)
        mask = targets != -100

        def margin(logits):
            rows = liger_cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            return sequence_margin(-rows.view(mask.shape), mask)

        with torch.no_grad():
            anchor_margin = margin(batch.anchor_logits)
        return gapo_loss(margin(batch.logits), anchor_margin, gamma)

    return loss


# ---- from hidden states and the LM head: (hidden, weight, labels, anchor_hidden), as bench_linear.py has them ----


def formula(token_logps: Callable[[Tensor, Tensor], Tensor], batch: Any, gamma: float) -> Tensor:
    """The loss from token_logps(hidden, labels): (2B, T - 1), whatever it holds where a label is ignored."""

    def margin(hidden):
        return sequence_margin(token_logps(hidden, batch.labels), batch.labels[:, 1:] != -100)

    with torch.no_grad():
        anchor_margin = margin(batch.anchor_hidden)
    return gapo_loss(margin(batch.hidden), anchor_margin, gamma)


def of_kept_rows(row_logps: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """token_logps from row_logps(hidden, targets), which sees the kept rows only."""

    def token_logps(hidden, labels):
        targets = labels[:, 1:]
        mask = targets != -100
        logps = row_logps(hidden[:, :-1][mask], targets[mask])
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps)

    return token_logps


def of_all_rows(row_logps: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same where no label is ignored."""

    def token_logps(hidden, labels):
        targets = labels[:, 1:]
        return row_logps(hidden[:, :-1].flatten(0, 1), targets.flatten()).view(targets.shape)

    return token_logps


def eager_from_hidden(gamma: float) -> Loss:
    def loss(batch):
        def token_logps(hidden, labels):
            logps = F.linear(hidden[:, :-1], batch.weight).log_softmax(-1)
            return logps.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)

        return formula(token_logps, batch, gamma)

    return loss


def liger_from_hidden(gamma: float, compiled: bool, pairs: int = 1) -> Loss:
    """pairs: how many it takes at once."""
    if gamma:
        raise ValueError(f"its loss has no gamma, got {gamma}")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    dpo = LigerFusedLinearDPOLoss(beta=BETA, average_log_prob=True, compiled=compiled, chunk_size=pairs)

    def loss(batch):
        hidden, weight, labels, anchor_hidden = batch
        value, _ = dpo(
            weight, hidden[:, :-1], labels[:, 1:], ref_input=anchor_hidden[:, :-1], ref_weight=weight.detach()
        )
        return value

    return loss


Pick = Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[Tensor, Tensor], Tensor]]  # of_kept_rows, of_all_rows


def trl_from_hidden(gamma: float, pick: Pick = of_kept_rows, vocabulary_chunk: int = 32768) -> Loss:
    """vocabulary_chunk: by default what its trainers use."""
    from trl.kernels import ChunkedLogProbFunction

    def loss(batch):
        def row_logps(hidden, targets):
            # temperature 1, no soft cap, logits as they are, no entropy or the like
            options = (1.0, vocabulary_chunk, None, 1.0, ())
            return ChunkedLogProbFunction.apply(hidden, batch.weight, None, targets, *options)[0]

        return formula(pick(row_logps), batch, gamma)

    return loss


def linear_cross_entropy(
    gamma: float, pick: Pick = of_kept_rows, budget: int | None = None, chunked: bool = True
) -> Loss:
    """PyTorch's, in chunks of its own choice or of `budget` bytes of logits, or not chunked, which is its default."""

    def loss(batch):
        rows = None if budget is None else max(1, budget // (batch.weight.shape[0] * batch.weight.element_size()))
        chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows) if chunked else None

        def row_logps(hidden, targets):
            return -F.linear_cross_entropy(hidden, batch.weight, targets, reduction="none", options=chunks)

        return formula(pick(row_logps), batch, gamma)

    return loss


def cut_cross_entropy(gamma: float, pick: Pick = of_kept_rows) -> Loss:
    """apple/ml-cross-entropy, which never writes logits; its own default drops gradients too small for their dtype."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(batch):
        def row_logps(hidden, targets):
            return -linear_cross_entropy(hidden, batch.weight, targets, reduction="none")

        return formula(pick(row_logps), batch, gamma)

    return loss
