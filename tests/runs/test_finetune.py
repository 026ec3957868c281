"""Fine-tuning: the backbone is the run's, padding does not matter, and something is learned."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from small_runs import crashed_at, lines_of, small, traces_of, write_text
from tolerance import assert_close

from layer_tying.cli import main
from layer_tying.core.find import MIXTURE
from layer_tying.core.tying import Tying
from layer_tying.data.glue import Example, encode
from layer_tying.data.tokenizer import load_tokenizer, read_tokenizer
from layer_tying.errors import InputError
from layer_tying.models.build import build_model
from layer_tying.paper.rows import TYINGS
from layer_tying.runs.config import SHAPE, TrainConfig, read_config
from layer_tying.runs.devices import make_accelerator
from layer_tying.runs.evaluate import evaluate_run
from layer_tying.runs.folder import RunFolder
from layer_tying.runs.from_run import best_checkpoint, load_backbone
from layer_tying.runs.resolve import resolve
from layer_tying.runs.tasks import task_of
from layer_tying.runs.train import train
from layer_tying.runs.trainer import Trainer
from layer_tying.saving.export_run import export_run
from layer_tying.saving.load import load

FAMILIES = ("gpt2", "llama", "bert")
TIED = Tying((0, 1, 0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a pretrained run of each family, and two tasks under glue/."""
    folder = tmp_path_factory.mktemp("finetune")
    write_text(folder)
    for family in FAMILIES:
        settings = {"policy": "fixed", "owners": "0,1,0,1", "nlayers": 4, "bptt": 24}
        train(small(folder, exp=family, family=family, **settings, max_steps=8))
    write_tasks(folder / "glue")
    return folder


def write_tasks(folder: Path) -> None:
    """SST-2 and CoLA where one word decides, and MRPC where two texts agree or do not."""
    rng = random.Random(0)
    words = ("the", "a", "film", "cat", "dog", "sat", "ran", "house")

    def sentence(label: int) -> str:
        drawn = [rng.choice(words) for _ in range(rng.randint(1, 4))]
        drawn.insert(rng.randint(0, len(drawn)), "good" if label else "bad")
        return " ".join(drawn)

    def rows(number: int) -> list[tuple[str, int]]:
        return [(sentence(i % 2), i % 2) for i in range(number)]

    for split, number in (("train", 200), ("dev", 40)):
        lines = {
            "SST-2": ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows(number))],
            "CoLA": [f"x\t{label}\t\t{text}" for text, label in rows(number)],
            "MRPC": [
                "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
                *(f"{label}\t1\t2\t{text}\t{'yes' * label}" for text, label in rows(number)),
            ],
        }
        for name, content in lines.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            text = "\n".join(content) + "\n"
            (folder / name / f"{split}.tsv").write_text(text, encoding="utf-8")


def finetuning(folder: Path, family: str, tying: str, **changes) -> TrainConfig:
    """A configuration as ``layer-tying finetune`` makes it."""
    pretrained = small(folder, nlayers=4, bptt=24, family=family)
    settings = {
        **{name: pretrained.flat()[name] for name in SHAPE},
        **{"task": "sst2", "source": str(folder / "runs" / family), "policy": TYINGS[tying]},
        **{"dataset": "", "data_dir": str(folder), "exp": f"{family}-{tying}", "every": 5},
    }
    return small(folder, **settings | changes)


def classifier_of(config: TrainConfig, tying: Tying):
    torch.manual_seed(1)
    model = build_model(task_of(config).model_config, tying).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # fresh weights are so small that a text hardly tells in the logits
    return model


@pytest.mark.numerics
@pytest.mark.numerics
@pytest.mark.parametrize("tying", ["keep", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_computes_what_the_run_did(folder, family, tying):
    config = finetuning(folder, family, tying)
    best = best_checkpoint(Path(config.tying.source))
    assert best.tying == TIED
    run = read_config(folder / "runs" / family)
    pretrained = build_model(task_of(run).model_config, best.tying).eval()
    best.load_weights(pretrained)
    target = best.tying if tying == "keep" else Tying.independent(4)
    classifier = classifier_of(config, target)
    load_backbone(Path(config.tying.source), classifier)
    ids = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = classifier.base_model(input_ids=ids).last_hidden_state
        theirs = pretrained.base_model(input_ids=ids).last_hidden_state
    assert_close(ours, theirs)
    assert ours.std() > 0.1


@pytest.mark.numerics
@pytest.mark.numerics
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_row_is_padded_to_does_not_matter(folder, family):
    """GPT-2 and Llama have to find the last token that is not padding."""
    config = finetuning(folder, family, "none")
    workload = task_of(config)
    model = classifier_of(config, Tying.independent(4))
    tokenizer = read_tokenizer(folder / "runs" / family / "tokenizer")
    examples = [Example("a", None, 0), Example("a cat sat on a mat", "yes", 1)]
    with torch.no_grad():
        together = workload._logits(model, encode(examples, tokenizer, 24))
        alone = [workload._logits(model, encode([each], tokenizer, 24))[0] for each in examples]
        other = workload._logits(model, encode([Example("b", None, 0)], tokenizer, 24))[0]
    assert_close(together, torch.stack(alone), layers=4)
    assert not torch.allclose(alone[0], other, atol=1e-4), "it does not look at the text"


@pytest.mark.numerics
def test_bert_is_told_which_text_a_token_is_of(folder):
    config = finetuning(folder, "bert", "none")
    workload = task_of(config)
    model = classifier_of(config, Tying.independent(4))
    tokenizer = read_tokenizer(folder / "runs/bert/tokenizer")
    batch = encode([Example("a cat", "a dog", 0)], tokenizer, 24)
    assert batch["token_type_ids"].sum() > 0
    with torch.no_grad():
        told = workload._logits(model, batch)
        zeros = np.zeros_like(batch["token_type_ids"])
        untold = workload._logits(model, batch | {"token_type_ids": zeros})
    assert not torch.allclose(told, untold, atol=1e-5)


def test_validation_is_held_out_of_training_and_dev_is_what_test_scores(folder):
    workload = task_of(finetuning(folder, "gpt2", "keep"))
    assert workload.batches_per_epoch == 180 / 4
    assert workload.facts["num_train"] == 180
    assert len(workload._splits["validation"]) == 20
    seen = {tuple(row) for _ in range(45) for row in texts(next(workload.batches))}
    train_rows = (folder / "glue/SST-2/train.tsv").read_text().splitlines()[1:]
    held = [example.text_a for example in workload._splits["validation"]]
    times = {text: sum(row.startswith(f"{text}\t") for row in train_rows) for text in held}
    unique = [text for text in held if times[text] == 1]
    assert unique, "every held-out sentence is in the training part too"
    encoded = {tuple(text.encode()) for text in unique}
    assert not seen & encoded
    assert len(workload._splits["test"]) == 40


def texts(batch: dict[str, np.ndarray]) -> list[list[int]]:
    """The bytes of each row, without special tokens."""
    return [[int(i) for i in row if i < 256] for row in batch["input_ids"]]


@pytest.mark.parametrize(
    ("tying", "first"), [("keep", [0, 1, 0, 1]), ("dynamic", [0, 1, 0, 1]), ("none", [0, 1, 2, 3])]
)
def test_it_learns_what_one_word_decides(folder, capsys, tying, first):
    code = main(
        [
            *("finetune", "--task", "sst2", "--from", str(folder / "runs/gpt2")),
            *("--tying", tying, "--data-dir", str(folder), "--output-dir", str(folder / "runs")),
            *("--max-steps", "80", "--batch-size", "16", "--lr", "0.005", "--every", "20"),
            *("--precision", "fp32", "--log-every", "20", "--eval-every", "40"),
        ]
    )
    assert code == 0
    run = folder / f"runs/gpt2-sst2-{tying}"
    states = [line["state"] for line in lines_of(run / "tying.jsonl")]
    assert states[0] == first
    assert len(states) == (5 if tying == "dynamic" else 1)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy"] == summary["test_accuracy"] > 0.8
    assert summary["dataset"] == "sst2"
    assert f"accuracy {summary['accuracy']:.3f}" in capsys.readouterr().out
    assert (run / "report.html").exists()


@pytest.mark.parametrize(("task", "metric"), [("cola", "matthews_correlation"), ("mrpc", "f1")])
def test_a_task_has_its_own_metric(folder, task, metric):
    config = finetuning(folder, "bert", "keep", task=task, exp=f"bert-{task}", max_steps=10)
    summary = train(config)
    assert {"accuracy", metric, f"validation_{metric}"} <= summary.keys()
    assert -1 <= summary[metric] <= 1
    again = evaluate_run(config.folder, "test")
    assert again[metric] == pytest.approx(summary[metric])
    assert again["accuracy"] == pytest.approx(summary["accuracy"])


def test_texts_longer_than_the_runs_sequences_are_cut(folder, tmp_path):
    write_tasks(tmp_path / "glue")
    file = tmp_path / "glue/SST-2/train.tsv"
    file.write_text(file.read_text() + "long " * 200 + "\t1\n")
    config = finetuning(folder, "gpt2", "keep", data_dir=str(tmp_path))
    workload = task_of(config)
    widths = {next(workload.batches)["input_ids"].shape[1] for _ in range(60)}
    assert max(widths) == 24


@pytest.mark.parametrize("step", [3, 17])  # the first checkpoint of training is after six
def test_a_crashed_fine_tuning_goes_on_exactly_without_the_run_it_is_from(folder, tmp_path, step):
    source = tmp_path / "llama"
    shutil.copytree(folder / "runs/llama", source)
    changes = {"family": "llama", "tying": "dynamic", "dropout": 0.1, "source": str(source)}
    changes |= {"output_dir": str(tmp_path)}
    alone = finetuning(folder, exp="alone", **changes)
    crashed = finetuning(folder, exp="crashed", **changes)
    summary = train(alone)
    crashed_at(crashed, step)
    shutil.rmtree(source)
    train(crashed, resume=True)
    assert traces_of(crashed.folder) == traces_of(alone.folder)
    assert evaluate_run(alone.folder, "test")["accuracy"] == summary["test_accuracy"]
    assert main(["export", str(alone.folder), "--output", str(tmp_path / "export")]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"emsize": 32}, "emsize is 32 here, but 16 in"),
        ({"source": "no-such-run"}, "no-such-run"),
        ({"data_dir": "no-such-folder"}, "no-such-folder"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, changes, said):
    config = finetuning(folder, "gpt2", "keep", **changes)
    with pytest.raises(InputError, match=said) as caught:
        train(config.replace(exp="refused"))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(folder):
    config = finetuning(folder, "gpt2", "keep")
    with pytest.raises(InputError, match=r"is of another model: its model\.\S+ does not fit"):
        load_backbone(
            Path(config.tying.source),
            classifier_of(finetuning(folder, "llama", "keep"), TIED),
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "wnli"], "wnli"),
        (["--task", "rte", "--tying", "some"], "some"),
        (["--task", "rte", "--lr", "0"], "lr"),
    ],
)
def test_bad_flags_end_in_one_line(folder, capsys, arguments, said):
    try:
        code = main(["finetune", "--from", str(folder / "runs/gpt2"), *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# What a source reads otherwise than as it is stored

SOURCES = {
    "mixed": {"policy": "mixture", "groups": 2, "lr": 1e-2},
    "scaled": {"policy": "cycle", "groups": 2, "residual_scaling": 1.0},
    "norms apart": {"policy": "cycle", "groups": 2, "untied": "*ln_*", "lr": 1e-2},
}


@pytest.mark.numerics
@pytest.mark.parametrize("tying", ["keep", "none"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_backbone_computes_what_the_source_did_whatever_it_reads(folder, name, tying):
    source = small(folder, exp=f"from-{name}", nlayers=4, bptt=24, max_steps=8, **SOURCES[name])
    if not (source.folder / "summary.json").exists():
        train(source)
    config = finetuning(folder, "gpt2", tying, source=str(source.folder), exp=f"{name}-{tying}")
    if (name, tying) == ("mixed", "keep"):
        config = config.replace(policy="mixture")
    config, task = resolve(config, torch.device("cpu"))
    trainer = Trainer(config, task, make_accelerator(), RunFolder(config.folder, active=False))
    trainer.load_pretrained(source.folder)
    ids = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = trainer.model.eval().base_model(input_ids=ids).last_hidden_state
        theirs = load(source.folder).base_model(input_ids=ids).last_hidden_state
    assert_close(ours, theirs)


@pytest.fixture(scope="module")
def mixed(folder):
    """A pretrained run of mixtures whose uses are not scaled."""
    settings = {"policy": "mixture", "groups": 2, "residual_scaling": 0.0, "lr": 1e-2}
    config = small(folder, exp="mixtures", nlayers=4, bptt=24, max_steps=8, **settings)
    train(config)
    return config.folder


def test_layers_that_mix_go_on_mixing(folder, mixed, tmp_path):
    """The command finds out what to keep; the model stays as small, and is exported compactly."""
    arguments = ["finetune", "--task", "sst2", "--from", str(mixed), "--data-dir", str(folder)]
    arguments += ["--max-steps", "40", "--batch-size", "16", "--lr", "0.005", "--exp", "mixing"]
    assert main([*arguments, "--output-dir", str(tmp_path), "--precision", "fp32"]) == 0
    config = read_config(tmp_path / "mixing")
    assert (config.tying.policy, config.tying.residual_scaling) == ("mixture", 0.0)
    summary = json.loads((tmp_path / "mixing/summary.json").read_text())
    assert summary["owners_end"] == [0, 1, 0, 1]
    assert summary["accuracy"] > 0.8
    export = [str(tmp_path / "mixing"), "--format", "compact", "--output", str(tmp_path / "export")]
    assert main(["export", *export]) == 0
    before = best_checkpoint(mixed).weights()
    after = load(tmp_path / "export").state_dict()
    coefficients = {name for name in before if name.endswith(MIXTURE)}
    assert coefficients
    assert coefficients <= after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in coefficients)


@pytest.mark.parametrize("step", [3, 17])
def test_a_crashed_fine_tuning_of_mixtures_goes_on_exactly(folder, mixed, tmp_path, step):
    source = tmp_path / "mixtures"
    shutil.copytree(mixed, source)
    changes = {"policy": "mixture", "dropout": 0.1, "source": str(source)}
    changes |= {"output_dir": str(tmp_path)}
    alone = finetuning(folder, "gpt2", "keep", exp="alone", **changes)
    crashed = finetuning(folder, "gpt2", "keep", exp="crashed", **changes)
    train(alone)
    crashed_at(crashed, step)
    shutil.rmtree(source)
    train(crashed, resume=True)
    assert traces_of(crashed.folder) == traces_of(alone.folder)


@pytest.mark.parametrize(
    ("source", "policy", "said"),
    [
        ("mixtures", "dqn", "--tying keep"),
        ("mixtures", "fixed", "--tying keep"),
        ("gpt2", "mixture", "do not mix"),
    ],
)
def test_what_no_tying_can_go_on_from_is_refused(folder, mixed, source, policy, said):
    config = finetuning(folder, "gpt2", "keep", policy=policy, source=str(folder / "runs" / source))
    with pytest.raises(InputError, match=said):
        resolve(config, torch.device("cpu"))


def test_a_run_is_evaluated_with_the_tokenizer_that_it_saved(folder, tmp_path):
    tokenizer = load_tokenizer("bpe:300", (folder / "text.txt").read_text(encoding="utf-8"))
    tokenizer.save(tmp_path / "mine")
    config = small(folder, exp="own-tokenizer", tokenizer=str(tmp_path / "mine"), max_steps=8)
    train(config)
    before = evaluate_run(config.folder, "test")
    shutil.rmtree(tmp_path / "mine")
    assert evaluate_run(config.folder, "test") == before


def test_a_run_that_is_replaced_leaves_no_tokenizer(folder):
    train(small(folder, exp="replaced", policy="none", max_steps=2))
    config = small(folder, exp="replaced", policy="none", dataset="khop:1", bptt=25, max_steps=2)
    train(config, overwrite=True)
    assert not (config.folder / "tokenizer").exists()


def test_the_run_that_is_fine_tuned_is_not_replaced(folder):
    source = folder / "runs/gpt2"
    before = {file: file.stat().st_mtime_ns for file in source.rglob("*") if file.suffix}
    config = finetuning(folder, "gpt2", "keep", exp="gpt2", max_steps=2)
    with pytest.raises(InputError, match="is what this run starts from: name another one"):
        train(config, overwrite=True)
    assert {file: file.stat().st_mtime_ns for file in source.rglob("*") if file.suffix} == before


def test_a_run_is_replaced_only_once_its_source_was_read(folder, tmp_path):
    source = tmp_path / "llama"
    shutil.copytree(folder / "runs/llama", source)
    changes = {"source": str(source), "output_dir": str(tmp_path), "exp": "tuned", "max_steps": 2}
    config = finetuning(folder, "llama", "none", **changes)
    train(config)
    shutil.rmtree(source / "checkpoints")
    with pytest.raises(InputError):
        train(config, overwrite=True)
    assert (config.folder / "summary.json").exists()


def test_the_command_goes_on_without_the_run_it_is_from(folder, tmp_path):
    source = tmp_path / "gpt2"
    shutil.copytree(folder / "runs/gpt2", source)
    command = ["finetune", "--task", "sst2", "--from", str(source), "--data-dir", str(folder)]
    command += ["--output-dir", str(tmp_path), "--max-steps", "4", "--batch-size", "4"]
    command += ["--every", "2", "--precision", "fp32"]
    assert main(command) == 0
    shutil.rmtree(source)
    assert main([*command, "--resume"]) == 0
    assert main(command) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_tokenizer_builds_what_the_classifier_was_trained_on(folder, family, tmp_path):
    changes = {"task": "mrpc", "max_steps": 2, "exp": f"{family}-exported"}
    run = finetuning(folder, family, "keep", **changes)
    train(run)
    export_run(run.folder, tmp_path, "expanded")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = read_tokenizer(run.folder / "tokenizer")
    for pair in (("a cat", "two dogs"), ("a cat", None)):
        wanted = encode([Example(*pair, 0)], ours, 24)
        found = tokenizer(*pair)
        assert found.input_ids == wanted["input_ids"][0].tolist()
        types = wanted["token_type_ids"][0].tolist() if family == "bert" else None
        assert found.get("token_type_ids") == types
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model(**tokenizer("a cat", "two dogs", return_tensors="pt"))
