"""The results file of the paper's rows, from run folders made by hand."""

import json
from pathlib import Path

import pytest

from layer_tying.paper.results import (
    reasons_so_far,
    results_of,
    with_earlier,
    without_place,
    write_results,
)
from layer_tying.paper.rows import recipes

HARDWARE = {"device": "cuda", "processor": "another one"}
ROW = "gpt2-wiki2-conventional"


@pytest.fixture
def rows(tmp_path):
    return recipes("small", str(tmp_path / "runs"))


def finish(folder: Path, **changes) -> None:
    folder.mkdir(parents=True)
    config = {
        "model": {"nlayers": 2},
        "data": {"data_dir": "/here"},
        "max_steps": 10_000,
        "settled": [],
    } | changes
    summary = {"seed": 0, "versions": {"torch": "2"}, "hardware": HARDWARE, "steps": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text('{"step": 4}\n')
    (folder / "tying.jsonl").write_text('{"step": 0, "state": [0, 1]}\n')


def test_a_finished_row_is_written_with_what_it_takes_to_repeat_it(rows):
    finish(rows[ROW].folder)
    (entry,) = results_of({0: rows}, {}, "small")["rows"]
    assert entry["row"] == ROW and entry["summary"]["steps"] == 4
    assert entry["command"] == f"OMP_NUM_THREADS=1 layer-tying recipe {ROW} --scale small"
    assert entry["config"] == {"nlayers": 2, "max_steps": 10_000}, (
        "flat, and no place of this machine"
    )
    assert entry["hardware"] == HARDWARE, "of the machine that trained"


def test_another_seeds_row_is_repeated_with_that_seed(tmp_path):
    third = recipes("small", str(tmp_path / "runs"), 2)
    finish(third[ROW].folder)
    (entry,) = results_of({0: recipes("small"), 2: third}, {}, "small")["rows"]
    assert entry["seed"] == 2 and entry["command"].endswith(f"{ROW} --scale small --seed 2")


def test_a_row_that_was_cut_short_says_so(rows):
    finish(rows[ROW].folder, max_steps=4)
    (entry,) = results_of({0: rows}, {}, "small")["rows"]
    assert entry["command"].endswith(" --max-steps 4")


def test_reasons_are_kept_until_a_row_is_done(rows, tmp_path):
    reasons = {ROW: "no data", "vit-cifar10-dynamic": "no images"}
    write_results(tmp_path / "out.json", results_of({0: rows}, reasons, "small"))
    assert reasons_so_far(tmp_path / "out.json") == reasons
    finish(rows[ROW].folder)
    assert results_of({0: rows}, reasons, "small")["not_run"].keys() == {"vit-cifar10-dynamic"}
    assert reasons_so_far(tmp_path / "none.json") == {}


def test_rows_whose_runs_are_elsewhere_stay(rows, tmp_path):
    finish(rows[ROW].folder)
    file = tmp_path / "out.json"
    elsewhere = {"row": ROW, "seed": 1, "summary": {"steps": 4}}
    older = {"row": ROW, "seed": 0, "summary": {"steps": 3}}
    other = {"row": "bert-wiki2-dynamic", "seed": 0, "summary": {}}
    write_results(file, {"rows": [elsewhere, other, older], "not_run": {}})
    reasons = {other["row"]: "no data", "vit-cifar10-dynamic": "no images"}
    both = with_earlier(results_of({0: rows}, reasons, "small"), file)
    found = [(row["row"], row["seed"]) for row in both["rows"]]
    assert found == [("bert-wiki2-dynamic", 0), (ROW, 0), (ROW, 1)]
    assert both["rows"][1]["summary"]["steps"] == 4, "what is here replaces what was there"
    assert both["not_run"].keys() == {"vit-cifar10-dynamic"}


def test_a_run_to_try_a_row_out_does_not_replace_the_row(rows, tmp_path):
    finish(rows[ROW].folder, max_steps=4)
    file = tmp_path / "out.json"
    write_results(file, {"rows": [{"row": ROW, "seed": 0, "summary": {"steps": 10_000}}]})
    (row,) = with_earlier(results_of({0: rows}, {}, "small"), file)["rows"]
    assert row["summary"]["steps"] == 10_000


def test_a_reason_does_not_name_this_machines_folder():
    reason = without_place("/my/data/wiki lacks train.txt", "/my/data")
    assert reason == "$LAYER_TYING_DATA/wiki lacks train.txt"
