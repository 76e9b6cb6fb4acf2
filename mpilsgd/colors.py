"""One colour a method, in every picture; and the colours of what is no method."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence

# Okabe and Ito's palette, told apart under all common colour blindness; their yellow is too pale for a line.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
METHODS = {
    "LSGD": PALETTE[0],
    "EASGD": PALETTE[1],
    "LocalSGD": PALETTE[2],
    "DiLoCo": PALETTE[3],
    "Downpour": PALETTE[4],
    "EASGDTree": PALETTE[5],
    "AllreduceSGD": PALETTE[6],
    "ADMM": PALETTE[7],
}
OTHER = "#7B4FA3"  # of the methods that are not ours
INK, FAINT = "#222222", "#D9D9D9"
PARTS = {"compute": "#56B4E9", "data": "#E69F00", "comm": "#B5341A", "wait": "#E3A293", "other": "#C8C8C8"}


def colors_of(methods: Sequence[str]) -> list[str]:
    """The colour of each run: its method's, of which several runs of one colour have paler and paler shades."""
    colors = [METHODS.get(method, OTHER) for method in methods]
    many, seen, found = Counter(colors), Counter[str](), []
    for color in colors:
        found.append(_shade(color, seen[color] / max(many[color] - 1, 1)))
        seen[color] += 1
    return found


def _shade(color: str, paler: float) -> str:
    """The colour itself (0) to one with much more white (1)."""
    hue, light, full = colorsys.rgb_to_hls(*(int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)))
    parts = colorsys.hls_to_rgb(hue, light + (max(0.62, light) - light) * paler, full)
    return "#" + "".join(f"{round(255 * part):02X}" for part in parts)
