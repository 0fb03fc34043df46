"""Where an engine goes on: decided on rank 0, and heard by the others as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ckptcoord.core.refs import BranchName, checked_name, parse_ref
from ckptcoord.dist.messages import as_dict
from ckptcoord.errors import BranchExistsError, ConfigError
from ckptcoord.plan.commit import branches, head
from ckptcoord.plan.resuming import resume_point
from ckptcoord.repo.rewinding import rewind

if TYPE_CHECKING:
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.plan.resuming import ResumePoint
    from ckptcoord.repo.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is loaded, and where commits go from then on.

    Attributes:
        ref: exactly, `main@500`.
        branch: that commits go to.
        is_restart: it is the run's own last one.
    """

    ref: str
    branch: str
    is_restart: bool = False

    def to_json(self) -> JsonValue:
        """For the other ranks."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: JsonValue) -> Self:
        """What rank 0 said."""
        said = as_dict(value)
        return cls(
            ref=str(said["ref"]),
            branch=str(said["branch"]),
            is_restart=bool(said["is_restart"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Resuming:
    """A wish to go on from a ref.

    Attributes:
        ref: any.
        branch: of the engine.
        named: whether somebody named that branch; else it follows the ref.
        rewind: drop what came after the ref.
        since: see `HandOff.resume_since`.
    """

    ref: str
    branch: str
    named: bool
    rewind: bool = False
    since: int | None = None

    def checked(self) -> list[JsonValue]:
        """What all ranks must say alike.

        Raises:
            InvalidNameError: the ref is none.
        """
        parse_ref(self.ref)
        return [self.ref, self.branch, self.rewind]

    def find(self, repository: Repository) -> JsonValue:
        """The `Point` that it comes to, for all ranks.

        Raises:
            RefNotFoundError: there is no such checkpoint.
            NotNewestError: the branch has newer ones, and nobody said to drop them.
            ConfigError: the ref is on another branch than the one that was named.
        """
        point, _ = self._point(repository)
        return Point(
            ref=point.commit.checkpoint_id.ref,
            branch=str(point.branch),
            is_restart=point.is_restart,
        ).to_json()

    def settle(self, repository: Repository, commit: Commit, *, writer: str) -> None:
        """Rank 0, when all ranks can load it: begin the branch, or drop what came after.

        Raises:
            CheckpointInUseError: a tag, or another branch, holds one of these.
            CkptError: as `find`, if that has changed meanwhile; the log cannot be appended to.
        """
        point, begins = self._point(repository)
        if begins:
            repository.fork(point.branch, commit.checkpoint_id, writer=writer)
        elif point.newer:
            rewind(repository, point, writer=writer)

    def _point(self, repository: Repository) -> tuple[ResumePoint, bool]:
        """Where it goes on, and whether the branch begins there."""
        ref = repository.resolve(self.ref).checkpoint_id.ref if "/" in self.ref else self.ref
        state = repository.state()
        branch = BranchName(self.branch) if self.named else None
        point = resume_point(state, ref, branch=branch, since=self.since)
        own, at = point.commit.checkpoint_id, head(state, point.branch)
        begins = point.branch not in branches(state)
        elsewhere = own.branch != point.branch and (at is None or at.checkpoint_id != own)
        if elsewhere and not begins:
            raise ConfigError(
                field="resume",
                why=f"{own.ref} is not on branch {point.branch}, where this run commits to",
                help=f"fork({own.ref!r}, NEW_BRANCH), or name no branch: it follows the ref then",
            )
        if not self.rewind:
            point.refuse_newer()
        return point, begins


def newest(repository: Repository, branch: str) -> str | None:
    """The exact ref of where a branch stands; None: it is not there, or has nothing."""
    at = head(repository.state(), BranchName(branch))
    return None if at is None else at.checkpoint_id.ref


@dataclass(frozen=True, slots=True, kw_only=True)
class Forking:
    """A wish to begin a branch at a ref."""

    ref: str
    branch: str

    def checked(self) -> list[JsonValue]:
        """What all ranks must say alike.

        Raises:
            InvalidNameError: the ref or the name is none.
        """
        parse_ref(self.ref)
        return [self.ref, checked_name("branch", self.branch)]

    def find(self, repository: Repository) -> str:
        """The exact ref at which the branch begins.

        Raises:
            BranchExistsError: it is there already.
            RefNotFoundError: there is no such checkpoint.
        """
        if BranchName(self.branch) in branches(repository.state()):
            raise BranchExistsError(branch=self.branch)
        return repository.resolve(self.ref).checkpoint_id.ref

    def settle(self, repository: Repository, commit: Commit, *, writer: str) -> None:
        """Rank 0, when all ranks can load it: begin the branch.

        Raises:
            BranchExistsError: somebody else has meanwhile.
            CkptError: the log cannot be appended to.
        """
        repository.fork(BranchName(self.branch), commit.checkpoint_id, writer=writer)
