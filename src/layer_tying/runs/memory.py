"""Memory of a run: parameters, gradients and optimizer state (counted), the peak (measured)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from layer_tying.core.distributed import held_here

MMAP_THRESHOLD, LARGE = -3, 2**21  # of mallopt; bytes


@dataclass(frozen=True)
class ModelState:
    """The memory of a model in training, each distinct tensor counted once.

    Bytes are those that this process holds: of sharded weights, its part.

    Attributes:
        num_trainable: number of trainable parameters, of all processes together.
        parameter_bytes: all parameters, trainable or not.
        gradient_bytes: the gradients of a step, one for each trainable parameter.
        optimizer_state_bytes: what the optimizer keeps for them.
    """

    num_trainable: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_state_bytes: int

    @property
    def total_bytes(self) -> int:
        """Parameters, gradients and optimizer state together."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_state_bytes


def model_state(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> ModelState:
    """Count what a model and its optimizers hold."""
    parameters = list(model.parameters())  # each shared one once
    trainable = [p for p in parameters if p.requires_grad]
    optimizer_state = [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return ModelState(
        num_trainable=sum(p.numel() for p in trainable),
        parameter_bytes=_bytes(parameters),
        gradient_bytes=_bytes(trainable),
        optimizer_state_bytes=_bytes(optimizer_state),
    )


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(held_here(t).nbytes for t in tensors)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: allocated on a CUDA device, resident in RAM elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where getrusage also counts the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if sys.platform == "win32":
        return 0  # unknown
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Have large tensors in RAM given back to the system when they are freed, on Linux.

    By default, glibc learns to keep freed blocks of up to 32 MiB on its heap: the weights and
    gradients of a layer that is tied would go on counting as in use, in pieces that fit nothing
    else. It is a setting of the whole process, so it is the command that calls this.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # of another C library
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)
