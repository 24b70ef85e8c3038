"""What the libraries below say when they cannot load a model, in one line that tells the cause."""

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from logging.handlers import BufferingHandler
from typing import Final

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging

SENTENCES: Final = {Exception, OSError, ValueError, RuntimeError, ImportError}
"""Errors whose text is a sentence; the text of others, such as a KeyError, needs their name."""
LONGEST: Final = 300
"""Characters of a cause that are shown: a few lines of a console, while some errors fill pages."""


def cause(error: BaseException) -> str:
    """Return in one line what went wrong.

    >>> cause(OSError("no such file"))
    'no such file'
    >>> cause(KeyError("bert"))
    "KeyError: 'bert'"
    """
    text = line(str(error))
    if text and type(error) in SENTENCES:
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def line(text: str) -> str:
    r"""Return the first line of ``text``, with the next where it ends in a colon.

    >>> line("Errors in loading:\n  size mismatch\n  and more")
    'Errors in loading: size mismatch'
    """
    kept: list[str] = []
    for part in text.splitlines():
        if part.strip():
            kept.append(part.strip())
        if kept and not kept[-1].endswith(":"):  # a colon announces the cause, a line below
            break
    sentence = " ".join(kept)
    return sentence if len(sentence) <= LONGEST else sentence[: LONGEST - 3] + "..."


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield ``error`` and, one after another, the errors that led to it."""
    while error is not None:
        yield error
        # Raised with `from`, or while another one was handled.
        error = error.__cause__ or error.__context__


def absent(*packages: str) -> str:
    """Return those of ``packages`` that are not installed, as pip takes them."""
    modules = {"protobuf": "google.protobuf"}  # where a package is imported by another name
    missing: list[str] = []
    for name in packages:
        if not _importable(modules.get(name, name)):
            missing.append(name)
    return " ".join(missing)


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing, too
        return False


@contextmanager
def quiet() -> Iterator[BufferingHandler]:
    """Keep bars and warnings off the terminal; yield the handler that collects the warnings."""
    # Collected and not dropped: a warning may tell the cause of an error that comes after it.
    heard = BufferingHandler(capacity=1000)
    before, hub_before = logging.get_verbosity(), hub_logging.get_verbosity()
    logging.set_verbosity_warning()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.disable_default_handler()
    logging.add_handler(heard)
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield heard
    finally:
        hub_logging.set_verbosity(hub_before)
        logging.remove_handler(heard)
        logging.enable_default_handler()
        logging.set_verbosity(before)
