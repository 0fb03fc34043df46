"""What a run is told, and by whom: an argument goes before the environment, that before repo.yaml.

Pure: the environment is a mapping that is passed in. `ckptcoord resume` and `ckptcoord fork` write
with `HandOff.to_environment` what engines and trainers read with `HandOff.from_environment`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from ckptcoord.core.refs import (
    MAIN,
    MAX_STEP,
    BranchName,
    CheckpointId,
    RepoName,
    checked_name,
    parse_ref,
)
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_T = TypeVar("_T")
MAX_SEED = 2**63 - 1
MAX_TEXT = 4096
MODEL = "model"
_RNG = "rng"


class Origin(StrEnum):
    """Who said it; the first of these that says anything is heard."""

    ARGUMENT = "argument"
    ENVIRONMENT = "environment"
    REPOSITORY = "repo.yaml"
    FOUND = "current directory"
    DEFAULT = "default"


class Reset(StrEnum):
    """What a fork begins anew instead of taking it over."""

    OPTIMIZER = "optimizer"
    SCHEDULER = "scheduler"
    WEIGHTS_ONLY = "weights-only"  # all but the model


class Variable(StrEnum):
    """The environment's variables."""

    WORKSPACE = "CKPTCOORD_WORKSPACE"
    REPO = "CKPTCOORD_REPO"
    BRANCH = "CKPTCOORD_BRANCH"
    RESUME_REF = "CKPTCOORD_RESUME_REF"
    RESUME_SINCE = "CKPTCOORD_RESUME_SINCE"
    AUTOCOMMIT = "CKPTCOORD_AUTOCOMMIT"
    RESET = "CKPTCOORD_RESET"
    SEED = "CKPTCOORD_SEED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting(Generic[_T]):
    """A value, and who gave it."""

    value: _T
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Anew:
    """What a run begins anew where it goes on; false: nothing. See `HandOff`."""

    resets: tuple[Reset, ...] = ()
    seed: int | None = None

    def __bool__(self) -> bool:
        return bool(self.resets) or self.seed is not None

    def __contains__(self, one: Reset) -> bool:
        return one in self.resets or self.weights_only

    @property
    def weights_only(self) -> bool:
        """Whether the model alone is taken over; then steps begin at 0."""
        return Reset.WEIGHTS_ONLY in self.resets

    def takes_over(self, key: str) -> bool:
        """Whether a component of that key is loaded; of others the checkpoint need have none."""
        if self.weights_only:
            return key == MODEL
        return key not in self.resets and not (key == _RNG and self.seed is not None)

    def check_branch(self, source: CheckpointId, branch: BranchName) -> None:
        """Steps that begin at 0 take a branch of their own.

        Raises:
            ConfigError: it is the checkpoint's.
        """
        if self.weights_only and source.branch == branch:
            raise ConfigError(
                field=str(Variable.RESET),
                why=f"{Reset.WEIGHTS_ONLY} begins steps at 0, and branch {branch} is at "
                f"{source.ref} already",
                help=f"ckptcoord fork {source.ref} NEW_BRANCH --weights-only -- COMMAND",
            )

    def __str__(self) -> str:
        """`a new optimizer, seed 7`, or `weights only`."""
        new = ["weights only"] if self.weights_only else [f"a new {one}" for one in self.resets]
        return ", ".join(new if self.seed is None else [*new, f"seed {self.seed}"])


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOff:
    """What the environment says to a run; None, or empty, where it says nothing.

    Attributes:
        workspace: a folder.
        repo: a name in the workspace, or a path: that has a `/` in it.
        branch: that checkpoints are saved to.
        resume_ref: that training goes on from.
        resume_since: the last entry of the log when the ref was handed over. What the branch has
            been given since comes from the run itself, which goes on from it when it is restarted.
        autocommit: steps from one commit to the next; 0: none by itself.
        resets: what is begun anew where training goes on from `resume_ref`.
        seed: the random number generators are seeded with there.
    """

    workspace: str | None = None
    repo: str | None = None
    branch: str | None = None
    resume_ref: str | None = None
    resume_since: int | None = None
    autocommit: int | None = None
    resets: tuple[Reset, ...] = ()
    seed: int | None = None

    @property
    def anew(self) -> Anew:
        """What is begun anew there."""
        return Anew(resets=self.resets, seed=self.seed)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """What a process's environment says; an empty variable says nothing.

        Raises:
            ConfigError: a value makes no sense; its field is the variable.
        """
        return cls(
            workspace=_read(environ, Variable.WORKSPACE, check_path),
            repo=_read(environ, Variable.REPO, check_repo),
            branch=_read(environ, Variable.BRANCH, check_branch),
            resume_ref=_read(environ, Variable.RESUME_REF, check_ref),
            resume_since=_read(environ, Variable.RESUME_SINCE, _step),
            autocommit=_read(environ, Variable.AUTOCOMMIT, _autocommit),
            resets=_read(environ, Variable.RESET, _resets) or (),
            seed=_read(environ, Variable.SEED, parse_seed),
        )

    def to_environment(self) -> dict[str, str]:
        """The variables that say this, and "" for each that must say nothing."""
        values: dict[Variable, object] = {
            Variable.WORKSPACE: self.workspace,
            Variable.REPO: self.repo,
            Variable.BRANCH: self.branch,
            Variable.RESUME_REF: self.resume_ref,
            Variable.RESUME_SINCE: self.resume_since,
            Variable.AUTOCOMMIT: self.autocommit,
            Variable.RESET: ",".join(self.resets),
            Variable.SEED: self.seed,
        }
        return {str(name): "" if value is None else str(value) for name, value in values.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The arguments of a call; None: not given.

    Raises:
        InvalidNameError: the branch is none, or the ref.
        ConfigError: a setting makes no sense.
    """

    branch: str | None = None
    resume: str | None = None
    autocommit: int | None = None

    def __post_init__(self) -> None:
        if self.branch is not None:
            check_branch(self.branch)
        if self.resume is not None:
            check_ref(self.resume)
        if self.autocommit is not None:
            check_autocommit(self.autocommit, field="autocommit")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How a run goes on, and who said so; see `HandOff`."""

    branch: Setting[str]
    resume_ref: Setting[str | None]
    resume_since: int | None
    autocommit: Setting[int]
    resets: Setting[tuple[Reset, ...]]
    seed: Setting[int | None]

    @property
    def origins(self) -> dict[str, Origin]:
        """For each setting's name, who said it."""
        names = ("branch", "resume_ref", "autocommit", "resets", "seed")
        return {name: getattr(self, name).origin for name in names}


def choose_settings(
    asked: Asked, told: HandOff, *, branch: str | None, autocommit: int | None
) -> RunSettings:
    """Each setting from whoever goes first.

    Args:
        asked: the arguments.
        told: the environment.
        branch: as repo.yaml says, if it does.
        autocommit: likewise.
    """
    resume_ref = _choose(None, asked.resume, told.resume_ref)
    handed_over = resume_ref.origin is Origin.ENVIRONMENT
    return RunSettings(
        branch=_choose(MAIN, asked.branch, told.branch, branch),
        resume_ref=resume_ref,
        resume_since=told.resume_since if handed_over else None,
        autocommit=_choose(0, asked.autocommit, told.autocommit, autocommit),
        resets=_choose((), None, told.resets or None),
        seed=_choose(None, None, told.seed),
    )


def is_path(repo: str) -> bool:
    """Whether a repository is given by its path, not by its name in the workspace; as with refs."""
    return "/" in repo or repo in (".", "..")


# --- one value each; a ValueError says what is wrong with it -------------------------------------


def check_path(text: str) -> str:
    """A folder's path as it was given.

    Raises:
        ConfigError: it can be none.
    """
    if not text or "\0" in text or len(text) > MAX_TEXT:
        raise ConfigError(field="path", why="is empty, has a NUL, or is too long")
    return text


def check_repo(text: str) -> str:
    """A repository's path, or its name in a workspace.

    Raises:
        InvalidNameError: it can be neither.
        ConfigError: likewise.
    """
    return check_path(text) if is_path(text) else RepoName(text).value


def check_branch(text: str) -> str:
    """A branch that is saved to.

    Raises:
        InvalidNameError: it is none.
    """
    return checked_name("branch", text)


def check_ref(text: str) -> str:
    """A ref.

    Raises:
        InvalidNameError: it is none.
    """
    parse_ref(text)
    return text


def check_autocommit(steps: object, *, field: str) -> int:
    """Steps from one commit to the next; 0: none by itself.

    Raises:
        ConfigError: it is no such number; names `field`.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps < MAX_STEP:
        why = f"is {ascii(steps)[:40]}, not a number of steps, or 0 for none"
        raise ConfigError(field=field, why=why)
    return steps


def parse_seed(text: str) -> int:
    """A seed in digits.

    Raises:
        ValueError: it is none.
    """
    return _number(text, MAX_SEED)


def _read(environ: Mapping[str, str], name: Variable, parse: Callable[[str], _T]) -> _T | None:
    text = environ.get(name, "")
    if not text:
        return None
    try:
        return parse(text)
    except ValueError as error:  # InvalidNameError and ConfigError are
        why = getattr(error, "why", str(error))
        raise ConfigError(field=name, why=f"{ascii(text)[:80]} {why}") from error


def _choose(
    default: _T, argument: _T | None, environment: _T | None, repository: _T | None = None
) -> Setting[_T]:
    """The first that was given, and by whom."""
    for value, origin in (
        (argument, Origin.ARGUMENT),
        (environment, Origin.ENVIRONMENT),
        (repository, Origin.REPOSITORY),
    ):
        if value is not None:
            return Setting(value=value, origin=origin)
    return Setting(value=default, origin=Origin.DEFAULT)


def _autocommit(text: str) -> int:
    return 0 if text == "off" else _step(text)


def _step(text: str) -> int:
    return _number(text, MAX_STEP - 1)


def _number(text: str, largest: int) -> int:
    if text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= largest:
        return int(text)
    raise ValueError(f"is not a whole number from 0 to {largest}")


def _resets(text: str) -> tuple[Reset, ...]:
    words = {word.strip() for word in text.split(",")}
    unknown = words - set(Reset)
    if unknown:
        raise ValueError(f"is not a list of {', '.join(Reset)}, with commas between them")
    return tuple(one for one in Reset if one in words)
