"""What a run leaves on the disk, and what is left when it is cut short."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpilsgd.train.callables import InputError
from mpilsgd.train.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "a" / "run")
    directory.claim("lr: 0.1\n")
    return directory


def lines(run: RunDirectory, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / name).read_text().splitlines()]


def test_claim_makes_it_and_refuses_a_second_run(run: RunDirectory) -> None:
    assert (run.path / "config.yaml").read_text() == "lr: 0.1\n"
    assert list(run.checkpoint.iterdir()) == [run.manifest]
    with pytest.raises(InputError, match=r"holds a run already.*--resume.*--overwrite"):
        run.claim("lr: 1\n")
    assert (run.path / "config.yaml").read_text() == "lr: 0.1\n"


def test_overwrite_leaves_nothing_of_the_old_run_but_what_is_not_its_own(run: RunDirectory) -> None:
    run.append("metrics.jsonl", [{"step": 1}])
    run.seal(5, [run.save(0, 5, {})])
    run.save_best({}, {"step": 1, "test_error": 0.5})
    for name in ("notes.txt", "metrics.csv", "ranks.json", "command", "tensorboard/events"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("mine")
    run.claim("lr: 1\n", overwrite=True)
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint", "config.yaml", "notes.txt"]
    assert list(run.checkpoint.iterdir()) == [run.manifest] and run.sealed_step(1) is None


def test_the_commands_that_started_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim("lr: 1\n", command="mpilsgd train --lr 1")
    run.begin("lr: 1\nepochs: 3\n", resume=True, command="mpilsgd train --resume run --epochs 3")
    assert (run.path / "command").read_text().splitlines() == [
        "mpilsgd train --lr 1",
        "mpilsgd train --resume run --epochs 3",
    ]
    run.claim("lr: 2\n", overwrite=True, command="mpilsgd train --lr 2")
    assert (run.path / "command").read_text() == "mpilsgd train --lr 2\n"


def test_the_best_centre_is_remembered(run: RunDirectory) -> None:
    assert run.best() is None
    run.save_best({"w": torch.ones(2)}, {"step": np.float64(2.5), "test_error": 0.25})
    assert run.best() == {"step": 2.5, "test_error": 0.25}
    assert torch.equal(torch.load(run.checkpoint / "best.pt", weights_only=True)["model"]["w"], torch.ones(2))
    (run.checkpoint / "best.pt").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"best\.pt: cannot be read"):
        run.best()


def test_resume_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run to resume"):
        RunDirectory(tmp_path).claim("", resume=True)


def test_a_path_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run: cannot be written: Not a directory"):
        RunDirectory(tmp_path / "file" / "run").claim("")


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        directory.claim("")
    assert list(tmp_path.iterdir()) == []


def test_room_for_checkpoints(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"the disk has .* MB left, the checkpoints of this run need 1000000000000\.0 MB"
    ):
        directory.claim("", need=10**18)
    assert not directory.path.exists()
    directory.claim("", need=1000)


def test_lines_are_strict_json(run: RunDirectory) -> None:
    run.append("metrics.jsonl", [{"step": 1, "test_loss": math.nan, "list": [math.inf, 1.0]}])
    assert lines(run) == [{"step": 1, "test_loss": None, "list": [None, 1.0]}]


def test_cut_drops_what_will_be_written_again_and_half_lines(run: RunDirectory) -> None:
    assert run.evaluated() == 0
    run.append("metrics.jsonl", [{"step": step} for step in (1, 2, 3)])
    run.append("leaders.jsonl", [{"step": step} for step in (1, 4)])
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "wall')
    run.cut(2)
    assert lines(run) == [{"step": 1}, {"step": 2}]
    assert lines(run, "leaders.jsonl") == [{"step": 1}]
    assert run.evaluated() == 2


def test_a_checkpoint_counts_when_it_is_sealed(run: RunDirectory) -> None:
    assert run.sealed_step(2) is None
    files = [run.save(rank, 10, {"x": torch.tensor([rank])}) for rank in range(2)]
    assert run.sealed_step(2) is None
    run.seal(10, files)
    assert run.sealed_step(2) == 10
    assert run.load(1, 10)["x"].item() == 1
    files = [run.save(0, 20, {"x": torch.tensor([7])})]  # the job is killed here
    assert run.sealed_step(2) == 10 and run.load(0, 10)["x"].item() == 0
    run.seal(20, [*files, run.save(1, 20, {"x": torch.tensor([8])})])
    for rank in range(2):
        run.sweep(rank, 20)
    assert run.sealed_step(2) == 20
    assert sorted(path.name for path in run.checkpoint.iterdir()) == [
        "manifest.json",
        "step-0000000020.rank00000.pt",
        "step-0000000020.rank00001.pt",
    ]


def test_a_failed_save_leaves_the_old_checkpoint(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.seal(1, [run.save(0, 1, {"x": 1})])

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.save(0, 2, {"x": 2})
    assert run.sealed_step(1) == 1
    assert sorted(path.name for path in run.checkpoint.iterdir()) == [
        "manifest.json",
        "step-0000000001.rank00000.pt",
    ]


def test_a_disk_that_fills_up_names_the_file(run: RunDirectory) -> None:
    full = Path("/dev/full")
    (run.path / "metrics.jsonl").symlink_to(full)
    with pytest.raises(OSError, match="No space left") as caught:
        run.append("metrics.jsonl", [{"step": 1}])
    assert caught.value.filename == str(run.path / "metrics.jsonl")
    (run.checkpoint / f"step-0000000001.rank00000.pt.tmp-{os.getpid()}").symlink_to(full)
    with pytest.raises(OSError) as caught:
        run.save(0, 1, {"x": torch.zeros(10**6)})
    assert caught.value.filename == str(run.checkpoint / "step-0000000001.rank00000.pt")
    assert list(run.checkpoint.iterdir()) == [run.manifest]


def test_damaged_checkpoints_are_refused(run: RunDirectory, tmp_path: Path) -> None:
    run.seal(3, [run.save(0, 3, {"x": torch.zeros(100)})])
    with pytest.raises(InputError, match=r"is a run of 1 rank.*cannot be resumed on 4"):
        run.sealed_step(4)
    path = run.checkpoint / "step-0000000003.rank00000.pt"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"{path}: expected {len(content)} bytes, found {len(content) - 1}"):
        run.load(0, 3)
    for place in (0, len(content) // 2, len(content) - 1):  # one bit
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match=f"{path}: is not the file that this run saved"):
            run.load(0, 3)
    other = RunDirectory(tmp_path / "other")
    other.claim("lr: 0.1\n")
    other.save(0, 3, {"x": torch.ones(100)})
    path.write_bytes((other.checkpoint / path.name).read_bytes())
    with pytest.raises(InputError, match=f"{path}: is not the file that this run saved"):
        run.load(0, 3)
    path.unlink()
    with pytest.raises(InputError, match=f"{path}: is missing"):
        run.load(0, 3)
    for text in ("{}", "", "[]", run.manifest.read_text().replace('"step": 3', '"step": 2')):
        run.manifest.write_text(text)
        with pytest.raises(InputError, match=r"manifest.json: cannot be read"):
            run.sealed_step(1)


def test_a_run_without_its_manifest_is_left_alone(run: RunDirectory) -> None:
    run.seal(3, [run.save(0, 3, {})])
    run.manifest.unlink()
    with pytest.raises(InputError, match=r"manifest.json: is missing.*--overwrite"):
        run.claim("", resume=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (run.path / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="holds a run already"):
        run.claim("")
    assert (run.checkpoint / "step-0000000003.rank00000.pt").exists()


def test_a_configuration_that_was_changed_is_refused(run: RunDirectory) -> None:
    for text in ("", "lr: 0", "lr: 0.2\n"):
        run.config.write_text(text)
        with pytest.raises(InputError, match=r"config.yaml: is not the configuration"):
            run.claim("lr: 0.2\n", resume=True)
        assert run.config.read_text() == text


def test_configuration_and_manifest_fit_whenever_the_job_is_killed(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is taken up with other options again and again, and killed at every renaming of a file."""
    run.seal(3, [run.save(0, 3, {})])
    rename, left = os.replace, 0

    def killed(*names: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        rename(*names)

    monkeypatch.setattr(os, "replace", killed)
    for left in (0, 1, 2, 3, 4):
        run.check_config()
        with contextlib.suppress(KeyboardInterrupt):
            run.begin(f"lr: {left}\n", resume=True)
            run.seal(4, [run.save(0, 4, {})])
    run.check_config()
    assert run.config.read_text() == "lr: 4\n" and run.sealed_step(1) == 4


def test_numpy_s_numbers_can_be_loaded(run: RunDirectory) -> None:
    state = {"a": np.float64(1.5), "b": [np.int64(2), (np.bool_(True), "x")], "c": torch.ones(2)}
    run.seal(1, [run.save(0, 1, state)])
    loaded = run.load(0, 1)
    assert loaded["a"] == 1.5 and loaded["b"] == [2, (True, "x")] and torch.equal(loaded["c"], torch.ones(2))


def test_a_killed_process_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    """SIGKILL at any moment; the resumed run has every line once."""
    prefixes = ("PMI", "OMPI", "PRTE", "SLURM", "HYDI", "HYDRA")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    command = [sys.executable, "-m", "mpilsgd.cli", "train", "--eval_every", "3 steps", "--threads", "1"]
    argv = ["--checkpoint_every", "4 steps", "--epochs", "100", "--output", str(tmp_path / "run")]
    with subprocess.Popen([*command, *argv], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [line for line, _ in zip(process.stdout, range(25), strict=False)]
        process.kill()
    assert len(told) == 25, told
    run = RunDirectory(tmp_path / "run")
    step = run.sealed_step(1)
    assert step is not None and step >= 60
    last = max(step, 3 * (len(lines(run)) - 1)) + 12
    resume = [*command[:4], "--resume", str(run.path), "--steps", str(last)]
    done = subprocess.run(resume, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = [line["step"] for line in lines(run)]
    assert steps == sorted({*range(3, last + 1, 3), last})
    assert f"resumed at step {step}" in done.stdout and (run.path / "summary.json").exists()
