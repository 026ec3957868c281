"""Checkpoints: everything comes back to the bit, and what is not whole is refused with a reason."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import Plain, gpt2
from torch import nn

import layer_tying
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError
from layer_tying.saving import checkpoint
from layer_tying.saving.checkpoint import (
    keep_newest,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    step_folder,
    unique_tensors,
)
from layer_tying.saving.training_state import (
    at_home,
    copied_where_shared,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    rng_state,
    set_rng_state,
    split_tree,
)

TYING = Tying((0, 0, 2, 2))
FILES = ("SHA256SUMS", "model.safetensors", "state.json", "training.safetensors")


def tied_gpt2(tying: Tying = TYING, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = gpt2(4)
    TiedLayers(model).apply(tying)
    return model


def save(folder: Path, step: int = 7, training: object = None, **options) -> Path:
    target = step_folder(folder, step)
    save_checkpoint(
        target, tied_gpt2(), TYING, step=step, config={"lr": 0.1}, training=training, **options
    )
    return target


TENSORS = st.builds(
    lambda shape, dtype: torch.arange(100)[: shape[0] * shape[1]].reshape(shape).to(dtype),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
) | st.just(torch.tensor(3.5))
LEAVES = (
    TENSORS
    | st.none()
    | st.booleans()
    | st.integers(-(2**130), 2**130)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
)
KEYS = st.text(st.sampled_from("ab/.1"), max_size=3) | st.integers(-3, 3)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def assert_same(one, other) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


@given(tree=TREES)
@example(tree={"a/b": torch.ones(1), "a": {"b": torch.zeros(2)}, 1: {}, "1": {}})
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_comes_back(tmp_path, tree):
    module = nn.Linear(1, 1)
    save_checkpoint(
        tmp_path / "x", module, Tying((0,)), step=3, config={}, facts={"a": [1]}, training=tree
    )
    found = read_checkpoint(tmp_path / "x")
    assert (found.step, found.tying, found.facts) == (3, Tying((0,)), {"a": [1]})
    assert_same(found.training_state(), tree)


def test_a_checkpoint_is_not_changed_by_what_is_done_with_it(tmp_path):
    folder = save(tmp_path, training={"moment": torch.ones(3)})
    found = read_checkpoint(folder)
    found.training_state()["moment"].add_(1)
    model = tied_gpt2(seed=1)
    found.load_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_same(read_checkpoint(folder).training_state(), {"moment": torch.ones(3)})


def test_weights_come_back_to_the_bit(tmp_path):
    found = read_checkpoint(save(tmp_path))
    model = tied_gpt2(seed=1)
    found.load_weights(model)
    expected = tied_gpt2().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert found.config == {"lr": 0.1}


def test_shared_weights_are_stored_once(tmp_path):
    sizes = {}
    for tying in (Tying.all_tied(4), TYING, Tying.independent(4)):
        model = tied_gpt2(tying)
        folder = tmp_path / str(tying)
        save_checkpoint(folder, model, tying, step=0, config={})
        file = folder / "model.safetensors"
        assert load_file(file).keys() == dict(model.named_parameters()).keys()
        sizes[tying.num_independent] = file.stat().st_size
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        assert weights < sizes[tying.num_independent] < weights + 10_000
    block = sum(p.numel() * p.element_size() for p in gpt2(4).transformer.h[0].parameters())
    assert sizes[2] - sizes[1] == pytest.approx(block, rel=0.15)
    assert sizes[4] - sizes[2] == pytest.approx(2 * block, rel=0.15)


def test_saving_copies_no_state_but_what_shares_memory(tmp_path):
    """An optimizer's state is twice the model: on a small GPU there is no room for it again."""
    whole = torch.arange(6.0)
    training = {"own": torch.ones(3), "half": whole[:3], "other half": whole[3:], "same": whole}
    tensors: dict[str, torch.Tensor] = {}
    split_tree(training, tensors, "")
    saved = copied_where_shared(tensors)
    assert saved["/own"].data_ptr() == training["own"].data_ptr()
    assert saved["/half"].data_ptr() == whole.data_ptr()
    save_checkpoint(tmp_path / "c", nn.Linear(2, 2), TYING, step=0, config={}, training=training)
    found = read_checkpoint(tmp_path / "c").training_state()
    assert all(torch.equal(found[name], tensor) for name, tensor in training.items())


@pytest.mark.parametrize("group", [{}, {"fused": True}, {"capturable": True}])
def test_the_optimizers_state_goes_where_its_parameter_is(group):
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    assert at_home("exp_avg", torch.ones(3), parameter, group).device.type == "meta"
    assert at_home("qmap", torch.ones(256), parameter, group).device.type == "meta"
    expected = "meta" if group else "cpu"  # steps are counted on the CPU, but for such optimizers
    assert at_home("step", torch.tensor(2.0), parameter, group).device.type == expected
    assert at_home("name", "lion", parameter, group) == "lion"


def test_random_numbers_of_a_mac_are_kept(monkeypatch):
    states = [torch.tensor([3], dtype=torch.uint8)]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    saved = rng_state()
    set_rng_state({"cpu": saved["cpu"]})  # of a machine without a GPU
    assert len(states) == 1
    set_rng_state(saved)
    assert len(states) == 2
    assert states[1] is states[0]


def test_persistent_buffers_are_weights_too_and_others_are_not():
    model = nn.BatchNorm1d(3)
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert unique_tensors(model).keys() == names


def test_moments_come_back_by_name(tmp_path):
    def trained(seed: int):
        model = tied_gpt2(seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.arange(8)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = trained(0)
    folder = save(tmp_path, training=optimizer_state_by_name(model, optimizer))
    other, its_optimizer = trained(1)
    load_optimizer_state_by_name(other, its_optimizer, read_checkpoint(folder).training_state())
    assert len(its_optimizer.state) == len(list(model.parameters()))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert_same(dict(its_optimizer.state[theirs]), dict(optimizer.state[mine]))


def test_another_models_weights_are_refused(tmp_path):
    found = read_checkpoint(save(tmp_path))
    with pytest.raises(InputError, match=r"another model: .* is in one of them only"):
        found.load_weights(gpt2(4))
    with pytest.raises(InputError, match=r"another model: .* is in one of them only"):
        found.load_weights(nn.Linear(2, 2))
    narrow = tied_gpt2()
    narrow.transformer.ln_f = nn.LayerNorm(5)
    with pytest.raises(InputError, match=r"ln_f.* has shape \(16,\) there and \(5,\) here"):
        found.load_weights(narrow)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, remove])
@pytest.mark.parametrize("name", FILES)
def test_a_torn_checkpoint_is_refused_and_the_one_before_it_is_used(tmp_path, damage, name):
    save(tmp_path, step=9, training={"moment": torch.ones(3)})
    torn = save(tmp_path, step=10, training={"moment": torch.ones(3)})
    assert sorted(file.name for file in torn.iterdir()) == sorted(FILES)
    damage(torn / name)
    with pytest.raises(InputError) as caught:
        read_checkpoint(torn)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert str(torn) in message
    assert name in message or name == "SHA256SUMS"
    found, problems = newest_checkpoint(tmp_path)
    assert (found.step, problems) == (9, [message])
    damage(found.folder / name)
    with pytest.raises(InputError, match=r"holds no whole checkpoint.*step-00000010"):
        newest_checkpoint(tmp_path)


def test_numbers_in_the_state_cannot_change_unnoticed(tmp_path):
    state = save(tmp_path, step=10) / "state.json"
    state.write_text(state.read_text().replace('"step": 10', '"step": 11'))
    with pytest.raises(InputError, match=r"torn: state\.json is not what was written"):
        read_checkpoint(state.parent)


def with_sums(folder: Path) -> Path:
    """Write the sums of what is there, whoever wrote it."""
    lines = (
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in FILES[1:]
    )
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs the command sha256sum")
def test_the_sums_can_be_checked_by_sha256sum(tmp_path):
    folder = save(tmp_path)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    assert read_checkpoint(with_sums(folder)).step == 7


@pytest.mark.parametrize(
    "state",
    ["", "[]", "{}", '{"format": "another"}', '{"format": "layer-tying checkpoint 1"}', "\udcff"],
)
def test_a_foreign_folder_is_refused(tmp_path, state):
    folder = save(tmp_path)
    (folder / "state.json").write_bytes(state.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=re.escape(str(folder))) as caught:
        read_checkpoint(with_sums(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="not a checkpoint"):
            read_checkpoint(folder)
        with pytest.raises(InputError, match="holds no whole checkpoint"):
            newest_checkpoint(folder)
    (tmp_path / "step-00000003").write_text("a file")
    with pytest.raises(InputError, match=r"step-00000003 is not a checkpoint"):
        newest_checkpoint(tmp_path)


def test_the_newest_are_kept_and_what_a_killed_save_left_is_not(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step=step)
    (tmp_path / ".step-00000011.tmp").mkdir()
    shutil.copytree(tmp_path / "step-00000009", tmp_path / ".best.old")
    save_checkpoint(tmp_path / "best", tied_gpt2(), TYING, step=3, config={})
    keep_newest(tmp_path, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "best",
        "step-00000010",
        "step-00000100",
    ]
    assert newest_checkpoint(tmp_path)[0].step == 100


def test_saving_again_replaces(tmp_path):
    save(tmp_path, training="old")
    folder = save(tmp_path, training="new")
    assert read_checkpoint(folder).training_state() == "new"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left")])
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, interruption):
    before = save(tmp_path)

    def fail(*arguments):
        raise interruption

    monkeypatch.setattr(checkpoint, "replace_folder", fail)
    with pytest.raises((KeyboardInterrupt, InputError)):
        save(tmp_path, step=8)
    assert list(tmp_path.iterdir()) == [before]
    assert read_checkpoint(before).step == 7


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        events.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(checkpoint, "_sync", lambda path: events.append(("sync", path.name)))
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path, step=7)
    *before, rename_event, after = events
    assert rename_event == ("rename", "step-00000007")
    assert {name for kind, name in before if kind == "sync"} == {*FILES, ".step-00000007.tmp"}
    assert after == ("sync", tmp_path.name)


SAVE_UNDER_A_LIMIT = """
import resource, sys, torch
from pathlib import Path
from layer_tying.saving.checkpoint import save_checkpoint
from layer_tying.errors import InputError
from layer_tying.core.tying import Tying
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    save_checkpoint(Path(sys.argv[1]), torch.nn.Linear(100, 100), Tying((0,)), step=2, config={},
                    training={"x": torch.ones(20_000)})
except InputError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_is_full_leaves_the_previous_checkpoint_whole(tmp_path):
    """The limits are reached in the weights (40 kB), and in the rest (80 kB)."""
    before = save(tmp_path, step=1)
    for limit in ("30000", "60000"):
        target = step_folder(tmp_path, 2)
        command = [sys.executable, "-c", SAVE_UNDER_A_LIMIT, str(target), limit]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert f"cannot write the checkpoint {target}" in line
        assert "File too large" in line
        assert list(tmp_path.iterdir()) == [before]
        assert newest_checkpoint(tmp_path)[0].step == 1


def test_nothing_is_unpickled():
    source = Path(layer_tying.__file__).parent
    forbidden = re.compile(r"torch\.load|torch\.save|import pickle|pickle\.|allow_pickle=True")
    files = list(source.rglob("*.py"))
    assert len(files) > 20
    assert not [file for file in files if forbidden.search(file.read_text(encoding="utf-8"))]


def test_state_is_plain_json(tmp_path):
    state = json.loads((save(tmp_path) / "state.json").read_text())
    assert state["owners"] == [0, 0, 2, 2]
    assert state["step"] == 7


def test_a_state_that_no_checkpoint_holds_is_named(tmp_path):
    model = Plain()
    training = {"optimizer": {"h.0.weight": {"projector": object()}}}
    folder, tying = tmp_path / "step-00000001", Tying.independent(6)
    with pytest.raises(InputError, match=r"optimizer/h\.0\.weight/projector of type object"):
        save_checkpoint(folder, model, tying, step=1, config={}, training=training)
    assert not any(tmp_path.iterdir())


def test_what_a_killed_save_has_replaced_comes_back(tmp_path):
    """Killed between the two renames, it leaves only the old one, under its temporary name."""
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "state.json").touch()
    (tmp_path / ".best.tmp").mkdir()
    keep_newest(tmp_path, 2)
    assert [each.name for each in tmp_path.iterdir()] == ["best"]
