"""Laws of question answering: SQuAD's scores, windows without a gap, the loss and the answers of transformers' script."""

import gzip
import json
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import data
from fedpeft.data import Columns, Dataset, Rows
from fedpeft.errors import BadInput
from fedpeft.tasks import TASKS, Encoded
from fedpeft.tasks.answers import Gold, Place, agreement, normalised, place_of, read_answers
from fedpeft.tasks.qa import QuestionAnswering, question_word
from fedpeft.tasks.spans import N_BEST
from fedpeft.tasks.windows import windows
from tests.tiny_tasks import CHARACTERS, TASK_CASES, WORDS, slow_tokenizer, tokenizer

CPU = torch.device("cpu")
CASE = TASK_CASES["qa"]
SCHEMA = TASKS["qa"].schema
NAMES = {"question": "question", "context": "context", "answers": "answers"}


def qa(max_length: int = 20, **chosen: Any) -> QuestionAnswering:
    task = CASE.task(max_length, **chosen)
    assert isinstance(task, QuestionAnswering)
    return task


def rows(*triples: tuple[str, str, Any]) -> Rows:
    """Return rows of (question, context, answers in one of their forms)."""
    questions, contexts, answers = zip(*triples, strict=True)
    columns = {
        "question": questions,
        "context": contexts,
        "answers": tuple(read_answers(one) for one in answers),
    }
    return Rows(columns, ("other",) * len(triples))


# Scores ---------------------------------------------------------------------------------------------------------------

some_words = st.lists(
    st.sampled_from(
        ["The", "the", "a", "An", "cat", "Cat!", "cats", "U.S.", "--", "in", "théa", "9"]
    ),
    max_size=6,
).map(" ".join)


def official_normalisation(answer: str) -> str:
    """SQuAD's ``normalize_answer``, step by step in its own order."""
    lowered = answer.lower()
    unpunctuated = "".join(
        character for character in lowered if character not in string.punctuation
    )
    without_articles = re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", unpunctuated)
    return " ".join(without_articles.split())


def official_f1(known: str, said: str) -> float:
    """SQuAD 2.0's ``compute_f1``."""
    known_tokens, said_tokens = (official_normalisation(text).split() for text in (known, said))
    common = Counter(known_tokens) & Counter(said_tokens)
    num_same = sum(common.values())
    if len(known_tokens) == 0 or len(said_tokens) == 0:
        return int(known_tokens == said_tokens)
    if num_same == 0:
        return 0
    precision, recall = num_same / len(said_tokens), num_same / len(known_tokens)
    return (2 * precision * recall) / (precision + recall)


@given(some_words, st.lists(some_words, max_size=3))
def test_scores_follow_the_official_rules(said: str, known: list[str]) -> None:
    assert normalised(said) == official_normalisation(said)
    golds = [answer for answer in known if official_normalisation(answer)] or [""]
    exact = max(official_normalisation(said) == official_normalisation(gold) for gold in golds)
    f1 = max(official_f1(gold, said) for gold in golds)
    assert agreement(said, known) == pytest.approx((f1, float(exact)))


@pytest.mark.parametrize(
    ("said", "known", "f1", "exact"),
    [
        ("The Cat.", ["a cat"], 1, 1),
        ("black cat", ["cat", "black dog"], 2 / 3, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("cat cat", ["cat"], 2 / 3, 0),
    ],
)
def test_scores_worked_out_by_hand(said: str, known: list[str], f1: float, exact: float) -> None:
    assert agreement(said, known) == pytest.approx((f1, exact))


def test_counts_are_sums_of_these_scores_and_their_metrics_means() -> None:
    """A question in several windows counts once."""
    task = qa(unanswerable=False)
    asked = rows(
        ("ox", " ".join(["river"] * 30), "river"),
        ("ox", "the tall stone", ["tall stone"]),
        ("ox", "red blue", []),
    )
    examples = task.encode(asked)
    assert len(examples) > 3
    predictions = [{"logits": torch.zeros(len(example), 2)} for example in examples]
    for example, prediction in zip(examples, predictions, strict=True):
        prediction["logits"][example.source.first, 0] = 9.0
        prediction["logits"][example.source.first + 1, 1] = 9.0
    counts = task.score(predictions, examples)
    said = [answer.answer for answer in task.answers(predictions, examples)]
    assert said == ["river river", "the tall", "red blue"]
    assert int(counts["examples"]) == 3
    # 1: two words of which one is right; 2: "the" does not count; 3: there was no answer to give.
    metrics = task.metrics(counts)
    assert metrics["f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert metrics["exact_match"] == 0
    assert task.trivial(NOTHING, examples) is None
    assert replace(task, unanswerable=True).trivial(NOTHING, examples) == pytest.approx(1 / 3)


NO_ROWS = Rows({"question": (), "context": (), "answers": ()})
NOTHING = Dataset("", NO_ROWS, NO_ROWS, NO_ROWS)


@pytest.mark.parametrize(
    ("agreements", "examples", "num_windows"),
    [((3.5, 1.0), 3, 4), ((1.0, 2.0), 3, 4), ((1.0, -1.0), 3, 4), ((2.0, 1.0), 3, 2)],
    ids=["more than all", "exact above F1", "negative", "fewer windows than questions"],
)
def test_counts_that_cannot_be_true_are_found(
    agreements: tuple[float, float], examples: int, num_windows: int
) -> None:
    counts = {
        "examples": torch.tensor(examples),
        "agreement": torch.tensor(agreements, dtype=torch.float64),
        "windows": torch.tensor(num_windows),
        "loss": torch.tensor(1.0, dtype=torch.float64),
    }
    assert f"no scores of {examples} questions" in qa().fault(counts)
    assert (
        qa().fault({**counts, "agreement": torch.tensor([2.0, 1.0]), "windows": torch.tensor(9)})
        == ""
    )


# Windows --------------------------------------------------------------------------------------------------------------

contexts = st.lists(st.sampled_from([*WORDS, "ox", "b12", "tall,", "Stone!"]), max_size=30).map(
    " ".join
)
questions = st.lists(st.sampled_from([*WORDS, "ox"]), max_size=4).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(questions, contexts), min_size=1, max_size=4),
    st.integers(14, 40),
    st.integers(0, 12),
)
def test_windows_cover_every_token_of_the_context(
    pairs: list[tuple[str, str]], max_length: int, stride: int
) -> None:
    """Against windows that are cut by hand from the tokens of question and context alone."""
    all_questions, all_contexts = zip(*pairs, strict=True)
    found = windows(tokenizer(), all_questions, all_contexts, max_length, stride)
    expected: list[tuple[int, list[int], list[int], int, list[list[int]]]] = []
    cls, sep = tokenizer().cls_token_id, tokenizer().sep_token_id
    for row, (question, context) in enumerate(pairs):
        asked = tokenizer()(question, add_special_tokens=False)["input_ids"]
        whole = tokenizer()(context, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = whole["input_ids"], whole["offset_mapping"]
        room = max_length - 3 - len(asked)
        step = room - min(stride, room // 2)
        start = 0
        while True:
            part = slice(start, start + room)
            expected.append(
                (
                    row,
                    [cls, *asked, sep, *ids[part], sep],
                    [0] * (len(asked) + 2) + [1] * (len(ids[part]) + 1),
                    len(asked) + 2,
                    [list(pair) for pair in offsets[part]],
                )
            )
            if start + room >= len(ids):
                break
            start += step
    ours = []
    for one in found:
        # Of an empty context nothing says where it would begin.
        first = one.first if len(one.offsets) else len(one.ids) - 1
        ours.append((one.row, one.ids, one.segments, first, one.offsets.tolist()))
    assert ours == expected
    assert {window.null for window in found} == {0}


def test_a_question_is_cut_only_where_it_leaves_nothing_to_the_context() -> None:
    long = " ".join(["river"] * 16)  # with a context of one token, three marks: just within 20
    [window] = windows(tokenizer(), [long], ["tall"], 20, 4)
    assert window.ids.count(tokenizer().convert_tokens_to_ids("river")) == 16
    [window] = windows(tokenizer(), [long + " river"], ["tall"], 20, 4)
    assert window.ids.count(tokenizer().convert_tokens_to_ids("river")) == 8
    assert window.offsets.tolist() == [[0, 4]]


def reference_label(example: Any, place: Place | None) -> list[int]:
    """What transformers' ``run_qa.py`` labels a window with, in its own loops."""
    first, offsets = example.source.first, example.source.offsets.tolist()
    whole = {first + number: pair for number, pair in enumerate(offsets)}
    if place is None or not offsets:
        return [0, 0]
    token_start, token_end = first, first + len(offsets) - 1
    if not (whole[token_start][0] <= place.start and whole[token_end][1] >= place.end):
        return [0, 0]
    while token_start in whole and whole[token_start][0] <= place.start:
        token_start += 1
    while whole.get(token_end, (0, -1))[1] >= place.end:
        token_end -= 1
    return [token_start - 1, token_end + 1]


@settings(deadline=None)
@given(questions, contexts.filter(bool), st.data())
def test_labels_are_the_tokens_of_the_answer_or_the_mark(
    question: str, context: str, draw: st.DataObject
) -> None:
    """Also where the answer is part of a word, and so part of a token."""
    start = draw.draw(st.integers(0, len(context) - 1))
    answer = context[start : draw.draw(st.integers(start + 1, len(context)))]
    if not answer.strip():
        return
    examples = qa().encode(rows((question, context, {"text": [answer], "answer_start": [start]})))
    place = place_of([Gold(answer, start)], context)
    assert place is not None
    assert context[place.start : place.end] == answer.strip()
    for example in examples:
        labels = example.labels.tolist()
        assert labels == reference_label(example, place)
        if labels != [0, 0]:
            first, last = (label - example.source.first for label in labels)
            said = context[example.source.offsets[first, 0] : example.source.offsets[last, 1]]
            assert answer.strip() in said


# Loss and answers -----------------------------------------------------------------------------------------------------


def test_the_loss_of_a_batch_is_that_of_transformers() -> None:
    """Of a batch without padding; of one with padding it is the mean over its windows, each by itself."""
    task, model = qa(), CASE.make()
    call: Any = model
    examples = task.encode(CASE.rows(30, 5))
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(examples.lengths):
        by_length.setdefault(length, []).append(index)

    def theirs(chosen: Encoded) -> torch.Tensor:
        batch = dict(task.collate(chosen, CPU))
        start, end = batch.pop("labels").unbind(dim=1)
        loss: torch.Tensor = call(**batch, start_positions=start, end_positions=end).loss
        return loss

    commonest: list[int] = max(by_length.values(), key=len)
    largest = examples.take(commonest)
    assert len(largest) > 4
    ours = task.losses(model, task.collate(largest, CPU)).mean()
    torch.testing.assert_close(ours, theirs(largest), rtol=1e-5, atol=1e-5)
    ragged = examples[:9]
    assert len(set(ragged.lengths)) > 1
    each = torch.stack([theirs(ragged[index : index + 1]) for index in range(9)])
    batch = task.collate(ragged, CPU, pad_to_multiple_of=7)
    torch.testing.assert_close(task.losses(model, batch), each, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([-6.0, 0.0, 2.0]),
)
def test_answers_are_the_best_spans_of_all_windows(
    seed: int, longest: int, unanswerable: bool, threshold: float
) -> None:
    """Against every span, tried one by one; the decision for no answer is that of ``run_qa.py``."""
    task = qa(max_answer_length=longest, unanswerable=unanswerable, null_threshold=threshold)
    asked = CASE.rows(4, seed % 7)
    examples = task.encode(asked)
    generator = torch.Generator().manual_seed(seed)
    predictions = [
        # Padded: what stands beyond the window must not count.
        {
            "logits": torch.cat(
                [4 * torch.randn(len(e), 2, generator=generator), torch.full((3, 2), 99.0)]
            )
        }
        for e in examples
    ]
    for row, answer in enumerate(task.answers(predictions, examples)):
        context = asked.columns["context"][row]
        spans: list[tuple[float, int, int]] = []
        nulls: list[float] = []
        for example, prediction in zip(examples, predictions, strict=True):
            if example.row == row:
                logits, offsets = prediction["logits"], example.source.offsets
                nulls.append(float(logits[0].sum()))
                tokens = range(len(offsets))
                for start, end in product(tokens, tokens):
                    if start <= end < start + longest:
                        first = example.source.first
                        score = float(logits[first + start, 0] + logits[first + end, 1])
                        spans.append((score, int(offsets[start, 0]), int(offsets[end, 1])))
        spans.sort(reverse=True)
        best, null = spans[0], (min(nulls), 0, 0)
        scores = [score for score, _, _ in spans[:N_BEST]]
        if unanswerable:
            scores.append(null[0])
            if null[0] - best[0] > threshold:
                best = null
        assert (answer.start, answer.end) == best[1:]
        assert answer.answer == context[answer.start : answer.end]
        probability = torch.tensor(scores).softmax(dim=0)[scores.index(best[0])]
        assert answer.score == pytest.approx(float(probability), rel=1e-4)


def test_an_empty_context_has_no_answer() -> None:
    task = qa(unanswerable=False)
    examples = task.encode(rows(("ox", "", [])))
    [answer] = task.answers([{"logits": torch.randn(len(examples[0]), 2)}], examples)
    assert answer == ("", 0, 0, 1.0)


# Data -----------------------------------------------------------------------------------------------------------------

CONTEXT = "Ada was born in London. London is large."
FORMS = {
    "datasets": {"text": ["London", "in London"], "answer_start": [16, 13]},
    "squad": [{"text": "London", "answer_start": 16}, {"text": "in London", "answer_start": 13}],
    "texts": ["London", "in London"],
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_read_in_every_form(form: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    record = {"question": "Where?", "context": CONTEXT, "answers": FORMS[form]}
    path.write_text((json.dumps(record) + "\n") * 2)
    read = data.read(path, Columns(SCHEMA, NAMES))
    assert read.labels == ("where", "where")
    answers = read.columns["answers"][0]
    assert [gold.text for gold in answers] == ["London", "in London"]
    assert place_of(answers, CONTEXT) == (16, 22)


@pytest.mark.parametrize(
    "nothing", [[], "", {"text": [], "answer_start": []}, [""], {"text": [" "]}]
)
def test_without_an_answer_there_is_none(nothing: Any) -> None:
    assert read_answers(nothing) == ()


@pytest.mark.parametrize(
    ("start", "expected"),
    [(None, 16), (16, 16), (24, 24), (23, 24), (14, 16), (0, 16), (999, 24)],
)
def test_the_occurrence_nearest_to_the_start_counts(start: int | None, expected: int) -> None:
    assert place_of([Gold("London", start)], CONTEXT) == (expected, expected + 6)


def test_an_answer_that_does_not_occur_is_passed_over_for_the_next_one() -> None:
    assert place_of([Gold("Paris", 3), Gold(" London ", 23)], CONTEXT) == (24, 30)
    assert place_of([Gold("Paris", 3)], CONTEXT) is None


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("What is it?", "what"),
        ("To whom was it given, and when?", "who"),
        ("How many are there?", "how many"),
        ("HOW MUCH is it", "how many"),
        ("How did it end?", "other"),
        ("In which year?", "which"),
        ("Somewhat whatever", "other"),
        ("", "other"),
    ],
)
def test_questions_are_labelled_by_their_question_word(question: str, word: str) -> None:
    assert question_word(question) == word


def test_question_words_that_train_lacks_are_dealt_as_its_commonest(tmp_path: Path) -> None:
    """No column holds them, so a new one in test is no mistake."""
    for split, asked in (("train", ["What?", "Who?", "Who?"] * 4), ("test", ["What?", "Why?"])):
        record = {"context": CONTEXT, "answers": "London"}
        lines = [json.dumps({**record, "question": question}) for question in asked]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    columns = Columns(SCHEMA, NAMES)
    dataset = data.from_files(train=train, validation=None, test=test, columns=columns)
    assert dataset.test.labels == ("what", "who")
    assert len(data.dirichlet(dataset, 2, 0, alpha=1.0, min_examples=1).test) == 2


def squad(count: int = 6) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the same questions in the form of SQuAD 2.0 and as records."""
    articles: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for number in range(count):
        title, context = f"Title {number % 2}", f"{CONTEXT} No {number}."
        asked = []
        for part, answers in enumerate(([{"text": "London", "answer_start": 16}], [])):
            names = {"id": f"{number}-{part}", "question": f"Who or where, {part}?"}
            asked.append({**names, "answers": answers, "is_impossible": not answers})
            records.append({**names, "title": title, "context": context, "answers": answers})
        articles.append({"title": title, "paragraphs": [{"context": context, "qas": asked}]})
    return {"version": "v2.0", "data": articles}, records


@pytest.mark.parametrize("written", ["a line", "indented", "gzip", "articles a line"])
def test_the_json_of_squad_holds_the_same_rows_as_json_lines(written: str, tmp_path: Path) -> None:
    whole, records = squad()
    text = json.dumps(whole, indent=1 if written == "indented" else None)
    path = tmp_path / ("squad.json.gz" if written == "gzip" else "squad.json")
    if written == "articles a line":
        text = "\n".join(json.dumps(article) for article in whole["data"])
    path.write_bytes(gzip.compress(text.encode()) if written == "gzip" else text.encode())
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(record) for record in records))
    columns = Columns(SCHEMA, {**NAMES, data.KEY: "title"})
    ours, theirs = data.read(path, columns), data.read(lines, columns)
    assert ours == theirs
    assert len(ours) == 12
    assert ours.keys[:4] == ("Title 0", "Title 0", "Title 1", "Title 1")


def test_questions_of_squad_1_need_not_say_that_they_have_answers(tmp_path: Path) -> None:
    whole, _ = squad(2)
    for article in whole["data"]:
        for asked in article["paragraphs"][0]["qas"]:
            del asked["is_impossible"]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(whole))
    assert len(data.read(path, Columns(SCHEMA, NAMES))) == 4


# Bad input ------------------------------------------------------------------------------------------------------------


def _drop_context(article: dict[str, Any]) -> None:
    del article["paragraphs"][0]["context"]


def _drop_question(article: dict[str, Any]) -> None:
    del article["paragraphs"][0]["qas"][1]["question"]


def _flatten(article: dict[str, Any]) -> None:
    article["paragraphs"][0]["qas"] = "none"


@pytest.mark.parametrize(
    ("damage", "place", "lacks"),
    [
        (_drop_context, "squad.json: record 2, paragraph 1", "'context'"),
        (_drop_question, "squad.json: record 2, paragraph 1, question 2", "'question'"),
        (_flatten, "squad.json: record 2, paragraph 1", "'qas' must be a list of objects"),
    ],
)
def test_a_gap_in_the_json_of_squad_is_named_with_its_place(
    damage: Callable[[dict[str, Any]], None], place: str, lacks: str, tmp_path: Path
) -> None:
    whole, _ = squad()
    damage(whole["data"][1])
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(BadInput) as caught:
        data.read(path, Columns(SCHEMA, NAMES))
    assert place in str(caught.value)
    assert lacks in str(caught.value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (5, "must be a text"),
        (None, "must be a text"),
        ([5], "must be a text"),
        ([{"answer": "London"}], "must be a text"),
        ({"text": ["London"], "answer_start": []}, "one answer_start a text"),
        ({"text": ["London"], "answer_start": 3}, "one answer_start a text"),
        ({"text": ["London"], "answer_start": ["x"]}, 'no whole number from 0 on: "x"'),
        ([{"text": "London", "answer_start": -3}], "no whole number from 0 on: -3"),
        ({"text": [7]}, "must be a string, not 7"),
    ],
)
def test_answers_in_no_known_form_are_refused_with_file_and_line(
    value: Any, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"question": "Where?", "context": CONTEXT, "answers": "London"}
    lines = [good, {**good, "answers": value}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(BadInput, match=r"rows.jsonl:2: the answers in column 'answers' ") as caught:
        data.read(path, Columns(SCHEMA, NAMES))
    assert why in str(caught.value)


def some(good: int, lost: int) -> Rows:
    """Return rows of which the last ``lost`` have an answer that does not occur."""
    found, not_found = ("ox", "the tall stone", "tall"), ("ox", "the tall stone", "small")
    return rows(*[found] * good, *[not_found] * lost)


def test_answers_that_do_not_occur_are_passed_over_and_told_of() -> None:
    examples = qa().encode(some(19, 1))
    assert examples.num_rows == 19
    [note] = examples.notes
    assert "1 of 20 questions have no answer that is in their context" in note
    assert "'small' to 'ox' in record" in note
    assert note.endswith(": passed over")
    assert qa().encode(some(19, 0)).notes == ()


def test_too_many_of_them_are_refused() -> None:
    with pytest.raises(BadInput, match=r"2 of 20 questions have no answer .* right columns\?"):
        qa().encode(some(18, 2))


def test_questions_without_an_answer_are_told_of_where_every_one_is_answered() -> None:
    asked = rows(("ox", "the stone", []), ("ox", "the stone", "stone"))
    [note] = qa(unanswerable=False).encode(asked).notes
    assert note.startswith("1 of 2 questions have no answer, and every question will")
    assert qa(unanswerable=True).encode(asked).notes == ()


def test_a_long_context_wants_a_stride_that_its_windows_can_share() -> None:
    task = qa(stride=None)
    assert len(task.encode(rows(("ox", "the stone", "stone")))) == 1
    with pytest.raises(BadInput, match=r"^model.max_length = 20: .* set task.stride = 5, or"):
        task.encode(rows(("ox", " ".join(["stone"] * 40), "stone")))
    long = rows(("ox", " ".join(["stone"] * 500), "stone"))
    assert len(qa(300, stride=None).encode(long)) == len(qa(300, stride=128).encode(long)) == 3


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(BadInput, match="finds answers in a context; give it with --context"):
        qa().unanswered(["where"])
    with pytest.raises(BadInput, match="SlowTokenizer has no fast version"):
        QuestionAnswering(20).with_tokenizer(slow_tokenizer())
    with pytest.raises(BadInput, match=r"model.max_length = 4: .* choose 5 or more"):
        qa(4)
    no_answers = rows(("ox", "the stone", []))
    with pytest.raises(BadInput, match="no question of train has an answer"):
        TASKS["qa"].names(Dataset("mine", no_answers, no_answers, no_answers))
    with pytest.raises(BadInput, match="a qa task has f1, exact_match"):
        qa(metric="accuracy")


def test_what_a_user_asks_is_answered() -> None:
    task, model = qa(unanswerable=False), CASE.make()
    context = "the tall stone went of the red river " * 3
    examples = task.encode(task.unanswered(["ox", "which stone"], context))
    outputs = task.predict(model, task.collate(examples, CPU))["logits"]
    answers = task.answers([{"logits": one} for one in outputs], examples)
    assert len(answers) == 2
    for answer in answers:
        assert answer.answer == context[answer.start : answer.end] != ""
        assert 0 < answer.score <= 1


def test_characters_of_the_test_vocabulary_are_single_tokens() -> None:
    """So that the laws above meet words of several tokens."""
    assert len(tokenizer()("ox", add_special_tokens=False)["input_ids"]) == 2
    assert set("ox") <= set(CHARACTERS)
