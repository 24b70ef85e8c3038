"""A tree of settings -> a checked dataclass, or a line that names the key and what may be there."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fedpeft.errors import BadInput

T = TypeVar("T")

Tree = Mapping[str, Any]
"""Nested settings as TOML gives them."""


@cache
def adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Return pydantic's reader and writer of ``kind``, which takes 20 ms to build."""
    return TypeAdapter(kind)


def checked(kind: type[T], tree: Tree, prefix: str, also: Sequence[str] = ()) -> T:
    """Return ``kind`` made from ``tree``, whose keys stand under ``prefix``.

    ``also``: fields that are read elsewhere, for hints. Raises BadInput for the first mistake.
    """
    # pydantic would pass over unknown keys, and take true for 1.
    _check_keys(kind, tree, prefix, also)
    try:
        reader = adapter(kind)  # type: ignore[arg-type]  # a type is hashable
        instance: T = reader.validate_python(dict(tree))
    except ValidationError as error:
        raise BadInput(_explanation(error.errors(), tree, prefix)) from error
    return instance


def _explanation(errors: Sequence[ErrorDetails], tree: Tree, prefix: str) -> str:
    """Return the first of pydantic's ``errors`` on ``tree`` as one line.

    Where a field may be one of several types there is an error for each, at the same place.
    """
    first = errors[0]
    key, setting = _key_and_value(first["loc"], tree, prefix)
    if first["type"] == "missing":
        return f"{key}{'.' if key else ''}{first['loc'][-1]} is missing"

    inputs = _inputs_wanted(errors, tree, prefix, key)
    if len(inputs) > 1:
        return f"{key} = {setting!r}: input should be {' or '.join(inputs)}"
    bounds = first.get("ctx", {})  # pydantic's name -> the bound that was passed
    match first["type"]:
        case "greater_than_equal":
            says = f"must be at least {written_bound(bounds['ge'])}"
        case "greater_than":
            says = f"must be greater than {written_bound(bounds['gt'])}"
        case "less_than_equal":
            says = f"must be at most {written_bound(bounds['le'])}"
        case "less_than":
            says = f"must be less than {written_bound(bounds['lt'])}"
        case "path_type":  # a number, say, which TOML writes without quotes
            says = "write a path in quotes"
        case "dict_type":
            says = f"is a section; write {key}.field=value"
        case "tuple_type" | "list_type":
            says = "is a list; write it with brackets, such as [1, 2] or ['a', 'b']"
        case _:
            says = first["msg"][0].lower() + first["msg"][1:]
    return f"{key} = {setting!r}: {says}"


def _inputs_wanted(errors: Sequence[ErrorDetails], tree: Tree, prefix: str, key: str) -> list[str]:
    """Return what each of the ``errors`` at ``key`` wants, such as ``a valid string``."""
    inputs: list[str] = []
    for error in errors:
        if _key_and_value(error["loc"], tree, prefix)[0] == key:
            # "Input should be a valid integer, unable to parse ..." -> "a valid integer"
            inputs.append(error["msg"].removeprefix("Input should be ").split(",")[0])
    return inputs


def written_bound(bound: object) -> str:
    """Return a bound as it is written: ``0`` for 0.0, and all digits of a large one.

    >>> written_bound(0.0), written_bound(2**62)
    ('0', '4611686018427387904')
    """
    return str(bound).removesuffix(".0")


def _key_and_value(loc: Sequence[str | int], tree: Any, prefix: str) -> tuple[str, object]:
    """Return the key that pydantic's ``loc`` leads to, such as ``compare.seeds[1]``, and its value.

    After the value, a ``loc`` goes on with the types that were tried on it.
    """
    key, branch = prefix, tree
    for part in loc:
        if isinstance(branch, Mapping) and part in branch:
            key = f"{key}.{part}" if key else str(part)
        elif isinstance(branch, list | tuple) and isinstance(part, int):
            key = f"{key}[{part}]"
        else:
            break  # a missing field, or the name of a type
        branch = branch[part]
    return key, branch


def check_finite(value: object, key: str) -> None:
    """Refuse nan and inf, which TOML can write, at any depth."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            check_finite(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            check_finite(inner, f"{key}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{key} = {value}: give a finite number")


def _check_keys(kind: type[Any], tree: Tree, prefix: str, also: Sequence[str] = ()) -> None:
    """Refuse keys that ``kind`` has no field for, at any depth."""
    fields: dict[str, dataclasses.Field[Any]] = {}
    for part in dataclasses.fields(kind):
        if part.init:  # others cannot be set
            fields[part.name] = part
    for key, value in tree.items():
        where = f"{prefix}.{key}" if prefix else key
        if key not in fields:
            raise BadInput(f"unknown key {where!r}; {nearest(key, [*fields, *also])}")
        section = fields[key].type  # a text where a module postpones its annotations
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            if not isinstance(value, Mapping):
                raise BadInput(f"{where} = {value!r}: is a section; write {where}.field=value")
            _check_keys(section, value, where)
        elif (named := _kind_of_each(section)) is not None and isinstance(value, Mapping):
            _check_named_tables(named, value, where)
        elif section not in (bool, "bool"):
            _check_no_bool(value, where)


def _check_named_tables(kind: type[Any], tables: Tree, prefix: str) -> None:
    """Refuse keys that ``kind`` has no field for in each of ``tables``."""
    for name, table in tables.items():
        where = f"{prefix}.{name}"
        if not isinstance(table, Mapping):
            raise BadInput(f"{where} = {table!r}: is a section; write {where}.field=value")
        _check_keys(kind, table, where)


def _kind_of_each(section: object) -> type[Any] | None:
    """Return the dataclass of the tables in a field ``dict[str, <dataclass>]``, else None."""
    arguments = get_args(section)
    named = arguments[-1] if get_origin(section) is dict else None
    return named if isinstance(named, type) and dataclasses.is_dataclass(named) else None


def _check_no_bool(value: object, key: str) -> None:
    """Refuse true and false, which pydantic would take for 1 and 0, as a value and in a list."""
    if isinstance(value, bool):
        raise BadInput(f"{key} = {str(value).lower()}: true and false are no value of this field")
    if isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_no_bool(inner, f"{key}[{index}]")


def nearest(name: str, choices: Sequence[str]) -> str:
    """Return a hint at the choice nearest to ``name``, or at all of them.

    >>> nearest("lorra", ["lora", "full"]), nearest("x", ["lora", "full"])
    ("did you mean 'lora'?", 'choose from: lora, full')
    """
    # A share of equal letters of 0.5: below difflib's usual 0.6, as short names differ fast.
    near = get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(choices) or 'none'}"
