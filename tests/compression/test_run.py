"""The command, on real files: what it writes, going on after a kill, and what it refuses."""

import json
import math
import shutil
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_runs import in_process, lines_of, run_command, signal_at, small, write_text

from layer_tying import InputError, TiedLayers, load
from layer_tying.cli import main
from layer_tying.compression.run import compress_run
from layer_tying.compression.settings import (
    BudgetSettings,
    CompressConfig,
    HealingSettings,
    SearchSettings,
)
from layer_tying.compression.source import _as_numbered_by, fingerprint, kind_of, open_model
from layer_tying.core.find import find_layers
from layer_tying.data.images import load_images
from layer_tying.report.compression import write_compression_report
from layer_tying.runs import precision
from layer_tying.runs.config import OptimizationConfig, read_config
from layer_tying.runs.train import Interrupted, train
from layer_tying.saving.export import export_expanded
from layer_tying.saving.export_run import tokenizer_of

FLAGS = ("--steps", "20", "--bptt", "16", "--batch-size", "4", "--probes", "1", "--lr", "1e-2")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a text and with models that were trained on it."""
    folder = tmp_path_factory.mktemp("compress")
    write_text(folder)
    for name, changes in (("gpt2", {}), ("bert", {"family": "bert"})):
        train(small(folder, exp=name, policy="none", nlayers=4, max_steps=12, **changes))
    images = {"family": "vit", "dataset": "digits", "bptt": 128}
    train(small(folder, exp="vit", policy="none", nlayers=4, max_steps=12, **images))
    model = load(folder / "runs" / "gpt2")
    export_expanded(model, folder / "plain")
    tokenizer_of(folder / "runs" / "gpt2").save(folder / "plain")
    return folder


def config(here, output, **changes):
    settings = {
        "source": str(here / "runs" / "gpt2"),
        "output": str(output),
        "budget": BudgetSettings(layers=2),
        "dataset": str(here / "text.txt"),
        "bptt": 16,
        "batch_size": 4,
        "search": SearchSettings(probes=1),
        "optimization": OptimizationConfig(lr=1e-2, final_lr=0.0, max_steps=20, precision="fp32"),
    }
    return CompressConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def small_one(here):
    """What the command writes for the language model."""
    arguments = ("runs/gpt2", "--data", "text.txt", "--layers", "2", "--output", "small", *FLAGS)
    code, out, err = run_command("compress", *arguments, cwd=here)
    assert code == 0, err
    return here / "small", out


def test_one_command_makes_a_model_that_others_take(small_one, here):
    folder, out = small_one
    model = load(folder)
    assert TiedLayers(model).tying.num_independent == 2
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert f"{summary['parameters_after']:,} parameters of" in out
    assert summary["parameters_after"] == sum(p.numel() for p in model.parameters())
    whole = sum(p.numel() for p in load(here / "runs" / "gpt2").parameters())
    assert summary["parameters_before"] == whole > summary["parameters_after"]
    assert summary["after"]["validation"]["perplexity"] < summary["tied"]["perplexity"]
    code, text, err = run_command("generate", "small", "--prompt", "the cat", cwd=here)
    assert code == 0, err
    assert text.startswith("the cat")
    arguments = ("--format", "expanded", "--output", "expanded")
    assert run_command("export", "small", *arguments, cwd=here)[0] == 0
    assert (here / "expanded" / "model.safetensors").is_file()


def test_the_quality_before_is_that_of_the_run(small_one, here):
    """The command scores the untouched model as the run that trained it did."""
    summary = json.loads((small_one[0] / "run" / "summary.json").read_text())
    trained = json.loads((here / "runs" / "gpt2" / "summary.json").read_text())
    for split in ("validation", "test"):
        found = summary["before"][split]["perplexity"]
        assert found == pytest.approx(trained[f"{split}_perplexity"], rel=1e-4)


def test_the_card_and_the_report_say_what_came_out(small_one):
    folder, _ = small_one
    summary = json.loads((folder / "run" / "summary.json").read_text())
    card = (folder / "README.md").read_text()
    assert "compressed to 2 of 4 layers" in card
    assert f"{summary['after']['test']['perplexity']:.4g}" in card
    page = (folder / "report.html").read_text()
    assert "What sharing costs" in page
    assert (folder / "report_figures" / "divergence.png").is_file()


def test_figures_that_are_not_finite_are_dashes_in_the_report(small_one, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_one[0] / "run", run)
    summary = json.loads((run / "summary.json").read_text())
    summary["tied"] = dict.fromkeys(summary["tied"])  # null, as inf and NaN are written
    for when in ("before", "after"):
        summary[when]["validation"] = dict.fromkeys(summary[when]["validation"])
    summary["after"]["test"] = dict.fromkeys(summary["after"]["test"])
    (run / "summary.json").write_text(json.dumps(summary))
    choice = json.loads((run / "choice.json").read_text())
    choice["candidates"] = {name: (each, None) for name, (each, _) in choice["candidates"].items()}
    (run / "choice.json").write_text(json.dumps(choice))
    write_compression_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("—") > (small_one[0] / "report.html").read_text().count("—") + 3


def test_a_model_with_a_scalar_has_a_fingerprint():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    before = fingerprint(model)
    model[1].num_batches_tracked += 1
    assert fingerprint(model) != before


def compress_until(options, event, number, signal_number, resume=False):
    """Compress, and send this process a signal when an event comes for the n-th time."""
    signal_at(event, number, signal_number)
    try:
        compress_run(options, resume=resume)
    except Interrupted:
        sys.exit(130)


@pytest.mark.parametrize(
    ("step", "signal_number", "settings"),
    [
        (2, signal.SIGKILL, {}),  # before there is a checkpoint
        (8, signal.SIGKILL, {"sharing": "tied", "gradual": True}),
        (15, signal.SIGKILL, {"gradual": True}),
        (7, signal.SIGTERM, {"hidden_weight": 0.1}),
        (12, signal.SIGKILL, {"start": "closed-form"}),
    ],
)
def test_what_was_stopped_goes_on_exactly(here, tmp_path, step, signal_number, settings):
    healing = HealingSettings(**settings)
    whole = config(here, tmp_path / "whole", healing=healing)
    stopped = config(here, tmp_path / "stopped", healing=healing)
    compress_run(whole)
    code = in_process(compress_until, stopped, "step", step, signal_number)
    assert code == (130 if signal_number == signal.SIGTERM else -signal_number)
    choice = (tmp_path / "stopped" / "run" / "choice.json").read_bytes()
    compress_run(stopped, resume=True)
    assert (tmp_path / "stopped" / "run" / "choice.json").read_bytes() == choice
    weights = [load_file(tmp_path / name / "compact.safetensors") for name in ("whole", "stopped")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    lines = [lines_of(tmp_path / name / "run" / "metrics.jsonl") for name in ("whole", "stopped")]
    for line in (*lines[0], *lines[1]):
        line.pop("seconds")
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("plain", {}),
        ("runs/bert", {}),
        ("runs/vit", {"dataset": "digits", "bptt": None, "batch_size": 32}),
    ],
)
def test_plain_folders_masked_models_and_images(here, tmp_path, source, changes):
    given = {"source": str(here / source), **changes}
    summary = compress_run(config(here, tmp_path / "small", **given))
    assert summary["independent_layers"] == 2
    assert summary["after"]["test"]["loss"] > 0
    load(tmp_path / "small")


def test_what_was_compressed_is_compressed_again(here, tmp_path):
    tied = HealingSettings(sharing="tied")
    compress_run(config(here, tmp_path / "three", budget=BudgetSettings(layers=3), healing=tied))
    given = {"source": str(tmp_path / "three"), "healing": tied}
    summary = compress_run(config(here, tmp_path / "two", **given))
    assert (summary["num_layers"], summary["independent_layers"]) == (4, 2)


@pytest.mark.parametrize("changes", [{"residual_scaling": 1.0}, {"policy": "mixture"}])
def test_what_was_trained_scaled_or_mixed_is_the_model_that_is_compressed(here, tmp_path, changes):
    """The teacher does what the run's best weights do, and the student starts from it."""
    usual = {"policy": "cycle", "groups": 2, "nlayers": 4, "max_steps": 12, "untied": "*ln_*"}
    run = small(here, exp=tmp_path.name, **usual | changes)
    train(run)
    source, (teacher, size) = load(run.folder), open_model(run.folder)
    assert size == source.num_parameters() < teacher.num_parameters()
    ids = torch.arange(16)[None]
    torch.testing.assert_close(teacher(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-5)
    asked = config(here, tmp_path / "small", source=str(run.folder))
    summary = compress_run(replace(asked, budget=BudgetSettings(layers=3)))
    assert summary["independent_layers"] == 3
    assert summary["parameters_after"] == sum(
        p.numel() for p in load(tmp_path / "small").parameters()
    )


def complaint(capsys, *arguments):
    assert main(["compress", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert not out and line.startswith("layer-tying")
    return line


def test_bad_input_ends_in_one_line(here, tmp_path, capsys):
    model, text = here / "runs" / "gpt2", here / "text.txt"
    usual = ("--output", tmp_path / "small", "--data", text, "--layers", "2", *FLAGS)
    assert "is no model" in complaint(capsys, tmp_path, *usual)
    assert "give the size" in complaint(capsys, model, "--output", tmp_path / "x", "--data", text)
    assert "name the data" in complaint(capsys, model, "--output", tmp_path / "x", "--layers", "2")
    assert "into itself" in complaint(capsys, model, *usual, "--output", model)
    assert "too small" in complaint(capsys, model, *usual, "--bytes", "100")
    assert "longer than the model's context" in complaint(capsys, model, *usual, "--bptt", "500")
    assert "unknown" in complaint(capsys, model, *usual, "--data", "no-such-text")


def test_images_that_do_not_fit_are_refused(here, tmp_path, capsys):
    usual = ("--output", tmp_path / "small", "--layers", "2", *FLAGS)
    for size, says in ((8, "in 2 classes, and the model tells 10"), (12, "of 12 x 12 x 1")):
        x = np.random.default_rng(0).integers(256, size=(40, size, size, 1), dtype=np.uint8)
        file = tmp_path / f"{size}.npz"
        np.savez(file, x_train=x, y_train=np.arange(40) % 2, x_test=x, y_test=np.arange(40) % 2)
        assert says in complaint(capsys, here / "runs" / "vit", *usual, "--data", file)


def test_a_text_that_is_too_short_is_refused(here, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short\n")
    usual = ("--output", tmp_path / "small", "--layers", "2", *FLAGS)
    line = complaint(capsys, here / "runs" / "gpt2", *usual, "--data", tmp_path / "short.txt")
    assert "short" in line


def test_a_model_without_tokenizer_or_with_nan_is_refused(here, tmp_path, capsys):
    usual = ("--output", tmp_path / "small", "--data", here / "text.txt", "--layers", "2", *FLAGS)
    shutil.copytree(here / "plain", tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer.json").unlink()
    assert "no tokenizer.json" in complaint(capsys, tmp_path / "plain", *usual)
    shutil.copy(here / "plain" / "tokenizer.json", tmp_path / "plain")
    file = tmp_path / "plain" / "model.safetensors"
    weights = load_file(file)
    weights["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    assert "not finite" in complaint(capsys, tmp_path / "plain", *usual)


def test_a_folder_with_a_compression_is_not_overwritten_unasked(small_one, here, capsys):
    usual = ("--output", here / "small", "--data", here / "text.txt", "--layers", "2", *FLAGS)
    model = here / "runs" / "gpt2"
    choice = (here / "small" / "run" / "choice.json").read_bytes()
    assert "holds a run" in complaint(capsys, model, *usual)
    line = complaint(capsys, model, *usual, "--resume", "--temperature", "2")
    assert "temperature is 1.0 in the saved one and 2.0 in the other" in line
    assert (here / "small" / "run" / "choice.json").read_bytes() == choice
    assert "contradict" in complaint(capsys, model, *usual, "--resume", "--overwrite")


def test_weights_that_have_changed_meanwhile_are_noticed(here, tmp_path):
    """The choice was measured on other weights than those that are there now."""
    shutil.copytree(here / "plain", tmp_path / "plain")
    options = config(here, tmp_path / "small", source=str(tmp_path / "plain"))
    assert in_process(compress_until, options, "step", 5, signal.SIGKILL) < 0
    file = tmp_path / "plain" / "model.safetensors"
    weights = load_file(file)
    weights["transformer.ln_f.weight"] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match="no longer those"):
        compress_run(options, resume=True)


def test_data_that_have_changed_meanwhile_are_noticed(here, tmp_path):
    shutil.copy(here / "text.txt", tmp_path / "text.txt")
    options = config(here, tmp_path / "small", dataset=str(tmp_path / "text.txt"))
    assert in_process(compress_until, options, "step", 5, signal.SIGKILL) < 0
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:40] + text)
    with pytest.raises(InputError, match=r"the data in .*text\.txt are no longer those"):
        compress_run(options, resume=True)


def test_a_model_is_found_again_where_it_lies_now(here, tmp_path):
    options = config(here, tmp_path / "small")
    assert in_process(compress_until, options, "step", 5, signal.SIGKILL) < 0
    elsewhere = replace(options, source=f"{options.source}/", data_dir=str(here))
    assert compress_run(elsewhere, resume=True)["steps"] == 20


def test_what_cannot_be_done_is_said_before_anything_is(here, tmp_path, capsys):
    """A budget, other people's files and runs, and a saved configuration that is damaged."""
    model, small = here / "runs" / "gpt2", tmp_path / "small"
    usual = ("--data", here / "text.txt", "--layers", "2", *FLAGS)
    one = ("--data", here / "text.txt", "--layers", "1", *FLAGS, "--output", small)
    assert "two independent layers or more" in complaint(capsys, model, *one)
    assert not small.exists()
    small.mkdir()
    (small / "README.md").write_text("mine")
    assert "holds README.md" in complaint(capsys, model, *usual, "--output", small)
    bert = here / "runs" / "bert"
    assert "holds a run" in complaint(capsys, model, *usual, "--output", bert, "--overwrite")
    read_config(bert)
    (small / "run").mkdir()
    (small / "run" / "config.json").write_text("{")
    line = complaint(capsys, model, *usual, "--output", small, "--resume")
    assert "config.json cannot be used" in line
    assert (small / "README.md").read_text() == "mine"


def test_damaged_weights_and_models_without_a_size_are_one_line(here, tmp_path, capsys):
    usual = ("--output", tmp_path / "small", "--layers", "2", *FLAGS)
    shutil.copytree(here / "plain", tmp_path / "plain")
    file = tmp_path / "plain" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    line = complaint(capsys, tmp_path / "plain", *usual, "--data", here / "text.txt")
    assert "cannot be loaded" in line
    shape = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 10}
    resnet = transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape))
    resnet.save_pretrained(tmp_path / "resnet")
    assert "cannot share weights" in complaint(
        capsys, tmp_path / "resnet", *usual, "--data", "digits"
    )
    asked = config(here, tmp_path / "small", dataset="digits")
    with pytest.raises(InputError, match="ResNetForImageClassification has no image_size"):
        kind_of(resnet).task(asked, resnet, None)


def test_classes_are_told_by_their_names(here):
    """A model may number its classes in another order than the folders of images have."""
    images = load_images("digits", None)
    model = load(here / "runs" / "vit")
    model.config.id2label = {9 - number: name for number, name in enumerate(images.classes)}
    found = _as_numbered_by(model, images)
    assert [found.classes[label] for label in found.y_test] == [
        images.classes[label] for label in images.y_test
    ]
    assert (found.y_test == 9 - images.y_test).all()
    model.config.id2label[0] = "zero"
    with pytest.raises(InputError, match="the images have a class '9'"):
        _as_numbered_by(model, images)
    model.config.id2label = {number: f"LABEL_{number}" for number in range(10)}
    assert _as_numbered_by(model, images) is images


def test_the_budget_of_bytes_holds_for_the_file(here, tmp_path):
    limit = 40_000
    summary = compress_run(
        config(here, tmp_path / "small", budget=BudgetSettings(bytes=limit), export_dtype="bf16")
    )
    assert summary["bytes_after"] <= limit
    assert find_layers(load(tmp_path / "small"))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_weights_in_half_precision_go_with_a_processor_that_computes_in_bf16(
    here, tmp_path, monkeypatch, dtype
):
    monkeypatch.setattr(precision, "_cpu_computes_in_bf16", lambda: True)
    small, budget = tmp_path / "small", BudgetSettings(layers=2)
    auto = OptimizationConfig(max_steps=2, precision="auto")
    options = {"budget": budget, "optimization": auto, "export_dtype": dtype}
    assert math.isfinite(compress_run(config(here, small, **options))["after"]["test"]["loss"])
    again = compress_run(config(here, tmp_path / "again", source=str(small), **options))
    assert math.isfinite(again["after"]["test"]["loss"])


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 40_000), ("int8", 26_000)])
def test_the_quality_that_is_said_is_that_of_the_file(here, tmp_path, dtype, limit):
    small = tmp_path / "small"
    changes = {"budget": BudgetSettings(bytes=limit), "export_dtype": dtype}
    summary = compress_run(config(here, small, healing=HealingSettings(sharing="tied"), **changes))
    assert summary["bytes_after"] <= limit < 1.5 * summary["bytes_after"]
    again = config(here, tmp_path / "again", source=str(small), export_dtype=dtype)
    before = compress_run(again)["before"]["test"]["perplexity"]
    assert summary["after"]["test"]["perplexity"] == pytest.approx(before, rel=1e-6)
