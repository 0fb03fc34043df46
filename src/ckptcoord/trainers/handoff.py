"""What `ckptcoord resume`, `ckptcoord fork` and repo.yaml say to a trainer's script.

An argument that has its default value says nothing; then the environment is heard, then repo.yaml.
What is done with it when training begins is in `beginning`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckptcoord.core.context import Anew, HandOff, Reset, Variable
from ckptcoord.core.jsonio import dump_json, parse_json
from ckptcoord.core.refs import BranchName
from ckptcoord.errors import CkptError, ConfigError
from ckptcoord.plan.resuming import ResumePoint, resume_point
from ckptcoord.repo.context import find_places
from ckptcoord.repo.repository import open_repository
from ckptcoord.repo.settings import RepoConfig
from ckptcoord.repo.workspace import is_repository, repo_config
from ckptcoord.trainers.arguments import SaveStrategy, TrainingArguments

if TYPE_CHECKING:
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.trainers.ranks import Ranks

_OPEN = TrainingArguments()
_log = logging.getLogger("ckptcoord")


def take_over(args: TrainingArguments, ranks: Ranks) -> tuple[TrainingArguments, Anew]:
    """The arguments with what they leave open, and what begins anew. Collective; rank 0 decides.

    Of the arguments, `output_dir`, `branch`, `save_steps` and `save_strategy` are left open where
    they have their default values, and `resume_from_checkpoint` where it is no ref.

    Raises:
        ConfigError: a variable makes no sense, or contradicts `output_dir`.
        NotNewestError: the branch has newer checkpoints than the one to go on from.
        CkptError: that checkpoint is not there, or its repository cannot be read.
    """
    heard = ranks.from_first(_said(args) if ranks.rank == 0 else "")
    said = cast("dict[str, Any]", parse_json(heard.encode(), path="rank 0"))
    if "error" in said:
        raise CkptError.from_document(said["error"])
    settings = said["settings"]
    if "output_dir" in settings:
        settings["output_dir"] = Path(settings["output_dir"])
    if "save_strategy" in settings:
        settings["save_strategy"] = SaveStrategy(settings["save_strategy"])
    anew = Anew(resets=tuple(map(Reset, said["resets"])), seed=said["seed"])
    return args.model_copy(update=settings), anew


def _said(args: TrainingArguments) -> str:
    try:
        told = HandOff.from_environment(os.environ)  # noqa: TID251 (the hand-off is by it)
        decided = _decide(args, told)
    except CkptError as error:
        decided = {"error": cast("JsonValue", error.to_document())}
    return dump_json(decided).decode()


def _decide(args: TrainingArguments, told: HandOff) -> dict[str, JsonValue]:
    settings: dict[str, JsonValue] = {}
    folder = _folder(args, told)
    if folder != args.output_dir:
        settings["output_dir"] = str(folder)
    config = repo_config(folder) if is_repository(folder) else RepoConfig()
    branch = told.branch or config.branch
    if args.branch != _OPEN.branch:
        _note(Variable.BRANCH, told.branch, args.branch)
        branch = args.branch
    point = _point(args, told, folder, branch)
    if point is not None:
        branch = str(point.branch)
        settings["resume_from_checkpoint"] = point.commit.checkpoint_id.ref
    if branch is not None and branch != args.branch:
        settings["branch"] = branch
    settings |= _saving(args, told, config)
    anew = told.anew if point is not None and not point.is_restart else Anew()
    return {"settings": settings, "resets": [*map(str, anew.resets)], "seed": anew.seed}


def _folder(args: TrainingArguments, told: HandOff) -> Path:
    """The repository's folder."""
    if told.repo is None:
        return args.output_dir
    if args.output_dir != _OPEN.output_dir and told.resume_ref is None:
        return args.output_dir
    named = find_places(told=told).repo.value
    assert named is not None, "or it had raised"
    if args.output_dir != _OPEN.output_dir and named.resolve() != args.output_dir.resolve():
        raise ConfigError(
            field="output_dir",
            why=f"is {args.output_dir}, and {Variable.REPO} is {named}, where {told.resume_ref} is",
            help="Leave output_dir out, or name that folder",
        )
    return named


def _point(
    args: TrainingArguments, told: HandOff, folder: Path, branch: str | None
) -> ResumePoint | None:
    """Where the environment says to go on; None: it says nothing, or an argument does."""
    ref, wanted = told.resume_ref, args.resume_from_checkpoint
    if ref is None:
        return None
    if isinstance(wanted, str):
        _note(Variable.RESUME_REF, ref, wanted)
        return None
    repository = open_repository(folder)
    point = resume_point(
        repository.state(),
        repository.resolve(ref).checkpoint_id.ref if "/" in ref else ref,
        branch=None if branch is None else BranchName(branch),
        since=told.resume_since,
    )
    if not point.is_restart:
        told.anew.check_branch(point.commit.checkpoint_id, point.branch)
    if args.save_strategy is not SaveStrategy.NO:
        point.refuse_newer()
    return point


def _saving(args: TrainingArguments, told: HandOff, config: RepoConfig) -> dict[str, JsonValue]:
    """How often to save."""
    steps = config.autocommit if told.autocommit is None else told.autocommit
    given = (args.save_strategy, args.save_steps) != (_OPEN.save_strategy, _OPEN.save_steps)
    if steps is None or given:
        return {}
    return {"save_steps": steps} if steps else {"save_strategy": SaveStrategy.NO.value}


def _note(variable: Variable, told: str | None, argument: str) -> None:
    if told not in (None, argument):
        _log.warning("%s=%s is not heard: the arguments say %s", variable, told, argument)
