"""What goes into a CUDA graph and what does not, on the emulated device, which can say that a stream is capturing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulated import Emulation
from emulated_memory import to_device, to_host

from mpilsgd import MSGD, RunningAverage, extension, kernels, reference
from mpilsgd.devices import capturing
from mpilsgd.extension import place_of
from mpilsgd.flat import FlatParameters

core, emulated = extension.core, extension.emulated
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(emulated is None, reason="needs an emulated device")]


@pytest.fixture
def known() -> Iterator[None]:
    """Torch knows the device."""
    with Emulation():
        yield


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    emulated.clear()
    yield
    emulated.clear()


def test_what_a_replay_could_not_repeat_is_refused() -> None:
    """And all is as before: the same calls go on outside, and others inside."""
    x, leader = to_device([torch.zeros(100), torch.ones(100)])
    peers = to_device([torch.full((10,), float(i)) for i in range(70)])
    for _ in range(2):  # without a workspace, and with one
        emulated.capture(0, True)
        assert capturing(place_of(x)) and not capturing(torch.device("cpu"))
        emulated.log()
        with pytest.raises(RuntimeError, match="statistics of a kernel cannot be captured in a graph"):
            kernels.pull(x, leader, 0.5, stats=True)
        with pytest.raises(RuntimeError, match="statistics of a kernel cannot be captured"):
            kernels.check(x)
        with pytest.raises(RuntimeError, match="more than 64 peers cannot be captured in a graph"):
            kernels.average(peers)
        with pytest.raises(RuntimeError, match="cudaStreamSynchronize: operation not permitted"):
            core.device.synchronize(0, 0)
        x.zero_()
        kernels.pull(x, leader, 0.5)
        kernels.average(peers[:64])
        emulated.capture(0, False)
        assert not capturing(place_of(x)) and emulated.last_error() == 0
        assert (to_host(x) == 0.5).all() and (to_host(peers[3]) == 31.5).all()
        assert kernels.pull(x, leader, 1.0, stats=True) == (25.0, True, True, ())
        kernels.average(peers)
        peers = to_device([torch.full((10,), float(i)) for i in range(70)])
    calls = emulated.log()
    assert calls["cudaMalloc"] <= 6  # vectors, and a workspace that has grown once


def test_another_streams_capture_is_nothing_to_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, leader = to_device([torch.zeros(100), torch.ones(100)])
    other = core.device.new_stream(0)
    emulated.capture(other, True)
    assert kernels.pull(x, leader, 0.5, stats=True) == (25.0, True, True, ())
    monkeypatch.setattr(extension.emulated_current, "stream", other)
    with pytest.raises(RuntimeError, match="statistics"):
        kernels.pull(x, leader, 0.5, stats=True)
    emulated.capture(other, False)
    core.device.drop_stream(0, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", [torch.float32, torch.float64], ids=str)
def test_a_rate_on_the_device_is_read_there(dtype: torch.dtype, of: torch.dtype) -> None:
    """As it is when the kernel runs: what is written into it before counts."""
    x, grad, v = (torch.randn(1003).to(dtype) for _ in range(3))
    there = to_device([x, grad, v])
    (rate,) = to_device([torch.tensor([0.5], dtype=of)])
    lr = rate.view(())
    emulated.delay(0.05)
    kernels.msgd(*there, lr, 0.9, True, 0.01)
    kernels.assign([rate], *to_device([torch.tensor([0.3], dtype=of)]), 1.0)  # comes after it
    kernels.msgd(*there, lr, 0.9, True, 0.01)
    for value in (0.5, 0.3):
        reference.msgd(x, grad, v, torch.tensor(value, dtype=of), 0.9, True, 0.01)
    assert torch.equal(to_host(there[0]), x) and torch.equal(to_host(there[2]), v)
    for wrong in (rate, lr.to(torch.bfloat16), torch.tensor(0.5)):
        with pytest.raises(ValueError, match="lr must be a number, or a tensor of one"):
            kernels.msgd(*there, wrong)


def flat(n: int = 100) -> tuple[list[torch.nn.Parameter], FlatParameters]:
    """Of n tensors with gradients on the device, in one vector."""
    parameters = [torch.nn.Parameter(p) for p in to_device([torch.full((7,), float(i)) for i in range(n)])]
    kept = FlatParameters(
        parameters, allocate=lambda d, k: to_device([torch.zeros(k, dtype=d)])[0], grads=False
    )
    kept.attach_grads(lambda d, k: to_device([torch.zeros(k, dtype=d)])[0])
    for p in parameters:
        p.grad = kept.view(p, kept.grads).fill_(1.0)
    return parameters, kept


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_on_one_flat_vector_is_one_launch(momentum: float) -> None:
    parameters, _kept = flat()
    msgd = MSGD(parameters, 0.1, momentum)
    for opt in (msgd, RunningAverage(torch.optim.SGD(parameters, 0.0))):
        opt.step()
        emulated.drain()
        emulated.clear()
        opt.step()
        assert len(emulated.launches()) == 1, type(opt)
        assert not any(name.startswith(("cudaMem", "cudaStreamS", "cudaDeviceS")) for name in emulated.log())


@pytest.mark.usefixtures("known")
def test_msgd_with_its_rate_on_the_device() -> None:
    """A scheduler writes into it, and the next step goes by that; the host does not read it, so a graph can have it."""
    parameters, kept = flat()
    twins = [torch.nn.Parameter(to_host(p.detach())) for p in parameters]
    (rate,) = to_device([torch.tensor([0.5])])
    opt = MSGD(parameters, rate.view(()), 0.9, weight_decay=0.01, capturable=True)
    twin = MSGD(twins, 0.5, 0.9, weight_decay=0.01)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (opt, twin)]
    opt.step()
    emulated.capture(0, True)
    for p in twins:
        p.grad = torch.ones_like(p)
    twin.step()
    for _ in range(3):
        for scheduler in schedulers:
            scheduler.step()
        assert opt.param_groups[0]["lr"].data_ptr() == rate.data_ptr()
        opt.step()
        twin.step()
    emulated.capture(0, False)
    assert all(torch.equal(to_host(p.detach()), q) for p, q in zip(parameters, twins, strict=True))
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert opt.param_groups[0]["capturable"] and kept is not None


@pytest.mark.usefixtures("known")
def test_a_rate_on_the_device_is_refused_without_capturable() -> None:
    parameters, _kept = flat(2)
    (rate,) = to_device([torch.tensor([0.5])])
    with pytest.raises(ValueError, match=r"lr is a tensor on cpu:0.*capturable=True"):
        MSGD(parameters, rate.view(()))
    opt = MSGD(parameters, 0.5)
    opt.param_groups[0]["lr"] = rate.view(())
    with pytest.raises(ValueError, match="capturable=True"):
        opt.step()
    for capturable in (False, True):  # on the host it is a number
        opt = MSGD(parameters, torch.tensor(0.5), capturable=capturable)
        opt.step()
