"""The paper's rows: that each is a run, what pairs have in common, and the command."""

import json
from pathlib import Path

import pytest

from layer_tying import report
from layer_tying.cli import main
from layer_tying.paper import rows as module
from layer_tying.paper.rows import SCALES, recipes, runs_first
from layer_tying.runs.config import SHAPE, TrainConfig

TINY = {
    **{"nlayers": 3, "nhead": 2, "emsize": 16, "bptt": 16, "tokenizer": "bytes"},
    **{"batch_size": 4, "max_steps": 12, "every": 4, "precision": "fp32", "eval_batches": 2},
}


def differences(one: TrainConfig, other: TrainConfig) -> set[str]:
    ours, theirs = one.flat(), other.flat()
    return {name for name in ours if ours[name] != theirs[name]}


@pytest.mark.parametrize("scale", SCALES)
def test_every_row_is_there_under_its_name(scale):
    rows = recipes(scale)
    assert all(row.logging.exp == name for name, row in rows.items())
    assert {str(row.folder.parent) for row in rows.values()} == {f"runs/{scale}"}
    pairs = ["gpt2-wiki2", "gpt2-wiki103", "gpt2-lambada", "gpt2-1b", "bert-wiki2", "vit-cifar10"]
    sides = ("conventional", "dynamic", "shallow")
    expected = [f"{pair}-{side}" for pair in pairs for side in sides]
    ablations = ("final", "permuted", "frozen", "retrained")
    expected += [f"gpt2-wiki2-{name}" for name in (*ablations, "random", "cycle", "mixture")]
    expected += ["bert-wiki2-mixture", "vit-cifar10-mixture"]
    if scale == "small":
        expected += [f"gpt2-subwords-{side}" for side in sides]
    for task in ("sst2", "cola", "qnli", "mrpc", "rte"):
        expected += [f"glue-{task}-{tying}" for tying in ("keep", "dynamic", "none")]
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("scale", SCALES)
def test_a_pair_differs_in_its_policy_only(scale):
    rows = recipes(scale)
    for name in rows:
        if name.endswith("-dynamic") and not name.startswith("glue"):
            conventional = rows[name.replace("dynamic", "conventional")]
            assert differences(conventional, rows[name]) == {"policy", "exp"}
            assert (conventional.tying.policy, rows[name].tying.policy) == ("none", "dqn")


@pytest.mark.parametrize("scale", SCALES)
def test_what_depth_is_worth_is_measured_by_a_quarter_of_the_layers(scale):
    rows = recipes(scale)
    for name, row in rows.items():
        if name.endswith("-shallow"):
            conventional = rows[name.replace("shallow", "conventional")]
            assert differences(conventional, row) == {"nlayers", "exp"}
            assert 4 * row.model.nlayers == conventional.model.nlayers
    assert rows["gpt2-wiki2-cycle"].tying.groups == rows["gpt2-wiki2-shallow"].model.nlayers


def test_another_seed_is_another_folder_and_nothing_else():
    for name, row in recipes("small", seed=2).items():
        first = recipes("small")[name]
        taken_over = {"source"} if row.tying.source else set()
        assert differences(first, row) == {"seed", "output_dir"} | taken_over
        assert (first.seed + 2, "runs/small-2") == (row.seed, row.logging.output_dir)


@pytest.mark.parametrize("scale", SCALES)
def test_the_ablations_differ_from_the_dynamic_run_in_what_they_ablate(scale):
    rows = recipes(scale)
    dynamic = rows["gpt2-wiki2-dynamic"]
    taken_over = {"policy", "source"}
    expected = {
        "final": taken_over,
        "retrained": taken_over | {"seed"},
        "permuted": taken_over | {"permute"},
        "frozen": {"sharing"},
    }
    for name, changed in expected.items():
        assert differences(dynamic, rows[f"gpt2-wiki2-{name}"]) == changed | {"exp"}


@pytest.mark.parametrize("scale", SCALES)
def test_a_row_comes_after_the_one_it_starts_from_and_has_its_shape(scale, tmp_path):
    rows = recipes(scale, str(tmp_path))
    seen: dict[str, TrainConfig] = {}
    for name, row in rows.items():
        if row.tying.source:
            other = seen[row.tying.source]
            assert not differences(row, other) & {*SHAPE}
            assert runs_first(row) == other.logging.exp
            if name.startswith("glue"):
                assert other.tying.policy == ("none" if name.endswith("none") else "dqn")
        else:
            assert runs_first(row) is None
        seen[str(row.folder)] = row


def test_the_papers_scale_is_the_papers():
    for name, row in recipes("paper").items():
        if row.model.family == "gpt2":
            shape = (row.model.nlayers, row.model.emsize, row.model.nhead)
            depth = 12 if name.endswith("shallow") else 48
            assert shape == (depth, 1600, 25), name
            assert row.data.tokenizer == "gpt2"


# The command


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Rows so small that they run here, and the data of one of them; no report is drawn."""
    monkeypatch.setattr(report, "write_report", lambda *_: [])
    monkeypatch.setitem(module.BASE, "small", TINY)
    folder = tmp_path / "data/wikitext2"
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(" the cat sat on the mat . \n" * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(*arguments: str) -> int:
    return main(["recipe", *arguments])


def test_the_list_names_every_row_and_what_it_needs(capsys):
    assert recipe("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes("small"))
    assert "glue-rte-none  (after gpt2-subwords-conventional)" in lines


def test_a_row_runs_after_the_one_it_needs(tiny, capsys):
    assert recipe("gpt2-wiki2-final", "--data-dir", "data") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "first run layer-tying recipe gpt2-wiki2-dynamic" in error
    for name in ("dynamic", "final", "permuted"):
        assert recipe(f"gpt2-wiki2-{name}", "--data-dir", "data") == 0
    folder = Path("runs/small")
    dynamic, final, permuted = (
        json.loads((folder / f"gpt2-wiki2-{name}/summary.json").read_text())
        for name in ("dynamic", "final", "permuted")
    )
    assert final["owners_end"] == dynamic["owners_end"]
    assert permuted["independent_layers_mean"] == dynamic["independent_layers_mean"]


def test_a_row_can_be_tried_out_gone_on_with_and_replaced(tiny, capsys):
    row = ("gpt2-wiki2-conventional", "--data-dir", "data", "--output-dir", "tried")
    assert recipe(*row, "--max-steps", "4") == 0
    assert json.loads(Path("tried/gpt2-wiki2-conventional/summary.json").read_text())["steps"] == 4
    assert recipe(*row) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert recipe(*row, "--resume") == 2
    assert "max_steps is 4 in one and 12" in capsys.readouterr().err
    assert recipe(*row, "--overwrite") == 0
    assert json.loads(Path("tried/gpt2-wiki2-conventional/summary.json").read_text())["steps"] == 12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt3"], "unknown recipe 'gpt3'"),
        ([], "no recipe was named"),
        (["gpt2-wiki2-dynamic", "--max-steps", "0"], "max_steps is at least 1"),
        (["gpt2-wiki2-dynamic", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_in_one_line(tiny, capsys, arguments, said):
    assert recipe(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
