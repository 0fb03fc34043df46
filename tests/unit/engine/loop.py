"""A training loop of somebody's own, as small as can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptcoord import CheckpointEngine, EngineConfig


class Net(nn.Module):
    """Dropout draws from the generator, batch norm has buffers; what is used last stands first.

    With 64 wide layers, sums over four ranks show their order.
    """

    def __init__(self, width: int = 12, layers: int = 0) -> None:
        super().__init__()
        self.last = nn.Linear(width, 1)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.BatchNorm1d(width)
        self.first = nn.Linear(6, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x))
        for layer in self.layers:
            hidden = layer(hidden.relu())
        hidden = nn.functional.dropout(hidden.relu(), 0.2, self.training)
        return self.last(hidden)


class Loop:
    """A model, its optimizer and schedule, and what it was trained to."""

    def __init__(self, seed: int = 3, lr: float = 0.02, **size: int) -> None:
        torch.manual_seed(seed)
        self.model = Net(**size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.losses: dict[int, str] = {}
        self.refs: list[str | None] = []

    def attach(self, folder: Any, **settings: Any) -> CheckpointEngine:
        config = EngineConfig(**settings) if settings else None
        return CheckpointEngine.attach(
            self.model,
            self.optimizer,
            self.scheduler,
            workspace=folder,
            repo="run",
            config=config,
        )

    def step(self) -> float:
        """One of training, on data that is drawn."""
        x = torch.randn(8, 6)
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return float(loss.detach())

    def train(self, engine: CheckpointEngine, until: int) -> None:
        for step in range(engine.current_step + 1, until + 1):
            self.losses[step] = self.step().hex()
            self.refs.append(engine.maybe_commit(step))

    def remains(self) -> dict[str, Any]:
        """All state, and what would be drawn next; drawing leaves no trace."""
        before = torch.get_rng_state()
        left = {
            "model": plain(self.model.state_dict()),
            "optimizer": plain(self.optimizer.state_dict()),
            "scheduler": plain(self.scheduler.state_dict()),
            "draws": torch.rand(3).tolist(),
        }
        torch.set_rng_state(before)
        return left


def plain(value: Any) -> Any:
    """A state that `==` compares to the last bit."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value
