"""k-hop induction as a task: scores against those worked out from logits, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from layer_tying.core.tying import Tying
from layer_tying.data.config import DataConfig
from layer_tying.data.khop import held_out, hops_in
from layer_tying.errors import InputError
from layer_tying.models.build import build_model
from layer_tying.models.config import ModelConfig
from layer_tying.tasks.base import build_task

DATA = DataConfig(dataset="khop:2", bptt=20, batch_size=4, eval_batch_size=300)


def shape(family: str) -> ModelConfig:
    return ModelConfig(family, nlayers=2, nhead=2, emsize=16)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores_are_those_of_the_logits(family):
    task = build_task(DATA, shape(family), seed=0)
    torch.manual_seed(0)
    model = build_model(task.model_config, Tying.all_tied(2))
    inputs, labels = held_out("test", 20, 2)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.from_numpy(inputs)).logits.double()
    nats = torch.nn.functional.cross_entropy(logits.mT, torch.from_numpy(labels))
    scores = task.scores(model, "test")
    assert scores["loss"] == pytest.approx(float(nats), rel=1e-5)
    assert scores["perplexity"] == math.exp(scores["loss"])
    is_hit, has_label = logits.argmax(-1).numpy() == labels, labels >= 0
    assert scores["accuracy"] == pytest.approx(is_hit[has_label].mean())
    for number in (1, 2):
        chosen = has_label & (hops_in(inputs) == number)[:, None]
        assert scores[f"accuracy_k{number}"] == pytest.approx(is_hit[chosen].mean())
    assert scores.keys() == {"loss", "perplexity", "accuracy", "accuracy_k1", "accuracy_k2"}
    assert task.scores(model, "validation", max_batches=1)["loss"] > 0


def test_loss_and_accuracy_of_a_batch_and_two_streams():
    task = build_task(DATA, shape("gpt2"), seed=0)
    model = build_model(task.model_config, Tying.all_tied(2)).eval()
    batch, other = next(task.batches), next(task.reward_batches)
    assert batch[0].shape == (4, 20) and not np.array_equal(batch[0], other[0])
    assert task.loss(model, batch).item() == pytest.approx(math.log(7), abs=0.5)
    assert 0 <= task.accuracy(model, batch) <= 1
    assert (task.tokens_per_batch, task.batches_per_epoch) == (80, 2500)
    assert task.facts == build_task(DATA, shape("llama"), seed=1).facts


def test_masked_models_are_refused():
    with pytest.raises(InputError, match="khop:2 is for causal models: take --objective causal"):
        build_task(DATA, shape("bert"), seed=0)


def test_images_are_not_hops():
    with pytest.raises(InputError, match="unknown image data set 'khop:2'"):
        build_task(DATA, shape("vit"), seed=0)
