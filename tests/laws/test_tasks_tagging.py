"""Laws of tagging: seqeval's scores, one meaning of every scheme, the loss of transformers, what cannot be read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

from fedpeft import data
from fedpeft.data import Columns, Dataset, Rows
from fedpeft.errors import BadInput
from fedpeft.tasks import TASKS, Encoded, Example, Tagging
from fedpeft.tasks.padding import IGNORED
from fedpeft.tasks.tag_schemes import Span, bio, spans
from fedpeft.tasks.tagging import Sentence
from tests.tiny_tasks import TASK_CASES, one_hot, slow_tokenizer, tokenizer

CPU = torch.device("cpu")
CASE = TASK_CASES["tagging"]
LABELS = CASE.names
SCHEMA = TASKS["tagging"].schema


def tagging(max_length: int = 20) -> Tagging:
    task = CASE.task(max_length)
    assert isinstance(task, Tagging)
    return task


def rows(*sentences: tuple[str, str]) -> Rows:
    """Return rows of (words, tags), each split at blanks."""
    columns = {
        "words": tuple(tuple(words.split()) for words, _ in sentences),
        "tags": tuple(tuple(tags.split()) for _, tags in sentences),
    }
    return Rows(columns, ("O",) * len(sentences))


def tagged(true: Sequence[str], row: int) -> Example:
    """Return a sentence whose every word is one token."""
    words = ("x",) * len(true)
    source = Sentence(words, bio(true), tuple(range(len(true))))
    labels = torch.tensor([LABELS.index(tag) for tag in source.tags], dtype=torch.int64)
    ids = torch.ones(len(true), dtype=torch.int64)
    return Example(ids, labels, row, weight=len(true), source=source)


def predicting(tags: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return what a model says that predicts ``tags``."""
    return {"logits": one_hot([LABELS.index(tag) for tag in tags], len(LABELS))}


a_pair_of_tags = st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS))
some_sentences = st.lists(st.lists(a_pair_of_tags, min_size=1, max_size=8), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(some_sentences)
def test_scores_are_those_of_seqeval(sentences: list[list[tuple[str, str]]]) -> None:
    """Of any tags of model and data, also such as begin a name with ``I-`` or change its type inside."""
    true = [[one for one, _ in sentence] for sentence in sentences]
    predicted = [[other for _, other in sentence] for sentence in sentences]
    examples = Encoded([tagged(tags, row) for row, tags in enumerate(true)])
    task = tagging()
    metrics = task.metrics(task.score([predicting(tags) for tags in predicted], examples))
    for name, reference in (
        ("precision", precision_score),
        ("recall", recall_score),
        ("f1", f1_score),
    ):
        due = reference(true, predicted, zero_division=0)
        assert metrics[name] == pytest.approx(float(due)), name


@given(some_sentences)
def test_accuracy_is_that_of_single_words(sentences: list[list[tuple[str, str]]]) -> None:
    true = [list(bio([one for one, _ in sentence])) for sentence in sentences]
    predicted = [list(bio([other for _, other in sentence])) for sentence in sentences]
    examples = Encoded([tagged(tags, row) for row, tags in enumerate(true)])
    task = tagging()
    counts = task.score([predicting(tags) for tags in predicted], examples)
    assert task.metrics(counts)["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert task.fault(counts) == ""


a_name = st.tuples(st.sampled_from(["PER", "LOC"]), st.integers(1, 4), st.integers(0, 2))
"""Type, words, words after it that are no name."""


@given(st.lists(a_name, max_size=6))
def test_all_schemes_mean_the_same_names(names: list[tuple[str, int, int]]) -> None:
    """Plain types cannot part two neighbours of one type, so there these are one name."""
    due: list[Span] = []
    written: dict[str, list[str]] = {scheme: [] for scheme in ("bio", "iob1", "bioes", "bilou")}
    plain: list[str] = []
    before = ""  # the type of the word before
    for type_name, length, gap in names:
        due.append(Span(type_name, len(plain), len(plain) + length))
        inside = [f"I-{type_name}"] * (length - 1)
        first = "B" if before == type_name else "I"
        written["bio"] += [f"B-{type_name}", *inside]
        written["iob1"] += [f"{first}-{type_name}", *inside]
        for scheme, single, last in (("bioes", "S", "E"), ("bilou", "U", "L")):
            several = [f"B-{type_name}", *inside[:-1], f"{last}-{type_name}"]
            written[scheme] += [f"{single}-{type_name}"] if length == 1 else several
        plain += [type_name] * length
        before = "" if gap else type_name
        for sentence in (*written.values(), plain):
            sentence.extend(["O"] * gap)
    for scheme, tags in written.items():
        assert spans(bio(tags)) == due, scheme
        assert list(bio(tags)) == written["bio"], scheme
    assert bio(bio(plain)) == bio(plain)
    assert spans(bio(plain)) == _joined(due)


def _joined(names: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for name in names:
        if joined and (joined[-1].type, joined[-1].end) == (name.type, name.start):
            joined[-1] = joined[-1]._replace(end=name.end)
        else:
            joined.append(name)
    return joined


def test_a_word_is_labelled_at_its_first_token() -> None:
    [example] = tagging().encode(rows(("the ox stone", "O B-PER I-PER")))
    tokens = tokenizer().convert_ids_to_tokens(example.ids)
    assert tokens == ["[CLS]", "the", "o", "##x", "stone", "[SEP]"]
    o, b, i = (LABELS.index(tag) for tag in ("O", "B-PER", "I-PER"))
    assert example.labels.tolist() == [IGNORED, o, b, IGNORED, i, IGNORED]
    assert (example.weight, example.source.first_tokens) == (3, (1, 2, 4))


def test_words_beyond_the_cut_count_as_missed() -> None:
    task = tagging(max_length=5)  # three words and two marks
    examples = task.encode(rows(("the red stone went blue", "B-PER I-PER O B-LOC B-PER")))
    [example] = examples
    assert example.source.first_tokens == (1, 2, 3, None, None)
    right = [0 if label == IGNORED else label for label in example.labels.tolist()]
    counts = task.score([{"logits": one_hot(right, len(LABELS))}], examples)
    metrics = task.metrics(counts)
    assert metrics["precision"] == 1
    assert metrics["recall"] == pytest.approx(1 / 3)
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert int(counts["tokens"]) == 3


def test_the_loss_of_a_batch_is_that_of_transformers() -> None:
    """It is the mean over words, so long sentences weigh more."""
    task, model = tagging(), CASE.make()
    call: Any = model
    examples = task.encode(CASE.rows(9, 4))
    batch = task.collate(examples, CPU)
    weights = torch.tensor([example.weight for example in examples])
    assert len(set(weights.tolist())) > 1
    ours = (task.losses(model, batch) * weights).sum() / weights.sum()
    torch.testing.assert_close(ours, call(**batch).loss, rtol=1e-5, atol=1e-5)


def test_the_mean_loss_of_a_score_is_that_of_transformers() -> None:
    task, model = tagging(), CASE.make()
    call: Any = model
    examples = task.encode(CASE.rows(9, 4))
    batch = task.collate(examples, CPU)
    outputs = task.predict(model, batch)["logits"]
    counts = task.score([{"logits": one} for one in outputs], examples)
    assert task.metrics(counts)["loss"] == pytest.approx(float(call(**batch).loss), rel=1e-5)


def test_a_sentence_is_answered_with_its_names_in_brackets() -> None:
    task = tagging()
    examples = task.encode(task.unanswered(["the ox went", "red"]))
    predictions = []
    for example, tags in zip(examples, (["O", "B-PER", "O"], ["I-LOC"]), strict=True):
        labels = [0] * len(example)
        for position, tag in zip(example.source.first_tokens, tags, strict=True):
            labels[position] = LABELS.index(tag)
        predictions.append({"logits": one_hot(labels, len(LABELS))})
    answers = task.answers(predictions, examples)
    assert [answer.sentence for answer in answers] == ["the [ox](PER) went", "[red](LOC)"]


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words have 1 tags"),
        (
            {"tokens": ["a"], "tags": ["B-"]},
            "the tags in column 'tags' holds 'B-', which is no tag",
        ),
        ({"tokens": ["a"], "tags": [""]}, "the tags in column 'tags' holds '', which is no tag"),
        ({"tokens": ["a"], "tags": [3]}, "the tags in column 'tags' must be a string, not 3"),
        ({"tokens": ["a"], "tags": 3}, "the tags in column 'tags' must be a list of strings"),
        ({"tokens": {"a": 1}, "tags": ["O"]}, "the words in column 'tokens' must be a list"),
    ],
)
def test_what_cannot_be_tagged_is_named_with_its_line(
    record: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"tokens": ["Ada", "lives"], "tags": "B-PER O"}
    path.write_text("\n".join(json.dumps(line) for line in (good, record)))
    with pytest.raises(BadInput) as caught:
        data.read(path, Columns(SCHEMA, {"words": "tokens", "tags": "tags"}))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert why in str(caught.value)


def test_a_type_that_train_lacks_is_refused() -> None:
    train, other = rows(("a b", "B-PER O")), rows(("a", "I-ORG"))
    names = TASKS["tagging"].names
    with pytest.raises(BadInput, match="mine: test has names of type 'ORG', train PER"):
        names(Dataset("mine", train, train, other))
    with pytest.raises(BadInput, match="mine: every tag of train is O"):
        names(Dataset("mine", rows(("a b", "O O")), train, train))
    assert names(Dataset("mine", train, train, train)) == ("O", "B-PER", "I-PER")


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(BadInput, match="SlowTokenizer has no fast version"):
        Tagging(LABELS, 20).with_tokenizer(slow_tokenizer())
    with pytest.raises(BadInput, match="without a context"):
        tagging().unanswered(["the ox"], "a context")


def test_partitions_divide_by_the_commonest_type_of_a_sentence() -> None:
    label = SCHEMA.label
    assert label is not None
    assert label({"tags": ("B-LOC", "O", "B-PER", "O", "B-PER")}) == "PER"
    assert label({"tags": ("B-LOC", "I-LOC", "B-PER")}) == "LOC"
    assert label({"tags": ("O", "O")}) == "O"


@pytest.mark.parametrize(
    ("names", "counted", "tokens"),
    [
        ([[3, 0], [2, 0], [3, 0]], [1, 2], 2),
        ([[0, 0], [-1, 0], [0, 0]], [1, 2], 2),
        ([[0, 0], [0, 0], [0, 0]], [3, 2], 2),
        ([[0, 0], [0, 0], [0, 0]], [1, 2], 3),
    ],
    ids=[
        "more right than predicted",
        "negative",
        "more right than words",
        "more tokens than words",
    ],
)
def test_counts_that_cannot_be_true_are_found(
    names: list[list[int]], counted: list[int], tokens: int
) -> None:
    counts = {
        "examples": torch.tensor(1),
        "names": torch.tensor(names),
        "words": torch.tensor(counted),
        "tokens": torch.tensor(tokens),
        "loss": torch.tensor(1.0, dtype=torch.float64),
    }
    assert "are no scores of sentences" in tagging().fault(counts)
