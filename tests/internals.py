"""The one place where tests reach behind public names: what no public name shows. Each says what it stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpilsgd.comm import MPI


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of some hundred bytes go in many parts, each of many messages, as those of gigabytes do."""
    from mpilsgd.comm import channel as fabric

    for name, nbytes in {"_LEAST": 256, "_MOST": 256, "_PIECE": 64, "_SMALLEST": 16}.items():
        monkeypatch.setattr(fabric, name, nbytes)


def lost_messages(opt: Any, comm: MPI.Comm) -> list[int]:
    """Of a tree that has met: the tags of edges whose last message never came. Collective."""
    links = opt.r._links
    sent = dict(pair for row in comm.allgather([(b.tag, b.sent) for b in links._outboxes]) for pair in row)
    return [box.tag for box in links._inboxes if box.received != sent[box.tag]]


def hosted_inner_nodes(opt: Any) -> list[torch.Tensor]:
    """Of a tree whose inner nodes live on the leaves' ranks: the vectors of those on this rank."""
    return [x for node in opt.r._own if not opt.tree.is_leaf(node.index) for x in node.x.values()]


def strides(free: list[bool]) -> list[int]:
    """An edge of a tree that sends at every step: how many steps apart, after each try that got through or did not."""
    from mpilsgd.comm import Edge

    taken: list[bool] = []
    edge = Edge(SimpleNamespace(ready=lambda: taken.pop(0)), None, True, 0, False, 1, 1)  # type: ignore[arg-type]
    found = []
    for ready in free:
        taken.append(ready)
        edge.gets_through()
        found.append(edge.stride)
    return found
