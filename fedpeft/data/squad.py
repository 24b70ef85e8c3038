"""JSON in the form of SQuAD: articles of paragraphs, a context each, with questions about it.

Rajpurkar et al. 2016 (version 1.1) and Rajpurkar, Jia and Liang 2018 (2.0, with questions that have
no answer).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from fedpeft.data.json_records import Located, Record
from fedpeft.errors import BadInput

PARAGRAPHS: Final = "paragraphs"
CONTEXT: Final = "context"
QUESTIONS: Final = "qas"


def questions(located: Iterable[Located]) -> Iterator[Located]:
    """Yield a record for each question of every article, and all records that are none.

    Such a record has the columns ``id``, ``title`` (of the article), ``context``, ``question`` and
    ``answers``, an empty list where there is none. Raises BadInput for a part of an
    article that lacks something.

    >>> about = {"question": "Where?", "id": "q1", "answers": [{"text": "here", "answer_start": 0}]}
    >>> article = {"title": "T", "paragraphs": [{"context": "here", "qas": [about]}]}
    >>> [(where, record)] = questions([("file: record 1", article)])
    >>> where, record["title"], record["question"]
    ('file: record 1, paragraph 1, question 1', 'T', 'Where?')
    """
    for where, record in located:
        if _is_article(record):
            yield from _of_article(where, record)
        else:
            yield where, record


def _is_article(record: Record) -> bool:
    """Return whether a record has the form of an article: paragraphs that have questions."""
    paragraphs = record.get(PARAGRAPHS)
    return (
        isinstance(paragraphs, list)
        and bool(paragraphs)
        and isinstance(paragraphs[0], Mapping)
        and QUESTIONS in paragraphs[0]
    )


def _of_article(where: str, article: Record) -> Iterator[Located]:
    """Yield a record for each question of an article, which stands at ``where``."""
    for paragraph_number, paragraph in enumerate(_objects(where, article, PARAGRAPHS), 1):
        place = f"{where}, paragraph {paragraph_number}"
        for question_number, asked in enumerate(_objects(place, paragraph, QUESTIONS), 1):
            question_place = f"{place}, question {question_number}"
            yield (
                question_place,
                {
                    "id": asked.get("id", ""),
                    "title": article.get("title", ""),
                    "context": _part(place, paragraph, CONTEXT),
                    "question": _part(question_place, asked, "question"),
                    "answers": _part(question_place, asked, "answers"),
                },
            )


def _objects(where: str, record: Record, name: str) -> Sequence[Record]:
    """Return the list of objects that ``record`` has under ``name``; BadInput for anything else."""
    found = _part(where, record, name)
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise BadInput(f"{where}: its {name!r} must be a list of objects, as in SQuAD's files")
    return found


def _part(where: str, record: Record, name: str) -> object:
    """Return what ``record`` has under ``name``; BadInput where it has nothing there."""
    if name not in record:
        names = ", ".join(map(repr, record)) or "nothing"
        raise BadInput(f"{where} has no {name!r}, as in SQuAD's files, but {names}")
    return record[name]
