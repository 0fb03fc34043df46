from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ckptcoord import CheckpointCoordinator, CoordinatorConfig
from ckptcoord.testing.ranks import Outcomes, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ckptcoord.core.sharing import StateComponent


class Job:
    """A job of several ranks on one repository, each operation a fresh incarnation of it."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def run(
        self,
        size: int,
        components: Callable[[int], Sequence[StateComponent]],
        work: Callable[[CheckpointCoordinator, int], Any],
        *,
        groups: Callable[[int], Mapping[str, object]] = lambda _: {},
        **settings: Any,
    ) -> Outcomes[Any]:
        """Make a coordinator on each rank and give it to `work`."""
        settings.setdefault("timeout_s", 20.0)

        def one(world: Any) -> Any:
            with CheckpointCoordinator(
                components(world.rank),
                groups(world.rank),
                world,
                self.output_dir,
                config=CoordinatorConfig(**settings),
            ) as coordinator:
                return work(coordinator, world.rank)

        return run_ranks(size, one)

    def do(self, *args: Any, **settings: Any) -> list[Any]:
        """`run`, and what each rank returned; the first failure is raised."""
        return self.run(*args, **settings).values


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "run")
