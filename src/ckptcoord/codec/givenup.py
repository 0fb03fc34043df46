"""What a plain shard says of tensors that are not exactly what the trainer had.

A delta file's recipes say it (see `recipe`). Where such tensors are written out whole, as by
`ckptcoord compact`, `__metadata__` holds under `ckptcoord.given_up` what this module writes:
`{name: [max_abs, relative_l2]}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.codec.bounded import GivenUp
from ckptcoord.core.jsonio import JsonValue, dump_json, parse_json
from ckptcoord.errors import CorruptError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptcoord.codec.tensorfile import TensorHeader

GIVEN_UP_KEY = "ckptcoord.given_up"
_MAX_BYTES = 100_000_000  # as a header has


def given_up_metadata(given_up: Mapping[str, GivenUp]) -> dict[str, str]:
    """For the file's metadata; nothing where nothing is given up."""
    if not given_up:
        return {}
    document: dict[str, JsonValue] = {
        name: [one.max_abs, one.relative_l2] for name, one in given_up.items()
    }
    return {GIVEN_UP_KEY: dump_json(document).decode("ascii")}


def given_up_in(header: TensorHeader, *, path: str) -> dict[str, GivenUp]:
    """What a header says of its tensors, by name.

    Raises:
        CorruptError: it is malformed, or names a tensor that is not there.
    """
    text = header.metadata.get(GIVEN_UP_KEY)
    if text is None:
        return {}
    document = parse_json(text.encode(), path=path, max_bytes=_MAX_BYTES)
    names = {entry.spec.name for entry in header.entries}
    if not isinstance(document, dict) or not names.issuperset(document):
        raise CorruptError(path=path, why=f"its {GIVEN_UP_KEY} is of other tensors")
    return {name: parse_given_up(path, name, value) for name, value in document.items()}


def parse_given_up(path: str, name: str, value: JsonValue) -> GivenUp:
    """What a file says was given up of one tensor.

    Raises:
        CorruptError: it is malformed.
    """
    match value:
        case [float(max_abs), float(relative_l2)] if max_abs >= 0 and relative_l2 >= 0:
            return GivenUp(max_abs=max_abs, relative_l2=relative_l2)
        case _:
            raise CorruptError(
                path=path, why=f"what is given up of {name!r:.80} is malformed", tensor=name
            )
