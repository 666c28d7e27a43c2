"""What the examples share: their command line, preference pairs, and a batch of them."""

import argparse

import torch

from gapo_trainer import load_preferences


def arguments(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="name or path of a chat model; default: a tiny one with random weights")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--lr", type=float, help="default: 1e-6, or 3e-3 for the tiny model")
    args = parser.parse_args(argv)
    args.lr = args.lr or (1e-6 if args.model else 3e-3)
    return args


def preference_pairs(count=8):
    """The shortest of the pairs that ship with gapo_trainer: prompt, chosen and rejected, each a list of messages."""
    pairs = sorted(load_preferences("train"), key=lambda pair: len(str(pair["chosen"]) + str(pair["rejected"])))
    return [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs[:count]]


def tokenized(pairs, tokenizer):
    """Rows with prompt_ids, chosen_ids and rejected_ids."""

    def ids(messages, **options):
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)

    rows = []
    for pair in pairs:
        prompt = ids(pair["prompt"], add_generation_prompt=True)
        row = {f"{side}_ids": ids(pair["prompt"] + pair[side])[len(prompt) :] for side in ("chosen", "rejected")}
        rows.append({"prompt_ids": prompt, **row})
    return rows


def collate(rows, pad_token_id=0):
    """input_ids, attention_mask, labels (2B, T): chosen rows, then rejected rows; labels are -100 but on completions."""
    sequences = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in rows]
    shape = len(sequences), max(len(prompt) + len(completion) for prompt, completion in sequences)
    ids, mask, labels = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for i, (prompt, completion) in enumerate(sequences):
        begin, end = len(prompt), len(prompt) + len(completion)
        ids[i, :end], mask[i, :end] = torch.tensor(prompt + completion), 1
        labels[i, begin:end] = ids[i, begin:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
