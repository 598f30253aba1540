"""The layout of pictures: layers, order and heights hold for any graph without cycles."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.cli._layout import layered


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    count = draw(st.integers(1, 14))
    names = [f"n{i}" for i in range(count)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=25)) if pairs else []
    return names, chosen


@given(graphs())
@settings(deadline=None, derandomize=True, max_examples=150)
def test_layers_go_forward_and_boxes_keep_apart(graph: tuple[list[str], list[tuple[str, str]]]) -> None:
    names, edges = graph
    layout = layered(names, edges)
    assert set(layout.place) == set(names)
    for a, b in edges:
        assert layout.place[a][0] < layout.place[b][0]
        passed = [layer for layer, _ in layout.bends[a, b]]
        assert passed == list(range(layout.place[a][0] + 1, layout.place[b][0]))
    for layer in range(layout.layers):
        rows = sorted(y for at, y in layout.place.values() if at == layer)
        assert rows
        assert all(below - above >= 1 - 1e-9 for above, below in pairwise(rows))
    assert min(y for _, y in layout.place.values()) >= 0.5 - 1e-9
    assert max(y for _, y in layout.place.values()) <= layout.rows - 0.5 + 1e-9


def test_nothing_to_place() -> None:
    assert layered([], []).layers == 0


def test_a_chain_is_level_and_a_fork_is_even() -> None:
    chain = layered(["a", "b", "c"], [("a", "b"), ("b", "c")])
    assert [chain.place[name] for name in "abc"] == [(0, 0.5), (1, 0.5), (2, 0.5)]
    fork = layered(["a", "b", "c"], [("a", "b"), ("a", "c")])
    assert fork.place["a"][1] == (fork.place["b"][1] + fork.place["c"][1]) / 2
