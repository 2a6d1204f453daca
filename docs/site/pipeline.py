"""Draw the pipeline of docs/explanation/architecture.md: python docs/site/pipeline.py > docs/images/pipeline.svg

Columns are the roles of patients, boxes the stages with their rooms, arrows the files between them. The drawing is
narrow, so that it can be read on a phone.
"""

from __future__ import annotations

from html import escape

WIDTH, HEIGHT = 560, 1010
INK, FILES, GUARD = "#1f2933", "#52606d", "#b3261e"
DISCOVERY, REFERENCE, TEST, ALL = "#dbeafe", "#dcf5e3", "#fdebd0", "#eef1f4"
"""Grounds of the three roles, and of what concerns all of them."""
LEFT, MIDDLE, RIGHT = (10, 170), (195, 170), (380, 170)
"""Column: left edge and width."""


def box(x: float, y: float, width: float, title: str, lines: list[str], room: str, ground: str) -> str:
    """A stage: its title, what it does, and the room of the package that it is in."""
    height = 34 + 17 * len(lines) + (19 if room else 0)
    middle = x + width / 2
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{ground}" stroke="{INK}"/>',
        text(middle, y + 22, title, "font-weight:600"),
    ]
    parts += [text(middle, y + 41 + 17 * number, line, "font-size:13px") for number, line in enumerate(lines)]
    if room:
        parts.append(text(middle, y + height - 9, room, f"font:12px monospace;fill:{FILES}"))
    return "\n".join(parts)


def text(x: float, y: float, words: str, style: str = "", anchor: str = "middle") -> str:
    """One line of text; `x` is its middle, or its start."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" style="{style}">{escape(words)}</text>'


def arrow(points: list[tuple[int, int]], files: str = "", at: tuple[int, int] = (0, 0), guard: bool = False) -> str:
    """A line with a head at its last point, and the files that it represents, whose text starts at `at`."""
    path = " ".join(f"{x},{y}" for x, y in points)
    colour, head, dashes = (GUARD, "guard", 'stroke-dasharray="5 4"') if guard else (INK, "head", "")
    look = f'stroke="{colour}" stroke-width="1.5" marker-end="url(#{head})" {dashes}'
    line = f'<polyline points="{path}" fill="none" {look}/>'
    style = f"font-size:12px;fill:{GUARD if guard else FILES}"
    named = [text(at[0], at[1] + 15 * number, part, style, "start") for number, part in enumerate(files.split("|"))]
    return "\n".join([line, *(named if files else [])])


def draw() -> str:
    """The whole drawing, as SVG."""
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" fill="{colour}"/></marker>'
        for name, colour in (("head", INK), ("guard", GUARD))
    )
    both = RIGHT[0] - 25
    parts = [
        box(10, 10, 540, "index, prepare", ["DICOM + reader XML or SEG, LUNA16, image files, nnU-Net folders, phantom",
            "lungs and vessels segmented, nodules from the readers' consensus"], "sources, layouts", ALL),
        arrow([(95, 98), (95, 142)], "ct.nii.gz, layout.nii.gz:|a case, on the model grid", (102, 115)),
        arrow([(280, 98), (280, 142)], "cases.tsv: each patient|has exactly one role", (287, 115)),
        arrow([(465, 98), (465, 142)]),
        box(LEFT[0], 144, LEFT[1], "discovery", ["real training cases"], "", DISCOVERY),
        box(MIDDLE[0], 144, MIDDLE[1], "reference", ["lends its CT"], "", REFERENCE),
        box(RIGHT[0], 144, RIGHT[1], "test", ["never trained on"], "", TEST),
        # Left: the generator. Middle: synthesis.
        arrow([(120, 195), (120, 237)]),
        box(60, 239, 130, "train", ["the generator"], "models", DISCOVERY),
        arrow([(120, 309), (120, 352)], "model.safetensors", (127, 335)),
        arrow([(280, 195), (280, 352)], "CT; layout, its nodules|kept, moved or placed", (287, 265)),
        box(60, 354, both - 60, "synthesize", ["lungs drawn; the rest from the reference"],
            "generators, synthesis", REFERENCE),
        arrow([(280, 424), (280, 467)], "samples", (287, 450)),
        # Real cases enter the arms directly.
        arrow([(32, 195), (32, 467)], "real cases", (39, 450)),
        box(LEFT[0], 469, both - 10, "compose", ["arms: real, real + synthetic at each dose, controls"],
            "arms", DISCOVERY),
        arrow([(525, 195), (525, 504), (358, 504)], "leak guard:|no test patient|in any arm", (372, 524), guard=True),
        arrow([(180, 539), (180, 582)], "arm.json, nnUNet_*", (187, 565)),
        box(LEFT[0], 584, both - 10, "segment", ["nnU-Net per arm and replicate (fold x seed):",
            "same plans, same number of steps"], "segmentation", ALL),
        arrow([(180, 671), (180, 714)], "one segmenter per arm and replicate", (187, 697)),
        arrow([(465, 195), (465, 714)]),
        box(LEFT[0], 716, 540, "predict, evaluate", ["Dice, surfaces, lesions, FROC of every test case"],
            "segmentation, evaluation", TEST),
        arrow([(280, 786), (280, 829)], "metrics.csv, lesions.csv", (287, 812)),
        box(LEFT[0], 831, 540, "verdict", ["synthetic CT beside real CT; instrument check: can this run tell?",
            "then per arm: better, worse, no difference shown, or cannot tell"], "quality, verdict", ALL),
        arrow([(280, 918), (280, 951)]),
        box(LEFT[0], 953, 540, "report.html, tables/, figures/", [], "report", ALL),
    ]  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="15" fill="{INK}" role="img">\n'
        "<title>The pipeline, from scans to the report</title>\n"
        f'<defs>{heads}</defs>\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


if __name__ == "__main__":
    print(draw())
