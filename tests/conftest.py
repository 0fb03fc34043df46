from __future__ import annotations

from hypothesis import settings

# No test is timed: speed lives in benchmarks/, and machines are noisy.
settings.register_profile("house", deadline=None, print_blob=True)
settings.load_profile("house")
