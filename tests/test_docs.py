"""docs/troubleshooting.md and the messages in the source are the same; the README's table is what its script prints."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from gapo_kernels.scope import PLAIN_DECODERS

ROOT = Path(__file__).parents[1]
FIELD = "\0"
# Of files that the user does not call with their own arguments, and messages whose whole text is another's.
INTERNAL = {"demo.py", "__init__.py"}


def messages(folder):
    """(file, line, text with FIELD for what is filled in) of every `raise Error(...)`, `warnings.warn(...)`,
    `logger.warning(...)` and `logger.info(...)`."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        if file.name in INTERNAL:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else getattr(node, "value", None)
            if not isinstance(call, ast.Call) or not call.args:
                continue
            if isinstance(node, ast.Raise) or getattr(call.func, "attr", "") in ("warn", "warning", "info"):
                for text in texts(call.args[0]):
                    if text.strip(FIELD + " :"):
                        yield f"{file.name}:{node.lineno}", text


def texts(node):
    if isinstance(node, ast.IfExp):
        return [*texts(node.body), *texts(node.orelse)]
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else FIELD for part in node.values)]
    return []


def patterns():
    """What the first column quotes, as regular expressions over `messages`' texts."""
    found = []
    for line in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            cell = line.split(" | ")[0]
            if "(torch's)" not in cell:
                found += re.findall(r"`([^`]+)`", cell)
    return {p: re.compile(".*?".join(map(re.escape, p.split("…"))), re.DOTALL) for p in found}


ALL = [*messages("gapo_kernels"), *messages("python/gapo_trainer")]


def test_every_message_is_explained():
    known = patterns().values()
    missing = [f"{place}: {text}" for place, text in ALL if not any(p.match(text) for p in known)]
    assert len(ALL) > 100 and not missing, "\n".join(missing)


def test_every_explained_message_is_raised():
    # "… is …" quotes a message that begins with a parameter's name; "unknown setting" is joined from several.
    gone = [p for p, compiled in patterns().items() if not any(compiled.match(text) for _, text in ALL)]
    assert set(gone) <= {"unknown setting …"}, gone


def test_the_decoders_whose_layers_are_replayed_are_listed():
    words = " ".join((ROOT / "docs/anchor.md").read_text(encoding="utf-8").split())
    assert f"are {', '.join(PLAIN_DECODERS)}." in words


def test_the_memory_table_is_what_its_script_prints():
    done = subprocess.run([sys.executable, ROOT / "docs/memory_table.py"], capture_output=True, text=True, check=True)
    assert done.stdout in (ROOT / "README.md").read_text(encoding="utf-8")
