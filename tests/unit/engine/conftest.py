from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from ckptcoord.core.context import Variable

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny tensors gain nothing from threads; and nobody tells these runs what to do."""
    for name in Variable:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
