"""The report: numbers against hand-worked values, pages and figures of every kind of run."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.image import imread

from layer_tying import report
from layer_tying.errors import InputError
from layer_tying.report import (
    comparison_table,
    figures_agent,
    figures_curves,
    figures_mixture,
    figures_tying,
    tables,
    write_report,
)
from layer_tying.report.runs import conventional_for, curve, group_runs, numbers, spread
from layer_tying.runs.reading import read_run

LAYER_PARAMETERS, OTHER_PARAMETERS = 1000, 500
LIBRARIES = {"numpy", "matplotlib", "tabulate", "jinja2", "markupsafe"}
ROOMS = tuple(
    f"layer_tying.{name}"
    for name in ("report", "paper", "runs.reading", "data.glue", "tasks.metrics")
)
CHROMIUM = shutil.which("chromium")


# Run folders in the format that training writes.


def resolve(action):
    state = []
    for layer, owner in enumerate(action):
        state.append(layer if owner == layer else state[owner])
    return state


def random_decisions(policy, num_layers, num_decisions, every, rng):
    """A decision a line: of `random`, uniform; of `dqn`, ever more those of a drifting Q."""
    layers = range(num_layers)
    q = rng.normal(size=(num_layers, num_layers)).cumsum(axis=0) * 0.2 - 3
    epsilon = 1.0
    for index in range(num_decisions):
        q += rng.normal(size=q.shape) * 0.1
        greedy = [int(q[layer, : layer + 1].argmax()) for layer in layers]
        uniform = [int(rng.integers(layer + 1)) for layer in layers]
        explores = rng.random(num_layers) < (epsilon if policy == "dqn" else 1)
        action = np.where(explores, uniform, greedy).tolist()
        line = {"step": (index + 1) * every, "action": action, "state": resolve(action)}
        line |= {"reward": -5.0, "epsilon": epsilon}
        if policy == "dqn" and index % max(1, num_decisions // 4) == 0:
            line["q"] = [q[layer, : layer + 1].tolist() for layer in layers]
        yield line
        epsilon = max(0.95 * epsilon, 0.1)


def decisions_of(policy, num_layers, num_decisions, every, rng):
    initial = {"none": range(num_layers), "cycle": [layer % 3 for layer in range(num_layers)]}
    state = list(initial.get(policy, [0] * num_layers))
    first = {"step": 0, "action": None, "state": state, "reward": None, "epsilon": None}
    if policy not in ("dqn", "random"):
        return [first]
    return [first, *random_decisions(policy, num_layers, num_decisions, every, rng)]


def metrics_of(decisions, num_steps, images, base, rng):
    metrics, current = [], 0
    for step in range(5, num_steps + 1, 5):
        while current + 1 < len(decisions) and decisions[current + 1]["step"] <= step:
            current += 1
        independent = len(set(decisions[current]["state"]))
        parameters = independent * LAYER_PARAMETERS + OTHER_PARAMETERS
        loss = float(math.log(base) + 4 * math.exp(-6 * step / num_steps) + rng.normal() * 0.05)
        line = {"step": step, "tokens": step * 1000, "seconds": step * 0.1 + 3, "loss": loss}
        line |= {"learning_rate": 1e-3, "independent_layers": independent}
        line |= {"trainable_parameters": parameters, "parameter_bytes": 4 * parameters}
        line |= {"gradient_bytes": 4 * parameters, "optimizer_state_bytes": 8 * parameters}
        line |= {"model_state_bytes": 16 * parameters, "peak_memory_bytes": 10**6 + step}
        if step % (num_steps // 50 * 5) == 0 or step == num_steps:
            line["validation_perplexity"] = math.exp(loss)
            line["validation_bits_per_byte"] = loss / 4
            if images:
                line["validation_accuracy"] = 0.9 - 0.6 * math.exp(-4 * step / num_steps)
                del line["validation_bits_per_byte"]
        metrics.append(line)
    return metrics


def summary_of(config, num_layers, metrics):
    last = metrics[-1]
    mean = {key: float(np.mean([line[key] for line in metrics])) for key in metrics[0]}
    summary = {key: config[key] for key in ("policy", "family", "dataset", "seed")}
    summary |= {"steps": last["step"], "tokens": last["tokens"], "num_layers": num_layers}
    summary |= {"validation_perplexity": last["validation_perplexity"]}
    summary |= {"test_perplexity": last["validation_perplexity"] * 1.01}
    summary |= {
        "independent_layers_mean": mean["independent_layers"],
        "independent_layers_end": last["independent_layers"],
        "trainable_parameters_mean": mean["trainable_parameters"],
        "trainable_parameters_end": last["trainable_parameters"],
        "conventional_parameters": num_layers * LAYER_PARAMETERS + OTHER_PARAMETERS,
        "model_state_bytes_mean": mean["model_state_bytes"],
        "model_state_bytes_peak": max(line["model_state_bytes"] for line in metrics),
        "peak_memory_bytes": last["peak_memory_bytes"],
        "seconds_per_step": 0.1 if config["policy"] == "none" else 0.12,
        "decision_overhead": 0.0 if config["policy"] == "none" else 0.04,
    }
    if "validation_accuracy" in last:
        return summary | {"accuracy": last["validation_accuracy"]}
    return summary | {"bits_per_byte": last["validation_bits_per_byte"]}


def write_run(
    folder: Path, policy="dqn", num_layers=8, seed=0, *, num_decisions=24, every=10, images=False,
    finished=True, base=50.0, summary=None, **config,
) -> Path:  # fmt: skip
    """A run folder; `summary` replaces some of its numbers."""
    rng = np.random.default_rng([seed, num_layers, len(policy)])
    family, dataset = ("vit", "digits") if images else ("gpt2", "wiki2")
    shared = {"policy": policy, "family": family, "dataset": dataset, "nlayers": num_layers}
    config = {**shared, "every": every, "seed": seed, "exp": folder.name, **config}
    decisions = decisions_of(policy, num_layers, num_decisions, every, rng)
    metrics = metrics_of(decisions, num_decisions * every, images, base, rng)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "tying.jsonl", decisions)
    if finished:
        found = summary_of(config, num_layers, metrics) | (summary or {})
        (folder / "summary.json").write_text(json.dumps(found))
    return folder


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def tear(path):
    """What a kill in the middle of a write leaves."""
    path.write_bytes(path.read_bytes()[:-9])


# Reading.


def test_run_reads_back_and_a_torn_last_line_is_skipped(tmp_path):
    folder = write_run(tmp_path / "run", num_decisions=24, finished=False)
    whole = read_run(folder)
    assert len(whole.decisions) == 25 and whole.states.shape == (25, 8)
    assert whole.summary is None
    for name in ("metrics.jsonl", "tying.jsonl"):
        tear(folder / name)
    torn = read_run(folder)
    assert torn.metrics == whole.metrics[:-1]
    assert torn.decisions == whole.decisions[:-1]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda run: (run / "tying.jsonl").unlink(), "lacks tying.jsonl"),
        (lambda run: (run / "config.json").write_text("[1]"), "found list"),
        (lambda run: (run / "config.json").write_bytes(b"\xff{"), "cannot be read as JSON"),
        (lambda run: (run / "summary.json").write_text('{"a'), "cannot be read as JSON"),
        (lambda run: (run / "metrics.jsonl").write_text('{"st\n{}\n'), "line 1 is not JSON"),
        (lambda run: (run / "tying.jsonl").write_text(""), "holds no tying"),
        (lambda run: (run / "tying.jsonl").write_text("{}\n"), "line 1 has no state"),
        (lambda run: (run / "tying.jsonl").write_text('{"state": [0, 2]}\n'), "owner above"),
        (lambda run: write_lines(run / "tying.jsonl", [{"state": [0, 0], "q": [[1]]}]), "a q"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, damage, says):
    folder = write_run(tmp_path / "run")
    damage(folder)
    with pytest.raises(InputError, match=says) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_an_unfinished_run_counts_as_far_as_it_got(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    lines = [
        {"step": 10, "tokens": 100, "seconds": 5.0, "independent_layers": 8, "loss": None,
         "trainable_parameters": 900, "model_state_bytes": 4000, "validation_perplexity": 80.0},
        {"step": 30, "tokens": 300, "seconds": 9.0, "independent_layers": 2,
         "trainable_parameters": 300, "model_state_bytes": 1000, "validation_perplexity": None},
    ]  # fmt: skip
    write_lines(folder / "metrics.jsonl", lines)
    found = numbers(read_run(folder))
    expected = {"steps": 30, "validation_perplexity": 80, "independent_layers_mean": 5,
                "independent_layers_end": 2, "trainable_parameters_mean": 600,
                "model_state_bytes_mean": 2500, "model_state_bytes_peak": 4000,
                "seconds_per_step": 0.2}  # fmt: skip
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert math.isnan(found.get("test_perplexity", math.nan))


# Groups, curves and tables.


def test_runs_that_differ_only_in_seed_are_one_group(tmp_path):
    folders = [
        write_run(tmp_path / "b", "dqn", seed=2, output_dir="x"),
        write_run(tmp_path / "a", "dqn", seed=1, output_dir="y"),
        write_run(tmp_path / "c", "dqn", seed=1, every=20),
        write_run(tmp_path / "d", "none"),
    ]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [group.title for group in groups] == [
        "conventional", "dqn · every=10 (2 seeds)", "dqn · every=20",
    ]  # fmt: skip
    assert [run.path.name for run in groups[1].runs] == ["a", "b"]


def test_settings_that_are_no_more_do_not_part_older_runs_from_newer_ones(tmp_path):
    older = {"inherit": "first", "shared_init": "plain", "layer_price": None}
    folders = [write_run(tmp_path / "0", seed=0, **older), write_run(tmp_path / "1", seed=1)]
    assert [len(group.runs) for group in group_runs(map(read_run, folders))] == [2]


def test_two_runs_of_one_seed_are_not_called_two_seeds(tmp_path):
    seeds = {"a": 1, "b": 1, "c": 2}
    runs = [read_run(write_run(tmp_path / name, "dqn", seed=seeds[name])) for name in seeds]
    assert group_runs(runs)[0].title == "dqn (3 runs of 2 seeds)"
    assert group_runs(runs[:2])[0].title == "dqn (2 runs of 1 seed)"


def test_curves_are_means_over_seeds_on_the_tokens_all_have_reached(tmp_path):
    for seed, losses in enumerate(([1, 2, 6], [3, 4, 8])):
        folder = write_run(tmp_path / str(seed), seed=seed)
        lines = [{"tokens": 10 * i, "loss": loss} for i, loss in enumerate(losses)]
        write_lines(folder / "metrics.jsonl", lines)
    (group,) = group_runs([read_run(tmp_path / "0"), read_run(tmp_path / "1")])
    tokens, mean, sd = curve(group, "loss")
    assert tokens.tolist() == [0, 10, 20] and mean.tolist() == [2, 3, 7]
    assert sd == pytest.approx([math.sqrt(2)] * 3)

    long = [{"tokens": i, "loss": 2 * i} for i in range(1001)]
    write_lines(tmp_path / "0" / "metrics.jsonl", long)
    write_lines(tmp_path / "1" / "metrics.jsonl", long[:601])
    (group,) = group_runs([read_run(tmp_path / "0"), read_run(tmp_path / "1")])
    tokens, mean, _ = curve(group, "loss")
    assert len(tokens) <= 120 and tokens.max() <= 600
    assert mean == pytest.approx(2 * tokens, abs=6)  # windows of five tokens


def test_seeds_of_different_length_stay_where_they_were_measured(tmp_path):
    for seed, last in enumerate((10, 4)):
        folder = write_run(tmp_path / str(seed), seed=seed)
        lines = [{"tokens": 1000 * i, "loss": i + seed} for i in range(1, last + 1)]
        write_lines(folder / "metrics.jsonl", lines)
    (group,) = group_runs([read_run(tmp_path / "0"), read_run(tmp_path / "1")])
    tokens, mean, _ = curve(group, "loss")
    assert tokens.tolist() == [1000, 2000, 3000, 4000] and mean.tolist() == [1.5, 2.5, 3.5, 4.5]


def test_a_seed_that_has_just_started_hides_nothing_of_the_others(tmp_path):
    write_run(tmp_path / "0", seed=0)
    started = write_run(tmp_path / "1", seed=1, finished=False)
    (started / "metrics.jsonl").unlink()
    write_lines(started / "tying.jsonl", [{"state": [0] * 8}])
    groups = group_runs([read_run(tmp_path / "0"), read_run(tmp_path / "1")])
    assert len(curve(groups[0], "loss")[0])
    assert figures_tying.draw_independence(groups[0]).axes[0].images[0].get_array().shape[1] > 1
    write_report([tmp_path / "0", tmp_path / "1"], tmp_path / "page.html")
    written = {file.stem for file in (tmp_path / "page_figures").iterdir()}
    assert {"loss", "memory", "tying_dqn", "independence_dqn", "q_values"} <= written


def test_a_seed_that_diverged_is_not_left_out_of_a_mean(tmp_path):
    for seed, perplexity in enumerate((10.0, 12.0, None)):
        write_run(tmp_path / str(seed), seed=seed, summary={"validation_perplexity": perplexity})
    (group,) = group_runs([read_run(tmp_path / str(seed)) for seed in range(3)])
    assert math.isnan(spread(group, "validation_perplexity").mean)


def test_the_baseline_is_the_conventional_run_that_differs_least(tmp_path):
    settings = {"accumulate": 4, "lr": 0.001}
    ours = write_run(tmp_path / "ours", **settings)
    others = [
        write_run(tmp_path / "less", "none", **settings | {"accumulate": 1}),
        write_run(tmp_path / "faster", "none", **settings | {"lr": 0.01}),
        write_run(tmp_path / "same", "none", **settings),
    ]
    groups = group_runs([read_run(folder) for folder in (ours, *others)])
    (group,) = [group for group in groups if group.runs[0].path == ours]
    baseline = conventional_for(group, groups)
    assert baseline and baseline.runs[0].path == others[2]
    assert (
        conventional_for(group, [group for group in groups if group.runs[0].path == others[0]])
        is None
    )


def test_runs_whose_settings_read_alike_are_told_apart_by_their_folders(tmp_path):
    folders = [
        write_run(tmp_path / name / "run", dataset=f"{tmp_path}/{name}/text") for name in "ab"
    ]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [group.label for group in groups] == ["dqn · text · a/run", "dqn · text · b/run"]
    _, rows = tables.run_list(groups)
    assert [row[0] for row in rows] == ["a/run", "b/run"]


def test_no_figure_is_written_over_another_one(tmp_path):
    names = ("данные", "λόγοι", "1")
    folders = [write_run(tmp_path / str(i), dataset=name) for i, name in enumerate(names)]
    write_report(folders, tmp_path / "page.html")
    assert len(list((tmp_path / "page_figures").glob("tying_*.svg"))) == 3


def test_only_gpt2_on_text_stands_with_the_papers_gpt2(tmp_path):
    for name, settings in {"bert": {"family": "bert"}, "glue": {"task": "cola"}}.items():
        (group,) = group_runs([read_run(write_run(tmp_path / name, **settings))])
        assert tables.with_the_paper([group]) is None


def cells(table):
    heads, rows = table
    names = [f"{heading} {name}".strip() for heading, name in heads]
    return {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in rows}


@pytest.fixture
def compared(tmp_path):
    """Three dynamic seeds and a conventional run, with numbers one can work out by hand."""
    common = {"conventional_parameters": 1_000_000, "bits_per_byte": 1.5}
    folders = [
        write_run(tmp_path / f"dqn{seed}", seed=seed, summary={
            **common, "validation_perplexity": perplexity, "test_perplexity": 20.0,
            "trainable_parameters_mean": 250_000, "independent_layers_end": end,
            "model_state_bytes_mean": 4_000_000, "seconds_per_step": seconds,
            "peak_memory_bytes": 12_345_678,
        })
        for seed, perplexity, end, seconds in [(0, 10, 2, 0.2), (1, 12, 3, 0.3), (2, 14, 4, 0.4)]
    ]  # fmt: skip
    numbers = {**common, "validation_perplexity": 11.0, "seconds_per_step": 0.2}
    folders.append(write_run(tmp_path / "none", "none", summary=numbers))
    return [read_run(folder) for folder in folders]


def test_the_comparison_holds_the_numbers_worked_out_by_hand(compared):
    groups = group_runs(compared)
    outcome, cost = (
        cells(tables.comparison(groups, part)) for part in (tables.OUTCOME, tables.COST)
    )
    dynamic = outcome["dqn (3 seeds)"]
    assert dynamic["perplexity validation"] == "12.00 ± 2.00"
    assert dynamic["perplexity test"] == "20.00"
    assert dynamic["independent layers end"] == "3.0 ± 1.0"
    assert dynamic["trainable parameters mean"] == "250 k"
    assert dynamic["trainable parameters of conv."] == "25.0 %"
    assert "accuracy" not in dynamic and "independent layers of" not in dynamic
    dynamic = cost["dqn (3 seeds)"]
    assert dynamic["model state mean"] == "4.00 MB"
    assert dynamic["peak memory"] == "12.3 MB"
    assert dynamic["time per step seconds"] == "0.300 ± 0.100"
    assert dynamic["time per step of conv."] == "1.50 ± 0.50 ×"
    assert dynamic["time per step for decisions"] == "4.0 %"
    assert cost["conventional"]["time per step of conv."] == "1.00 ×"


def test_the_terminal_table_has_the_same_numbers_and_fits(compared):
    lines = comparison_table(compared).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 100
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    assert found["dqn (3 seeds)"]["val. ppl"] == "12.00 ± 2.00"
    assert found["dqn (3 seeds)"]["share"] == "25.0 %"
    assert found["conventional"]["val. ppl"] == "11.00"


def test_the_papers_rows_stand_as_published_and_nothing_is_invented(compared):
    table = cells(tables.with_the_paper(group_runs(compared)))
    conventional, dynamic = table["paper: conventional"], table["paper: dynamic"]
    assert (conventional["perplexity"], dynamic["perplexity"]) == ("53.57", "49.37")
    assert conventional["memory peak"] == "12,566.66 MB" and dynamic["memory peak"] == "4,514.31 MB"
    for row in (conventional, dynamic):
        assert [value for key, value in row.items() if "layers" in key or "param" in key] == [
            "—"
        ] * 4
        assert row["memory mean"] == "—"
    ours = table["here: dqn (3 seeds)"]
    assert ours["perplexity"] == "20.00" and ours["memory peak"] == "12.35 MB"


def test_unfinished_runs_are_marked_and_do_not_blur_finished_seeds(tmp_path):
    write_run(tmp_path / "a", seed=0, summary={"validation_perplexity": 10.0})
    write_run(tmp_path / "b", seed=1, finished=False)
    (group,) = group_runs([read_run(tmp_path / "a"), read_run(tmp_path / "b")])
    assert tables.marked_title(group) == "dqn (2 seeds), 1 unfinished"
    assert spread(group, "validation_perplexity").mean == 10
    (alone,) = group_runs([read_run(tmp_path / "b")])
    assert tables.marked_title(alone) == "dqn, unfinished"
    assert math.isfinite(spread(alone, "validation_perplexity").mean)


@pytest.mark.parametrize(
    ("settings", "unit", "said"),
    [
        ({"policy": "none"}, "tokens", None),
        ({"policy": "mixture", "images": True}, "images", "it reads a mixture of all sets"),
        ({"task": "rte", "sharing": "frozen"}, "examples", "no weights are shared"),
    ],
)
def test_the_page_says_what_was_counted_and_what_a_tying_means(tmp_path, settings, unit, said):
    run = read_run(write_run(tmp_path / "run", **settings))
    groups = group_runs([run])
    _, ((_, _, _, _, seen, *_),) = tables.run_list(groups)
    assert seen.endswith(f" {unit}")
    figure = figures_curves.draw_curves(groups, [{"color": "black"}], "loss", "training loss")
    assert figure.axes[0].get_xlabel() == unit
    write_report([run.path], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("the dev split" in page) == (unit == "examples")
    for sentence in ("it reads a mixture of all sets", "no weights are shared"):
        assert (sentence in page) == (sentence == said)


# Figures.


def luminance(colours):
    return colours[:, :3] @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("num_layers", [8, 48])
def test_owners_differ_in_lightness_and_most_where_most_is_owned(tmp_path, num_layers):
    run = read_run(write_run(tmp_path / "run", "random", num_layers, num_decisions=200))
    lightness = luminance(figures_tying.owner_colours([run]))
    assert (np.diff(lightness) < 0).all()
    # The first four owners own most under random decisions: they are far apart at any depth.
    assert (np.diff(lightness[:4]) < -0.05).all()


def test_the_tying_is_drawn_as_decided(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    colours = figures_tying.owner_colours([run])
    axes = figures_tying.draw_tying(run, colours).axes[0]
    image = axes.images[0].get_array()
    assert image.shape[:2] == (8, 25)
    np.testing.assert_allclose(image, colours[run.states.T])
    for layer, strokes in enumerate(axes.collections):
        spans = [segment[:, 0] for segment in strokes.get_segments()]
        stroked = [column for a, b in spans for column in range(round(a), round(b) + 1)]
        assert stroked == np.flatnonzero(run.states[:, layer] == layer).tolist()


def test_independence_is_the_share_of_decisions_and_of_seeds(tmp_path):
    states = [[[0, 1], [0, 0], [0, 0], [0, 0]], [[0, 1], [0, 1], [0, 1], [0, 0]]]
    for seed, after in enumerate(states):
        folder = write_run(tmp_path / str(seed), num_layers=2, seed=seed)
        write_lines(folder / "tying.jsonl", [{"state": state} for state in [[0, 0], *after]])
    (group,) = group_runs([read_run(tmp_path / "0"), read_run(tmp_path / "1")])
    axes = figures_tying.draw_independence(group).axes
    assert axes[0].images[0].get_array().tolist() == [[1.0], [0.5]]  # four decisions: one window
    assert [bar.get_width() for bar in axes[1].patches] == [1.0, 0.5]
    assert axes[1].lines[0].get_xdata().tolist() == [1.0, 0.5]  # random decisions: 1 / (i + 1)


def test_q_is_drawn_lower_triangular_with_its_greedy_choices(tmp_path):
    run = read_run(write_run(tmp_path / "run", num_layers=5))
    first = next(line["q"] for line in run.decisions if "q" in line)
    axes = figures_agent.draw_q(run).axes[0]
    matrix = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert np.isnan(matrix[np.triu_indices(5, 1)]).all()
    assert [matrix[i, : i + 1].tolist() for i in range(5)] == first
    greedy = axes.collections[0].get_offsets()
    assert greedy.tolist() == [[np.argmax(row), i] for i, row in enumerate(first)]


def test_coefficients_are_drawn_at_three_validations_with_their_leaders(tmp_path):
    folder = write_run(tmp_path / "run", "cycle", num_layers=3)
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=(2, 3, 2)).round(4).tolist() for _ in range(5)]
    lines = [
        {"step": i, "coefficients": {"attn.q.weight": one, "mlp.up.weight": other}}
        for i, (one, other) in enumerate(drawn)
    ]
    write_lines(folder / "metrics.jsonl", [{"step": 0}, *lines])
    figure = figures_mixture.draw_coefficients(read_run(folder))
    panels = [axes for axes in figure.axes if axes.images and axes.collections]
    shown = [axes.images[0].get_array().tolist() for axes in panels]
    assert shown == [matrix for i in (0, 2, 4) for matrix in drawn[i]]
    assert [axes.get_title() for axes in panels[:2]] == ["attn\nq", "mlp\nup"]
    leaders = panels[0].collections[0].get_offsets()[:, 0].tolist()
    assert leaders == np.abs(drawn[0][0]).argmax(axis=1).tolist()


def test_coefficients_of_a_run_that_diverged_are_drawn_as_far_as_they_are_numbers(tmp_path):
    folder = write_run(tmp_path / "run", "mixture", num_layers=3)
    known, unknown = [[0.5, -2.0], [1.0, 0.0], [0.0, 1.0]], [[None, 1.0], [None, None], [3.0, 1.0]]
    lines = [{"step": i, "coefficients": {"q": each}} for i, each in enumerate((known, unknown))]
    write_lines(folder / "metrics.jsonl", lines)
    figure = figures_mixture.draw_coefficients(read_run(folder))
    first, last = [axes for axes in figure.axes if axes.images and axes.collections]
    assert first.images[0].get_clim() == last.images[0].get_clim() == (-3, 3)
    assert last.collections[0].get_offsets().tolist() == [[0, 2]]
    write_lines(folder / "metrics.jsonl", [{"step": 1, "coefficients": {"q": [[None, None]] * 3}}])
    figures_mixture.draw_coefficients(read_run(folder))


def test_memory_bars_are_means_and_the_largest_moment(tmp_path):
    folder = write_run(tmp_path / "run")
    sizes = [(100, 200, 300), (10, 20, 30)]
    names = ("parameter_bytes", "gradient_bytes", "optimizer_state_bytes")
    lines = [
        {"tokens": i, **dict(zip(names, size, strict=True)), "model_state_bytes": sum(size)}
        for i, size in enumerate(sizes)
    ]
    write_lines(folder / "metrics.jsonl", lines)
    axes = figures_curves.draw_memory(group_runs([read_run(folder)])).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [55, 110, 165, 100, 200, 300]


# The page.

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting, and collects ids, references, text and what could load anything."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.references, self.tags, self.text = [], [], [], set(), []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src", "srcset", "data", "action"):
                self.references.append(value)
            self.references += re.findall(r"url\(['\"]?([^)'\"]*)", value or "")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A page over policies, seeds, depths, images, an unfinished run and hostile names."""
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "none", "none", 12), write_run(folder / "cycle", "cycle", 12)]
    runs += [write_run(folder / f"dqn{seed}", "dqn", 12, seed) for seed in range(3)]
    runs += [write_run(folder / "deep", "random", 48, num_decisions=700, every=2)]
    runs += [write_run(folder / "vit", "dqn", 8, images=True)]
    runs += [write_run(folder / "odd", "dqn", 8, dataset="a/<u>$x$ & \"'|co", finished=False)]
    tear(runs[-1] / "metrics.jsonl")
    written = write_report(runs, folder / "out" / "report.html")
    return written, Page(written[0].read_text("utf-8"))


def test_the_page_is_whole_and_refers_to_nothing_outside(everything):
    written, page = everything
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        assert reference.startswith("data:image/png;base64,") or reference[1:] in page.ids
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "img", "base"}
    html = written[0].read_text("utf-8")
    assert not re.search(r"https?:|@import|//www", html)
    text = "".join(page.text)
    assert "unfinished" in text and "53.57" in text and "88.9 %" in text
    assert "<u>$x$ & \"'|co" in text  # shown as it is, not taken for markup or mathematics
    assert "u" not in page.tags


def test_every_figure_is_there_as_svg_and_png(everything):
    written, _ = everything
    assert written[0].name == "report.html" and all(path.is_file() for path in written)
    names = {path.stem for path in written[1:]}
    assert names >= {
        "final_tyings_8_layers", "final_tyings_12_layers", "final_tyings_48_layers",
        "validation_perplexity", "validation_accuracy", "loss", "independent_layers",
        "model_state_bytes", "memory", "q_values",
    }  # fmt: skip
    assert sum(name.startswith("tying_") for name in names) == 4
    assert sum(name.startswith("independence_") for name in names) == 4
    for path in written[1:]:
        assert path.parent == written[0].with_name("report_figures")
        if path.suffix == ".png":
            assert imread(path).std() > 0.02, path
        else:
            assert path.read_text("utf-8").startswith("<?xml")
    assert {path.suffix for path in written[1:]} == {".svg", ".png"}


def test_a_run_without_a_logged_line_still_gets_a_page(tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    (run / "metrics.jsonl").write_text("")
    write_lines(run / "tying.jsonl", [{"step": 0, "state": [0] * 8}])
    before = dict(rcParams)
    written = write_report([run, run], tmp_path / "report.html")
    assert dict(rcParams) == before
    assert [path.stem for path in written[1:]] == ["final_tyings_8_layers"] * 2
    text = "".join(Page(written[0].read_text("utf-8")).text)
    assert "1 run: dqn (1 unfinished)" in text  # one folder twice is one run, not two seeds


def test_what_cannot_be_reported_is_one_line(tmp_path):
    with pytest.raises(InputError, match="at least one"):
        write_report([], tmp_path / "report.html")
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write") as caught:
        write_report([run], tmp_path / "file" / "report.html")
    assert "\n" not in str(caught.value)


def test_the_report_needs_no_torch_and_no_global_figures():
    for path in Path(report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.partition(".")[0]
                allowed = top in LIBRARIES or top in sys.stdlib_module_names
                allowed |= name == "layer_tying.errors" or name.startswith(ROOMS)
                assert allowed, f"{path.name} imports {name}"
                assert "pyplot" not in name


def browse(page: Path, folder: Path):
    """Open the page in headless Chromium: pixels, console lines, and what the page asked for."""
    profile, picture, log = folder / "profile", folder / "picture.png", folder / "net.json"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}",
         "--window-size=1100,1600", f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = [
        event["params"]["url"]
        for event in json.loads(log.read_text("utf-8"))["events"]
        # The browser's own errands have no origin; a page from a file has the origin "null".
        if event.get("params", {}).get("initiator", "not an origin") != "not an origin"
    ]
    return imread(picture), console, asked


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_page_opens_in_a_browser_without_a_network(everything, tmp_path):
    written, _ = everything
    pixels, console, asked = browse(written[0], tmp_path / "report")
    assert pixels.shape[:2] == (1600, 1100) and pixels[..., :3].std() > 0.05
    assert len(np.unique((pixels[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)) > 200
    assert console == []
    assert not [url for url in asked if not url.startswith("data:")]

    # The same look at a page that does reach out, so that the above is known to see it.
    other = tmp_path / "other.html"
    other.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("seen")</script>')
    _, console, asked = browse(other, tmp_path / "other")
    assert console and asked == ["http://127.0.0.1:9/x.png"]


def test_runs_that_differ_in_much_are_told_apart_by_their_folders(tmp_path):
    longs = {f"setting_{number}_with_a_long_name": number for number in range(20)}
    write_run(tmp_path / "one", "dqn", seed=0)
    write_run(tmp_path / "other", "dqn", seed=0, every=5, **longs)
    page = tmp_path / "report.html"
    write_report([tmp_path / "one", tmp_path / "other"], page)
    titles = [
        group.title for group in group_runs([read_run(tmp_path / n) for n in ("one", "other")])
    ]
    assert titles == ["dqn · every=10", "dqn · other"]
    assert all(title in page.read_text() for title in titles)
