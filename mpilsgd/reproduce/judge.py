"""A row of a comparison, the paper's against ours, and its verdict, which is computed.

`number` compares two numbers within a tolerance, `stated` says whether a property that a paper states holds, `larger`
stands for what needs another machine. The text behind "differs" says what is known about it: of a wrong formula, the
right one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AGREES, DIFFERS, TOO_LARGE, NOT_RUN = "agrees", "differs", "too large here", "not run"
BEYOND = "not in the paper"


@dataclass(frozen=True)
class Row:
    """One quantity: what the paper says, what came out here, the verdict and, where it is not "agrees", the reason."""

    quantity: str
    paper: str
    here: str
    outcome: str
    why: str = ""

    @property
    def verdict(self) -> str:
        return f"{self.outcome}: {self.why}" if self.why else self.outcome


def number(
    quantity: str, paper: float, here: float, *, rel: float = 0.0, within: float = 0.0, why: str = ""
) -> Row:
    """Agrees where |here - paper| <= within + rel |paper|; a number that is not finite never does."""
    gap = abs(here - paper)
    agrees = gap <= within + rel * abs(paper)
    by = f"by {figures(gap)}"
    if paper and math.isfinite(gap):
        percent = 100 * gap / abs(paper)
        by += f" ({percent:.0f} %)" if percent >= 10 else f" ({percent:.2g} %)"
    reason = "" if agrees else f"{by}; {why}" if why else by
    return Row(quantity, figures(paper), figures(here), AGREES if agrees else DIFFERS, reason)


def stated(quantity: str, paper: str, here: str | float, holds: bool, *, why: str = "") -> Row:
    """Agrees where the property that the paper states holds here."""
    shown = here if isinstance(here, str) else figures(here)
    return Row(quantity, paper, shown, AGREES if holds else DIFFERS, "" if holds else why)


def beyond(quantity: str, here: str, what: str) -> Row:
    """Something that the paper leaves out and a reader should know."""
    return Row(quantity, "-", here, BEYOND, what)


def larger(quantity: str, paper: str, job: str) -> Row:
    """Not for this machine: the job that would do it."""
    return Row(quantity, paper, "-", TOO_LARGE, job)


def figures(value: float) -> str:
    """A number as a table shows it: five significant digits."""
    value = float(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.5g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.3g}"
