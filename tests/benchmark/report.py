"""What is printed and drawn: a table, and a chart as SVG for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = dict[str, float]  # the figure of each program
Rows = dict[str, Row]  # by what it is

FIRST_BYTE_MS = 200.0  # how long Deepgram takes, and then streams ten times as fast as one speaks
ROUND_TRIP_MS = 80.0
NAMES = {"simplest": "the simplest way"}
WIDTH, LEFT, RIGHT = 860, 226, 184  # pixels; the labels are left of the bars
TOP, BAR, GROUP = 62, 20, 56
LEAST_MS, MOST_MS = 0.1, 100_000.0
TITLE = "How long callers wait for the first sound, with Deepgram 80 ms away"
AXIS = "the longest wait; 100 callers come within a second; each line is ten times the one before"
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
font-family="system-ui, sans-serif" font-size="13">
<title>{title}</title>
<style>
  text {{ fill: #59636e; stroke: #fff; stroke-width: 4px; paint-order: stroke }}
  .head {{ fill: #1f2328; font-weight: 600 }} .grid {{ stroke: #d1d9e0 }}
  .ours {{ fill: #1a7f37 }} .simplest {{ fill: #d4762c }} .deepgram {{ stroke: #1f2328 }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #9198a1; stroke: #0d1117 }} .head {{ fill: #f0f6fc }} .grid {{ stroke: #3d444d }}
    .ours {{ fill: #3fb950 }} .simplest {{ fill: #e0823d }} .deepgram {{ stroke: #f0f6fc }}
  }}
</style>
{body}
</svg>
"""


def figure(value: float | None, unit: str) -> str:
    """Return `value` with its unit, in three digits."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "lost"
    if unit == "ms" and value >= 1000:
        return figure(value / 1000, "s")
    digits = float(f"{value:.3g}")
    return f"{digits:g} {unit}".strip()


def table(head: str, programs: Sequence[str], rows: Rows, unit: str) -> str:
    """Return `rows` in GitHub's Markdown."""
    heads = [head, *(NAMES.get(program, program) for program in programs)]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * len(programs)]
    for what, figures in rows.items():
        cells = [figure(figures.get(program), unit) for program in programs]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def x(ms: float) -> float:
    """Return where `ms` is on the axis."""
    share = math.log(max(ms, LEAST_MS) / LEAST_MS) / math.log(MOST_MS / LEAST_MS)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def text(at: float, y: float, what: str, attributes: str = 'text-anchor="middle"') -> str:
    """Return a text of the chart."""
    return f'<text x="{at:.0f}" y="{y:.0f}" {attributes}>{what}</text>'


def line(ms: float, bottom: float, attributes: str) -> str:
    """Return a line of the chart, from top to bottom."""
    return f'<line x1="{x(ms):.1f}" x2="{x(ms):.1f}" y1="{TOP - 8}" y2="{bottom}" {attributes}/>'


def chart(rows: Rows) -> str:
    """Return the chart of these rows, all in milliseconds."""
    bottom = TOP + GROUP * len(rows)
    body = [text(0, 18, TITLE, 'class="head" font-size="16"')]
    for ms in (0.1, 1, 10, 100, 1000, 10_000, 100_000):
        body.append(line(ms, bottom, 'class="grid"'))
        body.append(text(x(ms), bottom + 18, figure(ms, "ms")))
    body.append(text((x(LEAST_MS) + x(MOST_MS)) / 2, bottom + 42, AXIS))
    y = TOP
    for what, figures in rows.items():
        body.append(text(LEFT - 12, y + BAR + 4, what, 'class="head" text-anchor="end"'))
        for program, ms in figures.items():
            bar = f'x="{LEFT}" y="{y}" width="{x(ms) - LEFT:.1f}" height="{BAR - 3}"'
            body.append(f'<rect class="{program}" {bar} rx="2"/>')
            label = f"{NAMES.get(program, program)}: {figure(ms, 'ms')}"
            body.append(text(x(ms) + 8, y + 13, label, ""))
            y += BAR
        y += GROUP - 2 * BAR
    first_byte_ms = ROUND_TRIP_MS + FIRST_BYTE_MS
    label = f"Deepgram's first byte: {figure(first_byte_ms, 'ms')}"
    body.append(text(x(first_byte_ms), TOP - 14, label))
    body.append(line(first_byte_ms, bottom, 'class="deepgram" stroke-dasharray="4 3"'))
    return SVG.format(width=WIDTH, height=bottom + 52, title=TITLE, body="\n".join(body))
