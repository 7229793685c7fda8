"""GPT-2 as a PyTorch module, with autograd's gradients.

It shares no code with llmc's own model but the configuration, so what the two agree on is GPT-2. Parameters go in and out under
llm.c's 16 names and in its layout: a tensor of each layer's has a leading axis of length L, and wte is padded with rows of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from llmc.models.config import GPT2Config

KVPairs = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (B, NH, T, HS) for the T positions so far

# llm.c's name of each parameter of a block, and its path in Block.
_BLOCK = {
    "ln1w": "ln1.weight",
    "ln1b": "ln1.bias",
    "qkvw": "attention.qkv.weight",
    "qkvb": "attention.qkv.bias",
    "attprojw": "attention.proj.weight",
    "attprojb": "attention.proj.bias",
    "ln2w": "ln2.weight",
    "ln2b": "ln2.bias",
    "fcw": "fc.weight",
    "fcb": "fc.bias",
    "fcprojw": "fcproj.weight",
    "fcprojb": "fcproj.bias",
}


class Attention(nn.Module):
    """Causal multi-head self-attention.

    Args:
        channels: C.
        num_heads: NH.
        kind: 'math' computes the matrix of scores, 'flash' calls PyTorch's fused kernel.
    """

    def __init__(self, channels: int, num_heads: int, kind: str) -> None:
        super().__init__()
        self.num_heads, self.kind = num_heads, kind
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Compute attention.

        Args:
            x: (B, T, C).
            past: keys and values of the positions before x, or None.

        Returns:
            The output, (B, T, C), and keys and values of all S positions so far, (B, NH, S, HS) each.
        """
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, NH, T, HS) each
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        # The queries are the last T of S positions. Each sees the positions up to its own.
        S = k.shape[2]
        visible = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        if self.kind == "math":
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
            out = scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v
        elif S == T:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.proj(out.transpose(1, 2).reshape(B, T, C)), (k, v)


class Block(nn.Module):
    """A transformer block: attention, then two linear layers with GELU between them, each after a layernorm."""

    def __init__(self, config: GPT2Config, attention: str) -> None:
        super().__init__()
        C = config.channels
        self.ln1 = nn.LayerNorm(C)
        self.attention = Attention(C, config.num_heads, attention)
        self.ln2 = nn.LayerNorm(C)
        self.fc = nn.Linear(C, 4 * C)
        self.fcproj = nn.Linear(4 * C, C)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Compute the block; arguments and results are those of Attention.forward()."""
        attended, kv = self.attention(self.ln1(x), past)
        x = x + attended
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh")), kv


class GPT(nn.Module):
    """GPT-2 with tied embeddings, and with the random weights that llmc.GPT2 has for the same seed.

    It is a module of float32 on the CPU; .to(...) moves it to other dtypes and devices. wte has vocab_size rows here, without padding.

    Args:
        config: the shape.
        attention: 'math' or 'flash', as of Attention.
        seed: of the weights.

    Raises:
        ValueError: if attention is another.
    """

    def __init__(self, config: GPT2Config, *, attention: str = "math", seed: int = 42) -> None:
        super().__init__()
        if attention not in ("math", "flash"):
            raise ValueError(f"unknown attention '{attention}': expected math or flash")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.channels)
        self.wpe = nn.Embedding(config.max_seq_len, config.channels)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.lnf = nn.LayerNorm(config.channels)
        self._init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator) -> None:
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        named = self._parameters_by_name()
        for bias in (b for name, biases in named.items() if name.endswith("b") for b in biases):
            nn.init.zeros_(bias)
        nn.init.normal_(self.wte.weight, std=0.02, generator=generator)
        nn.init.normal_(self.wpe.weight, std=0.02, generator=generator)
        for l in range(self.config.num_layers):
            nn.init.normal_(named["qkvw"][l], std=0.02, generator=generator)
            nn.init.normal_(named["attprojw"][l], std=residual_std, generator=generator)
            nn.init.normal_(named["fcw"][l], std=0.02, generator=generator)
            nn.init.normal_(named["fcprojw"][l], std=residual_std, generator=generator)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, kv: KVPairs | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute logits and, if there are targets, the loss.

        Args:
            idx: tokens, (B, T), of any integer dtype.
            targets: (B, T), or None. A target of -1 adds 0 to the loss.
            kv: keys and values of the positions before idx, to which those of idx are added. An empty list begins a text.

        Returns:
            Logits, (B, T, vocab_size) of the module's dtype, and the cross-entropy in nats, or None. The latter is the sum over all
            targets divided by B*T, in f32 (f64 if the module is).

        Raises:
            ValueError: if there are more positions than max_seq_len.
        """
        begin = kv[0][0].shape[2] if kv else 0
        T, max_seq_len = idx.shape[1], self.config.max_seq_len
        if begin + T > max_seq_len:
            raise ValueError(f"{begin + T} positions, but the model's max_seq_len is {max_seq_len}")
        x = self.wte(idx) + self.wpe(torch.arange(begin, begin + T, device=idx.device))
        pairs: KVPairs = []
        for l, block in enumerate(self.blocks):
            x, pair = block(x, kv[l] if kv else None)
            pairs.append(pair)
        if kv is not None:
            kv[:] = pairs
        logits = F.linear(self.lnf(x), self.wte.weight)
        if targets is None:
            return logits, None
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten().long(), ignore_index=-1, reduction="sum")
        return logits, loss / targets.numel()

    # ---- llm.c's names and layouts ----

    def _parameters_by_name(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters by llm.c's names, in the order of llm.c's file: a list of one per layer, or a list of a single one."""

        def one(path: str) -> list[nn.Parameter]:
            return [self.get_parameter(path)]

        named = {"wte": one("wte.weight"), "wpe": one("wpe.weight")}
        for name, path in _BLOCK.items():
            named[name] = [module.get_parameter(path) for module in self.blocks]
        return {**named, "lnfw": one("lnf.weight"), "lnfb": one("lnf.bias")}

    @torch.no_grad()
    def load_llmc(self, parameters: Mapping[str, NDArray[Any]]) -> None:
        """Copy parameters into the module.

        Args:
            parameters: arrays by name, as llmc.GPT2(...).parameters are.

        Raises:
            ValueError: if a name or shape is wrong.
        """
        own = self._parameters_by_name()
        if set(parameters) != set(own):
            raise ValueError(f"parameters are named {sorted(parameters)}, expected {sorted(own)}")
        for name, tensors in own.items():
            wide = torch.from_numpy(np.array(parameters[name], dtype=np.float32))
            if name == "wte":
                wide = wide[: self.config.vocab_size]
            sources = wide if name in _BLOCK else [wide]
            if len(sources) != len(tensors) or sources[0].shape != tensors[0].shape:
                raise ValueError(
                    f"{name} has shape {tuple(wide.shape)}, expected {len(tensors)} of {tuple(tensors[0].shape)}"
                )
            for tensor, source in zip(tensors, sources):
                tensor.copy_(source)

    def parameters_llmc(self) -> dict[str, NDArray[Any]]:
        """Return copies of the parameters, by name as in llmc.GPT2(...).parameters: f64 if the module is, else f32."""
        return self._export(lambda p: p)

    def gradients(self) -> dict[str, NDArray[Any]]:
        """Return copies of the gradients, by name as in llmc.GPT2(...).gradients: f64 if the module is, else f32.

        Raises:
            ValueError: if there was no backward() yet.
        """

        def gradient(p: nn.Parameter) -> Tensor:
            if p.grad is None:
                raise ValueError("there are no gradients: call backward() on a loss first")
            return p.grad

        return self._export(gradient)

    def _export(self, pick: Callable[[nn.Parameter], Tensor]) -> dict[str, NDArray[Any]]:
        out: dict[str, NDArray[Any]] = {}
        for name, tensors in self._parameters_by_name().items():
            picked = [pick(p).detach().cpu() for p in tensors]
            wide = torch.stack([t if t.dtype == torch.float64 else t.float() for t in picked])
            out[name] = wide.numpy() if name in _BLOCK else wide[0].numpy()
        padding = self.config.padded_vocab_size - self.config.vocab_size
        out["wte"] = np.pad(out["wte"], ((0, padding), (0, 0)))
        return out

    # ---- training ----

    def configure_optimizer(
        self, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.0
    ) -> torch.optim.AdamW:
        """Return PyTorch's AdamW for the parameters. Weight decay acts on matrices and embeddings, not on biases and layernorms.

        Args:
            lr: learning rate.
            betas, eps, weight_decay: as of torch.optim.AdamW.
        """
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
