"""Answers that stand in a context: how data write them, where they are, how two of them compare.

Scores follow the script of SQuAD 2.0 (Rajpurkar, Jia and Liang 2018). That of SQuAD 1.1 differs
only for answers of nothing but articles and punctuation.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from fedpeft.data.schema import shown, text

FORMS: Final = (
    'a text, a list of texts, {"text": [...], "answer_start": [...]} or a list of '
    '{"text": ..., "answer_start": ...}'
)
_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


class Gold(NamedTuple):
    """A right answer: its text, and the character of the context where it starts, if that is known.

    ``start`` is what the data say, which need not be true.
    """

    text: str
    start: int | None = None


class Place(NamedTuple):
    """The characters of a context from ``start`` up to but without ``end``."""

    start: int
    end: int


class Agreement(NamedTuple):
    """How well an answer agrees with the right ones, from 0 to 1."""

    f1: float
    exact: float


def read_answers(value: Any) -> tuple[Gold, ...]:
    """Return the right answers to a question in any of the forms in which data hold them.

    Blank ones do not count; without any, the question has no answer. A ValueError says what is
    wrong with the value.

    >>> read_answers({"text": ["Rome", "in Rome"], "answer_start": [12, 9]})
    (Gold(text='Rome', start=12), Gold(text='in Rome', start=9))
    >>> read_answers([{"text": "Rome", "answer_start": 12}])
    (Gold(text='Rome', start=12),)
    >>> read_answers("Rome"), read_answers([])
    ((Gold(text='Rome', start=None),), ())
    """
    answers: list[Gold] = []
    for answer_text, start in _parts(value):
        if text(answer_text).strip():
            answers.append(Gold(answer_text, _character(start)))
    return tuple(answers)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """Return (text, start) of every answer, unchecked; None for a start that is not given."""
    match value:
        case str():
            return [(value, None)]
        case {"text": list() | tuple() as texts}:
            starts = value.get("answer_start")
            if starts is None:
                return [(answer_text, None) for answer_text in texts]
            if not isinstance(starts, list | tuple) or len(starts) != len(texts):
                raise ValueError(f"has not one answer_start a text: {shown(value)}")
            return list(zip(texts, starts, strict=True))
        case {"text": str() as answer_text}:
            return [(answer_text, value.get("answer_start"))]
        case list() | tuple():
            parts: list[tuple[Any, Any]] = []
            for answer in value:
                if not isinstance(answer, str | Mapping):
                    raise ValueError(f"must be {FORMS}, not {shown(value)}")
                parts += _parts(answer)
            return parts
    raise ValueError(f"must be {FORMS}, not {shown(value)}")


def _character(start: Any) -> int | None:
    """Return the number of a character, counted from 0; None where it is not given."""
    if start is None:
        return None
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise ValueError(f"has an answer_start that is no whole number from 0 on: {shown(start)}")
    return start


def place_of(answers: Sequence[Gold], context: str) -> Place | None:
    """Return where the first of ``answers`` that occurs in ``context`` stands; None if none does.

    Of several occurrences the one that is nearest to the answer's start counts, without a start the
    first one.

    >>> place_of([Gold("to be", 13)], "to be or not to be")
    Place(start=13, end=18)
    """
    for answer in answers:
        # Blanks around an answer belong to no token.
        stripped = answer.text.strip()
        blanks = len(answer.text) - len(answer.text.lstrip())
        wanted = 0 if answer.start is None else answer.start + blanks
        after = context.find(stripped, wanted)
        before = context.rfind(stripped, 0, wanted + len(stripped))  # it starts by ``wanted``
        starts = [start for start in (before, after) if start >= 0]
        if starts:
            nearest = min(starts, key=lambda start: abs(start - wanted))
            return Place(nearest, nearest + len(stripped))
    return None


def normalised(answer: str) -> str:
    """Return an answer as SQuAD compares it: without case, punctuation, articles, extra blanks.

    >>> normalised("The  Eiffel Tower!")
    'eiffel tower'
    """
    plain = answer.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def agreement(answer: str, right: Sequence[str]) -> Agreement:
    """Return the best agreement of ``answer`` with one of the ``right`` ones.

    F1 is of the words that two answers share. Where there is no right answer, the empty one is.

    >>> agreement("Tower in Paris", ["the Eiffel tower", "Paris"])
    Agreement(f1=0.5, exact=0.0)
    >>> agreement("", [])
    Agreement(f1=1.0, exact=1.0)
    """
    said = normalised(answer)
    right_ones = [known for known in map(normalised, right) if known] or [""]
    f1 = max(_f1(said.split(), known.split()) for known in right_ones)
    return Agreement(f1, float(said in right_ones))


def _f1(said: Sequence[str], known: Sequence[str]) -> float:
    """Return 2 shared / (said + known) of two lists of words; empty ones agree with each other."""
    if not said or not known:
        return float(said == known)
    shared = (Counter(said) & Counter(known)).total()
    return 2 * shared / (len(said) + len(known))
