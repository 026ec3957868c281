"""The scheduler of child processes: order, failures, interruption, going on.

The children are light; real ones are stopped and go on in ``cli/test_command.py::test_compare``.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from small_runs import in_process, small, write_text

from layer_tying.errors import InputError
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.processes import Ended, Job, train_all

LIGHT = (sys.executable, str(Path(__file__).parents[1] / "light_child.py"))


@pytest.fixture
def here(tmp_path) -> Path:
    write_text(tmp_path)
    return tmp_path


def light(config: TrainConfig, name: str, after: tuple[str, ...] = ()) -> Job:
    return Job(config, name, after, command=LIGHT)


def short(folder: Path, **changes) -> TrainConfig:
    return small(folder, policy="all", max_steps=2, eval_every=2, **changes)


def test_a_job_starts_after_those_that_it_needs_and_what_is_done_stays(here):
    source = str(here / "runs/first")
    jobs = [
        light(
            short(here, exp="second").replace(policy="fixed", source=source), "second", ("first",)
        ),
        light(short(here, exp="first"), "first"),
    ]
    order = []
    ended = train_all(jobs, processes=2, threads=1, on_end=lambda job, _: order.append(job.name))
    assert order == ["first", "second"]
    assert ended == {"first": Ended(0), "second": Ended(0)}

    before = [job.config.folder.joinpath("summary.json").stat().st_mtime_ns for job in jobs]
    with pytest.raises(InputError, match=r"second holds a run: .*--resume"):
        train_all(jobs)
    with pytest.raises(InputError, match=r"lr is 0\.003 in one and 0\.5"):
        train_all([light(jobs[1].config.replace(lr=0.5), "first")], resume=True)
    assert train_all(jobs, resume=True) == ended
    after = [job.config.folder.joinpath("summary.json").stat().st_mtime_ns for job in jobs]
    assert after == before


def test_a_failure_ends_those_that_need_it_and_says_why(here):
    jobs = [
        light(short(here, exp="bad", dataset=str(here / "no-such.txt")), "bad"),
        light(short(here, exp="needs"), "needs", after=("bad",)),
        light(short(here, exp="good"), "good"),
    ]
    ended = train_all(jobs, threads=1, logs=here / "logs", keep_going=True)
    assert ended["bad"].code == 2
    assert "no-such.txt" in ended["bad"].reason
    assert ended["needs"] == Ended(1, "bad comes first, and failed")
    assert ended["good"] == Ended(0)
    assert (here / "logs/good.log").read_text(encoding="utf-8")
    assert set(train_all(jobs, threads=1, logs=here / "logs", resume=True)) == {"bad"}


def interrupt_when_saved(folder: Path) -> None:
    """Start two long runs, and send this process a signal once both wait for one."""
    jobs = [light(small(folder, exp=exp, max_steps=100_000), exp) for exp in "ab"]
    if os.fork() == 0:
        while not all((job.config.folder / "started").exists() for job in jobs):
            time.sleep(0.05)
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    codes = {}
    try:
        train_all(
            [*jobs, light(small(folder, exp="c"), "c")],
            processes=2,
            threads=1,
            logs=folder / "logs",
            on_end=lambda job, ended: codes.update({job.name: ended.code}),
        )
    except KeyboardInterrupt:
        sys.exit(0 if codes == {"a": 130, "b": 130} else 1)
    sys.exit(2)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interruption_reaches_each_child_once_and_starts_no_other(here):
    assert in_process(interrupt_when_saved, here) == 0
    for exp in "ab":
        log = (here / f"logs/{exp}.log").read_text(encoding="utf-8")
        assert "go on with the same command and --resume" in log.splitlines()[-1]
    assert not (here / "runs/c").exists()


def fail_when_one_has_ended(folder: Path) -> None:
    """One run ends while another one waits for a signal, and the caller's answer is an error."""
    waits = light(small(folder, exp="waits", max_steps=100_000), "waits")
    jobs = [waits, light(short(folder, exp="first"), "first")]

    def on_end(job: Job, ended: Ended) -> None:
        while not (waits.config.folder / "started").exists():
            time.sleep(0.05)
        raise InputError("enough")

    with pytest.raises(InputError, match="enough"):
        train_all(jobs, processes=2, threads=1, logs=folder / "logs", on_end=on_end)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_what_still_runs_saves_when_the_caller_raises_an_error(here):
    assert in_process(fail_when_one_has_ended, here) == 0
    assert "go on with the same command" in (here / "logs/waits.log").read_text(encoding="utf-8")


def interrupt_the_last(folder: Path) -> None:
    """A signal while the last run is under way."""
    job = light(small(folder, exp="last", max_steps=100_000), "last")
    if os.fork() == 0:
        while not (job.config.folder / "started").exists():
            time.sleep(0.05)
        os.kill(os.getppid(), signal.SIGINT)
        os._exit(0)
    try:
        train_all([job], threads=1, logs=folder / "logs", keep_going=True)
    except KeyboardInterrupt:
        sys.exit(0)
    sys.exit(2)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interruption_of_the_last_run_is_not_its_end(here):
    assert in_process(interrupt_the_last, here) == 0


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_run_that_was_killed_says_so(here, number):
    dies = (sys.executable, "-c", f"import os; print('45 %'); os.kill(os.getpid(), {number:d})")
    job = Job(short(here, exp="dies"), "dies", command=dies)
    ended = train_all([job], threads=1, logs=here / "logs")["dies"]
    assert ended == Ended(-number, f"killed by signal {number:d}")


def test_some_process_has_to_train(here):
    with pytest.raises(InputError, match="processes is 0"):
        train_all([light(short(here, exp="a"), "a")], processes=0)
