"""Save reports as OpenTelemetry spans (docs/adr/0010-spans-after-the-fact.md)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from ckptcoord.errors import ConfigError
from ckptcoord.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.trace import TracerProvider

    from ckptcoord.dist.report import SaveReport

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def on_saved(tracer_provider: TracerProvider | None = None) -> Callable[[SaveReport], None]:
    """For `CoordinatorConfig(on_saved=...)`: one span for each save, with one for each phase of it.

    `ckptcoord.save` has the children `ckptcoord.save.stage`, `.write`, `.vote` and `.commit`, as
    far as the save came. Rank 0 alone sees the votes come in: on other ranks, `.vote` lasts until
    they know of the commit.

    Args:
        tracer_provider: of the application; by default the global one.

    Raises:
        ConfigError: opentelemetry-api is not installed.
    """
    try:
        from opentelemetry import trace
    except ModuleNotFoundError as error:
        raise ConfigError(
            field="ckptcoord.integrations.otel",
            why="needs opentelemetry-api, which is not installed",
            help="Run `pip install 'ckptcoord[otel]'`",
        ) from error
    tracer = trace.get_tracer("ckptcoord", VERSION, tracer_provider)

    def trace_save(report: SaveReport) -> None:
        called_ns = (report.called_at - _EPOCH) // timedelta(microseconds=1) * 1000

        def at(after_s: float) -> int:
            return called_ns + round(after_s * 1e9)

        failed = trace.Status(trace.StatusCode.ERROR, report.error)
        save = tracer.start_span(
            "ckptcoord.save", start_time=called_ns, attributes=_attributes(report)
        )
        inside = trace.set_span_in_context(save)
        for phase in _phases(report):
            name = f"ckptcoord.save.{phase.name}"
            span = tracer.start_span(name, context=inside, start_time=at(phase.begin_s))
            if not phase.done:
                span.set_status(failed)
            span.end(at(phase.end_s))
        if not report.ok:
            save.set_status(failed)
        save.end(at(report.total_s))

    return trace_save


class _Phase(NamedTuple):
    name: str
    begin_s: float
    end_s: float
    done: bool = True


def _phases(report: SaveReport) -> Iterator[_Phase]:
    """Those that began; one that a failed save did not finish ends with it."""
    if report.staged_s is not None:
        yield _Phase("stage", 0.0, report.staged_s)
    voted_s = report.committed_s if report.voted_s is None else report.voted_s
    for name, begin_s, end_s in (
        ("write", report.opened_s, report.written_s),
        ("vote", report.written_s, voted_s),
        ("commit", report.voted_s, report.committed_s),
    ):
        if begin_s is not None and end_s is not None:
            yield _Phase(name, begin_s, end_s)
        elif begin_s is not None and not report.ok:
            yield _Phase(name, begin_s, report.total_s, done=False)


def _attributes(report: SaveReport) -> dict[str, str | int | float | bool]:
    """By OpenTelemetry's naming; sizes are bytes, durations seconds; what is not known is left out.

    https://opentelemetry.io/docs/specs/semconv/general/naming/
    """
    known = {
        "ckptcoord.checkpoint.id": report.checkpoint_id or None,
        "ckptcoord.checkpoint.path": report.path or None,
        "ckptcoord.checkpoint.step": report.step if report.checkpoint_id else None,
        "ckptcoord.checkpoint.size": report.size_bytes or None,
        "ckptcoord.checkpoint.stored_size": report.stored_bytes or None,
        "ckptcoord.rank": report.rank,
        "ckptcoord.save.background": report.background,
        "ckptcoord.save.queue_depth": report.queue_depth,
        "ckptcoord.save.stall_duration": report.stall_s,
        "ckptcoord.save.wait_duration": report.waited_s,
        "ckptcoord.save.slowest_rank": report.slowest.rank if report.slowest else None,
        "ckptcoord.save.slowest_write_duration": report.slowest.write_s if report.slowest else None,
        "error.type": None if report.ok else report.error.partition(":")[0],
    }
    return {name: value for name, value in known.items() if value is not None}
