"""The oldest libraries that the trainer was tested with."""

from importlib import metadata

from packaging.version import Version

LEAST = {"transformers": "5.17", "accelerate": "1.13", "trl": "1.10", "peft": "0.19", "datasets": "4.7"}


def check():
    """Raises ImportError that names every library that is missing or too old, and what to install."""
    wrong = []
    for package, least in LEAST.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            wrong.append(f"{package} >= {least}, got none")
            continue
        if Version(found) < Version(least):
            wrong.append(f"{package} >= {least}, got {found}")
    if wrong:
        raise ImportError(f"gapo_trainer expects {'; '.join(wrong)}. Run: pip install --upgrade 'gapo-kernels[train]'")
