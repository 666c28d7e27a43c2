"""What can run in this process, and the fixtures that choose it.

The same test files run in three settings: a plain process (the CPU path), a process with TRITON_INTERPRET=1 (the Triton
kernels, small vocabularies only, on a pretend GPU where one can be had and else on CPU tensors), and a process on a machine
with a GPU (both, the kernels compiled).
`pytest -m kernels` selects the tests that depend on the back end: the ones worth running under the interpreter.
"""

import inspect
import os
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import pretend_gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PRETEND = INTERPRETED and pretend_gpu.install()  # before torch is there

import torch  # noqa: E402

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # the source tree, also when it is not installed
    sys.path.insert(0, str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # where there is no network, each look at the hub takes most of a minute

GPU = torch.cuda.is_available() and (PRETEND or not INTERPRETED)
if INTERPRETED:
    BACKENDS = ["triton-small-tiles"]
elif GPU:
    BACKENDS = ["torch", "triton", "triton-small-tiles"]
else:
    BACKENDS = ["torch"]


def hasten_the_interpreter():
    """At each call of one kernel's function by another, Triton's interpreter replaces all builtins of its language, which
    the call around it has replaced already, and for each array it makes anew its table of dtypes: half of these tests'
    time."""
    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    known, replaced = {}, set()

    def patch_builtin(package, *scope):
        if package not in known:
            known[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        for name in known[package]:
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *scope)

    def patch_lang(function):
        languages = {name for name, module in (("tl", tl), ("core", tl.core)) if sees(function, module)}
        if languages <= replaced:
            return interpreter._LangPatchScope()
        outermost = not replaced
        replaced.update(languages)
        scope = patch_language(function)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (replaced.clear(), restore())
        return scope

    @lru_cache(maxsize=None)
    def sees(function, module):
        return any(value is module for value in function.__globals__.values())

    names = ("_patch_builtin", "_patch_attr", "_patch_lang", "_LangPatchScope", "_get_np_dtype")
    if all(hasattr(interpreter, name) for name in names):
        patch_language = interpreter._patch_lang
        interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_lang
        dtype_of, of_scalar = interpreter._get_np_dtype, lru_cache(interpreter._get_np_dtype)
        interpreter._get_np_dtype = lambda of: (dtype_of if of.scalar.is_ptr() else of_scalar)(of.scalar)


def round_to_nearest():
    """As a GPU does where it stores float32 as bfloat16: Triton's interpreter cuts the digits off."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def rounds(source, target):
        return source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16

    def rounded(source):
        values = np.ascontiguousarray(source.data, dtype=np.float32)
        bits = torch.from_numpy(values.reshape(-1)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits.reshape(values.shape), tl.bfloat16)

    def patched(cast):
        return lambda builder, source, target, *mode: (
            rounded(source) if rounds(source, target) else cast(builder, source, target, *mode)
        )

    for name in ("create_fp_trunc", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, patched(getattr(InterpreterBuilder, name)))


if INTERPRETED:
    hasten_the_interpreter()
    round_to_nearest()
if PRETEND:
    pretend_gpu.let_the_interpreter_in()


def pytest_addoption(parser):
    parser.addoption("--shard", metavar="I/N", help="the I-th of N parts of the tests, 1 <= I <= N, for processes side by side")


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: depends on the back end; what the interpreter should run")
    # numpy says aloud what the interpreted kernels rely on: lowest - x overflows to -inf, inf - inf is NaN
    config.addinivalue_line("filterwarnings", "ignore:(overflow|invalid|divide|All-NaN):RuntimeWarning:triton")


@pytest.hookimpl(hookwrapper=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "backend" in item.fixturenames:
            item.add_marker(pytest.mark.kernels)
    yield  # -m and -k choose
    if shard := config.getoption("--shard"):
        number, count = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % count != number - 1])
        items[:] = items[number - 1 :: count]


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
    """Whether the kernels run in Triton's interpreter, which is slow."""
    return INTERPRETED


@pytest.fixture
def passes(backend, monkeypatch):
    """Has the anchor use the back end under test also on CPU tensors."""
    if backend == "triton":
        from gapo_kernels import displacement
        from gapo_kernels.kernels.perturbation import Perturbation

        monkeypatch.setattr(displacement, "_back_end", lambda device: Perturbation)
