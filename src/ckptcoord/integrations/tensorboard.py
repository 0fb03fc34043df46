"""Save reports as TensorBoard scalars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptcoord.dist.report import SaveReport


class ScalarWriter(Protocol):
    """What of `torch.utils.tensorboard.SummaryWriter` is used; others have it, too."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Take one value of a step."""
        ...


def on_saved(writer: ScalarWriter) -> Callable[[SaveReport], None]:
    """For `CoordinatorConfig(on_saved=...)`: the scalars of each save that has a step, at that."""

    def write(report: SaveReport) -> None:
        if not report.checkpoint_id:
            return
        for name, value in report.scalars().items():
            writer.add_scalar(name, value, report.step)

    return write
