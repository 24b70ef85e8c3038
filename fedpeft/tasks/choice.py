"""The section `task` of a configuration: what is learnt."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

Chat = Literal["auto", "always", "never"]
"""Whether a chat template is used."""


@dataclass(frozen=True)
class TaskSection:
    """What is learnt."""

    kind: Literal["classification", "tagging", "qa", "causal_lm"] = "classification"
    """The kind of task: `classification` gives every text, or pair of texts, one label; `tagging`
    finds names in sentences of words; `qa` finds answers to questions in a context; `causal_lm`
    tunes a language model on prompts and responses."""
    metric: str | None = None
    """The metric that compares runs; left out: the first of the task's. `accuracy`, `macro_f1` or
    `matthews` of a classification; `f1`, `precision` or `recall` of tagging; `f1` or `exact_match`
    of qa; `perplexity` or `exact_match` of a causal LM."""
    stride: Annotated[int, Ge(0)] | None = None
    """Tokens that neighbouring windows of a context share, of `qa`, but no more than half of what
    the question leaves of `model.max_length`; left out: 128, which a shorter window refuses."""
    max_answer_length: Annotated[int, Ge(1)] = 30
    """Tokens of an answer, at most, of `qa`."""
    unanswerable: bool = False
    """Whether a question may have no answer, of `qa`, as in SQuAD 2.0."""
    null_threshold: float = 0.0
    """By how much the score of no answer must exceed that of the best one to be given, of `qa`."""
    chat: Chat = "auto"
    """Whether prompts are written with the chat template of the model's tokenizer, of `causal_lm`:
    `auto` does where there is one, and otherwise writes prompt, new line, response, end of text."""
    generate: Annotated[int, Ge(0)] = 0
    """Tokens of a generated response at most, for `exact_match` of `causal_lm`; 0 generates none
    in evaluations. Prompt and response stay within `model.max_length` tokens together."""
    generate_limit: Annotated[int, Ge(1)] = 64
    """Texts for which a response is generated in an evaluation, the first of those that are
    scored: generating takes a pass for every token."""
    answer_pattern: str | None = None
    """A regular expression with one group, such as `#### (-?[0-9.,]+)`: a generated response is
    right where the group's last match is that in the reference; left out, where all of it is."""
