"""Decoders of transformers, small enough to build in a test: three layers, random weights, no dropout, float64."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

VOCABULARY = 31
LAYERS = 3
NAMES = ("llama", "gemma2", "gpt2")


def build(name: str, dtype: torch.dtype = torch.float64, layers: int = LAYERS, width: int = 16) -> torch.nn.Module:
    """A causal language model: "llama" (its own head), "gemma2" (tied head, softcapping) or "gpt2" (tied head)."""
    transformers = pytest.importorskip("transformers", reason="these models are those of transformers")
    size = dict(vocab_size=VOCABULARY, hidden_size=width, intermediate_size=24, num_hidden_layers=layers)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    tokens = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0)
    if name == "llama":
        config = transformers.LlamaConfig(**size, **heads, **tokens, tie_word_embeddings=False)
    elif name == "gemma2":
        caps = dict(final_logit_softcapping=2.0, attn_logit_softcapping=3.0)  # low enough to bend these logits
        config = transformers.Gemma2Config(**size, **heads, **tokens, **caps, sliding_window=4, query_pre_attn_scalar=4)
    else:
        dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        size = dict(vocab_size=VOCABULARY, n_embd=width, n_layer=layers, n_head=4, n_positions=16)
        config = transformers.GPT2Config(**size, **dropout, **tokens)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    with torch.no_grad():  # far from the initial near-zero logits, so that margins and anchors are of order one
        for param in model.parameters():
            param.add_(torch.randn(param.shape, dtype=torch.float64).to(dtype), alpha=0.2)
    return model.train()


class Float64(TorchFunctionMode):
    """Also where a model computes in float32 whatever its dtype, as transformers' norms and softmaxes do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def stay_in_float64(model: torch.nn.Module) -> None:
    """Also in its norms and attention; where activations are checkpointed, in the second run as well."""

    def in_float64(forward):
        def run(*args, **kwargs):
            with Float64():
                return forward(*args, **kwargs)

        return run

    for module in model.modules():
        if type(module).__name__.endswith(("Norm", "Attention")):
            module.forward = in_float64(module.forward)


def preference_batch(pairs: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, labels (2 pairs, length): a prompt of two tokens, then a completion of 2 to length - 2 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (2 * pairs, length), generator=generator)
    ids[pairs:, :2] = ids[:pairs, :2]
    labels = ids.clone()
    labels[:, :2] = -100
    for row, end in enumerate(torch.randint(4, length + 1, (2 * pairs,), generator=generator).tolist()):
        labels[row, end:] = -100
    return ids, labels
