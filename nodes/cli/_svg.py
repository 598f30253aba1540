"""A plan as an SVG picture of its own: no script, no font, no other file; light and dark as the reader's page is."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from nodes.cli._layout import Layout, layered

if TYPE_CHECKING:
    from nodes.plan import Plan, PlannedEdge, PlannedNode

WIDTH, HEIGHT = 140, 60
GAP_X, GAP_Y = 110, 26  # the least between two boxes; a long label makes room for itself
MARGIN = 16
_LETTER = 6.2  # width of a letter of a label, px

_STYLE = """
text{font-family:system-ui,sans-serif;fill:#1f2933}
.name{font-size:15px;font-weight:600}.kind,.host{font-size:12px}.host{fill:#616e7c}
.label{font-size:11px;fill:#3e4c59;stroke:#fff;stroke-width:4px;stroke-linejoin:round;paint-order:stroke}
.box{fill:#f5f7fa;stroke:#7b8794;stroke-width:1.5}
.source{fill:#e3f8ee;stroke:#199473}.sink{fill:#fff3e0;stroke:#c65d07}.infer{fill:#e6e6ff;stroke:#5a54c4}
.edge{fill:none;stroke:#7b8794;stroke-width:1.6}.fast{stroke-dasharray:6 4}.head{fill:#7b8794}
@media (prefers-color-scheme:dark){
text{fill:#e4e7eb}.host{fill:#9aa5b1}.label{fill:#cbd2d9;stroke:#0d1117}
.box{fill:#1f2933;stroke:#7b8794}.source{fill:#0c3b31;stroke:#3ebd93}.sink{fill:#48260a;stroke:#f0b429}
.infer{fill:#2a2760;stroke:#a5a0ff}.edge{stroke:#9aa5b1}.head{fill:#9aa5b1}
}""".replace("\n", "")


def picture(plan: Plan) -> str:
    """The whole picture. Safe edges are drawn through, fast ones dashed; each says what travels on it."""
    return _Drawing(plan).text()


def caption(node: PlannedNode) -> str:
    """What a node is, in two words: its kind and the kind within it (``ingest csv``)."""
    family = getattr(node.config, "family", "")
    return f"{node.kind} {getattr(node.config, family)}" if family else node.kind


def label(edge: PlannedEdge) -> str:
    """What an edge carries and how."""
    parts = [edge.type, edge.delivery]
    if edge.port != "out":
        parts.insert(0, edge.port)
    if edge.carrier == "relay":
        parts.append("relay, kept" if edge.relay else "relay")
    if edge.shared:
        parts.append("shared memory")
    return " · ".join(parts)


class _Drawing:
    """One picture while it is made. Lengths are pixels."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.layout: Layout = layered(list(plan.nodes), [(edge.producer, edge.consumer) for edge in plan.edges])
        self.gap = max([GAP_X, *(round(len(label(edge)) * _LETTER) + 14 for edge in plan.edges)])

    def text(self) -> str:
        layout = self.layout
        width = layout.layers * WIDTH + (layout.layers - 1) * self.gap + 2 * MARGIN
        height = round((layout.rows - 1) * (HEIGHT + GAP_Y)) + HEIGHT + 2 * MARGIN
        title = escape(f"Topology {self.plan.topology.name}")
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" role="img" aria-label="{title}">',
                f"<title>{title}</title>",
                f"<style>{_STYLE}</style>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
                'markerUnits="userSpaceOnUse" orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker></defs>',
                *map(self._path, self.plan.edges),
                *map(self._box, self.plan.nodes.values()),
                *self._labels(),
                "</svg>",
                "",
            ]
        )

    def _middle(self, place: tuple[int, float]) -> tuple[float, float]:
        layer, row = place
        x = MARGIN + layer * (WIDTH + self.gap) + WIDTH / 2
        return x, MARGIN + (row - 0.5) * (HEIGHT + GAP_Y) + HEIGHT / 2

    def _points(self, edge: PlannedEdge) -> list[tuple[float, float]]:
        """Where an edge leaves, passes and ends; it goes level through the layers that it passes."""
        x0, y0 = self._middle(self.layout.place[edge.producer])
        x1, y1 = self._middle(self.layout.place[edge.consumer])
        points = [(x0 + WIDTH / 2, y0)]
        for bend in self.layout.bends[edge.producer, edge.consumer]:
            x, y = self._middle(bend)
            points += [(x - WIDTH / 2, y), (x + WIDTH / 2, y)]
        return [*points, (x1 - WIDTH / 2, y1)]

    def _path(self, edge: PlannedEdge) -> str:
        points = self._points(edge)
        d = f"M{points[0][0]:g} {points[0][1]:.1f}"
        for (x0, y0), (x1, y1) in pairwise(points):
            half = (x0 + x1) / 2
            d += f"C{half:g} {y0:.1f} {half:g} {y1:.1f} {x1:g} {y1:.1f}"
        fast = " fast" if edge.delivery == "fast" else ""
        return f'<path class="edge{fast}" marker-end="url(#head)" d="{d}"/>'

    def _labels(self) -> list[str]:
        """Each label on its edge's last stretch, moved along it until it covers no other."""
        taken: list[tuple[float, float, float]] = []  # middle x, y, half width
        out = []
        for edge in self.plan.edges:
            text = label(edge)
            half = len(text) * _LETTER / 2
            (x0, y0), (x1, y1) = self._points(edge)[-2:]
            spots = [(x0 + (x1 - x0) * t, _on_curve(y0, y1, t)) for t in (0.5, 0.62, 0.38, 0.72, 0.28)]
            free = ((x, y) for x, y in spots if all(abs(x - a) > half + h or abs(y - b) > 13 for a, b, h in taken))
            x, y = next(free, spots[0])
            taken.append((x, y, half))
            out.append(f'<text class="label" text-anchor="middle" x="{x:.1f}" y="{y - 6:.1f}">{escape(text)}</text>')
        return out

    def _box(self, node: PlannedNode) -> str:
        x, y = self._middle(self.layout.place[node.name])
        role = "source" if not node.inputs else "infer" if node.kind == "infer" else "sink" if not node.outputs else ""
        notes = [f"on {node.host}"] if len(self.plan.topology.hosts) > 1 else []
        texts = [("name", _short(node.name, 16)), ("kind", _short(caption(node), 22))]
        if notes:
            texts.append(("host", _short(", ".join(notes), 22)))
        top = y - (len(texts) - 1) * 8.5 + 5
        rows = "".join(
            f'<text class="{style}" text-anchor="middle" x="{x:g}" y="{top + i * 17:.1f}">{escape(text)}</text>'
            for i, (style, text) in enumerate(texts)
        )
        left, above = x - WIDTH / 2, y - HEIGHT / 2
        shape = f'<rect class="box {role}" x="{left:g}" y="{above:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="9"/>'
        return f"<g><title>{escape(node.name)}</title>{shape}{rows}</g>"


def _on_curve(y0: float, y1: float, t: float) -> float:
    """Height of the edge's curve at ``t`` of its parameter; near enough to ``t`` of its width."""
    return y0 * (1 - t) ** 2 * (1 + 2 * t) + y1 * t**2 * (3 - 2 * t)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
