"""`ckptcoord cat`: what is in the tensors of a checkpoint."""

from __future__ import annotations

import math
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ckptcoord.cli.locate import LATEST, find_commit
from ckptcoord.cli.progress import progress
from ckptcoord.cli.text import Style, aligned, bytes_text, counted, printable
from ckptcoord.dist.contents import Contents
from ckptcoord.errors import ConfigError
from ckptcoord.repo.repository import open_repository
from ckptcoord.repo.summary import TensorSummary, first_values, raw_parts, summarise

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.dist.saved import SavedTensor
    from ckptcoord.repo.summary import Value

    Tensors = dict[str, SavedTensor]

_FINDINGS = 3
_GLOB = re.compile(r"[*?\[]")
_MAX_PATTERN = 4096
_MAX_VALUES = 1_000_000
_COLUMNS = ("min", "max", "mean", "std", "norm", "zeros", "nan", "inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for.

    Attributes:
        nan: only tensors with NaN or infinities; says by the exit code whether there are any.
        raw: the bytes of one tensor.
        values: how many elements of each are shown.
    """

    nan: bool = False
    raw: bool = False
    values: int = 0


def count_of(text: str | None) -> int:
    """How many values to show.

    Raises:
        ConfigError: the text is not a count.
    """
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 8 and int(text) <= _MAX_VALUES):
        why = f"{text!r:.40} is not a number of values up to {_MAX_VALUES:,}"
        raise ConfigError(field="--values", why=why)
    return int(text)


def run(out: Output, root: Path, words: Sequence[str], wish: Wish) -> int:
    """Show `[REF [TENSOR...]]`; 3 where NaN or infinities were looked for and found.

    Raises:
        RefNotFoundError: there is no such checkpoint.
        TensorNotFoundError: there is no such tensor.
        ConfigError: a pattern is too long, or not one tensor is meant where one must be.
        CorruptError: what was read is not what was written.
        CkptError: the repository cannot be read.
    """
    if wish.raw and (wish.nan or wish.values):
        raise ConfigError(field="--raw", why="stands beside --nan or --values", help="Give one")
    repository = open_repository(root)
    ref, *patterns = words or (LATEST,)
    commit = find_commit(repository.state(), root, ref)
    contents = Contents(repository, commit)
    tensors = _chosen(contents, patterns or ["*"])
    if wish.raw:
        _raw(out, contents, tensors)
        return 0
    total = sum(piece[1][1].spec.nbytes for one in tensors.values() for piece in one.pieces)
    with ExitStack() as stack:
        shards = stack.enter_context(contents.shards())
        advance = stack.enter_context(progress(out, "cat", total))
        summaries = summarise(tensors.items(), shards, only_finite=wish.nan, progress=advance)
        found = [one for one in summaries if not wish.nan or one.statistics.not_finite]
        values = {
            one.name: first_values(one.name, tensors[one.name], shards, wish.values)
            for one in found
            if wish.values
        }
    if out.as_json:
        documents = [_document(one, values.get(one.name)) for one in found]
        ref = commit.checkpoint_id.ref
        counts = {"repository": repository.url, "ref": ref, "looked_at": len(tensors)}
        out.data({**counts, "tensors": documents})
    else:
        single = len(patterns) == 1 and _GLOB.search(patterns[0]) is None
        _show(out, found, values, wish, single=single)
        if wish.nan:
            out.note(_verdict(found, len(tensors)))
    return _FINDINGS if wish.nan and found else 0


# --- which ---------------------------------------------------------------------------------------


def _chosen(contents: Contents, patterns: Sequence[str]) -> Tensors:
    """The tensors that are meant, in the order of the patterns."""
    found: Tensors = {}
    for pattern in patterns:
        if len(pattern) > _MAX_PATTERN:
            why = f"has {len(pattern):,} characters, {_MAX_PATTERN:,} at most"
            raise ConfigError(field="TENSOR", why=why)
        if _GLOB.search(pattern) is None:
            found.setdefault(pattern, contents.find(pattern))
            continue
        matching = _matching(contents, pattern)
        if not matching and pattern != "*":
            matching = {pattern: contents.find(pattern)}  # a name may have a bracket in it
        found |= {name: one for name, one in matching.items() if name not in found}
    return found


def _matching(contents: Contents, pattern: str) -> Tensors:
    keys = list(contents.manifest.components)
    first = pattern.partition(".")[0]
    if _GLOB.search(first) is None:
        keys = [key for key in keys if key == first]
    return {
        name: one
        for key in keys
        for name, one in contents.tensors(key).items()
        if name == pattern or fnmatchcase(name, pattern)
    }


# --- for people ----------------------------------------------------------------------------------


def _show(
    out: Output,
    found: list[TensorSummary],
    values: dict[str, list[Value]],
    wish: Wish,
    *,
    single: bool,
) -> None:
    lines = (
        f"{printable(name)}\t{at}\t{value}"
        for name, some in values.items()
        for at, value in enumerate(some)
    )
    if wish.values and not out.terminal:
        out.lines(lines)
    elif wish.nan:
        rows = [_nan_cells(one) for one in found]
        out.lines(_rows(out, rows, right=frozenset({1, 2})))
    elif single and out.terminal:
        out.lines(line for one in found for line in _block(out, one))
    else:
        rows = [_cells(one) for one in found]
        head = [("tensor", "dtype", "shape", *_COLUMNS)] if out.terminal and rows else []
        right = frozenset(range(3, 3 + len(_COLUMNS)))
        out.lines(_rows(out, [*head, *rows], right=right))
    if out.terminal:
        out.lines(lines)


def _rows(out: Output, rows: list[tuple[str, ...]], *, right: frozenset[int]) -> Iterator[str]:
    if not out.terminal:
        return ("\t".join(row) for row in rows)
    return (
        f"{out.paint(first, Style.YELLOW)}  {'  '.join(rest)}".rstrip()
        for first, *rest in aligned(rows, right=right)
    )


def _cells(one: TensorSummary) -> tuple[str, ...]:
    found = one.statistics
    numbers = (found.minimum, found.maximum, found.mean, found.std, found.norm)
    counts = (found.zeros, found.nans, sum(found.infinities))
    form = (printable(one.name), one.spec.dtype, _shape_text(one))
    return *form, *map(_number_text, numbers), *map(str, counts)


def _nan_cells(one: TensorSummary) -> tuple[str, ...]:
    found = one.statistics
    first = _place_text((*one.nan_at, *one.infinity_at)[:1])
    return printable(one.name), f"{found.nans} NaN", f"{sum(found.infinities)} Inf", f"at {first}"


def _block(out: Output, one: TensorSummary) -> Iterator[str]:
    found = one.statistics
    stored = "" if one.pieces == 1 else f" in {counted(one.pieces, 'piece')}"
    stored += "" if one.complete else ", which are not all of it"
    size = bytes_text(one.spec.nbytes)
    yield f"{out.paint(printable(one.name), Style.YELLOW)}  {one.spec.dtype}  {_shape_text(one)}"
    for label, text in (
        ("size", f"{size}{stored}"),
        ("range", f"{_number_text(found.minimum)} to {_number_text(found.maximum)}"),
        ("mean", f"{_number_text(found.mean)}, std {_number_text(found.std)}"),
        ("norm", _number_text(found.norm)),
        ("zeros", f"{found.zeros:,} of {found.count:,}"),
        ("NaN", _count_text(found.nans, one.nan_at)),
        ("Inf", _count_text(sum(found.infinities), one.infinity_at)),
    ):
        yield f"  {out.paint(label.ljust(5), Style.DIM)}  {text}"


def _count_text(count: int, places: tuple[tuple[int, ...], ...]) -> str:
    more = ", ..." if count > len(places) else ""
    return f"{count:,}, first at {_place_text(places)}{more}" if count else "0"


def _place_text(places: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(f"[{','.join(map(str, place))}]" for place in places)


def _shape_text(one: TensorSummary) -> str:
    return f"[{','.join(map(str, one.spec.shape))}]"


def _number_text(number: float | None) -> str:
    if number is None:
        return "-"
    return str(number) if isinstance(number, int) else f"{number:.6g}"


def _verdict(found: list[TensorSummary], looked_at: int) -> str:
    tensors = counted(looked_at, "tensor")
    return (
        f"{len(found):,} of {tensors} have NaN or Inf" if found else f"no NaN or Inf in {tensors}"
    )


# --- for programs --------------------------------------------------------------------------------


def _document(one: TensorSummary, values: list[Value] | None) -> dict[str, object]:
    found = one.statistics
    document: dict[str, object] = {
        "name": one.name,
        "dtype": one.spec.dtype,
        "shape": list(one.spec.shape),
        "size_bytes": one.spec.nbytes,
        "pieces": one.pieces,
        "complete": one.complete,
        "count": found.count,
        "zeros": found.zeros,
        "nans": found.nans,
        "infinities": {"below": found.infinities[0], "above": found.infinities[1]},
        "min": _plain(found.minimum),
        "max": _plain(found.maximum),
        "mean": _plain(found.mean),
        "std": _plain(found.std),
        "norm": _plain(found.norm),
        "nan_at": [list(place) for place in one.nan_at],
        "infinity_at": [list(place) for place in one.infinity_at],
    }
    if values is not None:
        document["values"] = [_plain(value) for value in values]
    return document


def _plain(value: Value | None) -> object:
    """JSON has neither NaN nor complex numbers: they are text."""
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


# --- bytes ---------------------------------------------------------------------------------------


def _raw(out: Output, contents: Contents, tensors: Tensors) -> None:
    if out.as_json or sys.stdout.isatty():
        raise ConfigError(
            field="--raw",
            why="writes bytes, which are nothing for a terminal or JSON",
            help="Send them to a file: ckptcoord cat REF TENSOR --raw > FILE",
        )
    if len(tensors) != 1:
        raise ConfigError(field="--raw", why=f"is of one tensor, and {len(tensors)} are meant")
    ((name, held),) = tensors.items()
    with contents.shards() as shards:
        for part in raw_parts(name, held, shards):
            out.raw(part)
