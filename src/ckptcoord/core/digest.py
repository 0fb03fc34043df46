"""The name of a run of bytes: its BLAKE3 digest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from ckptcoord.errors import InvalidNameError

DIGEST_BYTES = 32
_TEXT = re.compile(r"blake3:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A BLAKE3-256 digest; `str()` gives `blake3:<64 hex digits>`, the form on disk."""

    value: bytes

    def __post_init__(self) -> None:
        if len(self.value) != DIGEST_BYTES:
            raise InvalidNameError(
                kind="digest", name=self.value.hex(), why=f"is not {DIGEST_BYTES} bytes long"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The digest that `str()` wrote.

        Raises:
            InvalidNameError: the text is anything else.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise InvalidNameError(kind="digest", name=text, why="is not blake3:<64 hex digits>")
        return cls(bytes.fromhex(match[1]))

    @property
    def hex(self) -> str:
        """64 lower-case hex digits."""
        return self.value.hex()

    def __str__(self) -> str:
        return f"blake3:{self.value.hex()}"
