"""What the examples share: a byte-level GPT and real text that needs no download."""

from __future__ import annotations

import argparse
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from ckptcoord import CkptError, shutdown

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 256  # one token a byte
DEFAULTS = {
    "max_steps": 100,
    "save_steps": 25,
    "logging_steps": 5,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "weight_decay": 0.1,
}
"""Of TrainingArguments; each example adds its `output_dir`."""
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """The model's size; the defaults give about 1.2 million parameters."""

    layers: int = 4
    width: int = 160
    heads: int = 4
    context: int = 128
    dropout: float = 0.1


class Block(nn.Module):
    """Causal attention and an MLP, each on a normalised residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, time, width]` to the same."""
        batch, time, width = hidden.shape
        parts = self.qkv(self.attention_norm(hidden)).view(batch, time, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        hidden = hidden + functional.dropout(mixed, self.dropout, self.training)
        mixed = self.down(functional.gelu(self.up(self.mlp_norm(hidden))))
        return hidden + functional.dropout(mixed, self.dropout, self.training)


class ByteGPT(nn.Module):
    """A small GPT over bytes; the output layer shares the embedding's weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`[batch, time]` tokens and their successors to the mean cross entropy in nats."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.tokens(input_ids) + self.positions(places)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss}


class ByteWindows(Dataset[dict[str, Tensor]]):
    """Windows of `context` bytes of a text, side by side, each with its successors as labels."""

    def __init__(self, text: bytes, context: int) -> None:
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.context
        window = self.data[start : start + self.context + 1].long()
        return {"input_ids": window[:-1], "labels": window[1:]}


def standard_library_text(limit_bytes: int = 4 << 20) -> bytes:
    """The running interpreter's own standard library in name order, at most `limit_bytes` of it."""
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return bytes(text[:limit_bytes])


def split(text: bytes, context: int, held_out: float = 0.02) -> tuple[ByteWindows, ByteWindows]:
    """Training windows, and those of the last `held_out` part of the text."""
    cut = int(len(text) * (1 - held_out))
    return ByteWindows(text[:cut], context), ByteWindows(text[cut:], context)


def run(main: Callable[[], int]) -> int:
    """Run an example's `main`, on each rank; the exit code. An error is two lines of text."""
    try:
        return main()
    except CkptError as error:
        sys.stderr.write(f"error[{error.code}]: {error.what}\n")
        sys.stderr.write(f"help: {error.help}\n" if error.help else "")
        return error.exit_code
    finally:
        shutdown()


def model_options(description: str) -> argparse.ArgumentParser:
    """A parser with the model's size and how much text there is: `--text-bytes`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    group = parser.add_argument_group("model and text")
    size = GPTConfig()
    for name in ("layers", "width", "heads", "context"):
        group.add_argument(f"--{name}", type=int, default=getattr(size, name))
    group.add_argument("--dropout", type=float, default=size.dropout)
    group.add_argument("--text-bytes", type=int, default=4 << 20, help="of source to train on")
    return parser
