from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.cli.text import (
    Painter,
    Style,
    aligned,
    bytes_text,
    clipped,
    metrics_text,
    printable,
    ratio_text,
    seconds_text,
    when,
)

NOW = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)


@settings(max_examples=200)
@given(st.text())
def test_nothing_printable_moves_the_cursor(text: str) -> None:
    shown = printable(text)

    assert shown.isprintable()
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\r", r"a\nb\r"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egpj", r"\u202egpj"),
        ("\ud800", r"\ud800"),
        ("größe 模型", "größe 模型"),
    ],
)
def test_control_characters_are_written_out(raw: str, shown: str) -> None:
    assert printable(raw) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0.0 ms"),
        (0.00044, "0.4 ms"),
        (0.00996, "10 ms"),
        (0.0123, "12 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (12.345, "12.35 s"),
        (99.994, "99.99 s"),
        (99.996, "100 s"),
        (1e9, "1,000,000,000 s"),
    ],
)
def test_seconds_have_few_digits(seconds: float, shown: str) -> None:
    assert seconds_text(seconds) == shown


def test_a_ratio_with_nothing_stored_is_a_dash() -> None:
    assert (ratio_text(3, 2), ratio_text(3, 0)) == ("1.50", "-")


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (3 * 1024**3 // 2, "1.5 GiB"),
        (1 << 60, "1.0 EiB"),
    ],
)
def test_sizes_have_binary_units(size: int, shown: str) -> None:
    assert bytes_text(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "just now"),
        (-30, "just now"),
        (-3600, "in the future"),
        (1, "1 second ago"),
        (59, "59 seconds ago"),
        (3 * 3600 + 5, "3 hours ago"),
        (86400, "1 day ago"),
        (15 * 86400, "2 weeks ago"),
        (400 * 86400, "1 year ago"),
    ],
)
def test_times_are_relative_and_utc(seconds: int, shown: str) -> None:
    text = when((NOW - timedelta(seconds=seconds)).isoformat(), NOW)

    assert text.startswith(f"{shown} (")
    assert text.endswith(" UTC)")


def test_a_time_that_is_none_is_shown_as_it_stands() -> None:
    assert when("9999-99-99\x1b", NOW) == r"9999-99-99\x1b"
    assert when("0001-01-01T00:00:00+23:00", NOW) == "0001-01-01T00:00:00+23:00"


def test_metrics_come_by_name_and_are_escaped() -> None:
    assert metrics_text({"b\n": 1e-7, "a": 2.0}) == r"a 2, b\n 1e-07"


def test_a_cut_text_says_so() -> None:
    assert clipped("abcdef", 6) == "abcdef"
    assert clipped("abcdefg", 6) == "abc..."


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned([("a", "1", "x"), ("bcd", "22", "yy")], right=frozenset({1})) == [
        ["a  ", " 1", "x"],
        ["bcd", "22", "yy"],
    ]
    assert aligned([]) == []


def test_a_painter_without_colours_changes_nothing() -> None:
    assert Painter(enabled=False)("x", Style.RED) == "x"
    assert Painter(enabled=True)("x", Style.BOLD, Style.RED) == "\x1b[1;31mx\x1b[0m"
    assert Painter(enabled=True)("", Style.RED) == ""
