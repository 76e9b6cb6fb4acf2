"""A worker's own optimizer: those of the papers, and what has to be known of any other."""

from mpilsgd.optimizers.msgd import MSGD
from mpilsgd.optimizers.running_average import RunningAverage

__all__ = ["MSGD", "RunningAverage"]
