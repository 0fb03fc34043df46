"""The arguments that docs/pipeline.md names."""

from __future__ import annotations

import re
from pathlib import Path

from ckptcoord import TrainingArguments

PAGE = (Path(__file__).parents[3] / "docs" / "pipeline.md").read_text()


def test_it_names_arguments_that_there_are_with_their_defaults() -> None:
    for name, default in re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", PAGE, flags=re.MULTILINE):
        if name not in TrainingArguments.model_fields:
            continue
        value = TrainingArguments.model_fields[name].default
        assert default == ("as many as stages" if value is None else str(value))
