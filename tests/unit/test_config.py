"""Options, files and the command line: what is understood, and that all mistakes are told at once."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpilsgd.cli import main
from mpilsgd.train.command_line import ConfigError, parse
from mpilsgd.train.config import FIELDS, Config, default_output, parse_every
from mpilsgd.train.options import keyword_arguments, method_options, methods, names_of, required
from mpilsgd.train.run_directory import RunDirectory


def write(folder: Path, text: str, name: str = "c.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def refused(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return caught.value.mistakes


def test_defaults_train_digits() -> None:
    config = parse([])
    assert (config.data, config.model, config.method, config.epochs, config.steps) == (
        "digits",
        "mlp",
        "LSGD",
        20,
        None,
    )
    assert config.method_options == {}


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "lr: 0.5\nmethod: easgd\nperiod: 4\nlr_drops: [3, 5]\n")
    config = parse([file, "--lr", "0.25", "--center_rate=0.5"])
    assert (config.lr, config.method, config.lr_drops) == (0.25, "EASGD", [3.0, 5.0])
    assert config.method_options == {"period": 4, "center_rate": 0.5}
    assert parse(["--config", file]).lr == 0.5


def test_another_method_than_the_file_s(tmp_path: Path) -> None:
    file = write(tmp_path, "method: LSGD\npull: 0.1\nperiod: 8\n")
    assert parse([file, "--method", "EASGD"]).method_options == {"period": 8}
    assert parse([file, "--method", "AllreduceSGD"]).method_options == {}
    assert parse([file, "--method", "lsgd"]).method_options == {"pull": 0.1, "period": 8}
    assert "pull: not an option of EASGD" in refused(file, "--method", "EASGD", "--pull", "0.2")[0]
    file = write(tmp_path, "method: EASGD\npull: 0.1\n")
    assert "pull: not an option of LocalSGD" in refused(file, "--method", "LocalSGD")[0]


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml")), ids=lambda f: f.stem
)
def test_the_job_files_are_understood(file: Path) -> None:
    for method in methods():
        needed = [f"--{key}=0.5" for key in required(method, method_options(FIELDS))]
        assert parse([str(file), "--method", method, *needed]).method == method


def test_several_files_the_later_counts(tmp_path: Path) -> None:
    one, two = write(tmp_path, "lr: 0.5\nseed: 7\n", "1.yaml"), write(tmp_path, "lr: 0.25\n", "2.yaml")
    config = parse([one, two])
    assert (config.lr, config.seed) == (0.25, 7)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--data-dir", "x"], "data_dir", "x"),
        (["--overwrite"], "overwrite", True),
        (["--overwrite", "--lr", "0.5"], "overwrite", True),
        (["--nesterov", "false"], "nesterov", False),
        (["--lr_drops", "30,40"], "lr_drops", [30.0, 40.0]),
        (["--lr_drops=[30]"], "lr_drops", [30.0]),
        (["--running_average", "running"], "running_average", "running"),
        (["--running_average", "0.01"], "running_average", 0.01),
        (["--eval_every", "200 steps"], "eval_every", "200 steps"),
        (["--eval_every", "0.5"], "eval_every", 0.5),
        (["--method", "local-sgd"], "method", "LocalSGD"),
        (["--method", "all_reduce_sgd"], "method", "AllreduceSGD"),
        (["--optimizer", "adamw"], "optimizer", "AdamW"),
        (["--model", "ResNet-20"], "model", "resnet20"),
        (["--data", "FashionMNIST"], "data", "fashion-mnist"),
        (["--steps", "7"], "epochs", None),
        (["--model", "torch.nn:Linear"], "model", "torch.nn:Linear"),
        (["--momentum", "-0.5", "--optimizer", "MSGD"], "momentum", -0.5),
        (["--amp", "bf16"], "amp", "bf16"),
        (["--amp", "null"], "amp", None),
        (["--channels-last", "--compile"], "channels_last", True),
        (["--compile", "--lr", "0.5"], "compile", True),
    ],
)
def test_ways_to_write_an_option(argv: list[str], name: str, value: object) -> None:
    assert getattr(parse(argv), name) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("[1,10,100]", [1, 10, 100]), ("null", None), ("math:isfinite", "math:isfinite")],
)
def test_period_may_be_anything_that_local_sgd_takes(text: str, value: object) -> None:
    config = parse(["--method", "LocalSGD", "--period", text])
    assert config.method_options == {"period": value}


def test_half_precision_that_does_not_go_together() -> None:
    assert refused("--amp", "fp8") == ["amp: expected one of bf16, fp16 or null, found 'fp8'"]
    norm = ["--method", "LocalSGD", "--until_grad_norm", "2", "--amp"]
    (told,) = refused(*norm, "fp16")
    assert told.startswith("amp, until_grad_norm: ") and told.endswith("take bf16")
    assert parse([*norm, "bf16"]).amp == "bf16"


def test_an_option_that_is_left_out_keeps_the_class_default() -> None:
    assert "pull" not in parse([]).method_options
    assert parse(["--global_pull", "null"]).method_options == {"global_pull": None}


def test_every_constructor_argument_is_an_option() -> None:
    options = method_options()
    assert set(methods()) >= {"AllreduceSGD", "LocalSGD", "LSGD", "EASGD"}
    assert {"pull", "global_pull", "period", "global_period", "loss_window", "when", "sequential"} <= set(
        options
    )
    assert {
        "center_rate",
        "moving_rate",
        "form",
        "average",
        "a",
        "until_grad_norm",
        "init",
        "buffers",
    } <= set(options)
    assert not {"optimizer", "topology", "model", "self", "score"} & set(options)
    assert set(options["period"].defaults) == {"DiLoCo", "LocalSGD", "LSGD", "EASGD", "Downpour", "EASGDTree"}
    assert set(options["asynchronous"].defaults) == {"LSGD", "EASGD", "DiLoCo", "Downpour", "ADMM"}
    assert {"overlap", "order", "record", "replay", "rho", "momentum"} <= set(options)
    assert "method_momentum" in method_options(["momentum"])
    assert not [name for name, option in options.items() if not option.help]


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        (["--asynchronous", "wait-free"], "wait-free"),
        (["--asynchronous", "true"], True),
        (["--asynchronous=false"], False),
        (["--asynchronous"], True),
        (["--asynchronous", "--lr", "0.5"], True),
        (["--method", "EASGD", "--asynchronous"], True),
    ],
)
def test_ways_to_be_asynchronous(argv: list[str], given: object, tmp_path: Path) -> None:
    assert parse(argv).method_options["asynchronous"] is given or given == "wait-free"
    assert parse(argv).method_options == {"asynchronous": given}
    assert parse([write(tmp_path, parse(argv).text())]).method_options["asynchronous"] == given


def test_downpour_s_momentum_is_not_the_optimizer_s() -> None:
    config = parse(["--method", "Downpour", "--momentum", "0.9", "--method_momentum", "0.5"])
    assert config.momentum == 0.9
    options = method_options(FIELDS)
    assert keyword_arguments(config.method_options, options) == {"momentum": 0.5}


@pytest.mark.parametrize(("text", "value"), [("running", "running"), ("0.25", 0.25), ("null", None)])
def test_downpour_s_average(text: str, value: object) -> None:
    config = parse(["--method", "Downpour", "--average", text])
    assert config.method_options == {"average": value}


def test_what_a_method_cannot_do_without() -> None:
    assert any(part.startswith("rho: ADMM needs it: penalty") for part in refused("--method", "ADMM"))
    assert parse(["--method", "ADMM", "--rho", "2"]).method_options == {"rho": 2.0}


def test_a_file_for_the_recording_may_have_a_colon() -> None:
    config = parse(["--asynchronous", "--record", "x:y"])
    assert keyword_arguments(config.method_options, method_options(FIELDS))["record"] == "x:y"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("slow: '2:3'", "2:3"),
        ("slow: ['2:3', '0:1.5']", "0:1.5,2:3"),
        ("slow: random:2", "random:2"),
        ("slow: null", None),
    ],
)
def test_slow_ranks_in_a_file(line: str, text: str | None, tmp_path: Path) -> None:
    config = parse([write(tmp_path, line)])
    assert config.slow == text
    assert parse([write(tmp_path, config.text(), "2.yaml")]).slow == text


def test_slow_ranks_on_the_command_line(tmp_path: Path) -> None:
    assert parse(["--slow", "2:3"]).slow == "2:3"
    assert parse(["--slow", "3:2.0,random:1.5"]).slow == "3:2,random:1.5"
    assert "slow: must be RANK:FACTOR" in refused("--slow", "2:0.5")[0]
    assert "put it in quotes" in refused(write(tmp_path, "slow: 2:3"))[0]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "pul: 0.1\nbatch_size: many\n")
    mistakes = "\n".join(
        refused(
            *(file, "--lr", "x", "--model", "lenett", "--data", "mnits", "--seed", "-1", "--threads", "0"),
            *(
                "--epochs",
                "3",
                "--steps",
                "4",
                "--optimizer",
                "nowhere:thing",
                "--lr_drops",
                "0",
                "--nope",
                "1",
            ),
            *(
                "--eval_every",
                "often",
                "--checkpoint_every",
                "0",
                "--method",
                "LocalSGD",
                "--pull",
                "0.1",
                "stray",
            ),
        )
    )
    for part in (
        "pul: unknown option; did you mean pull?",
        "batch_size: expected a whole number, found 'many'",
        "lr: expected a number, found 'x'",
        "model: 'lenett' is not one of mlp, lenet, cnn7, resnet20",
        "did you mean lenet?",
        "data: 'mnits' is not one of",
        "seed: must be",
        "threads: must be a whole number of at least 1, not 0",
        "epochs, steps: give one of them",
        "optimizer: cannot import 'nowhere:thing'",
        "lr_drops: must be",
        "nope: unknown option",
        "eval_every: must be a number of epochs above 0 or 'N steps', not 'often'",
        "checkpoint_every: must be",
        "pull: not an option of LocalSGD, which has",
        "stray",
    ):
        assert part in mistakes, part
    assert file in mistakes


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--method", "SGDD"], "method: 'SGDD' is not one of ADMM, AllreduceSGD"),
        (["--lr", "0"], "lr: must be above 0"),
        (["--lr", "inf"], "lr:"),
        (["--momentum", "1"], "momentum: must be in [0, 1)"),
        (["--weight_decay", "-1"], "weight_decay: must be at least 0"),
        (["--lr_gamma", "-1"], "lr_gamma: must be at least 0"),
        (["--lr_drop_factor", "2"], "lr_drop_factor: must be in (0, 1]"),
        (["--running_average", "2"], "running_average: must be running or in (0, 1]"),
        (["--running_average", "often"], "running_average: expected"),
        (["--group_size", "0"], "group_size: must be a whole number"),
        (["--sampling", "all"], "sampling: expected one of partition, shuffle, replacement"),
        (["--optimizer", "Adam", "--momentum", "0.9"], "Adam has neither"),
        (["--nesterov"], "nesterov: needs a momentum above 0"),
        (["--lr"], "lr: needs a value"),
        (["--epochs", "1.5"], "epochs: expected a whole number"),
        (["--model", "json:nothing"], "cannot import 'json:nothing': AttributeError"),
        (["--model", "math:pi"], "not something to call"),
        (["--pull", "much"], "pull: expected a number, found 'much'"),
        (["no-such-file.yaml"], "no-such-file.yaml: cannot be read: No such file"),
    ],
)
def test_mistakes(argv: list[str], part: str) -> None:
    assert any(part in mistake for mistake in refused(*argv)), refused(*argv)


@pytest.mark.parametrize("text", ["lr: [", "just words", "- a\n- list"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    assert any(file in mistake for mistake in refused(file))


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parse([write(tmp_path, "")]) == parse([])


def test_print_config_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--method",
        "EASGD",
        "--period",
        "7",
        "--lr_drops",
        "3,4",
        "--eval_every",
        "5 steps",
        "--steps",
        "9",
    ]
    with pytest.raises(SystemExit) as ended:
        parse([*argv, "--print_config"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    config = parse([write(tmp_path, text)])
    assert config.text() == parse(argv).text() == text
    assert config.set_options == parse(argv).set_options == {"period": 7}


@pytest.mark.parametrize("method", methods())
def test_a_configuration_holds_every_option_of_its_method(tmp_path: Path, method: str) -> None:
    options = method_options(FIELDS)
    config = parse(["--method", method, *(f"--{key}=0.5" for key in required(method, options))])
    again = parse([write(tmp_path, config.text())])
    assert set(again.method_options) == set(names_of(method, options))
    assert again.text() == config.text() and again.set_options == config.set_options
    assert (
        keyword_arguments(again.method_options, options).keys()
        >= keyword_arguments(config.method_options, options).keys()
    )


def test_help_is_grouped_and_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for part in (
        "Task:",
        "Method:",
        "Options of the method:",
        "Optimizer of each worker:",
        "Run:",
        "--lr X",
        "[0.1]",
        "[has to be given]",
        "--slow RANK:X,..",
        "--asynchronous true|false|wait-free",
    ):
        assert part in text
    for option in [*vars(Config()), *method_options()]:
        assert f"--{option}" in text or option == "method_options"
    assert "type:" not in text and "Union" not in text


def test_help_of_a_method_has_its_options_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--method", "lsgd", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    own = method_options(FIELDS, "LSGD")
    assert all(f"--{option} " in text for option in own) and "DiLoCo:" not in text and "LSGD: " not in text
    assert not [option for option in method_options(FIELDS) if option not in own and f"--{option} " in text]


def test_resume_takes_the_run_s_configuration(tmp_path: Path) -> None:
    text = parse(["--method", "EASGD", "--epochs", "3", "--lr", "0.5"]).text()
    RunDirectory(tmp_path).claim(text)
    config = parse(["--resume", str(tmp_path), "--epochs", "5"])
    assert (config.method, config.lr, config.epochs, config.output) == ("EASGD", 0.5, 5, str(tmp_path))
    config = parse(["--resume", str(tmp_path), "--steps", "50"])
    assert (config.epochs, config.steps) == (None, 50)
    assert "lr: cannot change when a run is resumed" in refused("--resume", str(tmp_path), "--lr", "1")[0]
    assert "amp: cannot change" in refused("--resume", str(tmp_path), "--amp", "bf16")[0]
    assert parse(["--resume", str(tmp_path), "--compile"]).compile
    assert "holds no run to resume" in refused("--resume", str(tmp_path / "nowhere"))[0]
    write(tmp_path, text[: len(text) // 2], "config.yaml")
    (told,) = refused("--resume", str(tmp_path))
    assert f"{tmp_path}/config.yaml: is not the configuration" in told


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        (1, (1.0, "epochs")),
        ("0.5", (0.5, "epochs")),
        ("2 epochs", (2.0, "epochs")),
        ("200 steps", (200.0, "steps")),
    ],
)
def test_intervals(text: object, interval: tuple[float, str]) -> None:
    assert parse_every(text) == interval  # type: ignore[arg-type]
    assert parse_every(None) is None


@pytest.mark.parametrize("text", ["0", "-1", "1.5 steps", "soon", math.nan, "", "1..5"])
def test_wrong_intervals(text: object) -> None:
    with pytest.raises(ValueError, match="must be a number of epochs"):
        parse_every(text)  # type: ignore[arg-type]


def test_default_output_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_output(Config()) == "runs/lsgd-mlp-digits"
    (tmp_path / "runs/lsgd-mlp-digits").mkdir(parents=True)
    assert default_output(Config()) == "runs/lsgd-mlp-digits-2"
    assert default_output(Config(model="my.models:net")) == "runs/lsgd-my.models_net-digits"


def test_the_command_line_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"\n  {command} " in text for command in ("train", "report", "info", "bench"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("mpilsgd ")


@pytest.mark.parametrize("argv", [[], ["tarin"]])
def test_no_such_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "train" in capsys.readouterr().err


def test_only_the_first_rank_complains() -> None:
    for rank, told in (("0", True), ("1", False)):
        done = subprocess.run(
            [sys.executable, "-m", "mpilsgd.cli", "tarin"],
            env={**clean_environment(), "SLURM_PROCID": rank},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert bool(done.stderr) == told


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    gone, pipe = os.pipe()
    os.close(gone)  # as `mpilsgd info | head` may leave it
    done = subprocess.run(
        [sys.executable, "-m", "mpilsgd.cli", "info"],
        env=clean_environment(),
        stdout=pipe,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(pipe)
    assert (done.returncode, done.stderr) == (1, "")


def clean_environment() -> dict[str, str]:
    """Without what a launcher has set."""
    prefixes = ("PMI", "OMPI", "PRTE", "SLURM", "MPI_", "HYDI", "HYDRA")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def test_every_line_of_the_jobs_readme_is_taken() -> None:
    text = (Path(__file__).parents[2] / "jobs" / "README.md").read_text()
    lines = re.findall(r"`mpirun -n \d+ mpilsgd train (--method [^`]*)`", text)
    assert len(lines) > 15
    assert {line.split()[1] for line in lines} == set(methods())
    for line in lines:
        config = parse(line.split())
        assert set(config.method_options) <= set(names_of(config.method, method_options(FIELDS))), line
