"""What every store refuses: paths that leave it, ranges and sizes that a file must not have."""

from __future__ import annotations

from ckptcoord.errors import CorruptError, UnsafePathError

MAX_PART_BYTES = 255


def check_path(path: str) -> tuple[str, ...]:
    """The parts of a path below the root.

    Raises:
        UnsafePathError: the path is the root, absolute, not normalised, or no store can hold it.
    """
    if path == "":
        raise UnsafePathError(path=path, why="it is the root")
    return check_folder(path)


def check_folder(path: str) -> tuple[str, ...]:
    """The parts of a folder's path; the root has none.

    Raises:
        UnsafePathError: the path is absolute, not normalised, or no store can hold it.
    """
    if path == "":
        return ()
    parts = tuple(path.split("/"))
    for part in parts:
        why = _fault(part)
        if why:
            raise UnsafePathError(path=path, why=why)
    return parts


def check_range(path: str, size_bytes: int, offset: int, length: int) -> None:
    """Refuse a range that the file does not have, before anything is allocated.

    Raises:
        CorruptError: says what was asked for.
    """
    if offset < 0 or length < 0 or offset + length > size_bytes:
        raise CorruptError(
            path=path,
            why=f"the file has {size_bytes} bytes; {length} from byte {offset} were asked for",
        )


def check_size(path: str, size_bytes: int, limit_bytes: int) -> None:
    """Refuse a file that is larger than its reader will take.

    Raises:
        CorruptError: it is.
    """
    if size_bytes > limit_bytes:
        raise CorruptError(
            path=path, why=f"the file has {size_bytes} bytes, more than the {limit_bytes} allowed"
        )


def _fault(part: str) -> str:
    if part in ("", ".", ".."):
        return f"it is absolute or not normalised (it has the part {part!r})"
    if "\0" in part or "\\" in part:
        return "it has a NUL or a backslash in it"
    try:
        length_bytes = len(part.encode())
    except UnicodeEncodeError:
        return "it is no Unicode text"
    if length_bytes > MAX_PART_BYTES:
        return f"a part of it is longer than {MAX_PART_BYTES} bytes"
    return ""
