"""A `torch.optim.Optimizer` around another one."""

from __future__ import annotations

from typing import Any

import torch


class Wrapper(torch.optim.Optimizer):
    """Shows the wrapped optimizer's parameter groups and state, so that schedulers work around either."""

    optimizer: torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults if hasattr(self, "optimizer") else {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the parameters lie in flat vectors already."""
        raise RuntimeError("give the wrapped optimizer all its parameter groups before wrapping it")
