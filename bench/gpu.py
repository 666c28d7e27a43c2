"""Everything about one GPU in one command of at most 8 minutes: its tests, launch parameters, and every benchmark.

    python -m bench.gpu                        # or: make bench-gpu
    python -m bench.gpu --device cpu --quick   # tiny shapes on a CPU: whether everything runs

It needs torch, triton, pytest and numpy; peers and models are measured where their packages are installed, and listed as absent
or left out, with the reason, where they are not. bench/results/gpu-DEVICE.json and .csv are written anew after every case,
so an interrupted run keeps what it has. After an error that leaves the device useless to this process another one goes on
with the next case; a device that does not come back at all ends the run. The JSON file holds `tests` (what ran, how it
ended, and what was printed where that was not well), `tuning` (the launch parameters that the cases were measured with,
and what the others took), `cases`, and the names of those that are missing, with the reason: `left_out` for want of time
or of a package, `failed`, runs of tests among them. `finished` is false until the end. Of a case that missed a goal on a GPU
there is, if time was left, a `profile`: the kernels with the most device time in one call of ours, their milliseconds and
share of the whole.

Exit status: 0; 1 if a run of tests or a case failed; 2 if there is nothing to measure on; 130 after Ctrl-C. Cases that were
left out leave it at 0: the last line printed says MISSING, and names them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import bench_anchor, bench_linear, bench_logits, bench_step, data, harness, tables

SUITES = (bench_logits, bench_step, bench_linear, bench_anchor)  # in order of importance, among equal cases
SECONDS = 450.0
TEST_SHARE = 0.3  # of the time, at most
PROFILE_SHARE = 0.06  # of the time, left by what is measured: why a goal is missed
MOST_PROCESSES = 8  # of tests, side by side
TO_TUNE = 90.0  # seconds
BUSIEST = 10  # kernels of a profile
LAST_START = 5.0  # seconds: no case begins with less time left
TO_SUM_UP = 10.0  # seconds that a run of tests has when its time is over, to say what failed
HUNG = 20.0  # seconds beyond its time, after which a case will not end any more
OUTPUT = 20000  # last characters of what a run of tests printed that did not pass
NONE_RAN = 5  # pytest's return code
QUICK_FOLDER = harness.ROOT / "runs" / "bench"  # git ignores it
# First what only a GPU can show, then every test of the kernels, compiled, then compiled callers.
ELSEWHERE = ["--ignore=tests/compile", "--ignore=tests/distributed", "--ignore=tests/fuzz", "--ignore=tests/trainer"]
TESTS = (
    ["tests/test_gpu.py", "tests/test_anchor.py::test_parameters_on_several_devices"],
    ["tests", *ELSEWHERE, "-m", "kernels", "-k", "triton or test_tuning"],
    ["tests/test_compile_torch.py"],
)


class Session:
    """What one run has found, and its file."""

    def __init__(self, where: torch.device, folder: Path) -> None:
        self.where, self._folder = where, folder
        self.origin = harness.environment(where)
        self.cases: list[dict] = []
        self.found: dict[str, Any] = {"finished": False, "seconds": 0.0, "tests": [], "tuning": {}}
        self.found |= {"left_out": {}, "failed": {}}

    def resume(self, path: Path) -> None:
        """Takes over what another process has found."""
        content = json.loads(path.read_text())
        self.cases = content["cases"]
        self.found = {key: content[key] for key in self.found}

    def names(self) -> set[str]:
        """Of the cases that need not be measured any more."""
        done = {f"{case['suite']}: {case['name']}" for case in self.cases}
        return done | self.found["left_out"].keys() | self.found["failed"].keys()

    def save(self) -> Path:
        return harness.write_results("gpu", self.cases, self.where, self._folder, self.origin, **self.found)


class DeviceLost(Exception):
    """No call to the device succeeds any more in this process."""


def answers(where: torch.device) -> bool:
    try:
        return torch.ones(2, device=where).sum().item() == 2
    except RuntimeError:
        return False


@contextmanager
def not_for_ever(session: Session, name: str, seconds: float) -> Iterator[None]:
    """Ends the process, what there is saved, where the block takes longer: it waits for a device in code of which no
    clock of Python's gets hold."""

    def give_up() -> None:
        session.found["failed"][name] = f"the device did not come back within {seconds:.0f} s"
        print(f"{name}: {session.found['failed'][name]}; written to {session.save()}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---- tests ----


@contextmanager
def interruptible() -> Iterator[None]:
    """What is started in here takes an interrupt, also where this process, in the background of a shell, ignores them."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_tests(arguments: Sequence[str], seconds: float, processes: int = 1) -> dict[str, Any]:
    """pytest in processes of its own, with a part of the tests each: its counts, also of a run that was stopped for want
    of time."""
    command = ["-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "--continue-on-collection-errors", *arguments]
    parts = [[]] if processes == 1 else [[f"--shard={number}/{processes}"] for number in range(1, processes + 1)]
    path = os.pathsep.join(filter(None, [str(harness.ROOT), str(harness.ROOT / "python"), os.environ.get("PYTHONPATH")]))
    # Threads of processes that share their cores wait for each other, and busily.
    threads = {} if processes == 1 else {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    begin = time.perf_counter()
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in parts]
        running = []
        try:
            with interruptible():
                for part, output in zip(parts, outputs):
                    process = subprocess.Popen(
                        [sys.executable, *command, *part],
                        cwd=harness.ROOT,
                        env={**os.environ, "PYTHONPATH": path, **threads},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                    running.append(process)
            ended = wait(running, begin + seconds)
            for process in running:
                if process not in ended:
                    process.send_signal(signal.SIGINT)  # pytest then says what has failed so far
            wait(running, time.perf_counter() + TO_SUM_UP)
        finally:
            for process in running:
                process.kill()
                process.wait()
        texts = []
        for output in outputs:
            output.seek(0)
            texts.append(output.read())
    stopped = len(ended) < len(running)
    statuses = [process.returncode for process in ended if process.returncode]
    status = statuses[0] if statuses else None if stopped else 0
    return {
        "command": " ".join(["python", *command]),
        "processes": processes,
        "seconds": time.perf_counter() - begin,
        "complete": status == 0,
        "status": status,  # the return code, minus the signal's number after one; None where the clock stopped it
        "counts": dict(sum(map(Counter, map(counts_in, texts)), Counter())),
        "failures": re.findall(r"^(?:FAILED|ERROR) (.*)$", "\n".join(texts), re.MULTILINE),
        "output": "" if status == 0 else "\n".join(text[-OUTPUT // processes :] for text in texts),
    }


def wait(running: Sequence[subprocess.Popen], until: float) -> list[subprocess.Popen]:
    """Those that end by then."""
    ended = []
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, until - time.perf_counter()))
            ended.append(process)
    return ended


def counts_in(text: str) -> dict[str, int]:
    """{"passed": 12, ...} from what `pytest -q` printed: its last line, or, if it ended before, its progress."""
    totals = re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed)\b", (text.splitlines() or [""])[-1])
    if totals:
        return {word.removesuffix("s") if word == "errors" else word: int(number) for number, word in totals}
    progress = "".join(re.findall(r"^([.FEsxX]+)(?: *\[ *\d+%\]|(?:Fatal|terminate) .*)?$", text, re.MULTILINE))
    names = {".": "passed", "F": "failed", "s": "skipped", "E": "error", "x": "xfailed", "X": "xpassed"}
    return {name: progress.count(mark) for mark, name in names.items() if mark in progress}


def wrong_with(run: dict[str, Any], where: torch.device) -> str | None:
    """Why a run of tests failed, or None: also of one that the clock stopped. On a CPU those of a GPU are skipped."""
    ran = {word: count for word, count in run["counts"].items() if word != "skipped"}
    if where.type == "cpu" and run["counts"] and not ran and run["status"] in (0, NONE_RAN):
        return None
    if run["status"]:
        return f"ended with return code {run['status']}"
    if not ran:
        return "no test ran"
    return "tests failed" if run["failures"] or ran.get("failed") or ran.get("error") else None


# ---- launch parameters ----


def tune(where: torch.device, quick: bool) -> dict[str, Any]:
    """Finds the launch parameters for this GPU, which the cases then use; kept in a folder of this process alone."""
    if where.type == "cpu":
        return {"absent": "a CPU has none"}
    try:
        from gapo_kernels.kernels import config, tuning
    except ImportError as error:
        return {"absent": str(error)}
    os.environ["GAPO_KERNELS_AUTOTUNE"] = "1"
    try:
        with harness.deadline(TO_TUNE):
            # On more rows than are split over programs. Every dtype that a case has: none is tuned, unrecorded, at its first launch.
            return tuning.tune(where, scratch_bytes=2**22 if quick else 2**32)
    except BaseException:  # the cases are measured with the table's choices, all of them
        os.environ["GAPO_KERNELS_AUTOTUNE"] = "0"
        config.forget()
        raise


# ---- cases ----


def in_order(where: torch.device, quick: bool) -> list[tuple[ModuleType, Any]]:
    every = [(module, case) for module in SUITES for case in module.cases(where, quick)]
    return sorted(every, key=lambda pair: pair[1].importance)  # stable


def measure(session: Session, end: float, rounds: int | None, quick: bool) -> None:
    """Every case in turn that the session has not, until the clock says `end`. Raises DeviceLost."""
    done = session.names()
    for module, case in in_order(session.where, quick):
        name = f"{module.SUITE}: {case}"
        if name in done:
            continue
        left = end - time.monotonic()
        if left < LAST_START:
            session.found["left_out"][name] = "no time was left"
            session.save()
            continue
        torch._dynamo.reset()
        if quick:
            gc.freeze()  # what was imported: each collection would go through it, which takes longer than the calls
        try:
            with not_for_ever(session, name, left + HUNG), harness.deadline(left):
                result = module.measure(
                    case,
                    rounds or module.ROUNDS,
                    session.where,
                    seconds=min(case.seconds, left / 4),
                    quick=quick,
                )
        except harness.Unavailable as reason:
            session.found["left_out"][name] = str(reason)
        except harness.OutOfTime:
            session.found["left_out"][name] = f"not done in the {left:.0f} s that were left"
        except Exception as error:
            session.found["failed"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            if not answers(session.where):
                raise DeviceLost from error
        else:
            session.cases.append(result)
            print(f"{module.SUITE}: {harness.line(result)}", flush=True)
            if result.get("goals") or result.get("floor_goals"):
                print(f"    goals of {tables.goals_of(result)}", flush=True)
        session.save()
        gc.collect()
        if session.where.type == "cuda":
            torch.cuda.empty_cache()
    data.smollm2_states.cache_clear()


def busiest(averages: Iterable[Any]) -> list[dict[str, Any]]:
    """Of a profiler's averages those with the most device time."""
    times: Counter[str] = Counter()
    for one in averages:
        times[one.key] += one.self_device_time_total / 1e3
    whole = times.total()
    return [{"name": name, "ms": spent, "share": spent / whole} for name, spent in times.most_common(BUSIEST) if spent]


def profile(ours: harness.Contender, inputs: Any) -> list[dict[str, Any]]:
    """The busiest kernels of one call."""
    prepared = ours.ready(inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        ours.run(prepared)
        torch.cuda.synchronize()
    ours.done(inputs)
    return busiest(seen.key_averages())


def explain(session: Session, end: float, quick: bool) -> None:
    """Profiles of ours where a goal is missed, until the clock says `end`. After everything else: once profiled, a process
    may launch kernels more slowly."""
    missed = {f"{case['suite']}: {case['name']}": case for case in session.cases if tables.misses(case)}
    for module, case in in_order(session.where, quick):
        name, left = f"{module.SUITE}: {case}", end - time.monotonic()
        if name not in missed or left < LAST_START:
            continue
        found: list[Any] = []
        alone = replace(case, peers=frozenset()) if hasattr(case, "peers") else case
        try:
            with not_for_ever(session, f"profile of {name}", left + HUNG), harness.deadline(left):
                module.measure(
                    alone, 1, session.where, seconds=0.0, quick=quick, also=lambda *ours: found.append(profile(*ours))
                )
        except (Exception, harness.OutOfTime) as error:
            print(f"no profile of {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            missed[name]["profile"] = found[0]
            session.save()


def prepare(session: Session, end: float, tests: Sequence[Sequence[str]], quick: bool) -> None:
    """Tests, until the clock says `end`, and launch parameters."""
    tests = tests[:1] if quick else tests
    for number, arguments in enumerate(tests):
        # What needs a GPU of its own comes first; the others mostly wait for compilers.
        processes = 1 if number == 0 else max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
        run = run_tests(arguments, (end - time.monotonic()) / (len(tests) - number), processes)
        session.found["tests"].append(run)
        name, wrong = f"tests: {' '.join(arguments)}", wrong_with(run, session.where)
        stopped = None if run["status"] is not None else f"stopped after {run['seconds']:.0f} s: not all ran"
        if wrong is not None:
            session.found["failed"][name] = wrong
        elif stopped is not None:
            session.found["left_out"][name] = stopped
        print(f"tests: {', '.join(filter(None, [str(run['counts']), wrong or stopped]))}", flush=True)
        session.save()
    try:
        with not_for_ever(session, "tuning", TO_TUNE + HUNG):
            session.found["tuning"] = tune(session.where, quick)
    except harness.OutOfTime:
        session.found["left_out"]["tuning"] = f"not done in {TO_TUNE:.0f} s; measured with the table's parameters"
    except Exception as error:
        session.found["failed"]["tuning"] = f"{type(error).__name__}: {error}"
    session.origin["autotuned"] = os.environ.get("GAPO_KERNELS_AUTOTUNE") == "1"
    session.save()
    if not answers(session.where):  # no case's fault
        raise DeviceLost


def missing(name: str) -> str | None:
    """Why nothing can be measured on that device, or None."""
    absent = [package for package in ("triton", "pytest", "numpy") if importlib.util.find_spec(package) is None]
    if absent and name != "cpu":
        return f"this needs {', '.join(absent)}"
    if name == "cuda" and not torch.cuda.is_available():
        built = "this build of torch has no CUDA" if torch.version.cuda is None and torch.version.hip is None else "no GPU"
        return f"{built}: torch.cuda.is_available() is False. `make bench` measures a CPU"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether everything runs, not how fast")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    parser.add_argument("--rounds", type=int, help="measured rounds of each contender, at most; each suite has a default")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--resume", type=Path, metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="folder for the files; by default bench/results, runs/bench if quick")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    reason = missing(options.device)
    if reason is None and options.device == "cpu" and not options.quick:
        reason = "a CPU is measured by `make bench`; here only --quick, to see that everything runs"
    if reason is not None:
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return 2

    where = torch.device(options.device, torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    session = Session(where, options.output or (QUICK_FOLDER if options.quick else harness.RESULTS))
    if options.resume:
        session.resume(options.resume)
    print(f"{harness.device_name(where)}, at most {options.seconds:.0f} s", flush=True)
    if options.quick:
        torch.compiler.set_stance("force_eager")  # compiling takes seconds whatever the shape
    end = begin + options.seconds
    folder = os.environ["GAPO_KERNELS_CACHE_DIR"] if options.resume else tempfile.mkdtemp()
    os.environ["GAPO_KERNELS_CACHE_DIR"] = folder
    try:
        if not options.resume:
            prepare(session, begin + TEST_SHARE * options.seconds, () if options.no_tests else TESTS, options.quick)
        profiles = PROFILE_SHARE * options.seconds if where.type == "cuda" else 0.0
        measure(session, end - profiles, options.rounds or (3 if options.quick else None), options.quick)
        if where.type == "cuda":
            explain(session, end, options.quick)
    except DeviceLost:
        print("the device is lost to this process; another one goes on", file=sys.stderr, flush=True)
        session.found["seconds"] += time.monotonic() - begin
        given = sys.argv[1:] if arguments is None else arguments
        again = ["--resume", str(session.save()), "--seconds", f"{end - time.monotonic():.1f}"]
        os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *given, *again])
    except KeyboardInterrupt:
        print(f"interrupted; what there is was written to {session.save()}", file=sys.stderr)
        return 130
    finally:  # which is not reached where another process goes on
        shutil.rmtree(folder, ignore_errors=True)
    session.found["finished"] = True
    session.found["seconds"] += time.monotonic() - begin
    print(f"written to {session.save()}")
    for kind in ("left_out", "failed"):
        for name, why in session.found[kind].items():
            print(f"{kind.replace('_', ' ')}: {name}: {why}")
    every = [f"{module.SUITE}: {case}" for module, case in in_order(where, options.quick)]
    unmeasured = set(every) - {f"{case['suite']}: {case['name']}" for case in session.cases}
    if unmeasured:
        print(f"MISSING, {len(unmeasured)} of {len(every)} cases: {'; '.join(name for name in every if name in unmeasured)}")
    return 1 if session.found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
