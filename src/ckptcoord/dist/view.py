"""A repository to look into from Python: its checkpoints, their tensors, and what differs.

Nothing here changes a repository, and torch is imported when a tensor is loaded, not before.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Self

from ckptcoord.core.box import Box
from ckptcoord.core.refs import CheckpointId, parse_ref
from ckptcoord.dist.contents import Contents
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    CorruptError,
    InvalidNameError,
    RefNotFoundError,
)
from ckptcoord.plan.commit import branches
from ckptcoord.plan.lookup import head, latest, nearest
from ckptcoord.repo import repository as base

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.manifest import CheckpointManifest
    from ckptcoord.dist.shardset import ShardSet
    from ckptcoord.plan.commit import LogState
    from ckptcoord.repo.changes import CheckpointDiff
    from ckptcoord.repo.shards import TensorSpec

_DIFF_THREADS = 2


def open_repository(path: str | os.PathLike[str]) -> RepositoryView:
    """Open the repository in a folder for reading.

        run = ckptcoord.open_repository("runs/gpt")
        run["main@100"].load("model.embed.weight")

    Raises:
        RepositoryNotFoundError: the folder is none.
        FormatVersionError: a newer ckptcoord wrote it.
    """
    return RepositoryView(base.open_repository(path))


class RepositoryView(base.Repository):
    """The checkpoints of one run, in the order in which they were committed.

    `run["main@100"]` takes any ref; `for checkpoint in run`, `len(run)`, `"main@100" in run`.
    """

    def __init__(self, repository: base.Repository) -> None:
        vars(self).update(vars(repository))  # one and the same log: what it has read stays read

    def __getitem__(self, ref: str | CheckpointId) -> Checkpoint:
        """The checkpoint that a ref names.

        Raises:
            RefNotFoundError: there is none; the nearest are named.
            InvalidNameError: the text is no ref.
        """
        text = ref.ref if isinstance(ref, CheckpointId) else ref
        return Checkpoint(self, self.resolve(parse_ref(text)))

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(_ordered(self, self.state()))

    def __len__(self) -> int:
        return len(self.state().commits)

    def __bool__(self) -> bool:
        """It is there, also without a checkpoint yet."""
        return True

    def __contains__(self, ref: object) -> bool:
        if isinstance(ref, Checkpoint):
            return ref in list(self)
        if not isinstance(ref, str | CheckpointId):
            return False
        try:
            self[ref]
        except (InvalidNameError, RefNotFoundError):
            return False
        return True

    @property
    def branches(self) -> Mapping[str, Branch]:
        """By name."""
        state = self.state()
        return {
            str(name): Branch(name=str(name), head=_at(self, head(state, name)), checkpoints=own)
            for name in branches(state)
            for own in [tuple(c for c in _ordered(self, state) if c.branch == str(name))]
        }

    @property
    def tags(self) -> Mapping[str, Checkpoint]:
        """What each names."""
        state = self.state()
        return {
            str(tag): Checkpoint(self, state.commits[target])
            for tag, target in sorted(state.tags.items())
            if target in state.commits
        }

    @property
    def latest(self) -> Checkpoint | None:
        """The newest of all; None where there is none yet."""
        return _at(self, latest(self.state()))

    def diff(
        self,
        old: str | Checkpoint,
        new: str | Checkpoint,
        *,
        component: str | None = None,
        threads: int = _DIFF_THREADS,
    ) -> CheckpointDiff:
        """What differs between two checkpoints, as `ckptcoord diff` has it.

        Tensors that are not equal by digest are read from end to end, a few MiB at a time.

        Args:
            old: what is compared with: a ref, or a checkpoint of this repository.
            new: what is compared.
            component: only this one.
            threads: that read, decode and compare.

        Raises:
            RefNotFoundError: there is no such checkpoint; the nearest are named.
            ConfigError: there is no such component, or a checkpoint is of another repository.
            CorruptError: something that is read is not what was written.
        """
        from ckptcoord.dist.comparing import compare_checkpoints  # late: numpy

        sides = [self._own(one).contents for one in (old, new)]
        return compare_checkpoints(*sides, component=component, threads=threads)

    def _own(self, one: str | Checkpoint) -> Checkpoint:
        if not isinstance(one, Checkpoint):
            return self[one]
        if one.repository.url != self.url:
            raise ConfigError(field="checkpoint", why=f"{one.ref} is of {one.repository.url}")
        return one

    def __repr__(self) -> str:
        state = self.state()
        newest = latest(state)
        where = f", latest {newest.checkpoint_id.ref}" if newest else ""
        count = f"{len(state.commits)} checkpoint{'' if len(state.commits) == 1 else 's'}"
        return f"<Repository {self.url}: {count}{where}>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        from ckptcoord.repo.html import repository_html  # late: only notebooks need it

        return repository_html(self.state(), self.url)


class Branch:
    """A branch.

    Attributes:
        name: its name.
        head: where it stands: at its newest checkpoint, or before its first where it was forked.
        checkpoints: those made on it, in the order in which they were committed.
    """

    def __init__(
        self, *, name: str, head: Checkpoint | None, checkpoints: tuple[Checkpoint, ...]
    ) -> None:
        self.name = name
        self.head = head
        self.checkpoints = checkpoints

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints)

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __getitem__(self, step: int) -> Checkpoint:
        """That of a step.

        Raises:
            RefNotFoundError: there is none; the nearest are named.
        """
        for one in self.checkpoints:
            if one.step == step:
                return one
        near = sorted(self.checkpoints, key=lambda one: (abs(one.step - step), one.step))[:3]
        raise RefNotFoundError(ref=f"{self.name}@{step}", nearest=tuple(one.ref for one in near))

    def __repr__(self) -> str:
        at = f" at {self.head.ref}" if self.head else ""
        return f"<Branch {self.name}{at}: {len(self)} of its own>"


class Checkpoint:
    """One checkpoint of a repository. Documents and headers are read when first asked for.

    As a context manager it keeps open what it reads from until the block ends, which spares each
    `load` in it the headers of the files:

        with run["main@100"] as checkpoint:
            norms = {name: checkpoint.load(name).norm() for name in checkpoint.tensors}

    Attributes:
        repository: which it is of.
        commit: what the log says of it.
        contents: what is in it.
    """

    def __init__(self, repository: RepositoryView, commit: Commit) -> None:
        self.repository = repository
        self.commit = commit
        self.contents = Contents(repository, commit)
        self._open: list[ShardSet] = []  # of each block that it is in

    @property
    def ref(self) -> str:
        """`main@100`."""
        return self.commit.checkpoint_id.ref

    @property
    def step(self) -> int:
        """Of the training."""
        return self.commit.checkpoint_id.step

    @property
    def branch(self) -> str:
        """On which it was made."""
        return str(self.commit.checkpoint_id.branch)

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured, by name."""
        return dict(self.commit.metrics)

    @property
    def message(self) -> str:
        """The user's."""
        return self.commit.message

    @property
    def parent(self) -> Checkpoint | None:
        """What training went on from; None for a first one, and where that was dropped."""
        if self.commit.parent is None:
            return None
        return _at(self.repository, self.repository.state().commits.get(self.commit.parent))

    @property
    def manifest(self) -> CheckpointManifest:
        """Its manifest, checked against the log.

        Raises:
            CorruptError: missing, changed or malformed.
        """
        return self.contents.manifest

    @property
    def components(self) -> tuple[str, ...]:
        """The keys of what was saved."""
        return tuple(self.manifest.components)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The full names of all tensors: `model.embed.weight`, `optimizer.state.0.exp_avg`.

        Of copies that differ, as generators do, with the copy's label: `rng.rank00002.cuda`.

        Raises:
            CorruptError: a document or header is damaged.
        """
        return tuple(name for key in self.components for name in self.contents.tensors(key))

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, without reading it.

        Raises:
            TensorNotFoundError: there is none of that name; the nearest are named.
        """
        return self.contents.find(name).spec

    def load(self, name: str) -> torch.Tensor | NDArray[np.generic]:
        """One tensor, on the CPU, from any point of a chain; a numpy array where that was saved.

        Only the files that hold it, or that its deltas are made out of, are read.

        Raises:
            TensorNotFoundError: there is none of that name; the nearest are named.
            RefNotFoundError: the checkpoint was dropped since.
            CorruptError: it is not what was written.
            CkptError: only parts of it were saved.
        """
        from ckptcoord.core.treecodec import restored_array
        from ckptcoord.dist.objects import tensor_of  # late: torch

        with self._reading():
            saved = self.contents.find(name)
            if not saved.has(Box.whole(saved.spec.shape)):
                key = name.partition(".")[0]
                raise CkptError(
                    what=f"{self.ref} has only parts of {name!r}",
                    help=f"state({key!r}) gives those that are there",
                    checkpoint=self.ref,
                    name=name,
                )
            with self._shards() as shards:
                tensor = tensor_of(saved, shards)
        if saved.form.dtype is not None:
            return restored_array(tensor, saved.form.dtype)
        return tensor  # type: ignore[return-value]

    def state(self, component: str, *, tensors: bool = True) -> object:
        """The state of a component as it was saved; where ranks' copies differ, by their labels.

        Args:
            component: its key.
            tensors: read them; else what stands in their place is dtype and shape, a TensorSpec.

        Raises:
            ConfigError: there is no such component.
            RefNotFoundError: the checkpoint was dropped since.
            CorruptError: something that is read is not what was written.
        """
        from ckptcoord.dist.objects import outline_of, state_of  # late: torch

        with self._reading():
            if not tensors:
                return outline_of(self.contents, component)
            with self._shards() as shards:
                return state_of(self.contents, component, shards)

    def __enter__(self) -> Self:
        self._open.append(self.contents.shards())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.pop().__exit__(exc_type, exc, traceback)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What cannot be read in the block is no damage where the checkpoint was dropped since."""
        try:
            yield
        except CorruptError as error:
            if not self.repository.is_dropped(self.commit):
                raise
            near = nearest(self.repository.state(), self.commit.checkpoint_id)
            gone = RefNotFoundError(ref=self.ref, nearest=near)
            gone.add_note("It was there when it was opened, and has been retired or replaced since")
            raise gone from error

    def _shards(self) -> AbstractContextManager[ShardSet]:
        return nullcontext(self._open[-1]) if self._open else self.contents.shards()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str, str]:
        return self.repository.url, self.ref, str(self.commit.manifest_digest)

    def __repr__(self) -> str:
        metrics = "".join(f", {name} {value:.6g}" for name, value in sorted(self.metrics.items()))
        return f"<Checkpoint {self.ref}{metrics}>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return self.manifest._repr_html_()


def _at(repository: RepositoryView, commit: Commit | None) -> Checkpoint | None:
    return None if commit is None else Checkpoint(repository, commit)


def _ordered(repository: RepositoryView, state: LogState) -> list[Checkpoint]:
    """All checkpoints by their place in the log."""
    commits = sorted(state.commits.values(), key=lambda c: state.stamps[c.checkpoint_id].number)
    return [Checkpoint(repository, commit) for commit in commits]
