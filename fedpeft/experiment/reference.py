"""The configuration explained: every field with its type, default and docstring.

All of it is read from the code that checks the fields.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    Union,
    final,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Lt

from fedpeft.errors import BadInput
from fedpeft.experiment.checking import nearest, written_bound
from fedpeft.experiment.config import Config
from fedpeft.federation.fleet import Device
from fedpeft.methods import constructors
from fedpeft.types import WorthTuning
from fedpeft.wrappers import WRAPPERS

TOP: Final = "top"
"""Names the fields that stand in no table of a TOML file."""

CHOICES: Final[Mapping[str, Callable[[], Mapping[str, type[Any]]]]] = {
    "method": constructors,
    "wrap": lambda: WRAPPERS,
}
"""What a configuration chooses by name, each with fields of its own: kind -> name -> class."""


NAMED: Final[Mapping[str, type[Any]]] = {"federation.fleet": Device}
"""The fields that hold tables of names that users choose: dotted field -> class of each table."""


@final
@dataclass(frozen=True)
class FieldDoc:
    """One field: its name, which values it takes, its default, and what it means."""

    name: str
    takes: str
    default: str
    meaning: str


@final
@dataclass(frozen=True)
class SectionDoc:
    """One section: its name, as ``training``, its ``heading``, what it is about, its fields."""

    name: str
    heading: str
    about: str
    fields: tuple[FieldDoc, ...]


def sections() -> list[SectionDoc]:
    """Return every section: the top level, the tables of a TOML file, then methods and wrappers."""
    # The fields of ``Config`` that are dataclasses are the tables of a file.
    hints: dict[str, Any] = get_type_hints(Config)
    tables: dict[str, Any] = {}
    for name, kind in hints.items():
        if dataclasses.is_dataclass(kind):
            tables[name] = kind
    described = [_section_doc(TOP, "top level", Config, leave_out=tuple(tables))]
    for name, kind in tables.items():
        described.append(_section_doc(name, f"[{name}]", kind))
    for name, kind in NAMED.items():
        described.append(_section_doc(name, f"[{name}.NAME]", kind))
    for what, choices in CHOICES.items():
        for name, kind in choices().items():
            described.append(_section_doc(name, f'{what} "{name}"', kind))
    return described


def section(name: str) -> SectionDoc:
    """Return the section called ``name``, such as ``training``, or what has that name, as ``lora``.

    Raises BadInput, with the nearest name, for any other.

    >>> section("federation").fields[0].name
    'rounds'
    """
    known: dict[str, SectionDoc] = {}
    for one in sections():
        known.setdefault(one.name, one)  # a method may be called as a table is, which comes first
    if name not in known:
        raise BadInput(f"{name!r} is neither a section nor a method; {nearest(name, list(known))}")
    return known[name]


def page(described: Sequence[SectionDoc]) -> str:
    """Return ``described`` as a page of Markdown; of all ``sections`` it is ``docs/config.md``."""
    lines = [
        "# Configuration",
        "",
        "Written by `fedpeft config --markdown` from the code that reads the fields. A TOML file",
        "holds those that differ from their defaults; `--set section.field=value` overrides any.",
    ]
    for one in described:
        lines += ["", f"## {one.heading}", "", one.about]
        if one.fields:
            lines += ["", "| field | takes | default | meaning |", "|---|---|---|---|"]
        for field in one.fields:
            cells = (f"`{field.name}`", field.takes, _code(field.default), field.meaning)
            lines.append(_table_row(cells))
    return "\n".join(lines) + "\n"


def _table_row(cells: Sequence[str]) -> str:
    r"""Return a row of a Markdown table.

    >>> _table_row(["targets", "query|value"])
    '| targets | query\\|value |'
    """
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return "| " + " | ".join(escaped) + " |"


def _code(default: str) -> str:
    return default if default in (LEFT_OUT, REQUIRED) else f"`{default}`"


def _section_doc(
    name: str, heading: str, kind: type[Any], leave_out: Sequence[str] = ()
) -> SectionDoc:
    """Return the section whose fields are those of dataclass ``kind``."""
    meanings = field_docstrings(kind)
    hints = get_type_hints(kind, include_extras=True)
    fields: list[FieldDoc] = []
    for field in dataclasses.fields(kind):
        if field.init and field.name not in leave_out:  # others cannot be set, or stand elsewhere
            meaning = meanings.get(field.name, "")
            fields.append(FieldDoc(field.name, _takes(hints[field.name]), _default(field), meaning))
    about = " ".join((kind.__doc__ or "").replace("``", "`").split())
    return SectionDoc(name, heading, about, tuple(fields))


def field_docstrings(kind: type[Any]) -> dict[str, str]:
    """Return the docstring right under every field of a dataclass that has one, as one line.

    Python keeps no docstring of a field, so they are read from the source; there are none where
    that is not at hand.

    >>> field_docstrings(FieldDoc)
    {}
    """
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # TypeError for what was never in a file
        return {}
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    docstrings: dict[str, str] = {}
    # A docstring of a field is a mere string in the statement below it.
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(text))
            ):
                docstrings[name] = " ".join(text.split())
    return docstrings


LEFT_OUT: Final = "left out"
"""What stands for None, for which TOML has no word: the field is not written."""
REQUIRED: Final = "required"
"""What stands for a default where there is none."""


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _as_toml(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _as_toml(field.default_factory())
    return REQUIRED


def _as_toml(value: object) -> str:
    """Return a value as TOML writes it.

    >>> _as_toml(("lora", 2, True)), _as_toml({"name": "lora"})
    ('["lora", 2, true]', '{name = "lora"}')
    """
    match value:
        case None:
            return LEFT_OUT
        case bool():
            return str(value).lower()
        case str():  # in single quotes TOML takes a backslash as it is
            return f"'{value}'" if "\\" in value else f'"{value}"'
        case Mapping():
            pairs = [f"{key} = {_as_toml(item)}" for key, item in value.items()]
            return "{" + ", ".join(pairs) + "}"
        case tuple() | list():
            return "[" + ", ".join(_as_toml(item) for item in value) + "]"
        case _:
            return str(value)


PLAIN: Final[Mapping[type[Any], str]] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
    dict: "table",
}
"""Types in words."""


def _takes(kind: Any) -> str:
    """Return in words which values a field of type ``kind`` takes.

    >>> _takes(Annotated[int, Ge(1)])
    'whole number, at least 1'
    >>> _takes(Literal["iid", "shards"])
    '"iid" or "shards"'
    >>> _takes(float | None)
    'number'
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return ", ".join([_takes(arguments[0]), *_bounds(arguments[1:])])
    if origin is Literal:
        return " or ".join(_as_toml(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        # None says that a field may be left out, which its default says already.
        return " or ".join(_takes(one) for one in arguments if one is not types.NoneType)
    if origin is tuple:
        return f"list of: {_takes(arguments[0])}"
    plain = origin or kind
    return PLAIN.get(plain, getattr(plain, "__name__", str(plain)))


def _bounds(marks: Sequence[object]) -> list[str]:
    """Return in words the bounds among the marks of an annotated type."""
    words: list[str] = []
    for mark in marks:
        match mark:
            case Ge(bound):
                words.append(f"at least {written_bound(bound)}")
            case Gt(bound):
                words.append(f"above {written_bound(bound)}")
            case Le(bound):
                words.append(f"at most {written_bound(bound)}")
            case Lt(bound):
                words.append(f"below {written_bound(bound)}")
            case WorthTuning(values):
                words.append(f"tuned over {', '.join(map(str, values))}")
    return words
