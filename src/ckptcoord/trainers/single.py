"""Trainer: one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.trainers.base import BaseTrainer

if TYPE_CHECKING:
    from collections.abc import Mapping


class Trainer(BaseTrainer):
    """Trains in one process, on one GPU where there is one. Its model also loads on any number."""

    def get_state_components(self) -> list[StateComponent]:
        """One copy of everything."""
        return self._standard_components(SharingPattern.GLOBAL, SharingPattern.GLOBAL)

    def get_process_groups(self) -> Mapping[str, object]:
        """None."""
        return {}
