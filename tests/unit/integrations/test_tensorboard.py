"""Save reports as scalars."""

from datetime import UTC, datetime

from ckptcoord.dist.report import SaveReport
from ckptcoord.integrations import tensorboard


class Writer:
    """Keeps what it is given, by TensorBoard's own names."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, float, int]] = []

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None):
        assert walltime is None
        self.taken.append((tag, scalar_value, global_step))


def test_each_scalar_of_a_report_is_written_at_its_step() -> None:
    report = SaveReport(
        checkpoint_id="checkpoint-70",
        step=70,
        ok=True,
        background=True,
        called_at=datetime(2026, 2, 3, tzinfo=UTC),
        stall_s=0.25,
        committed_s=1.0,
        total_s=1.5,
        size_bytes=30,
        stored_bytes=20,
        rank=0,
    )
    writer = Writer()

    tensorboard.on_saved(writer)(report)

    assert writer.taken == [(name, value, 70) for name, value in report.scalars().items()]
    assert ("ckptcoord/stall_s", 0.25, 70) in writer.taken
    assert ("ckptcoord/ratio", 1.5, 70) in writer.taken
