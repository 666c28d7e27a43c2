"""The benchmarks' own machinery: what is measured, checked and written. No test looks at how long anything took."""

import csv
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # takes long, and an alarm in the midst of it would leave half of it

from bench import anchor_rounding, bench_anchor, bench_linear, bench_logits, bench_step, gpu, harness, llama, peers, tables

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CLEAR_REFS = Path("/proc/self/clear_refs")
STATISTICS = {"median_ms", "quartile_1_ms", "quartile_3_ms", "min_ms", "max_ms", "rounds"}


@pytest.fixture(autouse=True)
def this_process_is_the_tests(monkeypatch):
    """Quick runs in it change neither what is compiled nor what the garbage collector looks at."""
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)


def run_gpu(*arguments):
    # On shapes so small a second thread only waits for the first.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_one_command_measures_every_suite_and_writes_it(tmp_path):
    done = run_gpu("--device", "cpu", "--quick", "--no-tests", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("gpu-*.json")
    content = json.loads(file.read_text())
    assert content["finished"] and not content["failed"] and set(content["tuning"]) == {"absent"}
    assert {"device", "commit", "versions"} <= content["environment"].keys()
    cases = content["cases"]
    # Of the real pairs' cases may be missing what needs a package; the others run with torch alone.
    assert len(cases) + len(content["left_out"]) == len(gpu.in_order(CPU, quick=True))
    assert {case["suite"] for case in cases} == {"logits", "linear", "anchor", "step"}
    for case in cases:
        ours = case["times"]["ours"]
        assert all(set(times) == STATISTICS for times in case["times"].values())
        assert 0 < ours["min_ms"] <= ours["quartile_1_ms"] <= ours["median_ms"] <= ours["quartile_3_ms"] <= ours["max_ms"]
        floors = {case["floor"]["name"]} if case["floor"] else set()
        assert set(case["ratios"]) | {"ours"} == set(case["times"]) - floors - {"three exponentials", "copy"}
        assert case["ratios"].keys() == case["ratio_spread"].keys()
        assert case["floor"] is None or 0 < case["floor"]["fraction"]
        (peaks,) = (value for key, value in case.items() if key.startswith("peak"))
        assert set(peaks) == {"ours", *case["ratios"]}
        assert None not in peaks.values() or not CLEAR_REFS.exists()
        assert not case["absent"].keys() & case["times"].keys()
        assert case["versions"]["torch"]
    with file.with_suffix(".csv").open() as lines:
        rows = list(csv.DictReader(lines))
    found = {(row["suite"], row["name"], row["contender"]): row for row in rows}
    assert len(found) == len(rows) == sum(len(case["times"]) + len(case.get("parts", {})) for case in cases)
    for case in cases:
        for name, times in case["times"].items():
            row = found[case["suite"], case["name"], name]
            assert float(row["median_ms"]) == times["median_ms"]
            assert row["dtype"] == case["params"]["dtype"] and row["commit"] and row["device"] and row["measured"]
            assert row["torch"] == torch.__version__ and row["transformers"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments, message", [([], "torch.cuda.is_available() is False"), (["--device", "cpu"], "measured by `make bench`")]
)
def test_without_a_gpu_it_says_so(arguments, message):
    pytest.importorskip("triton")
    done = run_gpu(*arguments)
    assert done.returncode == 2 and message in done.stderr


def result_of(name):
    times = {"ours": [1.0, 2.0], "peer": [2.0, 8.0], "copy": [0.5, 0.5]}
    return harness.result("suite", name, {"dtype": "float32"}, times, ["copy"], peak_mib={"ours": 1.0}, absent={})


@pytest.fixture
def session(tmp_path, monkeypatch):
    session = gpu.Session(CPU, tmp_path)

    def run(measure, names=("first", "second", "third"), seconds=60.0):
        module = SimpleNamespace(
            SUITE="suite",
            ROUNDS=1,
            measure=measure,
            cases=lambda where, quick: [Named(name, number) for number, name in enumerate(names)],
        )
        monkeypatch.setattr(gpu, "SUITES", (module,))
        gpu.measure(session, time.monotonic() + seconds, None, False)
        (file,) = tmp_path.glob("*.json")
        return json.loads(file.read_text())

    return run


class Named(str):
    def __new__(cls, name, importance):
        case = super().__new__(cls, name)
        case.importance, case.seconds = importance, 1.0
        return case


def test_what_fails_or_cannot_run_is_named_and_the_rest_is_measured(session):
    def measure(case, *args, **options):
        if case == "first":
            raise harness.Unavailable("it needs a package")
        if case == "second":
            raise ValueError("no")
        return result_of(case)

    content = session(measure)
    assert content["left_out"] == {"suite: first": "it needs a package"}
    assert content["failed"] == {"suite: second": "ValueError: no"}
    assert [case["name"] for case in content["cases"]] == ["third"] and not content["finished"]


@pytest.mark.parametrize(
    "error, kind, said",
    [(RuntimeError("out of memory"), "failed", "RuntimeError: out of memory"), (harness.OutOfTime(), "left_out", "not done in 90 s")],
)
def test_without_launch_parameters_everything_else_is_measured(error, kind, said, tmp_path, monkeypatch):
    def tune(*_):
        raise error

    monkeypatch.setattr(gpu, "tune", tune)
    monkeypatch.setitem(os.environ, "GAPO_KERNELS_CACHE_DIR", "")
    suite = SimpleNamespace(SUITE="suite", ROUNDS=1, measure=lambda case, *_, **options: result_of(case))
    suite.cases = lambda where, quick: [Named("only", 0)]
    monkeypatch.setattr(gpu, "SUITES", (suite,))
    status = gpu.main(["--device", "cpu", "--quick", "--no-tests", "--output", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert content[kind].keys() == {"tuning"} and said in content[kind]["tuning"] and content["finished"]
    assert status == (1 if kind == "failed" else 0)
    assert [case["name"] for case in content["cases"]] == ["only"]


def test_the_last_line_names_the_cases_that_are_missing(tmp_path, monkeypatch, capsys):
    def measure(case, *_, **options):
        if case == "second":
            raise harness.OutOfTime
        return result_of(case)

    suite = SimpleNamespace(SUITE="suite", ROUNDS=1, measure=measure)
    suite.cases = lambda where, quick: [Named(name, number) for number, name in enumerate(["first", "second", "third"])]
    monkeypatch.setattr(gpu, "SUITES", (suite,))
    monkeypatch.setitem(os.environ, "GAPO_KERNELS_CACHE_DIR", "")
    assert gpu.main(["--device", "cpu", "--quick", "--no-tests", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "MISSING, 1 of 3 cases: suite: second"


def test_the_busiest_kernels():
    spent = {"gemm": 3000.0, "launch": 0.0, "softmax": 1000.0} | {f"small {n}": 10.0 * n for n in range(1, 20)}
    found = gpu.busiest([SimpleNamespace(key=name, self_device_time_total=us) for name, us in spent.items()])
    assert [one["name"] for one in found[:3]] == ["gemm", "softmax", "small 19"] and len(found) == 10
    assert found[0]["ms"] == 3.0 and found[0]["share"] == pytest.approx(3000.0 / 5900.0)
    twice = [SimpleNamespace(key=name, self_device_time_total=us) for name, us in (("a", 0.0), ("b", 1.0), ("b", 2.0))]
    assert gpu.busiest(twice) == [{"name": "b", "ms": 0.003, "share": 1.0}] and gpu.busiest([]) == []


def test_a_case_that_misses_a_goal_is_profiled_where_time_is_left(tmp_path, monkeypatch):
    session = gpu.Session(CPU, tmp_path)
    goals = {"missed": {"goals": {"peer": 4}}, "reached": {"goals": {"peer": 2}}, "broken": {"floor_goals": {"whole": 0.9}}}
    session.cases = [result_of(name) | more for name, more in goals.items()]
    assert session.cases[0]["ratios"]["peer"]["median"] == 3.0 and session.cases[0]["floor"]["fraction"] < 0.5

    def measure(case, *_, also, **options):
        if case == "broken":
            raise RuntimeError("out of memory")
        also(harness.Contender(lambda prepared: None), case)

    suite = SimpleNamespace(SUITE="suite", measure=measure, cases=lambda *_: [Named(name, 0) for name in goals])
    monkeypatch.setattr(gpu, "SUITES", (suite,))
    monkeypatch.setattr(gpu, "profile", lambda ours, inputs: [f"kernels of {inputs}"])
    gpu.explain(session, time.monotonic() + 1.0, True)
    assert not any("profile" in case for case in session.cases)
    gpu.explain(session, time.monotonic() + 60.0, True)
    assert [case.get("profile") for case in session.cases] == [["kernels of missed"], None, None]
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["cases"][0]["profile"] == ["kernels of missed"]


@pytest.mark.parametrize("where", ["tuning", "second"])
def test_another_process_goes_on_where_the_device_is_lost(where, tmp_path, monkeypatch):
    started, lost = [], []

    def lose_it():
        lost.append(where)
        raise RuntimeError("an illegal memory access was encountered")

    def measure(case, *args, **options):
        return lose_it() if case == where else result_of(case)

    def execv(program, arguments):
        started.extend(arguments)
        raise SystemExit

    suite = SimpleNamespace(SUITE="suite", ROUNDS=1, measure=measure)
    suite.cases = lambda where, quick: [Named(name, number) for number, name in enumerate(["first", "second", "third"])]
    monkeypatch.setattr(gpu, "SUITES", (suite,))
    monkeypatch.setattr(gpu, "tune", lambda *_: lose_it() if where == "tuning" else {"absent": ""})
    monkeypatch.setattr(gpu, "answers", lambda _: not lost)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setitem(os.environ, "GAPO_KERNELS_CACHE_DIR", "")
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--quick", "--no-tests", "--output", str(tmp_path)])
    program, flag, module, *arguments = started
    assert (program, flag, module) == (sys.executable, "-m", "bench.gpu")
    (file,) = tmp_path.glob("*.json")
    assert [case["name"] for case in json.loads(file.read_text())["cases"]] == ([] if where == "tuning" else ["first"])
    lost.clear()
    assert gpu.main(arguments) == 1
    content = json.loads(file.read_text())
    done = [name for name in ("first", "second", "third") if name != where]
    assert [case["name"] for case in content["cases"]] == done and content["finished"]
    name = "tuning" if where == "tuning" else "suite: second"
    assert content["failed"] == {name: "RuntimeError: an illegal memory access was encountered"}


def test_a_recipe_of_the_step_that_fails_leaves_the_others(monkeypatch):
    """Also the one by which the others are judged: then it is ours in float32."""
    ours, authors = bench_step.Recipe.ours, bench_step.Recipe.authors

    def without_sharing(self, logps, share_backward=False):
        if share_backward:
            raise NotImplementedError("a layer of somebody else's")
        return ours(self, logps)

    def out_of_memory(self):
        if next(self.model.parameters()).dtype == torch.float32:
            raise torch.OutOfMemoryError("no room\nat all")
        return authors(self)

    monkeypatch.setattr(bench_step.Recipe, "ours", without_sharing)
    monkeypatch.setattr(bench_step.Recipe, "authors", out_of_memory)
    case = next(case for case in bench_step.cases(CPU, True) if case.dtype == torch.bfloat16)
    case = replace(case, share_goals={"ours-eager-head": 0.001, "ours-shared": 0.5})
    result = bench_step.measure(case, 3, CPU, seconds=1, quick=True)
    said = r"ours, eager head [\d.]+ of the authors' time, at most 0.001, missed \(moved by .* %\), "
    assert re.search(said + "ours, `share_backward` not measured, at most 0.5 of the authors' time$", tables.goals_of(result))
    assert result["times"].keys() == {"authors", "ours", "ours-logits", "ours-eager-head"}
    assert result["absent"] == {
        "ours-shared": "NotImplementedError: a layer of somebody else's",
        "ours-shared-eager-head": "NotImplementedError: a layer of somebody else's",
        "authors-float32": "OutOfMemoryError: no room",
    }


def test_a_device_that_does_not_come_back_ends_the_run(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    session = gpu.Session(CPU, tmp_path)
    with gpu.not_for_ever(session, "suite: first", 60.0):
        pass
    with gpu.not_for_ever(session, "suite: second", 0.01):
        for _ in range(1000):
            time.sleep(0.01)
            if ended:
                break
    (file,) = tmp_path.glob("*.json")
    assert ended == [1] and json.loads(file.read_text())["failed"].keys() == {"suite: second"}


def test_nothing_is_lost_by_an_interruption(session, tmp_path):
    def measure(case, *args, **options):
        if case == "second":
            raise KeyboardInterrupt
        return result_of(case)

    with pytest.raises(KeyboardInterrupt):
        session(measure)
    (file,) = tmp_path.glob("*.json")
    assert [case["name"] for case in json.loads(file.read_text())["cases"]] == ["first"]


def test_the_clock_stops_a_case_and_leaves_out_the_rest(session, monkeypatch):
    monkeypatch.setattr(gpu, "LAST_START", 0.1)

    def measure(case, *args, **options):
        if case == "second":
            try:
                time.sleep(60)
            except Exception:  # a peer that catches everything does not catch the clock
                pass
        return result_of(case)

    content = session(measure, seconds=3.0)
    assert [case["name"] for case in content["cases"]] == ["first"]
    assert content["left_out"]["suite: second"].startswith("not done in the")
    assert content["left_out"]["suite: third"] == "no time was left"


def test_of_cases_with_one_name_the_first_stays_where_it_is():
    assert [(case, case.importance) for case in harness.distinct([Named("b", 0), Named("a", 1), Named("b", 2)])] == [
        ("b", 0),
        ("a", 1),
    ]


def test_what_the_issue_asks_of_cases_on_a_cpu():
    assert min(case.seconds for case in bench_logits.cases(CPU)) >= 10  # for more than a few rounds
    assert [case.share_goals for case in bench_step.cases(CPU)] == [{"ours-eager-head": 0.85}]


def test_cases_run_in_order_of_importance():
    for where in (CPU, torch.device("cuda")):
        order = [case.importance for _, case in gpu.in_order(where, quick=False)]
        assert order == sorted(order) and order[0] == 0 and order[-1] > 0
        names = [(module.SUITE, str(case)) for module, case in gpu.in_order(where, quick=False)]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("inner, outer, rings", [(0.05, 60.0, "inner"), (60.0, 0.05, "outer"), (0.05, 0.1, "both")])
def test_deadlines_inside_of_deadlines(inner, outer, rings):
    rang = []
    try:
        with harness.deadline(outer):
            try:
                with harness.deadline(inner):
                    time.sleep(1)
            except harness.OutOfTime:
                rang.append("inner")
            if rings != "inner":
                time.sleep(1)
    except harness.OutOfTime:
        rang.append("outer")
    assert rang == {"inner": ["inner"], "outer": ["inner", "outer"], "both": ["inner", "outer"]}[rings]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_deadline_dropped_by_the_garbage_collector_comes_again():
    """Otherwise a case runs on for ever, once in a while."""
    dropped = []

    def callback(phase, _):
        if phase == "start" and not dropped:
            dropped.append(phase)
            time.sleep(0.2)

    gc.callbacks.append(callback)
    try:
        with pytest.raises(harness.OutOfTime), harness.deadline(0.1):
            gc.collect()
            dropped.append("went on")
            time.sleep(20.0)
        assert dropped == ["start", "went on"]
    finally:
        gc.callbacks.remove(callback)


def test_once_the_outer_deadline_is_due_the_inner_one_has_no_say(monkeypatch):
    ring, again = signal.raise_signal, []
    left = partial(signal.getitimer, signal.ITIMER_REAL)
    monkeypatch.setattr(signal, "raise_signal", lambda number: again.append(left()[0]) or ring(number))
    with pytest.raises(harness.OutOfTime) as caught, harness.deadline(0.1):
        with harness.deadline(0.05, harness.TooLong):
            try:
                time.sleep(60)
            finally:
                time.sleep(0.1)
    assert caught.type is harness.OutOfTime
    assert again and min(again) > harness.RING_AGAIN / 2  # a second ring at once would cut off the end of the first
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


@pytest.mark.parametrize(
    "text, counts",
    [
        ("..F\n3 failed, 10 passed, 1 skipped, 2 errors in 3.21s", dict(failed=3, passed=10, skipped=1, error=2)),
        ("....s..F.  [ 40%]\n..E.\nsome warning", dict(passed=10, skipped=1, failed=1, error=1)),
        ("..F  [ 40%]\n.Fatal Python error: Segmentation fault\n", dict(passed=3, failed=1)),
        ("Fatal Python error: Segmentation fault\n", {}),
        ("", {}),
    ],
)
def test_counts_of_a_run_of_tests_that_ended_and_of_one_that_did_not(text, counts):
    assert gpu.counts_in(text) == counts


def test_a_run_of_tests_that_takes_too_long_is_stopped(tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(300)\n")
    found = gpu.run_tests(["-c", os.devnull, str(file)], 5.0)
    assert not found["complete"] and not found["failures"] and found["seconds"] < 100 and found["status"] is None
    assert gpu.wrong_with(found, CPU) is None


def test_tests_that_the_clock_stops_are_left_out(tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(300)\n")
    session = gpu.Session(CPU, tmp_path)
    arguments = ["-c", os.devnull, str(file)]
    gpu.prepare(session, time.monotonic() + 8.0, [arguments], quick=True)
    assert session.found["left_out"].keys() == {f"tests: {' '.join(arguments)}"} and not session.found["failed"]


def test_processes_side_by_side_run_each_test_once():
    arguments = ["tests/test_objective.py", "-k", "not wrong_arguments"]
    whole, split = gpu.run_tests(arguments, 300.0), gpu.run_tests(arguments, 300.0, processes=3)
    assert whole["complete"] and split["complete"]
    assert whole["counts"]["passed"] == split["counts"]["passed"] > 3


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_a_run_of_tests_that_is_stopped_says_what_had_failed(handler, tmp_path, monkeypatch):
    reached = tmp_path / "reached"

    class UntilReached(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None or timeout < 1000.0:
                return super().wait(timeout)
            while not reached.exists():
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", UntilReached)
    file = tmp_path / "test_slow.py"
    slow = f"def test_slow():\n    open({str(reached)!r}, 'w').close()\n    time.sleep(300)\n"
    file.write_text(f"import time\ndef test_wrong(): assert 1 == 2\n{slow}")
    before = signal.signal(signal.SIGINT, handler)
    try:
        found = gpu.run_tests(["-c", os.devnull, str(file)], 1234.0)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert found["status"] is None and "test_wrong" in found["failures"][0] and "assert 1 == 2" in found["output"]
    assert gpu.wrong_with(found, CPU) == "tests failed"


@pytest.mark.parametrize(
    "test, options, status, counts",
    [
        ("def test_this(): assert 0", [], 1, {"passed": 1, "failed": 1}),
        ("def test_this(): os.kill(os.getpid(), signal.SIGSEGV)", [], -signal.SIGSEGV, {"passed": 1}),
        ("", ["--no-such-option"], 4, {}),
        ("", ["-k", "nothing"], 5, {}),
    ],
)
def test_a_run_of_tests_that_breaks_off_failed(test, options, status, counts, tmp_path, monkeypatch, capsys):
    file = tmp_path / "test_broken.py"
    file.write_text(f"import os, signal\ndef test_before(): pass\n{test}\n")
    arguments = ["-c", os.devnull, str(file), *options]
    monkeypatch.setattr(gpu, "TESTS", (arguments,))
    monkeypatch.setattr(gpu, "SUITES", ())
    monkeypatch.setitem(os.environ, "GAPO_KERNELS_CACHE_DIR", "")
    assert gpu.main(["--device", "cpu", "--quick", "--output", str(tmp_path)]) == 1
    (written,) = tmp_path.glob("*.json")
    content = json.loads(written.read_text())
    (run,) = content["tests"]
    assert (run["complete"], run["status"], run["counts"]) == (False, status, counts)
    name, why = f"tests: {' '.join(arguments)}", f"ended with return code {status:d}"
    assert content["failed"] == {name: why} and f"failed: {name}: {why}\n" in capsys.readouterr().out


def test_on_a_gpu_something_is_tested():
    def wrong(where, counts, **more):
        return gpu.wrong_with({"counts": counts, "failures": [], "status": 0, **more}, torch.device(where))

    assert wrong("cuda", {"passed": 1, "skipped": 1}) is None
    assert wrong("cuda", {"skipped": 1}) == "no test ran" == wrong("cuda", {}, status=None) == wrong("cpu", {})
    assert wrong("cuda", {"skipped": 1}, status=5) == "ended with return code 5"
    assert wrong("cpu", {"skipped": 1}, status=5) is None
    assert wrong("cuda", {"passed": 1, "failed": 1}, status=None) == "tests failed"


def test_turns_copies_and_what_is_done_around_a_call():
    log = []

    def contender(name):
        return harness.Contender(
            lambda prepared: log.append((name, prepared)),
            prepare=lambda inputs: f"{inputs}'",
            restore=lambda inputs: log.append(("restored", inputs)),
        )

    contenders = {name: contender(name) for name in ("one", "other")}
    times = harness.interleaved(contenders, ["a", "b", "c"], CPU, rounds=2, warmup=1)
    calls = [entry for entry in log if entry[0] != "restored"]
    # An untimed and a timed call each, in turns; every call takes the next copy, and is followed by its restoration.
    assert [name for name, _ in calls] == 3 * ["one", "one", "other", "other"]
    assert [prepared for _, prepared in calls] == 4 * ["a'", "b'", "c'"]
    assert [entry[1] + "'" for entry in log if entry[0] == "restored"] == [prepared for _, prepared in calls]
    assert all(len(seconds) == 2 for seconds in times.values())


def test_rounds_end_with_the_time_but_not_below_the_least():
    contenders = {"one": harness.Contender(lambda _: time.sleep(0.01))}

    def count(**options):
        return len(harness.interleaved(contenders, [None], CPU, 50, **options)["one"])

    assert count(seconds=0.0, least=4) == 4
    assert count(seconds=60.0) == 50


def test_close_contenders_have_rounds_by_themselves():
    spent = {"ours": 0.01, "near": 0.01, "far": 0.05}
    contenders = {name: harness.Contender(lambda _, s=seconds: time.sleep(s)) for name, seconds in spent.items()}
    times = harness.interleaved(contenders, [None], CPU, 3, close=2.0)
    assert {name: len(seconds) for name, seconds in times.items()} == {"ours": 6, "near": 6, "far": 3}
    further = harness.interleaved(contenders, [None], CPU, 3, close=1.01, further=["far"])
    assert len(further["ours"]) == len(further["far"]) == 6
    case = harness.result("linear", "case", {}, times, [])
    assert case["rounds"] == 6 and case["times"]["far"]["rounds"] == 3
    assert case["ratios"]["far"]["median"] > 2 > case["ratios"]["near"]["median"]
    times = {"ours": [1.0, 1.0, 1.0, 9.0, 9.0, 9.0], "far": [2.0, 2.0, 2.0]}
    assert harness.ratio(times["far"], times["ours"])["median"] == 2.0  # of the same rounds
    assert harness.ratio_spread(times["far"], times["ours"]) == 0.0


def test_ratios_and_their_spread():
    ours, peer = [1.0, 1.0, 2.0, 2.0, 4.0, 4.0], [2.0, 2.0, 5.0, 5.0, 8.0, 8.0]
    assert harness.ratio(peer, ours)["median"] == 2.0
    assert harness.ratio_spread(peer, ours) == pytest.approx((2.5 - 2.0) / 2.0)
    assert harness.ratio_spread(ours[:2], peer[:2]) is None
    paired = harness.ratio_spread([2.0, 4.0, 6.0, 2.0, 8.0, 3.0, 2.0, 4.0, 6.0], [1.0, 2.0, 3.0] * 3)
    assert paired == 0.0  # of the rounds' own ratios: that of the medians moves
    floor = harness.floor(ours, {"small": 0.1, "timed": [0.5, 0.5, 1.0, 1.0, 2.0, 2.0]})
    assert floor == {"name": "timed", "ms": 1000.0, "fraction": 0.5, "spread": 0.0}


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs Linux's /proc")
def test_the_peak_of_a_call_is_what_it_takes_at_its_worst_moment():
    size = 2**24

    def call():  # from the heap, which keeps what is freed: the second call must not find it there
        return [torch.ones(2**12, dtype=torch.uint8) for _ in range(size // 2**12)] and None

    for _ in range(2):
        peak = harness.peak_bytes(call, CPU)
        assert size * 0.9 < peak < size * 1.6


@pytest.mark.skipif(not CLEAR_REFS.exists() or not hasattr(harness.LIBC, "mallopt"), reason="needs Linux and glibc")
def test_peaks_on_a_cpu_are_those_of_the_tensors_that_live_at_once():
    case = bench_linear.Case(1, 128, 192, 16384, torch.float32, 0.9, peers=frozenset())
    with closing(peers.Peaks()) as peaks:
        found = peaks.of("bench.bench_linear", case, ["ours", "eager"])
    logits = 2 * 127 * case.vocabulary * 4 / harness.MIB
    assert found["eager"] == pytest.approx(3 * logits, abs=1)  # log-probs, their gradient and the logits', of all rows
    assert found["ours"] < 2 * logits


SUITE = """
import os, time
import torch
from bench import peers

def make_batch(case, where, quick):
    return [torch.zeros(2**22, requires_grad=True)]

def losses(case, batch, where):
    right = lambda batch: (2 * batch[0]).sum()
    def broken(*_):
        peers.TO_BEGIN = 0.5  # of those after it
        raise ImportError("no such package")
    others = {
        "right": lambda: right,
        "broken": broken,
        "fails": lambda: broken,
        "slow": lambda: time.sleep(60),
        "dies": lambda: os._exit(1),
        "late": lambda: right,
    }
    return {"ours": right}, others
"""


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs Linux's /proc")
def test_a_contender_whose_peak_cannot_be_measured_has_none(tmp_path, monkeypatch):
    (tmp_path / "a_suite.py").write_text(SUITE)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["ours", "right", "broken", "fails", "slow", "dies", "late"]
    with closing(peers.Peaks()) as peaks:
        found = peaks.of("a_suite", None, names)
        again = peaks.of("a_suite", None, ["ours"])  # in another process, after the one that died
    assert list(found) == names and [name for name in names if found[name] is not None] == ["ours", "right"]
    for one in (found, again):
        assert one["ours"] == pytest.approx(16, abs=1)  # the gradient, or before it the product


def logits_batch(dtype=torch.float32):
    case = bench_logits.Case(2, 6, 31, dtype, 0.5)
    return bench_logits.make_batch(case, CPU, quick=True)


def check(own, others, batch):
    return peers.checked(own, others, batch, [batch.logits], bench_logits.expected(batch), CPU)


def test_a_peer_that_computes_something_else_is_not_measured():
    batch = logits_batch()

    def unavailable():
        raise ImportError("no such package")

    right = peers.eager_from_logits(bench_logits.GAMMA, sliced=False)
    others = {
        "right": lambda: right,
        "wrong-loss": lambda: peers.eager_from_logits(bench_logits.GAMMA + 0.1, sliced=False),
        "wrong-gradient": lambda: lambda batch: right(batch) + 1e-3 * (batch.logits[:, -2] - batch.logits[:, -2].detach()).sum(),
        "wrong-gradient-of-an-ignored-row": lambda: lambda batch: right(batch) + 1e-3 * (batch.logits - batch.logits.detach())[0, 0, 0],
        "missing": unavailable,
    }
    found = check({"ours": bench_logits.ours}, others, batch)
    assert set(found.losses) == set(found.errors) == {"ours", "right"}
    assert found.absent["wrong-loss"].startswith("AssertionError: its loss is off by")
    for name in ("wrong-gradient", "wrong-gradient-of-an-ignored-row"):
        assert found.absent[name].startswith("AssertionError") and "its gradient by" in found.absent[name]
    assert found.absent["missing"] == "ImportError: no such package"
    assert batch.logits.grad is None
    with pytest.raises(AssertionError, match="its loss is off by"):
        check({"ours": others["wrong-loss"]()}, {}, batch)


def logits_case(dtype):
    case = bench_logits.Case(2, 20, 50_000, dtype, 0.5)
    return bench_logits.make_batch(case, CPU, quick=True), lambda batch: [batch.logits], bench_logits


def linear_case(dtype):
    case = bench_linear.Case(2, 20, 64, 5_000, dtype, 0.5)
    return bench_linear.make_batch(case, CPU, quick=True), lambda batch: [batch.hidden, batch.weight], bench_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [logits_case, linear_case])
def test_neither_anchor_nor_softmax_may_be_left_out(make, dtype):
    """Of a vocabulary so large that a label's entry outweighs all others."""
    batch, leaves_of, module = make(dtype)
    leaves, right = leaves_of(batch), module.ours() if module is bench_linear else module.ours
    right(batch).backward()
    found = [leaf.grad for leaf in leaves]
    expected = module.expected(batch)
    assert max(expected.errors(right(batch).item(), found).values()) <= expected.tolerance

    fields = batch._asdict()
    policy = next(name for name in fields if "anchor_" + name in fields)
    without_anchor = batch._replace(**{"anchor_" + policy: fields[policy].detach()})
    assert expected.errors(right(without_anchor).item(), found)["loss"] > expected.loose

    labels = batch.labels[batch.labels >= 0].unique()
    kept = found[-1].new_zeros(found[-1].shape)
    if module is bench_linear:  # d weight of labels alone
        kept[labels] = found[-1][labels]
    else:  # what the labels' one-hot makes of the gradient
        at_labels = peers.shifted(batch.labels).clamp(min=0).unsqueeze(-1)
        kept.scatter_(-1, at_labels, found[-1].gather(-1, at_labels))
    assert expected.errors(right(batch).item(), [*found[:-1], kept])["gradient"] > 0.9
    kept = found[-1].clone()
    kept.view(-1)[-1] = torch.nan
    assert not expected.errors(right(batch).item(), [*found[:-1], kept])["gradient"] <= 1


def test_the_plain_llama_is_transformers():
    transformers = pytest.importorskip("transformers")
    shape = bench_step.LLAMAS["Llama-tiny"]
    torch.manual_seed(0)
    plain = llama.Llama(**shape).eval()
    own = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=True)).eval()
    own.load_state_dict(plain.state_dict())
    ids = torch.randint(shape["vocab_size"], (3, 17))
    torch.testing.assert_close(plain(ids).logits, own(ids).logits)


def test_a_peer_in_16_bits_may_round_but_not_leave_out(monkeypatch):
    made = bench_logits.peers.eager_from_logits

    def half(gamma, sliced):
        def loss(batch):
            value = made(gamma, sliced)(batch)
            return (value + value.detach()) / 2

        return loss if sliced else made(gamma, sliced)

    batch = logits_batch(torch.bfloat16)
    monkeypatch.setitem(bench_logits.PEERS, "eager", partial(half, bench_logits.GAMMA, sliced=True))
    monkeypatch.setitem(bench_logits.PEERS, "eager-view", partial(half, bench_logits.GAMMA, sliced=False))
    found, contenders = bench_logits.check(["eager", "eager-view"], batch, bench_logits.expected(batch), CPU)
    assert set(contenders) == {"eager-view"} and re.search(r"its gradient by 0\.[45]", found.absent["eager"])


@pytest.mark.skipif(not hasattr(harness.LIBC, "malloc_trim"), reason="another allocator than glibc's")
def test_each_peer_of_the_logits_path_has_a_process_of_its_own_on_a_cpu(monkeypatch):
    for name in harness.allocator_settings():
        monkeypatch.delenv(name)
    started, here, elsewhere = [], [], []
    another, check, turn = harness.another_process, bench_logits.check, harness.Elsewhere.turn

    def counted():
        started.append(another())
        return started[-1]

    def turn_elsewhere(self, *arguments):
        elsewhere.append(started.index(self.process))
        return turn(self, *arguments)

    monkeypatch.setattr(harness, "another_process", counted)
    monkeypatch.setattr(bench_logits, "check", lambda names, *others: here.extend(names) or check(names, *others))
    monkeypatch.setattr(harness.Elsewhere, "turn", turn_elsewhere)
    # So large that glibc maps each tensor of the logits' size anew, where its heap has no room for it.
    case = bench_logits.Case(1, 97, 50_000, torch.float32, 0.5, peers=frozenset(), goals={"eager": 1})
    result = bench_logits.measure(case, 3, CPU, seconds=1)
    assert here == ["ours"] and {"eager", "eager-view"} < set(result["times"])
    # The first round of each is untimed, and of the further ones.
    assert [elsewhere.count(number) for number in range(len(started))] == [8, 4]
    assert result["times"]["eager"]["rounds"] == 6 and result["times"]["eager-view"]["rounds"] == 3
    faults = result["page_faults"]
    assert 2 * faults["ours"] < faults["eager-view"] < faults["eager"]  # whose slices are copies, forward and backward
    for process in started:  # none outlives the measurement
        with pytest.raises(RuntimeError, match="shutdown"):
            process.submit(os.getpid)


@pytest.mark.parametrize("pairs", [1, 2, 4, 16])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 0.9])
def test_as_many_rows_are_ignored_as_the_case_says_and_other_ones_in_each_call(pairs, ignored):
    batch = bench_logits.make_batch(bench_logits.Case(pairs, 128, 3, torch.float32, ignored), CPU, quick=True)
    calls = bench_logits.with_other_prompts(batch)
    for one, next_one in zip(calls, calls[1:]):
        share = (one.labels[:, 1:] == -100).double().mean().item()
        assert abs(share - ignored) < 1 / 128
        assert ignored == 0 or not torch.equal(one.labels, next_one.labels)


def rest(recipe, step):
    recipe.anchor.rho = 0.0
    return step()


def fade(recipe, step, share=0.3):
    result = step()
    for param in recipe.model.parameters():
        param.grad *= share
    return result


def forget_the_last(recipe, step):
    result = step()
    for param in recipe.model.parameters():
        param.grad.view(-1)[100:] = 0
    return result


def test_what_16_bits_would_hide_is_not_measured(monkeypatch):
    """An anchor at 0.6 of the radius, and 0.8 of the gradient: within what rounding may do there."""
    right = bench_step.Recipe.ours

    def short(self, logps, **options):
        self.anchor.rho = bench_step.RHO if logps == self.eager_logps else 0.6 * bench_step.RHO
        result = right(self, logps, **options)
        for param in self.model.parameters():
            param.grad *= 1.0 if logps == self.eager_logps else 0.8
        return result

    monkeypatch.setattr(bench_step.Recipe, "ours", short)
    case = next(case for case in bench_step.cases(CPU, True) if case.dtype == torch.bfloat16)
    with pytest.raises(AssertionError, match=r"ours in float32 differs from ours, eager head: .*gaps by 0\.[34]"):
        bench_step.measure(case, 3, CPU, seconds=1, quick=True)


@pytest.mark.parametrize(
    "dtype, who, wrong, differs",
    [
        (torch.bfloat16, "ours", rest, "ours differs from authors-float32: .*gaps by 1"),
        (torch.bfloat16, "ours", fade, "ours differs from authors-float32: .*gradient by 0.7"),
        (torch.bfloat16, "authors", partial(fade, share=0.0), "authors differs from authors-float32: .*gradient by 1"),
        (torch.float32, "authors", forget_the_last, "authors differs from ours, eager head in float32: .*gradient by 0"),
    ],
)
def test_a_wrong_step_is_not_measured(monkeypatch, dtype, who, wrong, differs):
    right = getattr(bench_step.Recipe, who)

    def mutated(self, *args, **options):
        step = lambda: right(self, *args, **options)
        return wrong(self, step) if self.model.dtype == dtype else step()

    monkeypatch.setattr(bench_step.Recipe, who, mutated)
    case = next(case for case in bench_step.cases(CPU, True) if case.dtype == dtype)
    with pytest.raises(AssertionError, match=differs):
        bench_step.measure(case, 3, CPU, seconds=1, quick=True)


def test_a_wrong_recipe_besides_ours_and_the_authors_leaves_the_others(monkeypatch):
    right = bench_step.Recipe.ours

    def mutated(self, *args, **options):
        step = partial(right, self, *args, **options)
        return fade(self, step, share=0.0) if options.get("share_backward") else step()

    monkeypatch.setattr(bench_step.Recipe, "ours", mutated)
    case = next(case for case in bench_step.cases(CPU, True) if case.dtype == torch.float32)
    result = bench_step.measure(case, 3, CPU, seconds=1, quick=True)
    assert result["absent"].keys() == {"ours-shared", "ours-shared-eager-head"}
    assert all(why.startswith("differs from authors: ") and "gradient by 1" in why for why in result["absent"].values())
    left = {"authors", "ours", "ours-logits", "ours-eager-head"}
    assert result["times"].keys() == result["gap_errors"].keys() == result["peak_beyond_weights_mib"].keys() == left


def test_a_peer_may_take_long_and_is_then_absent_but_not_longer_than_the_case(monkeypatch):
    batch = logits_batch()
    right = peers.eager_from_logits(bench_logits.GAMMA, sliced=False)
    monkeypatch.setattr(peers, "TO_BEGIN", 0.5)

    def slow(*_):
        time.sleep(60)

    with harness.deadline(60.0):
        found = check({"ours": bench_logits.ours}, {"slow": slow, "right": lambda: right}, batch)
    assert set(found.losses) == {"ours", "right"} and found.absent == {"slow": "did not finish its first call within 0 s"}
    begun = []
    monkeypatch.setattr(peers, "TO_BEGIN", 60.0)
    with pytest.raises(harness.OutOfTime) as caught, harness.deadline(1.0):
        # Its calls, which on a CPU have no time limit of their own.
        check({"ours": bench_logits.ours}, {"slow": lambda: slow, "next": lambda: begun.append("next")}, batch)
    assert caught.type is harness.OutOfTime and not begun


def test_the_linear_reference_is_the_mean_over_pairs():
    """Put together a pair at a time; against one call of the eager peer on the whole batch."""
    batch = bench_linear.make_batch(bench_linear.Case(3, 6, 16, 61, torch.float32, 0.5), CPU, quick=True)
    total, gradients = bench_linear.reference_of(batch)
    loss = peers.eager_from_hidden(bench_linear.GAMMA)(batch)
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for found, exact in zip(gradients, torch.autograd.grad(loss, [batch.hidden, batch.weight])):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-7)
        assert exact.abs().max() > 1e-4


@pytest.mark.parametrize("kind", bench_anchor.KINDS, ids=str)
@pytest.mark.parametrize("fault", ["norm", "exchange", "restore"])
def test_passes_that_are_wrong_are_not_measured(kind, fault):
    case = bench_anchor.Case("tiny", *kind, "norm")
    weights = bench_anchor.Weights(case, CPU)
    contender = bench_anchor.Eager(weights)
    right = getattr(contender, fault)

    def wrong(_=None):
        result = right()
        if fault == "norm":
            return 1.1 * result
        for theta in weights.thetas[-1:]:
            theta.mul_(1.1)

    setattr(contender, fault, wrong)
    with pytest.raises(AssertionError, match={"norm": "norm", "exchange": "another place", "restore": "restore"}[fault]):
        bench_anchor.check("eager", contender, weights)


def test_shapes_of_the_models():
    """As their own configurations have them: 134 515 008 and 1 235 814 400 parameters."""
    sizes = {name: sum(torch.Size(shape).numel() for shape in bench_anchor.shapes_of(name)) for name in bench_anchor.SHAPES}
    assert sizes["SmolLM2-135M"] == 134_515_008 and sizes["Llama-1B"] == 1_235_814_400


def test_what_the_casts_of_masters_take_away_makes_no_gap(monkeypatch):
    """A radius of 0 shows it. Otherwise the same seeds draw the same bits: the gaps are those of the weights on the grid."""
    pytest.importorskip("transformers")
    shape = anchor_rounding.TINY[1]
    model = anchor_rounding.tiny_model(*shape, seed=0)
    batches = anchor_rounding.random_batches(shape[2], 4, seed=0)
    (on_grid,), measurement, truths = anchor_rounding.on_the_grid(model, batches, (anchor_rounding.RHO,), 2, {"model": ""})
    grid, generator = [p.detach().clone() for p in model.parameters()], torch.Generator().manual_seed(0)
    reach = anchor_rounding.MASTERS["anywhere off the grid"]
    masters = [anchor_rounding.off_grid(weight, reach, generator) for weight in grid]
    (truth,), rounded = truths.values(), "SR(cast(theta) + delta)"
    ways = anchor_rounding.off_the_grid(model, batches, masters, grid, measurement, truth, 2)["ways"]
    assert ways[rounded]["errors"] == pytest.approx(on_grid["roundings"]["stochastic"]["errors"], rel=0.05)
    monkeypatch.setattr(anchor_rounding, "RHO", 0.0)
    ways = anchor_rounding.off_the_grid(model, batches, masters, grid, measurement, truth, 2)["ways"]
    assert ways[rounded]["mean_gaps"] == ways[f"{rounded}, autocast"]["mean_gaps"] == [0.0, 0.0]
    assert ways["SR(theta + delta)"]["mean_gaps"][0] != 0.0
