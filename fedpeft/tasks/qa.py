"""Extractive question answering: the span of a context that answers a question, or none.

A long context is read in windows that overlap, and the best span of all windows of a question is
its answer, as in BERT's own script for SQuAD (Devlin et al. 2019, section 4.2 and 4.3).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.data.rows import Dataset, Rows
from fedpeft.data.schema import Column, Schema, Values, text
from fedpeft.errors import BadInput
from fedpeft.tasks.answers import Gold, Place, agreement, place_of, read_answers
from fedpeft.tasks.choice import TaskSection
from fedpeft.tasks.padding import inputs, joined, read_by_model, width_of
from fedpeft.tasks.spans import N_BEST, Span, best_spans, trimmed
from fedpeft.tasks.task import (
    TRIAL,
    Batch,
    Counts,
    Encoded,
    Example,
    Metric,
    ModelForm,
    Prediction,
    SourceForm,
    TaskKind,
    check_fast,
    misfit,
    primary,
)
from fedpeft.tasks.windows import Window, room_of, windows

METRICS: Final = (Metric("f1"), Metric("exact_match"))
"""Means over questions of the agreement with the best right answer, by SQuAD's rules."""
LOST: Final = 0.05
"""Share of questions whose answer may be missing from its context before the data are refused."""


class Answer(NamedTuple):
    """An answer, the characters of the context where it stands, and its probability.

    ``answer`` is ``context[start:end]``; it is empty where there is no answer.
    """

    answer: str
    start: int
    end: int
    score: float


class Passage(NamedTuple):
    """What an answer is judged by: the context of a window, and the right answers.

    ``first``: the position of the first token of the context. ``offsets``: the characters that each
    of its tokens stands for, (tokens, 2). ``null``: the position that stands for no answer.
    """

    context: str
    answers: tuple[str, ...]
    first: int
    offsets: Tensor
    null: int


NO_ANSWER: Final = Place(0, 0)


@final
@dataclass(frozen=True)
class QuestionAnswering:
    """Answer questions with spans of at most ``max_answer_length`` tokens of their contexts.

    ``max_length``: tokens of a window. ``stride``: tokens of the context that neighbouring windows
    share; None for 128. ``unanswerable``: whether there may be no answer; it is given where its
    logits exceed those of the best span by more than ``null_threshold``.
    """

    max_length: int
    stride: int | None = None
    max_answer_length: int = 30
    unanswerable: bool = False
    null_threshold: float = 0.0
    metric: Metric = METRICS[0]
    tokenizer: Any = None

    @property
    def labels(self) -> tuple[str, ...]:
        """No names: the two outputs stand for the start and the end of an answer."""
        return ()

    @property
    def form(self) -> ModelForm:
        """A model with two numbers for every token."""
        return ModelForm(
            auto_class="AutoModelForQuestionAnswering",
            labels=(),
            outputs=2,
            peft_type="QUESTION_ANS",
            reads="every",
        )

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """Return the task with the tokenizer that was loaded with its model.

        One without a fast version raises BadInput, as it cannot say which characters a token stands
        for; and so does a ``max_length`` without room for a question and a context.
        """
        check_fast(tokenizer, "qa", "which characters a token stands for")
        room = room_of(tokenizer, self.max_length)
        if room < 2:
            raise BadInput(
                f"model.max_length = {self.max_length}: leaves no room for a question and a "
                f"context; choose {self.max_length + 2 - room} or more"
            )
        return replace(self, tokenizer=tokenizer)

    def unanswered(self, texts: Sequence[str], context: str | None = None) -> Rows:
        """Return rows of the questions ``texts``, all about ``context``."""
        if context is None:
            raise BadInput("a qa task finds answers in a context; give it with --context")
        count = len(texts)
        columns = {
            "question": tuple(texts),
            "context": (context,) * count,
            "answers": ((),) * count,
        }
        return Rows(columns)

    def encode(self, rows: Rows) -> Encoded:
        """Return windows as numbers, labelled with the first and the last token of the answer.

        The first answer that occurs in the context is the label; a window that does not hold all of
        it is labelled with the position that stands for no answer, twice. Questions whose answers
        do not occur are passed over with a note; more than ``LOST`` of them raise BadInput.
        """
        # 1. Where the answers are.
        questions, contexts = rows.columns["question"], rows.columns["context"]
        golds: Sequence[Sequence[Gold]] = rows.columns["answers"]
        places: dict[int, Place | None] = {}  # of each row that is kept; None without an answer
        lost: list[int] = []
        for row, answers in enumerate(golds):
            place = place_of(answers, contexts[row])
            if answers and place is None:
                lost.append(row)
            else:
                places[row] = place
        kept = list(places)
        # 2. Tokens, window by window.
        examples: list[Example] = []
        for window in windows(
            self.tokenizer,
            [questions[row] for row in kept],
            [contexts[row] for row in kept],
            self.max_length,
            self.stride,
        ):
            row = kept[window.row]
            right = tuple(gold.text for gold in golds[row])
            source = Passage(contexts[row], right, window.first, window.offsets, window.null)
            segments = None if window.segments is None else torch.tensor(window.segments)
            labels = torch.tensor(_label(window, places[row]))
            examples.append(Example(torch.tensor(window.ids), labels, row, segments, source=source))
        return Encoded(examples, self._notes(rows, lost))

    def _notes(self, rows: Rows, lost: Sequence[int]) -> tuple[str, ...]:
        """Return what to say of the ``lost`` rows and of questions without an answer.

        BadInput where too many rows are lost.
        """
        notes: list[str] = []
        if lost:
            question, answers = (rows.columns[role][lost[0]] for role in ("question", "answers"))
            record = rows.record_of(lost[0])
            example = f"such as {answers[0].text!r:.60} to {question!r:.60} in record {record}"
            said = f"{len(lost)} of {len(rows)} questions have no answer that is in their context"
            if len(lost) > LOST * len(rows):
                raise BadInput(
                    f"{said}, {example}; are data.context and data.answers the right columns?"
                )
            notes.append(f"{said}, {example}: passed over")
        num_without = sum(not answers for answers in rows.columns["answers"])
        if num_without and not self.unanswerable:
            notes.append(
                f"{num_without} of {len(rows)} questions have no answer, and every question will "
                "be given one; with task.unanswerable = true there may be none"
            )
        return tuple(notes)

    def to_score(self, examples: Encoded) -> Encoded:
        """Return ``examples`` as they are."""
        return examples

    def collate(
        self, examples: Encoded, device: torch.device, pad_to_multiple_of: int = 1
    ) -> Batch:
        """Return a padded batch: input_ids, attention_mask, (n, L) each, labels, (n, 2)."""
        width = width_of(max(examples.lengths), pad_to_multiple_of, self.max_length)
        batch = inputs(examples, width, self.tokenizer.pad_token_id)
        batch["labels"] = torch.stack([example.labels for example in examples])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits of start and end in float32, (n, L, 2)."""
        out: Any = model(**read_by_model(batch))
        return torch.stack([out.start_logits, out.end_logits], dim=-1).float()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of every window, (n,): the mean of the cross-entropies of start and end.

        Padding is no possible answer, so a window's loss does not depend on those beside it.
        """
        padding = (batch["attention_mask"] == 0).unsqueeze(-1)  # (n, L, 1)
        logits = self.logits(model, batch).masked_fill(padding, -torch.inf)
        return _window_losses(logits, batch["labels"])

    def predict(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return ``logits``, (n, L, 2)."""
        return {"logits": self.logits(model, batch)}

    def score(self, predictions: Sequence[Prediction], examples: Encoded) -> Counts:
        """Count how well questions are answered.

        ``agreement``, (2,) float64, adds up F1 and exact matches over the questions, ``examples``.
        ``loss`` is the sum over ``windows``.
        """
        agreements = torch.zeros(2, dtype=torch.float64)
        questions = _questions(predictions, examples)
        for asked in questions:
            _, passage = asked[0]  # the right answers stand in every window
            said = self._answer(asked).answer
            agreements += torch.tensor(agreement(said, passage.answers), dtype=torch.float64)
        loss = torch.tensor(0.0, dtype=torch.float64)
        for prediction, example in zip(predictions, examples, strict=True):
            logits = prediction["logits"][: len(example)]
            loss += _window_losses(logits.unsqueeze(0), example.labels.unsqueeze(0)).sum()
        return {
            "examples": torch.tensor(len(questions)),
            "agreement": agreements,
            "windows": torch.tensor(len(examples)),
            "loss": loss,
        }

    def no_counts(self) -> Counts:
        """Return the counts of no question."""
        return self.score([], Encoded([]))

    def metrics(self, counts: Counts) -> Mapping[str, float]:
        """Return ``f1`` and ``exact_match``, means over questions, and ``loss``, over windows."""
        f1, exact = (counts["agreement"] / max(1, int(counts["examples"]))).tolist()
        loss = float(counts["loss"]) / max(1, int(counts["windows"]))
        return {"f1": f1, "exact_match": exact, "loss": loss}

    def fault(self, counts: Counts) -> str:
        """Return why counts cannot be true, empty where they can."""
        examples, num_windows = int(counts["examples"]), int(counts["windows"])
        f1, exact = counts["agreement"].tolist()
        rounding = 1e-9 * max(1, examples)
        # An exact match has an F1 of 1; of a sum of shares the last digits may be off.
        if 0 <= exact <= f1 + rounding <= examples + 2 * rounding and examples <= num_windows:
            return ""
        said = f"agreement = {[f1, exact]}, windows = {num_windows}"
        return f"{said}: are no scores of {examples} questions"

    def trivial(self, dataset: Dataset, scored: Encoded) -> float | None:
        """Return the score of never giving an answer; None where there always is one."""
        del dataset
        if not self.unanswerable or not len(scored):
            return None
        has_answer = {example.row: bool(example.source.answers) for example in scored}
        return 1 - sum(has_answer.values()) / len(has_answer)

    def trial(self, model: nn.Module, device: torch.device) -> str:
        """Return what is wrong where ``model`` has no start and end for two short questions."""
        return misfit(self, model, device, "a model that answers questions", TRIAL[0])

    def answers(self, predictions: Sequence[Prediction], examples: Encoded) -> list[Answer]:
        """Return the likeliest answer to every question, in the order of their first windows."""
        return [self._answer(asked) for asked in _questions(predictions, examples)]

    def _answer(self, asked: Sequence[tuple[Tensor, Passage]]) -> Answer:
        """Return the likeliest answer; ``asked``: the logits of every window of a question."""
        spans: list[Span] = []
        null_scores: list[float] = []
        for logits, passage in asked:
            count = len(passage.offsets)
            of_context = logits[passage.first : passage.first + count]  # (count, 2)
            spans += best_spans(of_context, passage.offsets, self.max_answer_length)
            null_scores.append(float(logits[passage.null].sum()))
        spans.sort(key=lambda span: span.score, reverse=True)  # stable: equal ones keep their order
        likeliest = spans[:N_BEST]
        # The answer may well be in another window, so every window has to deny it.
        null = Span(min(null_scores), NO_ANSWER)
        best = likeliest[0] if likeliest else null
        if self.unanswerable:
            likeliest.append(null)
            if null.score - best.score > self.null_threshold:
                best = null
        scores = torch.tensor([span.score for span in likeliest or [null]])
        probability = float(torch.exp(best.score - scores.logsumexp(dim=0)))
        start, end = trimmed(asked[0][1].context, best.place)
        return Answer(asked[0][1].context[start:end], start, end, probability)


def _questions(
    predictions: Sequence[Prediction], examples: Encoded
) -> list[list[tuple[Tensor, Passage]]]:
    """Return the logits, (L, 2), and the passage of every window, question by question."""
    windows_of: dict[int, list[tuple[Tensor, Passage]]] = {}
    for prediction, example in zip(predictions, examples, strict=True):
        windows_of.setdefault(example.row, []).append((prediction["logits"], example.source))
    return list(windows_of.values())


def _label(window: Window, place: Place | None) -> tuple[int, int]:
    """Return the positions of the first and the last token of the answer at ``place``.

    Where the window does not hold all of it, both are the position that stands for no answer.
    """
    nothing = window.null, window.null
    if place is None or not len(window.offsets):
        return nothing
    starts, ends = window.offsets.unbind(dim=1)  # both ascend
    if starts[0] > place.start or ends[-1] < place.end:
        return nothing
    # The last token that starts no later than the answer, and the first that ends no earlier.
    first = int(torch.searchsorted(starts.contiguous(), place.start, right=True)) - 1
    last = int(torch.searchsorted(ends.contiguous(), place.end))
    return window.first + first, window.first + last


def _window_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of start and end of every window, (n,).

    ``logits``: (n, L, 2). ``labels``: (n, 2).
    """
    return functional.cross_entropy(logits, labels, reduction="none").mean(dim=1)


_QUESTION_WORD: Final = re.compile(
    r"\b(what|whom?|whose|how (?:many|much)|when|where|which|why)\b", re.IGNORECASE
)
_SAME_WORD: Final = {"whom": "who", "whose": "who", "how much": "how many"}
OTHER: Final = "other"
"""The label of a question without a question word."""


def question_word(question: str) -> str:
    """Return the first question word of a question, ``other`` without one.

    >>> question_word("In whose house was she born?"), question_word("How did it end?")
    ('who', 'other')
    """
    found = _QUESTION_WORD.search(question)
    if found is None:
        return OTHER
    word = found[0].lower()
    return _SAME_WORD.get(word, word)


def _label_of(values: Values) -> str:
    return question_word(values["question"])


def _names(dataset: Dataset) -> tuple[str, ...]:
    """Return no names; BadInput where no question of train has an answer."""
    if not any(dataset.train.columns["answers"]):
        raise BadInput(f"{dataset.name}: no question of train has an answer")
    return ()


def _make(choice: TaskSection, names: tuple[str, ...], max_length: int) -> QuestionAnswering:
    del names  # there are none
    return QuestionAnswering(
        max_length=max_length,
        stride=choice.stride,
        max_answer_length=choice.max_answer_length,
        unanswerable=choice.unanswerable,
        null_threshold=choice.null_threshold,
        metric=primary(choice, METRICS),
    )


def _pack(passages: Sequence[Passage]) -> tuple[Any, Mapping[str, Tensor]]:
    """Return passages as JSON and tensors.

    A context is written once, however many windows and questions it has.
    """
    contexts: dict[str, int] = {}  # context -> its number
    for passage in passages:
        contexts.setdefault(passage.context, len(contexts))
    numbers = [contexts[passage.context] for passage in passages]
    kept = {
        "contexts": list(contexts),
        "answers": [passage.answers for passage in passages],
    }
    parts = {
        "contexts": torch.tensor(numbers),
        "firsts": torch.tensor([passage.first for passage in passages]),
        "nulls": torch.tensor([passage.null for passage in passages]),
        "counts": torch.tensor([len(passage.offsets) for passage in passages]),
        "offsets": joined([passage.offsets.flatten() for passage in passages]),
    }
    return kept, parts


def _unpack(kept: Any, parts: Mapping[str, Tensor]) -> list[Passage]:
    """Return the passages that ``_pack`` was given."""
    offsets = parts["offsets"].int().view(-1, 2)
    columns = zip(
        parts["contexts"].tolist(),
        kept["answers"],
        parts["firsts"].tolist(),
        torch.split_with_sizes(offsets, parts["counts"].tolist()),
        parts["nulls"].tolist(),
        strict=True,
    )
    passages: list[Passage] = []
    for number, answers, first, its_offsets, null in columns:
        context = kept["contexts"][number]
        passages.append(Passage(context, tuple(answers), first, its_offsets, null))
    return passages


KIND: Final = TaskKind(
    schema=Schema(
        columns=(
            Column("question", text),
            Column("context", text),
            Column("answers", read_answers),
        ),
        label=_label_of,
    ),
    names=_names,
    make=_make,
    sources=SourceForm(_pack, _unpack),
)
