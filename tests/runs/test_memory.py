"""What a run holds: counted by hand, each distinct tensor once; the peak is this process's own."""

import json
import subprocess
import sys

import psutil
import pytest
import torch
from torch import nn

from layer_tying.runs.memory import ModelState, model_state, peak_bytes

CPU = torch.device("cpu")


class Shared(nn.Module):
    """Two uses of one 3x4 matrix, a frozen vector of 5, a half-precision vector of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 3, bias=False)
        self.other = nn.Linear(4, 3, bias=False)
        self.other.weight = self.one.weight
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.small = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("buffer", torch.ones(100))


def test_shared_parameters_count_once_and_frozen_ones_have_no_gradient():
    state = model_state(Shared())
    assert state == ModelState(
        num_trainable=12 + 2,
        parameter_bytes=4 * 12 + 4 * 5 + 2 * 2,
        gradient_bytes=4 * 12 + 2 * 2,
        optimizer_state_bytes=0,
    )
    assert state.total_bytes == 72 + 52


def test_moments_are_what_the_optimizers_hold_now():
    model = Shared()
    adam = torch.optim.AdamW([model.one.weight])
    momentum = torch.optim.SGD([model.small], momentum=0.9)
    assert (
        model_state(model, [adam, momentum]).optimizer_state_bytes == 0
    )  # none before the first step
    (model.other(torch.ones(1, 4)).sum() + model.small.sum()).backward()
    adam.step()
    momentum.step()
    two_of_adam = 2 * 4 * 12 + 4  # and its count of steps
    assert model_state(model, [adam]).optimizer_state_bytes == two_of_adam
    assert model_state(model, [adam, momentum]).optimizer_state_bytes == two_of_adam + 2 * 2
    assert model_state(model, [adam]).gradient_bytes == model_state(model).gradient_bytes


def test_the_peak_stays_when_memory_goes():
    before = peak_bytes(CPU)
    size = before + (64 << 20) - _resident()
    ballast = torch.ones(size, dtype=torch.uint8)
    peak = peak_bytes(CPU)
    assert peak >= before + (60 << 20)
    del ballast
    assert peak_bytes(CPU) >= peak - (1 << 20)


def _resident() -> int:
    return psutil.Process().memory_info().rss


def test_a_process_does_not_report_the_memory_of_the_one_that_started_it():
    ballast = torch.ones((600 << 20), dtype=torch.uint8)
    code = "import json, torch; from layer_tying.runs.memory import peak_bytes\n"
    code += "print(json.dumps(peak_bytes(torch.device('cpu'))))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 50 << 20 < json.loads(result.stdout) < len(ballast)


FREES_BETWEEN_SMALL_BLOCKS = """
import psutil, torch
from layer_tying.runs.memory import return_freed_memory

return_freed_memory()
once = torch.ones(31 * 2**20, dtype=torch.uint8)  # from which glibc would learn
del once
before = psutil.Process().memory_info().rss
large, small = [], []
for _ in range(10):
    large.append(torch.ones(20 * 2**20, dtype=torch.uint8))
    small.append(bytes(200_000))
held = psutil.Process().memory_info().rss - before
large.clear()
print(held, psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_large_tensors_are_given_back_when_freed_wherever_they_lie():
    command = [sys.executable, "-c", FREES_BETWEEN_SMALL_BLOCKS]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    held, left = map(int, ended.stdout.split())
    assert held > 200e6
    assert left < 20e6
