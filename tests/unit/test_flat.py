"""FlatParameters: a model laid flat trains, saves, copies and clips as before, bit for bit."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from flat_model import Net, assert_same, batch, inside, plain_trainable, sgd, train
from torch import Tensor, nn

from mpilsgd.flat import FlatParameters

torch.set_num_threads(1)


def test_layout() -> None:
    model, plain = Net(), Net()
    objects = dict(model.named_parameters(remove_duplicate=False))
    flat = FlatParameters(model)
    assert_same(model, plain)
    assert dict(model.named_parameters(remove_duplicate=False)) is not objects
    assert all(p is objects[n] for n, p in model.named_parameters(remove_duplicate=False))
    assert model.tied.weight is model.first.weight
    assert len(flat.parameters) == 9 and len(flat.buffers) == 3  # frozen and int ones are left out
    vector, n = flat.data[torch.float32], flat.n_parameters[torch.float32]
    for p in flat.parameters:
        assert p.numel() == 0 or (inside(p, vector[:n]) and (p.data_ptr() - vector.data_ptr()) % 64 == 0)
        assert p.untyped_storage().nbytes() == p.nbytes
    for b in flat.buffers:
        assert inside(b, vector[n:]) and (b.data_ptr() - vector.data_ptr()) % 64 == 0
    assert not inside(model.frozen.weight, vector)
    total = sum(t.double().sum() for t in flat.parameters + flat.buffers)
    torch.testing.assert_close(vector.double().sum(), total)  # the gaps are zero
    assert n % 16 == 0 and len(vector) % 16 == 0
    assert FlatParameters.of(model.scale) is flat and FlatParameters.of(plain.scale) is None


def test_gaps_are_zero_in_dirty_memory() -> None:
    flat = FlatParameters(Net(), allocate=lambda dtype, n: torch.full((n,), float("nan"), dtype=dtype))
    assert flat.data[torch.float32].isfinite().all()


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("zero", [{}, {"set_to_none": False}])
@pytest.mark.parametrize(
    "make",
    [
        lambda m: sgd(m, foreach=False),
        lambda m: sgd(m, foreach=True),
        lambda m: torch.optim.Adam(m.parameters(), lr=0.01, foreach=True),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    ],
    ids=["sgd", "sgd-foreach", "adam-foreach", "adamw-fused"],
)
def test_trains_as_plain(
    make: Callable[[nn.Module], torch.optim.Optimizer], zero: dict[str, bool], grads: bool
) -> None:
    model, plain = Net(), Net()
    one, two = make(model), make(plain)
    train(model, one, 2, **zero)
    train(plain, two, 2, **zero)
    flat = FlatParameters(model, grads=grads)  # with optimizer state there
    train(model, one, 5, 2, **zero)
    train(plain, two, 5, 2, **zero)
    assert_same(model, plain)
    if grads:
        for p, q in zip(flat.parameters, plain_trainable(plain), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(flat.view(p, flat.grads), q.grad)
            assert p.numel() == 0 or p.grad is None or inside(p.grad, flat.grads[p.dtype])


@pytest.mark.parametrize("zero", [{}, {"set_to_none": False}])
def test_module_zero_grad_and_accumulation(zero: dict[str, bool]) -> None:
    model, plain = Net(), Net()
    flat = FlatParameters(model, grads=True)
    for m in (model, plain):
        for i in range(3):
            m.zero_grad(**zero)
            for j in range(2):  # accumulated
                x, y = batch(10 * i + j)
                ((m(x) - y) ** 2).mean().backward()
    for p, q in zip(flat.parameters, plain_trainable(plain), strict=True):
        assert torch.equal(p.grad, q.grad) and torch.equal(flat.view(p, flat.grads), q.grad)


def test_grads_from_before_and_missing_ones() -> None:
    model = Net()
    flat = FlatParameters(model)
    model.scale.grad = torch.tensor(7.0)
    flat.attach_grads()
    assert model.scale.grad == 7 and inside(model.scale.grad, flat.grads[torch.float32])
    flat.grads[torch.float32].fill_(3.0)
    missing = flat.fill_missing_grads()
    assert len(missing) == 8 and all(p is not model.scale for p in missing)
    assert all((flat.view(p, flat.grads) == 0).all() for p in missing) and model.scale.grad == 3
    model.scale.grad = torch.tensor(9.0)  # put elsewhere by the user
    flat.fill_missing_grads()
    assert model.scale.grad is not None and flat.view(model.scale, flat.grads) == 9
    assert inside(model.scale.grad, flat.grads[torch.float32])
    with pytest.raises(RuntimeError, match="already"):
        flat.attach_grads()


def test_sparse_and_graph_gradients() -> None:
    table = nn.Embedding(6, 3, sparse=True)
    flat = FlatParameters(table, grads=True)
    table(torch.tensor([1, 1, 4])).sum().backward()
    expected = torch.zeros(6, 3)
    expected[1], expected[4] = 2, 1
    assert torch.equal(flat.view(table.weight, flat.grads), expected)
    assert table.weight.grad.layout == torch.strided

    p = nn.Parameter(torch.tensor([2.0]))
    flat = FlatParameters([p], grads=True)
    with pytest.warns(UserWarning, match="create_graph"):
        (p**3).sum().backward(create_graph=True)
    assert p.grad.requires_grad and flat.view(p, flat.grads) == 12  # double backward goes on working
    assert torch.autograd.grad(p.grad.sum(), p)[0] == 12
    p.grad = None


@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "permuted", "gaps", "odd strides of size 1"]
)
def test_layouts_are_kept(layout: str) -> None:
    torch.manual_seed(0)
    if layout == "channels_last":
        value = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    elif layout == "transposed":
        value = torch.randn(4, 7).t()
    elif layout == "permuted":
        value = torch.randn(2, 3, 4).permute(2, 0, 1)
    elif layout == "gaps":
        value = torch.randn(4, 8)[:, ::2]
    else:
        value = torch.randn(6).as_strided((1, 6, 1), (77, 1, 5))
    p, before = nn.Parameter(value), value.clone()
    p.grad = torch.ones_like(p)
    flat = FlatParameters([p], grads=True)
    assert torch.equal(p, before) and torch.equal(p.grad, torch.ones_like(before))
    assert p.stride() == ((4, 1) if layout == "gaps" else value.stride())
    assert p.grad.stride() == p.stride()
    assert torch.equal(flat.view(p, flat.data), p)
    other = {torch.float32: torch.arange(len(flat.data[torch.float32]), dtype=torch.float32)}
    assert flat.view(p, other).stride() == p.stride() and flat.view(p, other).shape == p.shape


def test_channels_last_model() -> None:
    model, plain = (Net().to(memory_format=torch.channels_last) for _ in range(2))
    FlatParameters(model)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    train(model, sgd(model))
    train(plain, sgd(plain))
    assert_same(model, plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_two_parameters_on_one_memory(transposed: bool) -> None:
    def pair() -> tuple[nn.Parameter, nn.Parameter]:
        one = nn.Parameter(torch.arange(12.0).view(4, 3))
        return one, nn.Parameter(one.data.t() if transposed else one.data)

    (a, b), (c, d) = pair(), pair()
    flat = FlatParameters([a, b], grads=True)
    assert a.data_ptr() == b.data_ptr() and b.stride() == d.stride()
    one, two = (torch.optim.SGD(ps, lr=0.1, momentum=0.9) for ps in ([a, b], [c, d]))
    for optimizer, x, y in ((one, a, b), (two, c, d)):
        for _ in range(3):
            optimizer.zero_grad()
            ((x**2).sum() + (y**3).sum() / 50).backward()
            optimizer.step()
    assert torch.equal(a, c) and torch.equal(b, d)  # each has a gradient of its own
    assert torch.equal(flat.view(a, flat.grads), c.grad) and torch.equal(flat.view(b, flat.grads), d.grad)
    flat.release()
    assert a.data_ptr() == b.data_ptr() and torch.equal(a, c) and torch.equal(b, d)


def test_frozen_and_buffer_ties_follow() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.ones(3))
    model.b = nn.Parameter(model.a.data, requires_grad=False)
    model.register_buffer("c", model.a.data)
    flat = FlatParameters(model)
    with torch.no_grad():
        model.a.fill_(5)
    assert (model.b == 5).all() and (model.c == 5).all()
    flat.release()
    with torch.no_grad():
        model.a.fill_(6)
    assert (model.b == 6).all() and (model.c == 6).all()


def test_state_dict_load_and_save() -> None:
    model, other = Net(), Net(1)
    flat = FlatParameters(model, grads=True)
    model.load_state_dict(other.state_dict())
    assert_same(model, other)
    assert inside(model.conv.weight, flat.data[torch.float32]) and not flat.reseat()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    size = len(file.getvalue())
    file.seek(0)
    fresh = Net(2)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same(fresh, other)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    assert size <= len(file.getvalue()) + 1024
    file = io.BytesIO()
    torch.save(model, file)  # hooks do not get in the way
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), other)


def test_deepcopy_is_private() -> None:
    model, plain = Net(), Net()
    flat = FlatParameters(model, grads=True)
    train(model, sgd(model), 1)
    train(plain, sgd(plain), 1)
    twin = copy.deepcopy(model)
    for t in [*twin.parameters(), *twin.buffers()]:
        assert not inside(t, flat.data[torch.float32]) and t.untyped_storage().nbytes() == t.nbytes
    assert twin.tied.weight is twin.first.weight
    before = flat.data[torch.float32].clone()
    train(twin, sgd(twin), 3, 1)
    assert torch.equal(flat.data[torch.float32], before)
    train(plain, sgd(plain), 3, 1)
    assert_same(twin, plain)


def test_clipping_and_schedulers() -> None:
    model, plain = Net(), Net()
    FlatParameters(model, grads=True)
    for m in (model, plain):
        optimizer = sgd(m)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10)
        for i in range(8):
            optimizer.zero_grad()
            x, y = batch(i)
            ((m(x) - y) ** 2).mean().backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
    assert_same(model, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, plain = Net().to(dtype), Net().to(dtype)
    flat = FlatParameters(model, grads=True)
    assert (
        list(flat.data) == [dtype] and flat.n_parameters[dtype] % (64 // flat.data[dtype].element_size()) == 0
    )
    train(model, sgd(model))
    train(plain, sgd(plain))
    assert_same(model, plain)


def test_mixed_dtypes() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4).bfloat16(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2).double()
    )
    asked: list[tuple[torch.dtype, int]] = []

    def allocate(dtype: torch.dtype, numel: int) -> Tensor:
        asked.append((dtype, numel))
        return torch.empty(numel, dtype=dtype)

    flat = FlatParameters(model, allocate=allocate)
    assert asked == [(torch.bfloat16, 64), (torch.float32, 32), (torch.float64, 16)]
    assert flat.n_parameters == {torch.bfloat16: 64, torch.float32: 0, torch.float64: 16}
    flat.attach_grads(allocate)
    assert asked[3:] == [(torch.bfloat16, 64), (torch.float64, 16)]
    assert model[1].running_mean.dtype == torch.float32 and (model[1].running_var == 1).all()


def test_memory_handed_in_and_release() -> None:
    model, plain = Net(), Net()
    windows: list[Tensor] = []

    def allocate(dtype: torch.dtype, numel: int) -> Tensor:
        windows.append(
            torch.frombuffer(bytearray(numel * 4 + 64), dtype=dtype)[16:]
        )  # the middle of a window
        return windows[-1]

    optimizer = sgd(model)
    flat = FlatParameters(model, allocate=allocate)
    flat.attach_grads(allocate)
    train(model, optimizer, 3)
    assert inside(model.conv.weight, windows[0]) and inside(model.conv.weight.grad, windows[1])
    flat.release()
    flat.release()
    assert not flat.data and not flat.grads and FlatParameters.of(model.scale) is None
    for window in windows:
        window.fill_(float("nan"))
        assert not any(inside(t, window) for t in [*model.parameters(), *model.buffers()])
    train(model, optimizer, 3, 3)  # no hook is left
    train(plain, sgd(plain), 6)
    assert_same(model, plain)
    assert model.tied.weight is model.first.weight
    FlatParameters(model)  # and once more


FORKS = """
import mmap, os, torch
from mpilsgd import forks
from mpilsgd.flat import FlatParameters

torch.set_num_threads(1)
shared = []
def allocate(dtype, numel):  # as a window: in the middle of pages that other processes write
    shared.append(torch.frombuffer(mmap.mmap(-1, 4 * numel + 8192), dtype=dtype)[100 : 100 + numel])
    return shared[-1]

model = torch.nn.Sequential(torch.nn.Linear(200, 30), torch.nn.BatchNorm1d(30))
weight, mean = model[0].weight, model[1].running_mean
flat = FlatParameters(model, allocate=allocate)
flat.attach_grads(allocate)
private = FlatParameters(torch.nn.Linear(3, 3))

def forked(do):
    ready, go = os.pipe()
    child = os.fork()
    if child:
        return child, go
    os.read(ready, 1)
    try:
        do()
        os._exit(0)
    finally:
        os._exit(1)

def write(value):
    with torch.no_grad():
        for t in (weight, mean, flat.grads[torch.float32]):
            assert (t == value).all(), (t, value)
            t.fill_(7.0)
            assert (t == 7).all() and (flat.data[torch.float32][:6000] == 7).all()

def fill(value):
    for t in (weight.detach(), mean, flat.grads[torch.float32]):
        t.fill_(value)

fill(1.0)
children = [forked(lambda: write(1.0)) for _ in range(2)]
files = dict(forks._copies)
assert len(files) == 2 and None not in files.values()
fill(2.0)  # the children see the moment of the fork, and leave this alone
children.append(forked(lambda: write(2.0)))
assert all(forks._copies[k] is not None for k in files)
fill(3.0)
for child, go in children:
    os.write(go, b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert all((t == 3).all() for t in (weight, mean, flat.grads[torch.float32]))
flat.touched()
assert not forks._copies
flat.release()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is shared is known on Linux only")
def test_a_forked_child_has_parameters_of_its_own() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=100, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")


PEAK = """
import resource, torch
from mpilsgd.flat import FlatParameters
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2**21)) for _ in range(32)])  # 256 MB
before = peak()
FlatParameters(model)
print(peak() / before)
"""


def test_memory_is_not_doubled() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=100
    )
    assert float(run.stdout) < 1.15


def test_reseat_after_the_memory_was_exchanged() -> None:
    model = Net()
    flat = FlatParameters(model)
    model.conv.weight.data = torch.full_like(model.conv.weight, 2.0)
    assert flat.span(model.conv.weight) is None
    assert [id(t) for t in flat.reseat()] == [id(model.conv.weight)]
    assert (flat.view(model.conv.weight, flat.data) == 2).all()
    assert inside(model.conv.weight, flat.data[torch.float32])
    model.double()
    with pytest.raises(ValueError, match="float64"):
        flat.reseat()
    flat.release()  # what left its place is left alone
    assert model.conv.weight.dtype == torch.float64


def test_span() -> None:
    model = Net()
    flat = FlatParameters(model)
    spans = [flat.span(p) for p in flat.parameters if p.numel()]
    assert spans[0].start == 0 and spans[-1].stop == flat.n_parameters[torch.float32]
    assert all(a.stop == b.start for a, b in pairwise(spans))
    assert flat.span(model.empty) is None
    with pytest.raises(ValueError, match=r"shape \(5, 5\) does not belong"):
        flat.span(model.frozen.weight)
