"""Curves over time as an SVG of its own: no script, no font, no other file; light and dark as the reader's page is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 860, 190
LEFT, RIGHT, TOP, BOTTOM = 70, 120, 34, 26
COLOURS = ("#2b6cb0", "#c65d07", "#199473", "#9b2c6f", "#7b8794", "#e53e3e", "#5a54c4", "#2d3748")
_STYLE = """
text{font:12px system-ui,sans-serif;fill:#1f2933}.title{font-size:14px;font-weight:600}.tick{fill:#616e7c;font-size:11px}
.grid{stroke:#e4e7eb}.curve{fill:none;stroke-width:1.6}
@media (prefers-color-scheme:dark){text{fill:#e4e7eb}.tick{fill:#9aa5b1}.grid{stroke:#323f4b}.last{stroke:#cbd2d9}}
""".replace("\n", "")


@dataclass(frozen=True)
class Panel:
    """One set of axes. ``curves``: name → (seconds, value), in the unit that ``title`` names."""

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


def picture(panels: Sequence[Panel], seconds: float) -> str:
    """All panels, one below the other, each from 0 to its greatest value; time runs from 0 to ``seconds``."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    height = len(panels) * HEIGHT
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
            ' role="img" aria-label="Soak test">',
            f"<style>{_STYLE}</style>",
            *(line for i, panel in enumerate(panels) for line in _panel(panel, i * HEIGHT, seconds, colours)),
            "</svg>",
            "",
        ]
    )


def steps(most: float) -> list[float]:
    """Round values from 0 to at least ``most``, three to six of them."""
    if most <= 0:
        return [0.0, 1.0]
    unit = 10 ** floor(log10(most))
    step = next(s * unit for s in (0.2, 0.5, 1.0, 2.0) if most / (s * unit) <= 5)
    return [i * step for i in range(ceil(most / step - 1e-9) + 1)]


def _panel(panel: Panel, above: int, seconds: float, colours: Mapping[str, str]) -> list[str]:
    ticks = steps(max((v for curve in panel.curves.values() for _, v in curve), default=1.0))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(time: float) -> float:
        return LEFT + width * time / seconds

    def y(value: float) -> float:
        return above + TOP + height * (1 - value / ticks[-1])

    out = [f'<text class="title" x="{LEFT}" y="{above + 18}">{escape(panel.title)}</text>']
    for tick in ticks:
        out.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{LEFT + width}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y(tick) + 4:.1f}">{tick:g}</text>')
    for i in range(6):
        time = seconds * i / 5
        label = f"{time / 60:g} min" if seconds >= 120 else f"{time:g} s"
        out.append(f'<text class="tick" text-anchor="middle" x="{x(time):.1f}" y="{above + HEIGHT - 8}">{label}</text>')
    for i, (name, curve) in enumerate(panel.curves.items()):
        path = "L".join(f"{x(time):.1f} {y(value):.1f}" for time, value in curve)
        if path:
            out.append(f'<path class="curve" stroke="{colours[name]}" d="M{path}"/>')
        at = above + TOP + 8 + 17 * i
        out.append(f'<path class="curve" stroke="{colours[name]}" d="M{LEFT + width + 10} {at - 4}h16"/>')
        out.append(f'<text x="{LEFT + width + 32}" y="{at}">{escape(name)}</text>')
    return out
