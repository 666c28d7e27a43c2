"""Preference pairs: the shipped ones, their marked corruption, tokens, and batches.

A pair is a dict with the keys id, category, split ("train" or "test"), prompt, chosen and rejected, the last three in
the conversational format: a list of {"role", "content"} messages.
"""

import json
import random
from importlib import resources

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100


def load_preferences(split=None):
    """The pairs written for this project: a list of dicts, in the order of the file.

    split: "train", "test", or None for both. Raises ValueError for another split.
    """
    if split not in (None, "train", "test"):
        raise ValueError(f"split must be 'train', 'test' or None, got {split!r}")
    text = resources.files("gapo_trainer").joinpath("data", "preferences.jsonl").read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [pair for pair in pairs if split is None or pair["split"] == split]


def flip_labels(pairs, fraction, seed):
    """Corrupt exactly round(fraction * len(pairs)) pairs by swapping chosen and rejected; every pair is marked.

    Returns new dicts in the same order, each with the key is_flipped (bool). The same seed flips the same pairs.
    Raises ValueError for a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction!r}")
    flipped = set(random.Random(seed).sample(range(len(pairs)), round(fraction * len(pairs))))
    return [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"], "is_flipped": True}
        if i in flipped
        else {**pair, "is_flipped": False}
        for i, pair in enumerate(pairs)
    ]


def tokenize_pairs(pairs, tokenizer, max_length):
    """`tokenize_pair` on each pair, with its position as the key index. Logs how many pairs had to be cut."""
    rows = [{"index": i, **tokenize_pair(pair, tokenizer, max_length)} for i, pair in enumerate(pairs)]
    cut = sum(row["is_truncated"] for row in rows)
    if cut:
        logger.warning(f"{cut} of {len(rows)} pairs are longer than max_length = {max_length} tokens and were cut")
    return rows


def tokenize_pair(pair, tokenizer, max_length):
    """Token ids of one pair, through the tokenizer's chat template.

    A completion is what the template appends to the prompt (which ends in the generation prompt), up to and including
    the end-of-turn token: what follows that token is never generated, so it takes no part in the log-probs.

    A pair longer than max_length loses tokens from the start of the prompt, the same for both completions, and only
    when a single prompt token is left, from the end of the completion. Both keep at least one completion token.

    Returns a dict: prompt_ids, chosen_ids, rejected_ids (lists of int), is_flipped and is_truncated (bool), id.
    Raises ValueError when the template does not extend the prompt, a completion is empty, or max_length < 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be >= 2 (one token of prompt, one of completion), got {max_length}")
    name = pair.get("id", "without id")
    prompt_ids = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
    if not prompt_ids:
        raise ValueError(f"pair {name}: the prompt has no token, so nothing predicts the completion's first one")
    completions = {}
    for side in ("chosen", "rejected"):
        if not any(message["content"] for message in pair[side]):
            raise ValueError(f"pair {name}: the {side} completion is empty, expected text")
        full_ids = tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=False)
        completion = full_ids[len(prompt_ids) :]
        if full_ids[: len(prompt_ids)] != prompt_ids or not completion:
            raise ValueError(
                f"pair {name}: expected the tokens of prompt and {side} completion to begin with those of the prompt, "
                f"got {full_ids[: len(prompt_ids)][-8:]} instead of {prompt_ids[-8:]} at the prompt's end; "
                "the chat template must extend the prompt without rewriting it"
            )
        completions[side] = _up_to_last(completion, tokenizer.eos_token_id)
    longest = max(map(len, completions.values()))
    kept_prompt = prompt_ids[-max(1, max_length - longest) :]
    kept = {side: ids[: max_length - len(kept_prompt)] for side, ids in completions.items()}
    return {
        "id": pair.get("id"),
        "prompt_ids": kept_prompt,
        "chosen_ids": kept["chosen"],
        "rejected_ids": kept["rejected"],
        "is_flipped": bool(pair.get("is_flipped", False)),
        "is_truncated": kept_prompt != prompt_ids or kept != completions,
    }


def _up_to_last(ids, token):
    """`ids` up to and including the last `token`; all of them when it does not occur (a template without one)."""
    return ids[: len(ids) - ids[::-1].index(token)] if token in ids else ids


class PreferenceCollator:
    """Rows of `tokenize_pairs` to one batch of B pairs, N completion tokens in all.

    Returns a dict of tensors:
        input_ids             (2B, T) int64  chosen rows 0..B-1, rejected rows B..2B-1, padded on the right
        attention_mask        (2B, T) int64  1 on tokens, 0 on padding
        labels                (2B, T) int64  input_ids on the completion, -100 on prompt and padding
        completion_positions  (N,)    int64  where labels[t + 1] is predicted: indices into the flattened (2B * T)
        completion_labels     (N,)    int64  the tokens predicted there
        cu_seqlens            (2B+1,) int32  the completions' offsets in the two above
        index                 (B,)    int64  the pair's position in its dataset
        is_flipped            (B,)    bool

    The packing is done here, on the CPU, because finding the completion tokens on a GPU would wait for it.
    """

    def __init__(self, pad_token_id):
        if pad_token_id is None:
            raise ValueError("pad_token_id must be a token id, got None: set tokenizer.pad_token first")
        self.pad_token_id = pad_token_id

    def __call__(self, rows):
        prompts = [row["prompt_ids"] for row in rows] * 2
        completions = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        shape = len(prompts), max(len(p) + len(c) for p, c in zip(prompts, completions))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        for i, (prompt, completion) in enumerate(zip(prompts, completions)):
            begin, end = len(prompt), len(prompt) + len(completion)
            input_ids[i, :end] = torch.tensor(prompt + completion)
            attention_mask[i, :end] = 1
            labels[i, begin:end] = input_ids[i, begin:end]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        batch |= pack_completions(labels)
        batch["index"] = torch.tensor([row["index"] for row in rows])
        batch["is_flipped"] = torch.tensor([row["is_flipped"] for row in rows], dtype=torch.bool)
        return batch


def pack_completions(labels):
    """Where the labels (2B, T) are predicted: the three packed tensors that `PreferenceCollator` describes."""
    predicted = torch.zeros_like(labels, dtype=torch.bool)
    predicted[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    positions = predicted.flatten().nonzero().squeeze(1)
    offsets = torch.zeros(len(labels) + 1, dtype=torch.int32)
    offsets[1:] = predicted.sum(1).cumsum(0)
    return {
        # The label of position t stands one further along its own row, so one further in the flattened rows too.
        "completion_positions": positions,
        "completion_labels": labels.flatten()[positions + 1],
        "cu_seqlens": offsets,
    }
