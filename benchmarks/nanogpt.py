"""Three lines in a stranger's training script: karpathy/nanoGPT as it is, and tied.

Runs the command that nanoGPT's README gives for CPUs twice, with its own ``train.py`` and with one
to which the three lines of LINES are added, and counts after every optimizer step what the
optimizer holds. What the tied run saved has to load into nanoGPT's own, unchanged ``model.py``.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/nanogpt.py nanoGPT --text input.txt
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from layer_tying.runs.summary import environment

# Each line, and the line of train.py that it follows.
LINES = {
    "from layer_tying import DynamicTying": "from model import GPTConfig, GPT",
    "tying = DynamicTying(model, optimizer, policy='dqn', every=50)": (
        "checkpoint = None # free up memory"
    ),
    "    tying.step(reward=lambda: -float(estimate_loss()['train']))": (
        "    optimizer.zero_grad(set_to_none=True)"
    ),
}
FLAGS = (
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"),
    *("--log_interval=100", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4"),
    *("--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)


def with_lines(script: str) -> str:
    """The training script with the three lines."""
    for line, after in LINES.items():
        assert script.count(f"{after}\n") == 1, f"train.py has changed: {after!r}"
        script = script.replace(f"{after}\n", f"{after}\n{line}\n")
    return script


class Counter:
    """What optimizers hold after each step: parameters, and bytes of model state."""

    def __init__(self) -> None:
        self.parameters: list[int] = []
        self.bytes: list[int] = []

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        tensors = [*held, *(p.grad for p in held if p.grad is not None)]
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        if len(held) > 2 and any(p.ndim > 1 and p.shape[0] == 65 for p in held):  # not the agent's
            self.parameters.append(sum(p.numel() for p in held))
            self.bytes.append(sum(t.numel() * t.element_size() for t in tensors))


def run(script: Path, flags: list[str]) -> dict[str, Any]:
    """Run a training script in this process and say what it held and reached."""
    counter = Counter()
    register_optimizer_step_post_hook(counter)
    sys.argv, sys.path[0] = [script.name, *flags], str(script.parent)
    output = io.StringIO()
    start = time.process_time()
    with contextlib.redirect_stdout(output):
        left = runpy.run_path(str(script), run_name="__main__")
        seconds = time.process_time() - start
        saved = torch.load(f"{left['out_dir']}/ckpt.pt", weights_only=True)
        left["GPT"](left["GPTConfig"](**saved["model_args"])).load_state_dict(saved["model"])
    evaluations = re.findall(r"^step (\d+): .*val loss ([\d.]+)", output.getvalue(), re.MULTILINE)
    steps = len(counter.parameters)
    return {
        "steps": steps,
        "validation_loss_end": float(evaluations[-1][1]),
        "validation_loss_best": min(float(loss) for _, loss in evaluations),
        "parameters_mean": round(sum(counter.parameters) / steps),
        "parameters_peak": max(counter.parameters),
        "parameters_at_last_validation": counter.parameters[-1],
        "model_state_bytes_mean": round(sum(counter.bytes) / steps),
        "model_state_bytes_peak": max(counter.bytes),
        "processor_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("repository", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tiny Shakespeare, input.txt")
    parser.add_argument("--commit", default="", help="of the checkout, for the record")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/nanogpt.json"))
    parser.add_argument("--only", choices=("as it is", "tied"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        os.chdir(options.repository)
        script = "train.py" if options.only == "as it is" else "train_tied.py"
        print(json.dumps(run(options.repository / script, list(FLAGS))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "nanoGPT"
        shutil.copytree(options.repository, copy)
        data = copy / "data" / "shakespeare_char"
        shutil.copy(options.text, data / "input.txt")
        subprocess.run([sys.executable, data / "prepare.py"], check=True, stdout=subprocess.DEVNULL)
        script = (copy / "train.py").read_text(encoding="utf-8")
        (copy / "train_tied.py").write_text(with_lines(script), encoding="utf-8")
        rows = {}
        for name in ("as it is", "tied"):
            command = [sys.executable, __file__, str(copy), "--text", "-", "--only", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            rows[name] = json.loads(done.stdout)
            print(name, json.dumps(rows[name]))
    result = {
        "command": f"python train.py {' '.join(FLAGS)}",
        "repository": "karpathy/nanoGPT",
        "commit": options.commit,
        "lines_added": list(LINES),
        "rows": rows,
        "environment": environment(torch.device("cpu")),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
