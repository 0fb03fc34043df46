"""What the migration page shows of systems that cannot be in the tests' own requirements."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.unit.docs.runner import ROOT

if TYPE_CHECKING:
    from pathlib import Path

PAGE = (ROOT / "docs" / "migration.md").read_text()
SETTING = """
import torch

torch.manual_seed(0)
steps = 10
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())


def train_step():
    loss = model(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


"""


def test_gradient_desc_runs_as_shown_and_what_it_saves_is_imported(
    tmp_path: Path, commands: Path
) -> None:
    pytest.importorskip("gradient", reason="pip install --no-deps gradient-desc==0.1.17")
    shown = r"<!-- run apart: gradient-desc -->\n```python\n(.*?)```"
    (block,) = re.findall(shown, PAGE, re.DOTALL)
    for command in (
        [commands / "python", "-c", SETTING + block],
        [commands / "ckptcoord", "import", "ml/run", "--repo", "runs/gpt"],
        [commands / "ckptcoord", "show", "exp@5", "--repo", "runs/gpt"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
