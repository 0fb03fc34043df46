"""Saved on any layout, loaded on any: the whole state, and the losses that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.distributed.layouts import LAYOUTS, TOLERANCE, matrix, table

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.dist


def test_every_layout_loads_what_every_other_saved_and_trains_on_as_it_would_have(
    tmp_path: Path,
) -> None:
    names = list(LAYOUTS)[:3]  # scripts/sweep layouts: all of them
    found = matrix(tmp_path, names, seed=5)
    assert len(found) == 9
    assert all(found[name, name] == 0 for name in names)
    assert max(found.values()) < TOLERANCE
    assert table(found).count("\n") == 5
