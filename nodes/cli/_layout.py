"""Places for the boxes of a graph, in layers from left to right.

The usual four steps (K. Sugiyama et al., 1981): a layer for each box by its longest way from a source, a placeholder
wherever an edge passes a layer, an order in each layer by the mean of the neighbours' places, then heights that pull each
box towards its neighbours without letting two touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SWEEPS = 8


@dataclass(slots=True)
class Layout:
    """Where everything is, in rows and layers; a row is the height of one box with its gap.

    :param place: box → (layer, height of its middle in rows).
    :param bends: edge → places that it passes between its two ends.
    """

    layers: int
    rows: float
    place: dict[str, tuple[int, float]]
    bends: dict[tuple[str, str], list[tuple[int, float]]] = field(default_factory=dict)


def layered(boxes: Sequence[str], edges: Iterable[tuple[str, str]]) -> Layout:
    """Places for ``boxes``, given so that each stands after those that lead to it; ``edges`` are (from, to)."""
    pairs = list(dict.fromkeys(edges))
    layer: dict[str, int] = {}
    for box in boxes:
        layer[box] = max((layer[a] + 1 for a, b in pairs if b == box), default=0)
    columns: list[list[str]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for box in boxes:
        columns[layer[box]].append(box)

    links: list[tuple[str, str]] = []
    passed: dict[tuple[str, str], list[str]] = {}
    for a, b in pairs:
        before = a
        passed[a, b] = []
        for column in range(layer[a] + 1, layer[b]):
            stand_in = f"\0{a}\0{b}\0{column}"  # no box has such a name
            columns[column].append(stand_in)
            passed[a, b].append(stand_in)
            links.append((before, stand_in))
            before = stand_in
        links.append((before, b))

    left: dict[str, list[str]] = {}
    right: dict[str, list[str]] = {}
    for a, b in links:
        right.setdefault(a, []).append(b)
        left.setdefault(b, []).append(a)
    _order(columns, left, right)
    y = _heights(columns, left, right)
    where = {name: (i, y[name]) for i, column in enumerate(columns) for name in column}
    return Layout(
        layers=len(columns),
        rows=max(y.values(), default=0.0) + 0.5,
        place={box: where[box] for box in boxes},
        bends={pair: [where[name] for name in names] for pair, names in passed.items()},
    )


def _order(columns: list[list[str]], left: dict[str, list[str]], right: dict[str, list[str]]) -> None:
    """Sorts each column by where its neighbours stand, forth and back."""
    for sweep in range(SWEEPS):
        forth = sweep % 2 == 0
        neighbours = left if forth else right
        for i in range(1, len(columns)) if forth else range(len(columns) - 2, -1, -1):
            beside = columns[i - 1] if forth else columns[i + 1]
            at = {name: n for n, name in enumerate(beside)}
            own = {name: n for n, name in enumerate(columns[i])}

            def key(
                name: str, at: dict[str, int] = at, own: dict[str, int] = own, near: dict[str, list[str]] = neighbours
            ) -> float:
                places = [at[other] for other in near.get(name, ()) if other in at]
                return sum(places) / len(places) if places else float(own[name])

            columns[i].sort(key=key)


def _heights(columns: list[list[str]], left: dict[str, list[str]], right: dict[str, list[str]]) -> dict[str, float]:
    """Heights of all, at least one row apart in a column (a placeholder needs half a row), the topmost at 0.5."""
    y: dict[str, float] = {}
    for column in columns:
        for n, name in enumerate(column):
            y[name] = n - (len(column) - 1) / 2
    for sweep in range(SWEEPS):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wish = {}
            for name in column:
                near = [y[other] for other in (*left.get(name, ()), *right.get(name, ()))]
                wish[name] = sum(near) / len(near) if near else y[name]
            _settle(column, wish, y)
    top = min(y.values(), default=0.0)
    return {name: value - top + 0.5 for name, value in y.items()}


def _settle(column: list[str], wish: dict[str, float], y: dict[str, float]) -> None:
    """Heights as near to the wishes as order and gaps allow: runs that touch share the mean of their wishes."""
    runs: list[tuple[list[str], float, float]] = []  # names, height of the first, extent of the run
    for name in column:
        run, first, extent = [name], wish[name], 0.0
        while runs and runs[-1][1] + runs[-1][2] + _gap(runs[-1][0][-1], run[0]) > first:
            names, _, before = runs.pop()
            gap = _gap(names[-1], run[0])
            run, extent = names + run, before + gap + extent
            offset, offsets = 0.0, []
            for i, member in enumerate(run):
                offset += _gap(run[i - 1], member) if i else 0.0
                offsets.append(offset)
            first = sum(wish[member] - o for member, o in zip(run, offsets, strict=True)) / len(run)
        runs.append((run, first, extent))
    for run, first, _ in runs:
        at = first
        for i, member in enumerate(run):
            at += _gap(run[i - 1], member) if i else 0.0
            y[member] = at


def _gap(above: str, below: str) -> float:
    return 1.0 - 0.25 * (above.startswith("\0") + below.startswith("\0"))
