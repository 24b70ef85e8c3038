"""Tagging: names in sentences of words, loss on first sub-tokens, scores of whole names.

Tags are read as BIO (``B-PER I-PER O``), as IOB1 (``I-PER I-PER O``, where ``B-`` only parts two
neighbours), or as plain types (``PER PER O``), and become BIO.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.data.rows import Dataset, Rows
from fedpeft.data.schema import Column, Schema, Values, words
from fedpeft.errors import BadInput
from fedpeft.tasks.choice import TaskSection
from fedpeft.tasks.padding import IGNORED, inputs, padded, read_by_model, width_of
from fedpeft.tasks.tag_schemes import OUTSIDE, bio, parted, spans, types_of
from fedpeft.tasks.task import (
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

METRICS: Final = (Metric("f1"), Metric("precision"), Metric("recall"), Metric("accuracy"))
"""Of whole names, with their type; accuracy is of single words."""


class Tagged(NamedTuple):
    """A sentence with the names that were found in it, as in ``[Ada](PER) lives in London``."""

    sentence: str


class Sentence(NamedTuple):
    """What an answer is judged by: words and their tags in BIO.

    ``first_tokens``: the position of each word's first token; None beyond the cut.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    first_tokens: tuple[int | None, ...]


@final
@dataclass(frozen=True)
class Tagging:
    """Tag the words of sentences of at most ``max_length`` tokens.

    ``labels``: the tags in BIO, ``O`` first. A word is tagged at its first token. Words beyond
    ``max_length`` are tagged ``O``, and their names count as missed.
    """

    labels: tuple[str, ...]
    max_length: int
    metric: Metric = METRICS[0]
    tokenizer: Any = None

    @property
    def form(self) -> ModelForm:
        """A classifier of tokens, whose head reads every position."""
        return ModelForm(
            auto_class="AutoModelForTokenClassification",
            labels=self.labels,
            outputs=len(self.labels),
            peft_type="TOKEN_CLS",
            reads="every",
        )

    @property
    def types(self) -> tuple[str, ...]:
        """The types of names, in the order of the labels."""
        return tuple(dict.fromkeys(label[2:] for label in self.labels if label != OUTSIDE))

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """Return the task with the tokenizer that was loaded with its model.

        One without a fast version raises BadInput: it cannot say which word a token belongs to.
        """
        check_fast(tokenizer, "tagging", "which word a token belongs to")
        return replace(self, tokenizer=tokenizer)

    def unanswered(self, texts: Sequence[str], context: str | None = None) -> Rows:
        """Return rows of ``texts``, split at their blanks, whose tags say nothing."""
        if context is not None:
            raise BadInput("a tagging task reads sentences alone, without a context")
        sentences = tuple(words(text) for text in texts)
        tags = tuple((OUTSIDE,) * len(sentence) for sentence in sentences)
        return Rows({"words": sentences, "tags": tags}, (OUTSIDE,) * len(texts))

    def encode(self, rows: Rows) -> Encoded:
        """Return sentences and tags as numbers; ``source`` holds each sentence's words and tags."""
        if not len(rows):
            return Encoded([])
        number_of = {label: number for number, label in enumerate(self.labels)}
        sentences, tags = rows.columns["words"], rows.columns["tags"]
        tokens = self.tokenizer(
            [list(sentence) for sentence in sentences],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
        )
        examples: list[Example] = []
        for row, sentence in enumerate(sentences):
            ids = tokens["input_ids"][row] or [self.tokenizer.pad_token_id]
            first_tokens = _first_tokens(tokens.word_ids(row), len(sentence))
            source = Sentence(sentence, bio(tags[row]), first_tokens)
            labels = torch.full((len(ids),), IGNORED)
            for tag, position in zip(source.tags, first_tokens, strict=True):
                if position is not None:
                    labels[position] = number_of[tag]
            weight = int((labels != IGNORED).sum())
            examples.append(Example(torch.tensor(ids), labels, row, weight=weight, source=source))
        return Encoded(examples)

    def collate(
        self, examples: Encoded, device: torch.device, pad_to_multiple_of: int = 1
    ) -> Batch:
        """Return a padded batch: input_ids, attention_mask, labels, (n, L) each.

        ``labels`` is -100 but at the first token of a word.
        """
        width = width_of(max(examples.lengths), pad_to_multiple_of, self.max_length)
        batch = inputs(examples, width, self.tokenizer.pad_token_id)
        batch["labels"] = padded([example.labels for example in examples], width, IGNORED)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's (n, L, C) logits in float32."""
        out: Tensor = model(**read_by_model(batch)).logits
        return out.float()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of each sentence's words, (n,); 0 without any."""
        losses = _word_losses(self.logits(model, batch), batch["labels"])
        return losses.sum(dim=1) / (batch["labels"] != IGNORED).sum(dim=1).clamp(min=1)

    def predict(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return ``logits``, (n, L, C)."""
        return {"logits": self.logits(model, batch)}

    def score(self, predictions: Sequence[Prediction], examples: Encoded) -> Counts:
        """Count names and words.

        ``names``, (3, T) int64, counts for every type the names that were found with the right
        words and type, those that were predicted, and those that there are. ``words``, (2,): those
        with the right tag, and all. ``loss`` is the sum over ``tokens`` words within the cut.
        """
        names = torch.zeros(3, len(self.types), dtype=torch.int64)
        words_counted = torch.zeros(2, dtype=torch.int64)
        loss, tokens = torch.tensor(0.0, dtype=torch.float64), torch.tensor(0)
        type_of = {type_name: number for number, type_name in enumerate(self.types)}
        for prediction, example in zip(predictions, examples, strict=True):
            logits, labels = prediction["logits"][: len(example)], example.labels
            loss += _word_losses(logits.unsqueeze(0), labels.unsqueeze(0)).sum()
            tokens += example.weight
            predicted_tags = self._tags(prediction, example.source)
            predicted, true = set(spans(predicted_tags)), set(spans(example.source.tags))
            for count, counted_spans in zip(
                names, (predicted & true, predicted, true), strict=True
            ):
                for span in counted_spans:
                    count[type_of[span.type]] += 1
            num_right = 0
            for predicted_tag, tag in zip(predicted_tags, example.source.tags, strict=True):
                num_right += predicted_tag == tag
            words_counted += torch.tensor([num_right, len(predicted_tags)])
        return {
            "examples": torch.tensor(examples.num_rows),
            "names": names,
            "words": words_counted,
            "tokens": tokens,
            "loss": loss,
        }

    def no_counts(self) -> Counts:
        """Return the counts of no sentence."""
        return self.score([], Encoded([]))

    def metrics(self, counts: Counts) -> Mapping[str, float]:
        """Return ``f1``, ``precision`` and ``recall`` of names, ``accuracy`` of words, ``loss``.

        Over all types together, as CoNLL-2003 scores: precision = correct / predicted, recall =
        correct / true, F1 = 2 correct / (predicted + true); 0 where nothing is divided by.
        """
        correct, predicted, true = counts["names"].sum(dim=1).tolist()
        right, all_words = counts["words"].tolist()
        return {
            "f1": 2 * correct / max(1, predicted + true),
            "precision": correct / max(1, predicted),
            "recall": correct / max(1, true),
            "accuracy": right / max(1, all_words),
            "loss": float(counts["loss"]) / max(1, int(counts["tokens"])),
        }

    def fault(self, counts: Counts) -> str:
        """Return why counts cannot be true, empty where they can."""
        correct, predicted, true = counts["names"]
        right, all_words = counts["words"].tolist()
        sound = bool((counts["names"] >= 0).all())
        sound = sound and bool((correct <= predicted.minimum(true)).all())
        if sound and 0 <= right <= all_words and 0 <= int(counts["tokens"]) <= all_words:
            return ""
        said = f"names = {counts['names'].tolist()}, words = {[right, all_words]}"
        return f"{said}, tokens = {int(counts['tokens'])}: are no scores of sentences"

    def trivial(self, dataset: Dataset, scored: Encoded) -> None:
        """Return None: who finds no names has no score to compare with."""

    def to_score(self, examples: Encoded) -> Encoded:
        """Return ``examples`` themselves."""
        return examples

    def trial(self, model: nn.Module, device: torch.device) -> str:
        """Return what is wrong where ``model`` cannot tell the labels of two short texts."""
        return misfit(self, model, device, "a model that tags tokens")

    def answers(self, predictions: Sequence[Prediction], examples: Encoded) -> list[Tagged]:
        """Return every sentence with the names that were found in it."""
        tagged: list[Tagged] = []
        for prediction, example in zip(predictions, examples, strict=True):
            tags = self._tags(prediction, example.source)
            tagged.append(Tagged(_marked(example.source.words, tags)))
        return tagged

    def _tags(self, prediction: Prediction, sentence: Sentence) -> tuple[str, ...]:
        """Return the likeliest tag of every word, in BIO; ``O`` beyond the cut."""
        likeliest = prediction["logits"].argmax(dim=-1).tolist()
        tags: list[str] = []
        for position in sentence.first_tokens:
            tags.append(OUTSIDE if position is None else self.labels[likeliest[position]])
        return bio(tags)


def _first_tokens(word_ids: Sequence[int | None], num_words: int) -> tuple[int | None, ...]:
    """Return the position of each word's first token, None for a word that has none.

    ``word_ids``: the word of each token, None of special ones, as fast tokenizers tell.
    """
    first: list[int | None] = [None] * num_words
    for position, word in enumerate(word_ids):
        if word is not None and first[word] is None:
            first[word] = position
    return tuple(first)


def _word_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of every token, (n, L), 0 where it has no label.

    ``logits``: (n, L, C). ``labels``: (n, L).
    """
    by_class = logits.transpose(1, 2)  # (n, C, L), as cross_entropy wants it
    return functional.cross_entropy(by_class, labels, ignore_index=IGNORED, reduction="none")


def _marked(sentence: Sequence[str], tags: Sequence[str]) -> str:
    """Return a sentence with its names in brackets, each followed by its type."""
    parts = list(sentence)
    for span in reversed(spans(tags)):  # from the back, so that positions in front stay true
        name = " ".join(sentence[span.start : span.end])
        parts[span.start : span.end] = [f"[{name}]({span.type})"]
    return " ".join(parts)


def _read_tags(value: Any) -> tuple[str, ...]:
    """Return the tags of a sentence as they are written; ValueError for what is no tag."""
    tags = words(value)
    for tag in tags:
        _, type_name = parted(tag)
        if tag != OUTSIDE and not type_name.strip():
            raise ValueError(f"holds {tag!r}, which is no tag; tags are O, B-PER, I-PER or PER")
    return tags


def _commonest_type(values: Values) -> str:
    """Return the type of most of a sentence's names, the first among equals; ``O`` without any."""
    types = [span.type for span in spans(bio(values["tags"]))]
    return max(types, key=types.count, default=OUTSIDE)


def _check_lengths(values: Values) -> str:
    """Return what is wrong where words and tags of a sentence are not equally many."""
    num_words, num_tags = len(values["words"]), len(values["tags"])
    if num_words == num_tags:
        return ""
    return f"{num_words} words have {num_tags} tags; every word needs one, O outside of names"


def _types(rows: Rows) -> set[str]:
    """Return the types of all names in ``rows``."""
    types: set[str] = set()
    for tags in rows.columns["tags"]:
        types |= types_of(tags)
    return types


def _names(dataset: Dataset) -> tuple[str, ...]:
    """Return all tags in BIO: ``O``, then both of each type.

    The types are those that the user lists, in that order, or else those of train, sorted. BadInput
    where there is no name in train, where one of the other splits has another type, and for a list
    of tags.
    """
    if not _types(dataset.train):
        raise BadInput(f"{dataset.name}: every tag of train is O; there is nothing to learn")
    for name in dataset.listed:
        if parted(name) != ("", name):
            raise BadInput(f"data.labels names the tag {name!r}; list types alone, such as 'PER'")
    types = dataset.listed or sorted(_types(dataset.train))
    known = set(types)
    for split, rows in (("validation", dataset.validation), ("test", dataset.test)):
        for unknown in sorted(_types(rows) - known):
            listed = ", ".join(types)
            raise BadInput(f"{dataset.name}: {split} has names of type {unknown!r}, train {listed}")
    names = [OUTSIDE]
    for type_name in types:
        names += [f"B-{type_name}", f"I-{type_name}"]
    return tuple(names)


def _make(choice: TaskSection, names: tuple[str, ...], max_length: int) -> Tagging:
    return Tagging(names, max_length, primary(choice, METRICS))


def _pack(sentences: Sequence[Sentence]) -> tuple[Any, Mapping[str, Tensor]]:
    """Return sentences as JSON has them: lists of lists."""
    return sentences, {}


def _unpack(kept: Any, parts: Mapping[str, Tensor]) -> list[Sentence]:
    """Return the sentences of which JSON has made lists."""
    del parts  # there are none
    sentences: list[Sentence] = []
    for sentence, tags, first_tokens in kept:
        sentences.append(Sentence(tuple(sentence), tuple(tags), tuple(first_tokens)))
    return sentences


KIND: Final = TaskKind(
    schema=Schema(
        columns=(Column("words", words), Column("tags", _read_tags)),
        label=_commonest_type,
        check=_check_lengths,
        answers=lambda values: sorted(types_of(values["tags"])),
    ),
    names=_names,
    make=_make,
    sources=SourceForm(_pack, _unpack),
)
