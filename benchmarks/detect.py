#!/usr/bin/env python3
"""Finding what changed in a float32 tensor, and by how much, beside numpy, torch and C++.

Every side says of each block of 64 KiB whether a bit of it changed, and gives the norms of the
change and of the base. `kernels` is ckptcoord's; `numpy` and `torch` are what one writes with them;
`c++` is `detect.cpp`, compiled here with -O3 -march=native and OpenMP, and left out where there is
no compiler; `python` is a loop over the elements, timed on a part and scaled. `reading` is the sum
of both arrays as integers by the same kind of compiled loop: the bandwidth there is.

    python benchmarks/detect.py [--quick] [--json] [--size-mb N] [--rounds N] [--threads 1,2]

Ratios (less is better), of each number of threads `Nt` and share of blocks changed `Pdirty`:
`detect_vs_{reading,numpy,torch,cpp}_<N>t_<P>dirty`, and `detect_vs_python_1t_100dirty`. The bars
are `detect_vs_reading_1t_100dirty` 1.67 (0.6 of the bandwidth) and `detect_vs_numpy_*` 1.0.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from common import Figure, Ratio, emit, options, order, paired, ratio, spread_table

from ckptcoord.codec.jit import compiled
from ckptcoord.codec.kernels import detect

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from rich.table import Table

    Floats: TypeAlias = NDArray[np.float32]
    Found: TypeAlias = tuple[NDArray[np.bool_], float, float]
    Side: TypeAlias = Callable[[Floats, Floats], Found]

OURS, READING, PYTHON = "kernels", "reading", "python"
BLOCK_BYTES = 64 << 10
BLOCK = BLOCK_BYTES // 4
DIRTY = (0, 30, 100)  # per cent of blocks
PYTHON_ELEMENTS = 1 << 16


def ours(threads: int) -> Side:
    """Ours."""

    def side(new: Floats, base: Floats) -> Found:
        found = detect(
            new.view(np.uint8),
            base.view(np.uint8),
            dtype="F32",
            block_bytes=BLOCK_BYTES,
            threads=threads,
        )
        return found.blocks, found.l2_change, found.l2_base

    return side


@compiled
def xor_all(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Read both arrays once, as fast as one core does."""
    found = np.int64(0)
    for i in range(a.size):
        found |= a[i] ^ b[i]
    return int(found)


def reading(threads: int) -> Side:
    """Both arrays are read, and no more is said than whether anything differs."""

    def side(new: Floats, base: Floats) -> Found:
        parts = [array.view(np.int64).reshape(threads, -1) for array in (new, base)]
        if threads == 1:
            differs = [xor_all(parts[0][0], parts[1][0])]
        else:
            with ThreadPoolExecutor(threads) as pool:
                differs = list(pool.map(xor_all, *parts))
        return np.array([any(differs)]), math.nan, math.nan

    return side


def by_numpy(new: Floats, base: Floats) -> Found:
    """As one writes it; temporaries of a block stay in the cache."""
    rows, under = new.reshape(-1, BLOCK), base.reshape(-1, BLOCK)
    bits, below = rows.view(np.uint32), under.view(np.uint32)
    changed = np.zeros(len(rows), np.bool_)
    change = size = 0.0
    for b in range(len(rows)):
        changed[b] = not np.array_equal(bits[b], below[b])
        old = under[b].astype(np.float64)
        difference = rows[b] - old
        # Not `@`, for which BLAS may start threads of its own.
        change += float(np.einsum("i,i", difference, difference))
        size += float(np.einsum("i,i", old, old))
    return changed, math.sqrt(change), math.sqrt(size)


def by_torch(threads: int) -> Side:
    """The same with torch; it sums in float32."""
    import torch

    def side(new: Floats, base: Floats) -> Found:
        torch.set_num_threads(threads)
        rows, under = (torch.from_numpy(array).view(-1, BLOCK) for array in (new, base))
        changed = (rows.view(torch.int32) != under.view(torch.int32)).any(dim=1)
        change = torch.linalg.vector_norm(rows - under)
        return changed.numpy(), float(change), float(torch.linalg.vector_norm(under))

    return side


def by_python(new: Floats, base: Floats) -> Found:
    """Element by element; floats that are equal have equal bits here."""
    change = size = 0.0
    differs = False
    for a, o in zip(new.tolist(), base.tolist(), strict=True):
        differs = differs or a != o
        change += (a - o) * (a - o)
        size += o * o
    return np.array([differs]), math.sqrt(change), math.sqrt(size)


def by_cpp(folder: Path, threads: int) -> Side | None:
    """`detect.cpp`, compiled for this machine; None without a compiler that has OpenMP."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    library = folder / "detect.so"
    source = Path(__file__).with_name("detect.cpp")
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffast-math"]
    made = subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=False)
    if made.returncode:
        return None
    loaded = ctypes.CDLL(str(library))

    def side(new: Floats, base: Floats) -> Found:
        blocks = new.size // BLOCK
        changed, sums = np.empty(blocks, np.bool_), np.empty(2)
        loaded.omp_set_num_threads(threads)
        loaded.detect(
            ctypes.c_void_p(new.ctypes.data),
            ctypes.c_void_p(base.ctypes.data),
            ctypes.c_int64(blocks),
            ctypes.c_int64(BLOCK),
            ctypes.c_void_p(changed.ctypes.data),
            ctypes.c_void_p(sums.ctypes.data),
        )
        return changed, math.sqrt(sums[0]), math.sqrt(sums[1])

    return side


def make_pair(size_bytes: int, dirty: int) -> tuple[Floats, Floats]:
    """A base, and the same with a small step in `dirty` per cent of its blocks."""
    rng = np.random.default_rng(dirty)
    base = rng.normal(scale=0.02, size=size_bytes // 4).astype(np.float32)
    new = base.copy()
    rows = new.reshape(-1, BLOCK)
    hit = rng.permutation(len(rows))[: len(rows) * dirty // 100]
    rows[hit] += rng.normal(scale=1e-5, size=(len(hit), BLOCK)).astype(np.float32)
    return new, base


def check(side: str, found: Found, want: Found) -> None:
    """All sides must find the same; what only reads finds nothing."""
    same = bool((found[0] == want[0]).all())
    # torch sums sixteen million squares in float32.
    bound = 0.05 if side == "torch" else 1e-3
    near = all(math.isclose(a, b, rel_tol=bound) for a, b in zip(found[1:], want[1:], strict=True))
    if not (same and near):
        sys.exit(f"{side} found {found[1:]}, not {want[1:]}")


def time_sides(
    sides: dict[str, Side], pair: tuple[Floats, Floats], rounds: int
) -> dict[str, list[float]]:
    """Seconds by side and round, after one round that warms up and checks."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    want = sides[OURS](*pair)
    for turn in range(rounds + 1):
        for name in order(list(sides), turn):
            began_s = time.perf_counter()
            found = sides[name](*pair)
            took_s = time.perf_counter() - began_s
            if turn:
                seconds[name].append(took_s)
            elif name != READING:
                check(name, found, want)
    return seconds


def against_python(pair: tuple[Floats, Floats], seconds: list[float]) -> Ratio:
    """Ours against a loop in Python, which is timed on a part."""
    part = [array[:PYTHON_ELEMENTS] for array in pair]
    began_s = time.perf_counter()
    by_python(part[0], part[1])
    whole_s = (time.perf_counter() - began_s) * pair[0].size / PYTHON_ELEMENTS
    return ratio([one / whole_s for one in seconds])


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--size-mb", type=int, help="MB of the tensor; 512, or 64 with --quick")
    parser.add_argument("--rounds", type=int, help="rounds that count; 9, or 3 with --quick")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, by comma")
    arguments = parser.parse_args()
    size_mb = arguments.size_mb or (64 if arguments.quick else 512)
    rounds = arguments.rounds or (3 if arguments.quick else 9)
    ratios: dict[str, Ratio] = {}
    figures: dict[str, Figure] = {"tensor, MB": size_mb, "rounds": rounds}
    tables: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="ckptcoord-bench-") as folder:
        for threads in map(int, arguments.threads.split(",")):
            sides: dict[str, Side] = {
                OURS: ours(threads),
                READING: reading(threads),
                "numpy": by_numpy,
                "torch": by_torch(threads),
            }
            cpp = by_cpp(Path(folder), threads)
            if cpp is None:
                figures["c++"] = "no compiler with OpenMP here: left out"
            else:
                sides["cpp"] = cpp
            for dirty in DIRTY:
                pair = make_pair(size_mb << 20, dirty)
                seconds = time_sides(sides, pair, rounds)
                end = f"{threads}t_{dirty}dirty"
                for side in sides.keys() - {OURS}:
                    ratios[f"detect_vs_{side}_{end}"] = paired(seconds[OURS], seconds[side])
                if threads == 1 and dirty == 100:
                    ratios[f"detect_vs_{PYTHON}_{end}"] = against_python(pair, seconds[OURS])
                for side, values in seconds.items():
                    speed = (size_mb << 20) / statistics.median(values) / 1e9
                    figures[f"{end} GB/s of new data: {side}"] = round(speed, 2)
                title = f"detection, {threads} threads, {dirty} % of blocks changed"
                tables.append(spread_table(title, seconds, size_mb << 20))
    emit("detect", dict(sorted(ratios.items())), figures, as_json=arguments.json, tables=tables)


if __name__ == "__main__":
    main()
