from __future__ import annotations

import signal

from hypothesis import settings

# No test is timed: speed lives in benchmarks/, and machines are noisy.
settings.register_profile("house", deadline=None, print_blob=True)
settings.load_profile("house")

# What a shell starts in the background ignores interrupts, and so would all children of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
