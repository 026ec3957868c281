"""What is trained on what: scores against those worked out another way, and what is saved.

Where $LAYER_TYING_DATA names real data sets, a few steps are trained on them as well.
"""

import json
import math
import os
import random

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from small_runs import WORDS, lines_of, small, write_text

from layer_tying.core.tying import Tying
from layer_tying.data import sources, tokens
from layer_tying.data.texts import load_last_words
from layer_tying.data.tokenizer import read_tokenizer
from layer_tying.models.build import build_model
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.evaluate import evaluate_run
from layer_tying.runs.precision import autocast, choose_attention
from layer_tying.runs.tasks import task_of
from layer_tying.runs.train import train

pytestmark = pytest.mark.numerics

REAL = os.environ.get(sources.ENVIRONMENT)


@pytest.fixture
def data(tmp_path):
    """WikiText-2 and LAMBADA in little, in the layouts that are read."""
    rng = random.Random(0)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(6, 12)))

    wiki = tmp_path / "wikitext2"
    wiki.mkdir()
    for split, number in (("train", 100), ("valid", 20), ("test", 20)):
        (wiki / f"{split}.txt").write_text("".join(f" {sentence()} \n" for _ in range(number)))
    (tmp_path / "lambada").mkdir()
    passages = (json.dumps({"text": f"{sentence()} {sentence()} blue bird"}) for _ in range(200))
    (tmp_path / "lambada/lambada_test.jsonl").write_text("\n".join(passages) + "\n")
    return tmp_path


def config_of(folder, **changes) -> TrainConfig:
    return small(folder, **{"data_dir": str(folder), "policy": "none"} | changes)


def model_of(task):
    torch.manual_seed(0)
    model = build_model(task.model_config, Tying.independent(3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


# Text


@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_loss_and_accuracy_of_a_batch_are_those_of_its_logits(data, family, objective):
    task = task_of(config_of(data, dataset="wiki2", family=family, objective=objective))
    model = model_of(task)
    inputs, labels = next(task.batches)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(inputs)).logits.numpy()
        loss = float(task.loss(model, (inputs, labels)))
        accuracy = task.accuracy(model, (inputs, labels))
    nats, hits = [], []
    for values, label in zip(logits.reshape(-1, logits.shape[-1]), labels.flatten(), strict=True):
        if label >= 0:
            nats.append(logsumexp(values.astype(np.float64)) - values[label])
            hits.append(values.argmax() == label)
    assert len(nats) < labels.size or family != "bert" or objective == "causal"
    assert loss == pytest.approx(np.mean(nats), rel=1e-5)
    assert accuracy == pytest.approx(np.mean(hits))


def test_perplexity_is_given_per_token_per_word_and_as_bits_per_byte(data):
    task = task_of(config_of(data, dataset="wiki2"))
    scores = task.scores(model_of(task), "test")
    text = (data / "wikitext2/test.txt").read_text()
    words = len(text.split()) + text.count("\n")
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    # The tokens are bytes, so that the three follow from each other.
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] / math.log(2))
    per_word = math.exp(scores["loss"] * len(text) / words)
    assert scores["word_perplexity"] == pytest.approx(per_word, rel=1e-9)


def test_a_masked_model_is_scored_by_its_guesses_and_not_by_bytes(data):
    task = task_of(config_of(data, dataset="wiki2", family="bert", eval_batch_size=4))
    model = model_of(task)
    scores = task.scores(model, "validation", max_batches=2)
    assert scores.keys() == {"loss", "perplexity", "masked_accuracy"}
    assert task.scores(model, "validation", max_batches=2) == scores
    inputs, labels = (part[:8] for part in task._windows["validation"])
    with torch.no_grad():
        best = model(input_ids=torch.from_numpy(inputs)).logits.argmax(-1).numpy()
    hits = (best == labels)[labels >= 0]
    assert 0 < len(hits) < labels.size
    assert scores["masked_accuracy"] == pytest.approx(hits.mean())


def test_a_masked_batch_is_evaluated_by_one_run_of_the_model(data):
    task = task_of(config_of(data, dataset="wiki2", family="bert", eval_batch_size=4))
    model, runs = model_of(task), []
    model.base_model.register_forward_hook(lambda *_: runs.append(1))
    task.scores(model, "validation", max_batches=3)
    assert len(runs) == 3


def test_lambada_is_scored_by_its_last_words_too(data):
    settings = {"tokenizer": "bpe:330", "max_steps": 80, "batch_size": 16, "emsize": 32}
    config = config_of(data, dataset="lambada", lr=0.01, **settings)
    summary = train(config)
    # Every passage ends in "blue bird", and the model has learned it from those it trained on.
    assert summary["last_word_accuracy"] == summary["test_last_word_accuracy"] > 0.3
    assert "validation_last_word_accuracy" not in summary
    assert evaluate_run(config.folder, "test")["last_word_accuracy"] == pytest.approx(
        summary["last_word_accuracy"]
    )
    task = task_of(config)
    assert task._last_words == load_last_words("lambada", data)
    assert 0 < len(task._last_words) <= 10


def test_last_words_are_not_asked_of_a_masked_model(data):
    task = task_of(config_of(data, dataset="lambada", family="bert"))
    assert "last_word_accuracy" not in task.scores(model_of(task), "test")


def test_a_run_keeps_its_tokenizer(data):
    config = config_of(data, dataset="wiki2", tokenizer="bpe:280", max_steps=2)
    train(config)
    saved = read_tokenizer(config.folder / "tokenizer")
    tokenizer = task_of(config).tokenizer
    text = "the cat sat on Ωmega"
    assert saved.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert saved.special_ids == tokenizer.special_ids


# Images


def test_images_need_no_flag_but_the_family(tmp_path):
    config = TrainConfig.from_flat(
        **{"family": "vit", "nlayers": 2, "emsize": 16, "max_steps": 150, "batch_size": 64},
        **{"policy": "dqn", "every": 50, "reward": "accuracy", "precision": "fp32", "lr": 0.01},
        **{"eval_every": 75, "save_every": 150},
        output_dir=str(tmp_path),
    )
    summary = train(config)
    assert summary["dataset"] == "digits"
    assert summary["accuracy"] == summary["test_accuracy"] > 0.15
    assert summary["test_perplexity"] == pytest.approx(math.exp(summary["test_loss"]))
    rewards = [line["reward"] for line in lines_of(config.folder / "tying.jsonl")[1:]]
    assert all(0 <= reward <= 1 and reward * 64 == int(reward * 64) for reward in rewards)
    assert rewards[-1] > rewards[0]
    last = lines_of(config.folder / "metrics.jsonl")[-1]
    assert 0 <= last["validation_accuracy"] <= 1
    assert not (config.folder / "tokenizer").exists()


def test_the_usual_reward_of_images_is_minus_the_exponential_of_the_cross_entropy(tmp_path):
    config = small(tmp_path, family="vit", dataset="digits", max_steps=1, every=1)
    train(config)
    (line,) = lines_of(config.folder / "tying.jsonl")[1:]
    assert line["reward"] == pytest.approx(-10, abs=3)


# Real data


@pytest.mark.skipif(not REAL, reason="LAYER_TYING_DATA names no data")
@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"family": "vit", "dataset": "cifar10"}, {"accuracy"}),
        ({"dataset": "lambada"}, {"last_word_accuracy", "bits_per_byte"}),
        ({"dataset": "1b"}, {"test_word_perplexity", "bits_per_byte"}),
    ],
    ids=lambda value: str(value.get("dataset")) if isinstance(value, dict) else "",
)
def test_a_few_steps_on_real_data(tmp_path, monkeypatch, changes, measured):
    config = small(tmp_path, max_steps=5, bptt=64, eval_batch_size=64, **changes)
    monkeypatch.setattr(tokens, "cache_folder", lambda: tmp_path / "cache")
    assert measured <= train(config).keys()


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit"])
def test_short_sequences_attend_by_matrix_products_on_a_cpu_to_the_same_loss(tmp_path, family):
    data = {"dataset": "digits"} if family == "vit" else {"dataset": str(write_text(tmp_path))}
    config = small(tmp_path, policy="none", family=family, precision="bf16", **data)
    task = task_of(config)
    torch.manual_seed(0)
    model = build_model(task.model_config, Tying.independent(3)).eval()
    batch = next(task.batches)
    usual = model.config._attn_implementation
    losses = []
    for _ in range(2):
        with torch.no_grad(), autocast(config.optimization.precision, model.device):
            losses.append(float(task.loss(model, batch)))
        choose_attention(model, config.optimization.precision, config.data.bptt)
    assert usual != "eager"
    assert model.config._attn_implementation == "eager"
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.parametrize("changes", [{"precision": "fp32"}, {"precision": "bf16", "bptt": 300}])
def test_other_sequences_attend_by_the_fused_kernel(tmp_path, changes):
    write_text(tmp_path, num_lines=400)
    config = small(tmp_path, policy="none", **changes)
    model = build_model(task_of(config).model_config, Tying.independent(3))
    usual = model.config._attn_implementation
    choose_attention(model, config.optimization.precision, config.data.bptt)
    assert model.config._attn_implementation == usual != "eager"
