"""For tests, users' own too: stores that fail on purpose, and the laws that any store must pass.

`StoreSuite` needs pytest, so it is reached by its module: `ckptcoord.testing.suite`.
"""

from __future__ import annotations

from ckptcoord.store.memory import MemoryStore
from ckptcoord.testing.faulty import FaultyStore, Operation, SimulatedCrash

__all__ = ["FaultyStore", "MemoryStore", "Operation", "SimulatedCrash"]
