"""`mpilsgd export`: the trained model of a run as one file, for plain torch and for whoever reads safetensors."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpilsgd.train import manifest, saved
from mpilsgd.train.callables import InputError
from mpilsgd.train.files import replace
from mpilsgd.train.judged import figure_of
from mpilsgd.train.plain import first_line
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.run_reader import Run, RunError, read_runs

_TORCH, _SAFETENSORS = (".pt", ".pth"), (".safetensors",)


class Export(NamedTuple):
    """What is written: a state_dict, and in words what it is."""

    state: dict[str, torch.Tensor]
    what: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mpilsgd export`."""
    parser.description = (
        "Writes the trained model of a run as one file: the centre, as it was at the end of the run, or at its last "
        "checkpoint if it did not end. Needs neither MPI nor the model's code: what is written is a state_dict."
    )
    parser.add_argument("run", metavar="RUN", help="run directory (what `mpilsgd train --output` wrote)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--best",
        action="store_true",
        help="the centre of the evaluation with the lowest test error (or loss)",
    )
    which.add_argument(
        "--worker",
        metavar="best|RANK",
        help="one worker's own model; best: of the lowest test error, in a run that did not end of the lowest "
        "training loss",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="model.pt for torch.load, or model.safetensors (pip install 'mpilsgd[safetensors]')",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the file and says how it is loaded; exit status 2 with one line where that cannot be."""
    path = Path(args.output)
    try:
        _check(path)
        (found,) = read_runs([args.run])
        export = chosen(found, args.best, args.worker)
        _write(export, path)
    except (RunError, InputError) as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or path}: {error.strerror or error}"
    else:
        count = sum(tensor.numel() for tensor in export.state.values())
        print(f"{path}: {export.what}, {len(export.state)} tensors, {count} numbers")
        print(f"load it:  {_loading(path)}")
        return 0
    print(f"mpilsgd export: {reason}", file=sys.stderr)
    return 2


def chosen(found: Run, best: bool = False, worker: str | None = None) -> Export:
    """What is asked for of a run.

    Raises:
        InputError: it is not there, or cannot be had; the text says why.
    """
    directory = RunDirectory(found.path)
    if best:
        return _best(directory)
    if worker is not None:
        return _worker(found, directory, worker)
    center, step = directory.checkpoint / "center.pt", _sealed(directory)
    ended = found.total("steps")
    if center.exists() and (step is None or step <= ended):
        return Export(_read(center), f"the centre at the end, step {ended:g}")
    if step is None:
        raise InputError(f"{found.path}: holds neither a centre nor a finished checkpoint")
    ranks = len(manifest.read(directory.manifest).files)
    try:
        state = saved.center_of(lambda rank: directory.load(rank, step), ranks)
    except InputError as error:
        raise InputError(f"{found.path}: {error}") from None
    return Export(state, f"the centre of the checkpoint at step {step} (the run did not end)")


def _best(directory: RunDirectory) -> Export:
    kept = _read(directory.checkpoint / "best.pt")
    figure = figure_of([kept])
    told = f"{figure.name} {figure.text(kept.get(figure.key))}"
    return Export(kept["model"], f"the best centre, step {kept['step']:g}, {told}")


def _worker(found: Run, directory: RunDirectory, which: str) -> Export:
    step = _sealed(directory)
    if step is None:
        raise InputError(f"{found.path}: holds no finished checkpoint, in which the workers' models lie")
    ranks = len(manifest.read(directory.manifest).files)
    told, why = found.summary.get("best_worker"), ""
    measured = told.get("rank") if isinstance(told, dict) and found.total("steps") >= step else None
    if which != "best":
        if not which.isdecimal() or int(which) >= ranks:
            raise InputError(f"--worker must be best or a rank from 0 to {ranks - 1}, not {which!r}")
        rank = int(which)
    elif measured is not None:
        rank, why = int(measured), ", which had the best test figures"
    else:
        losses = [_training_loss(directory.load(rank, step)) for rank in range(ranks)]
        rank, why = min(range(ranks), key=losses.__getitem__), ", which had the lowest training loss"
    state = saved.worker_of(directory.load(rank, step))
    return Export(state, f"the model of rank {rank} at step {step}{why}")


def _training_loss(state: dict[str, Any]) -> float:
    """The mean since the last evaluation, or of the last batch; infinite for a rank that does not train."""
    progress = state["progress"]
    count, last = progress["loss_count"], progress["last_loss"] if progress["step"] else math.inf
    loss = progress["loss_sum"] / count if count else last
    return loss if math.isfinite(loss) else math.inf


def _sealed(directory: RunDirectory) -> int | None:
    return manifest.read(directory.manifest).step if directory.manifest.exists() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is none yet: it is written with the first evaluation") from None
    except Exception as error:  # of torch and of what it uses
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no state_dict")
    return found


def _check(path: Path) -> None:
    """Before anything is computed."""
    if path.suffix not in (*_TORCH, *_SAFETENSORS):
        raise InputError(f"{path}: its name must end in {', '.join((*_TORCH, *_SAFETENSORS))}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.absolute().parent}: there is no such folder")
    if path.suffix in _SAFETENSORS:
        try:
            import safetensors.torch  # noqa: F401
        except ImportError:
            raise InputError(
                "safetensors is not installed: pip install 'mpilsgd[safetensors]', or write model.pt"
            ) from None


def _write(export: Export, path: Path) -> None:
    if path.suffix in _TORCH:
        replace(path, lambda file: torch.save(export.state, file))
        return
    from safetensors.torch import save

    strange = [name for name, value in export.state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise InputError(f"{', '.join(strange)}: no tensor, which safetensors does not take; write model.pt")
    # it takes no two names for one memory and no gaps: each gets its own, so that load_state_dict finds all names
    plain = {name: value.contiguous().clone() for name, value in export.state.items()}
    replace(path, lambda file: file.write(save(plain, {"format": "pt", "mpilsgd": export.what})))


def _loading(path: Path) -> str:
    if path.suffix in _TORCH:
        return f"model.load_state_dict(torch.load({str(path)!r}))"
    return f"model.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
