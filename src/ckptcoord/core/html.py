"""Small pages for notebooks: escaped, with nothing from elsewhere, no scripts; light and dark.

Colours are the page's own text colour, thinned out, and two that stand on light and on dark.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptcoord.core.manifest import CheckpointManifest

BLUE, ORANGE = "#3b82c4", "#d9822b"
_SHOWN_CHARS = 200
_STYLE = """<style>
.ckptcoord { font-size: 13px; line-height: 1.5; color: inherit }
.ckptcoord table { border-collapse: collapse; margin: 4px 0 10px 0; background: none }
.ckptcoord th, .ckptcoord td { padding: 1px 12px 1px 0; text-align: left; border: none;
  background: none; color: inherit; vertical-align: top }
.ckptcoord th { font-weight: 600; opacity: 0.65 }
.ckptcoord td.number, .ckptcoord th.number { text-align: right;
  font-variant-numeric: tabular-nums }
.ckptcoord .name { font-family: ui-monospace, monospace }
.ckptcoord .dim { opacity: 0.65 }
.ckptcoord svg { display: block; max-width: 100%; color: inherit }
</style>"""


def text(value: object) -> str:
    """Escaped, with every character that does not print shown, and cut where it is long."""
    shown = str(value)
    if len(shown) > _SHOWN_CHARS:
        shown = f"{shown[: _SHOWN_CHARS - 3]}..."
    if not shown.isprintable():
        shown = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown
        )
    return escape(shown, quote=True)


def name(value: object) -> str:
    """The same, as names are written."""
    return f'<span class="name">{text(value)}</span>'


def dim(value: object) -> str:
    """The same, less loud."""
    return f'<span class="dim">{text(value)}</span>'


def page(*parts: str) -> str:
    """A piece of HTML that a notebook shows; what is in it is escaped already."""
    return f'{_STYLE}<div class="ckptcoord">{"".join(parts)}</div>'


def title(*parts: str) -> str:
    """The first line."""
    return f"<div><strong>{' '.join(parts)}</strong></div>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()
) -> str:
    """A table of cells that are escaped already; `numbers` are the columns that end alike."""
    right = frozenset(numbers)

    def line(tag: str, cells: Sequence[str]) -> str:
        parts = (
            f'<{tag} class="number">{cell}</{tag}>' if at in right else f"<{tag}>{cell}</{tag}>"
            for at, cell in enumerate(cells)
        )
        return f"<tr>{''.join(parts)}</tr>"

    top = line("th", head) if any(head) else ""
    return f"<table>{top}{''.join(line('td', row) for row in rows)}</table>"


def size_text(size_bytes: int) -> str:
    """`17 B`, `1.2 GiB`."""
    size, units = float(size_bytes), ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    for unit in units[:-1]:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {units[-1]}"


def manifest_html(manifest: CheckpointManifest) -> str:
    """A checkpoint: where it comes from, what was measured, and its components."""
    base = f" against {manifest.base}" if manifest.base else ""
    size, stored = size_text(manifest.size_bytes), size_text(manifest.stored_bytes)
    facts = [
        ("saved", text(manifest.timestamp)),
        ("parent", name(manifest.parent) if manifest.parent else dim("none")),
        ("kind", text(f"{manifest.kind.value}{base}")),
        ("size", f"{size}, {stored} stored"),
        ("ranks", text(manifest.world_size)),
    ]
    if manifest.metrics:
        shown = ", ".join(f"{key} {value:.6g}" for key, value in sorted(manifest.metrics.items()))
        facts.append(("metrics", text(shown)))
    if manifest.message:
        facts.append(("message", text(manifest.message)))
    rows = [
        (
            name(key),
            text(one.sharing_pattern.name),
            text(one.ranks),
            size_text(one.size_bytes),
            size_text(one.stored_bytes),
            str(len(one.files)),
        )
        for key, one in manifest.components.items()
    ]
    head = ("component", "pattern", "ranks", "size", "stored", "files")
    return page(
        title(name(manifest.id.ref), dim(manifest.checkpoint_id)),
        table(("", ""), [(dim(label), value) for label, value in facts]),
        table(head, rows, numbers=(3, 4, 5)) if rows else "",
    )
