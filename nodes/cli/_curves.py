"""Curves over rounds as an SVG of its own: no script, no font, no other file; light and dark as the reader's page is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 40, 46
COLOURS = ("#2b6cb0", "#c65d07", "#199473", "#9b2c6f", "#7b8794", "#e53e3e", "#5a54c4", "#b7791f")
_APART = 15  # pixels between two names at the right
_STYLE = """
text{font:12px system-ui,sans-serif;fill:#1f2933}.title{font-size:14px;font-weight:600}.tick{fill:#616e7c;font-size:11px}
.grid{stroke:#e4e7eb}.curve{fill:none;stroke-width:2}
@media (prefers-color-scheme:dark){text{fill:#e4e7eb}.tick{fill:#9aa5b1}.grid{stroke:#323f4b}}
""".replace("\n", "")

Curve = Sequence[tuple[float, float]]


def picture(title: str, curves: Mapping[str, Curve], *, x: str, y: str, share: bool = False) -> str:
    """One set of axes with a curve for each name, its last value beside its end. What is no number is left out.

    :param x: what the first numbers are; ``y``: what the second are.
    :param share: they are shares of one, shown as percentages, and the axis is from 0 to 100 %.
    """
    known = {
        name: [(a, b) for a, b in curve if math.isfinite(a) and math.isfinite(b)] for name, curve in curves.items()
    }
    most_x = max((a for curve in known.values() for a, _ in curve), default=1.0) or 1.0
    ticks_x = steps(most_x)
    ticks_y = [i / 5 for i in range(6)] if share else steps(max((b for c in known.values() for _, b in c), default=1.0))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(a: float, b: float) -> tuple[float, float]:
        return LEFT + width * a / most_x, TOP + height * (1 - b / ticks_y[-1])

    def said(b: float) -> str:
        return f"{b:.1%}" if share else f"{b:.3g}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="22">{escape(title)}</text>',
    ]
    for tick in ticks_y:
        _, above = at(0, tick)
        text = f"{tick:.0%}" if share else f"{tick:g}"
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + width}" y1="{above:.1f}" y2="{above:.1f}"/>')
        lines.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{above + 4:.1f}">{text}</text>')
    for tick in ticks_x:
        if tick <= most_x:
            left, _ = at(tick, 0)
            lines.append(
                f'<text class="tick" text-anchor="middle" x="{left:.1f}" y="{TOP + height + 16}">{tick:g}</text>'
            )
    lines.append(
        f'<text class="tick" text-anchor="middle" x="{LEFT + width / 2:g}" y="{HEIGHT - 10}">{escape(x)}</text>'
    )
    lines.append(f'<text class="tick" x="6" y="{TOP - 10}">{escape(y)}</text>')
    ends: list[tuple[float, str, str]] = []
    for i, (name, curve) in enumerate(known.items()):
        colour = COLOURS[i % len(COLOURS)]
        if curve:
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*point) for point in curve))
            lines.append(f'<polyline class="curve" stroke="{colour}" points="{points}"/>')
            ends.append((at(*curve[-1])[1], f"{name} {said(curve[-1][1])}", colour))
    below = float(TOP - _APART)
    for above, text, colour in sorted(ends):
        below = max(above, below + _APART)
        lines.append(f'<text x="{LEFT + width + 8}" y="{below + 4:.1f}" style="fill:{colour}">{escape(text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def steps(most: float) -> list[float]:
    """Round values from 0 to at least ``most``, a few of them."""
    if most <= 0:
        return [0.0, 1.0]
    unit = 10 ** math.floor(math.log10(most))
    step = next(s * unit for s in (0.2, 0.5, 1.0, 2.0) if most / (s * unit) <= 5)
    return [i * step for i in range(math.ceil(most / step - 1e-9) + 1)]
