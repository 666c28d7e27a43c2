"""Everything about one GPU in one command of at most 8 minutes: its tests, launch parameters, and every benchmark.

    python -m bench.gpu                        # or: make bench-gpu
    python -m bench.gpu --device cpu --quick   # tiny shapes on a CPU: whether everything runs

It needs torch, triton and pytest; peers and models are measured where their packages are installed, and listed as absent
or left out, with the reason, where they are not. bench/results/gpu-DEVICE.json and .csv are written anew after every case,
so an interrupted run keeps what it has. The JSON file holds `tests` (what ran, how it ended), `tuning` (the launch parameters
that the cases were measured with, and what the others took), `cases`, and the names of those that are missing, with the
reason: `left_out` for want of time or of a package, `failed`, runs of tests among them. `finished` is false until the end.

Exit status: 0; 1 if a run of tests or a case failed; 2 if there is nothing to measure on; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import bench_anchor, bench_linear, bench_logits, bench_step, data, harness

SUITES = (bench_logits, bench_step, bench_linear, bench_anchor)  # in order of importance, among equal cases
SECONDS = 450.0
TEST_SHARE = 0.3  # of the time, at most
TO_TUNE = 90.0  # seconds
LAST_START = 5.0  # seconds: no case begins with less time left
NONE_RAN = 5  # pytest's return code
QUICK_FOLDER = harness.ROOT / "runs" / "bench"  # git ignores it
# First what only a GPU can show, then every test of the kernels, compiled.
ELSEWHERE = ["--ignore=tests/compile", "--ignore=tests/distributed", "--ignore=tests/fuzz", "--ignore=tests/trainer"]
TESTS = (["tests/test_gpu.py"], ["tests", *ELSEWHERE, "-m", "kernels", "-k", "triton"])


class Session:
    """What one run has found, and its file."""

    def __init__(self, where: torch.device, folder: Path) -> None:
        self.where, self._folder = where, folder
        self.origin = harness.environment(where)
        self.cases: list[dict] = []
        self.found: dict[str, Any] = {"finished": False, "tests": [], "tuning": {}, "left_out": {}, "failed": {}}

    def save(self) -> Path:
        return harness.write_results("gpu", self.cases, self.where, self._folder, self.origin, **self.found)


# ---- tests ----


def run_tests(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """pytest in a process of its own: its counts, also of a run that was stopped for want of time."""
    command = ["-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "--continue-on-collection-errors", *arguments]
    path = os.pathsep.join(filter(None, [str(harness.ROOT), str(harness.ROOT / "python"), os.environ.get("PYTHONPATH")]))
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=harness.ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        text = output.read()
    return {
        "command": " ".join(["python", *command]),
        "seconds": time.perf_counter() - begin,
        "complete": status == 0,
        "status": status,  # the return code, minus the signal's number after one; None where the clock stopped it
        "counts": counts_in(text),
        "failures": re.findall(r"^(?:FAILED|ERROR) (.*)$", text, re.MULTILINE),
    }


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
        from gapo_kernels.kernels import tuning
    except ImportError as error:
        return {"absent": str(error)}
    os.environ["GAPO_KERNELS_AUTOTUNE"] = "1"
    with harness.deadline(TO_TUNE):
        # On as much as a large batch has.
        return tuning.tune(where, [torch.bfloat16, torch.float32], scratch_bytes=2**22 if quick else 2**30)


# ---- cases ----


def in_order(where: torch.device, quick: bool) -> list[tuple[ModuleType, Any]]:
    every = [(module, case) for module in SUITES for case in module.cases(where, quick)]
    return sorted(every, key=lambda pair: pair[1].importance)  # stable


def measure(session: Session, end: float, rounds: int | None, quick: bool) -> None:
    """Every case in turn, until the clock says `end`."""
    for module, case in in_order(session.where, quick):
        name = f"{module.SUITE}: {case}"
        left = end - time.monotonic()
        if left < LAST_START:
            session.found["left_out"][name] = "no time was left"
            session.save()
            continue
        torch._dynamo.reset()
        try:
            with harness.deadline(left):
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
        else:
            session.cases.append(result)
            print(f"{module.SUITE}: {harness.line(result)}", flush=True)
        session.save()
        gc.collect()
        if session.where.type == "cuda":
            torch.cuda.empty_cache()
    data.smollm2_states.cache_clear()


def missing(name: str) -> str | None:
    """Why nothing can be measured on that device, or None."""
    absent = [package for package in ("triton", "pytest") if importlib.util.find_spec(package) is None]
    if absent and name != "cpu":
        return f"this needs {' and '.join(absent)}"
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
    print(f"{harness.device_name(where)}, at most {options.seconds:.0f} s", flush=True)
    if options.quick:
        torch.compiler.set_stance("force_eager")  # compiling takes seconds whatever the shape
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["GAPO_KERNELS_CACHE_DIR"] = folder
            for number, tests in enumerate(TESTS[:1] if options.quick else TESTS):
                if options.no_tests:
                    break
                left = begin + TEST_SHARE * options.seconds - time.monotonic()
                run = run_tests(tests, left / (len(TESTS) - number))
                session.found["tests"].append(run)
                wrong = wrong_with(run, where)
                if wrong is not None:
                    session.found["failed"][f"tests: {' '.join(tests)}"] = wrong
                stopped = "" if run["status"] is not None else f", stopped after {run['seconds']:.0f} s: not all ran"
                print(f"tests: {run['counts']}{stopped if wrong is None else f', {wrong}'}", flush=True)
                session.save()
            try:
                session.found["tuning"] = tune(where, options.quick)
            except (Exception, harness.OutOfTime) as error:
                session.found["failed"]["tuning"] = f"{type(error).__name__}: {error}"
            session.save()
            measure(session, begin + options.seconds, options.rounds or (3 if options.quick else None), options.quick)
    except KeyboardInterrupt:
        print(f"interrupted; what there is was written to {session.save()}", file=sys.stderr)
        return 130
    session.found["finished"] = True
    session.found["seconds"] = time.monotonic() - begin
    print(f"written to {session.save()}")
    for kind in ("left_out", "failed"):
        for name, why in session.found[kind].items():
            print(f"{kind.replace('_', ' ')}: {name}: {why}")
    return 1 if session.found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
