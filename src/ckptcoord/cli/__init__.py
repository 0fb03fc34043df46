"""The command line: log, inspect, verify, ls. Data on stdout, everything else on stderr."""

from ckptcoord.cli.app import main

__all__ = ["main"]
