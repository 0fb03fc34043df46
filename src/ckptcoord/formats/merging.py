"""Checkpoints' models averaged into one, as the first checkpoint of a new branch."""

from __future__ import annotations

import math
import secrets
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.core.entries import MAX_TEXT
from ckptcoord.core.manifest import FileKind
from ckptcoord.core.refs import CheckpointId
from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.dist.config import CoordinatorConfig
from ckptcoord.dist.coordinator import CheckpointCoordinator
from ckptcoord.dist.world import Solo
from ckptcoord.errors import BranchExistsError, ConfigError, NotMergeableError
from ckptcoord.formats.averaging import Findings, How, Rules, Term, compare, make
from ckptcoord.formats.spill import Spill
from ckptcoord.formats.whole import WholeCheckpoint
from ckptcoord.plan.commit import branches
from ckptcoord.plan.lookup import newest_on
from ckptcoord.repo.settings import MARKER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.refs import BranchName
    from ckptcoord.formats.averaging import Differences
    from ckptcoord.formats.whole import WholeState, WholeTensor
    from ckptcoord.repo.repository import Repository

_MODEL_ONLY = (
    "Only {component!r} is here: no optimizer, schedule, data position or random state. To train "
    "it on: `ckptcoord fork REF NEW_BRANCH --weights-only -- COMMAND`."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What is wanted.

    Attributes:
        parts: the commits and their weights; the new branch begins at the first.
        into: the new branch.
        component: the key of what is averaged.
        step: of the new checkpoint; None: the highest of theirs.
        message: None: which ones they were.
        rules: how it is done.

    Raises:
        ConfigError: fewer than two, weights that make no average, or a message that is none.
        InvalidNameError: the step is none.
    """

    parts: tuple[tuple[Commit, float], ...]
    into: BranchName
    component: str = "model"
    step: int | None = None
    message: str | None = None
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ConfigError(field="--average", why="needs two checkpoints or more")
        weights = [weight for _, weight in self.parts]
        if not all(map(math.isfinite, weights)):
            raise ConfigError(field="--average", why="has a weight that is not finite")
        if self.rules.normalise and (min(weights) < 0 or not 0 < sum(weights) < math.inf):
            raise ConfigError(
                field="--average",
                why="has a negative weight, or none but zeros",
                help="--as-given takes weights as they are: 1, 1 and -1, for instance",
            )
        self.new_id()
        if len(self.text) > MAX_TEXT or self.text != self.text.encode("utf-8", "replace").decode():
            why = f"is no Unicode text of under {MAX_TEXT:,} characters"
            raise ConfigError(field="message", why=why)

    def new_id(self) -> CheckpointId:
        """Of the new checkpoint."""
        steps = [commit.checkpoint_id.step for commit, _ in self.parts]
        return CheckpointId(self.into, max(steps) if self.step is None else self.step)

    @property
    def shares(self) -> tuple[float, ...]:
        """What each checkpoint's tensors are multiplied with, all in all."""
        total = sum(weight for _, weight in self.parts) if self.rules.normalise else 1.0
        return tuple(weight / total for _, weight in self.parts)

    @property
    def text(self) -> str:
        """The message."""
        named = ", ".join(
            f"{commit.checkpoint_id.ref} x {share:.6g}"
            for (commit, _), share in zip(self.parts, self.shares, strict=True)
        )
        headline = f"Average of {named}" if self.message is None else self.message
        return f"{headline}\n\n{_MODEL_ONLY.format(component=self.component)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What came of it.

    Attributes:
        ref: of the new checkpoint.
        path: its folder, absolute; empty where nothing was committed.
        counts: how many tensors were made in which way.
        size_bytes: of all tensors.
        problems: why it cannot be done, `name: why`; a dry run has no others.
    """

    ref: str
    path: str
    counts: Mapping[How, int]
    size_bytes: int
    problems: tuple[str, ...] = ()


def merge(
    repository: Repository,
    wanted: Merge,
    *,
    dry_run: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> MergeReport:
    """Average checkpoints, and commit the result as a new branch that begins at the first of them.

    One tensor is in memory at a time; the average waits on disk until all of it is there. Nothing
    is committed, and no branch begun, if any of it cannot be averaged.

    Args:
        repository: where.
        wanted: of what, and into which branch.
        dry_run: only compare names, shapes, dtypes and digests.
        advance: told of bytes as they are averaged.

    Raises:
        NotMergeableError: tensors do not fit, integers differ, or there is a NaN; all are named.
        BranchExistsError: the branch is there already.
        ConfigError: there is no such component.
        CorruptError, StorageError: a checkpoint cannot be read, or the average not be written.
    """
    _check_branch(repository, wanted)
    with ExitStack() as stack:
        terms = [
            Term(source=stack.enter_context(WholeCheckpoint(repository, commit)), weight=weight)
            for commit, weight in wanted.parts
        ]
        states = [term.source.state(wanted.component) for term in terms]
        found = compare(terms, states, wanted.rules)
        path = ""
        if not dry_run:
            if found.problems:
                raise NotMergeableError(problems=found.problems)
            state = _averaged(repository, wanted, terms, states, found, advance)
            path = _commit(repository, wanted, terms[0].source, state)
    ways = list(found.how.values())
    return MergeReport(
        ref=wanted.new_id().ref,
        path=path,
        counts={how: ways.count(how) for how in How},
        size_bytes=sum(one.spec.nbytes for one in states[0].tensors.values()),
        problems=found.problems,
    )


def _check_branch(repository: Repository, wanted: Merge) -> None:
    """The branch is new; or a merge that was killed has begun it there and no more."""
    state, branch = repository.state(), wanted.into
    if branch in branches(state) and not _is_begun(repository, wanted):
        raise BranchExistsError(branch=str(branch))


def _is_begun(repository: Repository, wanted: Merge) -> bool:
    state, branch = repository.state(), wanted.into
    fork = state.forks.get(branch)
    here = fork is not None and fork.source == wanted.parts[0][0].checkpoint_id
    return here and newest_on(state, branch) is None


def _averaged(
    repository: Repository,
    wanted: Merge,
    terms: Sequence[Term],
    states: Sequence[WholeState],
    found: Differences,
    advance: Callable[[int], None],
) -> object:
    """The state, its tensors in a spill in the repository.

    Raises:
        NotMergeableError: what was only seen in the bytes.
    """
    findings = Findings()
    spill = Spill(Path(repository.url) / MARKER, (one.spec for one in states[0].tensors.values()))

    def read(tensor: WholeTensor, out: torch.Tensor) -> None:
        name = tensor.spec.name
        tensors = [one.tensors[name] for one in states if name in one.tensors]
        make(terms, tensors, found.how[name], wanted.rules, out, findings)
        advance(tensor.spec.nbytes)

    state = states[0].build(spill, read)
    if findings.problems:
        raise NotMergeableError(problems=tuple(findings.problems))
    return state


def _commit(repository: Repository, wanted: Merge, first: WholeCheckpoint, state: object) -> str:
    """Begin the branch, and save; returns the folder."""
    component = StateComponent(
        wanted.component,
        _Model(_config(first, wanted.component)),
        SharingPattern.REPLICATED,
        get_state=lambda: state,
        set_state=lambda _: None,
        metadata={
            "average_of": [
                {
                    "ref": commit.checkpoint_id.ref,
                    "manifest_digest": str(commit.manifest_digest),
                    "weight": share,
                }
                for (commit, _), share in zip(wanted.parts, wanted.shares, strict=True)
            ]
        },
    )
    config = CoordinatorConfig(branch=str(wanted.into))
    with CheckpointCoordinator(
        [component], dist=Solo(), output_dir=repository.url, config=config
    ) as coordinator:
        if not _is_begun(repository, wanted):
            source = wanted.parts[0][0].checkpoint_id
            repository.fork(wanted.into, source, writer=secrets.token_hex(16))
        return coordinator.save_checkpoint(step=wanted.new_id().step, message=wanted.text)


def _config(source: WholeCheckpoint, component: str) -> bytes:
    for record in source.manifest.files:
        if record.kind is FileKind.CONFIG and record.component == component:
            return source.repository.read_document(source.commit, record)
    return b""


class _Config:
    """A model's config, as the capture of a model asks for it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def to_json_string(self) -> str:
        """The content of config.json."""
        return self._text


class _Model:
    """What has the config of a model."""

    def __init__(self, config: bytes) -> None:
        if config:
            self.config = _Config(config.decode())
