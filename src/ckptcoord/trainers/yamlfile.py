"""Settings from a YAML file that nobody vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ckptcoord.errors import ConfigError

_MAX_BYTES = 1 << 16
_MAX_ALIASES = 64
_MAX_DEPTH = 32


def read_settings(path: str | Path) -> dict[str, Any]:
    """A mapping of setting to value.

    Raises:
        ConfigError: the file cannot be read, is larger than 64 KiB, nests or repeats itself beyond
            reason, has a key twice, or is no mapping.
    """
    where = Path(path)
    try:
        with where.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise _refuse(where, f"cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise _refuse(where, f"is larger than {_MAX_BYTES} bytes")
    try:
        _check_events(where, data)
        settings = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _refuse(where, f"is not YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise _refuse(where, "is no mapping of setting to value")
    return settings


def _check_events(where: Path, data: bytes) -> None:
    """Look at the file event by event, before anything in it is built or expanded."""
    aliases = depth = 0
    keys: set[str] = set()
    is_key = True  # at depth 1, events alternate between key and value
    for event in yaml.parse(data, Loader=yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        if depth == 1 and isinstance(event, yaml.NodeEvent):
            if is_key and isinstance(event, yaml.ScalarEvent):
                if event.value in keys:
                    raise _refuse(where, f"has {event.value!r} twice")
                keys.add(event.value)
            is_key = not is_key
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if aliases > _MAX_ALIASES or depth > _MAX_DEPTH:
            raise _refuse(where, "nests or repeats itself beyond reason")


def _refuse(where: Path, why: str) -> ConfigError:
    return ConfigError(field=str(where), why=why, help="See `--help` for the settings")
