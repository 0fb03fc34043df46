"""Tokens and passwords, taken out of text before others can read it.

A secret is known by its value or by its place. Known values are those of options such as `--token`
among this process's words, and what `remember` was told. Places are the user and password of a URL,
what follows `Bearer`, and what is given to an option or variable that is called a token, secret,
password or API key.

Values of fewer than 8 characters are left alone: masking them would garble other words.
"""

from __future__ import annotations

import json
import re
import sys
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MASK = "***"
MIN_SECRET_CHARS = 8
TOKEN_VARIABLE = "CKPTCOORD_TOKEN"

_HEAD_CHARS = 16
_NAMES = r"(?:token|secret|password|passwd|api[-_]?key)"
_OPTION = re.compile(rf"--(?:[\w-]*[-_])?{_NAMES}", re.IGNORECASE)
# Every run is bounded or ends at a character that begins no other: linear, whatever the text is.
_PLACES = (
    (re.compile(r"""(://)[^\s/?#"'<>]*(?=@)"""), "://"),
    (re.compile(r"(\b[Bb]earer\s{1,8})[\w.~+/=-]{8,}"), "earer"),
    (
        re.compile(
            rf"""((?<![\w-])--(?:[\w-]{{0,40}}?[-_])?{_NAMES}(?:["']?[=,]\s{{0,8}}|\s{{1,8}})["']?)"""
            r"""[^\s"',]{8,}""",
            re.IGNORECASE,
        ),
        "--",
    ),
    (
        re.compile(
            r"""(\b(?:[A-Z0-9_]{0,40}_)?(?:TOKEN|SECRET|PASSWORD|API_KEY)(?:_[A-Z_]{0,40})?=["']?)"""
            r"""[^\s"',]{8,}"""
        ),
        "=",
    ),
    (re.compile(r"([?&](?:\w{0,40}_)?token=)[^\s\"'&#]{8,}", re.IGNORECASE), "oken="),
)

_told: set[str] = set()


def remember(secret: str) -> None:
    """Mask this from now on, in whatever form it is written."""
    secret = secret.strip(" \t\r\n")
    if len(secret) >= MIN_SECRET_CHARS:
        _told.update(_forms(secret))


def secrets_in(words: Sequence[str]) -> Iterator[str]:
    """What the words of a command line give to options such as `--token` or `--hub_token`."""
    for word in words:
        option, equals, value = word.partition("=")
        if equals and _OPTION.fullmatch(option):
            yield value
    for option, value in pairwise(words):
        if _OPTION.fullmatch(option) and not value.startswith("-"):
            yield value


def mask_known(text: str) -> str:
    """The text without the values that are known to be secret, or the greater part of one."""
    for secret in (*sorted(_told), *_given(tuple(sys.argv[1:]))):
        text = _without(text, secret)
    return text


def redact(text: str) -> str:
    """The text without known secrets, and without what stands where secrets do."""
    text = mask_known(text)
    for pattern, sign in _PLACES:
        if sign in text:
            text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


def redact_all(value: Any) -> Any:  # noqa: ANN401 (each type gives itself)
    """The same tree of lists, tuples and dicts with each text in it, keys too, redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_all(key): redact_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([redact_all(item) for item in value])
    return value


@lru_cache(maxsize=4)
def _given(words: tuple[str, ...]) -> tuple[str, ...]:
    found = [secret for secret in secrets_in(words) if len(secret) >= MIN_SECRET_CHARS]
    return tuple(sorted({form for secret in found for form in _forms(secret)}))


def _forms(secret: str) -> set[str]:
    """As it is, and as JSON, Python, a terminal and a URL show it."""
    written = secret.encode("utf-8", "backslashreplace").decode()
    return {
        secret,
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
        secret.encode("unicode_escape").decode("ascii"),
        quote(written, safe=""),
    }


def _without(text: str, secret: str) -> str:
    """Where a long secret was cut short, its beginning goes, too."""
    head = secret[:_HEAD_CHARS]
    at = text.find(head)
    if at < 0:
        return text
    kept, end = [], 0
    while at >= 0:
        kept.append(text[end:at])
        end = at + len(head)
        while end - at < len(secret) and text[end : end + 1] == secret[end - at]:
            end += 1
        at = text.find(head, end)
    return MASK.join([*kept, text[end:]])
