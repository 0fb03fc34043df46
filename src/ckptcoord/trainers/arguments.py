"""TrainingArguments: from Python, from a YAML file, from a command line."""

from __future__ import annotations

import argparse
import difflib
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ckptcoord.core.entries import MAX_QUEUE_DEPTH
from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.core.refs import MAIN, checked_name
from ckptcoord.dist.config import OnFailure
from ckptcoord.errors import ConfigError
from ckptcoord.plan.retention import Mode, Retention, parse_span
from ckptcoord.trainers.yamlfile import read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class SaveStrategy(StrEnum):
    """When to save; `adaptive` is as often as `max_save_overhead` allows."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"
    BEST = "best"
    ADAPTIVE = "adaptive"


class EvalStrategy(StrEnum):
    """When to evaluate."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


class Deferral(StrEnum):
    """Whether a save in the background may copy what optimizers own after its call."""

    AUTO = "auto"
    TRUE = "true"
    FALSE = "false"

    @property
    def setting(self) -> bool | Literal["auto"]:
        """As the coordinator's settings have it."""
        return "auto" if self is Deferral.AUTO else self is Deferral.TRUE


class PipelineSchedule(StrEnum):
    """In which order a stage runs microbatches; 1f1b holds fewer activations."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"


class SchedulerType(StrEnum):
    """How the learning rate goes after the warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class TrainingArguments(BaseModel):
    """How to train, with Hugging Face's names where they have one. Immutable.

    Where `output_dir`, `branch`, `save_steps`, `save_strategy` or `resume_from_checkpoint` have
    their defaults, a trainer heeds `ckptcoord resume` and `ckptcoord fork` (docs/cli.md).

    Raises:
        ConfigError: an unknown name or a value that makes no sense; all of them at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    output_dir: Path = Path("trainer_output")
    """the repository of checkpoints"""
    run_name: str = ""
    """put into each checkpoint's message"""
    branch: str = MAIN
    """the branch that checkpoints are saved to"""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """of every generator and of the data's order"""
    use_cpu: bool = False
    """stay on the CPU even where there is a GPU"""

    max_steps: int = Field(default=-1, ge=-1)
    """optimizer steps; -1: as num_train_epochs says"""
    num_train_epochs: float = Field(default=3.0, ge=0, allow_inf_nan=False)
    """epochs, where max_steps is -1"""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """samples a batch on each rank"""
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    """samples a batch of an evaluation"""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """batches an optimizer step"""

    learning_rate: float = Field(default=5e-5, ge=0, allow_inf_nan=False)
    """its peak"""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """of matrices; biases and norms have none"""
    warmup_steps: int = Field(default=0, ge=0)
    """steps over which the learning rate rises from 0"""
    lr_scheduler_type: SchedulerType = SchedulerType.LINEAR
    """linear, cosine or constant"""
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """gradients are clipped to this norm; 0: not at all"""

    logging_steps: int = Field(default=10, ge=0)
    """log every so many steps; 0: never"""
    eval_strategy: EvalStrategy = EvalStrategy.NO
    """no, steps or epoch"""
    eval_steps: int | None = Field(default=None, ge=1)
    """evaluate every so many steps; none: as often as logging"""
    save_strategy: SaveStrategy = SaveStrategy.STEPS
    """no, steps, epoch, best or adaptive"""
    save_steps: int = Field(default=500, ge=1)
    """save every so many steps"""
    max_save_overhead: float = Field(default=0.02, gt=0, lt=1)
    """adaptive: the part of the run's time that saves may take"""
    save_total_limit: int | None = Field(default=None, ge=1)
    """keep the newest so many checkpoints; none: as repo.yaml says, or all"""
    save_keep_best: int | None = Field(default=None, ge=1)
    """keep the best so many too, by metric_for_best_model"""
    save_keep_every: int | None = Field(default=None, ge=1)
    """keep those whose step is a multiple of it, too"""
    save_keep_for: str | None = None
    """keep those that are no older too, as in 12h or 7d"""
    save_timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """how long a save or load waits for the other ranks"""
    background_saves: bool = True
    """train on while a save is coded and written"""
    save_queue_depth: int = Field(default=2, ge=1, le=MAX_QUEUE_DEPTH)
    """unfinished background saves before a step waits"""
    save_deferred: Deferral = Deferral.AUTO
    """auto, true or false: copy weights and moments during the next forward and backward"""
    save_staging_bytes: int | None = Field(default=None, ge=0)
    """most bytes of copies that a rank holds, as in 8GiB; none: what the queue needs"""
    save_io_budget: int | None = Field(default=None, ge=1)
    """bytes a second that background saves of a rank move at most, as in 500MB; none: any"""
    on_save_failure: OnFailure = OnFailure.RAISE
    """raise, warn or retry when a background save fails"""
    preemption_grace_s: float = Field(default=25.0, ge=0, allow_inf_nan=False)
    """seconds after SIGTERM or SIGUSR1 in which a last save must be done"""
    max_shard_size: int = Field(default=5 * 10**9, ge=1)
    """bytes a file, or as in 500MB or 2GiB"""
    compression: CompressionLevel = CompressionLevel.OFF
    """off: every checkpoint stands alone; auto, aggressive: lossless deltas where they pay"""
    compress_anchors: bool = False
    """those that stand alone are coded, too, and transformers cannot read them"""
    reanchor_interval: int | None = Field(default=None, ge=1)
    """every so many saves one that stands alone; none: when it is cheaper"""
    resume_from_checkpoint: bool | str = False
    """true: go on from the latest checkpoint if there is one; or a ref or path"""
    load_best_model_at_end: bool = False
    """leave the trainer with the weights of the best checkpoint"""
    metric_for_best_model: str | None = None
    """by default eval_loss, or loss where nothing is evaluated"""
    greater_is_better: bool | None = None
    """by default true unless the metric's name ends in loss"""

    pipeline_schedule: PipelineSchedule = PipelineSchedule.ONE_F_ONE_B
    """PipelineTrainer: 1f1b or gpipe"""
    pipeline_microbatches: int | None = Field(default=None, ge=1)
    """PipelineTrainer: parts that a batch is cut into; none: as many as stages"""

    dispatch_batches: bool = False
    """rank 0 reads the data and sends each rank its batch"""
    dataloader_num_workers: int = Field(default=0, ge=0)
    """processes a rank that read ahead"""

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(error) from error

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: object) -> Self:
        """The settings of a YAML file; keyword arguments go before it.

        Raises:
            ConfigError: the file is no plain mapping of settings, or a setting is wrong.
        """
        return cls(**{**read_settings(path), **overrides})

    @classmethod
    def from_args(cls, argv: Sequence[str] | None = None, **defaults: object) -> Self:
        """The settings of a command line: `--max-steps 10 --config run.yaml`.

        Every field is an option, with dashes or underscores. Options go before the file, the file
        before `defaults`. Exits with status 2 on an option that doesn't exist.

        Raises:
            ConfigError: a value is wrong.
        """
        settings, _ = cls.parse(argv, argparse.ArgumentParser(), **defaults)
        return settings

    @classmethod
    def parse(
        cls, argv: Sequence[str] | None, parser: argparse.ArgumentParser, **defaults: object
    ) -> tuple[Self, argparse.Namespace]:
        """As `from_args`, for a parser that has options of its own; returns these too.

        Raises:
            ConfigError: a value is wrong.
        """
        _add_options(cls, parser, defaults)
        found = vars(parser.parse_args(argv))
        config = found.pop("config", None)
        given = {name: found.pop(name) for name in cls.model_fields if name in found}
        options = {name: _from_text(cls, name, text) for name, text in given.items()}
        from_file = read_settings(config) if config is not None else {}
        return cls(**{**defaults, **from_file, **options}), argparse.Namespace(**found)

    @property
    def evaluation_steps(self) -> int:
        """Steps between evaluations; 0: none."""
        return self.logging_steps if self.eval_steps is None else self.eval_steps

    @property
    def tracks_best(self) -> bool:
        """Whether any setting needs to know the best checkpoint."""
        return (
            self.load_best_model_at_end
            or self.metric_for_best_model is not None
            or self.save_strategy is SaveStrategy.BEST
        )

    def metric_name(self, *, evaluates: bool) -> str:
        """The metric that decides which checkpoint is best."""
        return self.metric_for_best_model or ("eval_loss" if evaluates else "loss")

    @property
    def retention(self) -> Retention:
        """Which checkpoints are kept, as far as these arguments say it."""
        modes = {True: Mode.MAX, False: Mode.MIN, None: None}
        span = self.save_keep_for
        return Retention(
            keep_last=self.save_total_limit,
            keep_best=self.save_keep_best,
            metric=self.metric_name(evaluates=self.eval_strategy is not EvalStrategy.NO),
            mode=modes[self.greater_is_better],
            keep_every=self.save_keep_every,
            keep_for_s=None if span is None else parse_span(span, field="save_keep_for"),
        )

    def improves(self, value: float, best: float | None, *, metric: str) -> bool:
        """Whether `value` beats the best so far; NaN beats nothing."""
        if value != value:  # noqa: PLR0124 (NaN)
            return False
        greater = self.greater_is_better
        if greater is None:
            greater = not metric.endswith("loss")
        return best is None or (value > best if greater else value < best)

    @field_validator("save_strategy", "eval_strategy", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: object) -> object:
        return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _true_is_no_ref(cls, value: object) -> object:
        text = str(value).lower()
        return {"true": True, "false": False}.get(
            text, str(value) if isinstance(value, Path) else value
        )

    @field_validator("save_deferred", mode="before")
    @classmethod
    def _yes_is_true(cls, value: object) -> object:
        return str(value).lower() if isinstance(value, bool | str) else value

    @field_validator("max_shard_size", "save_staging_bytes", "save_io_budget", mode="before")
    @classmethod
    def _parse_size(cls, value: object) -> object:
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            return value
        unit = match[2].upper().removesuffix("B")
        return int(float(match[1]) * (_UNITS | _BINARY_UNITS)[unit])

    @field_validator("save_keep_for")
    @classmethod
    def _check_span(cls, value: str | None) -> str | None:
        if value is not None:
            parse_span(value, field="save_keep_for")
        return value

    @field_validator("branch")
    @classmethod
    def _check_branch(cls, value: str) -> str:
        return checked_name("branch", value)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.load_best_model_at_end and self.save_strategy is SaveStrategy.NO:
            raise ValueError("load_best_model_at_end needs a save_strategy other than no")
        if self.save_strategy is SaveStrategy.BEST and self.eval_strategy is EvalStrategy.NO:
            raise ValueError(
                "save_strategy best needs an eval_strategy: it saves after evaluations"
            )
        if self.eval_strategy is EvalStrategy.STEPS and not self.evaluation_steps:
            raise ValueError("eval_strategy steps needs eval_steps (logging_steps is 0)")
        return self


def _config_error(error: ValidationError) -> ConfigError:
    lines, names = [], []
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0]) if detail["loc"] else ""
        why = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, TrainingArguments.model_fields, n=1)
            why = "there is no such setting" + (f"; did you mean {near[0]}?" if near else "")
        if name not in names:
            names.append(name)
            lines.append(f"{name}: {why}" if name and len(error.errors()) > 1 else why)
    field = f"TrainingArguments.{names[0]}" if len(names) == 1 and names[0] else "TrainingArguments"
    return ConfigError(field=field, why="; ".join(lines))


def _add_options(
    cls: type[TrainingArguments], parser: argparse.ArgumentParser, defaults: Mapping[str, object]
) -> None:
    group = parser.add_argument_group("training arguments")
    group.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="a YAML file of these settings"
    )
    for name, field in cls.model_fields.items():
        default = defaults.get(name, field.default)
        about = f"{field.description} (default: {default})".replace("%", "%%")
        switch = {"nargs": "?", "const": "true"} if field.annotation in (bool, bool | str) else {}
        group.add_argument(
            *dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")),
            dest=name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=about,
            **switch,  # type: ignore[arg-type]
        )


def _from_text(cls: type[TrainingArguments], name: str, text: str) -> object:
    """An option's value; `none` where the field can be None."""
    return None if text.lower() == "none" and cls.model_fields[name].default is None else text
