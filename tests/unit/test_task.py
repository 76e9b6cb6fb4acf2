"""The task of a job: losses, metrics and whole tasks of the user's, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from mpilsgd.train import problem
from mpilsgd.train.callables import InputError
from mpilsgd.train.config import Config
from mpilsgd.train.data import MapSet, TensorSet
from mpilsgd.train.evaluation import evaluate
from mpilsgd.train.formats import DataError
from mpilsgd.train.samples import Reading
from mpilsgd.train.task import Classification, Regression, UsersLoss

IDENTITY = torch.nn.Identity()
HEAD = """
import torch

def two():
    train = torch.arange(10.0).view(5, 2), torch.arange(5.0).view(5, 1)
    return train, (torch.arange(6.0).view(3, 2), torch.ones(3, 1))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of the user's; gives its name."""
    monkeypatch.syspath_prepend(tmp_path)
    count = iter(range(100))

    def make(text: str) -> str:
        name = f"users_task_{tmp_path.name.replace('-', '_')}_{next(count)}"
        (tmp_path / f"{name}.py").write_text(HEAD + text)
        return name

    return make


def test_scores_of_every_place_are_judged() -> None:
    scores, labels = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
    found = evaluate(IDENTITY, TensorSet(scores, labels, 3), task=Classification(3, characters=True))
    assert found.loss == pytest.approx(float(functional.cross_entropy(scores, labels)))
    assert found.error == pytest.approx(float((scores.argmax(1) != labels).double().mean()))
    assert found.more == {"bits_per_character": pytest.approx(found.loss / math.log(2))}


def test_figures_are_weighted_by_the_samples_of_their_batches(module: Callable[[str], str]) -> None:
    name = module(
        "def loss(outputs, targets): return (outputs - targets).abs().mean(1)\n"
        "def metrics(outputs, targets): return {'big': outputs.max(1).values.mean(), 'one': 1}\n"
    )
    test = MapSet(
        [(torch.tensor([i, -i]), torch.zeros(2)) for i in (1.0, 2.0, 3.0, 4.0, 10.0)],
        None,
        Reading(batch_size=2),
    )
    found = evaluate(IDENTITY, test, task=UsersLoss(f"{name}:loss", f"{name}:metrics"))
    assert (found.loss, found.error, found.judged) == (4.0, None, 4.0)
    assert found.more == {"big": 4.0, "one": 1.0}


def test_mean_squared_error_takes_outputs_of_another_shape() -> None:
    outputs, targets = torch.randn(6, 1), torch.randn(6)
    found = evaluate(IDENTITY, TensorSet(outputs, targets, None), task=Regression())
    assert found.loss == pytest.approx(float((outputs[:, 0] - targets).square().mean()))
    assert found.error is None


def test_a_whole_task(module: Callable[[str], str]) -> None:
    name = module(
        "class Task:\n"
        "    def __init__(self, seed): self.seed = seed\n"
        "    def data(self): return [torch.ones(3)] * 4, [torch.ones(3)] * 3\n"
        "    def model(self): return torch.nn.Linear(3, self.seed)\n"
        "    def loss(self, model, batch): return model(batch).square().sum(1)\n"
        "    def evaluate(self, model, batch): return {'error': 0.25, 'size': float(len(batch))}\n"
    )
    task, train, test = problem.load(Config(task=f"{name}:Task", seed=2, batch_size=2))
    model = task.model(Config(), train, train.first(), 0)
    assert model.weight.shape == (2, 3) and torch.equal(train.first(), torch.ones(2, 3))
    found = evaluate(model, test, task=task)
    assert found.error == 0.25 and found.more == {"size": pytest.approx((2 * 2 + 1 * 1) / 3)}
    assert found.loss == pytest.approx(model(torch.ones(3)).detach().square().sum().item())


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (
            {"loss": "loss"},
            "def loss(outputs): pass",
            r"is called with \(outputs, targets\); it is defined with \(outputs\)",
        ),
        ({"metrics": "m"}, "def m(): pass", r"is called with \(outputs, targets\)"),
        ({"loss": "l"}, "def l(outputs, targets, weight): pass", "missing a required argument: 'weight'"),
        (
            {"task": "T"},
            "class T:\n    def loss(self, model): pass",
            r"T, loss: is called with \(model, batch\)",
        ),
        ({"task": "T"}, "class T: pass", r"must give an object with loss\(model, batch\)"),
        (
            {"task": "T"},
            "class T:\n    def __init__(self, width): pass",
            "by name, if it takes them, with data_dir, seed",
        ),
        (
            {"task": "T", "model": "lenet"},
            "class T:\n    def loss(self, model, batch): pass\n    def model(self): pass",
            "model: .* brings its own; leave --model lenet away",
        ),
    ],
)
def test_callables_that_cannot_be_called(
    module: Callable[[str], str], options: dict[str, str], text: str, message: str
) -> None:
    name = module(text)
    options = {key: value if value == "lenet" else f"{name}:{value}" for key, value in options.items()}
    with pytest.raises(InputError, match=message):
        problem.load(
            Config(**({"data": f"{name}:two", "loss": "mse"} if "task" not in options else {}) | options)
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def loss(outputs, targets): return 3.0", "must return a tensor of floating-point numbers"),
        ("def loss(outputs, targets): return (outputs - targets).abs().mean().detach()", "has no gradient"),
        ("def metrics(outputs, targets): return 3", "must return a dict of numbers"),
        ("def metrics(outputs, targets): return {'loss': 1.0}", "the name 'loss' is taken"),
        ("def metrics(outputs, targets): return {'far': outputs}", "'far' must be one number"),
    ],
)
def test_what_callables_return(module: Callable[[str], str], text: str, message: str) -> None:
    name = module(text + "\n")
    given = {text[4 : text.index("(")]: f"{name}:{text[4 : text.index('(')]}"}
    config = Config(**{"data": f"{name}:two", "loss": "mse", **given})
    task, train, _ = problem.load(config)
    with pytest.raises(InputError, match=message):
        task.trial(config, torch.nn.Linear(2, 1), train.first())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 5], "label 5 of sample 3 is not below 3, the number of classes"),
        ([0, -1, 2, 1], "label -1 of sample 1 is below 0"),
        ([0.5, 1.0, 0.0, 0.0], "cross_entropy needs labels that are whole numbers, found torch.float64"),
    ],
)
def test_labels_are_checked_as_they_come(labels: list[Any], message: str) -> None:
    data = MapSet([(torch.zeros(2), label) for label in labels], 3)
    data.check = Classification(3).check
    with pytest.raises(DataError, match=message):
        data.batch(torch.arange(4))


def test_samples_that_are_no_pairs_are_for_a_task() -> None:
    data = MapSet([torch.zeros(2)] * 4)
    data.check = Classification(3).check
    with pytest.raises(
        DataError, match=r"cross_entropy needs samples that are pairs .* a --task of your own"
    ):
        data.first()


def test_what_cannot_be_imported_says_where_was_looked(module: Callable[[str], str]) -> None:
    name = module("def metrics(outputs, targets): pass\n")
    with pytest.raises(InputError, match=rf"cannot import .*; looked in .*{name}.py; did you mean metrics\?"):
        problem.load(Config(metrics=f"{name}:metric"))
    with pytest.raises(InputError, match=r"No module named 'nowhere_at_all'; looked in .*site-packages"):
        problem.load(Config(loss="nowhere_at_all:loss"))


def test_classes_are_asked_for_where_a_model_needs_them(module: Callable[[str], str]) -> None:
    name = module(
        "def data(): return ([(torch.ones(3), 1)] * 4,) * 2\ndef net(): return torch.nn.Linear(3, 2)\n"
    )
    config = Config(data=f"{name}:data")
    task, train, _ = problem.load(config)
    with pytest.raises(
        InputError, match=r"how many classes .* --classes N, .* attribute `classes`, or .* tensors"
    ):
        task.model(config, train, train.first(), 0)
    task.trial(config, task.model(Config(model=f"{name}:net"), train, train.first(), 0), train.first())
    with pytest.raises(DataError, match="label 2 is not below 2"):
        task.check([None, torch.tensor([0, 2])], None)  # as many as the model gives scores
    task, train, _ = problem.load(Config(data=f"{name}:data", classes=5))
    assert task.model(config, train, train.first(), 0)(torch.ones(1, 3)).shape == (1, 5)


def test_models_and_inputs_that_do_not_go_together() -> None:
    config = Config(model="gpt")
    task, train, _ = problem.load(config)
    with pytest.raises(InputError, match=r"gpt does not take inputs of torch\.float32 from digits"):
        task.model(config, train, train.first(), 0)
