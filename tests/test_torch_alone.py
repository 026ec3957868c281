"""The library needs torch and numpy; the command says what else it needs."""

import subprocess
import sys

BLOCKED = ("transformers", "accelerate", "safetensors", "tokenizers", "matplotlib", "tqdm")
BLOCKED += ("tabulate", "jinja2", "tyro", "filelock")
PREAMBLE = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))\n"
LOOP = """
import torch
from torch import nn
from layer_tying import DynamicTying, tie

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)

model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(Block() for _ in range(6))))
optimizer = torch.optim.AdamW(model.parameters())
tying = DynamicTying(model, optimizer, "mixture", residual_outputs=["inner"])
for _ in range(2):
    loss = model(torch.ones(2, 4)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    tying.step(loss)
print(tying.tying)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, check=False
    )


def test_a_loop_of_ones_own_needs_torch_and_numpy_only():
    ended = run(LOOP)
    assert ended.stdout.strip() == "0 1 0 1 0 1", ended.stderr


def test_the_command_says_in_one_line_what_is_not_installed():
    ended = run("from layer_tying.cli import main; sys.exit(main(['train']))")
    assert ended.returncode == 2
    assert ended.stderr.endswith("pip install 'dynamic-layer-tying[train]'\n")
    assert ended.stderr.count("\n") == 1
