"""How many configurations run, from which seed, and the table of what ran.

`pytest tests` runs a short slice of the configurations; `make fuzz` runs 1,000 for each back end. All are drawn from one
seed, so that every run is the same; `--fuzz-seed` draws others.
"""

import mmap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from gapo_kernels import host_memory

# Of the configurations of each back end. Those of `gapo_objective` and `gapo_step`, which have none, come on top.
SHARES = {
    "fused_gapo_loss": 0.32,
    "sequence_logps": 0.16,
    "fused_linear_gapo_loss": 0.25,
    "linear_sequence_logps": 0.11,
    "GeometricAnchor": 0.16,
    "gapo_objective": 0.2,
    "gapo_step": 0.2,
}
DEFAULTS = {"configurations": 60, "fuzz_seed": 0}
ran = Counter()  # (function, back end)


def pytest_addoption(parser):
    group = parser.getgroup("fuzz")
    for name, purpose in (
        ("configurations", "random configurations for each back end, and steps in constant memory"),
        ("fuzz_seed", "where the configurations are drawn from"),
    ):
        group.addoption(f"--{name.replace('_', '-')}", type=int, default=DEFAULTS[name], help=purpose)


def option(config, name):
    """Its default where these options came too late for the command line, as under `pytest tests`."""
    return config.getoption(name, DEFAULTS[name])


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """On a CPU nothing here is as large as the tensors whose memory is kept from one call to the next: pages that are not
    huge let most have it, each with what the last one left there."""
    host_memory.release()
    monkeypatch.setattr(host_memory, "HUGE_PAGE", mmap.PAGESIZE)
    yield
    host_memory.release()


@pytest.fixture
def configurations(request):
    return option(request.config, "configurations")


@pytest.fixture
def explore(request, configurations):
    """explore(function, check, strategy): check(configuration) on the function's share of the configurations.

    A failure shows the simplest configuration that fails, as plain values.
    """
    backend, call = "any", _call
    if "backend" in request.fixturenames:
        backend = request.node.callspec.params["backend"]
        if request.getfixturevalue("interpreted"):
            call = _call_on_an_empty_stack

    def run(function, check, strategy):
        def checked(configuration):
            call(check, configuration)
            ran[function, backend] += 1

        count = round(configurations * SHARES[function])
        exploring = settings(
            database=None,
            deadline=None,
            max_examples=count,
            phases=[Phase.generate, Phase.shrink],
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        )
        exploring(seed(option(request.config, "fuzz_seed"))(given(configuration=strategy)(checked)))()
        assert ran[function, backend] >= count

    return run


def _call(function, argument):
    function(argument)


def _call_on_an_empty_stack(function, argument):
    """Python maps memory for its frames in chunks. Where the end of one, below hypothesis's many frames, falls among
    the interpreter's innermost calls, each of these maps and unmaps a chunk: that is two thirds of the time. A thread
    begins with a chunk of its own."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function, argument).result()


def pytest_terminal_summary(terminalreporter, config):
    if not ran:
        return
    backends = sorted({backend for _, backend in ran})
    terminalreporter.section(f"random configurations, seed {option(config, 'fuzz_seed')}")
    terminalreporter.line(f"{'':24}" + "".join(f"{backend:>22}" for backend in backends))
    for function in SHARES:
        terminalreporter.line(f"{function:24}" + "".join(f"{ran[function, backend]:22}" for backend in backends))
    totals = [sum(count for (_, of), count in ran.items() if of == backend) for backend in backends]
    terminalreporter.line(f"{'':24}" + "".join(f"{total:22}" for total in totals))
