"""What can run in this process, and the fixtures that choose it.

The same test files run in three settings: a plain process (the CPU path), a process with TRITON_INTERPRET=1 (the Triton
kernels on CPU tensors, small vocabularies only), and a process on a machine with a GPU (both, the kernels compiled).
`pytest -m kernels` selects the tests that depend on the back end: the ones worth running under the interpreter.
"""

import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # the source tree, also when it is not installed
    sys.path.insert(0, str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # where there is no network, each look at the hub takes most of a minute

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = not INTERPRETED and torch.cuda.is_available()
if INTERPRETED:
    BACKENDS = ["triton-small-tiles"]
elif GPU:
    BACKENDS = ["torch", "triton", "triton-small-tiles"]
else:
    BACKENDS = ["torch"]


def remember_builtins():
    """Triton's interpreter looks through its whole language at each call of one kernel's function by another, a third of
    these tests' time, for builtins that it has not replaced yet: this tells it where they are."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    known = {}

    def patch_builtin(package, *scope):
        if package not in known:
            known[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        for name in known[package]:
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *scope)

    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = patch_builtin


if INTERPRETED:
    remember_builtins()


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: depends on the back end; what the interpreter should run")
    # numpy says aloud what the interpreted kernels rely on: lowest - x overflows to -inf, inf - inf is NaN
    config.addinivalue_line("filterwarnings", "ignore:(overflow|invalid|divide|All-NaN):RuntimeWarning:triton")


def pytest_collection_modifyitems(items):
    for item in items:
        if "backend" in item.fixturenames:
            item.add_marker(pytest.mark.kernels)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The back end under test. Tiles of 128 put whole, masked and ragged tiles and several splits into small rows.

    128 is the least: a tile's lanes, of eight 16-bit elements each, must hold the 14 that can stand around the aligned
    part.
    """
    name, _, tiles = request.param.partition("-")
    if not tiles:
        yield name
        return
    from gapo_kernels.kernels import config

    monkeypatch.setitem(config.PAIRS, "ROWS", 4)
    # Two or three splits of the rows in these tests, on the one processor that the interpreter has.
    monkeypatch.setattr(config, "PROGRAMS_PER_PROCESSOR", 100)
    small = {"BLOCK": 128, "num_warps": 4}
    with config.forced(statistics=small, gradient=small):
        yield name


@pytest.fixture
def device(backend):
    return torch.device("cuda" if backend == "triton" and GPU else "cpu")


@pytest.fixture
def interpreted(backend):
    """Whether the kernels run in Triton's interpreter, whose stores to bfloat16 truncate."""
    return INTERPRETED


@pytest.fixture
def passes(backend, monkeypatch):
    """Has the anchor use the back end under test also on CPU tensors."""
    if backend == "triton":
        from gapo_kernels import displacement
        from gapo_kernels.kernels.perturbation import Perturbation

        monkeypatch.setattr(displacement, "_back_end", lambda device: Perturbation)
