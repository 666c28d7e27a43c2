"""`pytest bench` measures (needs pytest-benchmark); `--save-results` writes what it measured under bench/results/."""

from __future__ import annotations

import pytest
import torch

from bench import harness


def pytest_addoption(parser):
    parser.addoption("--save-results", action="store_true", help="write bench/results/*.json and *.csv")
    parser.addoption("--quick", action="store_true", help="tiny shapes: whether everything runs, not how fast")
    parser.addoption("--with-goals", action="store_true", help="only the cases that have a goal")
    parser.addoption("--rounds", type=int, help="measured rounds of each contender, at most; each module has a default")


def pytest_configure(config):
    config.measured = {}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        cases = metafunc.module.cases(harness.device(), option("--quick"))
        if option("--with-goals"):
            cases = [case for case in cases if getattr(case, "goals", None)]
        metafunc.parametrize("case", cases, ids=str)


@pytest.fixture
def measured(request, benchmark):
    """measured(case): measures the case and keeps the result for the table and the files at the end.

    pytest-benchmark times ours once more, and gets the whole result as its extra_info.
    """
    config = request.config

    def measure(case) -> None:
        module = request.module
        torch._dynamo.reset()
        quick = config.getoption("--quick")
        rounds = config.getoption("--rounds") or (3 if quick else module.ROUNDS)

        def time_ours(ours: harness.Contender, inputs) -> None:
            def run(prepared) -> None:
                ours.run(prepared)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()

            benchmark.pedantic(run, setup=lambda: ((ours.ready(inputs),), {}), rounds=1)
            ours.done(inputs)

        try:
            result = module.measure(case, rounds, quick=quick, also=time_ours)
        except harness.Unavailable as error:
            pytest.skip(str(error))
        benchmark.extra_info.update(result)
        config.measured.setdefault(module.SUITE, []).append(result)

    return measure


def pytest_terminal_summary(terminalreporter, config):
    for suite, cases in config.measured.items():
        terminalreporter.section(f"{suite} on {harness.device_name()}")
        for case in cases:
            terminalreporter.write_line(harness.line(case))
        if config.getoption("--save-results") and not config.getoption("--quick"):
            terminalreporter.write_line(f"written to {harness.write_results(suite, cases)}")
