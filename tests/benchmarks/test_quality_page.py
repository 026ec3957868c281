"""The quality page, from constructed rows: which learning rate counts, which method is better."""

import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from quality_opening import what_holds  # noqa: E402
from quality_page import write_page  # noqa: E402
from quality_rows import at_best_rate, best_rate  # noqa: E402


def row(method, lr, seed, perplexities, size=3.0, **more):
    validation, test = perplexities
    return {
        **{"set": "pydocs", "regime": "single-epoch", "method": method, "lr": lr},
        **{"seed": seed, "validation_perplexity": validation, "test_perplexity": test},
        "rise_after_the_best": 1.25,
        **{"bits_per_byte": 2.5, "independent_layers_mean": size, "independent_layers_end": 3},
        **{"model_state_bytes_mean": size * 1e6, "model_state_bytes_peak": 4e6},
        **{"seconds_per_step": 0.1, "decision_overhead": 0.01, "steps": 400},
        **{"hardware": {"processor": "a CPU"}, "versions": {"torch": "2.0"}, **more},
    }


@pytest.fixture
def rows():
    worth = [0.0, 0.3, *[0.0] * 9, 0.1]
    sizes = {"sequence-2": 2, "sequence-3": 3, "sequence-4": 4, "sandwich-2": 2, "sandwich-4": 4}
    figures = {
        "sequence-2": 9,
        "sequence-3": 8,
        "sequence-4": 7.5,
        "sandwich-2": 7,
        "sandwich-4": 6,
    }
    return [
        row("conventional", 1e-3, 0, (6.0, 6.1), 12),
        row("conventional", 2e-3, 0, (5.0, 5.2), 12),
        row("conventional", 2e-3, 1, (5.0, 5.4), 12),
        row("conventional", 1e-3, 1, (1.0, 1.0), 12),  # better, but not of the first seed
        *(row(name, 2e-3, 0, (figures[name],) * 2, sizes[name]) for name in sizes),
        row("sandwich-3", 2e-3, 0, (7.0, 6.5)),
        row("bandit-3", 2e-3, 0, (6.9, 6.37), worth=worth),
        row("sandwich-3, 1/n", 2e-3, 0, (7.0, 7.0)),
        row("bandit, priced", 2e-3, 0, (8.0, 8.1), 5.0),
        row("random", 2e-3, 0, (9.0, 9.1)),
    ]


def test_the_first_seed_chooses_the_rate_on_validation(rows):
    assert best_rate(rows, "pydocs", "single-epoch", "conventional") == 2e-3
    chosen = at_best_rate(rows, "pydocs", "single-epoch")["conventional"]
    assert [r["test_perplexity"] for r in chosen] == [5.2, 5.4]


def test_the_page_compares_the_methods(rows, tmp_path):
    shape = {"family": "llama", "nlayers": 12, "emsize": 64, "batch_size": 16, "bptt": 128}
    write_page({"rows": rows, "settings": {"single-epoch": shape}}, tmp_path)
    page = (tmp_path / "quality.md").read_text()
    trained = "single-epoch: 12 layers x 64, rotary positions, 400 steps of 16 x 128 tokens"
    assert f"({trained})" in page
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines]
    places = {line[0]: place for place, line in enumerate(lines)}
    figures = ["5.300 ± 0.141", "2.500", "5.000", "1.25", "12.00"]
    assert lines[places["conventional"]][1:6] == figures
    assert [line[1] for line in lines[:14] if not line[0].startswith(":")] == [
        "pydocs, single-epoch",
        *("", "**0.980** (1) sandwich-3", ""),  # of the best fixed pattern of 2, 3 and 4 layers
        *("1.225 (1)", "", "**0.980** (1)", "**0.910** (1)", "**0.700** (1)", "", ""),
        # worths: sequence 0, sandwich-2 0.3, -3 and -4 0.4; perplexities 9, 8, 7.5, 7, 6.5, 6
        *("0.93 (6)", "5.0, no"),
    ]
    assert places["conventional"] < places["sandwich-4"] < places["random"]
    for name in ("front", "patterns"):
        assert (tmp_path / "images" / f"quality-{name}.png").stat().st_size > 5000


def test_the_page_of_the_committed_results_is_made(tmp_path):
    results = json.loads((REPOSITORY / "benchmarks/results/quality.json").read_text())
    write_page(results, tmp_path)
    assert (tmp_path / "quality.md").read_text().count("\n## ") > 3


def test_the_opening_says_what_holds(rows):
    settings = [at_best_rate(rows, "pydocs", "single-epoch")]
    assert len(what_holds(settings).splitlines()) == 2
    rows += [row("conventional, 3 layers", 2e-3, 0, (6.0, 6.5)), row("dqn", 2e-3, 0, (9.0, 7.0))]
    settings = [at_best_rate(rows, "pydocs", "single-epoch")]
    depth, equal, agent, fixed, initial = what_holds(settings).splitlines()
    assert "pays in 1 of 1 settings" in depth
    assert "0.80 to 0.80 times" in depth
    assert "in 1 of 1 settings (0.98 to 0.98 times its perplexity)" in equal
    assert "is on the Pareto front in 0 of 1" in equal
    assert "**The bandit beats the paper's agent in 1 of 1 settings**, with 0.91 to 0.91" in agent
    assert fixed.endswith("in 1 of 1 settings with 3 independent layers.")
    assert "0.91 to 0.91 times that of `sandwich-3` with 1/n" in initial
