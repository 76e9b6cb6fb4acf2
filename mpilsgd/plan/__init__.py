"""What a method's exchanges cost on a cluster, before anything runs there."""

from mpilsgd.plan.costs import Cost, Sizes, costs
from mpilsgd.plan.forecast import Forecast, forecast, least_factor
from mpilsgd.plan.machine import Machine, measure
from mpilsgd.plan.trial import Seen, look

__all__ = [
    "Cost",
    "Forecast",
    "Machine",
    "Seen",
    "Sizes",
    "costs",
    "forecast",
    "least_factor",
    "look",
    "measure",
]
