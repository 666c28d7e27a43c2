"""Launch parameters: the table's, and those that tuning finds, keeps in a file, and launches.

Times are made up here: there is nothing to measure without a GPU (test_gpu.py measures).
"""

import json
import os
import warnings
from threading import Thread

import pytest
import torch

from batches import in_float64, make_batch, run_loss

pytest.importorskip("triton", reason="launch parameters are Triton's")

from triton.runtime.errors import OutOfResources

from gapo_kernels.kernels import config, gradient, statistics, tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
OTHER = {"BLOCK": 8192, "num_warps": 8}  # a candidate, and no architecture's choice
WORKLOAD = tuning.workload


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache's folder, which does not exist yet; a process that has launched nothing yet."""
    monkeypatch.setenv("GAPO_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GAPO_KERNELS_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "workload", lambda *arguments: lambda: None)
    new_process()
    yield tmp_path / "cache"
    new_process()


def new_process():
    tuning._known.cache_clear()
    config.forget()


def favour(winner, time=0.5):
    """A `measure` by which `winner` takes `time` and every other candidate 1."""

    def measure(run):
        run()
        return time if winner in config._forced.values() else 1.0

    return measure


def launched(kernel="statistics", dtype=BF16):
    return {name: value for name, value in config.launch(kernel, DEVICE, dtype).items() if name not in config.OPTIONS}


def table(kernel="statistics", dtype=BF16):
    return config.entry(kernel, config.architecture(DEVICE), dtype).parameters


# The table. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, same_as",
    [
        ("sm_90", "sm_90"),
        ("sm_89", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_75", "sm_80"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx950"),
        ("gfx1100", "sm_80"),  # 32 threads a warp
        ("xpu", "sm_80"),
        ("cpu", "sm_80"),
    ],
)
def test_nearest_architecture(architecture, same_as):
    for kernel, rows in config.TABLE.items():
        assert config.entry(kernel, architecture, BF16) is rows[same_as][2]
        assert config.entry(kernel, architecture, F16) is rows[same_as][2]
        assert config.entry(kernel, architecture, F32) is rows[same_as][4]
        assert config.entry(kernel, architecture, torch.float64) is rows[same_as][4]


def test_the_choice_is_looked_up_once(monkeypatch):
    first = config.launch("statistics", DEVICE, BF16)
    monkeypatch.setattr(config, "entry", None)
    monkeypatch.setenv("GAPO_KERNELS_AUTOTUNE", "1")
    assert config.launch("statistics", DEVICE, BF16) is first


def test_forced_parameters_end():
    with config.forced(statistics=OTHER):
        with config.forced(gradient=OTHER), pytest.raises(ZeroDivisionError):
            assert launched() == launched("gradient") == OTHER
            with config.forced(statistics={"BLOCK": 128, "num_warps": 1}):
                raise ZeroDivisionError
        assert launched() == OTHER and launched("gradient") == table("gradient")
    assert launched() == table()


# Tuning. ---------------------------------------------------------------------------------------------------------------


def test_the_fastest_is_chosen():
    found = tuning.tune(DEVICE, [BF16, F32], ["statistics", "gradient"], measure=favour(OTHER))
    assert found.keys() == {"statistics bfloat16", "gradient bfloat16", "statistics float32", "gradient float32"}
    for name, choice in found.items():
        assert choice["parameters"] == OTHER
        tried = [parameters for parameters, _ in choice["milliseconds"]]
        kernel, dtype = name.split()
        assert tried == tuning.candidates(kernel, config.architecture(DEVICE), getattr(torch, dtype))
        assert tried[0] == table(kernel, getattr(torch, dtype))
        assert [time for _, time in choice["milliseconds"]] == [0.5 if p == OTHER else 1.0 for p in tried]
    assert launched() == table()  # not asked for


def test_what_does_not_compile_is_not_chosen():
    def measure(failing):
        def time(run):
            if failing in config._forced.values():
                raise OutOfResources(300, 232, "shared memory")
            return 1.0

        return time

    found = tuning.tune(DEVICE, [BF16], ["statistics"], measure=measure(OTHER))["statistics bfloat16"]
    tried = [parameters for parameters, _ in found["milliseconds"]]
    assert found["parameters"] == table()
    assert tried == [p for p in tuning.candidates("statistics", config.architecture(DEVICE), BF16) if p != OTHER]
    with pytest.raises(OutOfResources):
        tuning.tune(DEVICE, [BF16], ["statistics"], measure=measure(table()))


def test_noise_does_not_choose():
    for time, expected in ((0.99, table()), (0.97, OTHER)):
        found = tuning.tune(DEVICE, [BF16], ["statistics"], measure=favour(OTHER, time))
        assert found["statistics bfloat16"]["parameters"] == expected


def test_candidates_of_the_perturbation():
    for architecture in ("sm_90", "gfx942"):
        first, half = tuning.candidates("perturbation", architecture, BF16)
        assert first == config.entry("perturbation", architecture, BF16).parameters
        assert half == {"num_warps": first["num_warps"] // 2}
    assert len(tuning.candidates("perturbation", "sm_100", BF16)) == 1  # half the warps spill


def test_every_kernel_is_tuned_unless_said_otherwise():
    found = tuning.tune(DEVICE, measure=favour(OTHER))
    assert len(found) == len(tuning.DTYPES) * len(config.TABLE)


# The file. -------------------------------------------------------------------------------------------------------------


def test_a_later_process_launches_what_was_tuned(cache, monkeypatch):
    tuning.tune(DEVICE, [BF16], measure=favour(OTHER))
    tuning.tune(DEVICE, [F32], ["gradient"], measure=favour(OTHER))  # beside what the file has
    new_process()
    monkeypatch.setenv("GAPO_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_median", None)
    assert launched() == launched("gradient") == launched("gradient", F32) == OTHER
    assert launched("perturbation") == table("perturbation")
    assert [file.suffix for file in cache.iterdir()] == [".json"]


def test_without_the_variable_the_file_is_not_read(cache, monkeypatch):
    tuning.tune(DEVICE, [BF16], measure=favour(OTHER))
    new_process()
    monkeypatch.setattr(tuning, "tuned", None)
    assert launched() == table()


def test_where_the_file_is(cache, monkeypatch, tmp_path):
    """And nothing is there before something is tuned."""
    assert tuning.cache_file(DEVICE).parent == cache and not cache.exists()
    monkeypatch.delenv("GAPO_KERNELS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_file(DEVICE).parent == tmp_path / "xdg/gapo-kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.cache_file(DEVICE).parent == tmp_path / "home/.cache/gapo-kernels"


@pytest.mark.parametrize("what", ["triton", "version", "architecture", "source"])
def test_choices_of_another_setting_are_another_files(cache, what, monkeypatch, tmp_path):
    tuning.tune(DEVICE, [BF16], measure=favour(OTHER))
    before = tuning.cache_file(DEVICE)
    new_process()
    if what == "triton":
        monkeypatch.setattr(tuning.triton, "__version__", "99.0")
    elif what == "version":
        monkeypatch.setattr(tuning.gapo_kernels, "__version__", "99.0")
    elif what == "architecture":
        monkeypatch.setattr(config, "architecture", lambda device: "sm_99")
    else:
        (tmp_path / "gradient.py").write_text("changed")
        monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    monkeypatch.setenv("GAPO_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_can_time", lambda device: False)
    assert tuning.cache_file(DEVICE) != before and before.exists()
    assert launched() == table()


def break_(text):
    return lambda good: text


def edit(change):
    def edited(good):
        content = json.loads(good)
        change(content)
        return json.dumps(content)

    return edited


@pytest.mark.parametrize(
    "broken",
    [
        break_(""),
        break_('{"identity": '),
        break_("[]"),
        break_("[" * 200_000),
        break_("{}"),
        edit(lambda content: content["identity"].update(device="another")),
        edit(lambda content: content.update(choices=[1])),
        edit(lambda content: content["choices"]["statistics bfloat16"].update(parameters={"BLOCK": 7, "num_warps": 4})),
        edit(lambda content: content["choices"]["statistics bfloat16"]["parameters"].update(BLOCK=8192.0)),
        edit(lambda content: content["choices"]["statistics bfloat16"].pop("parameters")),
        edit(lambda content: content["choices"].update({"statistics nothing": {"parameters": {}}})),
        edit(lambda content: content["choices"].update({"nothing bfloat16": {"parameters": {}}})),
    ],
)
def test_files_of_others_are_ignored_with_one_warning(broken, monkeypatch):
    tuning.tune(DEVICE, [BF16], measure=favour(OTHER))
    file = tuning.cache_file(DEVICE)
    file.write_text(broken(file.read_text()))
    new_process()
    monkeypatch.setenv("GAPO_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_can_time", lambda device: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert launched() == table() and launched("gradient") == table("gradient")
    assert len(caught) == 1 and f"{file} is ignored" in str(caught[0].message)
    tuning.tune(DEVICE, [BF16], measure=favour(OTHER))  # replaces it
    new_process()
    assert launched() == launched("gradient") == OTHER


def test_the_file_is_whole_or_the_old_one(cache, monkeypatch):
    tuning.tune(DEVICE, [BF16], measure=favour(OTHER))
    file = tuning.cache_file(DEVICE)
    before = file.read_text()

    def full(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(tuning.os, "replace", full)
    with pytest.warns(UserWarning, match="cannot be written: OSError: no space left"):
        tuning.tune(DEVICE, [F32], measure=favour(OTHER))
    assert file.read_text() == before and [file] == list(cache.iterdir())


def test_what_other_processes_found_meanwhile_is_kept(monkeypatch):
    tuning.tune(DEVICE, [BF16], ["gradient"], measure=favour(OTHER))
    theirs = tuning.cache_file(DEVICE).read_text()
    tuning.cache_file(DEVICE).unlink()
    new_process()

    def measure(run):
        tuning.cache_file(DEVICE).write_text(theirs)
        return favour(OTHER)(run)

    tuning.tune(DEVICE, [BF16], ["gradient"], measure=lambda run: 1.0)
    tuning.tune(DEVICE, [F32], ["statistics"], measure=measure)
    choices = json.loads(tuning.cache_file(DEVICE).read_text())["choices"]
    assert choices["gradient bfloat16"]["parameters"] == choices["statistics float32"]["parameters"] == OTHER


def test_of_two_processes_that_write_at_once_neither_loses_its_choice(cache, monkeypatch):
    theirs = tuning.tune(DEVICE, [BF16], ["gradient"], measure=favour(OTHER))
    ours = tuning.tune(DEVICE, [BF16], ["statistics"], measure=favour(OTHER))
    file, read, others = tuning.cache_file(DEVICE), tuning._read, []
    file.unlink()
    new_process()
    tuning._known(file, DEVICE)

    def reading(*arguments):
        try:
            return read(*arguments)
        finally:
            if not others:
                new_process()
                others.append(Thread(target=tuning._save, args=(DEVICE, theirs)))
                others[0].start()
                others[0].join(0.2)

    monkeypatch.setattr(tuning, "_read", reading)
    tuning._save(DEVICE, ours)
    others[0].join()
    assert json.loads(file.read_text())["choices"].keys() == {"gradient bfloat16", "statistics bfloat16"}
    assert list(cache.iterdir()) == [file]


@pytest.mark.parametrize("error", [ImportError, OSError, BlockingIOError])
def test_a_folder_that_cannot_be_locked_is_written(cache, error, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refused(*arguments):
        raise error

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(tuning, "sleep", lambda seconds: None)
    tuning.tune(DEVICE, [BF16], measure=favour(OTHER))
    assert list(cache.iterdir()) == [tuning.cache_file(DEVICE)]


# The first launch. -----------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """GAPO_KERNELS_AUTOTUNE=1 on a device that can time: which kernels were."""
    names = []
    monkeypatch.setenv("GAPO_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_can_time", lambda device: True)
    monkeypatch.setattr(tuning, "_median", favour(OTHER))
    monkeypatch.setattr(tuning, "workload", lambda kernel, *arguments: lambda: names.append(kernel))
    return names


def test_the_first_launch_tunes(timed):
    assert launched() == OTHER and set(timed) == {"statistics"}
    timed.clear()
    assert launched("gradient") == OTHER and set(timed) == {"gradient"}
    timed.clear()
    assert launched() == launched("gradient") == OTHER
    new_process()
    assert launched() == OTHER and not timed
    assert launched(dtype=F32) == OTHER and set(timed) == {"statistics"}


def test_of_ranks_that_tune_at_the_same_time_all_launch_alike(timed, monkeypatch):
    """The first to write decides: two ranks that add up in different orders would move to different anchors."""
    assert launched() == OTHER
    file = tuning.cache_file(DEVICE)
    theirs = file.read_text()
    file.unlink()
    new_process()

    def mine_is_the_table(run):
        file.write_text(theirs)  # another rank is done meanwhile
        return favour(table())(run)

    monkeypatch.setattr(tuning, "_median", mine_is_the_table)
    assert launched() == OTHER != table()
    new_process()
    assert launched() == OTHER


def test_a_cache_that_cannot_be_written(cache, timed):
    """Tuned once in each process, and not again whenever another kernel is."""
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert launched() == launched("gradient") == OTHER
    timed.clear()
    assert launched() == launched("gradient") == OTHER and not timed


def test_without_a_home_directory(timed, monkeypatch, tmp_path):
    """As with a cache that cannot be written; said once."""

    def nobody(number):
        raise KeyError(number)

    for name in ("GAPO_KERNELS_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert launched() == launched("gradient") == OTHER
    assert [str(one.message) for one in caught] == [
        "the cache of launch parameters is ignored: there is no home directory"
    ]
    timed.clear()
    assert launched() == launched("gradient") == OTHER and not timed and not list(tmp_path.iterdir())


def test_no_memory_to_tune(timed, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(tuning, "workload", full)
    with pytest.warns(UserWarning, match="no memory to tune statistics bfloat16, which runs untuned: out of memory"):
        assert launched() == table()
    assert launched() == table()  # not tried again


def test_tuning_in_time_for_later_launches(monkeypatch):
    """`tune` after a launch of the same process: the next one takes the new choice."""
    monkeypatch.setenv("GAPO_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_can_time", lambda device: False)
    assert launched() == table()
    tuning.tune(DEVICE, [BF16], measure=favour(OTHER))
    assert launched() == OTHER


@pytest.mark.skipif(GPU, reason="a GPU can")
def test_a_cpu_is_not_timed(monkeypatch):
    monkeypatch.setenv("GAPO_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_median", None)
    assert launched() == table()


# What is launched. -----------------------------------------------------------------------------------------------------


class Recorded:
    """A kernel that remembers what it was launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append(options)
            return self.kernel[grid](*arguments, **options)

        return launch


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED and not GPU, reason="kernels run on a GPU or in the interpreter")
def test_what_was_tuned_is_launched(monkeypatch):
    tuning.tune(DEVICE, [F32], measure=favour(OTHER))
    new_process()
    monkeypatch.setenv("GAPO_KERNELS_AUTOTUNE", "1")
    for module, name in ((statistics, "statistics_kernel"), (gradient, "gradient_kernel")):
        monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    batch = make_batch(4, 3, 41, dtype=F32, device=DEVICE)
    found = run_loss(batch, "triton", anchor_logits=batch.anchor_logits)
    for kernel in (statistics.statistics_kernel, gradient.gradient_kernel):
        assert [{name: options[name] for name in OTHER} for options in kernel.launches] == [OTHER]
    expected = in_float64(run_loss, batch, anchor_logits=batch.anchor_logits)
    torch.testing.assert_close(found.gradient.double(), expected.gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED and not GPU, reason="kernels run on a GPU or in the interpreter")
@pytest.mark.parametrize("kernel", config.TABLE)
def test_the_workload_is_the_kernel(kernel, monkeypatch):
    """It launches what it is named for; the caller's random numbers stay as they are."""
    asked, launch = [], config.launch
    monkeypatch.setattr(config, "launch", lambda name, *key: asked.append(name) or launch(name, *key))
    monkeypatch.setattr(tuning, "VOCABULARY", 200)
    state = torch.get_rng_state()
    WORKLOAD(kernel, DEVICE, F32, scratch_bytes=2400)()
    assert set(asked) == {kernel}
    assert torch.equal(state, torch.get_rng_state())
