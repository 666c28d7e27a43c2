"""`pytest bench` measures; `--save-results` writes what it measured under bench/results/."""

from __future__ import annotations

import pytest

from bench import harness


def pytest_addoption(parser):
    parser.addoption("--save-results", action="store_true", help="write bench/results/*.json")
    parser.addoption("--step-rounds", type=int, default=5, help="measured rounds of each contender, whole steps")
    parser.addoption("--rounds", type=int, default=15, help="measured rounds of each contender")


def pytest_configure(config):
    config.measured = {}


@pytest.fixture
def record(request):
    """record(suite, case): keeps one case's results for the table at the end and the results file."""

    def keep(suite: str, case: dict) -> None:
        request.config.measured.setdefault(suite, []).append(case)

    return keep


def pytest_terminal_summary(terminalreporter, config):
    for suite, cases in config.measured.items():
        terminalreporter.section(f"{suite} on {harness.device_name()}")
        for case in cases:
            ours = case["times"]["ours"]
            line = f"{case['name']:44} ours {ours['median_ms']:8.2f} ms"
            for name, value in case["ratios"].items():
                line += f"   {name} {value['median']:5.2f}x ({value['quartile_1']:.2f}-{value['quartile_3']:.2f})"
            for name, peaks in case.items():
                if name.startswith("peak") and peaks["ours"] is not None:
                    line += f"   {name.replace('_', ' ')} {peaks['ours']:.1f}"
            if "passes" in case:
                line += f"   passes over the weights {case['passes_share_of_step']:.1%} of a step"
            terminalreporter.write_line(line)
        if config.getoption("--save-results"):
            terminalreporter.write_line(f"written to {harness.write_results(suite, cases)}")
