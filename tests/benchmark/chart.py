"""The benchmark's chart: bars on a logarithmic scale, as SVG for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, RIGHT, ROW = 820, 170, 90, 20  # pixels
LEAST_MS, MOST_MS = 0.01, 100_000.0

SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
font-family="system-ui, sans-serif" font-size="12">
<title>{title}</title>
<style>
  text {{ fill: #59636e }} .head {{ fill: #1f2328; font-weight: 600 }} line {{ stroke: #d1d9e0 }}
  .ours {{ fill: #1a7f37 }} .baseline {{ fill: #9aa4ae }} .simplest {{ fill: #d4762c }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #9198a1 }} .head {{ fill: #f0f6fc }} line {{ stroke: #3d444d }}
    .ours {{ fill: #3fb950 }} .baseline {{ fill: #656c76 }} .simplest {{ fill: #e0823d }}
  }}
</style>
<text class="head" x="0" y="14" font-size="14">{title}</text>
{body}
</svg>
"""


class Bar(NamedTuple):
    """A bar: its label, its length, and its kind: ours, baseline or simplest."""

    label: str
    ms: float
    kind: str


def x(ms: float) -> float:
    """Return where `ms` is on the scale."""
    decades = math.log10(max(ms, LEAST_MS) / LEAST_MS) / math.log10(MOST_MS / LEAST_MS)
    return LEFT + decades * (WIDTH - LEFT - RIGHT)


def duration(ms: float) -> str:
    """Return `ms` as one reads it: 0.28 ms, 21 ms, 18.7 s."""
    if ms >= 10_000:
        return f"{ms / 1000:.3g} s"
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.2g} ms"


def chart(groups: Mapping[str, Sequence[Bar]]) -> str:
    """Return the chart of these bars, in groups with a heading each."""
    body, y = [], 44
    height = y + sum(ROW * (len(bars) + 1.7) for bars in groups.values())
    for power in range(-2, 6):
        at, ms = x(10.0**power), 10.0**power
        label = f"{ms / 1000:g} s" if ms >= 1000 else f"{ms:g} ms"
        body.append(f'<text x="{at:.0f}" y="{y - 8}" text-anchor="middle">{label}</text>')
        body.append(f'<line x1="{at:.0f}" x2="{at:.0f}" y1="{y - 4}" y2="{height:.0f}"/>')
    top = float(y)
    for heading, bars in groups.items():
        top += ROW
        body.append(f'<text class="head" x="0" y="{top:.0f}">{escape(heading)}</text>')
        for bar in bars:
            top += ROW
            length = x(bar.ms) - LEFT
            body.append(
                f'<text x="{LEFT - 8}" y="{top:.0f}" text-anchor="end">{escape(bar.label)}</text>'
                f'<rect class="{bar.kind}" x="{LEFT}" y="{top - 12:.0f}" width="{length:.1f}" '
                f'height="15" rx="2"/>'
                f'<text x="{LEFT + length + 6:.0f}" y="{top:.0f}">{duration(bar.ms)}</text>'
            )
        top += ROW * 0.7
    title = "From start to the caller's first frame (Deepgram takes 200 ms of it for a new text)"
    return SVG.format(width=WIDTH, height=round(height), title=title, body="\n".join(body))
