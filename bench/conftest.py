"""`pytest bench` measures (needs pytest-benchmark); `--save-results` writes what it measured under bench/results/."""

from __future__ import annotations

import pytest

from bench import harness, peers


def pytest_addoption(parser):
    parser.addoption("--save-results", action="store_true", help="write bench/results/*.json and *.csv")
    parser.addoption("--quick", action="store_true", help="tiny shapes: whether everything runs, not how fast")
    parser.addoption("--with-goals", action="store_true", help="only the cases that have a goal")
    parser.addoption("--rounds", type=int, help="measured rounds of each contender, at most; each module has a default")


def pytest_configure(config):
    config.measured, config.failed, config.processes = {}, {}, {}
    config.peaks, config.origin = peers.Peaks(), harness.environment()


def pytest_unconfigure(config):
    config.peaks.close()


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        cases = metafunc.module.cases(harness.device(), option("--quick"))
        if option("--with-goals"):
            cases = [case for case in cases if getattr(case, "goals", None)]
        metafunc.parametrize("case", cases, ids=str)


@pytest.fixture
def measured(request, benchmark):
    """measured(case): measures the case, in a process of its own, and keeps the result for the table and the files at the
    end. shared=True: in one process with the suite's other cases.

    pytest-benchmark times ours once more, and gets the whole result as its extra_info.
    """
    config, module = request.config, request.module

    def measure(case, shared: bool = False) -> None:
        quick = config.getoption("--quick")
        rounds = config.getoption("--rounds") or (3 if quick else module.ROUNDS)
        other = config.processes.pop(module, None) or harness.another_process()
        try:
            result = other.submit(harness.measure_here, module.__name__, case, rounds, quick).result()
            benchmark.pedantic(
                lambda: other.submit(harness.run_here).result(),
                setup=lambda: other.submit(harness.ready_here).result(),
                rounds=1,
            )
        except harness.Unavailable as error:
            pytest.skip(str(error))
        except Exception as error:
            config.failed.setdefault(module.SUITE, {})[str(case)] = peers.reason(error)
            raise
        finally:
            if shared:
                config.processes[module] = other
            else:
                other.shutdown()
        if result.get("peak_beyond_inputs_mib") == {}:  # not measured with the rest
            result["peak_beyond_inputs_mib"] = config.peaks.of(module.__name__, case, result["errors"])
        benchmark.extra_info.update(result)
        config.measured.setdefault(module.SUITE, []).append(result)

    return measure


def pytest_terminal_summary(terminalreporter, config):
    for suite, cases in config.measured.items():
        terminalreporter.section(f"{suite} on {harness.device_name()}")
        for case in cases:
            terminalreporter.write_line(harness.line(case))
        if config.getoption("--save-results") and not config.getoption("--quick"):
            more = {"failed": config.failed[suite]} if suite in config.failed else {}
            terminalreporter.write_line(f"written to {harness.write_results(suite, cases, origin=config.origin, **more)}")
