"""The matrix of layouts: saved on each, loaded on each, and trained on (docs/layouts.md).

`python -m tests.distributed.layouts 10 SEED` saves and loads on the first ten and writes the table.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tests.unit.trainers.job import run_job
from tests.unit.trainers.tiny import arguments
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ckptcoord import DDPTrainer, FSDPTrainer, HybridTrainer, PipelineTrainer, Trainer
from ckptcoord.trainers.callbacks import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch.distributed.device_mesh import DeviceMesh

SAVE_AT, STOP_AT = 3, 7  # an epoch is five steps
SAMPLES_A_STEP, SAMPLES = 8, 40
WIDTH = 10
TOLERANCE = 1e-5
"""Relative, of a loss: another layout adds the same numbers in another order, in fp32."""
_LOADS_A_JOB = 5
_PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"
_MARKS = "<!-- matrix -->\n", "<!-- end of matrix -->"


# --- what is trained ------------------------------------------------------------------------------


class Points:
    """The same at every look."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.sin(torch.arange(6) * (index + 1.0))
        return {"x": x, "labels": x.sum().reshape(1)}


class Block(nn.Module):
    """Two matrices that tensor parallelism parts, a norm that all hold, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.rand(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.get_buffer("scale") * self.down(self.up(self.norm(hidden)).relu())


class Head(nn.Module):
    """The first layer's weights once more, and three numbers, fewer than there may be ranks."""

    def __init__(self, shared: nn.Parameter) -> None:
        super().__init__()
        self.weight = shared
        self.three = nn.Linear(6, 3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.three(hidden @ self.weight).sum(-1, keepdim=True)


class Net(nn.Sequential):
    """Layers that may be stages."""

    def __init__(self) -> None:
        first = nn.Linear(6, WIDTH)
        super().__init__(first, *(Block() for _ in range(3)), Head(first.weight))


class Loss:
    """The same, where there are stages and where there are none."""

    def output_loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(output, targets)

    def compute_loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return self.output_loss(model(batch["x"]), batch["labels"])


class Alone(Loss, Trainer):  # type: ignore[misc]
    pass


class Replicated(Loss, DDPTrainer):  # type: ignore[misc]
    pass


class Parted(Loss, FSDPTrainer):  # type: ignore[misc]
    pass


class Staged(Loss, PipelineTrainer):  # type: ignore[misc]
    pass


class Meshed(Loss, HybridTrainer):  # type: ignore[misc]
    def parallelize(self, model: nn.Module, mesh: DeviceMesh) -> None:
        for block in model:
            if isinstance(block, Block):
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, mesh, plan)


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to train: a trainer, the number of ranks, how many of them read data of their own."""

    kind: Callable[..., Any]
    ranks: int
    data_ranks: int = 1


def _mesh(**shape: int) -> Callable[..., Any]:
    return functools.partial(Meshed, mesh_shape=shape)


LAYOUTS = {
    "1 process": Layout(Alone, 1),
    "FSDP 2": Layout(Parted, 2, 2),
    "PP 2": Layout(Staged, 2),
    "DDP 2": Layout(Replicated, 2, 2),
    "DDP 4": Layout(Replicated, 4, 4),
    "FSDP 4": Layout(Parted, 4, 4),
    "TP 2": Layout(_mesh(tp=2), 2),
    "PP 4": Layout(Staged, 4),
    "DP 2 x TP 2": Layout(_mesh(dp=2, tp=2), 4, 2),
    "DP 2 x PP 2": Layout(_mesh(dp=2, pp=2), 4, 2),
}


# --- on every rank --------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Losses by step, and a digest of the whole state where training begins and at the save."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.digests: dict[int, str] = {}
        self.losses: dict[int, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.digests[state.global_step] = full_digest(self.trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SAVE_AT:
            self.digests[SAVE_AT] = full_digest(self.trainer)
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses[state.global_step] = float(kwargs["logs"]["loss"]).hex()


def run(layout: str, folder: str, seed: int, *, resume: bool) -> tuple[str, list[str]]:
    """The digest of the state after `SAVE_AT` steps, and the losses of all steps after it."""
    how, watch = LAYOUTS[layout], Watch()
    torch.manual_seed(seed + resume)  # what is loaded is not there already
    args = arguments(
        Path(folder),
        max_steps=STOP_AT,
        per_device_train_batch_size=SAMPLES_A_STEP // how.data_ranks,
        learning_rate=0.01,
        weight_decay=0.1,
        seed=seed,
        resume_from_checkpoint=f"main@{SAVE_AT}" if resume else False,
    )
    watch.trainer = how.kind(Net(), args, Points(), callbacks=[watch])
    watch.trainer.train()
    watch.trainer.close()
    return watch.digests[SAVE_AT], [watch.losses[step] for step in range(SAVE_AT + 1, STOP_AT + 1)]


def resume_all(layout: str, folders: Mapping[str, str], seed: int) -> dict[str, Any]:
    """`run` from each of these checkpoints, one after the other."""
    return {name: run(layout, folder, seed, resume=True) for name, folder in folders.items()}


def full_digest(trainer: Any) -> str:
    """Of everything that does not belong to a rank, whole and by full names. Collective."""
    parts = {one.key: one.stateful for one in trainer.get_state_components()}
    mine: dict[str, str] = {}
    for key in ("model", "optimizer", "scheduler", "progress", "dataset"):
        _collect(key, parts[key].state_dict(), mine)
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    whole: dict[str, str] = {}
    for one in everyone:
        for name, text in one.items():
            assert whole.setdefault(name, text) == text, f"ranks differ in {name}"
    return hashlib.sha256(repr(sorted(whole.items())).encode()).hexdigest()


def _collect(path: str, value: Any, found: dict[str, str]) -> None:
    if isinstance(value, torch.Tensor):
        full = value.full_tensor() if isinstance(value, DTensor) else value
        data = full.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        text = f"{full.dtype} {tuple(full.shape)} {hashlib.sha256(data).hexdigest()}"
        found[path] = text
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            _collect(f"{path}.{key}", value[key], found)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            _collect(f"{path}.{place}", inner, found)
    else:
        found[path] = repr(value)


# --- the matrix -----------------------------------------------------------------------------------


def matrix(folder: Path, names: Iterable[str], seed: int) -> dict[tuple[str, str], float]:
    """Save on each layout, load on each: how far losses are apart, relative; 0: the same bits.

    Raises:
        AssertionError: a state is not what was saved, or losses are too far apart; on the same
            layout, apart at all.
    """
    names = list(names)
    saved, folders = {}, {}
    for number, name in enumerate(names):
        folders[name] = str(folder / str(number))
        saved[name] = _same(
            run_job(run, name, folders[name], seed, resume=False, size=LAYOUTS[name].ranks)
        )
    found = {}
    for loader in names:
        for at in range(0, len(names), _LOADS_A_JOB):
            some = {name: folders[name] for name in names[at : at + _LOADS_A_JOB]}
            try:
                job = run_job(resume_all, loader, some, seed, size=LAYOUTS[loader].ranks)
            except AssertionError as error:
                error.add_note(f"loaded on {loader}, saved on one of {', '.join(some)}")
                raise
            for saver, (digest, losses) in _same(job).items():
                cell = f"saved on {saver}, loaded on {loader}"
                wanted, expected = saved[saver]
                assert digest == wanted, f"{cell}: another state"
                apart = _apart(losses, expected)
                assert apart <= (0.0 if saver == loader else TOLERANCE), f"{cell}: {apart:.1e}"
                found[saver, loader] = apart
    return found


def _same(said: list[Any]) -> Any:
    """What all ranks say."""
    assert all(one == said[0] for one in said), said
    return said[0]


def _apart(losses: list[str], expected: list[str]) -> float:
    pairs = zip(map(float.fromhex, losses), map(float.fromhex, expected), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def table(found: Mapping[tuple[str, str], float]) -> str:
    """In Markdown: a row for each layout that saved."""
    names = list(dict.fromkeys(saver for saver, _ in found))
    lines = [f"| saved on | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for saver in names:
        cells = [f"{found[saver, loader]:.0e}" if found[saver, loader] else "=" for loader in names]
        lines.append(f"| {saver} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_page(text: str) -> None:
    """Put the table into the docs."""
    before, _, rest = _PAGE.read_text().partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    _PAGE.write_text(f"{before}{_MARKS[0]}{text}{_MARKS[1]}{after}")


def main(amount: int, seed: int) -> None:
    """The first so many layouts; all of them write the table."""
    with tempfile.TemporaryDirectory() as folder:
        found = matrix(Path(folder), list(LAYOUTS)[:amount], seed)
    if amount >= len(LAYOUTS):
        write_page(table(found))
    equal = sum(apart == 0 for apart in found.values())
    print(  # noqa: T201 (its purpose)
        f"{len(found)} cells, each with the state that was saved; losses of {STOP_AT - SAVE_AT} "
        f"more steps the same to the last bit in {equal}, else within {max(found.values()):.0e}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 16))
