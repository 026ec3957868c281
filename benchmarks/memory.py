"""Peak memory of training a GPT-2 of 48 layers x 1600: conventional against tied.

Each side runs in a process of its own. Reports the peak resident set (on CUDA: the peak
allocation), the peak above the interpreter's own, the model state by component, and the bound that
the model state alone sets.

    python benchmarks/memory.py --layers 48 --width 1600 --independent 48 7
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from layer_tying.evaluate import cross_entropy
from layer_tying.memory import model_state, peak_bytes
from layer_tying.models import build_model, language_config
from layer_tying.policies import pattern
from layer_tying.runlog import environment


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Build, train two steps, and say what it took. Runs in a process of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    own = peak_bytes(device)
    config = language_config(
        "gpt2",
        num_layers=options.layers,
        num_heads=options.heads,
        hidden_size=options.width,
        vocab_size=options.vocabulary,
        max_length=options.length,
    )
    config.use_cache = False
    tying = pattern("sequence", options.layers, options.only)
    start = time.perf_counter()
    model = build_model(config, tying, device=device, dtype=torch.bfloat16)
    built = {"build_seconds": time.perf_counter() - start, "build_peak": peak_bytes(device) - own}
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, options.vocabulary, (1, options.length + 1), device=device)
    for _ in range(2):
        logits = model(input_ids=tokens[:, :-1]).logits
        cross_entropy(logits, tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = model_state(model, [optimizer])
    peak = peak_bytes(device)
    return {
        "independent_layers": options.only,
        "peak_bytes": peak,
        "own_bytes": own,
        "above_own_bytes": peak - own,
        "parameter_bytes": state.parameter_bytes,
        "gradient_bytes": state.gradient_bytes,
        "moment_bytes": state.moment_bytes,
        "model_state_bytes": state.total_bytes,
        **built,
        "environment": environment(device),
    }


def _in_a_process(arguments: list[str], independent: int) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments, "--only", str(independent)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--heads", type=int, default=25)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--independent", type=int, nargs="+", default=[48, 1, 7])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options)))
        return
    rows = [_in_a_process(sys.argv[1:], n) for n in options.independent]
    whole = rows[0]
    print(
        f"{'independent':>12} {'peak':>10} {'above own':>10} {'ratio':>7} {'bound':>7} {'build':>8}"
    )
    for row in rows:
        ratio = whole["above_own_bytes"] / row["above_own_bytes"]
        bound = whole["model_state_bytes"] / row["model_state_bytes"]
        print(
            f"{row['independent_layers']:>12} {row['peak_bytes'] / 1e9:>7.2f} GB "
            f"{row['above_own_bytes'] / 1e9:>7.2f} GB {ratio:>6.2f}x {bound:>6.2f}x "
            f"{row['build_seconds']:>6.1f} s"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "only")}
    result = {"command": " ".join(sys.argv), "settings": settings, "rows": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
