"""What each field of a manifest may be, for its models and for its plain form alike."""

from __future__ import annotations

import math
import re
from datetime import datetime
from enum import StrEnum

MANIFEST_NAME = "checkpoint_manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20
MAX_SIZE_BYTES = 1 << 60
MAX_METADATA_DEPTH = 32
MAX_GROUPS = 64
MAX_LINEAGE = 100_000
MAX_PATH_CHARS = 255
MAX_SCOPE_CHARS = 48
MAX_SHORT_CHARS = 200

# No part begins with a dot, so `.`, `..` and `.ckptcoord` are out; nor is there any character that
# another file system folds, escapes or splits at.
PATH = r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*){0,7}"
ATTEMPT = r"[0-9a-f]{32}"
_INT_LIMIT = 10**64
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_TIMESTAMP = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?Z")


class CheckpointKind(StrEnum):
    """Whether a checkpoint stands alone or needs its base."""

    ANCHOR = "anchor"
    DELTA = "delta"


class FileKind(StrEnum):
    """What is in a file: safetensors, deltas, a state document, shards' index, a config.json."""

    TENSORS = "tensors"
    DELTA = "delta"
    STATE = "state"
    INDEX = "index"
    CONFIG = "config"


TENSOR_KINDS = frozenset({FileKind.TENSORS, FileKind.DELTA})


def check_text(value: str) -> str:
    """The text.

    Raises:
        ValueError: half of a surrogate pair is in it, which pydantic lets pass and cannot write.
    """
    if _SURROGATE.search(value) is not None:
        raise ValueError("has a lone surrogate")
    return value


def check_timestamp(value: str) -> str:
    """The text of a time.

    Raises:
        ValueError: it is of another form, or no time.
    """
    if _TIMESTAMP.fullmatch(value) is None:
        raise ValueError("is not UTC in ISO 8601 with a 'Z'")
    datetime.fromisoformat(value)
    return value


def sorted_json(value: object, depth: int) -> object:
    """The value with its keys sorted.

    Raises:
        ValueError: it is deeper, or holds what JSON cannot hold exactly.
    """
    if depth == 0:
        raise ValueError("is nested too deeply")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("has a key that is not a string")
        keys = sorted(value)
        return {_scalar(key): sorted_json(value[key], depth - 1) for key in keys}
    if isinstance(value, list):
        return [sorted_json(item, depth - 1) for item in value]
    return _scalar(value)


def _scalar(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("has a float that is not finite")
    if isinstance(value, int) and abs(value) >= _INT_LIMIT:
        raise ValueError("has an integer of over 64 digits")
    return check_text(value) if isinstance(value, str) else value
