"""The generated stretches of the documents, by name: tables, and numbers within sentences."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean, median

from bench.results import Case, Results, Run, kept_logits

AWAITS = "**Awaits a GPU**, on which `make bench-gpu` measures this."
NOTHING = "No results yet: `make bench` measures them."
CONTENDERS = {
    "eager-view": "eager, no slice",
    "compiled": "torch.compile",
    "trl": "TRL",
    "trl-1024": "TRL, 1024 columns at a time",
    "liger": "Liger",
    "liger-all": "Liger, all pairs at once",
    "liger-compiled": "Liger, compiled",
    "lce": "linear_cross_entropy",
    "lce-chunked": "linear_cross_entropy, chunked",
    "lce-64mib": "linear_cross_entropy, 64 MiB",
    "cce": "cut-cross-entropy",
    "ours-64mib": "ours, 64 MiB",
    "authors": "authors' recipe",
    "authors-float32": "authors' recipe in float32",
    "authors-tf32": "authors' recipe in TF32",
    "ours": "ours",
    "ours-logits": "ours, `sequence_logps`",
    "ours-eager-head": "ours, eager head",
    "ours-shared": "ours, `share_backward`",
    "ours-shared-eager-head": "ours, `share_backward`, eager head",
    "foreach": "torch._foreach",
}
# The gaps' error up to which a step in 16 bits may be measured by one in float32: what rounding activations takes
# (docs/anchor.md), with some room. To nearest, the weights' rounding takes more.
COMPARABLE = 0.4
SHOWN_KERNELS = 3  # of a profile
GOALS = ("goals", "floor_goals", "share_goals")
STEADY = 0.15  # how far a ratio with a goal may move between the thirds of a run
# Of the authors' time, with the same head: forwards' worth of work.
STEP_FLOORS = {"ours-eager-head": 6 / 7, "ours-shared-eager-head": 5 / 7}
EXPONENTIALS = "three exponentials"  # the floor's name in the logits path's times
FLOORS = {"copy": "memory traffic", EXPONENTIALS: "exponentials", "gemms": "four GEMMs"}
PARAMETERS = {
    "model": "model",
    "pairs": "pairs",
    "length": "T",
    "width": "H",
    "vocabulary": "V",
    "dtype": "dtype",
    "rounding": "rounding",
    "pass": "pass",
    "ignored": "ignored rows",
    "data": "data",
    "budget": "logits at a time",
}
NONE = "–"
DATA = {"random": "random", "smollm2": "SmolLM2"}
MASTERS = {
    "close to the grid": "within 1/32 of the grid's spacing around it",
    "anywhere off the grid": "anywhere between two neighbours",
    "as this checkpoint has them": "as this checkpoint has them, many exactly half-way between two neighbours",
}


def blocks(results: Results, pictures: Mapping[str, tuple[str, str]]) -> dict[str, Callable[[], str]]:
    """{name: what stands there}. pictures: {file name: (what it shows, its path from the document)}."""
    runs = results.runs
    overview = _section(_headline, _ours, _multiples, _fraction, _two_peaks)
    return {
        "logits-table": lambda: _sections(runs("logits"), overview),
        "logits-floor": lambda: _sections(runs("logits"), _section(_headline, _floor, _ours, _fraction, _halves)),
        "logits-memory": lambda: _sections(runs("logits"), _section(_headline, _peaks)),
        "logits-pages": lambda: "\n\n".join(map(_section(_with_faults, _faults), filter(_with_faults, runs("logits")))) or NOTHING,
        "logits-all": lambda: _sections(runs("logits"), _section(_all, _ours, _fraction, _quartiles)),
        "linear-table": lambda: _sections(runs("linear"), overview),
        "linear-floor": lambda: _sections(runs("linear"), partial(_linear_floor, runs("logits"))),
        "linear-shared": lambda: _sections([run for run in runs("linear") if _with_head(run)], _shared_head),
        "linear-memory": lambda: _sections(runs("linear"), _section(_headline, _peaks)),
        "linear-all": lambda: _sections(runs("linear"), _section(_all, _ours, _fraction, _quartiles)),
        "anchor-table": lambda: _sections(runs("anchor"), _section(_all, _floor, _ours, _fraction, _multiples)),
        "step-table": lambda: _sections(runs("step"), _steps),
        "step-floor": lambda: _sections(runs("step"), _step_floor),
        "bandwidth": lambda: _bandwidth(runs("logits", "anchor")),
        "gpu-status": lambda: _gpu_status(runs()),
        "gpu-tests": lambda: _gpu_tests(results.gpus),
        "gpu-missing": lambda: _gpu_missing(results.gpus),
        "tuning": lambda: _tuning(results.gpus),
        "machines": lambda: _machines(runs(), results.rounding),
        **{f"{kind}-plots": partial(_images, pictures, kind) for kind in ("logits", "linear", "step", "roofline")},
        "demo": lambda: "\n\n".join(map(_demo, results.demo)) or "No results yet: `make demo` measures them.",
        # The last one's: what rounding does to the gaps is arithmetic, the same on the next machine but for its last digits.
        **(_rounding(results.rounding[-1]) if results.rounding else {}),
    }


# ---- numbers ----


def significant(value: float, digits: int = 2) -> str:
    """Digits before the point are never cut, zeros at the end are kept."""
    if value == 0:
        return "0"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) < 10 ** (digits - 1) else f"{value:.0f}"


def power(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def milliseconds(value: float) -> str:
    return f"{significant(value / 1e3, 3)} s" if value >= 1e4 else f"{significant(value, 3)} ms"


def percent(value: float, digits: int = 2) -> str:
    return f"{significant(100 * value, digits)} %"


def mebibytes(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} MiB"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean of errors in percent, and where there are several the least and the largest."""
    scaled = [100 * value for value in values]
    mean = f"{significant(fmean(scaled), digits)} %"
    return mean if len(values) == 1 else f"{mean} ({significant(min(scaled))} to {significant(max(scaled))})"


# ---- tables ----

Columns = tuple[list[str], Callable[[Case], list[str]]]  # their titles, and the cells of a case


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]])


def _sections(runs: Sequence[Run], body: Callable[[Run], str]) -> str:
    parts = [body(run) for run in runs] or [NOTHING]
    if not any(run.on_gpu for run in runs):
        parts.append(AWAITS)
    return "\n\n".join(parts)


def _section(
    cases: Callable[[Run], Sequence[Case]], *columns: Callable[[Sequence[Case]], Columns]
) -> Callable[[Run], str]:
    """A run's table: the cases' parameters, where they differ, and `columns` of them."""

    def body(run: Run) -> str:
        chosen = cases(run)
        shared, titles, shapes = _shapes(chosen)
        groups = [make(chosen) for make in columns]
        titles = [*titles, *(title for group, _ in groups for title in group)]
        rows = [[*shape, *(cell for _, cells in groups for cell in cells(case))] for shape, case in zip(shapes, chosen)]
        notes = _notes(chosen, run.failed) if {_multiples, _quartiles} & set(columns) else ""
        return f"{_origin(run)}{shared}:\n\n{table(titles, rows)}{notes}"

    return body


def _headline(run: Run) -> Sequence[Case]:
    return run.headline()


def _all(run: Run) -> Sequence[Case]:
    return run.cases


def _origin(run: Run) -> str:
    found = run.environment
    allocator = ", allocator told to keep freed memory" if run.tuned else ""
    tuned = ", launch parameters tuned" if found.get("autotuned") else ""
    return f"**{run.device}**{allocator}{tuned}, torch {found['torch']}, commit {found['commit']}"


def _shapes(cases: Sequence[Case]) -> tuple[str, list[str], list[Sequence[str]]]:
    """What all cases share, as text; the titles of what differs; and its values, a row for each case."""
    names = [name for name in PARAMETERS if any(name in case["params"] for case in cases)]
    values = {name: [_parameter(name, case["params"].get(name)) for case in cases] for name in names}
    differing = [name for name in names if len(set(values[name])) > 1]
    shared = [_shared(name, values[name][0]) for name in names if name not in differing]
    rows = [[values[name][number] for name in differing] for number in range(len(cases))]
    return "".join(f", {text}" for text in shared), [PARAMETERS[name] for name in differing], rows


def _parameter(name: str, value: object) -> str:
    if value is None:
        return NONE
    if name == "ignored":
        return f"{100 * value:.0f} %"
    return DATA[value] if name == "data" else str(value)


def _shared(name: str, value: str) -> str:
    if name in ("length", "width", "vocabulary"):
        return f"{PARAMETERS[name]} = {value}"
    if name == "pairs":
        return "1 pair" if value == "1" else f"{value} pairs"
    if name in ("rounding", "pass"):
        return f"{PARAMETERS[name]} {value}"
    return value if name in ("model", "dtype") else f"{value} {PARAMETERS[name]}"


def _ours(cases: Sequence[Case]) -> Columns:
    return ["ours"], lambda case: [milliseconds(case["times"]["ours"]["median_ms"])]


def _multiples(cases: Sequence[Case]) -> Columns:
    """The others' times as multiples of ours."""
    names = _contenders(cases)
    return [CONTENDERS.get(name, name) for name in names], lambda case: [
        f"{significant(case['ratios'][name]['median'])}x" if name in case["ratios"] else NONE for name in names
    ]


def _quartiles(cases: Sequence[Case]) -> Columns:
    names = _contenders(cases)
    return [CONTENDERS.get(name, name) for name in names], lambda case: [
        "{median:.2f}x ({quartile_1:.2f} to {quartile_3:.2f})".format(**case["ratios"][name])
        if name in case["ratios"]
        else NONE
        for name in names
    ]


def _contenders(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(name for case in cases for name in case["ratios"]))


def _floor(cases: Sequence[Case]) -> Columns:
    return ["floor", "its time"], lambda case: [
        FLOORS.get(case["floor"]["name"], case["floor"]["name"]),
        milliseconds(case["floor"]["ms"]),
    ]


def _fraction(cases: Sequence[Case]) -> Columns:
    return ["floor / ours"], lambda case: [f"{100 * case['floor']['fraction']:.0f} %"]


def _halves(cases: Sequence[Case]) -> Columns:
    """The same of the forward and of the backward, each measured on its own."""
    parts = list(dict.fromkeys(part for case in cases for part in case.get("parts", {})))
    return [f"{part} alone" for part in parts], lambda case: [
        f"{100 * case['parts'][part]['floor']['fraction']:.0f} %" for part in parts
    ]


def _linear_floor(logits: Sequence[Run], run: Run) -> str:
    """With the time of the kept logits' exponentials, policy's and anchor's, at the rate that the logits path's floor had."""
    here = [found for found in logits if found.device == run.device and found.tuned == run.tuned]
    rates = [
        3 * kept_logits(case) / case["times"][EXPONENTIALS]["median_ms"]
        for found in here
        for case in found.cases
        if EXPONENTIALS in case["times"]
    ]

    def exponentials(cases: Sequence[Case]) -> Columns:
        return ["exponentials"], lambda case: [milliseconds(2 * kept_logits(case) / median(rates))]

    return _section(_headline, _floor, *([exponentials] if rates else []), _ours, _fraction)(run)


def _with_head(run: Run) -> list[Case]:
    return [case for case in run.cases if "head_of_step" in case]


def _shared_head(run: Run) -> str:
    """The head's part of a step with and without what its two backwards share."""
    found = _with_head(run)
    shared, titles, shapes = _shapes(found)
    rows = [
        [
            *shape,
            *(milliseconds(case["head_of_step"][name]["median_ms"]) for name in ("shared", "unshared")),
            f"{significant(case['head_of_step']['median'], 3)}x",
        ]
        for shape, case in zip(shapes, found)
    ]
    return f"{_origin(run)}{shared}:\n\n{table([*titles, 'shared', 'not shared', 'not shared / shared'], rows)}"


def _two_peaks(cases: Sequence[Case]) -> Columns:
    names = ("ours", "eager")
    return [f"memory, {name}" for name in names], lambda case: [_peak(case, name) for name in names]


def _peaks(cases: Sequence[Case]) -> Columns:
    names = list(dict.fromkeys(name for case in cases for name in ("ours", *peaks_of(case))))
    return [CONTENDERS.get(name, name) for name in names], lambda case: [_peak(case, name) for name in names]


def _peak(case: Case, name: str) -> str:
    return mebibytes(peaks_of(case)[name]) if name in peaks_of(case) else NONE


def _with_faults(run: Run) -> list[Case]:
    return [case for case in run.headline() if "page_faults" in case]


def _faults(cases: Sequence[Case]) -> Columns:
    names = list(dict.fromkeys(name for case in cases for name in case["page_faults"]))
    return [CONTENDERS.get(name, name) for name in names], lambda case: [
        f"{case['page_faults'][name]:,}" if name in case["page_faults"] else NONE for name in names
    ]


def peaks_of(case: Case) -> dict[str, float | None]:
    """{contender: MiB}, beyond what the key in the case says."""
    return next(value for key, value in case.items() if key.startswith("peak_"))


def _notes(cases: Sequence[Case], failed: Mapping[str, str]) -> str:
    """Below a table: who is absent and why, which cases failed, and how far the ratios moved while they were measured."""
    absent: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, reason in case["absent"].items():
            absent.setdefault((name, reason), []).append(case["name"])
    reasons = ", ".join(
        CONTENDERS.get(name, name) + f" ({reason}" + (f": {'; '.join(names)}" if len(names) < len(cases) else "") + ")"
        for (name, reason), names in absent.items()
    )
    spreads = [value for case in cases for value in case["ratio_spread"].values() if value is not None]
    notes = [f"Not measured: {reasons}."] if absent else []
    notes += _failures(failed) + _goals(cases)
    if spreads:
        notes.append(_moved("ratios", spreads))
    return f"\n\n{' '.join(notes)}" if notes else ""


def _failures(failed: Mapping[str, str]) -> list[str]:
    return [f"Failed: {'; '.join(f'{name} ({reason})' for name, reason in failed.items())}."] if failed else []


def _goals(cases: Sequence[Case]) -> list[str]:
    goals = "; ".join(goals_of(case) for case in cases if any(case.get(kind) for kind in GOALS))
    return [f"Goals, and how far the ratio moved between the thirds of the run: {goals}."] if goals else []


def misses(case: Case) -> bool:
    """Whether a goal for the ratios, or the floor, is missed."""
    ratios = (case["ratios"][name]["median"] < least for name, least in case.get("goals", {}).items() if name in case["ratios"])
    return any(ratios) or any(_floor_of(case, part)["fraction"] < least for part, least in case.get("floor_goals", {}).items())


def _floor_of(case: Case, part: str) -> dict:
    return case["floor"] if part == "whole" else case["parts"][part]["floor"]


def goals_of(case: Case) -> str:
    found = []
    for name, least in case.get("goals", {}).items():
        moved = case["ratio_spread"].get(name)
        if name not in case["ratios"]:
            found.append(f"{CONTENDERS.get(name, name)} not measured, of {least}x")
        else:
            ratio = case["ratios"][name]["median"]
            reached = f"{significant(ratio, 3)}x of {least}x" + (", missed" if ratio < least else "")
            steady = "in too few rounds to tell how steady"
            if moved is not None:
                steady = f"moved by {percent(moved)}" + (", unsteady" if moved > STEADY else "")
            errors, gaps = case.get("gap_errors", {}), ""
            if name in errors:
                gaps = f"; gaps off by {percent(errors[name])}, ours by {percent(errors['ours'])}"
                gaps += ": not comparable" if errors["ours"] > max(errors[name], COMPARABLE) else ""
            found.append(f"{CONTENDERS.get(name, name)} {reached} ({steady}{gaps})")
    for part, least in case.get("floor_goals", {}).items():
        floor = _floor_of(case, part)
        missed = ", missed" if floor["fraction"] < least else ""
        found.append(f"{part} {floor['fraction']:.0%} of the floor's {least:.0%}{missed}")
    for name, most in case.get("share_goals", {}).items():
        if share := case["of_authors"].get(name):
            missed = ", missed" if share["median"] > most else ""
            moved = "" if share["spread"] is None else f" (moved by {percent(share['spread'])})"
            reached = f"{share['median']:.3f} of the authors' time, at most {most}{missed}{moved}"
        else:
            reached = f"not measured, at most {most} of the authors' time"
        found.append(f"{CONTENDERS.get(name, name)} {reached}")
    busiest = [f"{kernel['name']} {percent(kernel['share'])}" for kernel in case.get("profile", [])[:SHOWN_KERNELS]]
    said = f" (most of the time in {', '.join(busiest)})" if busiest else ""
    return f"{case['name']}: {', '.join(found)}{said}"


def _moved(what: str, spreads: Sequence[float]) -> str:
    return f"Between the thirds of a run the {what} moved by at most {100 * max(spreads):.0f} %."


def _bandwidth(runs: Sequence[Run]) -> str:
    """What copies reached, a sentence for each device."""
    rates: dict[str, list[float]] = {}
    for run in runs:
        found = [case["copy_bandwidth_gb_per_s"] for case in run.cases if "copy_bandwidth_gb_per_s" in case]
        rates.setdefault(run.device, []).extend(found)
    return " ".join(
        f"On {device} copies read and wrote {min(found):.0f} to {max(found):.0f} GB/s, {median(found):.0f} in the median."
        for device, found in rates.items()
        if found
    ) or NOTHING


# ---- the step ----


def _steps(run: Run) -> str:
    """Each recipe's time, and as a share of the authors' of the same case; peak memory; the gaps' error."""
    rows, notes = [], []
    for case in run.cases:
        for name, times in case["times"].items():
            share = case["of_authors"][name]["median"] if name in case["of_authors"] else 1
            row = [case["name"], CONTENDERS.get(name, name), milliseconds(times["median_ms"])]
            row += [f"{share:.2f}", _peak(case, name), percent(case["gap_errors"][name])]
            rows.append(row)
        notes += [f"Not measured: {CONTENDERS.get(name, name)} ({reason})." for name, reason in case["absent"].items()]
        if "passes" in case:
            share, spent = case["passes_share_of_step"], milliseconds(case["passes"]["median_ms"])
            notes.append(f"Of ours on {case['name']} the passes over the weights are {percent(share)}, {spent}.")
    error = "gap error, against ours with the eager head in float32"
    titles = ["model, batch", "recipe", "time", "of the authors' time", "memory", error]
    spreads = [share["spread"] for case in run.cases for share in case["of_authors"].values()]
    if None not in spreads:
        compared = "of `share_backward` the 4th and 16th step are compared with a real backward, which takes longer"
        shared = any("shared" in name for case in run.cases for name in case["of_authors"])
        notes.insert(0, _moved("shares", spreads).rstrip(".") + (f": {compared}." if shared else "."))
    notes += _failures(run.failed) + _goals(run.cases)
    return f"{_origin(run)}:\n\n{table(titles, rows)}\n\n{' '.join(notes)}"


def _step_floor(run: Run) -> str:
    """What doing six or five forwards' worth of work instead of seven would give, and gave, with the same eager head."""
    rows = []
    for case in run.cases:
        for name, bound in STEP_FLOORS.items():
            if name in case["of_authors"]:
                share = case["of_authors"][name]["median"]
                row = [case["name"], CONTENDERS[name], f"{bound:.3f}", f"{share:.3f}", f"{100 * bound / share:.0f} %"]
                rows.append(row)
    titles = ["model, batch", "recipe", "floor, of the authors' time", "its share", "floor / its share"]
    return f"{_origin(run)}:\n\n{table(titles, rows)}"


# ---- where it was measured ----


def _machines(runs: Sequence[Run], rounding: Sequence[dict]) -> str:
    rows = {}
    origins = [(run.environment, run.command, run.suite) for run in runs]
    origins += [(content["environment"], content["command"], "rounding") for content in rounding]
    for found, command, suite in origins:
        peers = [f"{name} {version}" for name, version in found["versions"].items() if version != "none"]
        knobs = ", ".join(f"`{name}={value}`" for name, value in found["allocator"].items()) or "as it comes"
        key = (found["device"], ", ".join(peers), found["python"], found["commit"], knobs, f"`{command}`")
        rows.setdefault(key, []).append(suite)
    columns = ["device", "packages", "Python", "commit", "allocator", "command", "measured"]
    return table(columns, [[*key, ", ".join(suites)] for key, suites in rows.items()]) if rows else NOTHING


# ---- GPUs ----


def _gpu_status(runs: Sequence[Run]) -> str:
    """For a table's cell."""
    devices = dict.fromkeys(run.device for run in runs if run.on_gpu)
    return f"measured on {', '.join(devices)}" if devices else "**awaits a GPU**: not measured"


def _gpu_tests(gpus: Sequence[dict]) -> str:
    """For a table's cell: what the tests of each whole run came to."""
    found = []
    for content in gpus:
        counts: dict[str, int] = {}
        for tests in content["tests"]:
            for word, count in tests["counts"].items():
                counts[word] = counts.get(word, 0) + count
        ends = dict.fromkeys(tests["status"] for tests in content["tests"] if not tests["complete"])
        ended = [", stopped for want of time" if end is None else f", ended with return code {end}" for end in ends]
        said = ", ".join(f"{count} {word}" for word, count in counts.items()) or "none run"
        found.append(f"on {content['environment']['device']}: {said}{''.join(ended)}")
    return "; ".join(found) or "**awaits a GPU**: `make test` runs the GPU tests where there is one"


def _gpu_missing(gpus: Sequence[dict]) -> str:
    """What a whole run did not measure, and why."""
    found = []
    for content in gpus:
        reasons = [f"- {name}: {why.splitlines()[0]}" for name, why in (content["left_out"] | content["failed"]).items()]
        ended = "" if content["finished"] else " The run was interrupted."
        missing = "\n".join(["these are missing:", "", *reasons]) if reasons else "every case was measured."
        found.append(f"On {content['environment']['device']} {missing}{ended}")
    return "\n\n".join(found) or AWAITS


def _tuning(gpus: Sequence[dict]) -> str:
    """Of each kernel and dtype what tuning took, and how the table's choice compares, which is timed first."""
    found = []
    for content in gpus:
        rows, device = [], content["environment"]["device"]
        if "absent" in content["tuning"]:
            found.append(f"On {device} nothing was tuned: {content['tuning']['absent']}.")
            continue
        for name, choice in content["tuning"].items():
            times = [(str(parameters), time) for parameters, time in choice["milliseconds"]]
            fastest = dict(times)[str(choice["parameters"])]
            taken = ", ".join(f"{key} {value}" for key, value in choice["parameters"].items())
            others = f"{min(time for _, time in times) / fastest:.2f} to {max(time for _, time in times) / fastest:.2f}"
            rows.append([name, taken, milliseconds(fastest), f"{times[0][1] / fastest:.2f}", others])
        titles = ["kernel, dtype", "taken", "time", "table's choice over it", "all candidates over it"]
        found.append(f"**{device}**:\n\n{table(titles, rows)}")
    return "\n\n".join(found) or AWAITS


# ---- plots ----


def _images(pictures: Mapping[str, tuple[str, str]], kind: str) -> str:
    found = [f"![{text}]({path})" for name, (text, path) in pictures.items() if name.startswith(f"{kind}-")]
    return "\n\n".join(found) or NOTHING


# ---- the demonstration ----


def _demo(content: dict) -> str:
    first, last = content["heldout"][0], content["heldout"][-1]
    return (
        f"On {content['device']} it took {content['seconds']['total']:.0f} s, the model's conversion included, for "
        f"{content['steps']} steps of {content['settings']['batch_size']} pairs, "
        f"{content['tokens_per_second']:.0f} tokens per second, with a peak of "
        f"{content['peak_memory_bytes'] / 2**30:.1f} GiB. The held-out margin went from {first['margin']:.3f} to "
        f"{last['margin']:.3f}. {' '.join(content['findings'])}"
    )


# ---- what rounding does to the anchor ----


def _joined_errors(batches: Sequence[Case], way: str) -> list[float]:
    """Of each seed, || gaps - truth || / || truth || over the pairs of all batches, each at its own anchor."""
    sizes = [math.hypot(*case["true_gaps"]) for case in batches]
    seeds = zip(*(case["roundings"][way]["errors"] for case in batches), strict=True)
    return [math.hypot(*map(operator.mul, errors, sizes)) / math.hypot(*sizes) for errors in seeds]


def _rounding(content: dict) -> dict[str, Callable[[], str]]:
    by_rho = [case for case in content["cases"] if case["part"] == "rho"]
    masters = [case for case in content["cases"] if case["part"] == "masters"]
    batches = [case for case in content["cases"] if case["part"] == "batches"]
    tiny = [case for case in content["cases"] if case["part"] == "parameters"]
    settings = content["settings"]
    rho = masters[0]["rho"]
    at_rho = next(case["roundings"] for case in by_rho if case["rho"] == rho)
    largest = by_rho[-1]
    seeds = f"mean of {settings['rounding_seeds']} seeds"

    def error(roundings: dict, name: str) -> str:
        return percent(fmean(roundings[name]["errors"]))

    def of_size(size: int, name: str) -> str:
        errors = [e for case in tiny if case["parameters"] == size for e in case["roundings"][name]["errors"]]
        return percent(fmean(errors), 3 if fmean(errors) > 0.99 else 2)

    def by_size() -> str:
        small, large = min(case["parameters"] for case in tiny), max(case["parameters"] for case in tiny)
        return (
            f"From {small:,} to {large:,} parameters the mean error goes from {of_size(small, 'nearest')} to "
            f"{of_size(large, 'nearest')} with nearest rounding, and from {of_size(small, 'stochastic')} to "
            f"{of_size(large, 'stochastic')} with stochastic rounding"
        )

    def by_rho_table() -> str:
        columns = ["$\\rho$", "true mean gap", "nearest: error", "mean gap", "weights changed"]
        columns += ["stochastic: error", "mean gap", "weights changed", "float32: error"]
        rows = []
        for case in by_rho:
            row = [str(case["rho"]), f"{case['true_mean_gap']:.4f}"]
            for name in ("nearest", "stochastic"):
                found = case["roundings"][name]
                row += [spread(found["errors"]), f"{fmean(found['mean_gaps']):.4f}", power(found["changed_fraction"])]
            rows.append([*row, spread(case["roundings"]["float32"]["errors"])])
        return table(columns, rows)

    def of_batches(name: str) -> str:
        return spread([fmean(case["roundings"][name]["errors"]) for case in batches])

    def by_batch_table() -> str:
        ways = ("nearest", "stochastic")
        columns = ["pairs", "true mean gap", "largest gap of one pair", "nearest: error", "stochastic"]
        columns += ["without that pair, nearest", "stochastic"]
        rows = []
        for case in batches:
            row = [case["batch"], f"{case['true_mean_gap']:.4f}", f"{max(case['true_gaps'], key=abs):.3f}"]
            for errors in ("errors", "errors_of_others"):
                row += [spread(case["roundings"][way][errors]) for way in ways]
            rows.append(row)
        gaps = [gap for case in batches for gap in case["true_gaps"]]
        rows.append(["all together", f"{fmean(gaps):.4f}", f"{max(gaps, key=abs):.3f}"])
        rows[-1] += [*(spread(_joined_errors(batches, way)) for way in ways), *[NONE] * len(ways)]
        return table(columns, rows)

    def masters_table() -> str:
        ours = "SR(cast(theta) + delta)"
        ways = ("cast(theta + delta)", "SR(theta + delta)", ours, f"{ours}, autocast")
        columns = ["masters", "cast($\\theta + \\delta$)", "SR($\\theta + \\delta$)"]
        columns += ["SR(cast($\\theta$) + $\\delta$), ours", "ours under autocast", "no casts at all"]
        rows = [
            [
                MASTERS[case["masters"]],
                *(spread(case["ways"][way]["errors"]) for way in ways),
                spread(case["float32_training"]["errors"]),
            ]
            for case in masters
        ]
        return table(columns, rows)

    return {
        "rounding-rho": lambda: str(rho),
        "rounding-settings": lambda: (
            f"{settings['pairs']} preference pairs of at most {settings['max_length']} tokens, "
            f"beta {settings['beta']:g}, gamma {settings['gamma']:g}"
        ),
        "rounding-seeds": lambda: seeds,
        "rounding-table": by_rho_table,
        "rounding-sizes": by_size,
        "rounding-batches": by_batch_table,
        "rounding-gain": lambda: (
            f"{of_batches('nearest')} with rounding to nearest and by {of_batches('stochastic')} with ours, in the mean over "
            f"{len(batches)} batches of {settings['pairs']} pairs (least to largest)"
        ),
        "rounding-noise": lambda: f"{at_rho['stochastic']['applied_over_intended_norm']:.0f} times",
        "rounding-alarm": lambda: (
            f"{largest['rho']:g} nearest rounding kept "
            f"{percent(largest['roundings']['nearest']['applied_over_intended_norm'])} of the norm, in the few weights "
            f"that did jump, and the gaps were {error(largest['roundings'], 'nearest')} wrong without a warning"
        ),
        "masters-table": masters_table,
    }
