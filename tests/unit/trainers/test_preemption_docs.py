"""What docs/preemption.md says is so: its table of arguments, its commands, its Slurm script."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from ckptcoord.trainers.arguments import TrainingArguments

PAGE = (Path(__file__).parents[3] / "docs" / "preemption.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
FAKES = {
    "srun": """trap 'exit "$STOPPED_CODE"' TERM
        echo $$ > "$FOLDER/draft"; mv "$FOLDER/draft" "$FOLDER/pid"
        [ -z "$CODE" ] || exit "$CODE"
        while :; do sleep 0.02; done""",
    "scancel": 'echo "$@" > "$FOLDER/scancelled"; kill -TERM "$(cat "$FOLDER/pid")"',
    "scontrol": '[ "$1" = show ] && echo here || echo "$@" > "$FOLDER/$1d"',
}


def test_the_table_has_every_argument_and_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `?(\w+)`? \|", PAGE, re.MULTILINE)
    given = {name: str(TrainingArguments.model_fields[name].default).lower() for name, _ in rows}
    assert given == {name: text if text != "25" else "25.0" for name, text in rows}
    assert len(given) == 7


@pytest.mark.parametrize("block", BLOCKS)
def test_torchrun_and_the_trainer_know_every_option(block: str) -> None:
    command = block.replace("\\\n", " ").partition("torchrun ")[2].splitlines()[0]
    words = shlex.split(command.removesuffix("&").replace("$SLURM_NNODES", "2"))
    parsed = get_args_parser().parse_args(words)
    assert parsed.training_script == "train.py"
    args = TrainingArguments.from_args(parsed.training_script_args)
    assert args.resume_from_checkpoint is True
    assert args.preemption_grace_s + 5 == float(parsed.shutdown_timeout or 30)


@pytest.mark.parametrize(
    ("signalled", "code", "requeued"),
    [(True, 1, True), (True, 0, False), (False, 0, False), (False, 2, False)],
    ids=["stopped", "stopped at the end", "done", "failed"],
)
def test_the_slurm_script_requeues_what_a_signal_stopped_and_nothing_else(
    tmp_path: Path, *, signalled: bool, code: int, requeued: bool
) -> None:
    for name, body in FAKES.items():
        fake = tmp_path / name
        fake.write_text(f"#!/bin/bash\n{body}\n")
        fake.chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(BLOCKS[-1])
    known = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",  # noqa: TID251 (for bash)
        "FOLDER": str(tmp_path),
        "STOPPED_CODE": str(code),
        "CODE": "" if signalled else str(code),
        "SLURM_JOB_ID": "17",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "here",
    }
    with subprocess.Popen(["bash", str(script)], env=known) as job:
        until_s = time.monotonic() + 30.0
        while not (tmp_path / "pid").exists():
            assert time.monotonic() < until_s
            time.sleep(0.01)
        if signalled:
            job.send_signal(signal.SIGUSR1)
        assert job.wait(30.0) == code
    assert (tmp_path / "requeued").exists() == requeued
    if signalled:
        assert (tmp_path / "scancelled").read_text() == "--signal=TERM 17\n"
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"
