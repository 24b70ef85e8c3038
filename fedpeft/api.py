"""The Python API: from settings to a trained adapter in a line; what the commands do, as functions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft.assembly import assemble
from fedpeft.config import from_tree
from fedpeft.journal import Progress, Watch
from fedpeft.runs import refuse_existing, resume, start
from fedpeft.trained import Trained, open_run

__all__ = ["Progress", "Trained", "open_run", "resume", "train"]


def train(
    settings: Mapping[str, Any], folder: Path | str, *, overwrite: bool = False, watch: Watch = lambda _: None
) -> Trained:
    """Run the federation that ``settings`` describe, nested as in a TOML file, in ``folder``; return what it has learnt.

    ``watch`` is called after every round with a ``Progress``. Raises BadInput for settings that do not work, before
    anything is written, and for a folder that exists, unless ``overwrite``.
    """
    config, place = from_tree(settings), Path(folder)
    refuse_existing(place, overwrite)
    start(assemble(config), place, overwrite=overwrite, watch=watch)
    return open_run(place)
