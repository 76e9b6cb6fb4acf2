"""`mpilsgd export`: what is computed from a checkpoint's files is what `center()` shows while the workers run."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mpilsgd
from mpilsgd import (
    ADMM,
    EASGD,
    LSGD,
    MSGD,
    AllreduceSGD,
    DiLoCo,
    Downpour,
    EASGDTree,
    LocalSGD,
    RunningAverage,
)
from mpilsgd.train import export, job, saved
from mpilsgd.train.callables import InputError
from mpilsgd.train.run_directory import RunDirectory

# The first imports torch._dynamo: before conftest.py freezes what imports left.
torch.optim.SGD([torch.zeros(1)], lr=0.1)


class Net(torch.nn.Module):
    """Statistics, a memory format of its own, a weight under two names, one that is not trained, a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.norm = torch.nn.BatchNorm2d(4)
        self.out = torch.nn.Linear(4, 4, bias=False)
        self.again = torch.nn.Linear(4, 4)
        self.again.weight = self.out.weight
        self.frozen = torch.nn.Parameter(torch.arange(4.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.out(self.norm(self.conv(x)).mean((2, 3)))) + self.frozen


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.5)


def msgd(parameters: Any) -> torch.optim.Optimizer:
    return MSGD(parameters, lr=0.05, momentum=0.5)


def averaged(parameters: Any) -> torch.optim.Optimizer:
    return RunningAverage(MSGD(parameters, lr=0.05, momentum=0.5))


TURNS = {"asynchronous": True, "order": "round-robin"}
CASES: list[tuple[Any, dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = [
    (AllreduceSGD, {}, sgd),
    (LocalSGD, {"period": 3}, msgd),
    (LocalSGD, {"period": 3}, averaged),
    (LocalSGD, {"period": 3, "average": "quadratic", "a": 5.0}, sgd),
    (LocalSGD, {"period": 3, "average": "quadratic", "a": 5.0}, averaged),
    (LocalSGD, {"period": 3, "buffers": "keep"}, sgd),
    (LSGD, {"period": 2}, msgd),
    (LSGD, {"period": 2, **TURNS}, sgd),
    (EASGD, {"period": 2}, msgd),
    (EASGD, {"period": 2, "form": "gauss-seidel"}, sgd),
    (EASGD, {"period": 2, **TURNS}, sgd),
    (DiLoCo, {"period": 2, "fragments": 2}, sgd),
    (Downpour, {"average": "running", **TURNS}, sgd),
    (ADMM, {"rho": 0.4}, torch.optim.SGD),
    (EASGDTree, {"degree": 2, "inner": "ranks", "order": "lock-step"}, sgd),
    (EASGDTree, {"degree": 2, "inner": "hosted", "order": "lock-step"}, msgd),
]


def trained(
    method: Any, options: dict[str, Any], optimizer: Any, across: Any = None
) -> Callable[[], tuple[bytes, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """A worker that gives its part of a checkpoint, the centre that it sees then, and its own iterate."""

    def worker() -> tuple[bytes, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        topology = mpilsgd.Topology(across_dtype=across)
        generator = torch.Generator().manual_seed(topology.world.rank)
        torch.manual_seed(5)
        model = Net()
        trained = [p for p in model.parameters() if p.requires_grad]
        lr = {"lr": 0.05} if optimizer is torch.optim.SGD else {}
        opt = method(optimizer(trained, **lr), topology, model=model, **options)
        for _ in range(5):
            if opt.computes:
                opt.zero_grad()
                loss = model(torch.randn(6, 3, 5, 5, generator=generator)).square().mean()
                loss.backward()
                opt.step(loss=loss)
            else:
                opt.step()
        with opt.center():
            pass  # nobody steps from here on
        progress = {"step": 5 * opt.computes, "loss_sum": 0.0, "loss_count": 0, "last_loss": 1.0}
        about = {"centre": saved.told(model, opt), "progress": progress}
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": opt.state_dict(), **about}, file)
        topology.world.Barrier()
        with opt.center():
            center = {name: value.clone() for name, value in model.state_dict().items()}
        with getattr(opt.optimizer, "iterate", torch.no_grad)():
            own = {name: value.clone() for name, value in model.state_dict().items()}
        opt.close()
        return file.getvalue(), center, own

    return worker


def load_from(files: list[bytes]) -> Callable[[int], dict[str, Any]]:
    return lambda rank: torch.load(io.BytesIO(files[rank]), weights_only=True)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(
            found[name], value, rtol=1e-6, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join([case[0].__name__, *map(str, case[1].values())])
)
def test_the_centre_of_files_is_the_centre_of_workers(case: Any, nodes: int) -> None:
    rows = mpilsgd.in_process(trained(*case), 4, nodes=nodes, seed=1)
    files, centers, own = zip(*rows, strict=True)
    same(saved.center_of(load_from(list(files)), 4), centers[0])
    for file, expected in zip(files, own, strict=True):
        same(saved.worker_of(torch.load(io.BytesIO(file), weights_only=True)), expected)


@pytest.mark.parametrize(
    ("options", "across", "reason"),
    [
        ({"period": 2, **TURNS}, "int8", "few bits"),
        ({"period": 2, "buffers": "recalibrate"}, None, "recalibrate"),
    ],
)
def test_a_centre_that_files_do_not_have_is_refused(options: Any, across: Any, reason: str) -> None:
    def worker() -> bytes:
        topology = mpilsgd.Topology(across_dtype=across)
        model = Net()
        trained = [p for p in model.parameters() if p.requires_grad]
        opt = EASGD(sgd(trained), topology, model=model, **options)
        file = io.BytesIO()
        torch.save(
            {"model": model.state_dict(), "optimizer": opt.state_dict(), "centre": saved.told(model, opt)},
            file,
        )
        topology.world.Barrier()
        opt.close()
        return file.getvalue()

    files = mpilsgd.in_process(worker, 2, nodes=2)
    with pytest.raises(InputError, match=f"{reason}.*resume it to its end"):
        saved.center_of(load_from(files), 2)


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args([str(argument) for argument in arguments]))


QUICK = [
    "--threads",
    "1",
    "--device",
    "cpu",
    "--method",
    "EASGD",
    "--period",
    "5",
    "--lr",
    "0.2",
    "--steps",
    "40",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "easgd"
    threads = torch.get_num_threads()
    assert job.main([*QUICK, "--eval_every", "10 steps", "--output", str(run)]) == 0
    torch.set_num_threads(threads)
    return run


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_finished_run(
    finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    center = torch.load(finished / "checkpoint" / "center.pt", weights_only=True)
    assert call(finished, "-o", tmp_path / name) == 0
    told = capsys.readouterr().out
    assert "the centre at the end, step 40" in told and "85002 numbers" in told and "load_state_dict" in told
    same(loaded(tmp_path / name), center)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]
    from safetensors.torch import load_file

    found = load_file(path)  # its own order
    return {
        name: found[name] for name in sorted(found, key=lambda name: (name.split(".")[0], name[-1] != "t"))
    }


def test_the_best_centre_is_kept(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["test_error"])
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["best"] == {"step": best["step"], "test_error": best["test_error"]}
    assert call(finished, "--best", "-o", tmp_path / "best.pt") == 0
    told = capsys.readouterr().out
    assert f"the best centre, step {best['step']}, test error {100 * best['test_error']:.2f} %" in told
    same(
        loaded(tmp_path / "best.pt"),
        torch.load(finished / "checkpoint" / "best.pt", weights_only=True)["model"],
    )


def test_an_interrupted_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without what a run writes at its end; there the checkpoint's centre is the end's."""
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    for path in finished.rglob("*"):
        if path.is_file() and path.name not in ("summary.json", "center.pt", "best.pt"):
            (run / path.relative_to(finished)).write_bytes(path.read_bytes())
    center = torch.load(finished / "checkpoint" / "center.pt", weights_only=True)
    assert call(run, "-o", tmp_path / "model.pt") == 0
    assert "the centre of the checkpoint at step 40 (the run did not end)" in capsys.readouterr().out
    same(loaded(tmp_path / "model.pt"), center)
    assert call(run, "--worker", "best", "-o", tmp_path / "worker.pt") == 0
    assert "the model of rank 0 at step 40, which had the lowest training loss" in capsys.readouterr().out
    assert call(run, "--best", "-o", tmp_path / "best.pt") == 2
    assert "best.pt: there is none yet" in capsys.readouterr().err
    assert not (tmp_path / "best.pt").exists()


def test_a_run_that_went_on_after_its_end(finished: Path, tmp_path: Path) -> None:
    """A later checkpoint counts more than the centre of the first end."""
    run = RunDirectory(finished)
    step = run.sealed_step(1)
    assert step == 40
    found = export.chosen(export.read_runs([finished])[0])
    assert found.what == "the centre at the end, step 40"
    summary = finished / "summary.json"
    content = summary.read_text()
    try:
        summary.write_text(json.dumps({**json.loads(content), "steps": 30}))
        assert "the checkpoint at step 40" in export.chosen(export.read_runs([finished])[0]).what
    finally:
        summary.write_text(content)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-o", "model.onnx"], "its name must end in .pt, .pth, .safetensors"),
        (["-o", "nowhere/model.pt"], "there is no such folder"),
        (["-o", "model.pt", "--worker", "7"], "--worker must be best or a rank from 0 to 0, not '7'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    finished: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(finished, *arguments) == 2
    err = capsys.readouterr().err
    assert reason in err and err.startswith("mpilsgd export: ") and err.count("\n") == 1


def test_a_damaged_file_is_said_in_a_line(finished: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        (run / name).write_bytes((finished / name).read_bytes())
    assert call(run, "-o", tmp_path / "a.pt") == 2
    assert "holds neither a centre nor a finished checkpoint" in capsys.readouterr().err
    (run / "checkpoint" / "center.pt").write_bytes(b"PK\x03\x04 no archive")
    assert call(run, "-o", tmp_path / "a.pt") == 2
    err = capsys.readouterr().err
    assert "center.pt: cannot be read" in err and err.count("\n") == 1
    assert call(tmp_path / "nothing", "-o", tmp_path / "a.pt") == 2
    assert "there is no such run directory" in capsys.readouterr().err
