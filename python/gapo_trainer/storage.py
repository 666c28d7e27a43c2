"""Folders and files that are either whole or not there: written beside their place, then renamed into it."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path


@contextlib.contextmanager
def replaced_directory(path):
    """Yields an empty scratch folder (pathlib.Path) that becomes `path` when the block ends.

    An exception or KeyboardInterrupt inside the block deletes the scratch folder and leaves `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, because a rename is atomic on one file system only.
    parent = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    scratch, previous = parent / "new", parent / "old"
    scratch.mkdir()
    try:
        yield scratch
        if path.exists():
            path.rename(previous)
        try:
            scratch.rename(path)
        except OSError:
            # Another process put the same folder there between the two renames: a whole folder is there, which is
            # what was asked for. Anything else is an error, and the previous folder goes back.
            if not path.exists():
                if previous.exists():
                    previous.rename(path)
                raise
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def save_model(model, tokenizer, path):
    """Write a transformers model (safetensors) and its tokenizer to the folder `path`, whole or not at all."""
    with replaced_directory(path) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in scratch.iterdir():
            # safetensors makes its files readable by their owner only, whatever the umask says.
            file.chmod(0o644)


def write_json(data, path):
    """Write `data` to the file `path`, whole or not at all. NaN and infinities become null, as JSON has none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(_finite(data), indent=1, allow_nan=False) + "\n")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _finite(data):
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
