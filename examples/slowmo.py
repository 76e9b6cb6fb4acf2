"""SlowMo: local SGD whose average is moved with a slow momentum."""

from mpilsgd.exchange import Every, Method, number, whole


class SlowMo(Method):
    """SlowMo around any optimizer, after every tau of its steps. gamma: its learning rate; x: the mean of the workers.

        u <- beta u + (c - x) / gamma
        c <- c - alpha gamma u;    x^i <- c

    Source: SlowMo (arXiv:1910.00643), Algorithm 1. With beta = 0, alpha = 1 it is local SGD.
    """

    slow_momentum: float = number(0.7, 0, 1, help="beta: momentum of the mean")
    slow_lr: float = number(1.0, 0, above=True, help="alpha: learning rate of the mean")
    period: int = whole(12, help="tau: steps between averages")

    def declare(self):
        self.c = self.vector("c", per="all", start="mean")
        self.u = self.vector("u", per="all")
        if any("lr" not in group for group in self.param_groups):
            yield "SlowMo needs an optimizer with a learning rate lr"

    def clock_of(self):
        return Every(self.period)

    def start(self, r):
        r.take(self.c)

    def measure(self):
        return self.param_groups[0]["lr"]

    def exchange(self, r):
        gamma = r.came.score[0]  # the first worker's: c and u must be the same everywhere
        r.mean()
        if not gamma:
            return
        for c, u, x in r.each(self.c, self.u, self.x):
            u.mul_(self.slow_momentum).add_(c - x, alpha=1 / gamma)
            c.sub_(u, alpha=self.slow_lr * gamma)
        r.copy(self.c)

    def shown_centre(self):
        return self.c
