"""The sides of stall.py: a GPT with AdamW in training, and the ways to save it meanwhile.

A side's `save` is called by the training thread. What a step has to wait for is in `before_step`,
or in a hook that the side itself has on the optimizers. All that is saved is durable when a side
says that it has finished: files and folders synced.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol, Self

import torch
import torch.distributed as dist
from blake3 import blake3
from sides import Job, bytes_of, sync
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ckptcoord import PendingSave
    from ckptcoord.dist.report import SaveReport

LAYERS, HEADS, VOCABULARY = 12, 4, 256
TOKENS = 64  # of a step on the CPU, of all ranks together
NUDGED = 16  # a step of `Nudge` changes every 16th tensor


# --- what is trained ------------------------------------------------------------------------------


class Gpt(nn.Module):
    """Bytes in, logits out; `parameters` is about how many it has."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        width = max(16, round((parameters / (12 * LAYERS)) ** 0.5 / 16) * 16)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, HEADS, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, time, vocabulary] for tokens [batch, time]."""
        hidden = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits: torch.Tensor = self.head(hidden)
        return logits


class Nudge(torch.optim.Optimizer):
    """Adds a little to each of a few tensors: a step that takes the host next to no time."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__(list(tensors), {"by": 1e-4})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change them all."""
        assert closure is None
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor.add_(group["by"])


class Training:
    """A model and AdamW with both moments: a third of `size_bytes` each; the same on every rank."""

    def __init__(self, size_bytes: int, ranks: int) -> None:
        torch.manual_seed(1)
        self.model = Gpt(size_bytes // 12)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._batch = torch.randint(VOCABULARY, (1, max(2, TOKENS // ranks)))
        self.compute()
        self.nudge = Nudge(self.tensors()[::NUDGED])

    def tensors(self) -> list[torch.Tensor]:
        """Parameters and moments: all of the state that is more than a number."""
        moments = [
            state[name]
            for state in self.optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ]
        return [*(parameter.detach() for parameter in self.model.parameters()), *moments]

    def state(self) -> dict[str, object]:
        """As any of the peers is given it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def digests(self) -> list[bytes]:
        """BLAKE3 of every tensor."""
        return [blake3(bytes_of(one), max_threads=blake3.AUTO).digest() for one in self.tensors()]

    def compute(self) -> None:
        """A step on the CPU: forward, backward, AdamW."""
        logits = self.model(self._batch)[:, :-1].flatten(0, 1)
        nn.functional.cross_entropy(logits, self._batch[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def free(self, seconds: float) -> None:
        """A step that leaves the host free, as an accelerator's does: it waits, then updates."""
        time.sleep(seconds)
        self.nudge.step()


class HookWatch:
    """How long the hooks before a step take: those that were registered after it was made.

    Attributes:
        seconds: in all.
        side: its `before_step` is called, and counts.
    """

    def __init__(self, training: Training) -> None:
        self.seconds = 0.0
        self.side: Side | None = None
        self._began_s = 0.0
        register_optimizer_step_pre_hook(self._enter)  # the hooks of all come first, in order
        for optimizer in (training.optimizer, training.nudge):
            optimizer.register_step_pre_hook(self._leave)

    def _enter(self, *_: object) -> None:
        self._began_s = time.perf_counter()

    def _leave(self, *_: object) -> None:
        if self.side is not None:
            self.side.before_step()
        self.seconds += time.perf_counter() - self._began_s


class Copying:
    """The measure: a rank's share of the tensors, copied to where they were copied before."""

    def __init__(self, tensors: Sequence[torch.Tensor], job: Job) -> None:
        self._from: list[torch.Tensor] = []
        loads = [0] * job.size
        for tensor in sorted(tensors, key=lambda one: -one.nbytes):
            rank = loads.index(min(loads))
            loads[rank] += tensor.nbytes
            if rank == job.rank:
                self._from.append(tensor)
        self._to = [torch.empty_like(one) for one in self._from]
        self.run()

    def run(self) -> float:
        """Seconds that one takes."""
        began_s = time.perf_counter()
        for source, target in zip(self._from, self._to, strict=True):
            target.copy_(source)
        return time.perf_counter() - began_s


# --- the sides ------------------------------------------------------------------------------------


class Side(Protocol):
    """One way to save while training goes on.

    Attributes:
        waited_s: how long `save` waited for earlier saves, in all.
        durable_s: of each save, from the call until it was durable.
        reported_s: the stalls of which the side itself tells, in all; None where it tells none.
    """

    waited_s: float
    durable_s: list[float]
    reported_s: float | None

    def reset(self) -> None:
        """Forget what was counted."""
        ...

    def save(self) -> None:
        """Begin to save the state as it is."""
        ...

    def before_step(self) -> None:
        """The state is about to change."""
        ...

    def unfinished(self) -> bool:
        """Whether anything saved is not durable yet."""
        ...

    def drain(self) -> None:
        """Wait until it is. All ranks."""
        ...

    def clean(self) -> None:
        """Delete what need not be kept. By rank 0, when all is durable."""
        ...


class _Plain:
    """What the peers have in common: each save goes to a new folder."""

    def __init__(self, training: Training, job: Job, name: str) -> None:
        self.waited_s = 0.0
        self.durable_s: list[float] = []
        self.reported_s: float | None = None
        self._training = training
        self._job = job
        self._base = job.folder / name
        self._numbers = itertools.count()

    def _next(self) -> Path:
        folder = self._base / str(next(self._numbers))
        folder.mkdir(exist_ok=True, parents=True)
        return folder

    def reset(self) -> None:
        """Count anew."""
        self.waited_s, self.durable_s = 0.0, []

    def before_step(self) -> None:
        """Nothing is read from the live state any more."""

    def unfinished(self) -> bool:
        """Nothing is."""
        return False

    def drain(self) -> None:
        """Nothing to wait for."""

    def clean(self) -> None:
        """All of it."""
        shutil.rmtree(self._base, ignore_errors=True)
        sync(self._base.parent)


class TorchSide(_Plain):
    """torch.save and fsync by rank 0, before training goes on."""

    def save(self) -> None:
        """To its end."""
        if self._job.rank == 0:
            began_s = time.perf_counter()
            folder = self._next()
            torch.save(self._training.state(), folder / "state.pt")
            for path in (folder / "state.pt", folder, self._base):
                sync(path)
            self.durable_s.append(time.perf_counter() - began_s)


class CopySide(_Plain):
    """The measure once more, where a save would be: what a copy costs the loop it is in."""

    def __init__(self, training: Training, job: Job, name: str, copying: Copying) -> None:
        super().__init__(training, job, name)
        self._copying = copying

    def save(self) -> None:
        """A copy, and nothing else."""
        self._copying.run()


class DcpSide(_Plain):
    """DCP's async_save with a stager that keeps its buffers.

    There is one set of buffers, which nobody keeps from being written again: so the save before
    has to be finished.

    Args:
        training: what to save.
        job: where.
        name: of the side.
        kind: whether a thread or a process writes.
        stager: with `use_async_staging`.
        overlapped: copies are made while training goes on, and the next step waits for them.
        group: the ranks.
    """

    def __init__(  # noqa: PLR0913 (a side of a benchmark)
        self,
        training: Training,
        job: Job,
        name: str,
        *,
        kind: AsyncCheckpointerType,
        stager: DefaultStager,
        overlapped: bool,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__(training, job, name)
        self._kind, self._stager, self._group = kind, stager, group
        self._overlapped = overlapped
        self._staged: Future[None] | None = None
        self._durable: Future[None] = Future()
        self._durable.set_result(None)

    def save(self) -> None:
        """Wait for the one before, copy or begin to copy, and let it be written."""
        began_s = time.perf_counter()
        self._durable.result()
        self.waited_s += time.perf_counter() - began_s
        folder = self._next()
        response = async_save(
            self._training.state(),
            storage_writer=FileSystemWriter(
                folder, thread_count=self._job.threads, sync_files=True
            ),
            process_group=self._group,
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        assert not isinstance(response, Future)
        self._staged = response.staging_completion
        self._durable = durable = Future()

        def finish(uploaded: Future[None]) -> None:
            try:
                uploaded.result()
                for path in (folder, self._base):
                    sync(path)
            except BaseException as error:  # noqa: BLE001 (raised by whoever waits for it)
                durable.set_exception(error)
                return
            self.durable_s.append(time.perf_counter() - began_s)
            durable.set_result(None)

        response.upload_completion.add_done_callback(finish)
        if not self._overlapped:
            self.before_step()

    def before_step(self) -> None:
        """Its copies must have been made."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def unfinished(self) -> bool:
        """Whether the last one is not durable."""
        return not self._durable.done()

    def drain(self) -> None:
        """Wait for the last one."""
        self._durable.result()


class CkptcoordSide:
    """save_checkpoint_async: replicated components, digests on every byte, one commit a save.

    Args:
        saver: what saves.
        deferred: copy while training goes on.
    """

    def __init__(self, saver: Saver, *, deferred: bool) -> None:
        self._saver = saver
        self._deferred = deferred
        self._pending: list[PendingSave] = []

    @property
    def waited_s(self) -> float:
        """As the reports say."""
        return sum(report.waited_s for report in self._saver.reports)

    @property
    def durable_s(self) -> list[float]:
        """As the reports say."""
        return [report.total_s for report in self._saver.reports]

    @property
    def reported_s(self) -> float:
        """As the reports say."""
        return sum(report.stall_s for report in self._saver.reports)

    def reset(self) -> None:
        """Count anew."""
        self._saver.reports.clear()

    def save(self) -> None:
        """The next step."""
        self._pending = [one for one in self._pending if not one.done()]
        self._pending.append(self._saver.save(deferred=self._deferred))

    def before_step(self) -> None:
        """The coordinator has a hook of its own."""

    def unfinished(self) -> bool:
        """Whether a commit is to come."""
        return not all(one.done() for one in self._pending)

    def drain(self) -> None:
        """Wait for all commits."""
        self._saver.coordinator.wait()

    def clean(self) -> None:
        """All but the last commit."""
        self._saver.clean()

    def load(self) -> None:
        """The last commit, into the live state."""
        self._saver.coordinator.load_checkpoint()


class Saver:
    """A coordinator that both of ckptcoord's sides use, so that they share its buffers.

    Attributes:
        reports: of the saves since they were last cleared.
    """

    def __init__(
        self, training: Training, job: Job, *, compression: str, io_budget: float | None
    ) -> None:
        replicated = SharingPattern.REPLICATED
        self._folder = job.folder / "ckptcoord"
        self._retention = compression != "off"  # bases are not to be deleted by hand
        self.reports: list[SaveReport] = []
        self.coordinator = CheckpointCoordinator(
            [
                StateComponent("model", training.model, replicated),
                StateComponent("optimizer", training.optimizer, replicated),
            ],
            output_dir=self._folder,
            config=CoordinatorConfig(
                io_threads=job.threads,
                compression=compression,
                keep_last=1 if self._retention else None,
                io_budget=io_budget,
                on_saved=self.reports.append,
            ),
        )
        self._steps = itertools.count(1)

    def save(self, *, deferred: bool) -> PendingSave:
        """The next step."""
        return self.coordinator.save_checkpoint_async(step=next(self._steps), deferred=deferred)

    def clean(self) -> None:
        """Delete all checkpoints but the last; of deltas, the saves themselves do that."""
        if self._retention:
            return
        last = self.coordinator.resolve_checkpoint_path()
        for folder in self._folder.glob("checkpoint-*"):
            if str(folder) != last:
                shutil.rmtree(folder)
        sync(self._folder)


OURS = {"ckptcoord deferred": True, "ckptcoord eager": False}
DCP = {
    "dcp thread": (AsyncCheckpointerType.THREAD, False),
    "dcp process": (AsyncCheckpointerType.PROCESS, False),
    "dcp thread, overlapped": (AsyncCheckpointerType.THREAD, True),
    "dcp process, overlapped": (AsyncCheckpointerType.PROCESS, True),
}
BLOCKING = "torch.save"


class Sides:
    """The sides of one rank by name; a context manager that ends what runs for them."""

    def __init__(
        self, training: Training, job: Job, *, compression: str, io_budget: float | None
    ) -> None:
        self.by_name: dict[str, Side] = {}
        self._ending = contextlib.ExitStack()
        self.saver = Saver(training, job, compression=compression, io_budget=io_budget)
        self._ending.callback(self.saver.coordinator.close)
        for name, deferred in OURS.items():
            self.by_name[name] = CkptcoordSide(self.saver, deferred=deferred)
        group = dist.new_group()
        stagers: dict[AsyncCheckpointerType, DefaultStager] = {}
        for name, (kind, overlapped) in DCP.items():
            if kind not in stagers:
                stagers[kind] = _stager(shared=kind is AsyncCheckpointerType.PROCESS)
                self._ending.callback(stagers[kind].close)
            self.by_name[name] = DcpSide(
                training,
                job,
                name.replace(", ", "-").replace(" ", "-"),
                kind=kind,
                stager=stagers[kind],
                overlapped=overlapped,
                group=group,
            )
        self.by_name[BLOCKING] = TorchSide(training, job, BLOCKING)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()


def _stager(*, shared: bool) -> DefaultStager:
    """Page-locked memory, and copies that the device makes by itself, need an accelerator."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=shared,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
    )
