"""The methods under a virtual clock: what a run would give on a cluster, and the time that it would take there.

`simulate` runs the real methods; `many` steps thousands of workers of a small problem at once, without a clock.
"""

from mpilsgd.comm import clock
from mpilsgd.simulation.compute import lognormal, stragglers
from mpilsgd.simulation.many import Crowd, many
from mpilsgd.simulation.network import Network
from mpilsgd.simulation.objectives import DoubleWell, Quadratic, SmallNet
from mpilsgd.simulation.running import Simulated, simulate
from mpilsgd.simulation.virtual import Died

__all__ = [
    "Crowd",
    "Died",
    "DoubleWell",
    "Network",
    "Quadratic",
    "Simulated",
    "SmallNet",
    "clock",
    "lognormal",
    "many",
    "simulate",
    "stragglers",
]
