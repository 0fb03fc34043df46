"""What is saved in the background is the state at the call, whatever changes it and when.

`python -m tests.unit.dist.test_torn_state 2000 7`: 2,000 cases, seed 7. Imports no pytest.
"""

from __future__ import annotations

import logging
import random
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.dist import snapshot
from ckptcoord.errors import StateMovedError

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 300.0  # the codecs may have to be compiled first
COMPONENTS = ("model", "optimizer", "extra")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
    "adamw fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "adamw foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}
SHAPES = ((3,), (64, 64), (130, 257), (20_011,), (1, 33_000), (40, 40, 40), (300, 1000))
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)


Target: TypeAlias = tuple[str, torch.Tensor]


@dataclass(slots=True)
class Trainee:
    """A trainer's state, and who may have written what of it since the last call."""

    rng: random.Random
    model: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    other: torch.optim.Optimizer
    extra: dict[str, Any]
    wrong: set[str] = field(default_factory=set)
    added: int = 0

    def live(self) -> dict[str, Any]:
        """By component."""
        return {"model": self.model, "optimizer": self.optimizer, "extra": self.extra}

    def copy(self) -> dict[str, Any]:
        """What a save at this moment has to hold, by component."""
        model = {name: value.detach().clone() for name, value in self.model.items()}
        return {
            "model": model,
            "optimizer": deepcopy(self.optimizer.state_dict()),
            "extra": deepcopy(self.extra),
        }

    def draw(self) -> Target:
        """Some tensor that the optimizer owns, by its full name."""
        found = [(f"model.{name}", value) for name, value in self.model.items()]
        for index, state in self.optimizer.state_dict()["state"].items():
            found += [
                (f"optimizer.state.{index}.{name}", value)
                for name, value in state.items()
                if isinstance(value, torch.Tensor) and value.numel() > 1
            ]
        return self.rng.choice(found)

    def write(self, name: str) -> None:
        """Somebody writes to that tensor, who is no optimizer."""
        self.wrong.add(name)


def make(rng: random.Random) -> Trainee:
    """A random trainer."""
    kind = rng.choice(sorted(OPTIMIZERS))
    dtypes = DTYPES[:3] if kind == "adagrad" else DTYPES
    model = {
        f"layer{index}.weight": torch.nn.Parameter(
            torch.randn(rng.choice(SHAPES)).to(rng.choice(dtypes))
        )
        for index in range(rng.randint(1, 5))
    }
    params = list(model.values())
    extra = {
        "ema": {name: value.detach().clone() for name, value in model.items()},
        "order": np.arange(5000),
        "steps": 0,
        "scale": torch.tensor(2.0),
    }
    trainee = Trainee(rng, model, OPTIMIZERS[kind](params), torch.optim.SGD(params, lr=0.01), extra)
    step(trainee)
    return trainee


# --- what changes the state ----------------------------------------------------------------------


def step(trainee: Trainee) -> None:
    """As training does; no harm to any save."""
    for param in trainee.model.values():
        param.grad = torch.randn(param.shape).to(param.dtype)
    trainee.optimizer.step()
    trainee.extra["steps"] += 1


def step_another_optimizer(trainee: Trainee) -> None:
    """It is declared nowhere, and yet waits for the copies."""
    for param in trainee.model.values():
        param.grad = torch.ones_like(param)
    trainee.other.step()


def average(trainee: Trainee) -> None:
    """What no optimizer owns was copied at the call."""
    for name, value in trainee.extra["ema"].items():
        value.lerp_(trainee.model[name].detach(), 0.5)
    trainee.extra["order"][:] = trainee.extra["order"][::-1].copy()
    trainee.extra["scale"].mul_(2)


def reload_optimizer(trainee: Trainee) -> None:
    """Its state is new memory from then on."""
    trainee.optimizer.load_state_dict(deepcopy(trainee.optimizer.state_dict()))


def restructure(trainee: Trainee) -> None:
    """Another structure from the next call on."""
    trainee.added += 1
    name = f"added{trainee.added}"
    trainee.extra[name] = torch.randn(5000)
    trainee.extra.pop(f"added{trainee.added - 2}", None)
    param = torch.nn.Parameter(torch.randn(70, 70))
    trainee.model[name] = param
    trainee.optimizer.add_param_group({"params": [param]})


def swap(trainee: Trainee) -> None:
    """Other memory in the place of the old."""
    name, value = trainee.draw()
    trainee.write(name)
    other = value.detach().clone()
    other.view(-1)[5:9] = 1.5  # what else is in it is the same: the address tells
    value.data = other


def write_a_part(value: torch.Tensor, rng: random.Random) -> None:
    """In place, a few elements: the version counter tells."""
    flat = value.detach().view(-1)
    start = rng.randrange(flat.numel())
    with torch.no_grad():
        flat[start : start + rng.choice((1, 7, 2000))].add_(1)


def write_data(value: torch.Tensor, rng: random.Random) -> None:
    """All of it, past the version counter: the sample tells."""
    value.data.copy_(torch.rand(value.shape))


def write_numpy(value: torch.Tensor, rng: random.Random) -> None:
    """The same through numpy."""
    if value.dtype is torch.bfloat16:
        write_data(value, rng)
    else:
        value.detach().numpy()[...] = np.random.default_rng().random(value.shape)


def load_in_place(value: torch.Tensor, rng: random.Random) -> None:
    """As `load_state_dict` of a module."""
    with torch.no_grad():
        value.detach().copy_(torch.rand(value.shape))


BY_TRAINING = (step, step_another_optimizer, average, reload_optimizer, restructure, swap, swap)
BY_ANYBODY = (write_a_part, write_a_part, write_data, write_numpy, load_in_place)


# --- a case --------------------------------------------------------------------------------------


def run_case(folder: Path, rng: random.Random, tally: Counter[str]) -> None:
    """A few saves of a random trainer; each is committed as it was at its call, or says why not.

    Raises:
        AssertionError: it is neither.
    """
    torch.manual_seed(rng.randrange(1 << 30))
    trainee = make(rng)
    snapshot.PIECE_BYTES = rng.choice((32 << 10, 256 << 10, 8 << 20))
    mode = rng.choice((True, True, "auto", "auto", False))
    config = CoordinatorConfig(
        deferred=mode,
        queue_depth=rng.randint(1, 3),
        staging_bytes=rng.choice((None, None, None, 30_000_000, 1_000)),
        compression=rng.choice(("off", "off", "auto")),
        on_failure="warn",
        timeout_s=PATIENCE_S,
    )
    saved: dict[int, dict[str, Any]] = {}
    parts = [
        StateComponent(key, value, SharingPattern.GLOBAL) for key, value in trainee.live().items()
    ]
    if rng.random() < 0.3:  # such tensors have version counters of their own
        parts[0] = replace(
            parts[0],
            get_state=lambda: {name: value.data for name, value in trainee.model.items()},
        )
    with (
        CheckpointCoordinator(parts, output_dir=folder, config=config) as coordinator,
        ThreadPoolExecutor(1) as beside,
    ):
        held = Held(rng)
        coordinator._background._stager._probe = held
        for number in range(1, rng.randint(3, 6)):
            trainee.wrong.clear()
            want = trainee.copy()
            held.delay()
            pending = coordinator.save_checkpoint_async(step=number)
            change(trainee, beside)
            held.let_go()
            error = pending.committed.exception(PATIENCE_S)
            if error is None:
                saved[number] = want
                tally["changed meanwhile" if trainee.wrong else "the state at the call"] += 1
            else:
                assert isinstance(error, StateMovedError), error
                assert mode is not False, error
                assert set(error.tensors) <= trainee.wrong, (error, trainee.wrong)
                tally["the error"] += 1
            step(trainee)
    for number, want in saved.items():
        found = loaded(folder, number, want)
        for key in COMPONENTS:
            differing = list(differences(found[key], want[key], key))
            assert not differing, f"step {number}, deferred={mode}: {differing}"


class Held:
    """A probe of the stager that keeps its thread for a while before one of the next copies."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._delay_s, self._copies = 0.0, 0
        self._gone = threading.Event()

    def delay(self) -> None:
        """From here on."""
        self._gone.clear()
        self._copies = self._rng.choice((0, 0, 1, 3, 7))
        self._delay_s = self._rng.choice((0.0, 0.001, 0.005, 0.02))

    def let_go(self) -> None:
        """As fast as it goes."""
        self._gone.set()

    def __call__(self, _: str) -> None:
        if threading.current_thread().name == "ckptcoord-staging":
            if self._copies == 0:
                self._gone.wait(self._delay_s)
            self._copies -= 1


def change(trainee: Trainee, beside: ThreadPoolExecutor) -> None:
    """Some changes at random times, by the training thread and by another one."""
    rng, others = trainee.rng, []
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        time.sleep(rng.choice((0.0, 0.0, 0.0005, 0.002)))
        if rng.random() < 0.5:
            rng.choice(BY_TRAINING)(trainee)
            continue
        (name, value), what = trainee.draw(), rng.choice(BY_ANYBODY)
        trainee.write(name)
        if rng.random() < 0.5:
            what(value, rng)
        else:
            pause_s = rng.choice((0.0, 0.0005, 0.002))
            others.append(beside.submit(later, pause_s, what, value, random.Random(rng.random())))
    for other in others:
        other.result()


def later(
    pause_s: float,
    what: Callable[[torch.Tensor, random.Random], None],
    value: torch.Tensor,
    rng: random.Random,
) -> None:
    """Write to a tensor in a while."""
    time.sleep(pause_s)
    what(value, rng)


def loaded(folder: Path, number: int, like: dict[str, Any]) -> dict[str, Any]:
    """Load a step into a state of this structure."""
    found: dict[str, Any] = {}
    zeros = {key: zeroed(like[key]) for key in COMPONENTS}
    parts = [
        StateComponent(
            key,
            None,
            SharingPattern.GLOBAL,
            get_state=lambda key=key: zeros[key],
            set_state=lambda value, key=key: found.__setitem__(key, value),
        )
        for key in COMPONENTS
    ]
    with CheckpointCoordinator(parts, output_dir=folder) as coordinator:
        coordinator.load_checkpoint(f"main@{number}")
    return found


def zeroed(value: Any) -> Any:
    """The same tree, its tensors and arrays full of zeros."""
    if isinstance(value, dict):
        return {key: zeroed(one) for key, one in value.items()}
    if isinstance(value, list):
        return [zeroed(one) for one in value]
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return np.zeros_like(value) if isinstance(value, np.ndarray) else value


def differences(found: Any, want: Any, path: str) -> Any:
    """Where two trees differ, bit for bit."""
    if isinstance(want, dict | list):
        keys = want.keys() if isinstance(want, dict) else range(len(want))
        if type(found) is not type(want) or len(found) != len(want):
            yield path
            return
        for key in keys:
            yield from differences(found[key], want[key], f"{path}.{key}")
    elif bits(found) != bits(want):
        yield path


def bits(value: Any) -> Any:
    """What equal values, and only these, have in common."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), data
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return value


def sweep(count: int, rng: random.Random) -> Counter[str]:
    """So many cases; what came of their saves.

    Raises:
        AssertionError: names case and tensors.
    """
    tally: Counter[str] = Counter()
    threads, piece_bytes = torch.get_num_threads(), snapshot.PIECE_BYTES
    torch.set_num_threads(1)  # writes go from the first element to the last, as the guards need
    memory = Path("/dev/shm")
    home = memory if memory.is_dir() else None
    try:
        for number in range(count):
            seed = rng.randrange(1 << 62)
            with tempfile.TemporaryDirectory(dir=home) as folder:
                try:
                    run_case(Path(folder), random.Random(seed), tally)
                except Exception as error:
                    error.add_note(f"case {number}, seed {seed}")
                    raise
    finally:
        torch.set_num_threads(threads)
        snapshot.PIECE_BYTES = piece_bytes
    return tally


def test_what_is_committed_is_the_state_at_the_call() -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 (to run it again)
    tally = sweep(100, random.Random(seed))
    assert tally["the error"] > 5
    assert tally["changed meanwhile"] > 5
    assert tally["the state at the call"] > 5


if __name__ == "__main__":
    logging.getLogger("ckptcoord").setLevel(logging.CRITICAL)  # it is told of failures by hundreds
    tally = sweep(int(sys.argv[1]), random.Random(int(sys.argv[2])))
    found = ", ".join(f"{what}: {times}" for what, times in sorted(tally.items()))
    print(f"{sys.argv[1]} cases; of their saves, {found}; all as at the call")  # noqa: T201
