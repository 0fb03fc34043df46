from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ckptcoord.errors import ConfigError
from ckptcoord.trainers.arguments import (
    Deferral,
    EvalStrategy,
    SaveStrategy,
    SchedulerType,
    TrainingArguments,
)


def test_python_yaml_and_command_line_give_the_same_settings(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 7\nlearning_rate: 1e-3\nsave_strategy: no\neval_strategy: no\n")
    wanted = TrainingArguments(max_steps=7, learning_rate=1e-3, save_strategy=SaveStrategy.NO)
    argv = ["--max-steps", "7", "--learning_rate", "1e-3", "--save-strategy", "no"]
    assert TrainingArguments.from_yaml(file) == wanted
    assert TrainingArguments.from_args(argv) == wanted
    assert TrainingArguments.from_args(["--config", str(file)]) == wanted


def test_options_go_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 2\nsave_steps: 2\n")
    args = TrainingArguments.from_args(
        ["--config", str(file), "--max-steps", "3"], max_steps=1, save_steps=1, logging_steps=1
    )
    assert (args.max_steps, args.save_steps, args.logging_steps) == (3, 2, 1)
    assert TrainingArguments.from_yaml(file, max_steps=9).max_steps == 9


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], False),
        (["--resume-from-checkpoint"], True),
        (["--resume-from-checkpoint", "true"], True),
        (["--resume-from-checkpoint", "False"], False),
        (["--resume-from-checkpoint", "main@5"], "main@5"),
    ],
)
def test_resume_takes_a_switch_or_a_ref(argv: list[str], value: Any) -> None:
    assert TrainingArguments.from_args(argv).resume_from_checkpoint == value


def test_a_path_to_resume_from_becomes_text() -> None:
    args = TrainingArguments(resume_from_checkpoint=Path("run/checkpoint-5"))
    assert args.resume_from_checkpoint == "run/checkpoint-5"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("8", 8),
        ("500MB", 500 * 10**6),
        ("2GiB", 2 << 30),
        ("1.5 kb", 1500),
        ("3T", 3 * 10**12),
    ],
)
def test_sizes_have_units(text: Any, size: int) -> None:
    assert TrainingArguments(max_shard_size=text).max_shard_size == size


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("auto", "auto"), ("TRUE", True), ("false", False), (True, True), (False, False)],
)
def test_deferral_is_auto_or_yes_or_no(given: Any, wanted: Any) -> None:
    assert TrainingArguments(save_deferred=given).save_deferred.setting == wanted


def test_how_to_save_in_the_background_from_a_command_line() -> None:
    args = TrainingArguments.from_args(
        [
            *("--background-saves", "false", "--save-deferred", "true"),
            *("--save-io-budget", "200MB", "--save-staging-bytes", "2GiB"),
            *("--on-save-failure", "warn"),
        ]
    )
    assert not args.background_saves
    assert args.save_deferred is Deferral.TRUE
    assert (args.save_io_budget, args.save_staging_bytes) == (200 * 10**6, 2 << 30)
    assert args.on_save_failure == "warn"


def test_none_on_the_command_line_is_none_where_a_field_can_be() -> None:
    args = TrainingArguments.from_args(
        ["--save-total-limit", "none", "--run-name", "none"], save_total_limit=3
    )
    assert args.save_total_limit is None
    assert args.run_name == "none"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_step": 1}, r"TrainingArguments\.max_step: .*did you mean max_steps"),
        ({"zzzzzz": 1}, r"there is no such setting$"),
        ({"max_steps": "many"}, r"TrainingArguments\.max_steps: .*integer"),
        ({"max_steps": -2}, "greater than or equal to -1"),
        ({"save_strategy": "often"}, "'no', 'steps', 'epoch', 'best' or 'adaptive'"),
        ({"max_save_overhead": 1}, "less than 1"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"max_shard_size": "5 parsecs"}, "max_shard_size"),
        ({"branch": "../x"}, "branch"),
        ({"seed": -1}, "seed"),
        ({"save_deferred": "often"}, "'auto', 'true' or 'false'"),
        ({"save_deferred": 1}, "save_deferred"),
        ({"on_save_failure": "cry"}, "'raise', 'warn' or 'retry'"),
        ({"save_queue_depth": 0}, "save_queue_depth"),
        ({"save_io_budget": "fast"}, "save_io_budget"),
        ({"preemption_grace_s": float("inf")}, "finite"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "needs a save_strategy"),
        ({"save_strategy": "best"}, "needs an eval_strategy"),
        ({"eval_strategy": "steps", "logging_steps": 0}, "needs eval_steps"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingArguments(**values)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"seed: .*; max_steps: .*; nonsense: "):
        TrainingArguments(max_steps=-7, seed=-1, nonsense=0)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        TrainingArguments().max_steps = 3  # type: ignore[misc]


def test_help_lists_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        TrainingArguments.from_args(["--help"], max_steps=77)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in TrainingArguments.model_fields:
        assert f"--{name.replace('_', '-')} " in text
    assert "(default: 77)" in text
    assert "--config FILE" in text


def test_every_field_says_what_it_is() -> None:
    assert all(field.description for field in TrainingArguments.model_fields.values())


def test_an_unknown_option_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        TrainingArguments.from_args(["--max-stepz", "3"])
    assert stop.value.code == 2
    assert "--max-stepz" in capsys.readouterr().err


def test_a_script_keeps_options_of_its_own() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=4)
    args, own = TrainingArguments.parse(["--width", "5", "--seed", "6"], parser)
    assert (args.seed, own.width, vars(own)) == (6, 5, {"width": 5})


BOMB = "a: &a [x]\n" + "".join(f"k{i}: *a\n" for i in range(70))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 1\nmax_steps: 2\n", "has 'max_steps' twice"),
        (BOMB, "beyond reason"),
        ("a: " + "[" * 40 + "]" * 40, "beyond reason"),
        ("a: " + "[" * 50_000, "beyond reason"),
        ("- 1\n- 2\n", "no mapping"),
        ("1: 2\n", "no mapping"),
        ("a: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("a: b: c\n", "is not YAML"),
        ("a: 2001-99-99\n", "is not YAML"),
        ("# " + "x" * (1 << 20), "is larger than"),
        ("max_stepz: 1\n", "did you mean max_steps"),
    ],
)
def test_a_file_that_is_no_plain_mapping_of_settings_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TrainingArguments.from_yaml(file)


def test_bytes_that_are_no_text_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match="is not YAML"):
        TrainingArguments.from_yaml(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        TrainingArguments.from_yaml(tmp_path / "absent.yaml")


def test_an_empty_file_changes_nothing_and_few_aliases_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("")
    assert TrainingArguments.from_yaml(file) == TrainingArguments()
    file.write_text("max_steps: &n 5\nsave_steps: *n\n")
    assert TrainingArguments.from_yaml(file).save_steps == 5


@pytest.mark.parametrize(
    ("settings", "metric", "value", "best", "better"),
    [
        ({}, "eval_loss", 1.0, None, True),
        ({}, "eval_loss", 1.0, 1.0, False),
        ({}, "eval_loss", 0.0, 1.0, True),
        ({}, "eval_loss", -0.5, 0.0, True),
        ({}, "accuracy", 0.0, 1.0, False),
        ({}, "accuracy", 1.0, 0.0, True),
        ({"greater_is_better": True}, "eval_loss", 2.0, 1.0, True),
        ({"greater_is_better": False}, "accuracy", 2.0, 1.0, False),
        ({}, "eval_loss", float("nan"), None, False),
        ({}, "eval_loss", float("nan"), 1.0, False),
    ],
)
def test_what_improves(
    settings: dict[str, Any], metric: str, value: float, best: float | None, better: bool
) -> None:
    assert TrainingArguments(**settings).improves(value, best, metric=metric) is better


def test_the_metric_follows_what_is_measured() -> None:
    args = TrainingArguments()
    assert args.metric_name(evaluates=True) == "eval_loss"
    assert args.metric_name(evaluates=False) == "loss"
    assert not args.tracks_best
    named = TrainingArguments(metric_for_best_model="acc")
    assert named.metric_name(evaluates=True) == "acc"
    assert named.tracks_best


def test_evaluations_come_as_often_as_logs_unless_told() -> None:
    assert TrainingArguments(logging_steps=4).evaluation_steps == 4
    assert TrainingArguments(logging_steps=4, eval_steps=3).evaluation_steps == 3


def test_words_are_the_enums_of_their_field() -> None:
    args = TrainingArguments(
        save_strategy="adaptive", eval_strategy="epoch", lr_scheduler_type="cosine"
    )
    assert args.save_strategy is SaveStrategy.ADAPTIVE
    assert args.eval_strategy is EvalStrategy.EPOCH
    assert args.lr_scheduler_type is SchedulerType.COSINE
