"""What docs/pipeline.md shows runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from ckptcoord import TrainingArguments

if TYPE_CHECKING:
    import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "pipeline.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_its_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "pipeline.md", "exec"), scope)
    exported = load_file(tmp_path / "runs/pipe-model/model.safetensors")
    assert len(exported) == 16
    assert scope["TestMyTrainer"].nproc == 4


def test_it_names_arguments_that_there_are_with_their_defaults() -> None:
    for name, default in re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", PAGE, flags=re.MULTILINE):
        if name not in TrainingArguments.model_fields:
            continue
        value = TrainingArguments.model_fields[name].default
        assert default == ("as many as stages" if value is None else str(value))
