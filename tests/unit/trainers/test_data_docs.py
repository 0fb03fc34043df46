"""The examples of docs/data.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainers.tiny import Noisy, arguments, model

from ckptcoord.core.sharing import OnWorldSizeChange
from ckptcoord.trainers.foreign import ForeignLoader

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_every_example_runs_and_the_trainers_train(tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "data.md", "exec"), scope)
    assert len(BLOCKS) == 4
    for name in ("Mine", "Again"):
        trainer = scope[name](model(), arguments(tmp_path / name, max_steps=3), Noisy(8))
        trainer.train()
        trainer.close()
        if name == "Mine":
            assert isinstance(trainer.train_dataloader, ForeignLoader)
        else:
            changes = {one.key: one.on_world_size_change for one in trainer.get_state_components()}
            assert changes["dataset"] is OnWorldSizeChange.SKIP
