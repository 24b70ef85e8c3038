"""A tiny model, a tokenizer and random rows for every task: what their laws and contracts stand on."""

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
)

from fedpeft.data import Rows
from fedpeft.mounting import describe
from fedpeft.tasks import Task, TaskSection, make_task
from fedpeft.tasks.answers import Gold
from fedpeft.types import Base
from tests.tiny import SEED, shaken

MAX_LENGTH = 20
WORDS = ("red", "blue", "tall", "river", "stone", "of", "the", "went")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CHARACTERS = string.ascii_lowercase + string.digits
VOCABULARY = (
    *SPECIAL,
    *CHARACTERS,
    *(f"##{character}" for character in CHARACTERS),
    *string.punctuation,
    *WORDS,
)
"""Some words are whole; all others fall into their characters."""


@cache
def tokenizer() -> Any:
    """Return a fast tokenizer that marks texts and pairs as BERT's does."""
    numbers = {piece: number for number, piece in enumerate(VOCABULARY)}
    raw: Any = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def slow_tokenizer() -> Any:
    """Return what looks like a tokenizer without a fast version."""

    class SlowTokenizer:
        is_fast = False

    return SlowTokenizer()


def _words(draw: random.Random, least: int, most: int) -> list[str]:
    return [draw.choice([*WORDS, "ox", "b12"]) for _ in range(draw.randint(least, most))]


def _texts(count: int, seed: int) -> Rows:
    draw = random.Random(seed)
    texts = [" ".join(_words(draw, 1, 6)) for _ in range(count)]
    return Rows.of_texts(texts, [draw.choice("abc") for _ in texts])


def _pairs(count: int, seed: int) -> Rows:
    draw = random.Random(seed)
    columns = {
        role: tuple(" ".join(_words(draw, 1, 4)) for _ in range(count))
        for role in ("text", "text2")
    }
    return Rows(columns, tuple(draw.choice("abc") for _ in range(count)))


def _sentences(count: int, seed: int) -> Rows:
    draw = random.Random(seed)
    sentences = tuple(tuple(_words(draw, 1, 6)) for _ in range(count))
    tags = tuple(
        tuple(draw.choice(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]) for _ in sentence)
        for sentence in sentences
    )
    return Rows({"words": sentences, "tags": tags}, tuple(draw.choice("xy") for _ in sentences))


def _questions(count: int, seed: int) -> Rows:
    """Return questions whose contexts need up to three windows; every fourth has no answer."""
    draw = random.Random(seed)
    questions, contexts, answers = [], [], []
    for number in range(count):
        words = _words(draw, 3, 14)
        first = draw.randrange(len(words) - 1)
        answer = " ".join(words[first : first + 2])
        start = len(" ".join([*words[:first], ""]))
        questions.append(" ".join(_words(draw, 1, 3)))
        contexts.append(" ".join(words))
        answers.append(() if number % 4 == 3 else (Gold(answer, start),))
    return Rows(
        {"question": tuple(questions), "context": tuple(contexts), "answers": tuple(answers)},
        tuple(draw.choice("xy") for _ in questions),
    )


@dataclass(frozen=True)
class Ground:
    """What a method is tried on: a task with its tokenizer, a frozen model, the server's view of it.

    ``rows``: (count, seed) -> random rows of the task.
    """

    task: Task
    model: nn.Module
    base: Base
    rows: Callable[[int, int], Rows]


@dataclass(frozen=True)
class TaskCase:
    """A task of the contract table.

    ``kind`` and ``settings``: of the section ``task``. ``names``: of the possible answers.
    ``rows``: (count, seed) -> random rows. ``model``: the class of transformers. ``head``: names of
    its parameters outside of the base.
    """

    kind: str
    names: tuple[str, ...]
    rows: Callable[[int, int], Rows]
    model: Any
    head: frozenset[str] = frozenset({"classifier.weight", "classifier.bias"})
    settings: Mapping[str, Any] = field(default_factory=dict)

    def task(self, max_length: int = MAX_LENGTH, **settings: Any) -> Task:
        """Return the task with its tokenizer."""
        kind: Any = self.kind
        choice = TaskSection(kind=kind, **{**self.settings, **settings})
        return make_task(choice, self.names, max_length).with_tokenizer(tokenizer())

    def make(self) -> nn.Module:
        """Return a frozen model of two blocks, without dropout."""
        settings: dict[str, Any] = {
            "vocab_size": len(VOCABULARY),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
            "num_labels": len(self.names) or 2,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "eager",
        }
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return shaken(self.model(BertConfig(**settings)))

    def ground(self) -> Ground:
        """Return the task on a model of its own."""
        model = self.make()
        return Ground(self.task(), model, describe(model, self.head), self.rows)


TASK_CASES: Mapping[str, TaskCase] = {
    "classification": TaskCase(
        "classification", ("a", "b", "c"), _texts, BertForSequenceClassification
    ),
    "pairs": TaskCase("classification", ("a", "b", "c"), _pairs, BertForSequenceClassification),
    "tagging": TaskCase(
        "tagging",
        ("O", "B-LOC", "I-LOC", "B-PER", "I-PER"),
        _sentences,
        BertForTokenClassification,
    ),
    "qa": TaskCase(
        "qa",
        (),
        _questions,
        BertForQuestionAnswering,
        frozenset({"qa_outputs.weight", "qa_outputs.bias"}),
        {"stride": 4, "unanswerable": True},
    ),
}
"""A new task needs a row here, and one in ``tests/e2e/task_grounds.py``."""


def one_hot(labels: Sequence[int], classes: int) -> torch.Tensor:
    """Return logits, (n, classes), that leave no doubt about ``labels``."""
    return 50.0 * torch.nn.functional.one_hot(torch.tensor(labels, dtype=torch.int64), classes)
