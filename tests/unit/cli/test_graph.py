"""The picture of `log --graph`: its laws over any history, and how it looks."""

from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.cli.graph import GLYPHS, Node, children_first, draw

# Where the arms of a glyph point: up, down, left, right.
ARMS = {
    "│": "ud",
    "├": "udr",
    "─": "lr",
    "┼": "udlr",
    "┴": "ulr",
    "╯": "ul",
    " ": "",
}


@st.composite
def forests(draw_one):
    """Nodes in any order, each with a parent among all of them, elsewhere, or none."""
    count = draw_one(st.integers(0, 25))
    parents = [
        draw_one(st.none() | st.integers(number + 1, number + 6) | st.integers(number + 1, 40))
        for number in range(count)
    ]
    nodes = [Node(number, parent) for number, parent in enumerate(parents)]
    return draw_one(st.permutations(nodes))


@st.composite
def tangles(draw_one):
    """Anything: circles too."""
    count = draw_one(st.integers(0, 15))
    return [Node(n, draw_one(st.none() | st.integers(0, 20))) for n in range(count)]


def picture(nodes):
    return list(draw(children_first(nodes)))


def glyph(rows, at, column):
    text = rows[at].glyphs if 0 <= at < len(rows) else ""
    return text[column] if 0 <= column < len(text) else " "


def follow(rows, at, column):
    """From a node down its line; returns the node in which it ends, or None at the bottom."""
    heading = "d"
    while True:
        at, column = (at + 1, column) if heading == "d" else (at, column - 1)
        if at == len(rows):
            return None
        here = glyph(rows, at, column)
        if here == "●":
            assert heading == "d"
            return rows[at].node.key
        back = {"d": "u", "l": "r"}[heading]
        assert back in ARMS[here], (rows, at, column)
        if here in "┼│─":
            continue  # straight on
        heading = "d" if here == "├" else "l"


@given(forests() | tangles())
def test_every_checkpoint_stands_there_once(nodes):
    found = [row.node.key for row in picture(nodes) if row.node]

    assert sorted(found) == sorted(node.key for node in nodes)
    assert all(row.glyphs.count("●") == (row.node is not None) for row in picture(nodes))


@given(forests())
def test_parents_stand_below_their_children_and_keep_the_given_order_else(nodes):
    found = [row.node.key for row in picture(nodes) if row.node]
    place = {key: at for at, key in enumerate(found)}

    for node in nodes:
        if node.parent in place:
            assert place[node.key] < place[node.parent]
    if all(
        node.parent not in place or nodes.index(node) < [n.key for n in nodes].index(node.parent)
        for node in nodes
    ):
        assert found == [node.key for node in nodes]


@given(forests() | tangles())
def test_a_line_leads_from_every_checkpoint_to_its_parent(nodes):
    ordered = children_first(nodes)
    rows = list(draw(ordered))
    parents = {node.key: node.parent for node in ordered}

    for at, row in enumerate(rows):
        if row.node is not None and parents[row.node.key] is not None:
            assert follow(rows, at, row.glyphs.index("●")) == parents[row.node.key]


@given(forests() | tangles())
def test_no_line_begins_or_ends_in_nothing(nodes):
    rows = picture(nodes)
    has_child = {row.node.parent for row in rows if row.node}

    for at, row in enumerate(rows):
        assert len(row.glyphs) <= len(row.colors) or row.glyphs == "●"
        for column, here in enumerate(row.glyphs):
            above, below = glyph(rows, at - 1, column), glyph(rows, at + 1, column)
            up = "u" in ARMS.get(here, "") or (here == "●" and row.node.key in has_child)
            assert up == ((above == "●" and rows[at - 1].node.parent is not None)
                          or "d" in ARMS.get(above, ""))  # fmt: skip
            if "r" in ARMS.get(here, ""):
                assert "l" in ARMS[glyph(rows, at, column + 1)]
            if "d" in ARMS.get(here, ""):
                assert below == "●" or "u" in ARMS[below]


@given(forests())
def test_a_cut_picture_lets_lines_run_on(nodes):
    ordered = children_first(nodes)
    rows = list(draw(ordered[:5]))

    for at, row in enumerate(rows):
        if row.node is not None and row.node.parent is not None:
            shown = {node.key for node in ordered[:5]}
            end = follow(rows, at, row.glyphs.index("●"))
            assert end == (row.node.parent if row.node.parent in shown else None)


@given(forests())
def test_it_has_as_many_characters_in_ascii(nodes):
    for row in picture(nodes):
        assert row.in_ascii().isascii()
        assert len(row.in_ascii()) == len(row.glyphs)
        assert set(row.glyphs) <= {*GLYPHS, " "}


def lines(*nodes, ascii_only=False):
    found = []
    for row in draw([Node(*node) for node in nodes]):
        picture = row.in_ascii() if ascii_only else row.glyphs
        found.append(f"{picture} {row.node.key}" if row.node else picture.rstrip())
    return found


def test_a_fork_looks_as_in_git() -> None:
    nodes = [("e2", "e1"), ("m3", "m2"), ("e1", "m2"), ("m2", "m1"), ("m1", None)]

    assert lines(*nodes) == ["● e2", "│ ● m3", "● │ e1", "├─╯", "● m2", "● m1"]
    assert lines(*nodes, ascii_only=True) == ["* e2", "| * m3", "* | e1", "|/", "* m2", "* m1"]


def test_lines_cross_on_their_way_to_a_farther_one() -> None:
    nodes = [("a", "r"), ("b", "q"), ("c", "r"), ("d", "r"), ("r", None), ("q", None)]

    assert lines(*nodes) == [
        "● a", "│ ● b", "│ │ ● c", "│ │ │ ● d", "├─┼─┴─╯", "● │ r", "  ● q",
    ]  # fmt: skip


def test_histories_without_a_common_root_stand_side_by_side() -> None:
    assert lines(("a", "b"), ("x", None), ("b", None)) == ["● a", "│ ● x", "● b"]
