"""The worker and the parts that a method is put together from: clocks, exchanges, vectors, fields."""

from mpilsgd.comm import thread_problem
from mpilsgd.exchange.adaptive import ROUND_COST, SHARE, Adaptive, AdaptiveTwo, pacing
from mpilsgd.exchange.base import follow, outer_step
from mpilsgd.exchange.clocks import Every, EverySo, TwoPeriods, UntilGradient
from mpilsgd.exchange.edges import Edges
from mpilsgd.exchange.in_turn import InTurn
from mpilsgd.exchange.method import Diverged, Method
from mpilsgd.exchange.metrics import Metrics
from mpilsgd.exchange.published import Published
from mpilsgd.exchange.rows import ROUND
from mpilsgd.exchange.together import Together
from mpilsgd.exchange.vectors import Vector
from mpilsgd.fields import (
    REQUIRED,
    Field,
    anything,
    choice,
    code,
    flag,
    number,
    number_problem,
    path,
    whole,
    whole_problem,
)
from mpilsgd.optimizers.wrapped import forget

__all__ = [
    "REQUIRED",
    "ROUND",
    "ROUND_COST",
    "SHARE",
    "Adaptive",
    "AdaptiveTwo",
    "Diverged",
    "Edges",
    "Every",
    "EverySo",
    "Field",
    "InTurn",
    "Method",
    "Metrics",
    "Published",
    "Together",
    "TwoPeriods",
    "UntilGradient",
    "Vector",
    "anything",
    "choice",
    "code",
    "flag",
    "follow",
    "forget",
    "number",
    "number_problem",
    "outer_step",
    "pacing",
    "path",
    "thread_problem",
    "whole",
    "whole_problem",
]
