"""The centre from the files of a checkpoint, without MPI and without the model's code.

What `Method.center()` shows while the workers run, `center_of` computes from what they left: the mean of the workers'
iterates, the mean of a vector that each has, a centre variable, or the root of a tree. `told` is what a checkpoint has
to say for that; `Exchange.kept` says of each exchange where its centre lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpilsgd.train.callables import InputError

State = dict[str, Any]  # a rank's part of a checkpoint
Places = dict[
    str, tuple[str, int, tuple[int, ...]]
]  # by name: the vector, its first element there, the strides


def told(model: torch.nn.Module, opt: Any) -> State:
    """Under "centre" in a checkpoint: which entries of the model's state are exchanged, and where in the vectors they
    lie; the names of the optimizer's parameters, in its order; and where the centre is.
    """
    vectors = {d: w.mine[: opt.n[d]] for d, w in opt.x.items()}
    places: Places = {}
    for name, tensor in model.state_dict().items():
        vector = vectors.get(tensor.dtype)
        if vector is not None and tensor.numel():
            start, rest = divmod(tensor.data_ptr() - vector.data_ptr(), tensor.element_size())
            if not rest and 0 <= start < vector.numel():
                places[name] = (str(tensor.dtype), start, tensor.stride())
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    listed = [names.get(id(p)) for group in opt.param_groups for p in group["params"]]
    lacking = opt.buffers == "recalibrate" and bool(opt.flat.buffers)
    return {
        "places": places,
        "parameters": listed,
        "recalibrated": lacking,
        "lengths": {str(d): len(vector) for d, vector in vectors.items()},
        **opt.r.kept(opt.shown_centre()),
    }


def center_of(load: Callable[[int], State], ranks: int) -> State:
    """The centre's state_dict. load: gives a rank's part of the checkpoint.

    Raises:
        InputError: it cannot be had from the files alone; the text says why.
    """
    first = load(0)
    about = _about(first)
    if about["recalibrated"]:
        raise InputError(
            "the centre's BatchNorm statistics come from training data (buffers: recalibrate), so it cannot be had "
            "without a run: resume it to its end"
        )
    if about["per"] == "all":
        return _replaced(first, _whole(about, load, ranks))
    if about["per"] == "root":
        return _replaced(first, _root(load, ranks))
    if about["per"] != "worker":
        raise InputError(
            f"the centre is kept per {about['per']}, so it cannot be had without a run: resume it to its end"
        )
    return _replaced(first, _mean(about, load, ranks))


def worker_of(state: State) -> State:
    """A worker's own model: its iterate, where what it holds is a look-ahead."""
    return _replaced(state, _iterate(state))


def _about(state: State) -> State:
    try:
        return state["centre"]
    except KeyError:
        raise InputError(
            "the checkpoint is of an earlier version, which does not say where its centre lies"
        ) from None


def _replaced(state: State, exchanged: dict[str, Tensor]) -> State:
    return {name: exchanged.get(name, value) for name, value in state["model"].items()}


def _iterate(state: State) -> dict[str, Tensor]:
    """By name what this worker exchanges: x, where MSGD holds its look-ahead y = x + a v."""
    x = {name: state["model"][name] for name in _about(state)["places"]}
    optimizer = state["optimizer"].get("optimizer", state["optimizer"])  # RunningAverage's
    names = _about(state)["parameters"]
    moved = {}
    for group in optimizer["param_groups"]:
        for index in group["params"] if group.get("lookahead") else ():
            velocity, name = optimizer["state"].get(index, {}).get("velocity"), names[index]
            if velocity is not None and name in x:
                moved[name] = x[name].sub(velocity, alpha=float(group["lookahead"]))
    return _with(state, x, moved)


def _averaged(state: State, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the average over time in place of the parameters, where the worker keeps one."""
    pairs = zip(_about(state)["parameters"], state["optimizer"].get("average", ()), strict=False)
    return _with(state, x, {name: z.to(x[name].dtype) for name, z in pairs if z is not None and name in x})


def _with(state: State, x: dict[str, Tensor], changed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some tensors by their new values, under all names that lie at the same place (tied weights)."""
    places = _about(state)["places"]
    by_place = {tuple(places[name][:2]): value for name, value in changed.items()}
    return {name: by_place.get(tuple(places[name][:2]), value) for name, value in x.items()}


def _mean(about: State, load: Callable[[int], State], ranks: int) -> dict[str, Tensor]:
    """Of those workers that are finite."""
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    count = 0
    for rank in range(ranks):
        state = load(rank)
        x = _iterate(state)
        if not all(bool(v.isfinite().all()) for v in x.values()):
            continue
        if about["vector"] is not None:
            x = _pieces(state, _vectors(state)[about["vector"]])
        x = _averaged(state, x)
        kinds, count = {name: state["model"][name].dtype for name in x}, count + 1
        total = {name: v.double() + total.get(name, 0.0) for name, v in x.items()}
    if not count:
        raise InputError("no worker is finite: there is no centre")
    return {name: v.div_(count).to(kinds[name]) for name, v in total.items()}


def _whole(about: State, load: Callable[[int], State], ranks: int) -> dict[str, Tensor]:
    """A centre variable: one copy a node, or in parts, one a node, which the nodes' first ranks have saved."""
    parts: dict[str, list[Tensor]] = {d: [] for d in about["lengths"]}
    for rank in range(ranks):
        state = load(rank)
        for d, part in _vectors(state).get(about["vector"], {}).items():
            if part.dtype is torch.uint8:
                raise InputError(
                    "the centre lies in few bits on several nodes (across_dtype), so it cannot be had without a run: "
                    "resume it to its end"
                )
            parts[d].append(part)
        if all(sum(map(len, parts[d])) >= n for d, n in about["lengths"].items()):
            return _pieces(state, {d: torch.cat(parts[d])[:n] for d, n in about["lengths"].items()})
    raise InputError("the checkpoint holds only a part of the centre")


def _root(load: Callable[[int], State], ranks: int) -> dict[str, Tensor]:
    """The root of a tree: a rank of its own, or a node that a leaf hosts."""
    for state in map(load, range(ranks)):
        node = _about(state)["node"]
        if node is not None:
            _, x, *_ = state["optimizer"]["mpilsgd"]["exchange"]["nodes"][node]
            return _pieces(state, x) if x else _iterate(state)
    raise InputError("the checkpoint holds no root of the tree")


def _pieces(state: State, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The exchanged entries of a model's state as they lie in other vectors of this layout."""
    model = state["model"]
    return {
        name: vectors[d].as_strided(model[name].shape, strides, start).to(model[name].dtype, copy=True)
        for name, (d, start, strides) in _about(state)["places"].items()
    }


def _vectors(state: State) -> dict[str, dict[str, Tensor]]:
    return state["optimizer"]["mpilsgd"]["vectors"]
