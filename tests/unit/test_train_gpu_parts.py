"""Small parts of the training job on GPUs: who takes which, times by events, batches ahead, precision."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from mpilsgd.train.batches import Batches, ChannelsLast
from mpilsgd.train.callables import InputError
from mpilsgd.train.data import ImageSet, MapSet, TensorSet, load
from mpilsgd.train.devices import Seen, choose, on_host, sharing
from mpilsgd.train.precision import Precision, unfit
from mpilsgd.train.progress import Progress
from mpilsgd.train.sampling import Sampler, random_state, restore_random_state
from mpilsgd.train.timing import HostTimer, StreamTimer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seen", "chosen"),
    [
        ([("a", "b")] * 2, [0, 1]),
        ([("a",), ("b",)], [0, 0]),  # the launcher has given each its own
        ([("a", "b")] * 4, [0, 1, 0, 1]),
        ([()] * 2, [None, None]),
    ],
)
def test_a_rank_takes_a_gpu_by_its_number_on_the_node(seen: Any, chosen: list[int | None]) -> None:
    ranks = [Seen(number, gpus) for number, gpus in enumerate(seen)]
    assert choose("auto", ranks) == chosen
    assert choose("cpu", ranks) == [None] * len(seen)


def test_gpus_that_are_missing_are_named() -> None:
    with pytest.raises(InputError, match="device=cuda: torch finds no GPU here"):
        choose("cuda", [Seen(0, ()), Seen(1, ())])
    for wanted in ("auto", "cuda"):
        with pytest.raises(
            InputError, match=f"device={wanted}: .* a GPU on rank 1, but none on ranks 0, 2: .* cpu"
        ):
            choose(wanted, [Seen(0, ()), Seen(1, ("a",)), Seen(0, ())])
    many = [Seen(0, ("a",) if rank == 0 else ()) for rank in range(20)]
    with pytest.raises(InputError, match=r"none on ranks 1, 2, 3, 4, 5, 6, 7, 8, \.\.\.: "):
        choose("auto", many)


def test_ranks_that_share_gpus_are_told() -> None:
    assert sharing(["a", "b"]) is None
    assert sharing(["a", "b", "a", "b", "a"]) == "5 ranks share 2 GPU(s) in turn: up to 3 ranks on one"


class Stream:
    """A GPU that is some way behind the host: events pass when it gets there."""

    def __init__(self, times: list[float]):
        self.times, self.reached, self.waits = iter(times), 0.0, 0

    def event(self) -> Any:
        return Mark(self)


class Mark:
    def __init__(self, stream: Stream):
        self.stream = stream

    def record(self) -> None:
        self.at = next(self.stream.times)

    def query(self) -> bool:
        return self.at <= self.stream.reached

    def synchronize(self) -> None:
        self.stream.waits += 1
        self.stream.reached = max(self.stream.reached, self.at)

    def elapsed_time(self, other: Mark) -> float:
        assert other.query(), "this would wait"
        return 1000 * (other.at - self.at)


def a_step(timer: Any, at: Progress, comm: float, wait: float) -> None:
    timer.begin()
    timer.loaded()
    timer.computed()
    timer.fetched()
    timer.end(at, comm, wait)


def test_events_are_read_when_they_have_passed() -> None:
    #       begin, loaded, computed, fetched, end
    times = [0.0, 0.5, 4.5, 4.75, 5.0, 5.0, 5.0, 9.0, 9.0, 11.0, 11.0, 12.0]
    stream, at = Stream(times), Progress()
    timer = StreamTimer(stream.event)
    a_step(timer, at, 0.0, 0.0)
    assert at.wall == 0 and stream.waits == 0
    stream.reached = 5.0
    a_step(timer, at, 6.0, 3.0)  # for 4 s of these the gradient was still computed
    assert (at.wall, at.data, at.compute, at.comm) == (5.0, 0.75, 4.25, 0.0) and stream.waits == 0
    with timer.waiting(at):
        pass
    timer.read(at)
    assert stream.waits == 1
    assert (at.wall, at.data, at.compute, at.comm, at.wait) == (12.0, 0.75, 8.25, 3.0, 3.0)
    timer.read(at)
    assert at.wall == 12.0 and stream.waits == 1


def test_a_slow_rank_waits_for_its_gradient() -> None:
    stream = Stream([0.0, 1.0, 4.0])
    timer = StreamTimer(stream.event)
    timer.begin()
    timer.loaded()
    assert timer.computing() == 3.0 and stream.waits == 1


def test_the_host_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 13.0, 17.0, 20.0, 22.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    timer, at = HostTimer(), Progress()
    timer.begin()
    timer.loaded()
    assert timer.computing() == 2.0
    timer.end(at, 3.0, 1.0)
    assert (at.wall, at.data, at.compute, at.comm, at.wait) == (7.0, 1.0, 3.0, 3.0, 1.0)
    with timer.waiting(at):
        pass
    timer.read(at)
    assert (at.wall, at.comm, at.wait) == (9.0, 5.0, 3.0)


def test_losses_that_are_read_later_are_the_same_numbers() -> None:
    torch.manual_seed(0)
    losses = torch.rand(50)
    now, later = Progress(loss_sum=0.1), Progress(loss_sum=0.1)
    for loss in losses:
        now.stepped(loss.item())
        later.stepped(loss)
    assert torch.is_tensor(later.loss_sum)
    later.read()
    assert later == now and isinstance(later.loss_sum, float)


class Drawing(torch.utils.data.Dataset):
    """Draws from every global generator."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([i, float(torch.rand(())), random.random(), np.random.rand()]), i % 2


def test_a_batch_made_ahead_is_the_one_that_would_have_been_made() -> None:
    def start(ahead: bool) -> Batches:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        return Batches(MapSet(Drawing(), 2), Sampler("partition", 12, 3), ahead)

    plain, ahead = [], []
    batches = start(False)
    for step in range(9):  # over the end of an epoch
        plain.append(batches.take(step)[0])
        batches.look_ahead(step + 1)
    batches = start(True)
    for step in range(9):
        ahead.append(batches.take(step)[0])
        batches.look_ahead(step + 1)
        if step == 4:
            state = random_state()
    assert torch.equal(torch.stack(plain), torch.stack(ahead))
    batches = start(True)
    restore_random_state(state)  # a run that is taken up again has no batch ready
    assert torch.equal(batches.take(5)[0], plain[5])
    assert torch.equal(state["torch"], random_state()["torch"])


def test_images_lie_channels_last() -> None:
    images = load("digits")[0]
    data = ChannelsLast(TensorSet(torch.rand(6, 3, 4, 4), torch.arange(6), 6))
    inputs, labels = data.batch(torch.tensor([1, 4]))
    assert inputs.is_contiguous(memory_format=torch.channels_last) and not inputs.is_contiguous()
    assert (
        len(data) == 6 and data.classes == 6 and data.input_shape == (3, 4, 4) and labels.tolist() == [1, 4]
    )
    assert isinstance(images, ImageSet) and not images.on_host and MapSet(Drawing(), 2).on_host


def a_gradient(precision: Precision, weight: torch.Tensor, factor: float) -> bool:
    weight.grad = None
    precision.backward(weight.sum() * factor)
    return precision.settle()


def test_a_gradient_in_fp16_is_scaled_and_dropped_where_it_overflows() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([weight], lr=0.1)
    precision = Precision("fp16", CPU, sgd)
    assert a_gradient(precision, weight, 0.25) and torch.equal(weight.grad, torch.full((3,), 0.25))
    state = precision.state()
    assert not a_gradient(precision, weight, torch.inf) and weight.grad is None
    after = precision.state()
    assert state is not None and after is not None and after["scale"] == state["scale"] / 2
    other = Precision("fp16", CPU, sgd)
    other.load(after)
    assert other.state() == after
    assert a_gradient(other, weight, 0.25) and torch.equal(weight.grad, torch.full((3,), 0.25))


def test_without_a_scale_the_gradient_is_left_as_it_is() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    for amp in (None, "bf16"):
        precision = Precision(amp, CPU, torch.optim.SGD([weight], lr=0.1))
        assert a_gradient(precision, weight, torch.inf) and weight.grad.isinf().all()
        assert precision.state() is None
        with precision.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.float32 if amp is None else torch.bfloat16)


def test_what_a_gpu_cannot_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = torch.nn.Linear(1, 1), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    told = unfit("bf16", gpu, model)
    assert told == "amp=bf16: needs a GPU of compute capability 8.0; V100 has 7.0: take fp16"
    assert unfit("fp16", gpu, model) is unfit("bf16", CPU, model) is unfit(None, gpu, model) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert unfit("bf16", gpu, model) is None
    assert "weight is float16" in str(unfit("fp16", CPU, model.half()))


def test_a_copy_on_the_host_is_a_copy() -> None:
    x = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    state = {"x": x, "list": [x.detach(), 3], "pair": (1, None), "lr": 0.1}
    copy = on_host(state)
    assert copy["x"].stride() == x.stride() and not copy["x"].requires_grad
    with torch.no_grad():
        x.zero_()
    assert copy["x"].any() and copy["list"][0].any() and copy["pair"] == (1, None) and copy["lr"] == 0.1
