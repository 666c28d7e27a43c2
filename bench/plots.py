"""The plots of docs/plots/: what they show as plain data, and how it is drawn.

A picture's file carries a digest of its data, of the names in it and of this module, so that whether it is up to date can
be told without drawing it anew: the same need not give the same bytes with another version of matplotlib.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from bench.results import AXES, Case, Results, Run, kept_logits, rows
from bench.tables import CONTENDERS, EXPONENTIALS, PARAMETERS, STEP_FLOORS, milliseconds, peaks_of

DPI = 110
COLOURS_IN_FILE = 96  # enough for antialiased lines, and a third of the size
AXIS_TITLES = {
    "vocabulary": "vocabulary V",
    "length": "tokens per sequence T",
    "ignored": "ignored rows, %",
    "pairs": "pairs B",
}
TITLES = {"logits": "Loss from logits", "linear": "Loss from hidden states and LM head"}
# Colour, marker, line: Okabe and Ito's palette, made for the colour-blind; variants of one share its colour.
STYLES = {
    "ours": ("#0072B2", "o", "-"),
    "ours-64mib": ("#0072B2", "o", "--"),
    "ours-logits": ("#56B4E9", "o", "-"),
    "ours-eager-head": ("#56B4E9", "o", "--"),
    "ours-shared": ("#0072B2", "o", "-"),
    "ours-shared-eager-head": ("#56B4E9", "o", "--"),
    "eager": ("#000000", "s", "-"),
    "eager-view": ("#000000", "s", "--"),
    "compiled": ("#D55E00", "^", "-"),
    "liger": ("#CC79A7", "D", "-"),
    "liger-all": ("#CC79A7", "D", "-."),
    "liger-compiled": ("#CC79A7", "D", "--"),
    "trl": ("#009E73", "v", "-"),
    "trl-1024": ("#009E73", "^", ":"),
    "lce": ("#E69F00", "P", "--"),
    "lce-chunked": ("#E69F00", "P", ":"),
    "lce-64mib": ("#E69F00", "P", "-"),
    "cce": ("#56B4E9", "X", "-"),
    "authors": ("#000000", "s", "-"),
    "authors-float32": ("#7F7F7F", "s", "-"),
    "authors-tf32": ("#7F7F7F", "s", "--"),
}
STEP_ORDER = "authors-float32 authors-tf32 authors ours-eager-head ours-logits ours ours-shared-eager-head ours-shared".split()
OTHER = ("#7F7F7F", "x", "-")
FLOOR = {"color": "#7F7F7F", "linestyle": ":", "linewidth": 1.5}
# One operation is a multiplication, an addition, a comparison or an exponential. A logit takes four in each of its three
# passes (scale, maximum, exponential, sum; scale, exponential, times c, minus c at the label).
OPERATIONS_A_LOGIT, LOGIT_PASSES = 4, 3
OPERATIONS_A_WEIGHT, ANCHOR_PASSES = 7, 3  # two in the norm, five in the exchange, none in the restoration
GROUPS = {
    "logits": ("o", "loss from logits"),
    "linear": ("^", "loss from hidden states"),
    "anchor": ("s", "anchor's passes"),
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Picture(NamedTuple):
    alt: str
    data: Any  # what is drawn, as JSON
    draw: Callable[[Any], Any]  # data -> matplotlib's Figure

    def digest(self) -> str:
        shown = json.dumps([self.data, CONTENDERS, PARAMETERS], sort_keys=True)
        return hashlib.sha256(Path(__file__).read_bytes() + shown.encode()).hexdigest()[:16]


def pictures(results: Results) -> dict[str, Picture]:
    """{file name: picture}, as far as there are results; of a device's runs of a suite the first."""
    found: dict[str, Picture] = {}
    devices: dict[str, list[Run]] = {}
    for run in results.runs():
        devices.setdefault(run.device, []).append(run)
    for device, runs in devices.items():
        slug = runs[0].slug
        first = {suite: next((run for run in runs if run.suite == suite), None) for suite in GROUPS}
        for suite, title in TITLES.items():
            if first[suite] and (data := _sweep(first[suite])):
                alt = f"{title}: time, memory and share of the floor on {device}"
                found[f"{suite}-{slug}.png"] = Picture(alt, data, _draw_sweep)
        if steps := [run for run in runs if run.suite == "step"]:
            found[f"step-{slug}.png"] = Picture(f"Time and memory of a whole step on {device}", _bars(steps), _draw_bars)
        if first["logits"] and first["linear"]:
            found[f"roofline-{slug}.png"] = Picture(f"Roofline of {device}", _roofline(**first), _draw_roofline)
    if results.rounding:
        alt = "Relative error of the Anchor Gaps over rho and over the number of parameters"
        found["anchor-rounding.png"] = Picture(alt, _errors(results.rounding[-1]), _draw_errors)
    return found


def write(found: Mapping[str, Picture], folder: Path, check: bool = False) -> list[str]:
    """The names of files in `folder` that are missing, stale or of no picture; without `check` it is put right."""
    present = {path.name for path in folder.glob("*.png")}
    changed = sorted(present - found.keys())
    if not check:
        folder.mkdir(parents=True, exist_ok=True)
        for name in changed:
            (folder / name).unlink()
    for name, picture in found.items():
        if name not in present or _digest_in(folder / name) != picture.digest():
            changed.append(name)
            if not check:
                _save(picture, folder / name)
    return changed


def _digest_in(path: Path) -> str | None:
    from PIL import Image

    with Image.open(path) as image:
        return image.text.get("digest")


def _save(picture: Picture, path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image, PngImagePlugin

    settings = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with matplotlib.rc_context(settings):
        figure = picture.draw(picture.data)
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(DPI)
        canvas.draw()
    text = PngImagePlugin.PngInfo()
    text.add_text("digest", picture.digest())
    image = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    image.quantize(COLOURS_IN_FILE, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=text)


# ---- sweeps: time, memory and share of the floor ----


def _sweep(run: Run) -> dict | None:
    """{"title", "columns": [{"axis", "points"}]} of the numeric axes along which the sweep has two points or more."""
    cases = run.sweep()
    if not cases:
        return None
    base = cases[0]
    columns = []
    for axis in AXES:
        rest = {name: value for name, value in base["params"].items() if name != axis}
        along = [case for case in cases if {n: v for n, v in case["params"].items() if n != axis} == rest]
        if isinstance(base["params"].get(axis), str) or len(along) < 2:
            continue
        along.sort(key=lambda case: case["params"][axis])
        columns.append({"axis": axis, "points": [_point(case, axis) for case in along]})
    fixed = ", ".join(_fixed(name, base["params"][name]) for name in PARAMETERS if name in base["params"])
    title = f"{TITLES[run.suite]}, forward + backward, {run.device}\nvaried one at a time around {fixed}"
    return {"title": title, "columns": columns} if columns else None


def _fixed(name: str, value: Any) -> str:
    if name == "ignored":
        return f"{100 * value:.0f} % ignored"
    if name in ("length", "width", "vocabulary"):
        return f"{PARAMETERS[name]} = {value}"
    if name == "pairs":
        return f"{value} {'pair' if value == 1 else 'pairs'}"
    return f"{value} {PARAMETERS[name]}" if name == "data" else str(value)


def _point(case: Case, axis: str) -> dict:
    floor, ratios = case["floor"], {"ours": 1.0} | {name: one["median"] for name, one in case["ratios"].items()}
    times = {name: one["median_ms"] for name, one in case["times"].items() if name == "ours" or name in case["ratios"]}
    return {
        "x": case["params"][axis] * (100 if axis == "ignored" else 1),
        "time": times,
        "memory": {name: peak for name, peak in peaks_of(case).items() if peak is not None},
        "fraction": {name: 100 * floor["fraction"] / ratios[name] for name in times},  # round by round, as in the tables
        "floor": floor["ms"],
    }


def _draw_sweep(data: dict):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    columns = data["columns"]
    figure = Figure(figsize=(2.75 * len(columns) + 0.6, 8.2), layout="constrained")
    grid = figure.subplots(3, len(columns), sharex="col", sharey="row", squeeze=False)
    names: set[str] = set()
    for axes_row, quantity in zip(grid, ("time", "memory", "fraction")):
        for axes, column in zip(axes_row, columns):
            lines: dict[str, list[tuple[float, float]]] = {}
            for point in column["points"]:
                for name, value in point[quantity].items():
                    lines.setdefault(name, []).append((point["x"], value))
            for name, line in lines.items():
                if len(line) > 1:
                    names.add(name)
                    colour, marker, style = STYLES.get(name, OTHER)
                    emphasis = {"lw": 2.2, "zorder": 3} if name == "ours" else {"lw": 1.3}
                    axes.plot(*zip(*line), color=colour, marker=marker, ms=4.5, ls=style, label=name, **emphasis)
            if quantity == "time":
                bounds = [(point["x"], point["floor"]) for point in column["points"]]
                axes.plot(*zip(*bounds), **FLOOR, label="floor")
            axes.grid(alpha=0.3)
    for axes, column in zip(grid[-1], columns):
        axis, values = column["axis"], [point["x"] for point in column["points"]]
        axes.set_xlabel(AXIS_TITLES[axis])
        if axis != "ignored":
            axes.set_xscale("log")
        axes.set_xticks(values, [_short(value) for value in values], fontsize=8.5)
        axes.minorticks_off()
    grid[0, 0].set_ylabel("time, ms")
    grid[1, 0].set_ylabel("peak memory beyond\nthe inputs, MiB")
    grid[2, 0].set_ylabel("floor / time, %")
    for axes in (grid[0, 0], grid[1, 0]):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    grid[1, 0].set_ylim(top=2 * grid[1, 0].get_ylim()[1])
    grid[2, 0].set_ylim(0, max(105, grid[2, 0].get_ylim()[1]))
    handles = {}
    for axes in grid.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    order = [*sorted(names, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES)), "floor"]
    labels = [CONTENDERS.get(name, name) for name in order]
    figure.suptitle(data["title"], fontsize=11)
    columns = len(order) if len(order) <= 5 else (len(order) + 1) // 2
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend([handles[name] for name in order], labels, **place)
    return figure


def _short(value: float) -> str:
    return f"{value / 1000:.0f}k" if value >= 10000 else f"{value:g}"


# ---- the step ----


def _bars(runs: Sequence[Run]) -> dict:
    groups = []
    for run in runs:
        for case in run.cases:
            bars = [
                {"name": name, "ms": time["median_ms"], "from": time["quartile_1_ms"], "to": time["quartile_3_ms"]}
                for name, time in case["times"].items()
            ]
            for bar in bars:
                name, authors = bar["name"], case["times"]["authors"]["median_ms"]
                bar["share"] = case["of_authors"].get(name, {}).get("median")
                bar["floor"] = STEP_FLOORS[name] * authors if name in STEP_FLOORS else None
                bar["memory"] = peaks_of(case).get(name)
            bars.sort(key=lambda bar: STEP_ORDER.index(bar["name"]))
            allocator = ", allocator told to keep freed memory" if run.tuned else ""
            groups.append({"title": f"{case['name']}{allocator}", "bars": bars})
    return {"title": f"A whole GAPO step, {runs[0].device}", "groups": groups}


def _draw_bars(data: dict):
    from matplotlib.figure import Figure

    groups = data["groups"]
    sizes = [len(group["bars"]) for group in groups]
    figure = Figure(figsize=(10.5, 0.75 + 0.55 * len(groups) + 0.3 * sum(sizes)), layout="constrained")
    longest = max(bar["to"] for group in groups for bar in group["bars"])
    unit, divisor = ("s", 1e3) if longest >= 1e4 else ("ms", 1)
    longest /= divisor
    most = max((bar["memory"] or 0 for group in groups for bar in group["bars"]), default=0)
    # One scale for all groups: their bars can be compared with each other.
    ratios = {"height_ratios": sizes, "width_ratios": [2.4, 1]}
    grid = figure.subplots(len(groups), 2, squeeze=False, sharex="col", sharey="row", gridspec_kw=ratios)
    for (axes, beside), group in zip(grid, groups):
        bars = group["bars"]
        for place, bar in enumerate(bars):
            colour = STYLES.get(bar["name"], OTHER)[0]
            middle, low, high = (bar[key] / divisor for key in ("ms", "from", "to"))
            axes.barh(place, middle, color=colour, height=0.7, alpha=0.85)
            axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="#7F7F7F", capsize=3)
            if bar["floor"] is not None:
                axes.plot([bar["floor"] / divisor] * 2, [place - 0.35, place + 0.35], color="#000000", lw=1.5)
            if bar["memory"] is not None:
                beside.barh(place, bar["memory"], color=colour, height=0.7, alpha=0.85)
                beside.text(bar["memory"] + 0.02 * most, place, f"{bar['memory']:.0f}", va="center")
            share = "" if bar["share"] is None else f", {bar['share']:.2f} of the authors'"
            axes.text(high + 0.012 * longest, place, f"{milliseconds(bar['ms'])}{share}", va="center")
        names = [CONTENDERS.get(bar["name"], bar["name"]).replace("`", "") for bar in bars]
        axes.set_yticks(range(len(bars)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.4 * longest)
        axes.set_title(group["title"], fontsize=10, loc="left")
        beside.set_xlim(0, 1.25 * max(most, 1))
        for each in (axes, beside):
            each.grid(axis="x", alpha=0.3)
    grid[-1, 0].set_xlabel(f"time of a step, {unit}; whiskers: quartiles; line: floor with the same head")
    grid[-1, 1].set_xlabel("peak memory, MiB")
    figure.suptitle(data["title"], fontsize=11)
    return figure


# ---- roofline ----


def _roofline(logits: Run, linear: Run, anchor: Run | None) -> dict:
    """Points {group, who, x: operations a byte that must move, y: operations a second}, and the measured ceilings."""
    runs = [run for run in (logits, anchor) if run]
    bandwidth = median(case["copy_bandwidth_gb_per_s"] for run in runs for case in run.cases) * 1e9
    points, rates, exponentials = [], {}, []
    for case in logits.headline():
        kept, every = rows(case)
        operations = LOGIT_PASSES * OPERATIONS_A_LOGIT * kept_logits(case)
        written = kept if EXPONENTIALS in case["times"] else every  # a CPU's system hands out zeros
        moved = (LOGIT_PASSES * kept + written) * case["params"]["vocabulary"] * _itemsize(case)
        points += _achieved("logits", case, operations, moved)
        if EXPONENTIALS in case["times"]:
            exponentials.append(operations / case["times"][EXPONENTIALS]["median_ms"] * 1e3)
    for case in linear.headline():
        kept, every = rows(case)
        width, vocabulary = case["params"]["width"], case["params"]["vocabulary"]
        operations = 8 * kept * width * vocabulary
        # Hidden states of policy and anchor read, d hidden written, the head read, its gradient written.
        moved = (2 * kept + every + 2 * vocabulary) * width * _itemsize(case)
        points += _achieved("linear", case, operations, moved)
        rates.setdefault(case["params"]["dtype"], []).append(operations / case["times"]["gemms"]["median_ms"] * 1e3)
    for case in _whole_anchors(anchor.cases if anchor else []):
        weights = case["params"]["parameters"]
        points += _achieved("anchor", case, OPERATIONS_A_WEIGHT * weights, 8 * weights * _itemsize(case))
    ceilings = [{"name": f"GEMMs, {dtype}", "y": max(found)} for dtype, found in rates.items()]
    if exponentials:
        ceilings.append({"name": "exponentials, each with three further operations", "y": median(exponentials)})
    return {"title": f"Roofline, {logits.device}", "bandwidth": bandwidth, "ceilings": ceilings, "points": points}


def _itemsize(case: Case) -> int:
    return BYTES[case["params"]["dtype"]]


def _achieved(group: str, case: Case, operations: float, moved: float) -> list[dict]:
    return [
        {"group": group, "who": name, "x": operations / moved, "y": operations / case["times"][name]["median_ms"] * 1e3}
        for name in ("ours", "eager")
        if name in case["times"]
    ]


def _whole_anchors(cases: Sequence[Case]) -> list[Case]:
    """The three passes of each model, dtype and rounding as one case; none where one of them was not measured."""
    found: dict[tuple, list[Case]] = {}
    for case in cases:
        found.setdefault(tuple(case["params"][name] for name in ("model", "dtype", "rounding")), []).append(case)
    return [
        {"params": parts[0]["params"], "times": {name: _summed(parts, name) for name in ("ours", "eager")}}
        for parts in found.values()
        if len(parts) == ANCHOR_PASSES
    ]


def _summed(parts: Sequence[Case], name: str) -> dict[str, float]:
    return {"median_ms": sum(case["times"][name]["median_ms"] for case in parts)}


def _draw_roofline(data: dict):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    top = max(ceiling["y"] for ceiling in data["ceilings"])
    unit, divisor = ("TFLOP/s", 1e12) if top >= 1e12 else ("GFLOP/s", 1e9)
    bandwidth = data["bandwidth"] / divisor
    left, right = (edge(point["x"] for point in data["points"]) for edge in (min, max))
    left, right, ridge = left / 2, right * 2, top / data["bandwidth"]
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([left, ridge], [left * bandwidth, top / divisor], color="#000000", lw=1.5)
    middle = (left * ridge) ** 0.5
    beside = {"xytext": (-6, 4), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate(f"copy: {data['bandwidth'] / 1e9:.0f} GB/s", (middle, middle * bandwidth), **beside)
    for ceiling in data["ceilings"]:
        height, start = ceiling["y"] / divisor, ceiling["y"] / data["bandwidth"]
        axes.plot([start, right], [height] * 2, color="#000000", lw=1.5, ls="-" if ceiling["y"] == top else "--")
        axes.text(right, height * 1.08, f"{ceiling['name']}: {height:.3g} {unit}", ha="right", va="bottom")
    for group, (marker, title) in GROUPS.items():
        for who, colour in (("ours", "#0072B2"), ("eager", "#D55E00")):
            found = [(p["x"], p["y"] / divisor) for p in data["points"] if (p["group"], p["who"]) == (group, who)]
            if found:
                face = colour if who == "ours" else "none"
                style = {"ls": "none", "marker": marker, "ms": 7, "mec": colour, "mfc": face}
                axes.plot(*zip(*found), **style, label=f"{title}: {who}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=2.5 * top / divisor)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("useful operations per byte that must move")
    axes.set_ylabel(f"useful operations per second, {unit}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title(data["title"], fontsize=11)
    return figure


# ---- what rounding does to the gaps ----

ROUNDINGS = {
    "nearest": ("nearest, bfloat16", "s", "--", "C3"),
    "stochastic": ("stochastic, bfloat16", "o", "-", "C0"),
    "float32": ("float32", "^", ":", "C7"),
}


def _errors(content: dict) -> dict:
    """{"rho", "panels": {name: [{"x", "errors": {rounding: [one a seed]}}]}}."""
    cases = content["cases"]
    rho = next(case["rho"] for case in cases if case["part"] == "parameters")

    def panel(part: str, x: str, rhos: set[float] | None = None) -> list[dict]:
        kept = [case for case in cases if case["part"] == part and (rhos is None or case["rho"] in rhos)]
        return [
            {
                "x": value,
                "errors": {
                    name: [error for case in kept if case[x] == value for error in case["roundings"][name]["errors"]]
                    for name in ROUNDINGS
                },
            }
            for value in sorted({case[x] for case in kept})
        ]

    panels = {"rho": panel("rho", "rho"), "random": panel("parameters", "parameters")}
    return {"rho": rho, "panels": {**panels, "smollm2": panel("rho", "parameters", {rho})}}


def _draw_errors(data: dict):
    """Two panels: the error over rho, and over the number of parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, (label, marker, line, colour) in ROUNDINGS.items():
        for panel, axes in (("rho", left), ("random", right), ("smollm2", right)):
            points = data["panels"][panel]
            errors = [point["errors"][name] for point in points]
            means = [fmean(each) for each in errors]
            spread = [[m - min(e) for m, e in zip(means, errors)], [max(e) - m for m, e in zip(means, errors)]]
            style = dict(marker=marker, color=colour, capsize=3)
            if panel == "smollm2":
                style |= dict(linestyle="none", markerfacecolor="white")
            else:
                style |= dict(linestyle=line, label=label)
            axes.errorbar([point["x"] for point in points], means, yerr=spread, **style)
    left.set(title="SmolLM2-135M-Instruct", xlabel="rho", ylabel="relative error of the Anchor Gaps")
    left.set_xscale("log")
    left.set_yscale("log")
    rhos = [point["x"] for point in data["panels"]["rho"]]
    left.set_xticks(rhos, [str(rho) for rho in rhos])
    left.minorticks_off()
    right.set(title=f"random Llamas (open: SmolLM2), rho {data['rho']}", xlabel="parameters", xscale="log")
    left.legend(loc="center left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure
