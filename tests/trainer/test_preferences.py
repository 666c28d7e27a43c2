"""Pairs, flips, tokens, batches."""

import pytest
import torch
from conftest import made_up_pairs

from gapo_trainer.preferences import (
    IGNORE_INDEX,
    PreferenceCollator,
    flip_labels,
    load_preferences,
    tokenize_pair,
    tokenize_pairs,
)


def test_shipped_pairs_are_whole():
    train, test = load_preferences("train"), load_preferences("test")
    assert len(train) >= 120 and len(test) == 24
    pairs = load_preferences()
    assert len({pair["id"] for pair in pairs}) == len(pairs) == len(train) + len(test)
    for pair in pairs:
        assert pair["prompt"][-1]["role"] == "user"
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in pair[side]] == ["assistant"]
            assert pair[side][0]["content"].strip()
        assert pair["chosen"] != pair["rejected"]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation'"):
        load_preferences("validation")


@pytest.mark.parametrize("fraction, expected", [(0.0, 0), (0.2, 24), (0.33, 40), (1.0, 120)])
def test_flips_are_exact_marked_and_seeded(fraction, expected):
    pairs = made_up_pairs(120)
    before = [dict(pair) for pair in pairs]
    flipped = flip_labels(pairs, fraction, seed=3)
    assert pairs == before, "the pairs given must stay as they were"
    assert sum(pair["is_flipped"] for pair in flipped) == expected
    for old, new in zip(pairs, flipped):
        sides = (old["rejected"], old["chosen"]) if new["is_flipped"] else (old["chosen"], old["rejected"])
        assert (new["chosen"], new["rejected"]) == sides
        assert new["id"] == old["id"]
    assert flip_labels(pairs, fraction, seed=3) == flipped
    if 0 < expected < 120:
        assert flip_labels(pairs, fraction, seed=4) != flipped


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_flipped_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        flip_labels(made_up_pairs(3), fraction, seed=0)


def test_completion_ends_with_the_end_of_turn(tokenizer):
    pair = made_up_pairs(1)[0]
    row = tokenize_pair(pair, tokenizer, 100)
    prompt = f"<s> user {pair['prompt'][0]['content']} </s> <nl> <s> assistant"
    assert tokenizer.decode(row["prompt_ids"]) == prompt
    for side in ("chosen", "rejected"):
        assert tokenizer.decode(row[f"{side}_ids"]) == f"{pair[side][0]['content']} </s>"
    assert not row["is_truncated"] and not row["is_flipped"]


def test_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="pair pair-0.*without rewriting"):
        tokenize_pair(made_up_pairs(1)[0], tokenizer, 100)


def test_empty_completion_is_refused(tokenizer):
    pair = made_up_pairs(1)[0]
    pair["rejected"] = [{"role": "assistant", "content": ""}]
    with pytest.raises(ValueError, match="pair pair-0: the rejected completion is empty"):
        tokenize_pair(pair, tokenizer, 100)


def test_truncation_cuts_the_prompt_first_and_never_empties_a_completion(tokenizer):
    whole = [tokenize_pair(pair, tokenizer, 1000) for pair in made_up_pairs(20)]
    for max_length in (2, 5, 9, 14):
        for full, pair in zip(whole, made_up_pairs(20)):
            row = tokenize_pair(pair, tokenizer, max_length)
            longest = max(len(full["chosen_ids"]), len(full["rejected_ids"]))
            assert row["prompt_ids"] == full["prompt_ids"][-len(row["prompt_ids"]) :]
            for side in ("chosen_ids", "rejected_ids"):
                assert row[side] and row[side] == full[side][: len(row[side])]
                assert len(row["prompt_ids"]) + len(row[side]) <= max_length
            if longest < max_length:
                assert (row["chosen_ids"], row["rejected_ids"]) == (full["chosen_ids"], full["rejected_ids"])
                assert len(row["prompt_ids"]) == min(len(full["prompt_ids"]), max_length - longest)
            else:
                assert len(row["prompt_ids"]) == 1
            assert row["is_truncated"] == any(row[key] != full[key] for key in row if key.endswith("_ids"))
    with pytest.raises(ValueError, match="max_length must be >= 2"):
        tokenize_pair(made_up_pairs(1)[0], tokenizer, 1)


def test_batch_layout(tokenizer):
    pairs = flip_labels(made_up_pairs(5), 0.4, seed=0)
    rows = tokenize_pairs(pairs, tokenizer, 100)
    batch = PreferenceCollator(tokenizer.pad_token_id)([rows[3], rows[1], rows[4]])
    sequences = [(rows[i]["prompt_ids"], rows[i][f"{side}_ids"]) for side in ("chosen", "rejected") for i in (3, 1, 4)]
    longest = max(len(p) + len(c) for p, c in sequences)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (6, longest)
    for r, (prompt, completion) in enumerate(sequences):
        end, padding = len(prompt) + len(completion), longest - len(prompt) - len(completion)
        assert batch["input_ids"][r].tolist() == prompt + completion + [tokenizer.pad_token_id] * padding
        assert batch["labels"][r].tolist() == [IGNORE_INDEX] * len(prompt) + completion + [IGNORE_INDEX] * padding
        assert batch["attention_mask"][r].tolist() == [1] * end + [0] * padding
        # The packed completion: its labels, and positions that are one before them in the same row.
        begin, stop = batch["cu_seqlens"][r : r + 2].tolist()
        assert batch["completion_labels"][begin:stop].tolist() == completion
        first = r * longest + len(prompt) - 1
        assert batch["completion_positions"][begin:stop].tolist() == list(range(first, first + len(completion)))
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"][-1] == len(batch["completion_labels"]) == sum(len(c) for _, c in sequences)
    assert batch["index"].tolist() == [3, 1, 4]
    assert batch["is_flipped"].tolist() == [pairs[i]["is_flipped"] for i in (3, 1, 4)]


def test_collator_needs_a_padding_token():
    with pytest.raises(ValueError, match="pad_token_id"):
        PreferenceCollator(None)
