"""A small, easy data set for every task, with the settings that read it; every task has a row in ``TASK_GROUNDS``."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .builders import NOISE, OWN_WORDS, examples, write_causal_lm

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TaskGround:
    """What a task is tried on.

    ``rows``: of the data, easy to learn. ``settings``: what of the configuration differs from that
    of ``Ground``. ``metric``: its primary metric. ``texts`` and ``context``: what is predicted.
    ``auto_class``: of transformers, which loads what is exported. ``answer``: a column of what is
    predicted. ``model``: writes one to a folder, where the usual one does not fit.
    """

    rows: Callable[[], Sequence[Row]]
    settings: Mapping[str, Mapping[str, Any]]
    metric: str
    auto_class: str
    texts: Sequence[str]
    answer: str
    context: str | None = None
    model: Callable[[Path], Path] | None = None

    def tree(self, folder: Path) -> dict[str, Any]:
        """Write the data to ``folder``, and return the settings that name them."""
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows()))
        data = {"source": "files", "train": str(path), **self.settings.get("data", {})}
        tree = {**self.settings, "data": data}
        if self.model is not None:
            tree["model"] = {"name": str(self.model(folder / "model"))}
        return tree


def pairs() -> list[Row]:
    """Return pairs of texts whose second one tells the label."""
    draw = random.Random(1)
    rows: list[Row] = []
    for number in range(160):
        second = ("birds", "fish")[number % 2]
        rows.append(
            {
                "premise": " ".join(draw.sample(NOISE, 3)),
                "hypothesis": " ".join(draw.choices(OWN_WORDS[second], k=3)),
                "second": second,
            }
        )
    return rows


def sentences() -> list[Row]:
    """Return sentences in which the words of two labels are names, of one or two words."""
    draw = random.Random(2)
    rows: list[Row] = []
    for _ in range(160):
        words: list[str] = []
        tags: list[str] = []
        for type_name in draw.sample(["birds", "fish"], draw.randrange(1, 3)):
            length = draw.randrange(1, 3)
            words += [*draw.sample(NOISE, 2), *draw.choices(OWN_WORDS[type_name], k=length)]
            tags += ["O", "O", f"B-{type_name}", *[f"I-{type_name}"] * (length - 1)]
        rows.append({"tokens": words, "tags": tags})
    return rows


def instructions() -> list[Row]:
    """Return prompts that name a label, whose responses are words of that label."""
    draw = random.Random(3)
    rows: list[Row] = []
    for number in range(160):
        topic = ("birds", "fish")[number % 2]
        rows.append(
            {
                "prompt": " ".join([*draw.sample(NOISE, draw.randrange(1, 4)), f"{topic}0"]),
                "response": " ".join([f"{topic}1"] * draw.randrange(1, 4)),
                "topic": topic,
            }
        )
    return rows


TASK_GROUNDS: Mapping[str, TaskGround] = {
    "classification": TaskGround(
        rows=examples,
        settings={"data": {"key": "site"}},
        metric="accuracy",
        auto_class="AutoModelForSequenceClassification",
        texts=["birds0 birds1 word3", "fish0"],
        answer="label",
    ),
    "pairs": TaskGround(
        rows=pairs,
        settings={"data": {"text": "premise", "text2": "hypothesis", "label": "second"}},
        metric="accuracy",
        auto_class="AutoModelForSequenceClassification",
        texts=["birds0 birds1", "fish0"],
        answer="label",
        context="fish1 fish0",
    ),
    "tagging": TaskGround(
        rows=sentences,
        settings={"task": {"kind": "tagging"}},
        metric="f1",
        auto_class="AutoModelForTokenClassification",
        texts=["word3 word4 birds0 birds1", "fish0"],
        answer="sentence",
    ),
    "causal_lm": TaskGround(
        rows=instructions,
        settings={
            "task": {"kind": "causal_lm", "generate": 4, "generate_limit": 8},
            "data": {"label": "topic"},
            "compare": {"targets": "q_proj|v_proj"},
        },
        metric="perplexity",
        auto_class="AutoModelForCausalLM",
        texts=["word3 word4 birds0", "fish0"],
        answer="response",
        model=write_causal_lm,
    ),
}
