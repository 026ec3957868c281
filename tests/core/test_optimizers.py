"""Other people's loops: any optimizer, schedule, scaler, checkpointing, and LoRA on top."""

import copy
import math
import random
import weakref
from collections.abc import Iterator

import pytest
import torch
import transformers
from checks import fake_step
from tiny_models import Plainest, gpt2, llama, loss_of, random_tying, tokens
from tolerance import assert_close
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from layer_tying import DynamicTying, RandomPolicy, TiedLayers, Tying, untied_copy
from layer_tying.saving.training_state import load_optimizer_state_by_name, optimizer_state_by_name

pytestmark = pytest.mark.numerics


class Lion(Optimizer):
    """Chen et al. 2023, as one would write it in an afternoon."""

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.99), weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(fast * m + (1 - fast) * p.grad))
                m.mul_(slow).add_(p.grad, alpha=1 - slow)


def torchao_8bit(groups):
    return pytest.importorskip("torchao.optim").AdamW8bit(groups, lr=1e-3)


def bitsandbytes_8bit(groups):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(groups, lr=1e-3)


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    "AdamW, one by one": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=False),
    "AdamW, fused, amsgrad": lambda g: torch.optim.AdamW(g, lr=1e-3, fused=True, amsgrad=True),
    "SGD, momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "Adafactor of torch": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "Adafactor of transformers": lambda groups: transformers.Adafactor(
        groups, lr=1e-3, relative_step=False, beta1=0.9
    ),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-4, momentum=0.9, centered=True),
    "Lion": lambda groups: Lion(groups, lr=1e-4),
    "8-bit Adam of torchao": torchao_8bit,
    "8-bit Adam of bitsandbytes": bitsandbytes_8bit,
}
EVERY = pytest.mark.parametrize("name", OPTIMIZERS)


def wide_gpt2() -> transformers.GPT2LMHeadModel:
    """Wide enough that 8-bit optimizers quantise its moments (from 4096 values on)."""
    config = transformers.GPT2Config(
        n_layer=6, n_head=2, n_embd=64, n_positions=32, vocab_size=40, bos_token_id=None
    )
    config.eos_token_id = None
    return transformers.GPT2LMHeadModel(config).eval()


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    """Three groups: embeddings with a rate of their own, other matrices, vectors."""
    inside = {p for n, p in model.named_parameters() if ".h." in n}
    return [
        {"params": [p for p in model.parameters() if p not in inside], "lr": 5e-4},
        {"params": [p for p in inside_in_order(model) if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in inside_in_order(model) if p.ndim == 1], "weight_decay": 0.0},
    ]


def inside_in_order(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".h." in name]


def tensors_in(tree: object) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)


@EVERY
def test_random_tying_with_groups_and_a_schedule(name):
    torch.manual_seed(0)
    model = wide_gpt2()
    optimizer = OPTIMIZERS[name](groups_of(model))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    tying = DynamicTying(model, optimizer, every=2, policy=RandomPolicy(0), initial="none")
    group_of = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    belongs = {n: group_of[id(p)] for n, p in model.named_parameters()}
    losses = []
    for _ in range(12):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tying.step(reward=lambda: 0.0)
        tying.layers.verify()
        group_of = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        assert {n: group_of[id(p)] for n, p in model.named_parameters()}.items() <= belongs.items()
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    wanted = [float(rate) for rate in schedule.get_last_lr()]
    assert rates == pytest.approx(wanted) and rates[0] != rates[1]


@EVERY
def test_an_untied_layer_goes_on_with_a_copy_of_the_optimizers_state(name):
    """Given equal gradients, a layer and the one that was split off it stay equal, bit for bit."""
    torch.manual_seed(0)
    model = wide_gpt2()
    optimizer = OPTIMIZERS[name](groups_of(model))
    layers = TiedLayers(model, optimizer)
    layers.apply(Tying.all_tied(6))

    def step(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        gradients = {
            n: torch.randn(p.shape, generator=generator) for n, p in layers.parameters(0).items()
        }
        for layer in layers.tying.independent_layers:
            for n, p in layers.parameters(layer).items():
                p.grad = gradients[n].clone()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(3):
        step(seed)
    layers.apply(Tying((0, 0, 0, 3, 3, 3)))
    for seed in range(3, 6):
        step(seed)
    for n, p in layers.parameters(0).items():
        other = layers.parameters(3)[n]
        assert other is not p and torch.equal(other, p), n
        for key, value in optimizer.state[p].items():
            theirs = optimizer.state[other][key]
            if is_traceable_wrapper_subclass(value):  # torchao's 8-bit moments
                assert torch.equal(value.codes, theirs.codes), key
                assert value.codes.data_ptr() != theirs.codes.data_ptr(), key
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, theirs), key
                assert value.data_ptr() != theirs.data_ptr(), key


@EVERY
def test_nothing_dead_is_kept(name):
    torch.manual_seed(0)
    model = wide_gpt2()
    optimizer = OPTIMIZERS[name](groups_of(model))
    layers = TiedLayers(model, optimizer)
    rng = random.Random(0)
    for _ in range(4):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = [weakref.ref(p) for p in model.parameters()]
        before += [weakref.ref(t) for p in optimizer.state.values() for t in tensors_in(p)]
        layers.apply(random_tying(rng, 6))
        live = {id(p) for p in model.parameters()}
        live |= {id(t) for p in optimizer.state.values() for t in tensors_in(p)}
        kept = [ref() for ref in before if ref() is not None and id(ref()) not in live]
        assert not kept, "a tensor outlives the layer that it was of"


@EVERY
def test_state_by_name_comes_back(name):
    if "torchao" in name:
        pytest.skip("its quantised tensors are a class of their own, which safetensors cannot hold")
    torch.manual_seed(0)
    model = wide_gpt2()
    optimizer = OPTIMIZERS[name](groups_of(model))
    layers = TiedLayers(model, optimizer)
    layers.apply(Tying((0, 0, 2, 2, 2, 5)))
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(optimizer_state_by_name(model, optimizer))
    twin = copy.deepcopy(model)
    other = OPTIMIZERS[name](groups_of(twin))
    load_optimizer_state_by_name(twin, other, saved)
    for its in (optimizer, other):  # equal gradients, so that the step is equal to the last bit
        fake_step(its, torch.Generator().manual_seed(1))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_steps_are_counted_where_the_optimizer_counts_them():
    """torch keeps them on the CPU unless it is fused or capturable."""
    for fused in (False, True):
        model = nn.Linear(4, 4, device="meta")
        optimizer = torch.optim.AdamW(model.parameters(), fused=False)
        optimizer.param_groups[0]["fused"] = fused
        state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4, 4)}
        load_optimizer_state_by_name(model, optimizer, {"weight": state})
        loaded = optimizer.state[model.weight]
        assert loaded["exp_avg"].is_meta and loaded["step"].is_meta == fused


# The rest of a loop


def test_a_schedule_that_changes_momenta():
    torch.manual_seed(0)
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=12)
    tying = DynamicTying(model, optimizer, every=1, policy=RandomPolicy(0))
    for _ in range(12):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tying.step(reward=lambda: 0.0)
        tying.layers.verify()
    assert math.isfinite(loss.item())
    assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]


def test_grad_scaler_skips_steps_and_goes_on():
    torch.manual_seed(0)
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    tying = DynamicTying(model, optimizer, every=1, policy=RandomPolicy(0))
    for step in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        scaler.scale(loss * (math.inf if step == 4 else 1)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert math.isfinite(norm) == (step != 4)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        moved = any(
            not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True)
        )
        assert moved == (step != 4)
        scaler.update()
        optimizer.zero_grad()
        tying.step(reward=lambda: 0.0)
        tying.layers.verify()
    assert scaler.get_scale() == 2.0**9
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("gradient", ["sum", "owner"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_gradient_checkpointing_gives_the_same_gradients(make, gradient):
    torch.manual_seed(0)
    model = make().train()
    TiedLayers(model, gradient=gradient).apply(Tying.from_labels("abbaab"))
    loss_of(model).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model).backward()
    for p, gradient_of_p in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient_of_p, rtol=1e-5, atol=1e-7)


def lora(untied: list[str]) -> tuple[nn.Module, Optimizer, DynamicTying]:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False)
    model = peft.get_peft_model(gpt2(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tying = DynamicTying(
        model, optimizer, every=2, policy=RandomPolicy(1), initial="none", untied=untied
    )
    return model, optimizer, tying


@pytest.mark.parametrize("untied", [[], ["*lora_*"]])
def test_lora_on_top(untied):
    model, optimizer, tying = lora(untied)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    base = [p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n]
    losses = []
    for _ in range(10):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tying.step(reward=lambda: 0.0)
        tying.layers.verify()
    assert all(map(math.isfinite, losses))
    owners = tying.tying.owners
    assert len(set(owners)) < 6
    blocks = model.base_model.model.transformer.h
    for layer, owner in enumerate(owners):
        mine, its = blocks[layer].mlp.c_fc, blocks[owner].mlp.c_fc
        assert mine.base_layer.weight is its.base_layer.weight
        assert not mine.base_layer.weight.requires_grad
        adapter, its_adapter = (m.lora_A["default"].weight for m in (mine, its))
        assert (adapter is its_adapter) == (not untied or layer == owner)
    left = [p for n, p in model.named_parameters() if "lora_" in n]
    assert (len(left) == len(adapters)) == bool(untied)
    frozen = [p for n, p in model.named_parameters() if "lora_" not in n]
    assert all(any(torch.equal(p, was) for was in base) for p in frozen), "the base never moves"


def test_lora_is_saved_and_merged_as_usual(tmp_path):
    peft = pytest.importorskip("peft")
    model, optimizer, tying = lora(["*lora_*"])
    for _ in range(4):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = model.eval()(tokens()).logits
    model.save_pretrained(tmp_path)
    twin, _, _ = lora([])  # the same base, all layers independent
    twin.load_adapter(tmp_path, "default")
    assert_close(twin.eval()(tokens()).logits, wanted)
    assert tying.tying == Tying.independent(6)
    assert isinstance(model, peft.PeftModel)


@pytest.mark.parametrize("untied", [[], ["*lora_*"]])
def test_lora_is_merged_in_an_untied_copy(untied):
    model, _, tying = lora(untied)
    tying.layers.apply(Tying.from_labels("aaabbb"))
    wanted = model.eval()(tokens()).logits
    merged = untied_copy(model).merge_and_unload()
    assert_close(merged(tokens()).logits, wanted)
    assert type(merged) is type(gpt2())
    wrong = copy.deepcopy(model).merge_and_unload()  # why the documentation says so
    assert not torch.allclose(wrong(tokens()).logits, wanted, atol=1e-3)


def test_an_average_of_weights_by_name():
    """The recipe of the documentation, against one kept without sharing."""
    torch.manual_seed(0)
    model = Plainest()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tying = DynamicTying(model, optimizer, every=1, policy=RandomPolicy(0), initial="none")

    def named():
        return dict(model.named_parameters(remove_duplicate=False))

    average = {name: p.detach().clone() for name, p in named().items()}
    wanted = {name: p.detach().double() for name, p in named().items()}
    for _ in range(6):
        model(tokens(), labels=tokens())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        tying.step(reward=lambda: 0.0)
        with torch.no_grad():
            for name, p in named().items():
                average[name].lerp_(p, 0.25)
        for name, p in named().items():
            wanted[name] = 0.75 * wanted[name] + 0.25 * p.detach().double()
    assert average.keys() == wanted.keys() and len(average) > len(list(model.parameters()))
    for name, value in average.items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_a_pretrained_model_keeps_its_function_until_the_first_decision():
    torch.manual_seed(0)
    model = gpt2().eval()
    before = model(tokens()).logits.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tying = DynamicTying(model, optimizer, every=10, policy=RandomPolicy(0), initial="none")
    assert torch.equal(model(tokens()).logits, before)
    twin = gpt2().eval()
    twin.load_state_dict(model.state_dict())
    its_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    for each, its in ((model, optimizer), (twin, its_optimizer)):
        loss_of(each).backward()
        its.step()
        its.zero_grad()
    # As if we were not there: one step is a forward pass, a backward pass and a forward pass.
    assert_close(model(tokens()).logits, twin(tokens()).logits, layers=4 * 6)
    tying.step(reward=lambda: 0.0)
    assert tying.tying != Tying.independent(6)


@pytest.mark.parametrize("initial", ["all", Tying((0, 0, 2, 2, 4, 4))])
def test_a_pretrained_model_is_tied_down_to_its_owners_weights(initial):
    torch.manual_seed(0)
    model = gpt2()
    was = [p.detach().clone() for p in TiedLayers(model).parameters(2).values()]
    tying = DynamicTying(model, None, "dqn", initial=initial)
    owner = tying.tying.owners[2]
    now = list(TiedLayers(model).parameters(3).values())
    assert all(torch.equal(p, q) for p, q in zip(now, was, strict=True)) == (owner == 2)
