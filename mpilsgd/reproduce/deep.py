"""The figures that train deep networks on whole data sets: what one is, and how it is reproduced.

`--passes N` trains them under a virtual clock, each worker for the steps of N passes. Without it, and where the data
are ImageNet's, a row names the job of MPI that is the first of the figure's trainings. Rates are from the papers'
lists, and not searched. The seconds that the clock gives to a step, and the network, stand in the trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpilsgd.reproduce import datasets
from mpilsgd.reproduce.curves import Check
from mpilsgd.reproduce.drawing import training_curves
from mpilsgd.reproduce.judge import NOT_RUN, Row, larger, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result
from mpilsgd.reproduce.training import Found, LeftOut, Training, train
from mpilsgd.train.judged import ERROR, Figure

CNN7 = "--model cnn7 --data cifar10 --batch_size 128 --weight_decay 0.0001"
ELASTIC = "--method EASGD --asynchronous true --center_rate 0.9"  # the thesis' EASGD
IMAGENET = 1_281_167  # images


@dataclass(frozen=True)
class Deep:
    """One figure: what its text says of the curves, and how that is checked (or, as a text, why it is not)."""

    name: str
    title: str
    says: Sequence[tuple[str, str, Check | str]]  # quantity, the paper's, the check
    trainings: Sequence[Training]
    data: str = "cifar10"
    lacking: str = ""  # what is not here
    figure: Figure = ERROR

    def entry(self, prefix: str, paper: str) -> Reproduction:
        """It as one of the reproductions."""
        shown = f"{paper}, {self.name.replace('fig', 'Fig. ').replace('table', 'Table ')}"
        return Reproduction(f"{prefix}-{self.name}", shown, self.title, self.run)

    def run(self, options: Options) -> Result:
        """Trains and judges; without `passes`, or where something is lacking, names the job."""
        if options.passes is None or self.lacking:
            return self._named(options)
        trainings = [one for one in self.trainings if one.workers <= (options.workers or one.workers)]
        datasets.present(self.data, options.data_dir)
        found = train(trainings, options)
        found.left_out = [one.label for one in self.trainings if one not in trainings]
        shortened = f"{options.passes:g} passes a worker, one learning rate each"
        if found.left_out:
            shortened += f", trainings of more workers than {options.workers} left out"
        if options.amp:
            shortened += f", in {options.amp}"
        rows = [_judged(what, paper, check, found, shortened) for what, paper, check in self.says]
        draw = (lambda figure: training_curves(figure, found, self.figure)) if found else None
        return Result(rows, draw, shortened, (12.0, 4.4))

    def _named(self, options: Options) -> Result:
        job = self.trainings[0].job(options.passes or 10.0, options.data_dir)
        more = len(self.trainings) - 1
        how = f"not here: {self.lacking}" if self.lacking else "--passes N trains them under a virtual clock"
        why = job + (f"; and {more} more" if more else "") + f" ({how})"
        whys = [why, *["the same"] * (len(self.says) - 1)]
        return Result(
            [larger(what, paper, why) for (what, paper, _), why in zip(self.says, whys, strict=True)]
        )


def _judged(what: str, paper: str, check: Check | str, found: Found, shortened: str) -> Row:
    try:
        told, holds = ("-", check) if isinstance(check, str) else check(found)
    except LeftOut as missing:
        told, holds = "-", str(missing)
    if isinstance(holds, str):
        return Row(what, paper, told, NOT_RUN, holds)
    return stated(what, paper, told, holds, why=shortened)


def nodes(workers: int) -> int:
    """Of four GPUs."""
    return max(1, workers // 4)
