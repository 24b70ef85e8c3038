"""What is typed on the command line -> settings, names and numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpeft.errors import BadInput
from fedpeft.experiment.config import merge, parse_set, read, value


def tree(path: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Return the settings in a TOML file with the ``--set`` options laid over them."""
    return merge(read(path), *(parse_set(assignment) for assignment in settings))


def names(text: str) -> list[str]:
    """Return ``["lora", "full"]`` for ``"lora, full"``."""
    return [name.strip() for name in text.split(",")]


def seeds(text: str) -> list[int]:
    """Return ``[0, 1]`` for ``"0,1"``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(
            f"compare.seeds = {text!r}: write whole numbers, such as --seeds 0,1,2"
        ) from error


def values(assignments: Sequence[str]) -> dict[str, list[Any]]:
    """Return ``{"training.lr": [0.001, 0.003]}`` for ``["training.lr=1e-3,3e-3"]``; each key once."""
    found: dict[str, list[Any]] = {}
    for assignment in assignments:
        key, _, tried = assignment.partition("=")
        key = key.strip()
        if not all(key.split(".")) or not tried:
            raise BadInput(
                f"{key!r}: write what to try as section.field=value,value, such as training.lr=0.001,0.003"
            )
        if key in found:
            raise BadInput(
                f"{key}: is given twice; write its values in one, such as training.lr=0.001,0.003"
            )
        found[key] = [value(part) for part in tried.split(",")]
    return found
