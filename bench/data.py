"""Real hidden states: SmolLM2-135M-Instruct's of the shipped preference pairs, at its weights and at the anchor."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from bench import harness
from gapo_kernels import GeometricAnchor, gapo_objective, linear_sequence_logps

BETA, GAMMA, RHO = 2.0, 0.5, 0.05
MAX_LENGTH, QUICK_LENGTH = 512, 24


class States(NamedTuple):
    hidden: torch.Tensor  # (2B, T, H) float32
    anchor_hidden: torch.Tensor  # (2B, T, H)
    weight: torch.Tensor  # (V, H)
    labels: torch.Tensor  # (2B, T)


class Tokens(NamedTuple):
    ids: torch.Tensor  # (2B, T)
    mask: torch.Tensor  # (2B, T)
    labels: torch.Tensor  # (2B, T)


def load_smollm2(where: torch.device):
    """(model, tokenizer), float32, in evaluation mode. Raises Unavailable without its packages."""
    try:
        from gapo_trainer import preferences, smollm2  # noqa: F401, for preference_batch

        model, tokenizer = smollm2.load_smollm2()
    except ImportError as error:
        raise harness.Unavailable(f"SmolLM2-135M-Instruct needs {error.name or error}") from error
    return model.to(where).eval(), tokenizer


def preference_batch(tokenizer, pairs: int, where: torch.device, quick: bool = False) -> Tokens:
    """The first of the shipped training pairs."""
    from gapo_trainer import preferences

    shipped = preferences.flip_labels(preferences.load_preferences("train")[:pairs], 0.0, 0)
    rows = preferences.tokenize_pairs(shipped, tokenizer, QUICK_LENGTH if quick else MAX_LENGTH)
    batch = preferences.PreferenceCollator(tokenizer.pad_token_id)(rows)
    return Tokens(*(batch[name].to(where) for name in ("input_ids", "attention_mask", "labels")))


@lru_cache(maxsize=1)
def smollm2_states(pairs: int, where: torch.device, quick: bool = False) -> States:
    """Of the first `pairs` shipped pairs. Raises Unavailable.

    On a CPU by a process of its own: a model's step leaves room in the heap, where large tensors then lie without page
    faults, and the cases measured afterwards would not compare with those before.
    """
    if where.type != "cpu":
        return _states(pairs, where, quick)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "states.pt")
        with harness.another_process() as other:
            other.submit(_save_states, file, pairs, where, quick).result()
        return States(**torch.load(file))


def _save_states(file: Path, *args) -> None:
    torch.save(_states(*args)._asdict(), file)


def _states(pairs: int, where: torch.device, quick: bool) -> States:
    model, tokenizer = load_smollm2(where)
    tokens = preference_batch(tokenizer, pairs, where, quick)
    weight = model.get_output_embeddings().weight
    anchor = GeometricAnchor.from_model(model, rho=RHO)

    def states():
        return model.model(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state

    hidden = states()
    chosen, rejected = linear_sequence_logps(hidden, weight, tokens.labels).chunk(2)
    objective, _ = gapo_objective(chosen - rejected, beta=BETA, gamma=GAMMA)
    with anchor.perturbed(objective), torch.no_grad():
        # The tied head moves with the embedding; here both sets of states meet the same one.
        anchor_hidden = states()
    return States(hidden.detach(), anchor_hidden, weight.detach().clone(), tokens.labels)
