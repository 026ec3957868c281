"""What is read off the runs of the agent; and that the page is up to date."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import agent_page
from agent import jobs_of, row_of
from agent_page import AGENT, PERMUTED, RANDOM, START

from layer_tying.runs.config import TrainConfig
from layer_tying.runs.processes import Job


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_what_is_permuted_repeats_the_run_of_its_seed(tmp_path):
    jobs = {job.name: job for job in jobs_of([0, 1], tmp_path, 300)}
    permuted = jobs["permuted-1"]
    assert permuted.after == ("dqn-1",)
    assert permuted.config.tying.source == str(jobs["dqn-1"].config.folder)
    assert len(jobs) == 10 and {job.config.flat()["max_steps"] for job in jobs.values()} == {300}


def test_a_runs_row_counts_changes_and_the_most_frequent_choices_late(tmp_path):
    job = Job(TrainConfig.from_flat(exp="dqn-7", output_dir=str(tmp_path), dataset="x"), "dqn-7")
    folder = job.config.folder
    folder.mkdir(parents=True)
    summary = {"seed": 7, "independent_layers_mean": 2.5}
    summary |= {"validation_perplexity": 5.0, "test_perplexity": 4.0}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    actions = [[0, 0], [0, 1], [0, 1], [0, 1], [0, 0], [0, 0], [0, 1], [0, 0]]
    states = [{"state": action, "action": action} for action in actions]
    write_lines(folder / "tying.jsonl", [{"state": [0, 0], "action": None}, *states])
    losses = [{"step": step, "loss": float(step)} for step in range(1, 9)]
    write_lines(folder / "metrics.jsonl", [*losses, {"step": 9, "val": 1.0}])
    row = row_of(job)
    assert (row["method"], row["seed"], row["decisions"], row["changes"]) == ("dqn", 7, 8, 4)
    assert row["late_loss"] == 7.5  # of steps 7 and 8
    assert row["persistence"] == 0.75  # the first layer always, the second once of twice


def row(method, seed, test):
    return {
        **{"method": method, "seed": seed, "test": test, "validation": test, "late_loss": 2.0},
        **{"decisions": 10, "changes": 5, "independent": 2.0, "persistence": 0.5},
        "losses": [[50 * i, 4.0 - i / 10] for i in range(1, 25)],
    }


def test_the_page_compares_seeds_that_both_have(tmp_path):
    rows = [row(AGENT, 0, 6.0), row(AGENT, 1, 4.0), row(PERMUTED, 0, 5.0), row(PERMUTED, 1, 5.0)]
    rows += [row(RANDOM, 0, 4.0), row(START, 2, 1.0)]
    path = tmp_path / "agent.json"
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    page = agent_page.write_page(path).read_text(encoding="utf-8")
    assert "1.000 times the perplexity of its own decisions" in page
    assert "better in 1 of 2 seeds" in page
    assert "1.500 times the perplexity of random changes" in page
    assert "its starting tying, kept" not in page, "no seed has both"
    assert (tmp_path / "images" / "agent.png").stat().st_size > 10_000


def test_the_committed_page_is_of_the_committed_results(tmp_path):
    copy = tmp_path / "agent.json"
    copy.write_bytes(agent_page.COMMITTED.read_bytes())
    committed = agent_page.DOCS / "agent.md"
    assert agent_page.write_page(copy).read_text() == committed.read_text(encoding="utf-8")


@pytest.mark.parametrize("actions", [[], [None, None]])
def test_without_decisions_nothing_persists(actions):
    from agent import _persistence

    assert _persistence(actions) is None
