"""What torchrun runs for tests of trainers: `python -m tests.distributed.program JOB FOLDER JSON`.

JOB is `module:function`; the function takes the folder and the settings, on every rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tests.distributed.launch import Torchrun

import ckptcoord
from ckptcoord import TrainerCallback, open_repository
from ckptcoord.errors import RepositoryNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S = 120.0
RANK = int(os.environ.get("RANK", "0"))  # noqa: TID251 (torchrun's)


# --- on every rank --------------------------------------------------------------------------------


class Record(TrainerCallback):
    """Losses and gradient norms, to the last bit; kills its own rank where told."""

    def __init__(self, repository: Path, kill_at: int = 0, after: int = 0) -> None:
        self.repository, self.kill_at, self.after = repository, kill_at, after
        self.lines: dict[str, list[str]] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            said = [float(logs["loss"]).hex(), float(logs["grad_norm"]).hex()]
            self.lines[str(state.global_step)] = said

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.kill_at:
            until_s = time.monotonic() + TIMEOUT_S
            while newest(self.repository) < self.after:
                assert time.monotonic() < until_s, "the save before the kill is not committed"
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def digest(value: Any) -> str:
    """Of every bit of a state: tensors by what this rank holds of them."""
    found = hashlib.sha256()
    _digest(value, found)
    return found.hexdigest()


def _digest(value: Any, found: Any) -> None:
    if isinstance(value, torch.Tensor):
        local = getattr(value, "to_local", lambda: value)().detach().contiguous()
        found.update(f"{local.dtype}{tuple(local.shape)}".encode())
        found.update(local.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key in value:
            found.update(repr(key).encode())
            _digest(value[key], found)
    elif isinstance(value, list | tuple):
        for inner in value:
            _digest(inner, found)
    else:
        found.update(repr(value).encode())


def remains(trainer: Any) -> dict[str, str]:
    """Digests of what a run leaves on this rank, and of what it would draw next."""
    return {
        "model": digest(trainer.model.state_dict()),
        "optimizer": digest(trainer.optimizer.state_dict()),
        "scheduler": digest(trainer.lr_scheduler.state_dict()),
        "progress": digest(trainer.state.state_dict()),
        "draws": digest(torch.rand(4)),
    }


def say(folder: Path, name: str, value: Any) -> None:
    """For the test to read."""
    (folder / f"{name}-{RANK}.json").write_text(json.dumps(value))


# --- in the test ----------------------------------------------------------------------------------


def torchrun(
    function: Callable[..., Any],
    folder: Path,
    ranks: int,
    *,
    succeeds: bool = True,
    warm: bool = True,
    **settings: Any,
) -> None:
    """A whole job; `warm`: see `Torchrun`."""
    folder.mkdir(exist_ok=True)
    job = f"{function.__module__}:{function.__name__}"
    program = ["-m", "tests.distributed.program", job, str(folder), json.dumps(settings)]
    arguments = ["--standalone", f"--nproc_per_node={ranks}", *program]
    with Torchrun(arguments, folder / "log", warm=warm) as started:
        if succeeds:
            started.succeed(TIMEOUT_S)
        else:
            assert started.finish(TIMEOUT_S) != 0


def said(folder: Path, name: str, ranks: int) -> list[Any]:
    """What each rank said."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]


def newest(repository: Path) -> int:
    """The newest committed step; 0: none."""
    with contextlib.suppress(RepositoryNotFoundError):
        return max((one.step for one in open_repository(repository).state().commits), default=0)
    return 0


def main() -> None:
    """On each rank."""
    job, folder, settings = sys.argv[1:]
    module, _, name = job.partition(":")
    getattr(import_module(module), name)(Path(folder), **json.loads(settings))
    ckptcoord.shutdown()


if __name__ == "__main__":
    main()
