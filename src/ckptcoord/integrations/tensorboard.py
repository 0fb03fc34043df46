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
    """For `CoordinatorConfig(on_saved=...)`: the scalars of each save, at its step."""

    def write(report: SaveReport) -> None:
        for name, value in report.scalars().items():
            writer.add_scalar(name, value, report.step)

    return write
