"""Three hundred saves of the long soak (`scripts/sweep soak 10000`), in a process of their own."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest
from tests.distributed.launch import ROOT
from tests.distributed.soak import Look, judged

MOST_GROWTH = 16384  # bytes a save: a save's copies (50 kB) must not stay; caches are filling yet


@pytest.mark.dist
@pytest.mark.alone
def test_saves_in_the_background_leave_no_memory_files_or_threads_behind():
    arguments = ("-m", "tests.distributed.soak", "300", str(random.getrandbits(32)))
    done = subprocess.run(
        [sys.executable, *arguments, str(MOST_GROWTH)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}:\n{done.stderr}"
    assert re.match(r"300 saves in the background, all committed in order", done.stdout)


def looks(resident=lambda n: 10**8, files=lambda n: 7, threads=lambda n: 5):
    return [
        Look(saves=n, resident_bytes=resident(n), files=files(n), threads=threads(n))
        for n in range(10, 1010, 10)
    ]


def test_what_is_flat_after_the_warm_up_passes():
    settling = looks(resident=lambda n: 10**8 + 10**5 * min(n, 400))
    assert judged(settling, 1000, 1024).growth == pytest.approx(0, abs=1)


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (looks(resident=lambda n: 10**8 + 1100 * n), "memory grows by 1100 bytes"),
        (looks(files=lambda n: 7 + n // 600), "open files"),
        (looks(threads=lambda n: 5 + n // 900), "threads"),
    ],
)
def test_what_grows_is_found(found, what):
    with pytest.raises(AssertionError, match=what):
        judged(found, 1000, 1024)
