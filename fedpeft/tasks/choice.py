"""The section `task` of a configuration: what is learnt."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TaskSection:
    """What is learnt."""

    kind: Literal["classification", "tagging"] = "classification"
    """The kind of task: `classification` gives every text, or pair of texts, one label; `tagging`
    finds names in sentences of words."""
    metric: str | None = None
    """The metric that compares runs; left out: the first of the task's. `accuracy`, `macro_f1` or
    `matthews` of a classification; `f1`, `precision` or `recall` of tagging."""
