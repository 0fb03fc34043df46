"""Names as in git: branches, tags, checkpoint ids, and refs that point at one checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Self, TypeAlias

from ckptcoord.errors import InvalidNameError

MAIN = "main"
MAX_STEP = 10**15
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_ID = re.compile(r"checkpoint-(0|[1-9][0-9]{0,15})(?:@([^@/]+))?")
_STEP = re.compile(r"0|[1-9][0-9]{0,15}")
_BESIDE = re.compile(r"\.[0-9a-f]{8}")


def _check_name(kind: str, text: object) -> None:
    if not isinstance(text, str) or _NAME.fullmatch(text) is None:
        raise InvalidNameError(
            kind=kind,
            name=str(text),
            why="is not 1 to 100 letters, digits, '.', '_' or '-' that begin with a letter, digit "
            "or '_'",
        )
    if ".." in text or text.endswith((".lock", ".")) or text == "latest":
        raise InvalidNameError(
            kind=kind, name=text, why="is reserved, has '..' in it, or ends in '.lock' or '.'"
        )


@dataclass(frozen=True, slots=True, order=True)
class BranchName:
    """A branch; `main` unless said otherwise."""

    value: str = MAIN

    def __post_init__(self) -> None:
        _check_name("branch", self.value)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, order=True)
class TagName:
    """A tag."""

    value: str

    def __post_init__(self) -> None:
        _check_name("tag", self.value)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, order=True)
class RepoName:
    """A repository in a workspace: the name of its folder, which is none that a checkpoint has."""

    value: str

    def __post_init__(self) -> None:
        _check_name("repository", self.value)
        if is_checkpoint_folder(self.value):
            raise InvalidNameError(
                kind="repository", name=self.value, why="is the name of a checkpoint"
            )

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, order=True)
class CheckpointId:
    """One checkpoint: a step on a branch. Ordered by branch, then numerically by step.

    `str()` gives its folder's name: `checkpoint-500`, or `checkpoint-500@branch` off main.
    """

    branch: BranchName
    step: int

    def __post_init__(self) -> None:
        if isinstance(self.step, bool) or not isinstance(self.step, int):
            raise InvalidNameError(kind="step", name=str(self.step), why="is not an int")
        if not 0 <= self.step < MAX_STEP:
            raise InvalidNameError(
                kind="step", name=str(self.step), why=f"is not from 0 to {MAX_STEP - 1}"
            )

    @classmethod
    @lru_cache(maxsize=4096)  # a log names each of them several times
    def parse(cls, text: str) -> Self:
        """The id that `str()` wrote.

        Raises:
            InvalidNameError: the text is anything else.
        """
        match = _ID.fullmatch(text)
        if match is None:
            raise InvalidNameError(
                kind="checkpoint id", name=text, why="is not checkpoint-<step>[@<branch>]"
            )
        return cls(BranchName(match[2] or MAIN), int(match[1]))

    @property
    def ref(self) -> str:
        """`main@500`."""
        return f"{self.branch}@{self.step}"

    def __str__(self) -> str:
        suffix = "" if self.branch.value == MAIN else f"@{self.branch}"
        return f"checkpoint-{self.step}{suffix}"


def is_checkpoint_folder(text: str) -> bool:
    """Whether a checkpoint could be in a folder of this name: its id, or that and `.<8 hex>`."""
    for own in (text, text[:-9] if _BESIDE.fullmatch(text[-9:]) else text):
        try:
            CheckpointId.parse(own)
        except InvalidNameError:
            continue
        return True
    return False


@dataclass(frozen=True, slots=True)
class StepRef:
    """`branch@step`."""

    id: CheckpointId


@dataclass(frozen=True, slots=True)
class LatestRef:
    """`latest`, the newest commit of all, or `branch@latest`, that of one branch."""

    branch: BranchName | None = None


@dataclass(frozen=True, slots=True)
class NameRef:
    """A bare word: a tag, else a branch (its newest commit)."""

    name: str


@dataclass(frozen=True, slots=True)
class PathRef:
    """A checkpoint's folder."""

    path: str


Ref: TypeAlias = StepRef | LatestRef | NameRef | PathRef


def parse_ref(text: object) -> Ref:
    """Parse `main@100`, `latest`, `exp@latest`, `checkpoint-100[@exp]`, a tag, a branch or a path.

    A path has a `/` in it or is `.` or `..`.

    Raises:
        InvalidNameError: the text can be none of them.
    """
    if not isinstance(text, str) or not text or len(text) > 4096 or not text.isprintable():
        raise InvalidNameError(
            kind="ref", name=str(text), why="is empty, too long or has control characters"
        )
    if "/" in text or text in (".", ".."):
        return PathRef(text)
    if text == "latest":
        return LatestRef()
    if _ID.fullmatch(text):
        return StepRef(CheckpointId.parse(text))
    branch, at, step = text.rpartition("@")
    if not at:
        _check_name("ref", text)
        return NameRef(text)
    if step == "latest":
        return LatestRef(BranchName(branch))
    if _STEP.fullmatch(step) is None:
        raise InvalidNameError(kind="ref", name=text, why="has no step number after '@'")
    return StepRef(CheckpointId(BranchName(branch), int(step)))


def checked_name(kind: str, text: str) -> str:
    """A new name for a `branch` or a `tag`, which a ref can be.

    Raises:
        InvalidNameError: it can be none, or is a checkpoint's own id: a ref would mean that.
    """
    _check_name(kind, text)
    if _ID.fullmatch(text):
        raise InvalidNameError(kind=kind, name=text, why="reads as a checkpoint's own id")
    return text
