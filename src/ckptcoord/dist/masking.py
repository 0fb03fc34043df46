"""No token in the log of a training process: ckptcoord's logger, whoever handles its records."""

from __future__ import annotations

import logging
import os
import traceback

from ckptcoord.redact import TOKEN_VARIABLE, redact, remember


class _Masking(logging.Filter):
    """Redacts messages and the tracebacks behind them."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info:
            lines = traceback.format_exception(*record.exc_info)
            record.exc_text = redact("".join(lines).rstrip("\n"))
        return True


_masking = _Masking()


def mask_secrets() -> None:
    """From here on the token of the environment is known, and the log is redacted."""
    remember(os.environ.get(TOKEN_VARIABLE, ""))  # noqa: TID251 (no argument may carry a token)
    logging.getLogger("ckptcoord").addFilter(_masking)
