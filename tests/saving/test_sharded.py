"""Checkpoints of sharded models, saved on one number of processes and resumed on another."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from many_processes import on_ranks
from tiny_models import Plain
from torch import nn
from torch.distributed.tensor import DTensor

from layer_tying import DynamicTying, InputError, TiedLayers, Tying, shard_tied_layers, tie
from layer_tying.core import distributed
from layer_tying.saving.sharded import load_sharded, save_sharded

STEPS, SAVED = 8, 5
Outcome = tuple[list[float], list[tuple[int, ...]], dict[str, torch.Tensor]]


def made(optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer, DynamicTying, TiedLayers]:
    torch.manual_seed(0)
    model = Plain()
    if dist.is_initialized() and distributed.world_size() > 1:
        shard_tied_layers(TiedLayers(model))
    options: dict[str, Any] = {"AdamW": {"eps": 1e-4}, "SGD": {"momentum": 0.9}}[optimizer]
    made_of = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3, **options)
    tying = DynamicTying(model, made_of, "dqn", every=1, seed=3)
    layers = tying.layers
    assert isinstance(layers, TiedLayers)
    return model, made_of, tying, layers


def train(folder: Path, optimizer: str, first: int, last: int) -> Outcome:
    """Steps from ``first`` to ``last``, of six rows each; saved at the end of each part."""
    model, made_of, tying, layers = made(optimizer)
    if first:
        tying.load_state_dict(load_sharded(folder, layers))
    losses, states = [], []
    for step in range(first, last):
        x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(step))
        loss = model(distributed.dealt(x)).square().mean()  # type: ignore[call-overload]
        loss.backward()
        made_of.step()
        made_of.zero_grad()
        tying.step(reward=lambda value=loss: -value.item())
        losses.append(distributed.mean(loss.item()))
        states.append(tying.tying.owners)
    layers.verify()
    if last == SAVED:
        save_sharded(folder, layers, tying.state_dict())
    weights = {n: whole(p) for n, p in model.named_parameters()}
    return losses, states, weights


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("optimizer", "saving", "resuming"), [("AdamW", 3, (1, 2)), ("SGD", 1, (2,))]
)
def test_what_is_saved_on_some_processes_goes_on_on_others(tmp_path, optimizer, saving, resuming):
    ((losses, states, weights),) = on_ranks(1, train, tmp_path / "alone", optimizer, 0, STEPS)
    folder = tmp_path / "saved"
    for before, before_states, _ in on_ranks(saving, train, folder, optimizer, 0, SAVED):
        assert before == pytest.approx(losses[:SAVED], rel=1e-5)
        assert before_states == states[:SAVED] and len(set(states)) > 3
    for world in resuming:
        for ours, our_states, our_weights in on_ranks(
            world, train, folder, optimizer, SAVED, STEPS
        ):
            assert ours == pytest.approx(losses[SAVED:], rel=1e-5)
            assert our_states == states[SAVED:]
            torch.testing.assert_close(our_weights, weights, rtol=1e-4, atol=1e-4)


def test_what_is_torn_or_of_another_model_is_refused(tmp_path):
    _, _, tying, layers = made("AdamW")
    save_sharded(tmp_path / "saved", layers, tying.state_dict())
    other = TiedLayers(Plain(width=4))
    with pytest.raises(InputError, match=r"embed.weight has shape \(8, 8\)"):
        load_sharded(tmp_path / "saved", other)
    assert other.tying.num_independent == 6
    larger = Plain()
    larger.extra = nn.Linear(8, 2)
    more = TiedLayers(larger)
    with pytest.raises(InputError, match=r"is of another model: it has no extra\.bias"):
        load_sharded(tmp_path / "saved", more)
    assert more.tying.num_independent == 6
    with pytest.raises(InputError, match="not a whole checkpoint"):
        load_sharded(tmp_path / "absent", layers)
    shutil.copytree(tmp_path / "saved", tmp_path / "torn")
    (tmp_path / "torn" / "state.json").unlink()
    with pytest.raises(InputError, match="not a whole checkpoint"):
        load_sharded(tmp_path / "torn", layers)
    for pattern, says in ((".metadata", "not a whole checkpoint"), ("*.distcp", "is damaged")):
        shutil.copytree(tmp_path / "saved", tmp_path / says)
        for file in (tmp_path / says).glob(pattern):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(InputError, match=says):
            load_sharded(tmp_path / says, layers)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_sharded(tmp_path / "file" / "saved", layers)


def test_state_that_no_checkpoint_holds_is_refused_before_anything_is_written(tmp_path):
    model, optimizer, _, layers = made("AdamW")
    optimizer.state[next(model.parameters())]["history"] = [torch.ones(2)]
    with pytest.raises(InputError, match=r"the optimizer's .*/history of type list"):
        save_sharded(str(tmp_path / "saved"), layers)
    assert not any(tmp_path.iterdir())


def test_a_foreign_state_is_no_checkpoint(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match="is not a whole checkpoint"):
        load_sharded(str(tmp_path), made("AdamW")[3])


def test_weights_that_the_model_would_not_read_are_refused(tmp_path):
    """Of two parts the checkpoint ties one, and the other has fewer weights in the model."""
    attention, rest = ["norm.*", "feed_forward*", "scale"], ["attention*"]  # left untied
    saved, model = Plain(), Plain()
    save_sharded(tmp_path / "saved", tie(saved, "cycle", 2, untied=attention))
    tie(model, "cycle", 3, untied=rest)
    layers = TiedLayers(model, untied=attention)
    with pytest.raises(InputError, match=r"blocks\.3\.\S+ of its own there, and not here"):
        load_sharded(tmp_path / "saved", layers)
    assert layers.tying.num_independent == 6
    TiedLayers(model, untied=rest).apply(Tying.independent(6))
    load_sharded(tmp_path / "saved", TiedLayers(model, untied=attention))
    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(model(x), saved(x), rtol=0, atol=0)
