"""Federated parameter-efficient fine-tuning of language models.

SLoRA, FeDeRA, FedARA and their rivals, side by side. The names of ``fedpeft.api`` can be imported
from here: ``from fedpeft import train``. They are looked up when they are first used, as torch and
transformers take seconds to import, and ``fedpeft --help`` should not wait for them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for them, ``__getattr__`` gives objects of no known type
    from fedpeft.api import Progress, Trained, open_run, resume, train

__all__ = ["Progress", "Trained", "open_run", "resume", "train"]


def __getattr__(name: str) -> object:
    """Return a name of ``fedpeft.api``; called for what is not here yet (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedpeft import api  # noqa: PLC0415  # not before it is needed

    return getattr(api, name)


def __dir__() -> list[str]:
    """Return all names, also those that have not been asked for yet."""
    return sorted({*globals(), *__all__})
