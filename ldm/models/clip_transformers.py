"""CLIP's text tower with transformers' parameter names (Stable Diffusion 1); `clip.py` has what both layouts share."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.clip import CausalSelfAttention, TextTower, two_layers


class SeparateAttention(CausalSelfAttention):
    """transformers' layout: one matrix each for q, k and v."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class CLIPBlock(nn.Module):
    """transformers' layer: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, width: int, heads: int, activation: str, mlp_width: int):
        super().__init__()
        self.self_attn = SeparateAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = two_layers(width, activation, mlp_width, "fc1", "fc2")
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextModel(TextTower):
    """The tower with transformers' parameter names: `text_model.*` and, with a projection, `text_projection.*`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = nn.ModuleList(CLIPBlock(*self.block_sizes) for _ in range(self.layers))
        embeddings = {
            "token_embedding": nn.Embedding(self.vocab_size, self.width),
            "position_embedding": nn.Embedding(self.context_length, self.width),
        }
        self.text_model: Any = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict(embeddings),
                "encoder": nn.ModuleDict({"layers": blocks}),
                "final_layer_norm": nn.LayerNorm(self.width),
            }
        )
        projected = self.projection_dim is not None
        self.text_projection = nn.Linear(self.width, self.projection_dim, bias=False) if projected else None
        for embedding in embeddings.values():
            nn.init.normal_(embedding.weight, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        embeddings = self.text_model.embeddings
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return embeddings.token_embedding(tokens) + embeddings.position_embedding(positions)

    def blocks(self) -> nn.ModuleList:
        return self.text_model.encoder.layers

    def final_norm(self, x: Tensor) -> Tensor:
        return self.text_model.final_layer_norm(x)

    def project(self, x: Tensor) -> Tensor:
        return x if self.text_projection is None else self.text_projection(x)
