"""What one rank of a test's world does: it holds state, obeys the test, and is struck on command.

Runs in processes that `launch.World` starts; imports no pytest.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import os
import resource
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tests.distributed import trainee

import ckptcoord
from ckptcoord import CheckpointCoordinator, CkptError, CoordinatorConfig
from ckptcoord.core.sharing import SharingPattern, StateComponent, ValidationLevel
from ckptcoord.dist.deferral import LEAST_DEFERRED_BYTES
from ckptcoord.store.files import LocalWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from ckptcoord import PendingSave

_PR_SET_PDEATHSIG = 1
RESULT_TIMEOUT_S = 60.0
PAIRS, PAIR = "pair", 2
# Where a strike can fall: the steps of docs/protocol.md, and the middle of a file's first write.
IN_A_WRITE = "in a write"
OF_ALL = ("capture", "open", "write", IN_A_WRITE, "written", "vote")
OF_RANK_0 = ("manifest", "rename", "renamed", "append", "appended")
STEPS = (*OF_ALL, *OF_RANK_0, "decided")


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A fault at a step of the next save.

    Attributes:
        step: one of STEPS.
        ranks: which of them it hits.
        how: `kill` these; `kill all` as soon as one of these is there; `stop`; `sleep`.
        seconds: of sleep.
    """

    step: str
    ranks: tuple[int, ...]
    how: str = "kill"
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an order led to on one rank.

    Attributes:
        value: what was returned.
        error: `CkptError.to_document()` of what was raised.
        bug: the traceback of an exception that is no CkptError.
        steps: the steps of the protocol that it reached.
        waited_s: since it reached the last of them.
    """

    value: Any = None
    error: dict[str, Any] | None = None
    bug: str = ""
    steps: tuple[str, ...] = ()
    waited_s: float = 0.0

    @property
    def kind(self) -> str:
        """The error's class, or nothing."""
        return str(self.error["type"]) if self.error else ""

    @property
    def facts(self) -> dict[str, Any]:
        """The error's."""
        return self.error["facts"] if self.error else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is: `shared` holds the store's port and then every rank's pid."""

    rank: int
    size: int
    shared: Any
    store_apart: bool
    log_path: str


def host(place: Place) -> None:
    """Run the c10d store's server and nothing else."""
    _quiet(place)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place.shared[0] = store.port
    while True:
        signal.pause()


def serve(place: Place, channel: Connection) -> None:
    """Join the world, then obey until told to stop."""
    _quiet(place)
    join(place)
    rank = Rank(place)
    channel.send(Outcome())
    while (order := channel.recv()) is not None:
        name, arguments = order
        channel.send(rank.obey(name, arguments))
    ckptcoord.shutdown()


def join(place: Place) -> None:
    """A gloo process group over a TCPStore, on make-believe nodes of two ranks."""
    torch.set_num_threads(1)
    os.environ.update(  # noqa: TID251 (as torchrun does)
        GLOO_SOCKET_IFNAME="lo",
        MASTER_ADDR="127.0.0.1",
        GROUP_RANK=str(place.rank // PAIR),
        LOCAL_RANK=str(place.rank % PAIR),
        LOCAL_WORLD_SIZE=str(min(PAIR, place.size)),
        TORCHELASTIC_USE_AGENT_STORE=str(place.store_apart),
    )
    place.shared[1 + place.rank] = os.getpid()
    hosting = place.rank == 0 and not place.store_apart
    while not hosting and not place.shared[0]:
        time.sleep(0.005)
    store = dist.TCPStore(
        "127.0.0.1",
        place.shared[0],
        is_master=hosting,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )
    place.shared[0] = store.port
    os.environ["MASTER_PORT"] = str(store.port)  # noqa: TID251 (as torchrun does)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size)


class Rank:
    """One rank: its state, its coordinator, and the strike that waits for it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.coordinator: CheckpointCoordinator | None = None
        self.strike: Strike | None = None
        self.steps: list[str] = []
        self.reached_s = 0.0
        self.state = make_state(place.rank, 0)
        self.optimizer = Filler(self.state)
        self.pending: dict[int, PendingSave] = {}
        write_at = LocalWriter.write_at

        def torn(writer: LocalWriter, offset: int, data: Any) -> None:
            view = memoryview(data).cast("B")
            write_at(writer, offset, view[: len(view) // 2])
            self.be_struck(IN_A_WRITE)
            write_at(writer, offset, data)

        LocalWriter.write_at = torn  # type: ignore[method-assign]

    def obey(self, name: str, arguments: dict[str, Any]) -> Outcome:
        """Run one order; whatever it raises is an outcome."""
        self.steps, self.reached_s = [], time.monotonic()
        value, error, bug = None, None, ""
        try:
            value = getattr(self, name)(**arguments)
        except CkptError as raised:
            error = raised.to_document()
        except Exception:  # noqa: BLE001 (the test fails on any bug, with this text)
            bug = traceback.format_exc()
        if name != "save_later":  # whose strike falls later, too
            self.strike = None
        return Outcome(
            value=value,
            error=error,
            bug=bug,
            steps=tuple(self.steps),
            waited_s=time.monotonic() - self.reached_s,
        )

    # --- orders ------------------------------------------------------------------------------

    def open(
        self, output_dir: str, timeout_s: float = 20.0, uid: int | None = None, **more: Any
    ) -> None:
        """A new coordinator: another incarnation of the job."""
        if uid is not None:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        if self.coordinator is not None:
            self.coordinator.close()
        first = self.place.rank // PAIR * PAIR
        self.coordinator = CheckpointCoordinator(
            components(self.state, self.optimizer),
            {PAIRS: [*range(first, min(first + PAIR, self.place.size))]},
            output_dir=output_dir,
            config=CoordinatorConfig(timeout_s=timeout_s, probe=self.probe, **more),
        )

    def hurry(self, timeout_s: float) -> None:
        """Shorten the deadline of every wait from here on."""
        session = self._coordinator()._session
        session.config = dataclasses.replace(session.config, timeout_s=timeout_s)

    def save(self, step: int, strike: Strike | None = None, **more: Any) -> str:
        """Save a state that is full of the step's number."""
        fill(self.state, self.place.rank, step)
        self.strike = strike
        return Path(self._coordinator().save_checkpoint(step=step, **more)).name

    def nap(self, seconds: float) -> None:
        """Be behind the others."""
        time.sleep(seconds)

    def save_later(self, steps: Sequence[int], strike: Strike | None = None, **more: Any) -> None:
        """Save states of these steps in the background, and train on after each."""
        self.strike = strike
        for step in steps:
            self.train_to(step)
            self.pending[step] = self._coordinator().save_checkpoint_async(step=step, **more)
            self.train_to(-2)  # what comes after the call is in no checkpoint

    def train_to(self, step: int) -> None:
        """What the optimizer owns changes in its step, as in training; then all else."""
        self.optimizer.step_to(step, self.place.rank)
        fill(self.state, self.place.rank, step)

    def result(self, step: int) -> str:
        """What became of a save in the background."""
        return Path(self.pending[step].result(RESULT_TIMEOUT_S)).name

    def wait(self) -> None:
        """Wait for all saves in the background."""
        self._coordinator().wait()

    def close(self) -> None:
        """Close the coordinator."""
        self._coordinator().close()

    def load(self, ref: str | None = None) -> tuple[int, dict[str, list[float]]]:
        """Load over a state of -1; returns the step it claims to be, and what is in it."""
        fill(self.state, self.place.rank, -1)
        report = self._coordinator().load_checkpoint(ref)
        return report.step, contents(self.state)

    def load_and_be_struck(self, step: str) -> None:
        """Load over a state of -1 and be stopped at a step of that."""
        self.strike = Strike(step=step, ranks=(self.place.rank,), how="stop") if step else None
        self.load()

    def look(self) -> dict[str, list[float]]:
        """What the live state holds."""
        return contents(self.state)

    def grow(self, numbers: int) -> None:
        """Let this rank's own component need more room."""
        self.state["rng"]["x"] = torch.zeros(numbers, dtype=torch.float64)

    def limit_files(self, spare: int | None) -> None:
        """Leave so many file descriptors; None for the usual number."""
        soft, used = 1024, {int(one.name) for one in Path("/proc/self/fd").iterdir()}
        if spare is not None:  # the limit is on a descriptor's number
            soft = [number for number in range(soft) if number not in used][spare]
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, 4096))

    def leave(self) -> None:
        """End as a trainer's last line does."""
        ckptcoord.shutdown()

    def train(self, steps: int) -> float:
        """A real DDP model over gloo, still alive when the world ends."""
        torch.manual_seed(self.place.rank)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
        optimizer = torch.optim.AdamW(model.parameters())
        loss = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            optimizer.step()
        self.model, self.optimizer = model, optimizer
        return float(loss)

    def train_in_background(self, folder: str) -> int:
        """A real training that saves every step, as `trainee` has it; the step it began at."""
        return trainee.train(self.place.rank, Path(folder))

    def check_records(self, folder: str, steps: list[int]) -> int:
        """Load its checkpoints and compare them with the state at their calls."""
        return trainee.check(self.place.rank, Path(folder), steps)

    # --- strikes -----------------------------------------------------------------------------

    def probe(self, step: str) -> None:
        """The coordinator has reached a step."""
        self.steps.append(step)
        self.be_struck(step)
        self.reached_s = time.monotonic()

    def be_struck(self, step: str) -> None:
        """Suffer what was ordered for this step, once."""
        strike = self.strike
        if strike is None or strike.step != step or self.place.rank not in strike.ranks:
            return
        self.strike = None
        if strike.how == "sleep":
            time.sleep(strike.seconds)
        elif strike.how == "stop":
            # To this thread: one sent to the process may be another's, and this one goes on
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        else:
            for pid in self.place.shared[1:] if strike.how == "kill all" else ():
                if pid != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def _coordinator(self) -> CheckpointCoordinator:
        assert self.coordinator is not None, "not opened"
        return self.coordinator


# --- a state that tells which step it is of -----------------------------------------------------

# Component to pattern, and which copy of it a rank holds.
_HELD: dict[str, tuple[SharingPattern, Callable[[int], int]]] = {
    "progress": (SharingPattern.GLOBAL, lambda rank: 0),
    "model": (SharingPattern.REPLICATED, lambda rank: 0),
    "optimizer": (SharingPattern.REPLICATED, lambda rank: 0),
    "rng": (SharingPattern.PER_RANK, lambda rank: 1 + rank),
    "stage": (SharingPattern.PER_GROUP, lambda rank: 1 + rank // PAIR),
    "cache": (SharingPattern.PER_NODE, lambda rank: 1 + rank // PAIR),
}
_TENSORS = {"model": [f"layer{i}" for i in range(8)], "optimizer": ["layer0", "layer1"]}
_LARGE = ("layer0", "layer1")  # so large that their copies may be deferred


def make_state(rank: int, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """By component: tensors of one repeated number, which says step and copy."""
    state = {
        key: {
            name: torch.zeros(_numbers(name), dtype=torch.float64)
            for name in _TENSORS.get(key, ["x"])
        }
        for key in _HELD
    }
    fill(state, rank, step)
    return state


def _numbers(name: str) -> int:
    return LEAST_DEFERRED_BYTES // 8 if name in _LARGE else 64


def fill(state: dict[str, dict[str, torch.Tensor]], rank: int, step: int) -> None:
    """Make it the state of a step."""
    for key, held in state.items():
        for tensor in held.values():
            tensor.fill_(step * 1000 + _HELD[key][1](rank))


def contents(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, list[float]]:
    """The distinct numbers in each component."""
    return {
        key: sorted({float(one) for tensor in held.values() for one in tensor.unique().tolist()})
        for key, held in state.items()
    }


def expected(rank: int, step: int) -> dict[str, list[float]]:
    """The contents of a whole state of a step."""
    return {key: [float(step * 1000 + copy(rank))] for key, (_, copy) in _HELD.items()}


class Filler(torch.optim.Optimizer):
    """An optimizer whose step makes what it owns the state of a step."""

    def __init__(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        super().__init__(list(state["model"].values()), {})
        for param, (name, value) in zip(
            state["model"].values(), state["optimizer"].items(), strict=False
        ):
            self.state[param][name] = value
        self._held = state
        self._to = (0, 0)

    def step_to(self, step: int, rank: int) -> None:
        """Step."""
        self._to = (step, rank)
        self.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Fill parameters and moments."""
        owned = {key: self._held[key] for key in ("model", "optimizer")}
        fill(owned, self._to[1], self._to[0])

    def state_dict(self) -> dict[str, Any]:
        """The moments."""
        return dict(self._held["optimizer"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """In place."""
        for name, value in state_dict.items():
            self._held["optimizer"][name].copy_(value)


def components(
    state: dict[str, dict[str, torch.Tensor]], optimizer: torch.optim.Optimizer
) -> list[StateComponent]:
    """One of each pattern."""
    return [
        StateComponent(
            key,
            optimizer if key == "optimizer" else state[key],
            pattern,
            process_group_name=PAIRS if pattern is SharingPattern.PER_GROUP else None,
            validate_replication=pattern is SharingPattern.REPLICATED,
            validation_level=ValidationLevel.TENSOR,
        )
        for key, (pattern, _) in _HELD.items()
    ]


def _quiet(place: Place) -> None:
    """Into a file: what torch's C++ says of broken connections, and a rank's last words."""
    log = os.open(place.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # Whatever ends the test, this process does not outlive it, be it stopped or without orders.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
