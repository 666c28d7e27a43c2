"""Geometric Anchor Preference Optimization on transformers: `GAPOTrainer`, its configuration and its data.

Names are resolved on first use, so that `import gapo_trainer` does not pull in transformers.
"""

from importlib import import_module

_HOME = {
    "GAPOConfig": "config",
    "GAPOTrainer": "trainer",
    "PreferenceCollator": "preferences",
    "prepare_pairs": "preferences",
    "flip_labels": "preferences",
    "load_preferences": "preferences",
    "tokenize_pairs": "preferences",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".versions", __name__).check()
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
