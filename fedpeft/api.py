"""The Python API: from settings to a trained adapter; what the commands do, as functions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft.experiment.build import build
from fedpeft.experiment.config import OnWarning, from_tree
from fedpeft.experiment.recorder import OnProgress, Progress
from fedpeft.experiment.run import resume, run_from_start
from fedpeft.experiment.run_folder import beginning
from fedpeft.experiment.trained import Trained, open_run

__all__ = ["Progress", "Trained", "open_run", "resume", "train"]


def train(
    settings: Mapping[str, Any],
    folder: Path | str,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = lambda _: None,
    on_warning: OnWarning = lambda _: None,
) -> Trained:
    """Train what ``settings`` describe, in ``folder``, and return what it has learnt.

    ``settings`` are nested as in a TOML file, such as ``{"method": {"name": "lora", "rank": 4}}``.
    ``on_progress`` is called after every round with a ``Progress``; ``on_warning`` is called with
    each line that the user should know. Raises BadInput for settings that do not work (before
    anything is written), for a folder that exists (unless ``overwrite``), and for a folder that
    another process writes.
    """
    config = from_tree(settings, on_warning)
    folder = Path(folder)
    # Claimed before the model is loaded: a folder that cannot be used is refused at once.
    with beginning(folder, overwrite=overwrite):
        federation = build(config)
        for note in federation.notes:
            on_warning(note)
        run_from_start(federation, folder, on_progress)
    # As anyone else would open it: whatever is returned here can be had from the folder again.
    return open_run(folder)
