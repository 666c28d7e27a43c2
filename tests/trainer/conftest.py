"""A language model and a tokenizer small enough to build in every test, from nothing."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the trainer needs transformers (pip install gapo-kernels[train])")
pytest.importorskip("accelerate", reason="the trainer needs accelerate (pip install gapo-kernels[train])")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The packages as they stand in the source tree, also when they are not installed.
ROOT = Path(__file__).parents[2]
for folder in (ROOT, ROOT / "python"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

WORDS = [f"w{i}" for i in range(40)]
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> \\n ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def tiny_tokenizer():
    special = ["<pad>", "<s>", "</s>", "\n", "user", "assistant", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(dtype=torch.float64, tie_word_embeddings=True, dropout=0.0):
    """A Llama of two layers with a vocabulary of 53, the same on each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tie_word_embeddings,
        attention_dropout=dropout,
        # Large enough that logits differ by whole units, so that no term of the loss is negligible.
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def made_up_pairs(count):
    """Pairs of unequal lengths over the tokenizer's words."""
    generator = torch.Generator().manual_seed(1)

    def text(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator))

    return [
        {
            "id": f"pair-{i}",
            "category": "made up",
            "split": "train",
            "prompt": [{"role": "user", "content": text(1, 6)}],
            "chosen": [{"role": "assistant", "content": text(1, 9)}],
            "rejected": [{"role": "assistant", "content": text(1, 9)}],
        }
        for i in range(count)
    ]
