"""Save reports as spans, seen by the SDK's exporter."""

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from ckptcoord.dist.report import SaveReport, Slowest
from ckptcoord.errors import ConfigError
from ckptcoord.integrations import otel
from ckptcoord.version import VERSION

CALLED_NS = 1_770_091_506_123_457_000
REPORT = SaveReport(
    checkpoint_id="checkpoint-70",
    path="checkpoint-70",
    step=70,
    ok=True,
    background=True,
    called_at=datetime(2026, 2, 3, 4, 5, 6, 123457, tzinfo=UTC),
    stall_s=0.25,
    waited_s=0.125,
    staged_s=0.75,
    opened_s=0.5,
    written_s=1.0,
    voted_s=1.5,
    committed_s=2.0,
    total_s=2.25,
    size_bytes=30,
    stored_bytes=20,
    queue_depth=2,
    rank=0,
    slowest=Slowest(3, 0.5),
)


@pytest.fixture
def spans():
    """Trace a report; returns the spans by their name."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not there")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def trace(report):
        exporter.clear()
        otel.on_saved(provider)(report)
        finished = exporter.get_finished_spans()
        by_name = {span.name: span for span in finished}
        assert len(by_name) == len(finished)
        return by_name

    yield trace
    provider.shutdown()


def times(spans):
    """When each phase began and ended, in seconds after the call."""
    return {
        name.removeprefix("ckptcoord.save."): (
            (span.start_time - CALLED_NS) / 1e9,
            (span.end_time - CALLED_NS) / 1e9,
        )
        for name, span in spans.items()
        if name != "ckptcoord.save"
    }


def errors(spans):
    return {name for name, span in spans.items() if not span.status.is_ok}


def test_a_save_is_a_span_and_its_phases_are_its_children(spans) -> None:
    found = spans(REPORT)

    save = found["ckptcoord.save"]
    assert (save.start_time, save.end_time) == (CALLED_NS, CALLED_NS + 2_250_000_000)
    assert save.parent is None
    assert times(found) == {
        "stage": (0.0, 0.75),
        "write": (0.5, 1.0),
        "vote": (1.0, 1.5),
        "commit": (1.5, 2.0),
    }
    for name, span in found.items():
        assert span.context.trace_id == save.context.trace_id
        assert name == "ckptcoord.save" or span.parent.span_id == save.context.span_id
    assert errors(found) == set()
    assert save.instrumentation_scope.name == "ckptcoord"
    assert save.instrumentation_scope.version == VERSION


def test_the_span_has_the_report_as_attributes(spans) -> None:
    assert dict(spans(REPORT)["ckptcoord.save"].attributes) == {
        "ckptcoord.checkpoint.id": "checkpoint-70",
        "ckptcoord.checkpoint.path": "checkpoint-70",
        "ckptcoord.checkpoint.step": 70,
        "ckptcoord.checkpoint.size": 30,
        "ckptcoord.checkpoint.stored_size": 20,
        "ckptcoord.rank": 0,
        "ckptcoord.save.background": True,
        "ckptcoord.save.queue_depth": 2,
        "ckptcoord.save.stall_duration": 0.25,
        "ckptcoord.save.wait_duration": 0.125,
        "ckptcoord.save.slowest_rank": 3,
        "ckptcoord.save.slowest_write_duration": 0.5,
    }


def test_a_rank_that_does_not_see_the_votes_waits_for_the_commit(spans) -> None:
    assert times(spans(replace(REPORT, rank=1, staged_s=None, voted_s=None))) == {
        "write": (0.5, 1.0),
        "vote": (1.0, 2.0),
    }


@pytest.mark.parametrize(
    ("last", "phase", "began"), [("opened_s", "write", 0.5), ("written_s", "vote", 1.0)]
)
def test_a_failed_save_ends_in_the_phase_that_failed(spans, last, phase, began) -> None:
    points = ("opened_s", "written_s", "voted_s", "committed_s")
    lost = dict.fromkeys(points[points.index(last) + 1 :])
    error = "StorageFullError: no space: none"
    report = replace(REPORT, ok=False, error=error, path="", slowest=None, **lost)

    found = spans(report)

    assert times(found)[phase] == (began, 2.25)
    assert errors(found) == {"ckptcoord.save", f"ckptcoord.save.{phase}"}
    save = found["ckptcoord.save"]
    assert save.status.description == error
    assert save.attributes["error.type"] == "StorageFullError"
    assert "ckptcoord.checkpoint.path" not in save.attributes


def test_a_save_that_never_opened_is_one_span(spans) -> None:
    lost = dict.fromkeys(("staged_s", "opened_s", "written_s", "voted_s", "committed_s"))

    assert spans(replace(REPORT, ok=False, error="CkptError: x", **lost)).keys() == {
        "ckptcoord.save"
    }


def test_a_request_that_named_no_checkpoint_has_neither_its_id_nor_its_step(spans) -> None:
    lost = dict.fromkeys(("staged_s", "opened_s", "written_s", "voted_s", "committed_s"))
    wrong = replace(REPORT, ok=False, error="ConfigError: x", checkpoint_id="", step=-1, **lost)

    attributes = spans(wrong)["ckptcoord.save"].attributes

    assert attributes.keys().isdisjoint({"ckptcoord.checkpoint.id", "ckptcoord.checkpoint.step"})


def test_a_save_within_another_span_is_its_child(spans) -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    with trace.TracerProvider().get_tracer("app").start_as_current_span("step") as step:
        save = spans(REPORT)["ckptcoord.save"]

    assert save.parent.span_id == step.get_span_context().span_id


def test_without_the_package_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)

    with pytest.raises(ConfigError, match=r"pip install 'ckptcoord\[otel\]'"):
        otel.on_saved()


def test_an_import_does_not_wait_for_opentelemetry_or_torch() -> None:
    program = (
        "import sys, ckptcoord.integrations.otel, ckptcoord.integrations.tensorboard\n"
        "print({'torch', 'opentelemetry', 'tensorboard'} & set(sys.modules))"
    )

    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert run.stdout == "set()\n"
