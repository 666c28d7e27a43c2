"""The examples' model: yours, or a tiny one with random weights that needs no download."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load(name=None):
    """A decoder with .model and .lm_head, and its tokenizer. Without a name, a tiny Llama that reads bytes."""
    if name is not None:
        # float32: steps of a learning rate of 1e-6 are lost in bfloat16 weights.
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
        # These change the logits: pass them on to linear_sequence_logps as softcap=, logit_scale= and bias=.
        altered = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        if any(getattr(model.config, key, None) for key in altered) or model.lm_head.bias is not None:
            raise ValueError(f"{name} caps or scales its logits or has a bias; the examples leave that out")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return model, tokenizer
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    bytes_only.pre_tokenizer, bytes_only.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    bytes_only.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=1, **size)
    return LlamaForCausalLM(config), tokenizer
