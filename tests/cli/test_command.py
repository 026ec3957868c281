"""The command, in real processes: the published flags, and one clear line for whatever is wrong."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import Command, run_command, traces_of, write_text
from tolerance import close_to

from layer_tying import report
from layer_tying.cli import command, experiments, main
from layer_tying.runs.config import DEFAULTS, SETTINGS, TrainConfig, read_config
from layer_tying.runs.defaults import settle
from layer_tying.runs.processes import Ended

SMALL = (
    *("--dataset", "text.txt", "--nlayers", "3", "--nhead", "2", "--emsize", "16"),
    *("--bptt", "16", "--batch-size", "4", "--eval-batch-size", "8", "--eval-batches", "2"),
    *("--precision", "fp32"),
)
FEW_STEPS = (*SMALL, "--max-steps", "12", "--every", "4", "--save-every", "6")
SECOND_SAVE = ("save", 2)  # when one checkpoint is there


HIDDEN = ("tyings", "settled")
FLAGS = {name: name.replace("_", "-") for name in SETTINGS if name not in HIDDEN}
FLAGS |= {"source": "from"}


@pytest.fixture
def here(tmp_path) -> Path:
    """A folder with a text in it, in which the command runs."""
    write_text(tmp_path)
    return tmp_path


def complaint(here: Path, *arguments: str, **options) -> str:
    """The one line that a command ends with that cannot do what it was asked for."""
    code, out, err = run_command(*arguments, cwd=here, **options)
    assert code == 2, (code, err)
    assert out == ""
    assert "Traceback" not in err
    (line,) = err.splitlines()
    assert line.startswith("layer-tying")
    return line


# What it does


def test_the_published_command_line(here):
    flags = "--bptt 16 --batch_size 4 --eval_batch_size 4 --dataset text.txt --nlayers 3 --lr 0.001"
    flags += " --emsize 16 --nhead 2 --exp x --epochs 1"
    code, out, _ = run_command("train", *flags.split(), cwd=here, draws=True)
    assert code == 0
    assert re.match(
        r"bits per byte \d+\.\d{3}, perplexity \d+\.\d{3} on test.* of 3 layers independent", out
    )
    assert (here / "runs/x/report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    config = read_config(here / "runs/x").flat()
    given = {"bptt": 16, "batch_size": 4, "eval_batch_size": 4, "dataset": "text.txt"}
    given |= {"nlayers": 3, "lr": 0.001, "emsize": 16, "nhead": 2, "exp": "x", "epochs": 1}
    assert {key: config[key] for key in given} == given
    assert config["policy"] == "mixture"
    steps = json.loads((here / "runs/x/summary.json").read_text())["steps"]
    num_bytes = len((here / "text.txt").read_bytes())
    assert steps == pytest.approx(0.9 * num_bytes / 16 / 4, abs=2)


def test_evaluate_agrees_with_the_summary_and_report_with_both(here):
    assert run_command("train", *FEW_STEPS, "--exp", "ä run", cwd=here)[0] == 0
    run = here / "runs/ä run"
    summary = json.loads((run / "summary.json").read_text())
    for split in ("validation", "test"):
        code, out, _ = run_command("evaluate", "runs/ä run", "--split", split, cwd=here)
        assert code == 0
        scores = json.loads(out)
        assert "bits_per_byte" in scores
        assert scores == close_to({name: summary[f"{split}_{name}"] for name in scores})
    twice = ("runs/ä run", "./runs/ä run")
    code, out, _ = run_command("report", *twice, "--output", "page.html", cwd=here)
    assert code == 0 and "2 runs" not in out
    assert f"{summary['validation_perplexity']:.4}"[:4] in out
    assert (here / "page.html").exists()

    # A run that is there is neither replaced nor continued as another, unless told.
    before = traces_of(run)
    again = ("train", *FEW_STEPS, "--exp", "ä run", "--lr", "0.5")
    line = complaint(here, *again)
    assert re.search(r"runs/ä run holds a run: .*--resume.*--overwrite.*another folder", line)
    line = complaint(here, *again, "--resume")
    assert "cannot resume runs/ä run with another configuration: lr is 0.003" in line
    assert traces_of(run) == before
    assert run_command(*again, "--overwrite", cwd=here)[0] == 0
    assert traces_of(run) != before


def values_of(name: str) -> tuple[dict[str, Any], Any]:
    """Flags that another one needs, and a value for it that is not the default."""
    needed = {
        "owners": {"policy": "fixed"},
        "source": {"policy": "fixed"},
        "permute": {"policy": "recorded", "source": "runs/a"},
        "activate_at": {"policy": "all"},
        "sharing": {"policy": "dqn"},
    }
    values = {
        **{"policy": "dqn", "owners": "0,0", "source": "runs/a", "activate_at": 0.5},
        **{"sharing": "frozen", "family": "bert", "objective": "causal", "nhead": 8},
        **{
            "optimizer": "adamw8bit",
            "gradient": "owner",
            "optimizer_state": "fresh",
            "initial": "cycle",
        },
        **{"settle": 0.25, "export_dtype": "bf16"},
        **{"reward": "accuracy", "precision": "fp32", "log_with": "mlflow", "dropout": 0.5},
        **{"warmup": 0.5, "final_lr": 0.5, "weight_decay": 0.5, "clip": 0.5, "lr": 0.5},
        **{"checkpointing": True, "compile": True, "parallel": "shard"},
        **dict.fromkeys(
            ("dataset", "data_dir", "tokenizer", "exp", "output_dir", "untied"), "a place"
        ),
    }
    return needed.get(name, {}), values.get(name, 100)


@pytest.mark.parametrize("name", sorted({*FLAGS} - {"task"}))
def test_every_setting_is_a_flag_in_hyphens_and_underscores(name, monkeypatch):
    needed, value = values_of(name)
    asked = []
    monkeypatch.setattr(
        experiments, "_train_and_report", lambda config, _: asked.append(config) or 0
    )
    for spell in (str, lambda flag: flag.replace("-", "_"), lambda flag: flag.replace("_", "-")):
        for joined in (True, False):
            arguments = []
            for flag, given in (needed | {name: value}).items():
                spelt = spell(f"--{FLAGS[flag]}").replace("__", "--", 1)
                if given is True:
                    arguments.append(spelt)
                else:
                    arguments += [f"{spelt}={given}"] if joined else [spelt, str(given)]
            assert main(["train", *arguments]) == 0
    expected = TrainConfig.from_flat(**needed, **{name: value})
    assert asked == [expected] * 6
    assert expected.flat()[name] != DEFAULTS[name]


def test_older_spellings_go_on_working(monkeypatch):
    asked = []
    monkeypatch.setattr(
        experiments, "_train_and_report", lambda config, _: asked.append(config) or 0
    )
    main(["train", "--moments", "fresh"])
    main(["train", "--optimizer-state", "fresh"])
    assert asked[0] == asked[1] == TrainConfig.from_flat(optimizer_state="fresh")


def test_a_saved_configuration_is_a_start_and_flags_go_on_top(here):
    flags = (*FEW_STEPS, "--policy", "dqn", "--checkpointing", "--exp", "one")
    assert run_command("train", *flags, cwd=here)[0] == 0
    saved = "runs/one/config.json"
    again = ("train", "--config", saved, "--exp", "two")
    assert run_command(*again, cwd=here)[0] == 0
    assert traces_of(here / "runs/two") == traces_of(here / "runs/one")
    changed = ("train", f"--config={saved}", "--exp=three", "--policy=all", "--no-checkpointing")
    assert run_command(*changed, cwd=here)[0] == 0
    config = read_config(here / "runs/three")
    assert (config.tying.policy, config.optimization.checkpointing) == ("all", False)
    assert config.optimization.max_steps == 12
    grouped = (*FEW_STEPS, "--policy", "cycle", "--groups", "2", "--exp", "grouped")
    assert run_command("train", *grouped, cwd=here)[0] == 0
    other = ("--config", "runs/grouped/config.json", "--policy", "dqn", "--exp", "other")
    assert run_command("train", *other, cwd=here)[0] == 0, "without the groups of the cycle"
    assert "no-such.json" in complaint(here, "train", "--config", "no-such.json")
    assert "not a run's configuration" in complaint(here, "train", "--config", "text.txt")


def test_help_needs_neither_torch_nor_transformers(here):
    code = "import sys; from layer_tying.cli import main\n"
    code += "try: main(['train', '--help'])\n"
    code += "except SystemExit: print({'torch', 'transformers', 'matplotlib'} & {*sys.modules})"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, check=True, cwd=here, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "set()"


def test_help_names_every_setting(here):
    code, out, err = run_command("train", "--help", cwd=here)
    assert (code, err) == (0, "")
    missing = [name for name in FLAGS if f"--{FLAGS[name]} " not in out]
    missing = [name for name in missing if f"--{FLAGS[name]}, " not in out]
    assert missing == ["task"]  # which the command `finetune` takes
    listing = run_command("--help", cwd=here)[1]
    assert all(name in listing for name in ("train", "compare", "evaluate", "report"))


def test_compare(here):
    """Stopped, it saves; resumed, it leaves alone what has ended; then there is one table."""
    flags = ("compare", *SMALL, "--max-steps", "100", "--every", "10", "--exp", "c")
    flags += ("--budget-layers", "3", "--policies", "none,dqn")  # conventional training has none
    none, dqn = (here / "runs/c" / policy for policy in ("none", "dqn"))
    command = Command(*flags, cwd=here)
    wait_for(command, lambda: any(none.glob("checkpoints/step-*")))
    os.kill(command.process.pid, signal.SIGTERM)
    code, _, err = command.ended()
    assert code == 130
    assert re.search(r"stopped at step \d+ of 100; .*--resume", err.splitlines()[-1])
    assert not dqn.exists()

    for ended in ([], [none, dqn]):
        before = [(run / "summary.json").stat().st_mtime_ns for run in ended]
        code, out, err = run_command(*flags, "--resume", cwd=here)
        assert code == 0, err
        assert [(run / "summary.json").stat().st_mtime_ns for run in ended] == before
        table = [line for line in out.splitlines() if line.startswith("|")]
        assert len(table) == 4  # head, rule, two runs
        assert "conventional" in table[2]
        assert "dqn" in table[3]
    assert (here / "runs/c/report.html").exists()
    configs = [read_config(run).flat() for run in (none, dqn)]
    different = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert different - {"tyings", "settled"} == {"policy", "exp", "budget_layers"}

    # What cannot go on is said at once, not after the first of the runs.
    assert "holds a run" in complaint(here, *flags)
    assert "lr is 0.003 in one and 0.5" in complaint(here, *flags, "--lr", "0.5", "--resume")
    assert "policy" in complaint(here, "compare", *SMALL, "--policies", "none,dqm")


@pytest.fixture
def compared(here, monkeypatch):
    """What a comparison would train, by name; each of its runs fails at once with code 3."""
    configs = {}

    def train_all(jobs, **_):
        configs.update({job.name: job.config for job in jobs})
        return {job.name: Ended(3) for job in jobs}

    monkeypatch.setattr(experiments, "train_all", train_all)
    return configs


def test_a_run_that_was_killed_ends_a_comparison_with_the_reason(monkeypatch, capsys):
    ended = {"none": Ended(0), "dqn": Ended(-9, "killed by signal 9")}
    monkeypatch.setattr(experiments, "train_all", lambda *_, **__: ended)
    assert main(["compare", "--policies", "none,dqn"]) == 1
    assert capsys.readouterr().err == "layer-tying: dqn: killed by signal 9\n"


def test_what_is_compared_without_a_choice(compared):
    assert main(["compare", "--residual-scaling", "0.5"]) == 3  # it is not of none and dqn
    assert list(compared) == ["none", "dqn", "mixture"]


def test_a_comparison_hands_the_number_of_groups_to_those_that_take_one(compared):
    policies = "none,all,dqn,cycle,mixture,sandwich-4"
    flags = ["--groups", "3", "--gradient", "owner", "--settle", "0.3", "--reward", "perplexity"]
    assert main(["compare", "--policies", policies, *flags]) == 3
    found = {name: config.tying.groups for name, config in compared.items()}
    taken = {"cycle": 3, "mixture": 3, "sandwich-4": 4}
    assert found == {"none": None, "all": None, "dqn": None, **taken}
    assert {name for name, config in compared.items() if config.tying.settle} == {"dqn"}
    sums = [name for name, config in compared.items() if config.tying.gradient == "sum"]
    assert sums == ["mixture"]


def test_a_start_in_a_comparison_is_of_those_that_change_the_tying(compared):
    flags = ["--initial", "none", "--settle", "0.3"]
    assert main(["compare", "--policies", "none,dqn,mixture-3", *flags]) == 3
    assert {name: config.tying.initial for name, config in compared.items()} == {
        **{"none": "", "dqn": "none", "mixture-3": ""}
    }


def test_what_a_saved_run_had_settled_is_settled_anew_for_each_that_is_compared(compared, here):
    settled = {"settle": 1.0, "residual_scaling": 1.0, "tyings": ("0,1,0,1",)}
    saved = settle(TrainConfig.from_flat(lr=0.1, policy="mixture"), **settled)
    (here / "saved.json").write_text(saved.to_json())
    flags = ["--config", str(here / "saved.json"), "--policies", "dqn,mixture-4"]
    assert main(["compare", *flags]) == 3
    assert compared["dqn"].flat() == DEFAULTS | {"lr": 0.1, "policy": "dqn", "exp": "run/dqn"}
    assert compared["mixture-4"].tying.tyings == ()


# How it ends


def wait_for(command: Command, condition: Callable[[], bool]) -> None:
    """Wait for what a process of the command's writes: it trains in processes of its own."""
    while not condition():
        assert command.process.is_alive()
        time.sleep(0.005)


@pytest.fixture
def left_alone(here, monkeypatch):
    """The traces of a run that nothing happens to, in this process."""

    def run(*arguments: str) -> dict:
        monkeypatch.chdir(here)
        monkeypatch.setattr(report, "write_report", lambda *_: [])
        assert main([*arguments, "--exp", "left-alone"]) == 0
        return traces_of(here / "runs/left-alone")

    return run


def test_runs_stopped_from_outside_end_with_the_numbers_of_one_left_alone(here, left_alone):
    """The real thing: signals from another process, when there is something saved."""
    flags = ("train", *SMALL, "--max-steps", "80", "--every", "10", "--save-every", "10")
    expected = left_alone(*flags)
    assert expected["metrics"][-1]["step"] == 80

    killed = (*flags, "--exp", "killed")
    command = Command(*killed, cwd=here, hold_at=SECOND_SAVE)
    command.send(signal.SIGKILL)
    assert command.ended()[0] == -signal.SIGKILL

    stopped = (*flags, "--exp", "stopped")
    command = Command(*stopped, cwd=here, hold_at=SECOND_SAVE)
    command.send(signal.SIGINT)
    code, _, err = command.ended()
    assert code == 130
    assert re.search(r"stopped at step \d+ of 80; .*--resume", err.splitlines()[-1])

    for arguments in (killed, stopped):
        assert not (here / "runs" / arguments[-1] / "summary.json").exists()
        assert run_command(*arguments, "--resume", cwd=here)[0] == 0
        assert traces_of(here / "runs" / arguments[-1]) == expected


def test_a_full_disk_while_saving(here, left_alone):
    """Then, with room, the run goes on; and the numbers are those of a run left alone."""
    code, out, err = run_command("train", *FEW_STEPS, cwd=here, file_limit=30_000)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("layer-tying: cannot write the checkpoint")
    assert "File too large" in last
    left = [file for file in (here / "runs/run").rglob("*") if file.is_file()]
    assert not [file for file in left if "tmp" in str(file.relative_to(here))]
    assert run_command("train", *FEW_STEPS, "--resume", cwd=here)[0] == 0
    assert traces_of(here / "runs/run") == left_alone("train", *FEW_STEPS)


def runs_instead(monkeypatch, run: Callable[..., int]) -> None:
    monkeypatch.setitem(command.COMMANDS, "train", command.Command("", run))


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch):
    """A pipe or a locale that is not UTF-8."""
    runs_instead(monkeypatch, lambda *_: print("4.2 \u00b1 0.1") or 0)
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["train"]) == 0
    sys.stdout.flush()
    assert shown.getvalue().split() == [b"4.2", b"?", b"0.1"]


@pytest.mark.parametrize("says", ["", "Unable to allocate 946. GiB for an array"])
def test_too_little_memory_is_one_line(monkeypatch, capsys, says):
    def run(*_):
        raise MemoryError(says)

    runs_instead(monkeypatch, run)
    assert main(["train"]) == 2
    assert capsys.readouterr().err.startswith("layer-tying: out of memory")


# What it refuses

WRONG = {
    "no-command": ((), "required"),
    "unknown-command": (("trian",), "trian"),
    "unknown-flag": (("train", "--layers", "3"), "--layers"),
    "not-a-number": (("train", "--lr", "fast"), "'fast'"),
    "not-a-whole-number": (("train", "--nlayers", "3.5"), "'3.5'"),
    "no-value": (("train", "--lr"), "--lr"),
    "unknown-policy": (("train", "--policy", "dqm"), "dqm"),
    "unknown-data": (("train", "--dataset", "wiki3"), "pydocs, shake, ptb, wiki2"),
    "unknown-images": (("train", "--family", "vit", "--dataset", "cats"), "digits, cifar10"),
    "missing-file": (("train", "--dataset", "no/such.txt"), "no/such.txt"),
    "settle-mixture": (
        ("train", "--policy", "mixture", "--settle", "0.5"),
        "settle: --settle goes with dqn, random, not with policy mixture",
    ),
    "reward-random": (
        ("train", "--policy", "random", "--reward", "perplexity"),
        "reward: --reward goes with dqn, not with policy random",
    ),
    "empty-file": (("train", "--dataset", "empty.txt"), "empty.txt: the file is empty"),
    "binary-file": (("train", "--dataset", "binary.txt"), "binary.txt: binary file"),
    "empty-folder": (("train", "--dataset", "empty"), "empty: the folder holds no text"),
    "short-validation": (("train", "--dataset", "tiny.txt", "--bptt", "16"), "nothing to predict"),
    "short-masked": (
        ("train", "--dataset", "small.txt", "--bptt", "16", "--family", "bert"),
        "nothing to predict in the 2 tokens of the test split",
    ),
    "both": (("train", "--resume", "--overwrite"), "--resume and --overwrite contradict"),
    "short-text": (("train", *SMALL, "--bptt", "100000"), "shorter than one sequence"),
    "heads": (("train", "--emsize", "30", "--nhead", "4"), "30 is not divisible by nhead 4"),
    "one-layer": (("train", "--nlayers", "1"), "nlayers is at least 2, got 1"),
    "k-of-nothing": (("train", "--every", "0"), "every is at least 1, got 0"),
    "k-too-large": (
        ("train", "--policy=dqn", "--every", "20", "--max-steps", "10"),
        "every 20 is more than",
    ),
    "k-over-epochs": (
        ("train", *SMALL, "--policy=dqn", "--every", "999"),
        "every 999 is more than",
    ),
    "negative-rate": (("train", "--lr", "-0.1"), "lr is more than 0, got -0.1"),
    "negative-batch": (("train", "--batch-size", "-4"), "batch_size is at least 1, got -4"),
    "infinite-rate": (("train", "--lr", "inf"), "lr is a finite number"),
    "bad-tokenizer": (("train", "--dataset", "text.txt", "--tokenizer", "bpe:7"), "bpe:N"),
    "bad-owners": (("train", *SMALL, "--policy", "fixed", "--owners", "0,2"), "--owners"),
    "nothing-to-resume": (("train", *SMALL, "--resume"), "runs/run holds no run"),
    "outside": (("train", *SMALL, "--exp", "../x"), "'../x'"),
    "output-is-a-file": (("train", *SMALL, "--output-dir", "text.txt"), "text.txt/run"),
    "output-is-read-only": (("train", *SMALL, "--output-dir", "/proc/x"), "/proc/x/run"),
    "name-too-long": (("train", *SMALL, "--exp", "x" * 300), "File name too long"),
    "no-data-folder": (("train", "--dataset", "ptb", "--data-dir", "nowhere"), "nowhere"),
    "evaluate-nothing": (("evaluate", "empty"), "empty holds no run"),
    "report-nothing": (("report", "empty"), "empty"),
    "too-large": (("train", *SMALL, "--emsize", "2000000"), "memory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(here, name):
    arguments, said = WRONG[name]
    (here / "empty.txt").write_text("")
    (here / "binary.txt").write_bytes(bytes(range(256)))
    text = (here / "text.txt").read_text()
    (here / "tiny.txt").write_text(text[:20])
    (here / "small.txt").write_text(text[:60])
    (here / "empty").mkdir()
    assert said in complaint(here, *arguments)
    assert not [file for file in here.rglob("runs/**/*") if file.is_file()]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_wrong_flag_is_told_on_terminals_without_utf8(encoding, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--lr", "fast"])
    said = "layer-tying train: Error parsing --lr: could not convert string to float: 'fast'; "
    assert capsys.readouterr().err == f"{said}see layer-tying train --help\n"


@pytest.mark.slow
def test_compiling_without_a_compiler(here, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(here / "cache"))
    command = [sys.executable, "-m", "layer_tying", "train", *FEW_STEPS, "--compile"]
    result = subprocess.run(command, check=False, cwd=here, capture_output=True, text=True)
    assert result.returncode == 2
    assert "--compile needs a C++ compiler" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(here):
    (here / "runs").mkdir(mode=0o500)
    assert "Permission denied" in complaint(here, "train", *SMALL)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("none", {"policy": "none"}),
        ("plain-3", {"policy": "none", "nlayers": 3}),
        ("cycle-reverse", {"policy": "cycle-reverse"}),
        ("cycle-reverse-4", {"policy": "cycle-reverse", "groups": 4}),
        ("mixture-2", {"policy": "mixture", "groups": 2}),
    ],
)
def test_a_method_of_a_comparison_is_a_policy_with_its_groups(name, settings):
    assert experiments._method(name) == settings
