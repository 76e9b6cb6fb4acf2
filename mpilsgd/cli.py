"""The command line: `mpilsgd train`, `simulate`, `report`, `watch`, `export`, `info`, `bench`, `plan`, `reproduce`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

COMMANDS = {
    "train": "train a model on all ranks: mpiexec -n 4 mpilsgd train",
    "simulate": "the same without MPI, in the time that a cluster would take: mpilsgd simulate --workers 8",
    "report": "draw figures of one or several run directories",
    "watch": "follow a run in the terminal: curves, who leads, who waits",
    "export": "write the trained model of a run as one file",
    "info": "show MPI, ranks, shared memory, CUDA and the extension as they are here",
    "bench": "measure the kernels, or the exchange between ranks",
    "plan": "say what exchanges will cost on a cluster, and which periods keep them cheap",
    "reproduce": "redo the figures and tables of the papers, ours beside theirs",
}
_MODULES = {  # others: mpilsgd.train.COMMAND
    "train": "mpilsgd.train.job",
    "plan": "mpilsgd.plan.command",
    "reproduce": "mpilsgd.reproduce.command",
}
# What launchers call the rank, for messages that must appear once before MPI is there
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Commands are imported when they are asked for."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _told_once():
        command, rest = _command(arguments)
    module = importlib.import_module(_MODULES.get(command, f"mpilsgd.train.{command}"))
    try:
        return _run(command, module, rest)
    except ImportError as error:
        from mpilsgd.comm import NoMPI

        if not isinstance(error, NoMPI):
            raise
        with _told_once():
            if command == "train":
                _without_ranks(rest)
            print(f"mpilsgd {command}: error: {error}", file=sys.stderr)
        return 2


def _run(command: str, module: Any, rest: list[str]) -> int:
    if command in ("train", "simulate"):
        return int(module.main(rest))
    parser = argparse.ArgumentParser(prog=f"mpilsgd {command}")
    module.add_arguments(parser)
    with _told_once():
        parsed = parser.parse_args(rest)
    try:
        status = int(module.run(parsed))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; nor shall Python's own flush at the end complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    return status


def _without_ranks(rest: list[str]) -> None:
    """What `mpilsgd train` does without any: --help, --print_config."""
    from mpilsgd.train.command_line import ConfigError, parse

    with contextlib.suppress(ConfigError):
        parse(rest)


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mpilsgd",
        usage="mpilsgd [-h] [--version] COMMAND ...",
        description="Train PyTorch models on many MPI processes that talk rarely.",
        epilog=f"commands:\n{listed}\n\n`mpilsgd COMMAND --help` tells more. A first run: mpiexec -n 4 mpilsgd train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument(
        "command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of the commands below"
    )
    first = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    parsed = parser.parse_args(arguments[: first + 1])
    if parsed.version:
        from mpilsgd import __version__

        print(f"mpilsgd {__version__}")
        raise SystemExit(0)
    if parsed.command is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    return parsed.command, arguments[first + 1 :]


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Of many ranks that print the same help or complaint, only the first is heard."""
    names = (*_RANK_VARIABLES, *(["RANK"] if "TORCHELASTIC_RUN_ID" in os.environ else []))  # torchrun's
    rank = next((os.environ[name] for name in names if name in os.environ), "0")
    if rank == "0":
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
