"""`mpilsgd report --html`: one page that needs nothing else, with curves to point at and to switch on and off.

All text from run directories is escaped: in the tables as HTML, in the curves' data as JSON that cannot end its script.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import yaml

from mpilsgd.colors import colors_of
from mpilsgd.train.judged import LOSS, TRAIN, figure_of, more_of
from mpilsgd.train.run_reader import Run

_AXES = {
    "step": "steps of a worker",
    "grad_evals": "gradient evaluations, all workers",
    "wall_s": "training time",
    "epoch": "epochs",
}
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_COMMAND_BYTES = 100_000


def write_page(
    runs: Sequence[Run], rows: Sequence[Sequence[str]], pictures: Sequence[Path], path: Path
) -> Path:
    """Writes the page.

    Args:
        rows: the table of the runs, its head first; pictures: PNG files that come into the page.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = {
        "title": html.escape(f"mpilsgd: {title}"),
        "note": html.escape(", ".join(run.label for run in runs)),
        "data": data_of(runs),
        "body": "\n".join([_results(rows), _settings(runs), _commands(runs), *map(_picture, pictures)]),
    }
    template = files("mpilsgd.train").joinpath("report.html").read_text(encoding="utf-8")
    # in one pass: what a run's name or settings hold is not looked through again
    path.write_text(_PLACE.sub(lambda found: parts[found[1]], template), encoding="utf-8")
    return path


def data_of(runs: Sequence[Run]) -> str:
    """The curves as JSON that may stand inside a script element."""
    lines = [line for run in runs for line in run.metrics]
    figures = dict.fromkeys([figure_of(lines), LOSS, TRAIN, *more_of(lines)])
    methods = [run.method for run in runs]
    keys = [*_AXES, *(figure.key for figure in figures)]
    told = {
        "axes": [{"key": key, "name": name} for key, name in _AXES.items()],
        "figures": [
            {"key": one.key, "label": one.label, "unit": one.unit, "scale": one.scale} for one in figures
        ],
        "runs": [
            {
                "label": run.label,
                "color": color,
                "dash": _DASHES[methods[:k].count(run.method) % len(_DASHES)],
                "points": {key: _column(run.column(key)) for key in keys},
            }
            for k, (run, color) in enumerate(zip(runs, colors_of(methods), strict=True))
        ],
    }
    return json.dumps(told, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")


def differences(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """The options in which the runs differ, and those that all have alike."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    unlike = [key for key in keys if len({_shown(run, key) for run in runs}) > 1]
    return unlike, [key for key in keys if key not in unlike]


def _column(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]


def _shown(run: Run, key: str) -> str:
    """A setting as config.yaml has it; empty where the run knows none of this name."""
    if key not in run.config:
        return ""
    return (
        yaml.safe_dump(run.config[key], default_flow_style=True, allow_unicode=True)
        .removesuffix("...\n")
        .strip()
    )


def _results(rows: Sequence[Sequence[str]]) -> str:
    return "<h2>Results</h2>" + _table(rows)


def _settings(runs: Sequence[Run]) -> str:
    unlike, alike = differences(runs)
    head = ["", *(run.name for run in runs)]
    told = ""
    if len(runs) > 1:
        table = [head, *([key, *(_shown(run, key) for run in runs)] for key in unlike)]
        told = "<h2>What differs between the runs</h2>"
        told += _table(table, "text") if unlike else "<p class=note>Their settings are the same.</p>"
    same = _table(
        [["", "all" if len(runs) > 1 else "value"], *([key, _shown(runs[0], key)] for key in alike)], "text"
    )
    summary = "Settings that all have alike" if len(runs) > 1 else "All settings"
    return told + f"<details><summary>{summary}</summary>{same}</details>"


def _commands(runs: Sequence[Run]) -> str:
    """What started each run, and took it up again."""
    told = "".join(
        f"<p class=command>{html.escape(run.name)}</p><pre>{html.escape(_command(run))}</pre>" for run in runs
    )
    return f"<h2>The command of each run</h2>{told}"


def _command(run: Run) -> str:
    path = run.path / "command"
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_COMMAND_BYTES).strip() or "(not known)"
    except OSError:
        return "(not known: the run directory holds no file `command`)"


def _picture(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.stem)
    return f'<h2>{name.capitalize()}</h2><figure><img alt="{name}" src="data:image/png;base64,{content}"></figure>'


def _table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head, *others = ([html.escape(str(cell)) for cell in row] for row in rows)
    long = max((len(cell) for row in others for cell in row), default=0) > 60
    cell = "<td class=long>" if long else "<td>"
    body = "".join(f"<tr>{''.join(cell + one + '</td>' for one in row)}</tr>" for row in others)
    heads = "".join(f"<th>{one}</th>" for one in head)
    return f'<div class="scroll {kind}"><table><tr>{heads}</tr>{body}</table></div>'
