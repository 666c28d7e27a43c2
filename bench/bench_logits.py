"""Logits path: loss from policy and anchor logits, forward and backward, against what else computes it.

Contenders, on the same tensors and in turns:
    ours        fused_gapo_loss
    eager       what preference trainers do, the authors' included: logits[:, :-1].log_softmax(-1).gather(labels[:, 1:])
    eager-view  a stronger eager: the labels are shifted instead of the logits, which saves the copy of the slice
    compiled    torch.compile of eager-view
    trl         TRL's selective log-softmax, on a GPU its fused log-prob kernel
    liger       Liger's cross-entropy kernel without reduction (GPU only)

Floors: the bytes that must move (policy and anchor read once forward, the policy once more backward, of the kept rows; the
gradient written, of all rows on a GPU, on a CPU, whose system hands out zeros, of the kept ones) at the bandwidth of a
copy, and on a CPU three passes of the exponential over the kept logits, in cache and on all threads: policy, anchor,
gradient.

On a CPU each peer has a process of its own, and ours the one that makes the batch and times the floors. In a heap where
another one has freed much, a peer's tensors may lie without page faults: TRL's rows leave room for eager's, say.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import data, harness, peers
from gapo_kernels import fused_gapo_loss, reference, threads

SUITE = "logits"
ROUNDS = 400
FURTHER = 1.5  # how long ours and who has a goal go on by themselves, on a CPU, of the time of the rounds with everybody
GAMMA = 0.5
UNEVEN = 0.3  # how far the prompts' lengths reach to either side of their mean, of it or of what is left beside it
LEAST_TIMED = 2**27  # exponentials
BLOCK = 2**16  # float32 elements of an exponential's block: input and output fit a core's L2 cache
COMPILED, SELECTIVE = frozenset({"compiled", "trl", "liger"}), frozenset({"trl", "liger"})


@dataclass(frozen=True)
class Case:
    pairs: int
    length: int | None  # None: that of the real pairs
    vocabulary: int
    dtype: torch.dtype
    ignored: float | None  # share of the rows, prompts of several lengths; None: as the real pairs have it
    data: str = "random"
    peers: frozenset[str] = COMPILED
    importance: int = 0  # 0 has a goal; the larger, the sooner it is left out where time is short
    seconds: float = 12.0
    goals: dict[str, float] = field(default_factory=dict)  # contender: how many times ours its time is to be, at least
    floor_goals: dict[str, float] = field(default_factory=dict)  # part: the least share of its floor

    def __str__(self) -> str:
        if self.data != "random":
            return f"{self.data}, {self.pairs} pairs, {str(self.dtype)[6:]}"
        return f"{[2 * self.pairs, self.length, self.vocabulary]} {str(self.dtype)[6:]} {self.ignored:.0%} ignored"


class Batch(NamedTuple):
    logits: torch.Tensor  # (2B, T, V)
    labels: torch.Tensor  # (2B, T)
    anchor_logits: torch.Tensor  # (2B, T, V)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def cases(where: torch.device, quick: bool = False) -> list[Case]:
    if quick:
        tiny = Case(1, 8, 211, F32, 0.5)
        return [tiny, replace(tiny, dtype=BF16), Case(1, None, 49152, F32, None, "smollm2", SELECTIVE)]
    if where.type == "cpu":
        base = Case(2, 128, 32000, F32, 0.5, importance=2, seconds=10)
        wanted = [
            Case(2, 256, 32000, F32, 0.0, seconds=60, goals={"eager": 4}),
            Case(2, 256, 32000, F32, 0.5, seconds=60, goals={"eager": 6.5}),
            Case(2, 256, 32000, BF16, 0.5, seconds=60, goals={"eager": 3.5}),
            Case(2, 128, 128256, F32, 0.5, seconds=60, goals={"eager": 8}),
            Case(4, None, 49152, F32, None, "smollm2", importance=1, seconds=40),
            *harness.sweep(
                base,
                vocabulary=[4096, 50257, 128256],
                length=[64, 256],
                ignored=[0.0, 0.9],
                pairs=[1, 4],
                dtype=[BF16],
            ),
        ]
    else:
        base = Case(4, 1024, 32000, BF16, 0.5, peers=SELECTIVE, importance=2, seconds=2)
        halves = {"forward": 0.85, "backward": 0.85}
        wanted = [
            Case(4, 1024, 128256, BF16, 0.0, goals={"eager": 4, "compiled": 1.5}, floor_goals=halves),
            # TRL's own benchmark has as many tokens and this vocabulary.
            Case(4, 1024, 151936, BF16, 0.0, goals={"eager": 4, "compiled": 1.5, "trl": 1}, floor_goals=halves),
            Case(4, 1024, 128256, BF16, 0.5, peers=SELECTIVE, importance=1, seconds=5),
            Case(4, 1024, 50257, BF16, 0.0, peers=SELECTIVE, importance=1, seconds=5),
            Case(4, 1024, 128256, F32, 0.0, peers=SELECTIVE, importance=1, seconds=5),
            Case(16, None, 49152, BF16, None, "smollm2", importance=1, seconds=5),
            *harness.sweep(
                base,
                vocabulary=[4096, 50257, 128256, 262144],
                length=[256, 4096],
                ignored=[0.0, 0.9],
                pairs=[1, 16],
                dtype=[F32, F16],
            ),
        ]
    return harness.distinct(wanted)


def make_batch(case: Case, where: torch.device, quick: bool) -> Batch:
    if case.data == "smollm2":
        states = data.smollm2_states(case.pairs, where, quick)
        logits, anchor_logits = ((x @ states.weight.T).to(case.dtype) for x in (states.hidden, states.anchor_hidden))
        return Batch(logits.requires_grad_(), states.labels, anchor_logits)
    generator = torch.Generator(where).manual_seed(0)
    shape = (2 * case.pairs, case.length, case.vocabulary)
    logits = torch.empty(shape, dtype=case.dtype, device=where).normal_(std=3, generator=generator)
    anchor_logits = torch.empty_like(logits).normal_(std=0.01, generator=generator).add_(logits)
    labels = torch.randint(case.vocabulary, shape[:2], device=where, generator=generator)
    uneven = UNEVEN * torch.linspace(-1, 1, 2 * case.pairs) * min(case.ignored, 1 - case.ignored)
    prompts = case.length * (case.ignored + uneven)
    labels[torch.arange(case.length, device=where) < prompts.round().to(where).unsqueeze(-1)] = -100
    targets, lift = peers.shifted(labels).clamp(min=0).unsqueeze(-1), peers.pessimism(labels).to(case.dtype).unsqueeze(-1)
    anchor_logits.scatter_add_(-1, targets, lift.expand(targets.shape))
    return Batch(logits.requires_grad_(), labels, anchor_logits)


def with_other_prompts(batch: Batch) -> list[Batch]:
    """The batch, and the same logits with prompts passed on from sequence to sequence: as many kept rows, but others. On a
    CPU, where a gradient's memory is kept, what was written becomes zeros, and other pages are touched."""
    kept, ids = batch.labels != -100, batch.labels.clamp(min=0)
    others = (torch.where(kept.roll(turns, 0), ids, -100) for turns in range(1, len(ids)))
    return [batch, *(batch._replace(labels=labels) for labels in others)]


def clone(batch: Batch) -> Batch:
    logits, labels, anchor_logits = (tensor.detach().clone() for tensor in batch)
    return Batch(logits.requires_grad_(), labels, anchor_logits)


def ours(batch: Batch) -> torch.Tensor:
    return fused_gapo_loss(
        batch.logits, batch.labels, anchor_logits=batch.anchor_logits, beta=peers.BETA, gamma=GAMMA
    ).loss


def reference_of(batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient (2B, T, V), in float64, a pair at a time, to save memory; the gradient is kept in float32."""
    pairs = batch.labels.shape[0] // 2
    total, gradient = 0.0, torch.empty_like(batch.logits, dtype=torch.float32)
    for pair in range(pairs):
        both = [pair, pairs + pair]
        logits = batch.logits.detach()[both].double().requires_grad_()
        out = reference.fused_gapo_loss(
            logits, batch.labels[both], anchor_logits=batch.anchor_logits[both].double(), beta=peers.BETA, gamma=GAMMA
        )
        gradient[both] = torch.autograd.grad(out.loss / pairs, logits)[0].float()
        total += out.loss.item() / pairs
    return total, [gradient.detach()]


def expected(batch: Batch, known: tuple[float, list[torch.Tensor]] | None = None) -> peers.Expected:
    """known: what `reference_of` says."""
    targets = peers.shifted(batch.labels).clamp(min=0).unsqueeze(-1)
    tolerances = (1e-5, 1e-4) if batch.logits.dtype == F32 else (1e-2, 0.25)
    return peers.Expected(*(known or reference_of(batch)), lambda _, gradient: gradient.scatter_(-1, targets, 0.0), *tolerances)


PEERS = {
    "eager": partial(peers.eager_from_logits, GAMMA, sliced=True),
    "eager-view": partial(peers.eager_from_logits, GAMMA, sliced=False),
    "compiled": lambda: peers.compiled(peers.eager_from_logits(GAMMA, sliced=False)),
    "trl": partial(peers.trl_from_logits, GAMMA),
    "liger": partial(peers.liger_from_logits, GAMMA),
}


def losses(
    case: Case, batch: Batch, where: torch.device
) -> tuple[dict[str, peers.Loss], dict[str, Callable[[], peers.Loss]]]:
    """Our own, and functions that make the others'."""
    return {"ours": ours}, PEERS


def drop_gradient(used: Batch) -> None:
    used.logits.grad = None


def check(
    names: Iterable[str], batch: Batch, exact: peers.Expected, where: torch.device
) -> tuple[peers.Checked, dict[str, harness.Contender]]:
    """Those that compute what is expected, ready to be timed."""
    pristine = batch.logits.detach().clone() if "liger" in names else None

    def mend(used: Batch) -> None:
        with torch.no_grad():
            used.logits.copy_(pristine)

    def drop_and_mend(used: Batch) -> None:
        drop_gradient(used)
        mend(used)

    found = peers.checked(
        {"ours": ours} if "ours" in names else {},
        {name: make for name, make in PEERS.items() if name in names},
        batch,
        [batch.logits],
        exact,
        where,
        restore=lambda name: mend(batch) if name == "liger" else None,
    )
    return found, {
        name: harness.Contender(
            lambda inputs, loss=loss: loss(inputs).backward(), restore=drop_and_mend if name == "liger" else drop_gradient
        )
        for name, loss in found.losses.items()
    }


def lodge(name: str, file: Path) -> peers.Checked:
    """A peer in this process, to be timed with the batch in the file, whose reference lies there, too; less its loss."""
    content = torch.load(file)
    batch = Batch(**content["batch"])
    batch.logits.requires_grad_()
    cpu = torch.device("cpu")
    found, contenders = check([name], batch, expected(batch, content["known"]), cpu)
    for contender in contenders.values():
        harness.lodge(contender, with_other_prompts(batch), cpu)
    return found._replace(losses={})


def check_elsewhere(
    names: Sequence[str], batch: Batch, known: tuple[float, list[torch.Tensor]], until_measured: ExitStack
) -> tuple[peers.Checked, dict[str, harness.Elsewhere]]:
    """`check` of peers, each in a process that `until_measured` ends."""
    processes = {name: until_measured.enter_context(harness.another_process()) for name in names}
    wait([process.submit(torch.get_num_threads) for process in processes.values()])  # they start side by side
    found, contenders = peers.Checked({}, {}, {}, {}), {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "batch.pt")
        torch.save({"batch": {name: one.detach() for name, one in batch._asdict().items()}, "known": known}, file)
        for name, process in processes.items():
            try:
                one = process.submit(lodge, name, file).result()
            except BrokenProcessPool:
                found.absent[name] = "its process died"
                continue
            if name not in one.absent:
                contenders[name] = harness.Elsewhere(process)
            for whole, part in zip(found, one):
                whole.update(part)
    return found, contenders


def measure(
    case: Case,
    rounds: int = ROUNDS,
    where: torch.device | None = None,
    *,
    seconds: float | None = None,
    quick: bool = False,
    also: harness.Also | None = None,
) -> dict:
    """One case's result (harness.py says what it holds). seconds: about how long the timed rounds may take. also: called
    in the end with the contender that is ours, and inputs for it."""
    where = where or harness.device()
    seconds = case.seconds if seconds is None else seconds
    with ExitStack() as until_measured:
        return _measure(case, rounds, where, seconds, quick, also, until_measured)


def _measure(
    case: Case,
    rounds: int,
    where: torch.device,
    seconds: float,
    quick: bool,
    also: harness.Also | None,
    until_measured: ExitStack,
) -> dict:
    batch = make_batch(case, where, quick)
    on_cpu = where.type == "cpu"
    wanted = [name for name in PEERS if name in {"eager", "eager-view", *case.peers}]
    if on_cpu:
        wanted = [name for name in wanted if name != "liger"]
    elsewhere: dict[str, harness.Elsewhere] = {}
    if on_cpu and not quick:
        known = reference_of(batch)
        found, contenders = check(["ours"], batch, expected(batch, known), where)
        others, elsewhere = check_elsewhere(wanted, batch, known, until_measured)
        del known
        for whole, part in zip(found, others):
            whole.update(part)
        contenders |= elsewhere
    else:
        found, contenders = check(["ours", *wanted], batch, expected(batch), where)
    if on_cpu and "liger" in case.peers:
        found.absent["liger"] = "runs on a GPU only"
    halves = {
        "forward": harness.Contender(ours),
        "backward": harness.Contender(lambda loss: loss.backward(), prepare=ours, restore=drop_gradient),
    }
    everything = batch.logits.numel() * batch.logits.element_size()
    kept = int((batch.labels[:, 1:] != -100).sum())
    kept_bytes = kept * batch.logits.shape[-1] * batch.logits.element_size()
    written = kept_bytes if on_cpu else everything
    copy, copied = harness.copying(where, quick)
    passes = {"copy": copy}
    inputs = with_other_prompts(batch) if on_cpu else harness.copies(batch, 2 * everything, clone, where)
    if on_cpu:
        # At least some 50 ms of them, whatever the case: fewer would show how threads wake up.
        count = 3 * kept * batch.logits.shape[-1]
        repeats = -(-LEAST_TIMED // count)
        passes["three exponentials"] = exponentials(repeats * count, where)
    times = harness.interleaved({**contenders, **passes}, inputs, where, rounds, seconds=seconds)
    more = {}
    if on_cpu:
        if case.goals and not harness.allocator_settings():
            # What a fresh page costs moves a lot: ours and who has a goal take turns for longer.
            pair = {name: contenders[name] for name in ("ours", *case.goals) if name in contenders}
            harness.go_on(times, pair, inputs, where, rounds, seconds=FURTHER * seconds)
        more["page_faults"] = {"ours": harness.page_faults(contenders["ours"], batch, where)}
        more["page_faults"] |= {name: one.page_faults() for name, one in elsewhere.items()}
    bandwidth = copied / statistics.median(times["copy"])
    least = {"copy": (3 * kept_bytes + written) / copied}
    if on_cpu:
        least["three exponentials"] = 1 / repeats
    times |= {name: [part * spent for spent in times[name]] for name, part in least.items()}
    half_times = harness.interleaved(halves, inputs, where, rounds, seconds=seconds / 4)
    if also is not None:
        also(contenders["ours"], batch)
    until_measured.close()
    share = {"forward": 2 / 3, "backward": 1 / 3}
    half_bytes = {"forward": 2 * kept_bytes, "backward": kept_bytes + written}
    parts = {
        name: {
            **harness.summary(spent),
            "floor": harness.floor(
                spent,
                {"copy": half_bytes[name] / bandwidth}
                | {floor: share[name] * statistics.median(times[floor]) for floor in least if floor != "copy"},
            ),
        }
        for name, spent in half_times.items()
    }
    return harness.result(
        SUITE,
        str(case),
        {
            "pairs": case.pairs,
            "length": batch.labels.shape[1],
            "vocabulary": batch.logits.shape[-1],
            "dtype": str(case.dtype)[6:],
            "ignored": 1 - kept / batch.labels[:, 1:].numel() if case.ignored is None else case.ignored,
            "data": case.data,
        },
        times,
        list(least),
        parts=parts,
        copy_bandwidth_gb_per_s=bandwidth / 1e9,
        peak_beyond_inputs_mib=found.peaks or (peers.quick_peaks(__name__, case, contenders) if quick else {}),
        errors=found.errors,
        absent=found.absent,
        goals=case.goals,
        floor_goals=case.floor_goals,
        **more,
    )


def exponentials(count: int, where: torch.device) -> harness.Contender:
    """exp2, torch's fastest, of `count` float32 values, block by block in cache, on all threads."""
    blocks = [BLOCK] * (count // BLOCK) + [count % BLOCK]

    def drain(queue: Iterator[int]) -> None:
        source, target = torch.zeros(BLOCK), torch.empty(BLOCK)
        for size in queue:
            torch.exp2(source[:size], out=target[:size])

    return harness.Contender(lambda _: threads.share(blocks, drain, where))


def bench_logits(case, measured):
    measured(case)
