"""The documents and plots are what bench/results/ gives, and the generator makes of other results what they say."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from bench import harness, plots, report, tables
from bench.results import LEAST_SWEEP, Results

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in report.DOCUMENTS}


def case(suite="logits", *, eager=3.0, floor=0.5, kind="copy", peers=(), **params):
    """One case as the harness makes it, in which ours takes 20 ms and eager `eager` times that."""
    params = {"pairs": 2, "length": 8, "vocabulary": 1000, "dtype": "float32", "ignored": 0.5} | params | {"data": "random"}
    if suite == "linear":
        params["width"] = 16
    seconds = {"ours": 0.020, "eager": 0.020 * eager, kind: 0.020 * floor, **dict.fromkeys(peers, 0.070)}
    times = {name: [value] * 6 for name, value in seconds.items()}
    peaks = dict.fromkeys(seconds, 7.0) | {"ours": 0.6}
    more = {"peak_beyond_inputs_mib": peaks, "absent": {"trl": "not installed"}}
    return harness.result(suite, str(params), params, times, [kind], copy_bandwidth_gb_per_s=10.0, **more)


def step():
    times = {name: [seconds] * 3 for name, seconds in {"authors": 14.0, "ours": 10.5, "ours-eager-head": 12.0}.items()}
    more = {"peak_beyond_weights_mib": dict.fromkeys(times, 100.0), "gap_errors": dict.fromkeys(times, 0.056)}
    params = {"model": "SmolLM2-135M", "pairs": 8, "dtype": "float32"}
    shares = {n: harness.ratio(times[n], times["authors"]) | {"spread": 0.02} for n in ("ours", "ours-eager-head")}
    more |= {"of_authors": shares, "absent": {}}
    return harness.result("step", "SmolLM2", params, times, [], **more)


def sweep(suite, **options):
    varied = {"vocabulary": [500, 2000], "length": [4], "ignored": [0.0, 0.9], "pairs": [4], "dtype": ["bfloat16"]}
    return [case(suite, **options), *(case(suite, **options, **{n: v}) for n, vs in varied.items() for v in vs)]


def fill(root):
    """The documents, the committed results of rounding and demo, and one run of three suites."""
    results = root / "bench" / "results"
    results.mkdir(parents=True)
    for pattern in ("anchor-rounding-*.json", "demo-*.json"):
        for path in (ROOT / "bench" / "results").glob(pattern):
            shutil.copy(path, results)
    (root / "docs").mkdir()
    for name, text in TEXTS.items():
        (root / name).write_text(text, encoding="utf-8")
    harness.write_results("logits", [case(peers=["compiled"], eager=4.25), *sweep("logits")], folder=results)
    linear = [case("linear", kind="gemms", vocabulary=7777, length=16), *sweep("linear", kind="gemms")]
    harness.write_results("linear", linear, folder=results)
    harness.write_results("step", [step()], folder=results)


@pytest.fixture
def project(tmp_path):
    fill(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose report was made, for copies."""
    root = tmp_path_factory.mktemp("finished")
    fill(root)
    report.report(root)
    return root


@pytest.fixture
def reported(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "reported")


def blocks_of(root):
    return tables.blocks(Results(root / "bench" / "results"), {})


def changed(path, **values):
    content = json.loads(path.read_text())
    content["cases"][0] |= values
    path.write_text(json.dumps(content))


def test_documents_and_plots_are_what_the_results_give():
    assert report.report(ROOT, check=True) == [], "run `make report`"


def test_every_stretch_is_used():
    used = set(re.findall(r"<!-- generated: ([a-z0-9-]+) -->", "".join(TEXTS.values())))
    assert used == blocks_of(ROOT).keys()


# What was chosen or follows by arithmetic, bounds of tests, and how a table is to be read.
NOT_MEASURED = (
    "the labels of 20 % of its",
    "`max_logits_bytes`, 1 GiB unless",
    "take over 100 GiB with their gradients",
    "a budget of 1 GiB (arithmetic",
    "3.0x takes three times as long",
    "near 100 % nothing is left to gain",
    '"64 MiB" is the most logits',
    "at most 1.5x the eager path's",
    "a bucket of 32 MiB to average in",
    "shares may exceed 100 %",
)


@pytest.mark.parametrize("name", TEXTS)
def test_what_people_write_has_nothing_measured_and_no_line_that_markdown_takes_for_html(name):
    written = report.STRETCH.sub("", TEXTS[name])
    for text in NOT_MEASURED:
        written = written.replace(text, "")
    units = r"x|e\d+| (?:%|[KMGT]?i?B(?:/s)?|ms|us|s|(?:T|G)?FLOPS?(?:/s)?|tokens per second|times|percent)"
    assert not re.findall(rf".*(?<![\w.])\d[\d.,]*(?:{units})(?!\w).*", written)
    assert not re.findall(r"^ *<!-- generated: [a-z0-9-]+ -->.+", TEXTS[name], re.MULTILINE)


def test_each_exception_is_needed():
    assert not [text for text in NOT_MEASURED if not any(text in written for written in TEXTS.values())]


def test_the_plots_are_small():
    for path in (ROOT / report.PLOTS).glob("*.png"):
        assert path.stat().st_size < 80_000, path


def test_a_report_is_complete_and_made_once(project, reported):
    device = harness.slug(harness.device_name())
    pictures = {f"docs/plots/{kind}-{device}.png" for kind in ("logits", "linear", "step", "roofline")}
    rounding = "docs/plots/anchor-rounding.png"
    assert set(report.report(project, check=True)) == {"README.md", "docs/anchor.md", "docs/performance.md", rounding} | pictures
    assert not (project / "docs/plots").exists()
    assert report.report(reported, check=True) == report.report(reported) == []
    readme, performance = (reported / "README.md").read_text(), (reported / "docs/performance.md").read_text()
    for path in pictures:
        assert path in readme or "roofline" in path
        assert f"(plots/{Path(path).name})" in performance and (reported / path).stat().st_size < 80_000


def test_the_rounding_plot_shows_what_the_file_says():
    content = json.loads(next((ROOT / "bench/results").glob("anchor-rounding-*.json")).read_text())
    data = plots._errors(content)
    for panel, part, x in (("rho", "rho", "rho"), ("random", "parameters", "parameters")):
        for point in data["panels"][panel]:
            cases = [case for case in content["cases"] if case["part"] == part and case[x] == point["x"]]
            for name, errors in point["errors"].items():
                assert sorted(errors) == sorted(e for case in cases for e in case["roundings"][name]["errors"]) != []
    (smollm2,) = data["panels"]["smollm2"]
    assert smollm2["errors"] == next(p["errors"] for p in data["panels"]["rho"] if p["x"] == data["rho"])


def test_a_demo_is_adopted_if_it_ran_to_its_end_with_default_settings(tmp_path):
    run = json.loads(next((ROOT / "bench/results").glob("demo-*.json")).read_text())
    run["settings"] |= {"output_dir": "runs/demo", "cpu": False, "time_limit": 60.0}

    def adopted(**changes):
        (tmp_path / "metrics.json").write_text(json.dumps(run | changes))
        return report.adopt(tmp_path, tmp_path)

    path = adopted(device="cpu, 2 threads")
    found = json.loads(path.read_text())
    assert path.name == f"demo-{harness.slug(harness.device_name())}.json" and found["device"] == harness.device_name()
    assert found["findings"] == run["findings"] and "output_dir" not in found["settings"]
    for changes in (dict(interrupted=True), dict(out_of_time=True), dict(settings=run["settings"] | {"max_steps": 5})):
        with pytest.raises(SystemExit, match="expected a demo that ran to its end with the settings"):
            adopted(**changes)


def test_tables_say_what_the_files_say(project):
    blocks = blocks_of(project)
    rows = [line for line in blocks["logits-table"]().splitlines() if line.startswith("|")]
    # The one case outside of the sweep: ours 20 ms, eager, torch.compile, half of it the floor.
    assert rows[0] == "| ours | eager | torch.compile | floor / ours | memory, ours | memory, eager |"
    assert rows[2:] == ["| 20.0 ms | 4.2x | 3.5x | 50 % | 1 MiB | 7 MiB |"]
    assert "T = 8, V = 1000, float32, 50 % ignored rows, random data" in blocks["logits-table"]()
    assert "Not measured: TRL (not installed). Between the thirds of a run the ratios" in blocks["logits-table"]()
    assert len(re.findall(r"^\| \d", blocks["logits-all"](), re.MULTILINE)) == 1 + len(sweep("logits"))
    assert "4.25x (4.25 to 4.25)" in blocks["logits-all"]()
    changed(next((project / "bench" / "results").glob("logits-*.json")), goals={"eager": 4})
    assert "; " not in (table := blocks_of(project)["logits-table"]()) and "eager 4.25x of 4x (moved by 0 %)." in table
    assert "| four GEMMs | 10.0 ms | 20.0 ms | 50 % |" in blocks["linear-floor"]()
    assert "| SmolLM2 | authors' recipe | 14.0 s | 1.00 | 100 MiB | 5.6 % |" in blocks["step-table"]()
    assert "| SmolLM2 | ours | 10.5 s | 0.75 | 100 MiB | 5.6 % |" in blocks["step-table"]()
    assert "| SmolLM2 | ours, eager head | 0.857 | 0.857 | 100 % |" in blocks["step-floor"]()
    assert "10 to 10 GB/s" in blocks["bandwidth"]()


def test_new_results_make_the_documents_stale(reported):
    results = reported / "bench/results"
    changed(next(results.glob("step-*.json")), **{"gap_errors": dict.fromkeys(step()["times"], 0.5)})
    assert report.report(reported, check=True) == ["README.md", "docs/anchor.md", "docs/performance.md"]
    report.report(reported)
    linear = next(results.glob("linear-*.json"))
    content = json.loads(linear.read_text())
    content["cases"][1]["times"]["eager"]["median_ms"] *= 2  # drawn, and in no document's table
    linear.write_text(json.dumps(content))
    stale = report.report(reported, check=True)
    assert {Path(name).suffix for name in stale} == {".csv", ".png"}
    assert all(Path(name).name.startswith("linear-") for name in stale)


def test_typed_numbers_and_foreign_plots_are_found_and_mended(reported):
    readme, stray = reported / "README.md", reported / "docs/plots/typed.png"
    before = readme.read_text()
    readme.write_text(before.replace("| 4.2x |", "| 9.9x |"))
    stray.write_bytes(b"")
    assert report.report(reported, check=True) == ["README.md", "docs/plots/typed.png"]
    report.report(reported)
    assert readme.read_text() == before and not stray.exists()


def test_a_table_beside_the_results_is_found_and_mended(reported):
    table = next((reported / "bench" / "results").glob("linear-*.csv"))
    before, name = table.read_text(), str(table.relative_to(reported))
    table.write_text(before.replace("7777", "7778"))
    assert report.report(reported, check=True) == [name]
    table.unlink()
    assert report.report(reported) == [name] and table.read_text() == before


def test_without_a_run_the_documents_say_which_command_makes_one(project):
    for path in (project / "bench/results").glob("l*.json"):
        path.unlink()
    blocks = blocks_of(project)
    assert tables.NOTHING in blocks["logits-table"]() and tables.AWAITS in blocks["logits-table"]()
    assert all("waits a GPU" in blocks[name]() for name in ("gpu-status", "gpu-tests", "gpu-missing", "tuning"))


def test_a_gpu_has_sections_of_its_own_and_its_whole_run_goes_before_single_suites(project):
    results = project / "bench/results"
    environment = harness.environment() | {"device": "NVIDIA H100"}
    whole = {
        "finished": True,
        "tests": [
            {"counts": {"passed": 30, "failed": 1}, "complete": False, "status": 1},
            {"counts": {"passed": 10}, "complete": True, "status": 0},
            {"counts": {"passed": 2}, "complete": False, "status": None},
        ],
        "tuning": {"gradient bfloat16": {"parameters": {"B": 2}, "milliseconds": [[{"B": 1}, 0.3], [{"B": 2}, 0.2]]}},
        "left_out": {"step: Llama": "no time was left"},
        "failed": {"linear: large": "OutOfMemoryError: first line\nsecond line"},
    }
    for name, eager, more in (("logits", 5.0, {}), ("gpu", 6.0, whole)):
        content = {"environment": environment, "command": name, **more, "cases": [case(eager=eager)]}
        (results / f"{name}-nvidia-h100.json").write_text(json.dumps(content))
    blocks = blocks_of(project)
    table = blocks["logits-table"]()
    cpu, gpu = table.split("**NVIDIA H100**")
    assert harness.device_name() in cpu and "6.0x" in gpu and "5.0x" not in gpu and tables.AWAITS not in table
    assert "measured on NVIDIA H100" in blocks["gpu-status"]()
    tests = "on NVIDIA H100: 42 passed, 1 failed, ended with return code 1, stopped for want of time"
    assert blocks["gpu-tests"]() == tests
    missing = blocks["gpu-missing"]()
    assert missing.endswith("- step: Llama: no time was left\n- linear: large: OutOfMemoryError: first line")
    assert "| gradient bfloat16 | B 2 | 0.200 ms | 1.50 | 1.00 to 1.50 |" in blocks["tuning"]()
    changed_run = json.loads((results / "gpu-nvidia-h100.json").read_text()) | {"tuning": {"absent": "no Triton"}}
    (results / "gpu-nvidia-h100.json").write_text(json.dumps(changed_run))
    assert blocks_of(project)["tuning"]() == "On NVIDIA H100 nothing was tuned: no Triton."
    for own, whole, shown in (("2030", "2029", "5.0x"), ("2029", "2030", "6.0x"), ("2030", "2030", "6.0x")):
        for name, measured in (("logits", own), ("gpu", whole)):
            path = results / f"{name}-nvidia-h100.json"
            content = json.loads(path.read_text())
            path.write_text(json.dumps(content | {"environment": content["environment"] | {"measured": measured}}))
        assert shown in blocks_of(project)["logits-table"]().split("**NVIDIA H100**")[1]


def test_a_contender_that_ran_out_of_memory_leaves_a_gap(project):
    path = next((project / "bench/results").glob("logits-*.json"))
    content = json.loads(path.read_text())
    first = content["cases"][0]
    for part in (first["times"], first["ratios"], first["peak_beyond_inputs_mib"]):
        del part["eager"]
    path.write_text(json.dumps(content))
    assert "| 20.0 ms | 3.5x | 50 % | 1 MiB | – |" in blocks_of(project)["logits-table"]()
    assert plots.pictures(Results(project / "bench/results"))


def test_the_sweep_is_one_case_and_its_neighbours(project):
    run = Results(project / "bench/results").runs("logits")[0]
    assert len(run.sweep()) == len(sweep("logits")) and all("compiled" not in one["times"] for one in run.sweep())
    assert [one["ratios"]["eager"]["median"] for one in run.headline()] == [pytest.approx(4.25)]
    few = run._replace(cases=run.cases[: LEAST_SWEEP - 1])
    assert few.sweep() == [] and few.headline() == few.cases
    columns = plots._sweep(run)["columns"]
    assert [(c["axis"], [p["x"] for p in c["points"]]) for c in columns] == [
        ("vocabulary", [500, 1000, 2000]),
        ("length", [4, 8]),
        ("ignored", [0, 50, 90]),
        ("pairs", [2, 4]),
    ]
    assert columns[0]["points"][0]["fraction"] == {"ours": pytest.approx(50), "eager": pytest.approx(50 / 3)}


def test_the_anchors_passes_are_one_point_if_all_were_measured():
    parameters = {"model": "tiny", "rounding": "nearest", "parameters": 100}
    cases = [case("anchor", eager=2.0, **parameters, **{"pass": name}) for name in ("norm", "exchange", "restore")]
    (whole,) = plots._whole_anchors([*cases, case("anchor", **parameters | {"rounding": "stochastic", "pass": "norm"})])
    assert whole["times"] == {"ours": {"median_ms": pytest.approx(60)}, "eager": {"median_ms": pytest.approx(120)}}


def test_the_roofline_counts_useful_operations(project):
    logits, linear = Results(project / "bench/results").runs("logits", "linear")
    data = plots._roofline(logits, linear, None)
    point = next(p for p in data["points"] if (p["group"], p["who"]) == ("linear", "ours"))
    kept, every, width, vocabulary = 2 * 2 * 8, 2 * 2 * 16, 16, 7777  # half of the rows
    operations = 4 * 2 * kept * width * vocabulary
    assert point["y"] == pytest.approx(operations / 0.020)
    assert point["x"] == pytest.approx(operations / (4 * width * (2 * kept + every + 2 * vocabulary)))
    assert data["bandwidth"] == pytest.approx(10e9)
    assert data["ceilings"] == [{"name": "GEMMs, float32", "y": pytest.approx(2 * point["y"])}]


@pytest.mark.parametrize(
    "text",
    ["<!-- generated: logits -->", "<!-- end -->", "<!-- generated: no-such --><!-- end -->"],
)
def test_broken_markers_raise(text):
    with pytest.raises(ValueError, match="expected"):
        report.filled(text, {"logits": lambda: ""})


def test_errors_of_batches_together_are_those_of_all_their_pairs():
    gaps = [[3.0, -4.0], [0.5, 0.0, 1.2]]  # norms 5 and 1.3
    found = [[[3.3, -4.4], [0.5, 0.0, 1.2]], [[3.0, -4.0], [0.0, 0.0, 1.2]]]  # of two seeds

    def off(some, others):
        return sum((a - b) ** 2 for a, b in zip(some, others)) ** 0.5

    cases = [
        {"true_gaps": truth, "roundings": {"way": {"errors": [off(seed[i], truth) / off(truth, [0] * 3) for seed in found]}}}
        for i, truth in enumerate(gaps)
    ]
    truth = gaps[0] + gaps[1]
    expected = [off(seed[0] + seed[1], truth) / off(truth, [0] * 5) for seed in found]
    assert tables._joined_errors(cases, "way") == pytest.approx(expected)


def test_numbers():
    assert [tables.significant(x) for x in (0.084, 2.04, 12.4, 574.2)] == ["0.084", "2.0", "12", "574"]
    assert [tables.milliseconds(x) for x in (0.3551, 13, 9999, 14321)] == ["0.355 ms", "13.0 ms", "9999 ms", "14.3 s"]
    assert tables.spread([0.01, 0.02, 0.03]) == "2.0 % (1.0 to 3.0)" and tables.power(1.56e-4) == "1.6e-4"


@pytest.mark.parametrize("error, comparable", [(0.2, True), (0.9, False)])
def test_a_goal_of_the_step_stands_beside_the_gaps_errors(error, comparable):
    name = "authors-float32"
    case = {"name": "a step", "goals": {name: 4}, "ratios": {name: {"median": 5.0}}, "ratio_spread": {name: 0.01}}
    said = tables.goals_of(case | {"gap_errors": {name: 0.0, "ours": error}})
    assert f"5.00x of 4x (moved by 1.0 %; gaps off by 0 %, ours by {100 * error:.0f} %" in said
    assert ("not comparable" not in said) is comparable


def test_a_goal_that_is_missed_or_unsteady_says_so():
    case = {"name": "a case", "goals": {"eager": 4}, "floor_goals": {"whole": 0.87}}
    for ratio, moved, fraction, said in (
        (4.0, 0.15, 0.87, "a case: eager 4.00x of 4x (moved by 15 %), whole 87% of the floor's 87%"),
        (3.9, 0.16, 0.86, "a case: eager 3.90x of 4x, missed (moved by 16 %, unsteady), whole 86% of the floor's 87%, missed"),
    ):
        found = {"ratios": {"eager": {"median": ratio}}, "ratio_spread": {"eager": moved}, "floor": {"fraction": fraction}}
        assert tables.goals_of(case | found) == said
    case |= {"goals": {"eager": 4, "trl": 1.5}, "floor_goals": {}}
    found = {"ratios": {"eager": {"median": 5.0}}, "ratio_spread": {"eager": None}}
    few = "eager 5.00x of 4x (in too few rounds to tell how steady)"
    assert tables.goals_of(case | found) == f"a case: {few}, TRL not measured, of 1.5x"
    profile = [{"name": name, "share": share} for name, share in (("gemm", 0.7), ("softmax", 0.2), ("copy", 0.06), ("add", 0.04))]
    said = tables.goals_of(case | found | {"profile": profile})
    assert said.endswith("of 1.5x (most of the time in gemm 70 %, softmax 20 %, copy 6.0 %)")


def test_a_case_that_failed_is_named(project):
    for suite, block in (("logits", "logits-table"), ("step", "step-table")):
        path = next((project / "bench/results").glob(f"{suite}-*.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | {"failed": {"a case": "ValueError: no"}}))
        assert "Failed: a case (ValueError: no)." in blocks_of(project)[block]()


def test_a_plot_is_stale_where_a_name_in_it_has_changed(monkeypatch):
    picture = plots.Picture("", {"points": []}, None)
    before = picture.digest()
    assert picture.digest() == before
    monkeypatch.setitem(tables.CONTENDERS, "trl", "another name")
    assert picture.digest() != before
