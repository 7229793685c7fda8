"""GPT-2 in PyTorch, written for speed: the model that the benchmarks compare llmc with.

llmc.reference is written for comparing numbers. This model has what makes PyTorch faster: a padded vocabulary, a cache of keys and
values that is allocated once, no masks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer block of C channels and NH heads."""

    def __init__(self, C: int, NH: int) -> None:
        super().__init__()
        self.NH = NH
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor, past: Tensor | None = None, start: int = 0) -> Tensor:
        """Compute the block.

        Args:
            x: (B, T, C).
            past: the cache, (2, B, NH, max_T, HS): keys and values of the positions before start. Those of x are written into it.
            start: the position of x's first token.
        """
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(B, T, 3, self.NH, C // self.NH).permute(2, 0, 3, 1, 4)
        if past is not None:
            past[0, :, :, start : start + T], past[1, :, :, start : start + T] = k, v
            k, v = past[:, :, :, : start + T]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 of V tokens, C channels, NH heads, L layers and max_T positions, with random weights."""

    def __init__(self, V: int, C: int, NH: int, L: int, max_T: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(max_T, C)
        self.blocks = nn.ModuleList([Block(C, NH) for _ in range(L)])
        self.lnf = nn.LayerNorm(C)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets, (B, T), after inputs, (B, T)."""
        x = self.wte(inputs) + self.wpe.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.lnf(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    def next_logits(self, inputs: Tensor, cache: Tensor, start: int) -> Tensor:
        """Return logits for the token after the last of inputs.

        Args:
            inputs: tokens, (B, T).
            cache: keys and values of all layers, (L, 2, B, NH, max_T, HS); those of inputs are written into it.
            start: the position of the first token.

        Returns:
            Logits, (B, V).
        """
        x = self.wte(inputs) + self.wpe.weight[start : start + inputs.shape[1]]
        for block, past in zip(self.blocks, cache, strict=True):
            x = block(x, past, start)
        return F.linear(self.lnf(x[:, -1]), self.wte.weight)
