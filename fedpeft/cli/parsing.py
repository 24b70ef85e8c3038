"""What is typed on the command line -> settings, names and numbers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedpeft.errors import BadInput
from fedpeft.experiment.config import merge, name_today, parse_set, read, renamed, value


def tree(path: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Return the settings in a TOML file with the ``--set`` options laid over them."""
    overrides = [parse_set(assignment) for assignment in settings]
    return merge(read(path), *overrides)


def settings(path: Path, assignments: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Return the settings of ``tree`` under today's names; ``say`` is told of old ones."""
    return renamed(tree(path, assignments), say)


def compared(method_names: str, seed_numbers: str = "") -> list[str]:
    """Return what the options ``--methods`` and ``--seeds`` say as assignments of ``--set``.

    >>> compared("lora,full", "0,1"), compared("")
    (["compare.methods=['lora', 'full']", 'compare.seeds=[0, 1]'], [])
    """
    assignments: list[str] = []
    if method_names:
        assignments.append(f"compare.methods={names(method_names)}")
    if seed_numbers:
        assignments.append(f"compare.seeds={seeds(seed_numbers)}")
    return assignments


def names(text: str) -> list[str]:
    """Return names that are separated by commas.

    >>> names("lora, full")
    ['lora', 'full']
    """
    return [name.strip() for name in text.split(",")]


def seeds(text: str) -> list[int]:
    """Return whole numbers that are separated by commas; anything else raises BadInput.

    >>> seeds("0,1")
    [0, 1]
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(
            f"compare.seeds = {text!r}: write whole numbers, such as --seeds 0,1,2"
        ) from error


def values(assignments: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values to try by field; what has another form, or a key twice, raises BadInput.

    >>> values(["training.lr=1e-3,3e-3", "method.name=lora,full"])
    {'training.lr': [0.001, 0.003], 'method.name': ['lora', 'full']}
    """
    swept: dict[str, list[Any]] = {}
    for assignment in assignments:
        # At the first "=": values may hold more of them.
        key, _, listed = assignment.partition("=")
        key = key.strip()
        if not all(key.split(".")) or not listed:
            raise BadInput(
                f"{key!r}: write what to try as section.field=value,value, "
                "such as training.lr=0.001,0.003"
            )
        if key in swept:
            raise BadInput(
                f"{key}: is given twice; write its values in one, such as training.lr=0.001,0.003"
            )
        swept[key] = [value(part) for part in listed.split(",")]
    return swept


def tried(assignments: Sequence[str], say: Callable[[str], None]) -> dict[str, list[Any]]:
    """Return the values to try by today's names of the fields; ``say`` is told of old ones."""
    # An old and a new name of one field are one field, with the values of both.
    merged: dict[str, list[Any]] = {}
    for name, listed in values(assignments).items():
        merged.setdefault(name_today(name, say), []).extend(listed)
    return merged
