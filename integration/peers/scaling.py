"""Draw decode throughput over rows, a line for each number of GPUs: what sharding brings.

    python scaling.py ONE/gpu.json TWO/gpu.json … > scaling.svg

Each file is what `benches/gpu.rs` wrote to $OUT with `decode` and another `ranks=N`. Needs no packages.
"""

import json
import math
import sys

WIDTH, HEIGHT = 420, 300  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 36, 44
COLORS = ["#2563eb", "#dc2626", "#059669", "#d97706"]
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#374151}.title{font-size:13px;font-weight:600;fill:#111827}"
    ".grid{stroke:#e5e7eb}.axis{stroke:#9ca3af}polyline{fill:none;stroke-width:2;stroke-linejoin:round}"
)


def read(paths):
    """{context: {ranks: [(rows, tokens a second)]}}, rows ascending."""
    found = {}
    for path in paths:
        with open(path) as file:
            for row in json.load(file):
                if row["what"] == "decode":
                    points = found.setdefault(row["context"], {}).setdefault(row["ranks"], [])
                    points.append((row["rows"], 1000 * row["rows"] / row["ms"]))
    return {
        context: {ranks: sorted(points) for ranks, points in sorted(lines.items())}
        for context, lines in sorted(found.items())
    }


def panel(left, context, lines):
    """One context's lines, both axes logarithmic: where sharding scales, lines lie a constant apart."""
    points = [point for line in lines.values() for point in line]
    rows = sorted({rows for rows, _ in points})
    low, high = (10 ** bound for bound in bounds([tokens for _, tokens in points]))

    def x(n_rows):
        share = math.log(n_rows / rows[0]) / math.log(rows[-1] / rows[0])
        return left + LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(tokens):
        return TOP + (1 - math.log(tokens / low) / math.log(high / low)) * (HEIGHT - TOP - BOTTOM)

    svg = [f'<text class="title" x="{left + LEFT}" y="20">Tokens a second, context {context}</text>']
    tick = low
    while tick <= high * 1.001:
        svg.append(f'<line class="grid" x1="{x(rows[0])}" x2="{x(rows[-1])}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        svg.append(f'<text x="{x(rows[0]) - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,.0f}</text>')
        tick *= 10
    for n_rows in rows:
        svg.append(f'<text x="{x(n_rows):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{n_rows}</text>')
    svg.append(f'<line class="axis" x1="{x(rows[0])}" x2="{x(rows[-1])}" y1="{y(low):.1f}" y2="{y(low):.1f}"/>')
    svg.append(f'<text x="{x(rows[-1])}" y="{HEIGHT - 8}" text-anchor="end">rows of a decode step</text>')
    for (ranks, line), color in zip(lines.items(), COLORS):
        path = " ".join(f"{x(n_rows):.1f},{y(tokens):.1f}" for n_rows, tokens in line)
        svg.append(f'<polyline points="{path}" stroke="{color}"/>')
        label = TOP + 14 + 16 * list(lines).index(ranks)
        name = f"{ranks} GPU{'s' * (ranks > 1)}"
        svg.append(f'<text x="{x(rows[0]) + 12}" y="{label}" style="fill:{color}">{name}</text>')
    return svg


def bounds(values):
    """Powers of ten around values."""
    return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))


def main():
    found = read(sys.argv[1:])
    width = WIDTH * len(found)
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}">')
    print(f"<style>{STYLE}</style>")
    print(f'<rect width="{width}" height="{HEIGHT}" fill="#fff"/>')
    for number, (context, lines) in enumerate(found.items()):
        print("\n".join(panel(number * WIDTH, context, lines)))
    print("</svg>")


if __name__ == "__main__":
    main()
