"""The work of steps that ``benchmarks.steps`` measures: the same model, clients, batches and first adapters for both sides."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks.setting import batches
from fedpeft.engines.local import LocalEngine
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.config import from_tree
from fedpeft.federation.client import Worker
from fedpeft.models import locate
from fedpeft.models.gguf import located
from fedpeft.tasks import Example
from fedpeft.types import Client, Lost, State
from fedpeft.wire.messages import Kind, Request, Response

ROWS = 1200
"""Generated for a task of MiniLM; shared out among the clients."""


@dataclass(frozen=True)
class Work:
    """``clients`` take ``steps`` steps each, in stacks of ``stack``; the plain loop trains one after another.

    ``kind`` and ``settings``: the section `task` and all that differs from the defaults. ``heads``:
    the names of the modules that the task trains in full. ``train``: a file of rows, empty for
    packaged data. ``batch``: texts a step, of at most ``length`` tokens.
    """

    kind: str
    model: str
    auto_class: str
    peft_type: str
    targets: str
    length: int
    batch: int
    steps: int
    clients: int
    stack: int
    heads: Sequence[str] = ()
    train: str = ""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rank: int = 8
    lr: float = 1e-3
    precision: str = "fp32"

    def tree(self) -> dict[str, Any]:
        """Return the settings as fedpeft takes them; all that is automatic stays so but the number format."""
        own: dict[str, dict[str, Any]] = {
            "task": {"kind": self.kind},
            "model": {"name": self.model, "max_length": self.length},
            "machine": {"precision": self.precision},
            "partition": {"kind": "iid", "clients": self.clients},
            "federation": {"rounds": 1, "clients_per_round": self.clients},
            "training": {"lr": self.lr, "steps": self.steps, "batch_size": self.batch},
            "method": {"name": "lora", "targets": self.targets, "rank": self.rank},
            "engine": {"stack": self.stack},
        }
        if self.train:
            own["data"] = {"source": "files", "train": self.train}
        for section, fields in self.settings.items():
            own.setdefault(section, {}).update(fields)
        return own

    def federation(self) -> Federation:
        """Return the federation, ready to run."""
        return build(from_tree(self.tree()))

    def prepare(self, folder: Path) -> None:
        """Write what the plain loop needs to do the same work: batches of token ids, first adapters."""
        whole = self.federation()
        content = {
            "model": located(self.model),
            "auto_class": self.auto_class,
            "peft_type": self.peft_type,
            "targets": self.targets.split("|"),
            "heads": list(self.heads),
            "outputs": whole.task.form.outputs,
            "rank": self.rank,
            "lr": self.lr,
            "clip": whole.config.training.clip,
            "precision": self.precision,
            "clients": [self._rows_of_steps(whole, client) for client in range(self.clients)],
        }
        (folder / "work.json").write_text(json.dumps(content))
        first = {name: tensor.contiguous() for name, tensor in whole.first_state().shared.items()}
        save_file(first, folder / "first.safetensors")

    def _rows_of_steps(self, whole: Federation, client: int) -> list[list[dict[str, list[int]]]]:
        """Return the rows of every step of one client, as transformers reads them."""
        examples = whole.worker.client_data[client].train
        steps: list[list[dict[str, list[int]]]] = []
        for rows in batches(whole, client):
            steps.append([as_transformers_has_it(self.kind, examples[row]) for row in rows])
        return steps


def round_of(worker: Worker, state: State, clients: int, stack: int) -> list[Response]:
    """Let ``clients`` train for a round from ``state`` on, in stacks; return what they reply."""
    request = Request(Kind.TRAIN, 0, worker.config, state.shared).encode()
    responses: list[Response] = []
    for outcome in LocalEngine(worker, stack=stack).exchange(
        [Client(number) for number in range(clients)], lambda _: request
    ):
        if isinstance(outcome, Lost):
            raise RuntimeError(f"lost: {outcome}")
        responses.append(Response.decode(outcome.blob))
    sizes = {response.measured.shared_by for response in responses}
    if sizes != {min(stack, clients)}:
        raise RuntimeError(f"stacks of {sizes} instead of {stack}")
    return responses


def as_transformers_has_it(kind: str, example: Example) -> dict[str, list[int]]:
    """Return an example with labels as the models of transformers take them.

    Those of a language model are as long as the text: -100 at the prompt, and every token is the
    label of the one before it.
    """
    ids, labels = example.ids.tolist(), example.labels.tolist()
    if kind == "causal_lm":
        ids = [*ids, labels[-1]]
        labels = [-100] * (len(ids) - len(labels)) + labels
    row = {"input_ids": ids, "labels": labels}
    if example.segments is not None:
        row["token_type_ids"] = example.segments.tolist()
    return row


SMOLLM2 = Work(
    kind="causal_lm",
    model="smollm2",
    auto_class="AutoModelForCausalLM",
    peft_type="CAUSAL_LM",
    targets="q_proj|v_proj",
    length=128,
    batch=8,
    steps=3,
    clients=1,
    stack=1,
    settings={"data": {"source": "pycode"}},
)
TAGGING = Work(
    kind="tagging",
    model="minilm",
    auto_class="AutoModelForTokenClassification",
    peft_type="TOKEN_CLS",
    targets="query|value",
    length=64,
    batch=16,
    steps=12,
    clients=4,
    stack=4,
    heads=("classifier",),
)
QA = Work(
    kind="qa",
    model="minilm",
    auto_class="AutoModelForQuestionAnswering",
    peft_type="QUESTION_ANS",
    targets="query|value",
    length=384,
    batch=16,
    steps=2,
    clients=4,
    stack=4,
    heads=("qa_outputs",),
)


def sentences() -> list[dict[str, Any]]:
    """Return sentences with tags whose lengths are like WikiANN's: 6 words in the median, 14 at nine tenths, of 1.8 tokens."""
    draw, words = random.Random(0), _Words(random.Random(1), pieces=0.8)
    rows: list[dict[str, Any]] = []
    for _ in range(ROWS):
        length = min(60, max(3, round(draw.lognormvariate(1.8, 0.66))))
        start = draw.randrange(length)
        tags = ["O"] * length
        tags[start : start + 2] = ["B-PER", "I-PER"][: length - start]
        rows.append({"tokens": words.text(length).split(), "tags": tags})
    return rows


def questions() -> list[dict[str, Any]]:
    """Return questions whose lengths are like SQuAD's: contexts of 111 words in the median, 188 at nine tenths."""
    draw, words = random.Random(0), _Words(random.Random(1), pieces=0.3)
    rows: list[dict[str, Any]] = []
    for _ in range(ROWS):
        length = min(600, max(25, round(draw.lognormvariate(4.71, 0.41))))
        context = words.text(length)
        start = draw.randrange(length - 2)
        before = " ".join([*context.split()[:start], ""])
        answer = " ".join(context.split()[start : start + 2])
        rows.append(
            {
                "question": words.text(max(4, round(draw.lognormvariate(2.26, 0.35)))),
                "context": context,
                "answers": {"text": [answer], "answer_start": [len(before)]},
            }
        )
    return rows


class _Words:
    """Draws words of MiniLM's vocabulary; ``pieces``: the share of those that have two tokens or more."""

    def __init__(self, draw: random.Random, pieces: float) -> None:
        vocabulary = sorted(AutoTokenizer.from_pretrained(locate("minilm")).get_vocab())
        letters = [piece for piece in vocabulary if piece.removeprefix("##").isascii()]
        self._begin = [piece for piece in letters if piece.isalpha() and len(piece) > 2]
        self._end = [piece[2:] for piece in letters if piece[:2] == "##" and piece[2:].isalpha()]
        self._draw, self._pieces = draw, pieces

    def text(self, length: int) -> str:
        """Return so many words."""
        words: list[str] = []
        for _ in range(length):
            end = self._draw.choice(self._end) if self._draw.random() < self._pieces else ""
            words.append(self._draw.choice(self._begin) + end)
        return " ".join(words)


GENERATED: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
    "tagging": sentences,
    "qa": questions,
}
"""The rows on which a task of MiniLM is measured where no file is given."""
