"""Preference pairs: the shipped ones, their marked corruption, tokens, and batches.

A pair is a dict with the keys id, category, split ("train" or "test"), prompt, chosen and rejected, the last three in
the conversational format: a list of {"role", "content"} messages.
"""

import functools
import json
import numbers
import random
import sys
from importlib import resources
from os.path import commonprefix

import torch
from transformers.utils import logging
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .config import nearest

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")


def load_preferences(split=None):
    """The pairs written for this project: a list of dicts, in the order of the file.

    split: "train", "test", or None for both. Raises ValueError for another split.
    """
    if split not in (None, "train", "test"):
        near = nearest(split, ("train", "test"))
        raise ValueError(f"split must be 'train', 'test' or None, got {split!r}{near}")
    text = resources.files("gapo_trainer").joinpath("data", "preferences.jsonl").read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [pair for pair in pairs if split is None or pair["split"] == split]


def flip_labels(pairs, fraction, seed):
    """Corrupt exactly round(fraction * len(pairs)) pairs by swapping chosen and rejected; every pair is marked.

    Returns new dicts in the same order, each with the key is_flipped (bool): of one that was marked before, the swap
    takes the mark away. The same seed flips the same pairs.
    Raises ValueError for a fraction outside [0, 1], and for rows without chosen and rejected.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction!r}")
    for pair in pairs:
        _check_columns(pair)
    flipped = set(random.Random(seed).sample(range(len(pairs)), round(fraction * len(pairs))))
    marks = [_mark(pair.get("is_flipped"), pair.get("id", i)) for i, pair in enumerate(pairs)]
    return [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"], "is_flipped": not mark}
        if i in flipped
        else {**pair, "is_flipped": mark}
        for i, (pair, mark) in enumerate(zip(pairs, marks))
    ]


def prepare_pairs(pairs, tokenizer, args, vocabulary=None):
    """Preference pairs in any of TRL's formats as rows of token ids, see `tokenize_pair`.

    pairs: None, a datasets.Dataset, a list of dicts, or a dict of these by name; rows with token ids stay as they are.
    tokenizer may be None for those, and their ids are checked to be below `vocabulary`, if given. args: GAPOConfig, for
    max_length, max_prompt_length and dataset_num_proc.

    Raises TypeError for anything else, ValueError for rows that are no preference pairs.
    """
    import datasets

    if pairs is None:
        return None
    if isinstance(pairs, dict) or isinstance(pairs, datasets.DatasetDict):
        return {name: prepare_pairs(part, tokenizer, args, vocabulary) for name, part in pairs.items()}
    if not isinstance(pairs, (datasets.Dataset, list, tuple)):
        raise TypeError(
            f"expected preference pairs as a datasets.Dataset or a list of dicts, got {type(pairs).__name__}"
        )
    if isinstance(pairs, datasets.Dataset):
        pairs = pairs.with_format(None)  # one of tensors or arrays, say, has no lists of token ids
    if len(pairs) == 0:
        raise ValueError("expected at least one preference pair, got none")
    first = pairs[0]
    if set(TOKENS) <= first.keys():
        pairs = pairs if "index" in first else _numbered(pairs)
        _check_tokens(pairs, sys.maxsize if vocabulary is None else vocabulary)
        return pairs
    if tokenizer is None:
        raise ValueError("expected a tokenizer as processing_class, for pairs that are not tokenised, got none")
    _check_columns(first)
    images = {"image", "images"} & first.keys()
    if images:
        raise ValueError(f"expected preference pairs of text, got a column {images.pop()}: remove it to train without it")
    max_length = sys.maxsize if args.max_length is None else args.max_length
    lengths = max_length, args.max_prompt_length
    if not isinstance(pairs, datasets.Dataset):
        return tokenize_pairs(pairs, tokenizer, *lengths)
    with args.main_process_first(desc="tokenising the preference pairs", local=True):
        rows = pairs.map(
            lambda pair, index: tokenize_pair(pair, tokenizer, *lengths, index=index),
            with_indices=True,
            remove_columns=pairs.column_names,
            num_proc=args.dataset_num_proc,
            desc="Tokenising",
        )
    _warn_of_cuts(sum(rows["is_truncated"]), len(rows), max_length)
    return rows


def _check_columns(pair):
    if {"chosen", "rejected"} - pair.keys():
        raise ValueError(
            f"expected preference pairs with the columns chosen and rejected, and prompt unless those contain it, got "
            f"the columns {', '.join(pair)}"
        )


def _check_tokens(rows, vocabulary):
    """Raises ValueError at the first row of somebody else's that a model would fail at, in the middle of training."""

    def are_whole(values):
        return all(issubclass(kind, numbers.Integral) and kind is not bool for kind in set(map(type, values)))

    for i, row in enumerate(rows):
        if not {"index", *TOKENS} <= row.keys():
            raise ValueError(f"pair {i}: expected the columns index, {', '.join(TOKENS)}, as the first has, got {', '.join(row)}")
        if not are_whole([row["index"]]) or abs(row["index"]) > sys.maxsize:
            raise ValueError(f"pair {i}: index must be a whole number, the pair's position, got {row['index']!r}")
        _mark(row.get("is_flipped"), i)
        for name in TOKENS:
            ids = row[name]
            if not isinstance(ids, list) or not are_whole(ids):
                raise ValueError(f"pair {i}: {name} must be a list of token ids, got {_shortened(ids)}")
            if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
                wrong = next(token for token in ids if not 0 <= token < vocabulary)
                raise ValueError(f"pair {i}: {name} must be token ids of the model, in [0, {vocabulary}), got {wrong}")
        if not row["prompt_ids"]:
            raise ValueError(f"pair {i}: the prompt has no token, so nothing predicts the completion's first one")


def _shortened(value):
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _numbered(rows):
    """Rows that somebody else tokenised, with their positions as the key index."""
    if isinstance(rows, (list, tuple)):
        return [{"index": i, **row} for i, row in enumerate(rows)]
    return rows.add_column("index", list(range(len(rows))))


def tokenize_pairs(pairs, tokenizer, max_length, max_prompt_length=None):
    """`tokenize_pair` on each pair, with its position as the key index. Logs how many pairs had to be cut."""
    rows = [tokenize_pair(pair, tokenizer, max_length, max_prompt_length, index=i) for i, pair in enumerate(pairs)]
    _warn_of_cuts(sum(row["is_truncated"] for row in rows), len(rows), max_length)
    return rows


def are_marked(rows):
    """Whether rows of `prepare_pairs` say of pairs if they are flipped; False for None."""
    if rows is None or isinstance(rows, (list, tuple)):
        return any("is_flipped" in row for row in rows or ())
    return "is_flipped" in rows.column_names


def _warn_of_cuts(cut, count, max_length):
    if cut:
        logger.warning(f"{cut} of {count} pairs are longer than max_length = {max_length} tokens and were cut")


def tokenize_pair(pair, tokenizer, max_length, max_prompt_length=None, *, index=None):
    """Token ids of one pair in one of TRL's preference formats: prompt, chosen and rejected, all text or all lists of
    messages; without a prompt, it is what chosen and rejected begin with in common.

    Of text, a completion is what follows the prompt's tokens, and ends in the end-of-text token, all that there is of an
    empty one. Messages go through
    the tokenizer's chat template, with the pair's own tools and chat_template_kwargs, and a completion is what the
    template appends to the prompt (which ends in the generation prompt), up to and including the tokenizer's eos_token,
    if that is its end of turn: whitespace that follows is never generated, so it takes no part in the log-probs.

    A pair longer than max_length loses tokens from the start of the prompt, the same for both completions, and only
    when a single prompt token is left, from the end of the completion. Both keep at least one completion token.
    With max_prompt_length, in [1, max_length), it is cut as the authors of GAPO cut it (and of DPO before): the prompt to
    its last max_prompt_length tokens, and if that is not enough the completions to max_length - max_prompt_length.

    Returns a dict: prompt_ids, chosen_ids, rejected_ids (lists of int), is_truncated (bool), id; is_flipped (bool) if
    the pair has it; index, its position in a dataset, if given.
    Raises ValueError when the template does not extend the prompt, a completion is empty, or max_length < 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be >= 2 (one token of prompt, one of completion), got {max_length}")
    from trl.data_utils import is_conversational, maybe_extract_prompt

    pair = {name: value for name, value in pair.items() if name != "prompt" or value is not None}
    name = pair.get("id", "without id") if index is None else f"{index} ({pair['id']})" if pair.get("id") else index
    _check_forms(pair, name)
    pair = {**pair, **maybe_extract_prompt(pair)}  # which drops every other column when it finds the prompt inside
    # Asked of one key: it looks at any of them, and a dataset may have messages beside text.
    encode = _encode_messages if is_conversational({"chosen": pair["chosen"]}) else _encode_text
    prompt_ids, completions = encode(pair, tokenizer, name)
    kept_prompt, kept = _cut(prompt_ids, completions, max_length, max_prompt_length)
    row = {} if index is None else {"index": index}
    if "is_flipped" in pair:
        row["is_flipped"] = _mark(pair["is_flipped"], name)
    return row | {
        "id": pair.get("id"),
        "prompt_ids": kept_prompt,
        "chosen_ids": kept["chosen"],
        "rejected_ids": kept["rejected"],
        "is_truncated": kept_prompt != prompt_ids or kept != completions,
    }


def _check_forms(pair, name):
    """Raises ValueError unless chosen and rejected are both text, and the prompt is not messages, or both messages."""
    forms = {part: _form(pair[part]) for part in ("prompt", "chosen", "rejected") if part in pair}
    both = {forms.get("chosen"), forms.get("rejected")}
    if both not in ({"text"}, {"messages"}) or forms.get("prompt", "text") not in {"text"} | both:
        found = ", ".join(f"{part}: {form}" for part, form in forms.items())
        raise ValueError(
            f"pair {name}: expected prompt, chosen and rejected all as text or all as messages with role and content, "
            f"got {found}"
        )


def _form(value):
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        odd = [message for message in value if "role" not in message or not {"content", "tool_calls"} & message.keys()]
        return f"messages with {', '.join(odd[0])}" if odd else "messages"
    return "nothing" if value is None or value == [] else type(value).__name__


def _mark(value, name):
    if value is None or value in (0, 1):  # bool, or what stands for it in a table
        return bool(value)
    raise ValueError(f"pair {name}: is_flipped must be true, false or nothing, got {value!r}")


def _cut(prompt_ids, completions, max_length, max_prompt_length):
    """(prompt ids, {side: completion ids}) of a pair, cut to max_length tokens."""
    longest = max(map(len, completions.values()))
    if max_prompt_length is None:
        prompt_ids = prompt_ids[-max(1, max_length - longest) :]
        room = max_length - len(prompt_ids)
    else:
        if len(prompt_ids) + longest > max_length:
            prompt_ids = prompt_ids[-max_prompt_length:]
        room = max_length - max_prompt_length if len(prompt_ids) + longest > max_length else longest
    return prompt_ids, {side: ids[:room] for side, ids in completions.items()}


def _encode_messages(pair, tokenizer, name):
    """(prompt ids, {side: completion ids})."""
    tools = pair.get("tools")
    render = functools.partial(
        tokenizer.apply_chat_template,
        return_dict=False,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        **(pair.get("chat_template_kwargs") or {}),
    )
    prompt_ids = pair["prompt"] and render(pair["prompt"], add_generation_prompt=True)
    if not prompt_ids:
        raise ValueError(f"pair {name}: the prompt has no token, so nothing predicts the completion's first one")
    whole = {}
    for side in ("chosen", "rejected"):
        if all(message.get("content") is None and not message.get("tool_calls") for message in pair[side]):
            raise ValueError(f"pair {name}: the {side} completion is empty, expected text")
        messages = pair["prompt"] + pair[side]
        whole[side] = full_ids = render(messages)
        extends = full_ids[: len(prompt_ids)] == prompt_ids
        if not extends:  # unless it is only that tokens merge across the border
            prompt = render(pair["prompt"], add_generation_prompt=True, tokenize=False)
            extends = render(messages, tokenize=False).startswith(prompt)
        if full_ids == prompt_ids:
            raise ValueError(f"pair {name}: the {side} completion is empty, expected text")
        if not extends:
            raise ValueError(
                f"pair {name}: expected the tokens of prompt and {side} completion to begin with those of the prompt, "
                f"got {full_ids[: len(prompt_ids)][-8:]} instead of {prompt_ids[-8:]} at the prompt's end; "
                "the chat template must extend the prompt without rewriting it"
            )
    prompt_ids, completions = _apart(prompt_ids, whole, name)
    return prompt_ids, {side: _up_to_last_eos(ids, tokenizer) for side, ids in completions.items()}


def _encode_text(pair, tokenizer, name):
    """(prompt ids, {side: completion ids})."""
    prompt_ids, whole, eos = tokenizer(pair["prompt"])["input_ids"], {}, tokenizer.eos_token_id
    for side in ("chosen", "rejected"):
        whole[side] = tokenizer(pair["prompt"] + pair[side])["input_ids"]
    prompt_ids, completions = _apart(prompt_ids, whole, name)
    for side, ids in completions.items():
        completions[side] = ids if ids and ids[-1] == eos or eos is None else [*ids, eos]
        if not completions[side]:
            raise ValueError(f"pair {name}: the {side} completion is empty, expected text")
    return prompt_ids, completions


def _apart(prompt_ids, whole, name):
    """(prompt ids, {side: completion ids}) of prompt and completion together. Tokens may merge across the border: the
    completions begin where one of them leaves the prompt's tokens."""
    common = min(len(commonprefix([prompt_ids, ids])) for ids in whole.values())
    if common == 0:
        raise ValueError(f"pair {name}: the prompt has no token, so nothing predicts the completion's first one")
    return prompt_ids[:common], {side: ids[common:] for side, ids in whole.items()}


def _up_to_last_eos(ids, tokenizer):
    """`ids` up to and including the last eos_token, if there is one and nothing but whitespace follows; else all."""
    token = tokenizer.eos_token_id
    end = len(ids) - ids[::-1].index(token) if token in ids else len(ids)
    return ids if tokenizer.decode(ids[end:]).strip() else ids[:end]


class PreferenceCollator:
    """Rows of `tokenize_pairs` to one batch of B pairs.

    Returns a dict of tensors:
        input_ids       (2B, T) int64  chosen rows 0..B-1, rejected rows B..2B-1, padded on the right
        attention_mask  (2B, T) int64  1 on tokens, 0 on padding
        labels          (2B, T) int64  input_ids on the completion, -100 on prompt and padding
        index           (B,)    int64  the pair's position in its dataset
        is_flipped      (B,)    bool
    With padding_free, the N tokens of the 2B sequences lie one after another, and in place of the first three:
        input_ids, position_ids (1, N) int64; labels (N,) int64; cu_seqlens (2B + 1,) int32, the sequences' offsets

    Raises ValueError without a padding token, or for pad_to_multiple_of beside padding_free; for a mark that is none.
    """

    def __init__(self, pad_token_id, *, pad_to_multiple_of=None, padding_free=False):
        if pad_token_id is None:
            raise ValueError("pad_token_id must be a token id, got None: set tokenizer.pad_token first")
        if padding_free and pad_to_multiple_of is not None:
            raise ValueError(
                f"padding_free leaves nothing to pad, expected no pad_to_multiple_of, got {pad_to_multiple_of}"
            )
        self._padded = DataCollatorForPreference(pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
        self.padding_free = padding_free

    def __call__(self, rows):
        batch = self._padded([{name: row[name] for name in TOKENS} for row in rows])
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORE_INDEX)
        batch["labels"] = labels
        if self.padding_free:
            batch = _packed(batch)
        batch["index"] = torch.tensor([row["index"] for row in rows])
        batch["is_flipped"] = torch.tensor([_mark(row.get("is_flipped"), row["index"]) for row in rows])
        return batch


def _packed(batch):
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    return {
        "input_ids": batch["input_ids"][real][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
        "labels": batch["labels"][real],
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
    }
