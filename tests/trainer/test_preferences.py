"""Pairs, flips, tokens, batches."""

import pytest
import torch
from conftest import made_up_pairs
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gapo_trainer.config import GAPOConfig
from gapo_trainer.preferences import (
    IGNORE_INDEX,
    PreferenceCollator,
    are_marked,
    flip_labels,
    load_preferences,
    prepare_pairs,
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


def test_a_flip_of_a_marked_pair_toggles_its_mark():
    once = flip_labels(made_up_pairs(20), 0.3, seed=0)
    twice = flip_labels(once, 0.5, seed=1)
    for clean, pair, before in zip(made_up_pairs(20), twice, once):
        assert pair["is_flipped"] == (pair["chosen"] != clean["chosen"])
        assert pair["is_flipped"] != before["is_flipped"] or pair["chosen"] == before["chosen"]
    assert flip_labels(once, 0.3, seed=0) == [pair | {"is_flipped": False} for pair in made_up_pairs(20)]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_flipped_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        flip_labels(made_up_pairs(3), fraction, seed=0)


def test_completion_ends_with_the_end_of_turn(tokenizer):
    pair = made_up_pairs(1)[0]
    row = tokenize_pair(pair, tokenizer, 100)
    prompt = f"<s> user {pair['prompt'][0]['content']} </s> \n <s> assistant"
    assert tokenizer.decode(row["prompt_ids"]) == prompt
    for side in ("chosen", "rejected"):
        assert tokenizer.decode(row[f"{side}_ids"]) == f"{pair[side][0]['content']} </s>"
    assert not row["is_truncated"] and "is_flipped" not in row


def test_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="pair pair-0.*without rewriting"):
        tokenize_pair(made_up_pairs(1)[0], tokenizer, 100)


def test_tokens_of_messages_may_merge_across_the_border():
    """As in text, the completions begin where one of them leaves the prompt's tokens."""
    vocabulary = {token: i for i, token in enumerate([*"UA:x \n", ": ", "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, [(":", " ")]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] | upper + ':' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    pair = {"prompt": [{"role": "user", "content": "x"}]}
    for side, text in (("chosen", " x"), ("rejected", "xx")):
        pair[side] = [{"role": "assistant", "content": text}]
    row = tokenize_pair(pair, tokenizer, 100)
    texts = [tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert texts == ["U:x</s>A", ": x</s>", ":xx</s>"]


def test_only_whitespace_after_the_end_of_turn_is_dropped(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("</s> ", "</s> w39 ")
    row = tokenize_pair(made_up_pairs(1)[0], tokenizer, 100)
    assert tokenizer.decode(row["chosen_ids"]).endswith("</s> w39 \n")


def test_an_empty_completion_is_what_ends_it(tokenizer):
    pair = made_up_pairs(1)[0]
    pair["rejected"] = [{"role": "assistant", "content": ""}]
    row, text = tokenize_pair(pair, tokenizer, 100), {"prompt": "w1 w2", "chosen": "", "rejected": " w3"}
    assert row["rejected_ids"][-1] == tokenizer.eos_token_id and len(row["rejected_ids"]) < len(row["chosen_ids"])
    assert tokenize_pair(text, tokenizer, 100)["chosen_ids"] == [tokenizer.eos_token_id]
    pair["rejected"] = [{"role": "assistant", "content": None}]
    with pytest.raises(ValueError, match="pair pair-0: the rejected completion is empty"):
        tokenize_pair(pair, tokenizer, 100)
    tokenizer.eos_token = None
    for blank in ("", " "):
        with pytest.raises(ValueError, match="pair without id: the chosen completion is empty"):
            tokenize_pair(text | {"chosen": blank}, tokenizer, 100)


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
    assert batch["index"].tolist() == [3, 1, 4]
    assert batch["is_flipped"].tolist() == [pairs[i]["is_flipped"] for i in (3, 1, 4)]


def test_collator_needs_a_padding_token():
    with pytest.raises(ValueError, match="pad_token_id"):
        PreferenceCollator(None)


def test_padding_free_layout(tokenizer):
    rows = tokenize_pairs(flip_labels(made_up_pairs(3), 0.4, seed=0), tokenizer, 100)
    batch = PreferenceCollator(tokenizer.pad_token_id, padding_free=True)(rows)
    sequences = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in rows]
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, sum(len(p) + len(c) for p, c in sequences))
    for (prompt, completion), begin, stop in zip(sequences, batch["cu_seqlens"], batch["cu_seqlens"][1:]):
        assert batch["input_ids"][0, begin:stop].tolist() == prompt + completion
        assert batch["position_ids"][0, begin:stop].tolist() == list(range(stop - begin))
        assert batch["labels"][begin:stop].tolist() == [IGNORE_INDEX] * len(prompt) + completion
    assert batch["cu_seqlens"].dtype == torch.int32 and "attention_mask" not in batch
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        PreferenceCollator(0, padding_free=True, pad_to_multiple_of=8)


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_text_pairs(tokenizer, kind):
    pairs = [{"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5", "is_flipped": True}]
    (row,) = prepare_pairs(kind(pairs), tokenizer, GAPOConfig(use_cpu=True))
    texts = [tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert texts == ["w1 w2", "w3 w4 </s>", "w5 </s>"] and row["is_flipped"] and row["index"] == 0


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_messages_with_the_prompt_inside_are_as_with_it_apart(tokenizer, kind):
    apart = made_up_pairs(2)
    inside = [{side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")} for pair in apart]
    rows = prepare_pairs(kind(inside), tokenizer, GAPOConfig(use_cpu=True))
    for row, expected in zip(rows, tokenize_pairs(apart, tokenizer, 2048)):
        assert all(row[name] == expected[name] for name in ("index", "prompt_ids", "chosen_ids", "rejected_ids"))


MESSAGE = [{"role": "user", "content": "w9 w8"}]
TOKENISED = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": []}
SHAREGPT = [{"from": "human", "value": "w9 w8"}]


@pytest.mark.parametrize(
    "pairs, error, message",
    [
        ("pairs.json", TypeError, "datasets.Dataset or a list of dicts, got str"),
        ([], ValueError, "at least one preference pair"),
        ([{"prompt": "w1", "chosen": "w2"}], ValueError, "columns chosen and rejected"),
        ([TOKENISED | {"index": "first"}], ValueError, "pair 0: index must be a whole number, .* got 'first'"),
        ([TOKENISED | {"index": 2**70}], ValueError, "pair 0: index must be a whole number"),
        ([TOKENISED, TOKENISED | {"is_flipped": "yes"}], ValueError, "pair 1: is_flipped must be true, false or nothing, got 'yes'"),
        ([TOKENISED, TOKENISED | {"chosen_ids": "12"}], ValueError, "pair 1: chosen_ids must be a list of token ids, got '12'"),
        ([TOKENISED | {"chosen_ids": [3, 9.5]}], ValueError, r"chosen_ids must be a list of token ids, got \[3, 9.5\]"),
        ([TOKENISED | {"chosen_ids": [3, True]}], ValueError, r"chosen_ids must be a list of token ids, got \[3, True\]"),
        ([TOKENISED, {"prompt_ids": [1]}], ValueError, "pair 1: expected the columns index, prompt_ids, .* got index, prompt_ids"),
        ([TOKENISED | {"rejected_ids": [3, 40]}], ValueError, r"0: rejected_ids must be .* in \[0, 40\), got 40"),
        ([TOKENISED | {"rejected_ids": [-1]}], ValueError, r"in \[0, 40\), got -1"),
        ([TOKENISED | {"prompt_ids": []}], ValueError, "pair 0: the prompt has no token"),
        ([{"prompt": "w1", "chosen": "w2", "rejected": "w3", "images": []}], ValueError, "of text, got a column images"),
        ([{"prompt": "", "chosen": "w1", "rejected": "w2"}], ValueError, "prompt has no token"),
        ([{"id": "same", "chosen": MESSAGE, "rejected": MESSAGE}], ValueError, r"pair 0 \(same\): the prompt has no"),
        ([{"prompt": MESSAGE, "chosen": "w2", "rejected": "w3"}], ValueError, "got prompt: messages, chosen: text"),
        ([{"prompt": MESSAGE, "chosen": MESSAGE, "rejected": []}], ValueError, "chosen: messages, rejected: nothing"),
        (
            [{"prompt": "w1", "chosen": " w2", "rejected": " w3"}, {"chosen": SHAREGPT, "rejected": SHAREGPT}],
            ValueError,
            "pair 1: .* as messages with role and content, got chosen: messages with from, value, rejected: messages",
        ),
        ([{"chosen": "w2", "rejected": None}], ValueError, "got chosen: text, rejected: nothing"),
        ([{"prompt": "w1 w2", "chosen": " w3", "rejected": " w5", "is_flipped": "False"}], ValueError, "got 'False'"),
    ],
)
def test_what_is_no_preference_data_is_refused(tokenizer, pairs, error, message):
    with pytest.raises(error, match=message):
        prepare_pairs(pairs, tokenizer, GAPOConfig(use_cpu=True), 40)


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_no_length_is_no_limit(tokenizer, kind):
    pairs = [{"prompt": "w1 " * 40, "chosen": " w3" * 30, "rejected": " w5"}]
    (whole,) = prepare_pairs(kind(pairs), tokenizer, GAPOConfig(use_cpu=True, max_length=None))
    assert (len(whole["prompt_ids"]), len(whole["chosen_ids"])) == (40, 31) and not whole["is_truncated"]
    (cut,) = prepare_pairs(kind(pairs), tokenizer, GAPOConfig(use_cpu=True, max_length=41))
    assert (len(cut["prompt_ids"]), len(cut["chosen_ids"])) == (10, 31) and cut["is_truncated"]


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_a_prompt_inside_leaves_the_other_columns(tokenizer, kind):
    """As of ultrafeedback_binarized, whose prompt is text and whose chosen and rejected are whole conversations."""
    pairs = flip_labels(made_up_pairs(4), 0.5, seed=0)
    inside = [
        pair | {side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")} | {"prompt": "w1"} for pair in pairs
    ]
    rows = list(prepare_pairs(kind(inside), tokenizer, GAPOConfig(use_cpu=True)))
    assert rows == tokenize_pairs(pairs, tokenizer, 2048) and sum(row["is_flipped"] for row in rows) == 2


def test_templates_get_the_pairs_tools_and_arguments(tokenizer):
    tokenizer.chat_template = (
        "{% if style %}{{ style + ' ' }}{% endif %}{% for tool in tools or [] %}{{ tool.name + ' ' }}{% endfor %}"
        + tokenizer.chat_template
    )
    (pair,) = made_up_pairs(1)
    plain = tokenize_pair(pair, tokenizer, 100)["prompt_ids"]
    for extra in (
        {"chat_template_kwargs": {"style": "w38"}},
        {"tools": [{"name": "w38"}]},
        {"tools": '[{"name": "w38"}]'},
    ):
        row = tokenize_pair(pair | extra, tokenizer, 100)
        assert row["prompt_ids"] == [tokenizer.convert_tokens_to_ids("w38"), *plain], extra


def test_messages_beside_text_do_not_make_it_a_conversation(tokenizer):
    pair = {"prompt": "w1", "chosen": " w2", "rejected": " w3", "messages": [{"role": "user", "content": "w1"}]}
    assert tokenizer.decode(tokenize_pair(pair, tokenizer, 100)["chosen_ids"]) == "w2 </s>"


def test_a_call_of_a_tool_is_no_empty_completion(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "(m['content'] or m['tool_calls'][0])")
    pair = made_up_pairs(1)[0] | {"chosen": [{"role": "assistant", "content": None, "tool_calls": ["w5"]}]}
    assert tokenizer.decode(tokenize_pair(pair, tokenizer, 100)["chosen_ids"]) == "w5 </s>"


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_rows_that_trl_tokenised_get_their_numbers(tokenizer, kind):
    rows = [{"prompt_ids": [1], "chosen_ids": [3, i], "rejected_ids": [4]} for i in range(3)]
    prepared = prepare_pairs(kind(rows), tokenizer, GAPOConfig(use_cpu=True))
    batch = PreferenceCollator(0)([prepared[2], prepared[0]])
    assert batch["index"].tolist() == [2, 0] and batch["is_flipped"].tolist() == [False, False]
    with pytest.raises(ValueError, match="pair 2: is_flipped must be true, false or nothing, got 'false'"):
        PreferenceCollator(0)([prepared[2] | {"is_flipped": "false"}])


@pytest.mark.parametrize("are_tokens", [False, True], ids=["pairs", "rows"])
@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_dataset_with_a_format_is_as_without(tokenizer, form, are_tokens):
    given = Dataset.from_list(tokenize_pairs(made_up_pairs(3), tokenizer, 100) if are_tokens else made_up_pairs(3))
    plain, formatted = (
        PreferenceCollator(0)([prepare_pairs(pairs, tokenizer, GAPOConfig(use_cpu=True))[i] for i in (0, 2)])
        for pairs in (given, given.with_format(form))
    )
    assert plain.keys() == formatted.keys() and all(plain[name].equal(formatted[name]) for name in plain)


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_a_column_of_marks_is_found_whatever_it_holds(tokenizer, kind):
    pairs = made_up_pairs(2)
    marked = [pair | {"is_flipped": False} for pair in pairs]
    for rows, expected in ((pairs, False), (marked, True), (flip_labels(pairs, 0.5, seed=0), True)):
        assert are_marked(prepare_pairs(kind(rows), tokenizer, GAPOConfig(use_cpu=True))) == expected
    assert not are_marked(None)
