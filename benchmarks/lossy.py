#!/usr/bin/env python3
"""Twenty commits of one training, saved exactly and approximately: bytes, time, and what it costs.

A byte-level GPT trains with AdamW on the standard library's source; every few steps all sides save
the same state, in an order shuffled by the commit: `torch.save`, ckptcoord exact and
`precision="bounded"`, and gradient-desc where it is installed. Then each side's last commit is
resumed, and trains on with the data that the undisturbed run has.

    python benchmarks/lossy.py [--quick] [--json] [--warm-up N] [--width N] [--folder DIR]

Ratios (less is better): `<side>_stored_vs_torch_save` of all twenty, and
`<side>_time_vs_torch_save` commit by commit; of `bounded` the bars are 0.15 and 2.0. Figures: the
mean difference of the loss over `RESUMED_STEPS` steps after the resume (`bounded`: bar 1e-4 late in
a training), and the largest error of an element of the parameters.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import Figure, emit, options, order, paired, ratio, spread_table
from sides import sync, sync_tree
from torch import nn

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.plan.lineage import Compression, Precision

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

COMMITS, GAP, RESUMED_STEPS = 20, 10, 25
CONTEXT, BATCH = 64, 16
HIGH_LR, LOW_LR = 1e-3, 1e-4
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "common.py"


@dataclass(slots=True)
class Run:
    """A training that can be copied and go on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Callable[[int], dict[str, torch.Tensor]]
    step: int = 0

    def train(self, steps: int) -> list[float]:
        """So many steps; the loss of each."""
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(**self.batches(self.step))["loss"]
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
            self.step += 1
        return losses

    def parts(self) -> list[StateComponent]:
        """What a checkpoint holds."""
        return [
            StateComponent("model", self.model, SharingPattern.REPLICATED),
            StateComponent("optimizer", self.optimizer, SharingPattern.REPLICATED),
        ]


def start(width: int, layers: int) -> Run:
    """A new training."""
    gpt = _module("gpt_example", EXAMPLES)
    torch.manual_seed(0)
    config = gpt.GPTConfig(width=width, layers=layers, heads=4, context=CONTEXT, dropout=0.0)
    model = gpt.ByteGPT(config)
    train, _ = gpt.split(gpt.standard_library_text(), CONTEXT)

    def batches(step: int) -> dict[str, torch.Tensor]:
        picks = torch.randint(len(train), (BATCH,), generator=torch.Generator().manual_seed(step))
        items = [train[int(pick)] for pick in picks]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    return Run(model, torch.optim.AdamW(model.parameters(), lr=HIGH_LR), batches)


class TorchSave:
    """torch.save into a file a commit."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        folder.mkdir()

    def save(self) -> None:
        """One commit, durable."""
        path = self.folder / f"{self.run.step}.pt"
        state = {"model": self.run.model.state_dict(), "optimizer": self.run.optimizer.state_dict()}
        torch.save(state, path)
        sync(path)
        sync(path.parent)

    def resume(self, into: Run) -> None:
        """The last commit."""
        state = torch.load(self.folder / f"{into.step}.pt", weights_only=True)
        into.model.load_state_dict(state["model"])
        into.optimizer.load_state_dict(state["optimizer"])


class Ours:
    """ckptcoord with a rule."""

    def __init__(self, run: Run, folder: Path, rule: Compression) -> None:
        self.run, self.folder = run, folder
        self.config = CoordinatorConfig(compression=rule)
        self.coordinator = CheckpointCoordinator(run.parts(), output_dir=folder, config=self.config)

    def save(self) -> None:
        """One commit, durable."""
        self.coordinator.save_checkpoint(step=self.run.step)

    def resume(self, into: Run) -> None:
        """The last commit."""
        self.coordinator.close()
        with CheckpointCoordinator(
            into.parts(), output_dir=self.folder, config=self.config
        ) as reader:
            reader.load_checkpoint(f"main@{into.step}")


class GradientDesc:
    """gradient-desc, made durable. What it prints goes to stderr."""

    def __init__(self, run: Run, folder: Path, level: str) -> None:
        self.run, self.folder, self.level = run, folder, level
        self.engine = self._attach(run)

    def save(self) -> None:
        """One commit, durable."""
        with redirect_stdout(sys.stderr):
            self.engine.commit(self.run.step)
        sync_tree(self.folder)

    def resume(self, into: Run) -> None:
        """The last commit."""
        with redirect_stdout(sys.stderr):
            self._attach(into).resume(f"main@{into.step}")

    def _attach(self, run: Run) -> Any:  # noqa: ANN401 (it has no types)
        gradient = importlib.import_module("gradient")
        config = gradient.GradientConfig(compression=self.level)
        return gradient.GradientEngine.attach(
            run.model, run.optimizer, workspace=str(self.folder), repo="run", config=config
        )


def sides_of(run: Run, folder: Path) -> dict[str, TorchSave | Ours | GradientDesc]:
    """All that can be measured here."""
    bounded = Compression(level="auto", precision=Precision.BOUNDED)  # type: ignore[arg-type]
    sides: dict[str, TorchSave | Ours | GradientDesc] = {
        "torch.save": TorchSave(run, folder / "torch"),
        "exact": Ours(run, folder / "exact", Compression.of("auto")),
        "bounded": Ours(run, folder / "bounded", bounded),
    }
    if importlib.util.find_spec("gradient") is None:
        print("gradient-desc is not installed: it is left out", file=sys.stderr)
        return sides
    for level in ("auto", "aggressive"):
        sides[f"gradient-desc {level}"] = GradientDesc(run, folder / f"gd-{level}", level)
    return sides


def main() -> None:
    """Train, save, resume, report."""
    parser = options(__doc__)
    parser.add_argument("--warm-up", type=int, default=1300, help="steps before the first commit")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    warm_up, width, layers = (20, 64, 2) if args.quick else (args.warm_up, args.width, 4)
    torch.set_num_threads(2)
    run = start(width, layers)
    run.train(warm_up // 2)
    for group in run.optimizer.param_groups:
        group["lr"] = LOW_LR
    run.train(warm_up - warm_up // 2)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report(run, Path(folder), as_json=args.json)


def report(run: Run, folder: Path, *, as_json: bool) -> None:
    """Twenty commits by every side, a resume of each, and the figures."""
    sides = sides_of(run, folder)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(COMMITS):
        run.train(GAP)
        for name in order(list(sides), turn):
            began_s = time.perf_counter()
            sides[name].save()
            seconds[name].append(time.perf_counter() - began_s)
    stored = {name: _bytes_in(side.folder) for name, side in sides.items()}
    figures: dict[str, Figure] = {}
    resumed = {name: _copy(run) for name in sides}
    for name, side in sides.items():
        _blank(resumed[name])
        side.resume(resumed[name])
        figures[f"{name}: largest error of a parameter"] = _apart(resumed[name].model, run.model)
    truth = run.train(RESUMED_STEPS)
    for name, copied in resumed.items():
        losses = copied.train(RESUMED_STEPS)
        apart = sum(abs(a - b) for a, b in zip(losses, truth, strict=True)) / RESUMED_STEPS
        figures[f"{name}: mean difference of the loss"] = apart
    figures["mean loss of the undisturbed run"] = round(sum(truth) / RESUMED_STEPS, 4)
    peers = [name for name in sides if name != "torch.save"]
    ratios = {
        f"{name}_stored_vs_torch_save": ratio([stored[name] / stored["torch.save"]])
        for name in peers
    } | {
        # The first commit, an anchor that may compile kernels, is no delta.
        f"{name}_time_vs_torch_save": paired(seconds[name][1:], seconds["torch.save"][1:])
        for name in peers
    }
    size = stored["torch.save"] // COMMITS
    figures["bytes of one torch.save"] = size
    table = spread_table("one commit", seconds, size)
    emit("lossy", ratios, figures, as_json=as_json, tables=[table])


def _copy(run: Run) -> Run:
    model = copy.deepcopy(run.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LOW_LR)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    return Run(model, optimizer, run.batches, run.step)


def _blank(run: Run) -> None:
    """Forget the state: what is there after a resume comes from that."""
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
        for moments in run.optimizer.state.values():
            for value in moments.values():
                value.zero_()


def _apart(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _module(name: str, path: Path) -> ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
