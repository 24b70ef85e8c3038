"""The section `task` of a configuration: what is learnt."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge


@dataclass(frozen=True)
class TaskSection:
    """What is learnt."""

    kind: Literal["classification", "tagging", "qa"] = "classification"
    """The kind of task: `classification` gives every text, or pair of texts, one label; `tagging`
    finds names in sentences of words; `qa` finds answers to questions in a context."""
    metric: str | None = None
    """The metric that compares runs; left out: the first of the task's. `accuracy`, `macro_f1` or
    `matthews` of a classification; `f1`, `precision` or `recall` of tagging; `f1` or `exact_match`
    of qa."""
    stride: Annotated[int, Ge(0)] | None = None
    """Tokens that neighbouring windows of a context share, of `qa`, but no more than half of what
    the question leaves of `model.max_length`; left out: 128, which a shorter window refuses."""
    max_answer_length: Annotated[int, Ge(1)] = 30
    """Tokens of an answer, at most, of `qa`."""
    unanswerable: bool = False
    """Whether a question may have no answer, of `qa`, as in SQuAD 2.0."""
    null_threshold: float = 0.0
    """By how much the score of no answer must exceed that of the best one to be given, of `qa`."""
