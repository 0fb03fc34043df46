"""Traces, and the sides that are measured on them: small ones are true to their word."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
NAMES = ("common", "traces", "delta_sides", "delta")


def import_benchmarks():
    """The scripts as they see each other, without their names staying behind for other tests."""
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


bench = import_benchmarks()
traces, sides = bench.traces, bench.delta_sides
Trace, Given = traces.Trace, sides.Given

SHORT = traces.Schedule(early=1, late=3, warmup=2, peak_rate=1e-2)
TINY = traces.TraceSettings(
    layers=2,
    width=16,
    heads=2,
    context=8,
    batch=1,
    rank=2,
    text_bytes=32 << 10,
    pretraining=SHORT,
    tuning=SHORT,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return traces.make_traces(TINY, tmp_path_factory.mktemp("traces"))


def everything(made):
    return {path.name: path.read_bytes() for path in made.folder.iterdir()}


def test_the_same_settings_give_the_same_bytes(made, tmp_path):
    again = traces.make_traces(TINY, tmp_path)
    assert again.folder.name == made.folder.name
    assert everything(again) == everything(made)


def test_another_seed_gives_other_bytes_in_another_folder(made, tmp_path):
    other = traces.make_traces(replace(TINY, seed=2), tmp_path)
    assert other.folder.name != made.folder.name
    assert everything(other).keys() == everything(made).keys()
    assert not set(everything(other).values()) & set(everything(made).values())


def test_traces_are_made_once(made):
    kept = everything(made)
    marked = made.folder / "fp32-00001.safetensors"
    marked.write_bytes(b"mine")
    assert traces.make_traces(TINY, made.folder.parent) == made
    assert marked.read_bytes() == b"mine"
    marked.write_bytes(kept[marked.name])


@pytest.mark.parametrize("trace", Trace)
@pytest.mark.parametrize("phase", traces.PHASES)
def test_every_step_of_a_trace_has_every_class(made, trace, phase):
    master = {"master"} if trace is Trace.BF16 else set()
    previous = None
    for offset in traces.OFFSETS:
        state = made.state(trace, phase, offset)
        assert set(state) == {"params", "exp_avg", "exp_avg_sq"} | master
        assert {one.dtype for name, one in state.items() if name != "params"} == {"F32"}
        assert state["params"].dtype == ("BF16" if master else "F32")
        assert np.isfinite(state["exp_avg_sq"].data.view(np.float32)).all()
        assert previous is None or any(
            (one.data != previous[name].data).any() for name, one in state.items()
        )
        previous = state


def test_the_parameters_of_bf16_are_the_cast_of_their_master(made):
    state = made.state(Trace.BF16, "late", 10)
    master = torch.from_numpy(state["master"].data).view(torch.float32)
    assert (
        state["params"].data.tobytes()
        == master.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    )
    assert (state["master"].data.view(np.uint32) & 0xFFFF).any(), "which it would be of itself too"


@pytest.mark.parametrize("trace", [Trace.FINE_TUNE, Trace.LORA])
def test_most_of_what_is_tuned_is_frozen(made, trace):
    before, after = (made.state(trace, "early", offset) for offset in (0, 100))
    changed = before["params"].data.view(np.uint32) != after["params"].data.view(np.uint32)
    assert 0 < changed.mean() < 0.5
    assert 2 * after["exp_avg"].data.size < after["params"].data.size


def test_all_of_what_is_trained_from_scratch_moves(made):
    before, after = (made.state(Trace.FP32, "early", offset)["params"].data for offset in (0, 100))
    assert (before.view(np.uint32) != after.view(np.uint32)).mean() > 0.9


@given(st.integers(1, 50), st.integers(1, 100), st.integers(1, 500))
def test_the_learning_rate_rises_to_its_peak_and_decays_to_a_twentieth(warmup, early, late):
    schedule = traces.Schedule(early=early, late=warmup + late, warmup=warmup, peak_rate=2.0)
    last = schedule.late + traces.OFFSETS[-1]
    rates = [schedule.rate(step) for step in range(1, last + 1)]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup - 1 :] == sorted(rates[warmup - 1 :], reverse=True)
    assert rates[warmup - 1] == max(rates) == 2.0
    assert rates[-1] == pytest.approx(0.1)


# --- the sides ------------------------------------------------------------------------------------

WORDS = {"F32": np.uint32, "BF16": np.uint16}


def words(dtype):
    """Pairs of arrays of any bits: NaNs, infinities and both zeros among them."""
    bits = st.integers(0, int(np.iinfo(WORDS[dtype]).max))
    lists = st.lists(st.tuples(bits, bits), min_size=1, max_size=40)
    return lists.map(lambda pairs: np.array(pairs, WORDS[dtype]).T.copy())


@given(st.data(), st.sampled_from(sorted(WORDS)), st.sampled_from(list(Given)))
def test_what_a_peer_is_given_leads_back(data, dtype, given_):
    new, base = (one.view(np.uint8) for one in data.draw(words(dtype)))
    prepared = sides._prepare(given_, new, base, np.empty_like(new), dtype)
    out = base.copy()
    sides._restore(given_, prepared, out, dtype)
    assert (out == new).all()


@given(st.floats(width=32, allow_nan=False), st.integers(-99, 99))
def test_a_small_step_between_floats_is_a_small_word(value, step):
    bits = np.array([value], np.float32).view(np.uint32)
    new = (bits.astype(np.int64) + step).clip(0, 0xFFFFFFFF).astype(np.uint32)
    if (new >> 31 == bits >> 31).all():
        scratch = np.empty(4, np.uint8)
        sides._prepare(Given.DIFFERENCE, new.view(np.uint8), bits.view(np.uint8), scratch, "F32")
        word = int(scratch.view(np.uint32)[0])
        folded = ((word << 1) | (word >> 31)) & 0xFFFFFFFF  # as zipnn rotates it
        assert folded <= 2 * 99


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_side_gives_back_what_it_was_given():
    random = np.random.default_rng(1)
    base = random.standard_normal(700_000).astype(np.float32)
    new = (base * (1 + 1e-4 * random.standard_normal(base.size))).astype(np.float32)
    base, new = base.view(np.uint8), new.view(np.uint8)
    kept = new.tobytes()
    with ThreadPoolExecutor(2) as pool:
        found, absent = sides.make_sides(pool)
        assert {one.name for one in found} == set(sides.SIDES) - set(absent)
        for side in found:
            for before in (base, None):
                for threads in (1, 2) if side.takes(before) else ():
                    parts = side.encode(new, before, "F32", threads)
                    out = np.zeros_like(new) if before is None else before.copy()
                    side.decode(parts, out, "F32", threads)
                    assert out.tobytes() == new.tobytes() == kept, (side.name, side.variant)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_side_that_loses_a_bit_ends_the_benchmark(made):
    class Lossy:
        name, variant = sides.OURS, "delta"

        def takes(self, base):
            return True

        def encode(self, new, base, dtype, threads):
            return [new.tobytes()]

        def decode(self, parts, out, dtype, threads):
            out[:] = np.frombuffer(parts[0], np.uint8)
            out[-1] ^= 1

    case = next(bench.delta.cases(made, Trace.LORA))
    with pytest.raises(SystemExit, match=case.name):
        bench.delta.measure(case, [Lossy()], 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_case_and_star_is_reported_by_its_name(made):
    delta = bench.delta
    with ThreadPoolExecutor(2) as pool:
        found, _ = sides.make_sides(pool)
        results = [delta.measure(case, found, 1) for case in delta.cases(made, Trace.BF16)]
        star = delta.star(made, Trace.BF16, "late", found)
    names = {
        f"bf16_{kind}_gap{gap}_{phase}"
        for kind in ("params", "master", "exp_avg", "exp_avg_sq")
        for gap in traces.GAPS
        for phase in traces.PHASES
    }
    assert {one.name for one in results} == names
    assert set(delta.case_ratios_of(results)) == {
        f"{side}_vs_best_peer_{name}" for side in ("stored", "aggressive") for name in names
    }
    assert set(delta.ratios_of(results, [star], 0)) == {
        *("stored_vs_best_peer", "aggressive_vs_best_peer", "star_vs_best_peer_bf16_late"),
        *(f"{what}_bar_{threads}t" for what in ("encode", "decode") for threads in (1, 2)),
    }
    assert star.stored["params"][delta.CAST] == 0
    assert star.stored["master"][delta.CAST] == star.stored["master"][sides.OURS] > 0
    assert star.total(sides.FULL) == sum(star.raw.values())


@pytest.mark.slow
def test_the_benchmark_prints_one_object(tmp_path):
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "delta.py"), "--quick", "--json"]
    command += ["--traces", "lora", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"benchmark", "ratios", "figures"}
    assert "stored_vs_best_peer_lora_params_gap100_late" in report["ratios"]
    assert "encode_gbs_lora_params_gap1_early_2t" in report["figures"]
