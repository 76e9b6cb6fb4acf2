"""What FlatParameters refuses, and how models are told apart and found."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from flat_model import Net, assert_same, inside, plain_trainable, sgd, train
from torch import Tensor, nn

from mpilsgd.flat import FlatParameters, digest, find_modules, float_buffers
from mpilsgd.layout import Plan, canonical, first_difference


def bad_allocation(wrong: str) -> Callable[[torch.dtype, int], object]:
    return lambda dtype, n: {
        "size": lambda: torch.empty(n + 1),
        "dtype": lambda: torch.empty(n, dtype=torch.float64),
        "dimensions": lambda: torch.empty(1, n),
        "contiguous": lambda: torch.empty(2 * n)[::2],
        "type": lambda: bytearray(4 * n),
        "device": lambda: torch.empty(n, device="meta"),
    }[wrong]()


@pytest.mark.parametrize("wrong", ["size", "dtype", "dimensions", "contiguous", "type", "device"])
def test_bad_memory(wrong: str) -> None:
    model, plain = Net(), Net()
    with pytest.raises(
        ValueError, match=r"allocate\(torch.float32, 368\) gave .*parameter scale of shape \(\)"
    ):
        FlatParameters(model, allocate=bad_allocation(wrong))
    assert_same(model, plain)
    assert FlatParameters.of(model.scale) is None


SHARED = torch.zeros(20)


@pytest.mark.parametrize(
    ("parameters", "buffers", "message"),
    [
        ([], [], "no parameter to train among the 0"),
        ([torch.ones(3)], [], r"no parameter to train among the 1 given \(shapes: \(3,\)\)"),
        (nn.Conv2d(1, 1, 1).requires_grad_(False), [], "no parameter to train"),
        (
            [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 5, device="meta"))],
            [],
            r"1 of shape \(2, 5\)",
        ),
        (
            [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4).cfloat())],
            [],
            r"1 of shape \(4,\).*complex",
        ),
        ([nn.Parameter(torch.eye(3).to_sparse())], [], r"parameter 0 of shape \(3, 3\) is torch.sparse"),
        ([nn.Parameter(torch.ones(1).expand(4))], [], r"parameter 0 of shape \(4,\).*on top"),
        ([nn.Parameter(SHARED[:12]), nn.Parameter(SHARED[10:])], [], r"parameter 1 .*shares a part .* 0 of"),
        ([nn.Parameter(SHARED)], [SHARED[:3]], r"buffer 0 of shape \(3,\) shares"),
        (
            [nn.Parameter(torch.ones(2))],
            [torch.ones(3, dtype=torch.int64)],
            r"buffer 0 of shape \(3,\).*int64",
        ),
        (nn.Sequential(nn.LazyLinear(3)), [], r"parameter 0.weight has no shape yet"),
        ([nn.Parameter(torch.ones(2)) * 2], [], "parameter 0 .*not a leaf"),
    ],
)
def test_bad_tensors(parameters: nn.Module | list[Tensor], buffers: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatParameters(parameters, buffers)
    with pytest.raises(ValueError, match=message):
        digest(parameters, buffers)


def test_devices() -> None:
    class Elsewhere(nn.Parameter):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda:1")

    wrong = Elsewhere(torch.ones(2, 3))
    with pytest.raises(
        ValueError, match=r"parameter 1 of shape \(2, 3\) is on cuda:1, but parameter 0 of shape \(4,\)"
    ):
        FlatParameters([nn.Parameter(torch.ones(4)), wrong])


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="single tensor"):
        FlatParameters(nn.Parameter(torch.ones(2)))
    with pytest.raises(TypeError, match="parameter 1 is a str"):
        FlatParameters([nn.Parameter(torch.ones(2)), "weight"])
    model = Net()
    flat = FlatParameters(model)
    with pytest.raises(ValueError, match=r"parameter 0 .*another flat vector"):
        FlatParameters(model.parameters())
    with pytest.raises(ValueError, match="no elements"):
        flat.view(model.second.bias, {torch.float32: torch.zeros(3)})


def test_owner_that_died() -> None:
    model = Net()
    owner = FlatParameters(model, grads=True)
    owner.myself = owner  # a cycle, as optimizers make them
    del owner
    flat = FlatParameters(model, grads=True)
    train(model, sgd(model), 2)
    assert inside(model.scale.grad, flat.grads[torch.float32])


def test_expanded_buffer_becomes_dense() -> None:
    model = nn.Linear(2, 3)
    model.register_buffer("mask", torch.ones(1).expand(4))
    FlatParameters(model)
    assert torch.equal(model.mask, torch.ones(4)) and model.mask.stride() == (1,)


def test_digest() -> None:
    model, plain = Net(), Net(1)
    first = digest(model)
    assert digest(plain) == first and len(first) == 64
    FlatParameters(model)
    assert digest(model) == first
    trained, names = canonical(plain_trainable(plain), [plain])
    assert digest(trained, float_buffers([plain]), names) == first
    assert digest(nn.ModuleDict({"_orig_mod": plain})) == first  # as torch.compile wraps it on one rank
    others = [
        digest(trained),
        digest(trained, float_buffers([plain])),
        digest(trained, float_buffers([plain]), {**names, id(plain.scale): "other"}),
        digest(trained[::-1]),
        digest(trained[1:]),
        digest(trained[::-1], (), names),
        digest(Net().to(memory_format=torch.channels_last)),
        digest(Net().double()),
        digest([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]),
        digest([(tied := nn.Parameter(torch.ones(3))), nn.Parameter(tied.data)]),
        digest([nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(3))]),
    ]
    assert len({first, *others}) == len(others) + 1


def test_errors_name_parameters_as_the_module_does() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model.register_buffer("mean", torch.zeros(2))
    parameters, names = canonical(model.parameters(), [model])
    flat = FlatParameters(parameters, float_buffers([model]), names=names)
    assert [flat.name(t) for t in [model[1].bias, model.mean]] == ["parameter 1.bias", "buffer mean"]
    with pytest.raises(ValueError, match=r"parameter 0.weight of shape \(3, 2\) lies in another flat vector"):
        FlatParameters(parameters, names=names)
    with pytest.raises(ValueError, match=r"^parameter 0 of shape \(3, 2\) lies in another"):
        FlatParameters(parameters)
    model.double()
    with pytest.raises(ValueError, match=r"parameter 0.weight of shape \(3, 2\), .*float64"):
        flat.reseat()
    mixed = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, device="meta"))
    with pytest.raises(ValueError, match=r"parameter 1.weight of shape \(1, 3\) is torch.strided on meta"):
        FlatParameters(mixed)


def test_plan_as_source() -> None:
    model, plain = Net(), Net()
    plan = Plan(model)
    flat = FlatParameters(plan)
    assert_same(model, plain)
    assert plan.digest() == digest(plain) and flat.name(model.offset) == "buffer offset"


def test_canonical_order() -> None:
    """However the optimizer's groups are built the order is the module's."""
    model = Net()
    trained = plain_trainable(model)
    ordered, names = canonical([*trained[::-1], trained[3]], [model])
    assert [id(p) for p in ordered] == [id(p) for p in trained]
    assert names[id(model.conv.weight)] == "conv.weight" and names[id(model.offset)] == "offset"
    stranger = nn.Parameter(torch.ones(2))
    given = [trained[2], stranger, trained[0]]
    ordered, names = canonical(given, [model])  # not all have a name: as given
    assert [id(p) for p in ordered] == [id(p) for p in given] and id(stranger) not in names
    assert canonical(given, [])[1] == {}


def test_canonical_order_of_several_modules() -> None:
    class Encoder(nn.Linear): ...

    class Decoder(nn.Linear): ...

    encoder, decoder = Encoder(2, 3), Decoder(3, 2)
    towers = [nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 5)]
    parts = [encoder, *towers, decoder]
    for order in (parts, parts[::-1]):
        given = [p for part in order for p in part.parameters()]
        modules = find_modules(given)
        ordered, names = canonical(given, modules)
        assert modules[:2] == [decoder, encoder] and modules[4] is towers[2]
        assert [names[id(p)] for p in ordered][2:6] == [
            "Encoder.weight",
            "Encoder.bias",
            "Linear[0].weight",
            "Linear[0].bias",
        ]
        # modules that only the given order tells apart come in it
        assert modules[2:4] == [part for part in order if part in towers[:2]]
    wrapped = nn.Sequential(encoder)
    assert canonical(wrapped.parameters(), [encoder, wrapped])[1] == {
        id(encoder.weight): "weight",
        id(encoder.bias): "bias",
    }


def test_first_difference() -> None:
    def told(model: nn.Module, named: bool = True, order: int = 1) -> list:
        ordered, names = canonical(model.parameters(), [model] if named else [])
        return Plan(ordered[::order], float_buffers([model]), names).described()

    def linear(*sizes: int, **kwargs: bool) -> nn.Module:
        return nn.Sequential(*(nn.Linear(m, n, **kwargs) for m, n in pairwise(sizes)))

    one = told(linear(2, 2, 2))
    for other, message in (
        (
            told(linear(2, 2, 3)),
            r"parameter 1.weight is (2, 2) torch.float32 on rank 0 and (3, 2) torch.float32",
        ),
        (
            told(linear(2, 2, 2, bias=False)),
            "parameter 0.bias ((2,) torch.float32) is there on rank 0, but not on",
        ),
        (
            told(linear(2, 2, 2, 2)),
            "parameter 2.weight ((2, 2) torch.float32) is there on rank 3, but not on rank 0",
        ),
        (
            told(linear(2, 2, 2), order=-1),
            "parameter 0.weight comes on rank 0 where parameter 1.bias comes on rank 3",
        ),
        (told(linear(2, 2, 2), named=False), "is there on rank 3, but not on rank 0"),
        (told(nn.Sequential(linear(2, 2, 3))), "parameter 1.weight is (2, 2)"),
    ):
        assert message in first_difference(one, other, 3)
    bare = told(linear(2, 2, 2), named=False)
    other = told(linear(2, 3, 2), named=False)
    assert first_difference(bare, other, 1).startswith("parameter 0 is (2, 2)")


def test_find_modules() -> None:
    model, other = Net(), Net()
    body, head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 1)
    both = nn.Sequential(body, head)
    assert find_modules(model.parameters()) == [model]
    assert find_modules([*other.parameters(), *model.parameters()]) == [other, model]
    wrapped = nn.Sequential(other, nn.Tanh())
    assert find_modules(other.parameters()) == [wrapped]
    assert find_modules(body.parameters()) == [body]
    assert find_modules(both.parameters()) == [both]
    assert find_modules([both[0][0].bias]) == [] and find_modules([]) == []
    names = [id(b) for b in float_buffers([model, body, model])]
    assert names == [
        id(b)
        for b in (
            model.offset,
            model.norm.running_mean,
            model.norm.running_var,
            body[1].running_mean,
            body[1].running_var,
        )
    ]
