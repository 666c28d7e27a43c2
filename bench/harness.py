"""What the benchmarks share: contenders checked against each other, interleaved rounds, medians, floors, peak memory.

Each bench_*.py has `cases(device, quick)` and `measure(case, rounds, ...)`, which returns what `result` makes of one case:

    suite, name    "logits", "linear", "anchor" or "step"; what the case is called in tables
    params         the case in numbers, among them pairs, length, vocabulary, dtype, ignored, data ("random" or "smollm2")
    rounds         how often ours was timed
    times          {contender: {median_ms, quartile_1_ms, quartile_3_ms, min_ms, max_ms, rounds}}
    ratios         {contender: {median, quartile_1, quartile_3}} of its time over ours, round by round
    ratio_spread   {contender: (largest - least) / median} of that median, over thirds of the rounds
    floor          {name, ms, fraction}: the least time that the work can take, and its share of ours; measured in the
                   same run
    parts          where measured, {"forward" or "backward": a summary like those in `times`, of ours, and its floor}
    peak_...       {contender: MiB at the worst moment beyond what the name says, None where it cannot be known}
    page_faults    where measured, {contender: those of one call}
    errors         {contender: {"loss", "gradient"}}: relative, against the reference; the latter of the largest entry
    absent         {contender: why it was not measured}
    goals          where there are some, {contender: the least that its ratio is to be}
    floor_goals    where there are some, {part, or "whole": the least share of its floor that it is to be}
    share_goals    where there are some, {contender: the largest share of the authors' time that it is to take}
    profile        of a GPU where a goal is missed: bench/gpu.py has it
    versions       {package: version}

`write_results` puts cases into bench/results/SUITE-DEVICE.json and, a line for each contender, SUITE-DEVICE.csv.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "python", ROOT):  # the tree that this file lies in, installed or not
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gapo_kernels
from bench.results import csv_of
from gapo_kernels import host_memory

RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "transformers")
REPEATS = 3  # the thirds of a run whose ratios are compared
# Where all calls are this long, none finds what it left in the caches one call ago: they are not run untimed before each
# timing.
LONG_CALL = 0.25
THREADS_REST = 0.02  # seconds after which another process's threads no longer wait busily for more work
LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD = -3  # glibc's
LEAST_MAPPED = 2**20  # bytes
HOST_LEAD_CYCLES = 2_000_000  # about a millisecond
RING_AGAIN = 1.0  # seconds
MIB = 2**20


class Contender(NamedTuple):
    """One way to do a case's work. `prepare` and `restore` are not timed."""

    run: Callable[[Any], object]
    prepare: Callable[[Any], Any] | None = None  # before the call, of the inputs: what `run` is given instead of them
    restore: Callable[[Any], object] | None = None  # after the call: the inputs as they were

    def ready(self, inputs: Any) -> Any:
        return inputs if self.prepare is None else self.prepare(inputs)

    def done(self, inputs: Any) -> None:
        if self.restore is not None:
            self.restore(inputs)

    def seconds(self, inputs: Any, where: torch.device) -> float:
        prepared = self.ready(inputs)
        spent = timed(lambda: self.run(prepared), where)
        self.done(inputs)
        return spent

    def turn(self, inputs: Iterator[Any], where: torch.device, warm: bool) -> float:
        """Seconds of a call with the next of the inputs; where `warm`, after one untimed call."""
        if warm:
            self.seconds(next(inputs), where)
        return self.seconds(next(inputs), where)


Also = Callable[[Contender, Any], object]


def sweep(base: Any, **values: list) -> list:
    """A case, and it with one field at a time taking other values."""
    return [base, *(replace(base, **{name: value}) for name, others in values.items() for value in others)]


def distinct(cases: Iterable[Any]) -> list:
    """Without those whose name an earlier one has."""
    first: dict[str, Any] = {}
    for case in cases:
        first.setdefault(str(case), case)
    return list(first.values())


class Unavailable(Exception):
    """What a case needs is not on this machine; the message says what."""


class OutOfTime(BaseException):
    """No Exception: nothing between the clock and whoever set it may take it for a failure of its own."""


class TooLong(OutOfTime):
    """Of a deadline inside another one, which has time left."""


@contextmanager
def deadline(seconds: float, error: type[OutOfTime] = OutOfTime) -> Iterator[None]:
    """`error` in the block, on the main thread, after so many seconds, and every second from then on while the block
    lasts: Python drops what is raised in a callback of the garbage collector. May stand inside another one: once that
    one is due, its error leaves the block, and comes again if it was caught."""

    def stop(*_):
        raise error

    outer, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    begin = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(min(seconds, outer or seconds), 1e-3), RING_AGAIN)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # also where it rings at the end of the block
        signal.signal(signal.SIGALRM, handler)
        if outer:
            left = outer - (time.monotonic() - begin)
            # Not at once where it rings below: a second ring on the way out would cut off the outer one's own end.
            signal.setitimer(signal.ITIMER_REAL, left if left > 0 else RING_AGAIN, RING_AGAIN)
            if left <= 0:
                signal.raise_signal(signal.SIGALRM)


# ---- where this runs ----


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(where: torch.device | None = None) -> str:
    if (where or device()).type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{model}, {torch.get_num_threads()} threads{', AVX-512' if 'avx512f' in flags else ''}"


def allocator_settings() -> dict[str, str]:
    """glibc's knobs, as the environment sets them: they decide what a fresh tensor the size of the logits costs."""
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"}


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def environment(where: torch.device | None = None) -> dict[str, str | int | dict[str, str]]:
    """What a result must say of where it came from. A tree without git says GAPO_KERNELS_COMMIT of itself."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("describe", "--always")
        if git("status", "--porcelain", "--", "*.py", "Makefile"):  # not what an earlier suite wrote
            commit += "-dirty"
    except FileNotFoundError:
        commit = ""
    found = versions()
    return {
        "device": device_name(where),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": found["triton"],
        "python": platform.python_version(),
        "gapo_kernels": gapo_kernels.__version__,
        "commit": commit or os.environ.get("GAPO_KERNELS_COMMIT", "unknown"),
        "versions": found,
        "allocator": allocator_settings(),
        "autotuned": os.environ.get("GAPO_KERNELS_AUTOTUNE") == "1",
        "measured": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


# ---- processes ----

# On a CPU what was freed before decides what a contender's large tensors cost: where the heap has room, they lie without
# page faults. In a process of its own a case, and of the logits path a contender, does not find what another one left.


def another_process(map_large: bool = False) -> ProcessPoolExecutor:
    """With as many threads as this one. map_large: each large tensor is a mapping of its own there."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _begin_here, (torch.get_num_threads(), map_large))


def _begin_here(count: int, map_large: bool) -> None:
    torch.set_num_threads(count)
    if map_large and hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_MMAP_THRESHOLD, LEAST_MAPPED)  # which no longer grows, then


_ours: tuple[Contender, Any, Any] | None = None  # and its inputs, as they are and as prepared, where a case was measured


def measure_here(suite: str, case: Any, rounds: int, quick: bool) -> dict[str, Any]:
    """The result of the case of a module; ours stays, to be timed once more."""

    def keep(ours: Contender, inputs: Any) -> None:
        global _ours
        _ours = ours, inputs, None

    if quick:
        torch.compiler.set_stance("force_eager")  # compiling takes seconds whatever the shape
    return importlib.import_module(suite).measure(case, rounds, quick=quick, also=keep)


def ready_here() -> None:
    global _ours
    ours, inputs, _ = _ours
    _ours = ours, inputs, ours.ready(inputs)


def run_here() -> None:
    ours, _, prepared = _ours
    ours.run(prepared)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_lodger: tuple[Contender, Iterator[Any], torch.device] | None = None  # whom this process times for another one


def lodge(contender: Contender, inputs: Sequence[Any], where: torch.device) -> None:
    global _lodger
    gc.disable()  # as while rounds are timed
    _lodger = contender, itertools.cycle(inputs), where


def turn_here(warm: bool) -> float:
    contender, inputs, where = _lodger
    return contender.turn(inputs, where, warm)


def faults_here() -> int:
    contender, inputs, where = _lodger
    return page_faults(contender, next(inputs), where)


class Elsewhere(NamedTuple):
    """A contender that lodges in another process, with inputs of its own."""

    process: ProcessPoolExecutor

    def turn(self, inputs: Iterator[Any], where: torch.device, warm: bool) -> float:
        spent = self.process.submit(turn_here, warm).result()
        time.sleep(THREADS_REST)
        return spent

    def page_faults(self) -> int:
        return self.process.submit(faults_here).result()


# ---- time ----


def timed(function: Callable[[], object], where: torch.device) -> float:
    """Seconds of one call, the device's work included.

    A GPU is kept busy while the host issues the call's first launches, as it is in a training loop: what is timed is the
    device's time, unless the call waits for the device or issues its work more slowly than that is done.
    """
    if where.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HOST_LEAD_CYCLES)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def interleaved(
    contenders: dict[str, Contender | Elsewhere],
    inputs: Sequence[Any],
    where: torch.device,
    rounds: int,
    *,
    warmup: int = 1,
    seconds: float | None = None,
    least: int = 2 * REPEATS,
    close: float | None = None,
    further: Container[str] = (),
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, the contenders taking turns so that drift meets all of them.

    In each turn a contender runs once untimed and then timed, as it does in a loop of its own: nobody pays for what
    another left in the caches and page tables. Each call takes the next of `inputs`, equal copies which together exceed a
    GPU's L2 cache (`copies`). After `seconds`, rounds end with the `least` number of them. close: ours, those within this
    factor of it and `further` then have rounds by themselves, at most as many and for as long: few cannot tell them apart.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    last = dict.fromkeys(contenders, 0.0)
    turn = itertools.cycle(inputs)

    def take_turns(names: Iterable[str], warmup: int, least: int) -> None:
        begin = time.perf_counter()
        for number in range(warmup + rounds):
            spent = seconds is not None and time.perf_counter() - begin > seconds
            if spent and number - warmup >= least:
                break
            warm = min(last.values()) < LONG_CALL
            for name in names:
                last[name] = contenders[name].turn(turn, where, warm)
                if number >= warmup:
                    times[name].append(last[name])

    gc.disable()
    try:
        take_turns(contenders, warmup, least)
        if close is not None:
            medians = {name: statistics.median(spent) for name, spent in times.items()}
            near = [name for name in contenders if 1 / close < medians[name] / medians["ours"] < close or name in further]
            take_turns(near, 0, 0)
    finally:
        gc.enable()
    return times


def go_on(times: dict[str, list[float]], contenders: dict[str, Contender | Elsewhere], *args: Any, **options: Any) -> None:
    """Further rounds of some contenders (`interleaved`), into their `times`."""
    for name, spent in interleaved(contenders, *args, **options).items():
        times[name] += spent


def copies(inputs: Any, size: int, clone: Callable[[Any], Any], where: torch.device) -> list[Any]:
    """The inputs of `size` bytes, on a GPU with as many clones as exceed four times its L2 cache together."""
    if where.type != "cuda":
        return [inputs]
    cache = getattr(torch.cuda.get_device_properties(where), "L2_cache_size", 0) or 64 * MIB
    return [inputs, *(clone(inputs) for _ in range(math.ceil(4 * cache / size) - 1))]


def copying(where: torch.device, quick: bool = False) -> tuple[Contender, int]:
    """A copy far larger than any cache, to be timed in turn with what it is the floor of; the bytes it reads and writes."""
    size = 2**20 if quick else 2**30 if where.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=where)
    target = torch.ones_like(source)
    return Contender(lambda _: target.copy_(source)), 2 * size


# ---- statistics ----


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    if len(ordered) == 1:
        return (ordered[0],) * 3
    return tuple(statistics.quantiles(ordered, n=4, method="inclusive"))


def summary(seconds: Sequence[float]) -> dict[str, float]:
    low, middle, high = quartiles(seconds)
    return {
        "median_ms": middle * 1e3,
        "quartile_1_ms": low * 1e3,
        "quartile_3_ms": high * 1e3,
        "min_ms": min(seconds) * 1e3,
        "max_ms": max(seconds) * 1e3,
        "rounds": len(seconds),
    }


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median of the rounds' own ratios, with the quartiles as spread. What was timed in fewer rounds was in the first."""
    low, middle, high = quartiles(a / b for a, b in zip(numerator, denominator))
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def ratio_spread(numerator: Sequence[float], denominator: Sequence[float]) -> float | None:
    """(largest - least) / median over thirds of the rounds, of the `ratio` of each; None below three rounds."""
    count = min(len(numerator), len(denominator))
    if count < REPEATS:
        return None
    edges = [count * number // REPEATS for number in range(REPEATS + 1)]
    repeats = [
        ratio(numerator[start:stop], denominator[start:stop])["median"] for start, stop in itertools.pairwise(edges)
    ]
    return (max(repeats) - min(repeats)) / statistics.median(repeats)


# ---- memory ----


def peak_bytes(function: Callable[[], object], where: torch.device) -> int | None:
    """Bytes held at the worst moment of a call beyond what was held before it; None where that cannot be known."""
    gc.collect()
    host_memory.release()  # a kept gradient would hide its successor
    if where.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)  # what glibc keeps of earlier calls would hide what this one takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts over from what is resident now
        # Without pages of files, code above all, which the system may take and bring back whenever it likes.
        before = _status("VmRSS") - _status("RssFile")
    except OSError:
        function()
        return None
    function()
    return _status("VmHWM") - _status("RssFile") - before


def page_faults(contender: Contender, inputs: Any, where: torch.device) -> int:
    """Those of this process in a call, `prepare` and `restore` included, which read no file: a fresh page is one."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    contender.seconds(inputs, where)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def mebibytes(size: int | None) -> float | None:
    return None if size is None else size / MIB


# ---- results ----


def result(
    suite: str, name: str, params: dict[str, Any], times: dict[str, list[float]], floors: Sequence[str], **more: Any
) -> dict[str, Any]:
    """A case's dict, as the head of this file has it.

    floors: which of `times` no implementation can do without, and are no contenders: the largest is reported. more: further
    keys.
    """
    contenders = [name for name in times if name not in floors and name != "ours"]
    return {
        "suite": suite,
        "name": name,
        "params": params,
        "rounds": len(times["ours"]),
        "times": {name: summary(seconds) for name, seconds in times.items()},
        "ratios": {name: ratio(times[name], times["ours"]) for name in contenders},
        "ratio_spread": {name: ratio_spread(times[name], times["ours"]) for name in contenders},
        "floor": floor(times["ours"], {name: times[name] for name in floors}),
        "versions": versions(),
        **more,
    }


def floor(ours: Sequence[float], floors: dict[str, float | Sequence[float]]) -> dict[str, Any] | None:
    """The largest of the floors, each in seconds, or in seconds of every round, against ours."""
    found = []
    for name, seconds in floors.items():
        rounds = [seconds] * len(ours) if isinstance(seconds, float) else seconds
        found.append({"name": name, "ms": statistics.median(rounds) * 1e3, "fraction": ratio(rounds, ours)["median"]})
        found[-1]["spread"] = ratio_spread(rounds, ours)
    return max(found, key=lambda one: one["ms"], default=None)


def line(case: dict[str, Any]) -> str:
    """A case on one line, for people."""
    text = f"{case['name']:44} ours {case['times']['ours']['median_ms']:9.3f} ms"
    for name, value in case["ratios"].items():
        text += f"   {name} {value['median']:.2f}x ({value['quartile_1']:.2f}-{value['quartile_3']:.2f})"
    if case["floor"] is not None:
        text += f"   {case['floor']['fraction']:.0%} of {case['floor']['name']}"
    for key, peaks in case.items():
        if key.startswith("peak") and peaks["ours"] is not None:
            text += f"   {key.replace('_', ' ')} {peaks['ours']:.1f}"
    return text


def slug(text: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words)


def write_results(
    name: str,
    cases: list[dict],
    where: torch.device | None = None,
    folder: Path = RESULTS,
    origin: dict | None = None,
    **more: Any,
) -> Path:
    """FOLDER/NAME-DEVICE.json and .csv, each replaced as a whole; with an allocator set by hand, under names of their own.

    origin: the environment, where it was asked for before. more: further keys of the JSON file, beside environment,
    command and cases.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = origin or environment(where)
    tuned = "-tuned-allocator" if allocator_settings() else ""
    path = folder / f"{name}-{slug(device_name(where))}{tuned}.json"
    content = {"environment": origin, "command": _command(), **more, "cases": cases}
    _replace(path, json.dumps(content, indent=1) + "\n")
    _replace(path.with_suffix(".csv"), csv_of(content))
    return path


def _command() -> str:
    """How this process was started, less its paths."""
    return " ".join(["python", *(word for word in sys.orig_argv[1:] if not os.path.isabs(word))])


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
