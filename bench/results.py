"""The files of bench/results/, read for the report: which runs there are, of which suite, on which device."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

SUITES = ("logits", "linear", "anchor", "step")
# What a sweep varies, one at a time. With fewer cases than these it is none.
AXES = ("vocabulary", "length", "ignored", "pairs", "dtype")
LEAST_SWEEP = 5
Case = dict[str, Any]  # bench/harness.py has its keys


class Run(NamedTuple):
    """One suite's cases on one device, as one file holds them."""

    suite: str
    slug: str  # the device, as it stands in the file's name
    environment: dict[str, Any]
    command: str
    cases: list[Case]
    failed: dict[str, str] = {}  # case: why

    @property
    def device(self) -> str:
        return self.environment["device"]

    @property
    def tuned(self) -> bool:
        """Whether the allocator was set by hand."""
        return bool(self.environment["allocator"])

    @property
    def on_gpu(self) -> bool:
        return " threads" not in self.device  # the harness names a CPU with them

    def sweep(self) -> list[Case]:
        """A case, and those that differ from it in one of AXES; of such stars the largest, [] below LEAST_SWEEP."""
        stars = [[base, *_neighbours(base, self.cases)] for base in self.cases]
        star = max(stars, key=lambda star: (len(star), sum(_alike(case, star[0]) for case in star)))
        return star if len(star) >= LEAST_SWEEP else []

    def headline(self) -> list[Case]:
        """The cases outside of the sweep, and those of it that have goals or more contenders than its base; at least one."""
        sweep = self.sweep()

        def counts(case: Case) -> bool:
            return case not in sweep or bool(case.get("goals")) or len(case["times"]) > len(sweep[0]["times"])

        found = [case for case in self.cases if counts(case)]
        return found or sweep[:1]


def _alike(case: Case, other: Case) -> bool:
    return case["times"].keys() == other["times"].keys()


def _neighbours(base: Case, cases: list[Case]) -> list[Case]:
    found = {}
    for case in cases:
        names = base["params"] | case["params"]
        differing = {name: case["params"].get(name) for name in names if base["params"].get(name) != case["params"].get(name)}
        if len(differing) == 1 and set(differing) <= set(AXES):
            # Of two cases with the same parameters, the one that was measured as the base was.
            key = next(iter(differing.items()))
            if key not in found or _alike(case, base):
                found[key] = case
    return list(found.values())


def rows(case: Case) -> tuple[float, float]:
    """Rows that predict a kept label, and all rows. The last of a sequence predicts nothing."""
    params = case["params"]
    sequences, length = 2 * params["pairs"], params["length"]
    return sequences * min(length * (1 - params["ignored"]), length - 1), sequences * length


def kept_logits(case: Case) -> float:
    return rows(case)[0] * case["params"]["vocabulary"]


def csv_of(content: dict[str, Any]) -> str:
    """A file's cases as a table: a line for each contender, for each of our parts and for each floor that was timed."""
    rows = [row for case in content["cases"] for row in _lines(case)]
    origin = content["environment"]
    common = {name: origin.get(name) for name in ("device", "commit", "measured", "python", "gapo_kernels")} | origin["versions"]
    common["allocator"] = " ".join(f"{name}={value}" for name, value in origin["allocator"].items())
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *common], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, **common})
    return text.getvalue()


def _lines(case: Case) -> Iterable[dict]:
    peaks = next((value for key, value in case.items() if key.startswith("peak")), {})
    parts = {f"ours {part}": value for part, value in case.get("parts", {}).items()}
    floors = {"ours": case["floor"], **{name: value["floor"] for name, value in parts.items()}}
    for name, times in {**case["times"], **parts}.items():
        bound = floors.get(name) or {}
        quotient = case["ratios"].get(name, {})
        yield {
            "suite": case["suite"],
            "name": case["name"],
            **case["params"],
            "contender": name,
            "rounds": times.get("rounds", case["rounds"]),
            "median_ms": times["median_ms"],
            "quartile_1_ms": times["quartile_1_ms"],
            "quartile_3_ms": times["quartile_3_ms"],
            "ratio": quotient.get("median"),
            "ratio_quartile_1": quotient.get("quartile_1"),
            "ratio_quartile_3": quotient.get("quartile_3"),
            "ratio_spread": case["ratio_spread"].get(name),
            "peak_mib": peaks.get(name),
            "floor": bound.get("name"),
            "floor_ms": bound.get("ms"),
            "floor_fraction": bound.get("fraction"),
        }


class Results:
    """What a folder of results holds.

    A device's suites come from files of their own or from a GPU's whole run, gpu-DEVICE.json; where both have a suite, what
    was measured later is taken, and of files that do not say when, the whole run.
    """

    def __init__(self, folder: Path) -> None:
        runs: dict[tuple[str, str], Run] = {}
        self.rounding: list[dict[str, Any]] = []
        self.demo: list[dict[str, Any]] = []
        self.gpus: list[dict[str, Any]] = []  # the whole runs: bench/gpu.py has their keys
        self.tables: dict[Path, str] = {}  # what the .csv beside each file of cases holds
        contents = {path: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}

        def turn(path: Path) -> tuple[str, bool, str]:
            measured = contents[path].get("environment", {}).get("measured", "")
            return measured, path.name.startswith("gpu-"), path.name

        for path in sorted(contents, key=turn):
            content = contents[path]
            kind, _, slug = path.stem.partition("-")
            if path.name.startswith("anchor-rounding-"):
                self.rounding.append(content)
            elif kind == "demo":
                self.demo.append(content)
            else:
                self.gpus += [content] if kind == "gpu" else []
                self.tables[path.with_suffix(".csv")] = csv_of(content)
                for suite in SUITES:
                    if cases := [case for case in content["cases"] if case.get("suite") == suite]:
                        failed = {} if kind == "gpu" else content.get("failed", {})  # a whole run's are told by themselves
                        run = Run(suite, slug, content["environment"], content["command"], cases, failed)
                        runs[suite, slug] = run  # the slug tells a tuned allocator from an untouched one
        self._runs = sorted(runs.values(), key=lambda run: (SUITES.index(run.suite), run.on_gpu, run.slug))

    def runs(self, *suites: str) -> list[Run]:
        """Of the suites named, or of all: CPUs before GPUs, a device's untouched allocator before a tuned one."""
        return [run for run in self._runs if not suites or run.suite in suites]
