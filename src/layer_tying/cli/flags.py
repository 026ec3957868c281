"""Flags from settings, by tyro: a dataclass for each group, in which flags are spelt flat.

``--max-steps 3``, ``--max_steps 3`` and ``--max-steps=3`` are the same. The text below a field of a
configuration is the flag's help.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

import tyro

from layer_tying.runs.config import DEFAULTS, GROUPS, TrainConfig
from layer_tying.settings import alternatives

T = TypeVar("T")
NAMES = {"source": "from"}  # of settings whose flag has another name
# Other names of flags: an older one, and those that one would try first.
ALIASES = {
    "dataset": ("--data",),
    "max_steps": ("--steps",),
    "optimizer_state": ("--moments",),
}


def parse(kind: type[T], arguments: Sequence[str], prog: str, description: str) -> T:
    """Read a command's arguments; wrong ones end in one line and exit code 2."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                args=list(arguments),
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if end.code:
            refuse(prog, _first_paragraph(said.getvalue()))
        raise


def refuse(prog: str, message: str) -> NoReturn:
    """End with one line that says what was wrong with the arguments."""
    print(f"{prog}: {message}; see {prog} --help", file=sys.stderr)
    raise SystemExit(2)


def _first_paragraph(box: str) -> str:
    """What tyro says first in its box, as one line.

    On terminals without UTF-8 the box is of hyphens, and its title stands above the first of them.
    """
    framed = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    paragraphs = re.split(r"^(?:─+|-+|)$", "\n".join(framed).strip(), flags=re.MULTILINE)
    told = [" ".join(each.split()) for each in paragraphs if each.strip()]
    has_title = "╭" not in box and len(told) > 1
    return told[has_title].rstrip(".")


def settings_groups(
    defaults: Mapping[str, Any], leave_out: Iterable[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Fields for ``make_dataclass``: one for each group of settings, and one for the seed.

    Args:
        defaults: the value of each setting that is not given.
        leave_out: settings that the command has no flag for.
    """
    left_out = set(leave_out)
    groups = [group_of(name, kind, defaults, left_out) for name, kind in GROUPS.items()]
    return [*filter(None, groups), flag_of(TrainConfig, "seed", defaults["seed"])]


def group_of(
    name: str, kind: type, defaults: Mapping[str, Any], leave_out: Collection[str] = ()
) -> tuple[str, Any, Any] | None:
    """A field for ``make_dataclass`` that holds the flags of a group; None if there are none."""
    shown = [each for each in fields(kind) if each.name not in leave_out and _is_flag(each)]
    if not shown:
        return None
    flags = [flag_of(kind, each.name, defaults[each.name]) for each in shown]
    group = make_dataclass(kind.__name__, flags)
    group.__doc__ = (inspect.getdoc(kind) or "").partition("\n")[0]
    return name, group, field(default_factory=group)


def settings_given(options: Any) -> dict[str, Any]:
    """The settings that options hold, by their names; what is open as settings have it."""
    values: dict[str, Any] = {"seed": options.seed}
    for name in GROUPS:
        values |= vars(getattr(options, name, None) or _Nothing())
    return {
        name: DEFAULTS[name] if value is None and DEFAULTS[name] == "" else value
        for name, value in values.items()
    }


class _Nothing:
    """Options of a group that the command has no flags for."""


def _is_flag(each: Field[Any]) -> bool:
    return not each.metadata.get("hidden")


def flag_of(kind: type, name: str, default: Any) -> tuple[str, Any, Any]:
    """A field for ``make_dataclass``: the flag of a setting, with the help that stands below it."""
    hint = get_type_hints(kind)[name]
    default = None if default == "" else default
    argument = tyro.conf.arg(
        name=NAMES.get(name),
        aliases=ALIASES.get(name),
        help=_help_texts(kind)[name],
        help_behavior_hint="" if default is None or hint is bool else f"(default: {default})",
    )
    if hint is bool:
        return name, Annotated[bool, argument], field(default=default)
    return name, Annotated[hint | None, reader(hint), argument], field(default=default)


def reader(hint: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """How a value is read; None is what was not given, and cannot be."""
    (kind,) = [each for each in alternatives(hint) if each is not type(None)]
    choices = tuple(choice for choice in get_args(kind) if choice)
    read = str if choices else kind
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}" if choices else kind.__name__.upper(),
        instance_from_str=lambda strings: read(strings[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
        choices=choices or None,
    )


@cache
def _help_texts(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, which say what these are."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for statement, after in pairwise(tree.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            texts[statement.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return texts


def option(kind: Any, default: Any, help: str, name: str | None = None) -> tuple[Any, Any]:
    """An option that is no setting of a run: its type and its default, for ``make_dataclass``."""
    is_shown = default is not None and default is not False and default != ""
    shown = f"(default: {default})" if is_shown else ""
    argument = tyro.conf.arg(name=name, help=help, help_behavior_hint=shown)
    if kind is bool:
        return Annotated[bool, argument, tyro.conf.FlagCreatePairsOff], field(default=default)
    return Annotated[kind | None, argument, reader(kind)], field(default=default)


def positional(metavar: str, help: str, default: Any = MISSING) -> tuple[Any, Any]:
    """A positional argument, required unless it has a default: its type and its default."""
    argument = tyro.conf.arg(metavar=metavar, help=help, help_behavior_hint="")
    return tyro.conf.Positional[Annotated[str, argument]], field(default=default)
