"""The example of docs/adding-a-method.md: it is what stands there, it is right, and it gets the rest for nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import FEW, WORLD, Case, Layout, check_together, distance, running
from job_harness import everyone_got
from problems import TanhNet
from simulation import Local

from mpilsgd import DiLoCo
from mpilsgd.exchange import Every, InTurn, Method, number, whole
from mpilsgd.train import job
from mpilsgd.train.callables import resolve

pytestmark = pytest.mark.mpi
ROOT = Path(__file__).parents[2]


@pytest.fixture
def slowmo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(ROOT)
    return resolve("examples.slowmo:SlowMo")


def test_the_page_shows_the_file() -> None:
    page = (ROOT / "docs/adding-a-method.md").read_text()
    code = (ROOT / "examples/slowmo.py").read_text()
    assert re.search(r"```python\n(.*?)```", page, re.DOTALL)[1] == code  # type: ignore[index]
    assert len(code.splitlines()) < 60


@pytest.mark.parametrize("layout", FEW, ids=str)
def test_it_equals_the_paper(slowmo: Any, layout: Layout) -> None:
    problem, lr, beta, alpha, tau = TanhNet(), 0.05, 0.6, 0.9, 3
    case = Case(slowmo, {"period": tau, "slow_momentum": beta, "slow_lr": alpha})
    x = [problem.start(0) for _ in range(WORLD.size)]
    c, u = problem.start(0), np.zeros(problem.size)
    errors: list[str] = []
    with running(case, problem, Local(lr=lr), layout) as run:
        for t in range(9):
            run.step()
            x = [own - lr * problem.gradient(own, worker, t)[1] for worker, own in enumerate(x)]
            if (t + 1) % tau == 0:
                u = beta * u + (c - np.mean(x, 0)) / lr
                c = c - alpha * lr * u
                x = [c.copy() for _ in x]
            gap = distance(run.x(), x[run.rank])
            errors += [f"t={t}: x differs by {gap:.1e}"] if gap > 1e-12 else []
        gap = distance(run.center(), c)
        errors += [f"the centre differs by {gap:.1e}"] if gap > 1e-12 else []
    check_together(errors)


def test_it_is_a_setting_of_diloco(slowmo: Any) -> None:
    """As long as the local rate gamma stays: the outer optimizer is SGD with SlowMo's momentum and rate."""
    settings = {"period": 3, "slow_momentum": 0.6, "slow_lr": 0.9}
    with running(Case(slowmo, settings), TanhNet(), Local(lr=0.05), FEW[0]) as run:
        expected = run.run(10).x()
    outer = {"period": 3, "outer": lambda c: torch.optim.SGD(c, lr=0.9, momentum=0.6)}
    with running(Case(DiLoCo, outer), TanhNet(), Local(lr=0.05), FEW[0]) as run:
        gap = distance(run.run(10).x(), expected)
    check_together([f"differs by {gap:.1e}"] if gap > 1e-12 else [])


@pytest.mark.processes
def test_a_job_trains_with_it(slowmo: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its fields are options, and a run that goes on from a checkpoint equals one that was never stopped."""
    argv = [
        "--method",
        "examples.slowmo:SlowMo",
        "--slow_momentum",
        "0.5",
        "--period",
        "4",
        "--data",
        "digits",
    ]
    argv += ["--checkpoint_every", "10 steps", "--eval_every", "10 steps"]
    whole, cut = folder / "whole", folder / "cut"
    everyone_got(job.main([*argv, "--steps", "30", "--output", str(whole)]), 0)
    everyone_got(job.main([*argv, "--steps", "20", "--output", str(cut)]), 0)
    everyone_got(job.main(["--resume", str(cut), "--steps", "30"]), 0)
    assert "slow_momentum: 0.5" in (cut / "config.yaml").read_text()
    one, two = (torch.load(run / "checkpoint/center.pt") for run in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)
    capsys.readouterr()


def test_a_rule_that_misuses_the_mechanism_is_refused_when_it_is_made() -> None:
    with pytest.raises(TypeError, match=r"Wrong defines step, which are the mechanism's"):
        type("Wrong", (Method,), {"step": lambda self: None})
    with pytest.raises(TypeError, match="vector"):
        Method.vector(object.__new__(type("Vague", (Method,), {"vectors": {}})), "v", per="node")

    class Lost(Method):
        exchanges = {False: InTurn}  # noqa: RUF012

        def clock_of(self) -> Every:
            return Every(1)

        def exchange(self, r: Any) -> None:
            r.mean()

    with pytest.raises(TypeError, match=r"Lost.exchange asks for mean; InTurn has copy, each"):
        Lost(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))

    class Late(Method):
        overlap: int = whole(2, 0, help="steps")

        def clock_of(self) -> Every:
            return Every(5)

        def exchange(self, r: Any) -> None:
            r.mean()
            r.elastic(self.c, 0.5, 0.5)

    class Later(Late):
        def exchange(self, r: Any) -> None:
            r.mean()

    class Alone(Later):
        exchanges = {False: InTurn}  # noqa: RUF012

    for rule, wrong in (
        (Late, "Late.exchange asks for elastic; BehindSteps has copy, each, mean, only"),
        (Later, "Later.exchange must ask for copy"),
        (Alone, "overlap in steps goes with Together"),
    ):
        with pytest.raises(TypeError, match=wrong):
            rule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))

    class Half(Method):
        rate: float = number(0.5, 0, 1, help="a rate")

        def clock_of(self) -> Every:
            return Every(1)

    with pytest.raises(TypeError, match=r"Half must define exchange"):
        Half(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
