"""Mixed precision: forward pass and loss in half types where that is safe, and a scale for the gradients of fp16."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How a gradient is computed: as the parameters are, or under torch.autocast.

    fp16: the loss is multiplied by a scale, so that small gradients are not lost, and the gradient is divided by it
    before anything else sees it. Each rank has a scale of its own. Where a gradient is not finite the scale was too
    large: the gradient is dropped, as a parameter's that has none. The method's step() is called all the same, so its
    clock goes on, its exchanges are held, and no rank waits for another in vain; only the worker's own optimizer does
    nothing. In a mean of gradients (AllreduceSGD) this worker's counts as 0.

    Args:
        amp: None, "bf16" or "fp16".
        optimizer: whose parameters have the gradients.
    """

    def __init__(self, amp: str | None, device: torch.device, optimizer: torch.optim.Optimizer):
        self._amp, self._device = amp, device
        self._gradients = _Gradients(optimizer)
        scales = amp == "fp16"
        self._scaler: Any = torch.amp.GradScaler(device.type) if scales else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around forward pass and loss."""
        return autocast(self._amp, self._device)

    def backward(self, loss: torch.Tensor) -> None:
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def settle(self) -> bool:
        """Makes the gradient what it is without a scale; whether it was finite, else there is none afterwards.

        With fp16 on a GPU this waits for the gradient, as torch's own GradScaler.step does.
        """
        if self._scaler is None:
            return True
        finite = bool(self._scaler.step(self._gradients))
        self._scaler.update()
        if not finite:
            for group in self._gradients.param_groups:
                for p in group["params"]:
                    p.grad = None
        return finite

    def state(self) -> dict[str, Any] | None:
        return None if self._scaler is None else self._scaler.state_dict()

    def load(self, state: dict[str, Any] | None) -> None:
        """What `state` gave."""
        if self._scaler is not None and state is not None:
            self._scaler.load_state_dict(state)


class _Gradients:
    """What a GradScaler is given as an optimizer: its step only tells that the gradient is finite."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def step(self) -> bool:
        return True


def autocast(amp: str | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if amp is None else torch.autocast(device.type, dtype=DTYPES[amp])


def unfit(amp: str | None, device: torch.device, model: torch.nn.Module) -> str | None:
    """Why this rank cannot compute so."""
    if amp == "bf16" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            return f"amp=bf16: needs a GPU of compute capability 8.0; {name} has {major}.{minor}: take fp16"
    if amp == "fp16" and not hasattr(torch.amp, "GradScaler"):
        return f"amp=fp16: needs torch 2.3 or newer, this is {torch.__version__}"
    if amp == "fp16":
        halves = [name for name, p in model.named_parameters() if p.dtype == torch.float16]
        if halves:
            return f"amp=fp16: is for parameters in full precision; {halves[0]} is float16"
    return None
