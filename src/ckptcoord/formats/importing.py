"""The checkpoints of a source, committed in order, and compared with it."""

from __future__ import annotations

import secrets
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptcoord.core.entries import Fork, Retire
from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.core.refs import MAIN, BranchName, CheckpointId
from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.dist.capture import capture
from ckptcoord.dist.config import CoordinatorConfig
from ckptcoord.dist.coordinator import CheckpointCoordinator
from ckptcoord.dist.world import Solo
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    CorruptError,
    OutputDirError,
    RepositoryNotFoundError,
)
from ckptcoord.formats.components import MODEL, OPTIMIZER, PROGRESS, RNG, progress
from ckptcoord.formats.readback import differences
from ckptcoord.plan.commit import branches
from ckptcoord.plan.lookup import newest_on
from ckptcoord.repo.repository import Repository, open_repository

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from ckptcoord.core.entries import Commit
    from ckptcoord.dist.capture import CapturedComponent
    from ckptcoord.formats.source import Source, SourceCheckpoint, SourceState

_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One checkpoint of a source that was read once, and where it goes.

    Attributes:
        checkpoint: of the source.
        id: where it goes.
        components: their keys.
        size_bytes: of its tensors.
        left_out: what of it is not imported, each with the reason.
        notes: what whoever resumes should know.
    """

    checkpoint: SourceCheckpoint
    id: CheckpointId
    components: tuple[str, ...]
    size_bytes: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """One checkpoint that is in the repository now.

    Attributes:
        plan: what it is.
        path: its folder in the repository.
        new: whether it was not there before.
    """

    plan: Planned
    path: str
    new: bool


def plan_import(
    source: Source, *, branch: str | None = None, step: int | None = None
) -> list[Planned]:
    """Read all that is to be imported once, and say where it goes. Nothing is written.

    Args:
        source: where from.
        branch: which of its branches, or, where it has none, onto which; by default main.
        step: which of its checkpoints, or, where there is one alone, as which step; by default
            what the source says, or 0.

    Raises:
        ConfigError: there is no such branch or step in it, or two checkpoints have the same.
        CkptError: a checkpoint cannot be read.
    """
    if branch is not None:
        BranchName(branch)
    chosen = _chosen(source, branch, step)
    plans = [_planned(source, one, branch, step if len(chosen) == 1 else None) for one in chosen]
    seen: dict[CheckpointId, str] = {}
    for plan in plans:
        if plan.id in seen:
            raise ConfigError(
                field=plan.id.ref,
                why=f"is the place of {plan.checkpoint.path} and of {seen[plan.id]}",
                help="Import one of them, and the other with --branch",
            )
        seen[plan.id] = plan.checkpoint.path
    return plans


def run_import(
    source: Source, plans: Sequence[Planned], root: str | os.PathLike[str]
) -> Iterator[Imported]:
    """Commit what was planned, one after another; each is read back and compared by digest.

    The repository is made if it is absent. What is there already, to the last bit, is left alone.

    Raises:
        ConfigError: something else is there already, or newer steps are.
        CorruptError: what was read back differs; that checkpoint is retired again.
        CkptError: it cannot be read or written.
    """
    for plan in plans:
        components = _components(source, plan.checkpoint.read(), plan)
        states = {one.key: capture(one) for one in components}
        standing = _standing(root, plan, states)
        if standing is not None:
            yield Imported(plan=plan, path=standing.path, new=False)
        else:
            yield Imported(plan=plan, path=_commit(root, plan, components, states), new=True)


def check_place(root: str | os.PathLike[str], plans: Sequence[Planned]) -> None:
    """Look whether the planned steps can be committed, before the first of them is.

    Raises:
        ConfigError: a branch has newer steps than what is to go there.
    """
    repository = _opened(root)
    if repository is None:
        return
    state = repository.state()
    for plan in plans:
        commit = newest_on(state, plan.id.branch)
        newest = None if commit is None else commit.checkpoint_id
        if plan.id not in state.commits and newest is not None and newest.step > plan.id.step:
            raise ConfigError(
                field=plan.id.ref,
                why=f"would come after {newest.ref}, which is there already",
                help="Give --branch NAME to import onto a branch of its own",
            )


# --- planning ------------------------------------------------------------------------------------


def _chosen(source: Source, branch: str | None, step: int | None) -> list[SourceCheckpoint]:
    found = list(source.checkpoints)
    if branch is not None and any(one.branch for one in found):
        found = [one for one in found if one.branch == branch]
        if not found:
            known = sorted({one.branch for one in source.checkpoints})
            raise ConfigError(
                field="--branch", why=f"{source.path} has none {branch!r}, but {', '.join(known)}"
            )
    if step is not None and len(found) > 1:
        found = [one for one in found if one.step == step]
        if not found:
            raise ConfigError(field="--step", why=f"{source.path} has no step {step}")
    return found


def _planned(
    source: Source, one: SourceCheckpoint, branch: str | None, step: int | None
) -> Planned:
    state = one.read()
    known = [number for number in (step, one.step, state.step, 0) if number is not None]
    place = CheckpointId(BranchName(one.branch or branch or MAIN), known[0])
    plan = Planned(
        checkpoint=replace(one, epoch=state.epoch if one.epoch is None else one.epoch),
        id=place,
        components=(),
        size_bytes=0,
        left_out=state.left_out,
        notes=state.notes,
    )
    captured = [capture(component) for component in _components(source, state, plan)]
    return replace(
        plan,
        components=tuple(sorted(one.component.key for one in captured)),
        size_bytes=sum(t.spec.nbytes for c in captured for t in c.tensors.values()),
    )


class _Config:
    """As a Hugging Face model has it: so the folder that is written opens in transformers."""

    def __init__(self, text: bytes) -> None:
        self._text = text

    def to_json_string(self) -> str:
        """The config.json, as it was."""
        return self._text.decode()


class _Given:
    """A state that stands still, as a component's."""

    def __init__(self, state: Any, config: bytes = b"") -> None:  # noqa: ANN401 (any state)
        self._state = state
        if config:
            self.config = _Config(config)

    def state_dict(self) -> Any:  # noqa: ANN401 (any state)
        """It."""
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is loaded into a source.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(field="import", why="only saves")


def _components(source: Source, state: SourceState, plan: Planned) -> list[StateComponent]:
    held = dict(state.components)
    if PROGRESS not in held and OPTIMIZER in held:
        held[PROGRESS] = progress(plan.id.step, plan.checkpoint.epoch)
    metadata = {"imported": {"format": source.format, "name": Path(plan.checkpoint.path).name}}
    return [
        StateComponent(
            key,
            _Given(value, state.config if key == MODEL else b""),
            SharingPattern.PER_RANK if key == RNG else SharingPattern.GLOBAL,
            metadata=metadata if key == MODEL else {},
        )
        for key, value in held.items()
    ]


# --- committing ----------------------------------------------------------------------------------


def _opened(root: str | os.PathLike[str]) -> Repository | None:
    try:
        return open_repository(root)
    except RepositoryNotFoundError:
        return None
    except OSError as error:  # no name that a folder can have
        why = error.strerror or "it cannot be opened"
        raise OutputDirError(path=str(root)[:200], why=why) from error


def _standing(
    root: str | os.PathLike[str], plan: Planned, states: Mapping[str, CapturedComponent]
) -> Commit | None:
    """The checkpoint that is there in this place; None: there is none.

    Raises:
        ConfigError: it is another one.
    """
    repository = _opened(root)
    commit = None if repository is None else repository.state().commits.get(plan.id)
    if repository is None or commit is None:
        return None
    apart = list(islice(differences(repository, commit, states), _SHOWN))
    if apart:
        raise ConfigError(
            field=plan.id.ref,
            why=f"is there already, and is not {plan.checkpoint.path}: {'; '.join(apart)}",
            help="Give --branch NAME to import onto a branch of its own",
        )
    return commit


def _commit(
    root: str | os.PathLike[str],
    plan: Planned,
    components: Sequence[StateComponent],
    states: Mapping[str, CapturedComponent],
) -> str:
    """Commit, read back, compare; the folder."""
    config = CoordinatorConfig(branch=str(plan.id.branch), compression=CompressionLevel.AUTO)
    one = plan.checkpoint
    with closing(
        CheckpointCoordinator(components, dist=Solo(), output_dir=root, config=config)
    ) as coordinator:
        repository = coordinator.repository
        _fork(repository, plan)
        coordinator.save_checkpoint(
            step=plan.id.step,
            message=one.message or f"imported {Path(one.path).name}",
            metrics=one.metrics,
            epoch=one.epoch,
        )
        commit = repository.state().commits[plan.id]
        _compare(repository, commit, states)
    return commit.path


def _fork(repository: Repository, plan: Planned) -> None:
    """Begin the branch where the source says, if that is here."""
    fork, state = plan.checkpoint.fork, repository.state()
    if fork is None or plan.id.branch in branches(state):
        return
    source = CheckpointId(BranchName(fork[0]), fork[1])
    if source in state.commits:
        entry = Fork(writer=secrets.token_hex(16), branch=plan.id.branch, source=source)
        repository.log.append(lambda _: entry)


def _compare(
    repository: Repository, commit: Commit, states: Mapping[str, CapturedComponent]
) -> None:
    try:
        apart = list(islice(differences(repository, commit, states), _SHOWN))
        if apart:
            raise CorruptError(
                path=commit.path, why=f"is not what was read of the source: {'; '.join(apart)}"
            )
    except CkptError:
        entry = Retire(
            writer=secrets.token_hex(16),
            checkpoint_ids=(commit.checkpoint_id,),
            reason="an import that was not what it was read from",
        )
        repository.log.append(lambda _: entry)
        raise
