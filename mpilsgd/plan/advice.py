"""The settings that a plan recommends, and what it warns of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from mpilsgd.exchange import Method
from mpilsgd.methods import ADMM, EASGD, LSGD, AllreduceSGD, DiLoCo, Downpour, EASGDTree, LocalSGD
from mpilsgd.plan.costs import Sizes
from mpilsgd.plan.forecast import Forecast, forecast, least, least_factor, longer
from mpilsgd.plan.machine import Machine
from mpilsgd.plan.trial import Seen, look

DEGREES = (2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Advice:
    """A method with the settings that keep its exchanges under a share of the time.

    name: as a table has it; method: its class; settings: its periods and the like; seen: its exchanges with them;
    found: what a step costs then. The last two are None where no setting does it.
    """

    name: str
    method: type[Method]
    settings: dict[str, Any]
    seen: Seen | None = None
    found: Forecast | None = None


# Each with a period of 1, of which multiples are tried
FORMS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "AllreduceSGD": (AllreduceSGD, {}),
    "LocalSGD": (LocalSGD, {"period": 1}),
    "LSGD": (LSGD, {"period": 1, "global_period": 1}),
    "LSGD wait-free": (LSGD, {"period": 1, "global_period": 1, "asynchronous": "wait-free"}),
    "EASGD": (EASGD, {"period": 1}),
    "EASGD overlap": (EASGD, {"period": 1, "overlap": True}),
    "EASGD asynchronous": (EASGD, {"period": 1, "asynchronous": True}),
    "Downpour": (Downpour, {"period": 1}),
    "DiLoCo": (DiLoCo, {"period": 1}),
    "ADMM": (ADMM, {"rho": 1.0}),
    "EASGDTree": (EASGDTree, {"period": 1, "upper_period": 1}),
}


METHODS = tuple(FORMS)


def advise(
    sizes: Sizes, machine: Machine, step_s: float, share: float, names: Iterable[str] | None = None
) -> list[Advice]:
    """For each method the least periods that keep exchanges at or under a share of the time.

    Args:
        sizes: of the model; machine: where; step_s: seconds of a gradient and a step alone; share: in (0, 1).
        names: of `METHODS` (None: all).
    """
    found = []
    for name in METHODS if names is None else names:
        method, settings = FORMS[name]
        if method is EASGDTree:
            if machine.size > 1:
                found.append(_tree(name, sizes, machine, step_s, share))
        elif method is LSGD and machine.nodes > 1:
            found.append(_two_periods(name, settings, sizes, machine, step_s, share))
        else:
            found.append(_one_period(name, method, settings, sizes, machine, step_s, share))
    return found


def _one_period(
    name: str,
    method: type[Method],
    settings: dict[str, Any],
    sizes: Sizes,
    machine: Machine,
    step_s: float,
    share: float,
) -> Advice:
    seen = look(method, settings, min(machine.nodes, 2))
    if "period" not in settings:  # it talks at every step
        return Advice(name, method, settings, seen, forecast(seen, sizes, machine, step_s))
    factor = least_factor(seen, sizes, machine, step_s, share)
    if factor is None:
        return Advice(name, method, settings)
    seen = longer(seen, factor)
    return Advice(name, method, _times(settings, factor), seen, forecast(seen, sizes, machine, step_s))


def _times(settings: Mapping[str, Any], factor: int) -> dict[str, Any]:
    return {key: value * factor if key.endswith("period") else value for key, value in settings.items()}


def at(
    name: str,
    method: type[Method],
    settings: Mapping[str, Any],
    sizes: Sizes,
    machine: Machine,
    step_s: float,
) -> Advice:
    """A method with given settings."""
    seen = look(method, settings, min(machine.nodes, 2))
    return Advice(name, method, dict(settings), seen, forecast(seen, sizes, machine, step_s))


def _two_periods(
    name: str, settings: dict[str, Any], sizes: Sizes, machine: Machine, step_s: float, share: float
) -> Advice:
    """tau so that the groups' rounds take half of the share, tau_G a multiple of it; one period for groups of one."""
    seen = look(LSGD, {**settings, "period": 1, "global_period": 2}, 2)
    near = next(event for event in seen.events if not event.verbs[0].far)
    far = next(event for event in seen.events if event.verbs[0].far)

    def rounds(period: int, multiple: float) -> Seen:
        """Those of the groups alone, and those of all."""
        both = dataclasses.replace(far, every=period * multiple)
        if multiple == 1:
            return dataclasses.replace(seen, events=(both,))
        alone = dataclasses.replace(near, every=period / (1 - 1 / multiple))
        return dataclasses.replace(seen, events=(alone, both))

    multiple: int | None = 1
    if machine.most == 1:  # who is alone in a group has nobody there to be pulled to
        period = least_factor(rounds(1, 1), sizes, machine, step_s, share)
    elif period := least_factor(rounds(1, math.inf), sizes, machine, step_s, share / 2):
        multiple = least(lambda m: forecast(rounds(period, m), sizes, machine, step_s).share <= share)
    if period is None or multiple is None:
        return Advice(name, LSGD, settings)
    found = rounds(period, multiple)
    settings = {**settings, "period": period, "global_period": period * multiple}
    return Advice(name, LSGD, settings, found, forecast(found, sizes, machine, step_s))


def _tree(name: str, sizes: Sizes, machine: Machine, step_s: float, share: float) -> Advice:
    """The degree and scheme with the most gradients a second."""
    best = Advice(name, EASGDTree, {})
    for degree in DEGREES:
        for scheme in ({"period": 1, "upper_period": 10}, {"up_period": 1, "down_period": 10}):
            settings: dict[str, Any] = {"degree": degree, **scheme}
            if "up_period" in scheme:
                settings["scheme"] = "up-down"
            one = _scaled(name, settings, sizes, machine, step_s, share)
            if one.found is not None and _speed(one.found) > (
                0.0 if best.found is None else _speed(best.found)
            ):
                best = one
    return best


def _scaled(
    name: str, settings: dict[str, Any], sizes: Sizes, machine: Machine, step_s: float, share: float
) -> Advice:
    seen = look(EASGDTree, settings, 1)
    factor = least_factor(seen, sizes, machine, step_s, share)
    if factor is None:
        return Advice(name, EASGDTree, settings)
    seen = longer(seen, factor)
    return Advice(name, EASGDTree, _times(settings, factor), seen, forecast(seen, sizes, machine, step_s))


def _speed(found: Forecast) -> float:
    """Gradients a second."""
    return found.workers / found.step_s if found.step_s else 0.0
