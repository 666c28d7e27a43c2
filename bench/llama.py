"""A Llama in plain torch, with transformers' names: what the step is measured on where transformers is not installed.

Random weights, no padding, no cache; outputs as LlamaForCausalLM's, given the same weights.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON, ROTATION, DEVIATION = 1e-6, 10000.0, 0.02  # LlamaConfig's defaults


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding of (S, heads, T, D)."""
    half = x.shape[-1] // 2
    speed = ROTATION ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * speed
    cosine, sine = (value.to(x.dtype).repeat(1, 2) for value in (angle.cos(), angle.sin()))
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotated(query), rotated(key)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(found.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(width, heads, kv_heads), MLP(width, inner)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, EPSILON), nn.RMSNorm(width, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(width, EPSILON)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        """input_ids (S, T); attention_mask (S, T) of ones."""
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=self.norm(x))


class Llama(nn.Module):
    """With LlamaConfig's arguments, embedding and head tied."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        intermediate_size: int,
    ) -> None:
        super().__init__()
        heads = (num_attention_heads, num_key_value_heads)
        self.model = Backbone(vocab_size, num_hidden_layers, hidden_size, *heads, intermediate_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        for param in self.parameters():
            if param.dim() == 2:
                nn.init.normal_(param, std=DEVIATION)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden))
