"""The command ``layer-tying``: its list of commands, and how it ends.

Wrong input ends in one line and exit code 2; an interrupted run has saved what it had and ends with
exit code 130.
"""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layer_tying.cli import compress, experiments, use
from layer_tying.cli.flags import refuse
from layer_tying.errors import InputError
from layer_tying.runs.interrupt import INTERRUPTED

PROGRAM = "layer-tying"


@dataclass(frozen=True)
class Command:
    """What ``layer-tying NAME`` does.

    Attributes:
        help: one line.
        run: takes the arguments, the program's name and the help; returns the exit code.
    """

    help: str
    run: Callable[[Sequence[str], str, str], int]


COMMANDS = {
    "train": Command("train one model, tied as a policy decides", experiments.train),
    "compare": Command("train the same model under several policies", experiments.compare),
    "finetune": Command("fine-tune a run's best weights for GLUE", experiments.finetune),
    "recipe": Command("train a row of the paper", experiments.recipe),
    "evaluate": Command("score a run's best weights", use.evaluate),
    "export": Command("write a run's best weights for others to load", use.export),
    "generate": Command("continue a prompt", use.generate),
    "compress": Command("make a trained model smaller", compress.compress),
    "report": Command("make one page of figures and tables of runs", use.report),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        problem = f"unknown command {name!r}" if name else "a command is required"
        refuse(PROGRAM, problem)
    _quiet_the_noisy()
    _replace_what_cannot_be_shown()
    command = COMMANDS[name]
    try:
        return command.run(rest, f"{PROGRAM} {name}", command.help)
    except (InputError, OSError) as error:  # a full disk, a folder that went away
        return _complain(error)
    except (MemoryError, RuntimeError) as error:
        if advice := _advice(error):
            return _complain(InputError(advice))
        raise
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:{width}}{each.help}" for name, each in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND ...\n\n"
        f"Transformers that learn which layers to tie.\n\n{listing}\n\n"
        f"{PROGRAM} COMMAND --help lists the flags of a command."
    )


def _quiet_the_noisy() -> None:
    """Silence what a user can do nothing about; every other warning is shown."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The name that transformers wants instead is not in its older versions.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")


def _replace_what_cannot_be_shown() -> None:
    """Print a question mark for a character that a terminal or pipe has no code for."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _advice(error: Exception) -> str | None:
    """What to do about those errors of torch that the machine is the reason of."""
    is_refused = re.search("allocate memory|out of memory", repr(error), re.IGNORECASE)
    if is_refused or isinstance(error, MemoryError):
        return "out of memory: take a smaller model or a smaller batch"
    if "No working C++ compiler" in str(error):
        return "--compile needs a C++ compiler, such as g++, and found none"
    return None


def _complain(error: Exception) -> int:
    print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
