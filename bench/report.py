"""From the JSON files in bench/results/ to the tables there, in README.md and docs/, and the plots: `make report`.

    python -m bench.report            # rewrites them
    python -m bench.report --check    # writes nothing; exit status 1 if one of them is not what the results give
    python -m bench.report --demo     # with what `make demo` has left in runs/demo as this machine's

A generated stretch of a document stands between `<!-- generated: NAME -->` and `<!-- end -->`, on lines of its own or
within one (then never at its beginning, where Markdown would take the whole line for HTML). bench/tables.py has the
names. Nothing here measures, and but for --demo torch is not imported, so a document can be checked anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the tree that this file lies in, installed or not

from bench import plots, tables
from bench.results import Results

DOCUMENTS = ("README.md", "docs/anchor.md", "docs/performance.md")
PLOTS = Path("docs/plots")
STRETCH = re.compile(r"(<!-- generated: ([a-z0-9-]+) -->)(\n?)(.*?)(\n?)(<!-- end -->)", re.DOTALL)


def filled(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """`text` with every generated stretch made anew. Raises ValueError for an unknown name or a missing end."""

    def stretch(match: re.Match) -> str:
        opening, name, line_break, _, _, closing = match.groups()
        if name not in blocks:
            raise ValueError(f"expected one of {', '.join(blocks)} to be generated, got {name}")
        return f"{opening}{line_break}{blocks[name]()}{line_break}{closing}"

    whole = STRETCH.findall(text)
    if not len(whole) == text.count("<!-- generated:") == text.count("<!-- end -->"):
        raise ValueError("expected every <!-- generated: name --> to be followed by its own <!-- end -->")
    return STRETCH.sub(stretch, text)


def report(root: Path = ROOT, check: bool = False) -> list[str]:
    """The paths, relative to `root`, that differed from what the results give; without `check` they are rewritten."""
    results = Results(root / "bench" / "results")
    pictures = plots.pictures(results)
    changed = []
    for name in DOCUMENTS:
        path = root / name
        folder = os.path.relpath(root / PLOTS, path.parent)
        shown = {file: (picture.alt, f"{folder}/{file}") for file, picture in pictures.items()}
        blocks = tables.blocks(results, shown)
        before = path.read_text(encoding="utf-8")
        after = filled(before, blocks)
        if after != before:
            changed.append(name)
            if not check:
                path.write_text(after, encoding="utf-8")
    for path, text in results.tables.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            changed.append(str(path.relative_to(root)))
            if not check:
                path.write_text(text, encoding="utf-8")
    changed += [f"{PLOTS}/{name}" for name in plots.write(pictures, root / PLOTS, check)]
    return changed


def adopt(demo: Path, folder: Path = ROOT / "bench" / "results") -> Path:
    """A demo's metrics.json, if it ran to its end with default settings, as bench/results/demo-DEVICE.json."""
    import torch

    from bench import harness
    from gapo_trainer.demo import parse_arguments

    metrics = json.loads((demo / "metrics.json").read_text(encoding="utf-8"))
    ended = metrics["stage"] == "finished" and not metrics["interrupted"] and not metrics["out_of_time"]
    for where in ("output_dir", "cpu", "time_limit"):
        del metrics["settings"][where]
    default = {name: value for name, value in vars(parse_arguments([])).items() if name in metrics["settings"]}
    if not ended or metrics["settings"] != default:
        what = f"the settings {metrics['settings']}" if ended else "one that was cut short"
        raise SystemExit(f"expected a demo that ran to its end with the settings {default}, got {what}")
    on_cpu = metrics["device"].startswith("cpu")
    metrics["device"] = harness.device_name(torch.device("cpu") if on_cpu else None)
    here = harness.environment()
    metrics["environment"] = {name: here[name] for name in ("commit", "triton", "python", "measured")}
    path = folder / f"demo-{harness.slug(metrics['device'])}.json"
    path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    parser.add_argument(
        "--demo",
        type=Path,
        metavar="FOLDER",
        nargs="?",
        const=ROOT / "runs" / "demo",
        help="add the results of a demo, by default runs/demo, as this machine's",
    )
    arguments = parser.parse_args()
    if arguments.check and arguments.demo is not None:
        parser.error("--check writes nothing: leave out --demo")
    if arguments.demo is not None:
        print(f"{adopt(arguments.demo)} written")
    changed = report(check=arguments.check)
    for name in changed:
        print(f"{name} {'is not what the results give: run `make report`' if arguments.check else 'rewritten'}")
    return 1 if arguments.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
