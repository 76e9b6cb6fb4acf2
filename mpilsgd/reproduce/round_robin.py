"""Thesis 3.3: ADMM and EASGD when the workers take turns; ADMM may be unstable where EASGD is not.

Fig. 3.2 is a map of the round's spectral radius, Fig. 3.3 the real ADMM, beside the real EASGD at the same rates
(alpha = eta rho) and beside the powers of the map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd import theory
from mpilsgd.colors import METHODS
from mpilsgd.reproduce import drawing
from mpilsgd.reproduce.judge import number, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result
from mpilsgd.reproduce.workers import follow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LR, _RHO, _P, _START = 0.001, 2.5, 3, 1000.0


def fig_3_2(options: Options) -> Result:
    """The radius of ADMM's round over eta and rho, for 3 and 8 workers."""
    points = 60 if options.quick else 160
    lr, rho = np.linspace(0, 1e-2, points + 1)[1:], np.linspace(0, 10, points + 1)[1:]
    maps = {p: theory.spectral_radius(theory.round_robin_admm(lr, rho[:, None], p)) for p in (3, 8)}
    here = float(theory.spectral_radius(theory.round_robin_admm(_LR, _RHO, _P)))
    easgd = float(theory.spectral_radius(theory.round_robin_easgd(_LR, _LR * _RHO, _P)))
    rows = [
        stated(
            f"ADMM, p = {p}: unstable somewhere",
            "yes",
            f"largest radius {radius.max():.5f}",
            radius.max() > 1,
        )
        for p, radius in maps.items()
    ]
    rows += [
        stated("ADMM at eta = .001, rho = 2.5, p = 3", "above 1", f"{here:.7f}", here > 1),
        stated("EASGD there, alpha = eta rho", "at most 1", f"{easgd:.7f}", easgd <= 1),
    ]
    etas = np.linspace(0, 2, 21)
    inside = [
        theory.spectral_radius(
            theory.round_robin_easgd(etas, share * theory.round_robin_easgd_edge(etas), p)
        ).max()
        for p in (1, 2, 3, 8)
        for share in (0.25, 0.5, 0.75, 1.0)
    ]
    rows.append(
        stated(
            "EASGD for alpha <= (4 - 2 eta) / (4 - eta), p = 1, 2, 3, 8",
            "at most 1",
            f"{max(inside):.9f}",
            max(inside) <= 1 + 1e-7,
        )
    )
    beyond = {
        p: float(
            theory.spectral_radius(
                theory.round_robin_easgd(1.0, 1.05 * theory.round_robin_easgd_edge(1.0), p)
            )
        )
        for p in (1, 2)
    }
    rows.append(
        stated(
            "EASGD 5 % beyond that, eta = 1, p = 1 and 2",
            "above 1 for every p",
            f"{beyond[1]:.4f} and {beyond[2]:.4f}",
            min(beyond.values()) > 1,
            why="the condition is sufficient for every p, not necessary for even p",
        )
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        least = min(float(radius.min()) for radius in maps.values())
        most = max(float(radius.max()) for radius in maps.values())
        for axis, (p, radius) in zip(axes, maps.items(), strict=True):
            picture = axis.pcolormesh(
                lr, rho, radius, cmap="viridis", vmin=least, vmax=most, shading="nearest"
            )
            axis.contour(lr, rho, radius, levels=[1.0], colors="white", linewidths=1.2)
            axis.set_title(f"p = {p}", loc="left")
            axis.set_xlabel("learning rate η")
        drawing.mark(axes[0], _LR, _RHO, f"unstable: {here:.5f}")
        axes[0].set_ylabel("penalty ρ")
        figure.colorbar(picture, ax=axes, label="largest absolute eigenvalue (white line: 1)")

    return Result(rows, draw, f"a grid of {points} x {points} points" if options.quick else "", (9.0, 4.2))


def fig_3_3(options: Options) -> Result:
    """The centre of the real ADMM and of the real EASGD, in turns, from 1000."""
    import torch

    from mpilsgd import ADMM, EASGD

    rounds = 150 if options.quick else 2000

    def sgd(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=_LR)

    makes = {
        "ADMM": lambda x, topology: ADMM(sgd(x), topology, rho=_RHO),
        "EASGD": lambda x, topology: EASGD(
            sgd(x),
            topology,
            center_rate=_P * _LR * _RHO,
            moving_rate=_LR * _RHO,
            period=1,
            asynchronous=True,
            order="round-robin",
        ),
    }
    starts = np.full((_P, 1), _START)
    real = {
        name: follow(make, lambda x, rank, g: (x.clone(), 0.0), starts, rounds, every=5).centre[:, 0]
        for name, make in makes.items()
    }
    steps = np.arange(0, 20_000)
    maps = {
        "ADMM": _powers(theory.round_robin_admm(_LR, _RHO, _P), [0.0, _START] * _P + [_START], len(steps)),
        "EASGD": _powers(theory.round_robin_easgd(_LR, _LR * _RHO, _P), [_START] * (_P + 1), len(steps)),
    }
    rows = []
    for name, centre in real.items():
        gap = float(np.abs(centre - maps[name][: 5 * len(centre) : 5]).max() / _START)
        rows.append(
            number(
                f"{name}: the method against the map, {rounds} rounds, part of 1000", 0.0, gap, within=1e-9
            )
        )
    early, late = (float(np.abs(maps["ADMM"][part]).max()) for part in (slice(0, 5000), slice(15000, None)))
    rows += [
        stated(
            "ADMM's centre, the map to 20000 rounds",
            "grows",
            f"{early:.3g}, then {late:.3g}",
            late > 10 * early,
        ),
        stated("... changes its sign", "oscillates", _changes(maps["ADMM"]), _changes(maps["ADMM"]) > 10),
        stated("EASGD's centre", "decays", float(abs(maps["EASGD"][-1])), abs(maps["EASGD"][-1]) < 1),
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2)
        for axis, (name, whole) in zip(axes, maps.items(), strict=False):
            axis.plot(
                _P * steps[1:], whole[1:], color=METHODS[name], linewidth=0.8, label="powers of the map"
            )
            shown = real[name][1:]
            turns = _P * 5 * np.arange(1, len(shown) + 1)
            axis.plot(
                turns, shown, color=drawing.INK, linewidth=3, alpha=0.6, label=f"real {name}, in process"
            )
            axis.set_title(name, loc="left")
            axis.set_xlabel("time step t (a worker's turn)")
            axis.legend(loc="lower left")
            axis.set_xscale("log")
            axis.set_yscale("symlog", linthresh=100)
        axes[0].set_ylabel("centre")

    shortened = f"the real methods run {rounds} rounds, the map goes on" if options.quick else ""
    return Result(rows, draw, shortened, (10.0, 4.2))


def _powers(matrix: np.ndarray, state: list[float], count: int) -> np.ndarray:
    """The last entry of the state over the rounds."""
    now, found = np.array(state), np.empty(count)
    for t in range(count):
        found[t] = now[-1]
        now = matrix @ now
    return found


def _changes(values: np.ndarray) -> int:
    return int((np.diff(np.sign(values)) != 0).sum())


ENTRIES = [
    Reproduction("thesis-fig3.2", "thesis, Fig. 3.2", "ADMM in round robin, where it is unstable", fig_3_2),
    Reproduction("thesis-fig3.3", "thesis, Fig. 3.3", "ADMM's centre blows up in round robin", fig_3_3),
]
