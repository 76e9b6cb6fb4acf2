"""Calls of every kernel, each with the NumPy expressions of what it should do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

R, Q, M, WD, LR = 0.3, 0.07, 0.9, 0.01, 0.05  # rates that no type represents exactly

SPECIAL = [float("nan"), float("inf"), float("-inf")]
Vectors = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]


def peers_of(v: dict[str, Any]) -> list[Any]:
    return [v[key] for key in v if key.startswith("p")]


def np_pull(a: Arrays, s: Callable[[float], Any], two: bool) -> Arrays:
    x, leader, other = a["x"], a["l"], a["o"]
    new = x - s(R) * (x - leader)
    return {"x": new - s(Q) * (x - other) if two else new}


def np_sum(terms: list[np.ndarray]) -> np.ndarray:
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


def np_elastic(a: Arrays, s: Callable[[float], Any], gauss_seidel: bool, moving_rate: float = R) -> Arrays:
    c, peers = a["c"], {key: a[key] for key in a if key.startswith("p")}
    new = c + s(Q) * np_sum([x - c for x in peers.values()])
    anchor = new if gauss_seidel else c
    return {"c": new} | {key: x - s(moving_rate) * (x - anchor) for key, x in peers.items()}


def np_elastic_sum(a: Arrays, s: Callable[[float], Any]) -> Arrays:
    c, peers = a["c"], {key: a[key] for key in a if key.startswith("p")}
    moved = {key: x - s(R) * (x - c) for key, x in peers.items()}
    return {"t": np_sum([x - c for x in peers.values()])} | moved


def np_elastic_apply(a: Arrays, s: Callable[[float], Any]) -> Arrays:
    c = a["c"] + s(Q) * a["t"]
    return {"c": c} | {key: a[key] - s(R) * (a[key] - c) for key in a if key.startswith("p")}


def np_average(a: Arrays, s: Callable[[float], Any]) -> Arrays:
    keys = [key for key in a if key.startswith("p")]
    return dict.fromkeys(keys, np_sum([a[key] for key in keys]) / s(len(keys)))


def np_msgd(
    a: Arrays, s: Callable[[float], Any], momentum: float, nesterov: bool, pulls: int, velocity: bool = True
) -> Arrays:
    x, look = a["x"], s(momentum if nesterov else 0)
    v = a["v"] if velocity else np.zeros_like(x)
    new_v = s(momentum) * v - s(LR) * (a["g"] + s(WD) * x)
    old = x - look * v
    new = old + new_v
    new = new - s(R) * (old - a["l"]) if pulls > 0 else new
    new = new - s(Q) * (old - a["o"]) if pulls > 1 else new
    return {"x": new + look * new_v} | ({"v": new_v} if velocity else {})


def np_push(a: Arrays, s: Callable[[float], Any], rate: float, momentum: float | None) -> Arrays:
    d = s(rate) * (a["x"] - a["l"])
    u = d if momentum is None else s(momentum) * a["v"] + d
    c = a["c"] + u
    x = c if momentum is None else c + s(momentum) * u
    return {"c": c, "x": x, "l": x} | ({} if momentum is None else {"v": u})


def np_outer(a: Arrays, s: Callable[[float], Any]) -> Arrays:
    g = a["c"] - a["l"]
    u = s(M) * a["v"] + g
    return {"v": u, "c": a["l"] + s(1 - LR) * g - s(LR * M) * u}


def msgd_case(
    momentum: float, nesterov: bool, pulls: int, velocity: bool = True
) -> tuple[Callable, Callable]:
    def call(f: Any, v: Vectors, stats: bool) -> Any:
        leaders = {"leader": v["l"], "rate": R} if pulls > 0 else {}
        leaders |= {"other": v["o"], "other_rate": Q} if pulls > 1 else {}
        vel = v["v"] if velocity else None
        return f.msgd(v["x"], v["g"], vel, LR, momentum, nesterov, WD, **leaders, stats=stats)

    return call, lambda a, s: np_msgd(a, s, momentum, nesterov, pulls, velocity)


# name: (call of kernels or reference, what NumPy says the changed vectors are)
CASES: dict[str, tuple[Callable, Callable]] = {
    "pull": (lambda f, v, s: f.pull(v["x"], v["l"], R, stats=s), lambda a, s: np_pull(a, s, False)),
    "pull two": (
        lambda f, v, s: f.pull(v["x"], v["l"], R, v["o"], Q, stats=s),
        lambda a, s: np_pull(a, s, True),
    ),
    "pull many": (
        lambda f, v, s: f.pull(peers_of(v), v["l"], R, v["o"], Q, stats=s),
        lambda a, s: {
            key: a[key] - s(R) * (a[key] - a["l"]) - s(Q) * (a[key] - a["o"])
            for key in a
            if key.startswith("p")
        },
    ),
    "pull many and the leader": (
        lambda f, v, s: f.pull([*peers_of(v), v["l"]], v["l"], R, v["o"], Q, stats=s),
        lambda a, s: {
            **{
                key: a[key] - s(R) * (a[key] - a["l"]) - s(Q) * (a[key] - a["o"])
                for key in a
                if key.startswith("p")
            },
            "l": a["l"] - s(Q) * (a["l"] - a["o"]),
        },
    ),
    "pull itself": (lambda f, v, s: f.pull(v["x"], v["x"], R, stats=s), lambda a, s: {}),
    "jacobi": (
        lambda f, v, s: f.elastic(v["c"], peers_of(v), R, Q, stats=s),
        lambda a, s: np_elastic(a, s, False),
    ),
    "gauss-seidel": (
        lambda f, v, s: f.elastic(v["c"], peers_of(v), R, Q, gauss_seidel=True, stats=s),
        lambda a, s: np_elastic(a, s, True),
    ),
    "moving average": (
        lambda f, v, s: f.elastic(v["c"], peers_of(v), 0.0, Q, stats=s),
        lambda a, s: {"c": np_elastic(a, s, False)["c"]},
    ),
    "elastic_sum": (
        lambda f, v, s: f.elastic_sum(v["t"], v["c"], peers_of(v), R, stats=s),
        np_elastic_sum,
    ),
    "elastic_apply": (
        lambda f, v, s: f.elastic_apply(v["c"], peers_of(v), v["t"], R, Q),
        np_elastic_apply,
    ),
    "elastic_apply centre": (
        lambda f, v, s: f.elastic_apply(v["c"], [], v["t"], R, Q),
        lambda a, s: {"c": a["c"] + s(Q) * a["t"]},
    ),
    "total": (
        lambda f, v, s: f.total(v["t"], peers_of(v), stats=s),
        lambda a, s: {"t": np_sum(peers_of(a))},
    ),
    "assign": (
        lambda f, v, s: f.assign(peers_of(v), v["t"], R),
        lambda a, s: {key: s(R) * a["t"] for key in a if key.startswith("p")},
    ),
    "average": (lambda f, v, s: f.average(peers_of(v), stats=s), np_average),
    "msgd nesterov": msgd_case(M, True, 0),
    "msgd heavy ball": msgd_case(M, False, 0),
    "msgd no velocity": msgd_case(0.0, True, 0, velocity=False),
    "msgd no velocity pull": msgd_case(0.0, True, 1, velocity=False),
    "msgd pull": msgd_case(M, True, 1),
    "msgd pull two": msgd_case(M, True, 2),
    "msgd heavy ball pull two": msgd_case(M, False, 2),
    "iterate": (
        lambda f, v, s: f.iterate(v["x"], v["v"], M, -1),
        lambda a, s: {"x": a["x"] - s(M) * a["v"]},
    ),
    "push": (lambda f, v, s: f.push(v["c"], v["x"], v["l"]), lambda a, s: np_push(a, s, 1.0, None)),
    "push rate": (lambda f, v, s: f.push(v["c"], v["x"], v["l"], R), lambda a, s: np_push(a, s, R, None)),
    "push momentum": (
        lambda f, v, s: f.push(v["c"], v["x"], v["l"], R, v["v"], M),
        lambda a, s: np_push(a, s, R, M),
    ),
    "outer": (lambda f, v, s: f.outer(v["c"], v["v"], v["l"], LR, M), np_outer),
    "triad": (lambda f, v, s: f.triad(v["x"], v["l"], v["o"], R), lambda a, s: {"x": a["l"] + s(R) * a["o"]}),
}
BY_CHANCE = ("pull", "jacobi", "gauss-seidel", "moving average", "elastic")


def np_stored(name: str, values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Values as the kernel of this name leaves them to be rounded to nearest (seed 0)."""
    dropped = {torch.bfloat16: 16, torch.float16: 13}.get(dtype)
    if dropped is None or not name.startswith(BY_CHANCE):
        return values
    bits = values.view(np.uint32)
    sign = bits & np.uint32(0x80000000)
    up = ((bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)) >> np.uint32(32 - dropped)
    rounded = (bits - sign + up) >> np.uint32(dropped) << np.uint32(dropped)
    return (rounded | sign).view(np.float32)


WITHOUT_STATS = ("elastic_apply", "assign", "iterate", "push", "outer", "triad")
WITH_STATS = [name for name in CASES if not name.startswith(WITHOUT_STATS)]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def make(dtype: torch.dtype, n: int, n_peers: int, start: int = 0, seed: int = 0) -> Vectors:
    """Vectors that begin `start` elements into their memory."""
    generator = torch.Generator().manual_seed(seed)
    keys = ["x", "l", "o", "g", "v", "c", "t", *(f"p{i}" for i in range(n_peers))]
    return {
        key: torch.randn(n + start, generator=generator, dtype=torch.float64).to(
            accumulation(dtype) if key == "t" else dtype
        )[start:]
        for key in keys
    }


def clone(v: Vectors) -> Vectors:
    return {key: t.clone() for key, t in v.items()}


def wide(v: Vectors) -> Arrays:
    return {key: t.to(accumulation(t.dtype)).numpy().copy() for key, t in v.items()}


def not_finite(dtype: torch.dtype, n: int, places: list[int]) -> Iterator[tuple[str, Vectors]]:
    """Vectors of which each in turn, then all hold NaN and infinities at these places."""
    for key in ("x", "l", "o", "g", "v", "c", "t", "p0", "p2", "all"):
        vectors = make(dtype, n, 3)
        for victim in [key] if key != "all" else list(vectors):
            for i, place in enumerate(places):
                vectors[victim][place] = SPECIAL[i]
        yield key, vectors
