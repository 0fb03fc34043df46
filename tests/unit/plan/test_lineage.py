"""The rule that decides at each save: an anchor, or a delta."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.errors import ConfigError
from ckptcoord.plan.lineage import (
    MAX_CHAIN,
    NO_COMPRESSION,
    BaseChoice,
    Compression,
    Past,
    base_place,
    why_anchor,
    why_delta,
)
from ckptcoord.repo import deltas

STAR = Compression(level=CompressionLevel.AUTO)
CHAIN = Compression(level=CompressionLevel.AUTO, base=BaseChoice.PREVIOUS, chain_below=1e9)
SMALL = Compression(level=CompressionLevel.AUTO, base=BaseChoice.PREVIOUS)
GIB = 1 << 30

SIZES = st.lists(st.integers(1, 2 * GIB), min_size=1, max_size=30)
PASTS = st.builds(Past, stored_bytes=SIZES, size_bytes=st.integers(0, GIB), is_fork=st.booleans())
RULES = st.builds(
    Compression,
    level=st.sampled_from(CompressionLevel),
    base=st.sampled_from(BaseChoice),
    reanchor_interval=st.none() | st.integers(1, 20),
    restore_budget=st.floats(1.0, 100.0),
    chain_below=st.floats(0.0, 2.0),
)


def past(*stored_bytes, size_bytes=1000, **more):
    return Past(stored_bytes=stored_bytes, size_bytes=size_bytes, **more)


# --- laws -----------------------------------------------------------------------------------------


@given(st.none() | PASTS)
def test_without_compression_every_save_is_an_anchor(before):
    assert why_anchor(NO_COMPRESSION, before)


@given(RULES)
def test_with_nothing_before_a_save_is_an_anchor(rule):
    assert why_anchor(rule, None)


@given(RULES, PASTS)
def test_every_save_has_a_reason_of_one_line(rule, before):
    reason = why_anchor(rule, before) or why_delta(rule, before)
    assert reason
    assert reason.isprintable()


@given(RULES, SIZES, st.integers(0, GIB))
def test_a_branchs_first_save_is_a_delta_against_where_it_begins(rule, stored_bytes, size_bytes):
    assume(rule.level is not CompressionLevel.OFF)
    assume(len(stored_bytes) <= MAX_CHAIN)
    before = Past(stored_bytes=stored_bytes, size_bytes=size_bytes, is_fork=True)
    assert why_anchor(rule, before) == ""
    assert "branch" in why_delta(rule, before)


@given(RULES, PASTS, st.integers(2, 1000))
def test_the_unit_of_size_decides_nothing(rule, before, scale):
    scaled = Past(
        stored_bytes=[scale * one for one in before.stored_bytes],
        size_bytes=scale * before.size_bytes,
        is_fork=before.is_fork,
    )
    assert bool(why_anchor(rule, before)) == bool(why_anchor(rule, scaled))


# --- how often ------------------------------------------------------------------------------------


def run(rule, delta_bytes, *, saves, size_bytes=GIB):
    """What each save stores when the k-th since its anchor would take `delta_bytes(k)`."""
    stored, all_stored = [size_bytes], [size_bytes]
    for _ in range(saves - 1):
        if why_anchor(rule, Past(stored_bytes=tuple(stored), size_bytes=size_bytes)):
            stored = [size_bytes]
        else:
            stored.append(delta_bytes(len(stored)))
        all_stored.append(stored[-1])
    return all_stored


def intervals(stored, size_bytes=GIB):
    """From each anchor to the next."""
    anchors = [at for at, nbytes in enumerate(stored) if nbytes == size_bytes]
    return [after - before for before, after in pairwise(anchors)]


@pytest.mark.parametrize("rule_base", BaseChoice)
@pytest.mark.parametrize("interval", [1, 2, 5, 7])
def test_an_interval_is_kept_whatever_deltas_cost(interval, rule_base):
    rule = Compression(level="auto", base=rule_base, reanchor_interval=interval, restore_budget=100)
    stored = run(rule, lambda k: GIB * min(k, 9) // 10, saves=40)
    assert set(intervals(stored)) == {interval}


# Steps from the anchor to the share of the state that a delta takes (FINDINGS of real training).
CURVE = ((1, 0.61), (10, 0.69), (20, 0.71), (30, 0.72), (40, 0.73), (100, 0.75))


def measured(steps):
    """The size of a delta `steps` steps from its anchor."""
    for (x0, y0), (x1, y1) in pairwise(CURVE):
        if steps <= x1:
            return int(GIB * (y0 + (y1 - y0) * (steps - x0) / (x1 - x0)))
    return int(GIB * CURVE[-1][1])


@pytest.mark.parametrize("gap", [1, 2, 5, 10, 50])
@pytest.mark.parametrize("jitter", [0.0, 0.01])
def test_on_measured_growth_the_rule_costs_what_the_best_interval_does(gap, jitter):
    def delta_bytes(k):
        wave = math.sin(12.9898 * k)  # no trend
        return int(measured(gap * k) * (1 + jitter * wave))

    stored = run(STAR, delta_bytes, saves=300)
    best = min((GIB + sum(map(delta_bytes, range(1, n)))) / n for n in range(1, 300))
    assert sum(stored) / len(stored) < 1.03 * best


@pytest.mark.parametrize(("gap", "expected"), [(1, 9), (5, 12)])
def test_on_measured_growth_a_new_anchor_comes_after_several_saves(gap, expected):
    stored = run(STAR, lambda k: measured(gap * k), saves=100)
    assert set(intervals(stored)) == {expected}


@given(st.integers(1, GIB // 2), st.integers(0, GIB // 8))
def test_of_deltas_that_grow_evenly_the_rule_costs_what_the_best_interval_does(first, growth):
    def delta_bytes(k):
        return first + growth * (k - 1)

    stored = run(STAR, delta_bytes, saves=200)
    best = min((GIB + sum(map(delta_bytes, range(1, n)))) / n for n in range(1, 200))
    cycle = intervals(stored)
    if cycle:
        mean = (GIB + sum(map(delta_bytes, range(1, cycle[0])))) / cycle[0]
        assert mean < 1.03 * best


def test_deltas_that_do_not_grow_need_no_new_anchor():
    assert intervals(run(STAR, lambda _: GIB // 2, saves=500)) == []


def test_a_jump_in_the_size_of_deltas_brings_an_anchor():
    assert why_anchor(STAR, past(1000, 100, 110)) == ""
    assert "mean" in why_anchor(STAR, past(1000, 100, 110, 500))


@pytest.mark.parametrize("rule", [STAR, CHAIN])
def test_a_delta_that_hardly_pays_brings_an_anchor(rule):
    assert "hardly" in why_anchor(rule, past(1000, 950))
    assert "hardly less than its anchor's 1000" in why_anchor(rule, past(1000, 1000))
    assert why_anchor(rule, past(1000, 700)) == ""


@pytest.mark.parametrize("rule", [STAR, CHAIN])
def test_a_delta_of_more_than_its_anchor_is_said_to_be_that(rule):
    """As after the first step of an optimizer, whose state came after the anchor."""
    grown = Past(stored_bytes=(1000, 1400), size_bytes=3000)
    assert why_anchor(rule, grown) == (
        "the last delta took 1400 bytes, more than its anchor's 1000; the state has 3000 by now"
    )


# --- the budget -----------------------------------------------------------------------------------


@given(PASTS, st.floats(1.0, 50.0))
def test_no_delta_is_expected_to_take_more_to_read_than_the_budget(before, budget):
    rule = Compression(level="auto", base="previous", restore_budget=budget)
    assume(not before.is_fork and len(before.stored_bytes) > 1)
    if not why_anchor(rule, before):
        path = places(rule, before)
        assert path[-1] == 0
        read = sum(before.stored_bytes[place] for place in path) + before.stored_bytes[-1]
        assert read <= budget * before.size_bytes


def test_a_chain_ends_where_reading_it_passes_the_budget():
    # Each delta is half of the state. The 7th is read with those at 6 and 4.
    rule = Compression(level="auto", base="previous", restore_budget=2.4, chain_below=1)
    assert set(intervals(run(rule, lambda _: GIB // 2, saves=50))) == {7}
    assert "restore" in why_anchor(rule, past(1000, *6 * [500]))
    assert why_anchor(rule, past(1000, *5 * [500])) == ""
    lossy = past(1000, *2 * [500], is_exact=False)
    assert "restore" in why_anchor(rule, lossy), "which is against each save before"


# --- what a delta is against ----------------------------------------------------------------------


def places(rule, before):
    """Of what a restore of the next delta reads beside that, newest first."""
    found, here = [], before
    while not found or found[-1]:
        found.append(base_place(rule, here))
        here = replace(before, stored_bytes=before.stored_bytes[: found[-1]])
    return found


@given(PASTS)
def test_a_star_has_its_anchor_and_a_lossy_chain_the_save_before(before):
    assert base_place(STAR, before) == 0
    lossy = replace(before, is_exact=False)
    assert places(CHAIN, lossy) == list(range(len(before.stored_bytes)))[::-1]


@given(PASTS)
def test_an_exact_chain_is_read_in_as_many_deltas_as_its_length_has_bits(before):
    number = len(before.stored_bytes)
    assert len(places(CHAIN, before)) == number.bit_count()


@given(PASTS, st.floats(0, 2))
def test_what_a_delta_is_against_is_what_the_save_before_stands_on(before, below):
    """So that it needs no checkpoint that is not needed anyway."""
    number = len(before.stored_bytes)
    assume(number > 1)
    rule = replace(CHAIN, chain_below=below)
    last = replace(before, stored_bytes=before.stored_bytes[:-1])
    assert base_place(rule, before) in {number - 1, *places(rule, last)}


@given(PASTS, st.floats(0, 2))
def test_a_chain_goes_through_small_deltas_only(before, below):
    *through, anchor = places(replace(CHAIN, chain_below=below), before)
    assert anchor == 0
    limit = below * before.stored_bytes[0]
    assert all(before.stored_bytes[place] < limit for place in through)


def test_a_chain_goes_past_deltas_of_a_quarter_of_their_anchor():
    assert base_place(SMALL, past(1000, 1, 249)) == 2
    assert base_place(SMALL, past(1000, 1, 250)) == 0
    assert places(SMALL, past(1000, 1, 1, 1, 100, 1, 100)) == [6, 4, 0]
    assert places(SMALL, past(1000, 1, 1, 1, 100, 1, 400)) == [4, 0]
    assert places(SMALL, past(1000, 1, 1, 1, 400, 1, 100)) == [6, 0]
    dense = past(1000, *9 * [400])
    assert places(SMALL, dense) == [0]
    assert places(SMALL, replace(dense, is_exact=False)) == list(range(10))[::-1]


def test_a_chain_of_large_deltas_is_a_star_and_ends_as_one():
    grows = (1000, 400, 500, 600, 700)
    assert "mean" in why_anchor(STAR, past(*grows))
    assert "mean" in why_anchor(SMALL, past(*grows))
    assert why_anchor(CHAIN, past(*grows)) == ""


def test_a_star_reads_its_anchor_and_one_delta():
    rule = Compression(level="auto", restore_budget=1.5)
    assert why_anchor(rule, past(1000, 400, 400, 400, 400)) == ""
    assert "restore" in why_anchor(rule, past(1000, 600))


def test_a_chains_deltas_are_not_held_to_their_mean():
    assert why_anchor(CHAIN, past(1000, 100, 900)) == ""


# --- reasons --------------------------------------------------------------------------------------


def test_the_first_delta_says_so():
    assert why_delta(STAR, past(1000)) == "the first after an anchor"


@example(CHAIN, past(1000, 100, 900))
@example(Compression(level="auto", reanchor_interval=9), past(1000, 100, 900))
@given(RULES, PASTS)
def test_a_delta_claims_to_be_below_the_mean_only_where_it_is(rule, before):
    assume(not why_anchor(rule, before))
    if "under" in why_delta(rule, before):
        last = before.stored_bytes[-2:]
        growth = max(0, last[1] - last[0]) if len(before.stored_bytes) > 2 else 0
        assert last[-1] + growth < sum(before.stored_bytes) / len(before.stored_bytes)


# --- what is given --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("level", value) for value in ("on", "AUTO", "", None, 1, [], {})),
        *(("base", value) for value in ("last", 0, [])),
        *(("reanchor_interval", value) for value in (0, -1, 1.0, True, "5", [])),
        *(
            ("restore_budget", value)
            for value in (0.99, 0, -1, math.inf, math.nan, None, "4", True, [], 1j)
        ),
        *(("chain_below", value) for value in (-0.1, math.inf, math.nan, None, "4", True, [], 1j)),
    ],
)
def test_a_bad_value_is_a_config_error_that_names_the_field(field, value):
    with pytest.raises(ConfigError) as caught:
        Compression(**{field: value})
    assert caught.value.field == f"compression.{field}"


@pytest.mark.parametrize(
    ("given_value", "field"),
    [
        ({"change_threshold": -1}, "change_threshold"),
        ({"change_threshold": "1"}, "change_threshold"),
        ({"lossy": 3}, "lossy"),
        ({"lossy": None}, "lossy"),
        ({"lossy": {"model": 0.5}}, "lossy['model']"),
    ],
)
def test_what_may_be_given_up_is_checked_before_a_save(given_value, field):
    with pytest.raises(ConfigError) as caught:
        Compression(**given_value)
    assert caught.value.field == f"compression.{field}"


@pytest.mark.parametrize("given_value", ["fast", None, 5, [], {}])
def test_what_is_no_level_is_a_config_error(given_value):
    with pytest.raises(ConfigError, match="level"):
        Compression.of(given_value)


@pytest.mark.parametrize("level", CompressionLevel)
def test_a_level_stands_for_the_whole(level):
    assert Compression.of(level.value) == Compression(level=level)
    assert Compression.of(STAR) is STAR
    assert isinstance(Compression(level=level.value).level, CompressionLevel)


@pytest.mark.parametrize("is_fork", [False, True])
def test_a_chain_ends_long_before_readers_give_up(is_fork):
    rule = Compression(level=CompressionLevel.AUTO, base=BaseChoice.PREVIOUS, restore_budget=1e9)
    tiny = (1000, *[1] * MAX_CHAIN)
    assert why_anchor(rule, past(*tiny[:-1], is_fork=is_fork)) == ""
    assert "32 deltas" in why_anchor(rule, past(*tiny, is_fork=is_fork))
    assert 3 * MAX_CHAIN < deltas._MAX_LINKS
    star = Compression(level=CompressionLevel.AUTO, restore_budget=1e9)
    assert "32 deltas" not in why_anchor(star, past(*tiny)), "its deltas need only their anchor"
