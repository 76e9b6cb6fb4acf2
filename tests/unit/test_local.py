"""MSGD and RunningAverage against simulations written from the thesis' equations."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from thesis_msgd import (
    TOLERANCE,
    close,
    constant,
    distance,
    drops,
    net,
    parameter,
    run,
    simulate,
    start,
    step,
)
from torch import Tensor, nn

from mpilsgd import kernels
from mpilsgd.flat import FlatParameters
from mpilsgd.optimizers.msgd import MSGD
from mpilsgd.optimizers.running_average import RunningAverage

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("delta", [0.0, 0.9, -0.4])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("layout", ["plain", "transposed", "gaps", "flat", "flat with grads"])
def test_msgd_against_numpy(
    dtype: torch.dtype, nesterov: bool, delta: float, weight_decay: float, layout: str
) -> None:
    p = parameter(dtype, layout)
    flat = FlatParameters([p], grads="grads" in layout) if "flat" in layout else None
    optimizer = MSGD([p], 0.1, delta, nesterov, weight_decay)
    mine = run(optimizer, p, constant(0.1, delta))
    assert FlatParameters.of(p) is flat
    theirs = simulate(constant(0.1, delta), nesterov, weight_decay)
    for x, y in zip(mine, theirs[1:], strict=True):
        assert distance(x, y) < TOLERANCE[dtype]


@pytest.mark.parametrize("nesterov", [True, False])
def test_lr_and_momentum_change_in_the_middle(nesterov: bool) -> None:
    p = parameter()
    mine = run(MSGD([p], 0.1, 0.9, nesterov), p, drops)
    for x, y in zip(mine, simulate(drops, nesterov)[1:], strict=True):
        assert distance(x, y) < 1e-12


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_pulls(nesterov: bool, flat: bool) -> None:
    def leaders(t: int) -> list[tuple[np.ndarray, float]]:
        both = [(np.full((3, 4), 0.3), 0.1), (start().T.reshape(3, 4), 0.05)]
        return both[: t % 3]  # none, one, two

    def pulls(t: int) -> Callable[[Tensor], list[tuple[Tensor, float]]]:
        return lambda q: [(torch.from_numpy(leader), rate) for leader, rate in leaders(t)]

    p = parameter(layout="transposed")
    holder = FlatParameters([p]) if flat else None
    mine = run(MSGD([p], 0.1, 0.9, nesterov), p, constant(0.1, 0.9), pulls=pulls)
    assert (FlatParameters.of(p) is holder) or not flat
    for x, y in zip(mine, simulate(constant(0.1, 0.9), nesterov, pulls=leaders)[1:], strict=True):
        assert distance(x, y) < 1e-12


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_msgd_equals_torch_sgd(nesterov: bool, momentum: float) -> None:
    """At a constant rate torch's heavy ball is (2.6), and its Nesterov holds the look-ahead of (2.5)."""
    one, two = net(), net()
    mine = MSGD(one.parameters(), 0.05, momentum, nesterov)
    theirs = torch.optim.SGD(two.parameters(), lr=0.05, momentum=momentum, nesterov=nesterov and momentum > 0)
    step(one, mine, 30)
    step(two, theirs, 30)
    close(one, two)


def test_many_tensors_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    original = kernels.msgd

    def counted(x: Tensor, *args: object, **kwargs: object) -> object:
        lengths.append(len(x))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(kernels, "msgd", counted)
    models = [net() for _ in range(3)]
    plain, seated, attached = models
    FlatParameters(seated)
    flat = FlatParameters(attached, grads=True)
    calls = []
    for model in models:
        lengths.clear()
        step(model, MSGD(model.parameters(), 0.05, 0.9, weight_decay=1e-3), 10)
        calls.append(len(lengths))
    assert calls == [70, 70, 10]
    assert lengths == [flat.n_parameters[torch.float32]] * 10
    for model in models[1:]:
        for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    vector, n = flat.data[torch.float32], flat.n_parameters[torch.float32]
    used = torch.zeros(n, dtype=torch.bool)
    for p in flat.parameters:
        used[flat.span(p).start : flat.span(p).start + p.numel()] = True
    assert (vector[:n][~used] == 0).all()  # the gaps stay zero


def test_runs_are_cut_where_they_must() -> None:
    """Groups, frozen gradients, several dtypes: as without a flat vector."""
    results = []
    for flatten in (False, True):
        torch.manual_seed(1)
        ps = [
            nn.Parameter(torch.randn(k, dtype=d))
            for k in (3, 17, 1, 0, 5)
            for d in (torch.float32, torch.float64)
        ]
        flat = FlatParameters(ps, grads=True) if flatten else None
        groups = [{"params": ps[::3]}, {"params": [p for i, p in enumerate(ps) if i % 3], "momentum": 0.5}]
        optimizer = MSGD(groups, 0.1, 0.9)
        for t in range(12):
            optimizer.zero_grad()
            torch.manual_seed(t)
            chosen = [p for i, p in enumerate(ps) if (i + t) % 4]
            sum((p * torch.randn_like(p)).sum().double() for p in chosen).backward()
            optimizer.step()
        results.append(([p.detach().clone() for p in ps], optimizer.state_dict(), flat))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_rate_that_is_a_tensor_on_the_host_is_a_number(capturable: bool) -> None:
    """Which a scheduler changes in place; also for states of before there were such."""
    rate = torch.tensor(0.5, dtype=torch.float64)
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    one, two = MSGD([p], rate, 0.9, capturable=capturable), MSGD([q], 0.5, 0.9)
    for optimizer in (one, two):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for x in (p, q):
            x.grad = torch.full((3,), 0.25)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
    assert torch.equal(p, q) and float(rate) == 0.0625
    state = two.state_dict()
    del state["param_groups"][0]["capturable"]
    one.load_state_dict(state)
    one.step()


def test_parameters_without_gradient_are_left_alone() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    a.grad = torch.ones(3)
    optimizer = MSGD([a, b], 0.1, 0.9, weight_decay=0.1)
    optimizer.step()
    assert (b == 1).all() and "velocity" not in optimizer.state[b] and (a < 1).all()
    sparse = nn.Embedding(4, 2, sparse=True)
    before = sparse.weight.detach().clone()
    sparse(torch.tensor([1])).sum().backward()
    MSGD(sparse.parameters(), 0.1).step()
    assert torch.allclose(before[1] - 0.1, sparse.weight[1]) and torch.equal(before[2], sparse.weight[2])


@pytest.mark.parametrize("flat", [True, False])
def test_iterate_round_trip(flat: bool) -> None:
    model = net().double()
    optimizer = MSGD(model.parameters(), 0.05, 0.9)
    holder = FlatParameters(model) if flat else None
    with optimizer.iterate():
        pass  # nothing to go back to yet
    step(model, optimizer, 5)
    ps = list(model.parameters())
    ahead = [p.detach().clone() for p in ps]
    with optimizer.iterate():
        inner = [p.detach().clone() for p in ps]
        for p, y, x in zip(ps, ahead, inner, strict=True):
            torch.testing.assert_close(x, y - 0.9 * optimizer.state[p]["velocity"], atol=1e-15, rtol=1e-15)
        with optimizer.iterate():
            assert all(torch.equal(p, x) for p, x in zip(ps, inner, strict=True))
        assert all(torch.equal(p, x) for p, x in zip(ps, inner, strict=True))
        assert torch.is_grad_enabled()
        with pytest.raises(RuntimeError, match="inside iterate"):
            optimizer.step()
    for p, y in zip(ps, ahead, strict=True):
        torch.testing.assert_close(p.detach(), y, atol=1e-15, rtol=1e-14)
    with pytest.raises(ZeroDivisionError), optimizer.iterate():
        raise ZeroDivisionError
    with optimizer.hold():  # the parameters are lent out
        with torch.no_grad():
            ps[0].fill_(3.0)
        with optimizer.iterate():
            assert (ps[0] == 3).all()
        assert (ps[0] == 3).all()
    assert optimizer.param_groups[0]["lookahead"] == 0.9 and (holder is None) != flat


def saved(thing: object) -> object:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@contextmanager
def nothing(_: object) -> Iterator[None]:
    yield


Make = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "msgd": lambda m: MSGD(m.parameters(), 0.05, 0.9),
    "heavy ball": lambda m: MSGD(m.parameters(), 0.05, 0.9, nesterov=False),
    "asgd": lambda m: RunningAverage(torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)),
    "mvasgd of msgd": lambda m: RunningAverage(MSGD(m.parameters(), 0.05, 0.9), rate=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_resumed_equals_uninterrupted(make: Make, inside: bool, flat: bool) -> None:
    def started(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = net(seed).double()
        model.flat = FlatParameters(model, grads=True) if flat else None  # kept alive with the model
        optimizer = make(model)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    def go(
        model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object, first: int, last: int
    ) -> None:
        for t in range(first, last):
            step(model, optimizer, 1, t)
            scheduler.step()

    whole, first, second = started(0), started(0), started(1)
    around = (lambda o: o.iterate()) if inside else nothing
    go(*whole, 0, 5)
    with around(whole[1]):
        pass
    go(*whole, 5, 11)
    go(*first, 0, 5)
    with around(first[1]):
        state = saved([t.state_dict() for t in first])
    with around(second[1]):
        for t, s in zip(second, state, strict=True):
            t.load_state_dict(s)
    go(*first, 5, 7)  # the loaded state does not hang on the saved one
    go(*second, 5, 11)
    for p, q in zip(second[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(p, q)
    if isinstance(whole[1], RunningAverage):
        with whole[1].center(), second[1].center():
            for p, q in zip(second[0].parameters(), whole[0].parameters(), strict=True):
                assert torch.equal(p, q)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_deepcopy_with_the_model(make: Make) -> None:
    model = net()
    flat = FlatParameters(model, grads=True)
    optimizer = make(model)
    step(model, optimizer, 4)
    twin, twins = copy.deepcopy((model, optimizer))
    step(model, optimizer, 4, 4)
    before = flat.data[torch.float32].clone()
    step(twin, twins, 4, 4)
    close(twin, model, 0.0)
    assert torch.equal(before, flat.data[torch.float32])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("flat", [False, True])
def test_a_graph_from_before_a_write_is_refused(make: Make, flat: bool) -> None:
    """As with torch's own optimizers; what is written is told to autograd, and nothing else."""
    model = net()
    holder = FlatParameters(model, grads=True) if flat else None
    optimizer = make(model)
    step(model, optimizer, 2)
    x = torch.randn(8, 5, requires_grad=True)

    def stale(write: Callable[[], object]) -> None:
        loss = model(x).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    model(x).sum().backward()
    stale(optimizer.step)
    if isinstance(optimizer, RunningAverage):
        loss = model(x).sum()
        with optimizer.center(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    if optimizer.param_groups[0].get("lookahead"):
        loss = model(x).sum()
        with optimizer.iterate(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        with optimizer.iterate():
            model(x).sum().backward()  # a graph of the iterate is as good as any
    before = [p._version for p in model.parameters()]
    for p in list(model.parameters())[1:]:
        p.grad = None
    optimizer.step()
    moved = [p._version > v for p, v in zip(model.parameters(), before, strict=True)]
    assert moved == [True, *[False] * (len(moved) - 1)]
    if holder is not None:
        stale(holder.touched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, plain = net().to(dtype), net()
    FlatParameters(model, grads=True)
    optimizer = RunningAverage(MSGD(model.parameters(), 0.05, 0.9))
    step(model, optimizer, 10)
    step(plain, MSGD(plain.parameters(), 0.05, 0.9), 10)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach().float(), q.detach(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: MSGD([p], -0.1), "lr is -0.1"),
        (lambda p: MSGD([p], float("nan")), "lr is nan"),
        (lambda p: MSGD([p], 0.1, 1.0), "momentum is 1.0"),
        (lambda p: MSGD([p], 0.1, weight_decay=-1), "weight_decay is -1"),
        (lambda p: RunningAverage(MSGD([p], 0.1), 0.0), "rate is 0.0"),
        (lambda p: RunningAverage(MSGD([p], 0.1), 1.5), "rate is 1.5"),
        (lambda p: MSGD([p], 0.1).step(pulls=lambda q: [(q, 0.1)] * 3), "gave 3 leaders"),
        (lambda p: MSGD([p], 0.1).step(pulls=lambda q: [(torch.ones(5), 0.1)]), r"leader of shape \(5,\)"),
    ],
)
def test_bad_values(make: Callable[[Tensor], object], message: str) -> None:
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    with pytest.raises(ValueError, match=message):
        make(p)
    assert (p == 1).all()


def test_bad_states() -> None:
    def trained(*shape: int) -> RunningAverage:
        p = nn.Parameter(torch.ones(*shape))
        p.grad = torch.ones(*shape)
        optimizer = RunningAverage(MSGD([p], 0.1, 0.9))
        optimizer.step()
        return optimizer

    one, other = trained(2, 3), trained(3)
    with pytest.raises(ValueError, match=r"average 0 has shape \(3,\), the parameter \(2, 3\)"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"velocity of parameter 0 has shape \(3,\), the parameter \(2, 3\)"):
        one.optimizer.load_state_dict(other.optimizer.state_dict())
    with pytest.raises(ValueError, match="has 0 tensors, the optimizer 1"):
        one.load_state_dict({**one.state_dict(), "average": []})
