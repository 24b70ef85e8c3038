"""What a task cannot work with is refused in one line: file and line, or field, value and remedy; nothing is written."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, ByT5Tokenizer

from fedpeft.experiment.config import merge
from tests.laws.test_gguf import write as write_gguf
from tests.tiny_tasks import TASK_CASES

from .builders import POSITIONS, Ground, cli_call, refused, to_toml
from .task_grounds import TASK_GROUNDS

pytestmark = pytest.mark.usefixtures("no_figures")

Rows = list[dict[str, Any]]


def write(ground: Ground, folder: Path, kind: str, rows: Rows | None = None) -> dict[str, Any]:
    """Return the settings of a task; its data, or ``rows``, are written to ``folder/rows.jsonl``."""
    tree = merge(ground.tree(), TASK_GROUNDS[kind].tree(folder))
    if rows is not None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text)
    return tree


def saved(folder: Path, tree: Mapping[str, Any]) -> Path:
    path = folder / "config.toml"
    path.write_text(to_toml(tree))
    return path


def options(sets: Sequence[str]) -> list[str]:
    return [part for one in sets for part in ("--set", one)]


@dataclass(frozen=True)
class Broken:
    """Data or settings of a task that must be refused, and what the line must say.

    ``spoil``: does something to the data's rows. ``instead``: sections in the place of the task's.
    """

    kind: str
    says: tuple[str, ...]
    spoil: Callable[[Rows], None] = lambda rows: None
    sets: tuple[str, ...] = ()
    instead: Mapping[str, Any] = field(default_factory=dict)


def fifth(**columns: Any) -> Callable[[Rows], None]:
    """Return what lays ``columns`` over the fifth row."""
    return lambda rows: rows[4].update(columns)


def every(step: int, **columns: Any) -> Callable[[Rows], None]:
    """Return what lays ``columns`` over every so many rows."""

    def spoil(rows: Rows) -> None:
        for row in rows[::step]:
            row.update(columns)

    return spoil


def into_messages(rows: Rows) -> None:
    for row in rows:
        prompt, response = row.pop("prompt"), row.pop("response")
        row["messages"] = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]


def into_messages_but_one(rows: Rows) -> None:
    into_messages(rows)
    rows[4]["messages"] = []


NOWHERE = {"text": ["nowhere"], "answer_start": [0]}
BROKEN = {
    "tags of another length": Broken(
        "tagging",
        ("rows.jsonl:5", "2 words have 1 tags", "O outside of names"),
        fifth(tokens=["a", "b"], tags=["O"]),
    ),
    "tags that are none": Broken(
        "tagging",
        ("rows.jsonl:5", "column 'tags'", "'B-'", "tags are O, B-PER, I-PER or PER"),
        fifth(tokens=["a"], tags=["B-"]),
    ),
    "words that are no list": Broken(
        "tagging",
        ("rows.jsonl:5", "column 'tokens'", "a list of strings, not 7"),
        fifth(tokens=7),
    ),
    "every word outside of names": Broken(
        "tagging",
        ("rows.jsonl", "every tag of train is O"),
        every(1, tokens=["a"], tags=["O"]),
    ),
    "a list of types that lacks one": Broken(
        "tagging",
        ("rows.jsonl:", "data.labels has no label 'fish'"),
        sets=('data.labels=["birds", "fis"]',),
    ),
    "a list of types that lacks one, misspelt": Broken(
        "tagging",
        ("rows.jsonl:", "did you mean 'fis'"),
        sets=('data.labels=["birds", "fis"]',),
    ),
    "a list of labels that lacks one": Broken(
        "classification",
        ("rows.jsonl:", "data.labels has no label 'winds'", "did you mean 'wind'"),
        sets=('data.labels=["birds", "fish", "trees", "wind"]',),
    ),
    "answers that are not in their contexts": Broken(
        "qa",
        ("rows.jsonl, train", "'nowhere'", "in record", "data.answers the right columns?"),
        every(4, answers=NOWHERE),
    ),
    "answers of no known form": Broken(
        "qa",
        ("rows.jsonl:5", "column 'answers'", "must be a text, a list of texts", "not 5"),
        fifth(answers=5),
    ),
    "a context longer than the model": Broken(
        "qa",
        ("rows.jsonl, train", "model.max_length = 16", "set task.stride = 4", "such as 384"),
        instead={"task": {"kind": "qa"}},
    ),
    "a chat template that is not there": Broken(
        "causal_lm",
        ("task.chat = 'always'", "no chat template", "'auto' or 'never'"),
        sets=("task.chat=always",),
    ),
    "messages without a chat template": Broken(
        "causal_lm",
        ("data.messages", "no chat template", "data.prompt and data.response"),
        into_messages,
        sets=("data.messages=messages",),
    ),
    "messages without an answer": Broken(
        "causal_lm",
        ("rows.jsonl:5", "column 'messages'", "no message of role 'assistant'"),
        into_messages_but_one,
        sets=("data.messages=messages",),
    ),
    "responses without a token": Broken(
        "causal_lm",
        ("rows.jsonl, train", "model.max_length = 16", "such as record", "data.response"),
        every(4, response=""),
    ),
    "no room for a response": Broken(
        "causal_lm",
        ("model.max_length = 1: leaves no room", "choose 2 or more"),
        sets=("model.max_length=1",),
    ),
    "a column that is not there": Broken(
        "causal_lm",
        ('data.response = "respons"', "rows.jsonl:1", "did you mean 'response'"),
        sets=("data.response=respons",),
    ),
    "a metric of another task": Broken(
        "qa", ("task.metric = 'perplexity'", "f1, exact_match"), sets=("task.metric=perplexity",)
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_data_that_do_not_work_are_refused_with_their_place(
    ground: Ground, runs: Path, tmp_path: Path, broken: Broken
) -> None:
    rows = [dict(row) for row in TASK_GROUNDS[broken.kind].rows()]
    broken.spoil(rows)
    tree = {**write(ground, tmp_path, broken.kind, rows), **broken.instead}
    outcome = cli_call("run", saved(tmp_path, tree), "--runs", runs, *options(broken.sets))
    refused(outcome, *broken.says)
    assert not runs.exists()


FEW: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "answers": ("qa", {"answers": NOWHERE}, "1 of 160 questions have no answer"),
    "responses": ("causal_lm", {"response": ""}, "1 of 160 rows have no token of a response"),
}


@pytest.mark.parametrize("case", FEW)
def test_few_of_them_are_passed_over_with_one_warning(
    case: str, ground: Ground, runs: Path, tmp_path: Path
) -> None:
    kind, spoilt, says = FEW[case]
    rows = [dict(row) for row in TASK_GROUNDS[kind].rows()]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fifth(**spoilt)(rows)
    tree = write(ground, tmp_path, kind, rows)
    held_out = dict.fromkeys(("test", "validation"), str(tmp_path / "good.jsonl"))
    tree = merge(tree, {"data": held_out, "partition": {"kind": "iid"}})
    short = options(("federation.rounds=1", "training.steps=1", "evaluation.limit=8"))
    outcome = cli_call("run", saved(tmp_path, tree), "--runs", runs, *short)
    assert outcome.code == 0, outcome
    said = " ".join(outcome.out.split())
    assert said.count("passed over") == 1
    assert says in said
    assert "record 5" in said


@pytest.mark.parametrize("kind", ["tagging", "qa"])
def test_a_tokenizer_without_a_fast_version_is_refused(
    kind: str, ground: Ground, runs: Path, tmp_path: Path
) -> None:
    """ByT5's reads bytes, in Python."""
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=POSITIONS,
    )
    model: Any = BertModel(config)
    model.save_pretrained(tmp_path / "slow")
    tokenizer: Any = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path / "slow")
    tree = merge(write(ground, tmp_path, kind), {"model": {"name": str(tmp_path / "slow")}})
    outcome = cli_call("run", saved(tmp_path, tree), "--runs", runs)
    refused(outcome, f"task.kind = '{kind}'", "no fast version", "choose another model")
    assert not runs.exists()


def test_parquet_without_its_package_is_refused_with_the_remedy(
    ground: Ground, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    train = options((f"data.train={tmp_path / 'rows.parquet'}",))
    outcome = cli_call("run", ground.config, "--runs", runs, *train)
    refused(outcome, "rows.parquet", "needs pyarrow", "pip install 'fedpeft[data]'")
    assert not runs.exists()


def test_the_hub_without_a_network_is_refused_with_the_remedy(
    ground: Ground, runs: Path, tmp_path: Path
) -> None:
    tree = {**ground.tree(), "data": {"source": "hub", "name": "nobody/nothing"}}
    outcome = cli_call("run", saved(tmp_path, tree), "--runs", runs)
    refused(outcome, "data.name = 'nobody/nothing'", "give a folder in data.name", "data.train")
    assert not runs.exists()


def test_a_gguf_file_of_an_unknown_architecture_is_refused(
    ground: Ground, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    write_gguf(file, arch="mamba9")
    tree = merge(write(ground, tmp_path, "causal_lm"), {"model": {"name": str(file)}})
    outcome = cli_call("run", saved(tmp_path, tree), "--runs", runs)
    refused(outcome, f"model.name = {str(file)!r}", "mamba9", "a folder or hub id")
    assert not runs.exists()
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


TARGETS = {
    "share above 1": ("qa", "60", ("target = 60: F1 is above 0 and at most 1", "0.6")),
    "share below 0": ("tagging", "-1", ("target = -1: F1 is above 0",)),
    "no number": ("causal_lm", "nan", ("target = nan", "a finite perplexity, such as 10")),
}


@pytest.mark.parametrize("case", TARGETS)
def test_a_target_that_the_metric_cannot_have_is_refused_before_the_first_run(
    case: str, ground: Ground, runs: Path, tmp_path: Path
) -> None:
    kind, target, says = TARGETS[case]
    config = saved(tmp_path, write(ground, tmp_path, kind))
    arguments = ("--methods", "lora", "--runs", runs, f"--target={target}")
    refused(cli_call("compare", config, *arguments), *says)
    assert not runs.exists()


@pytest.mark.parametrize(
    ("kind", "needs"),
    [
        ("classification", "a text classifier"),
        ("tagging", "a model that tags tokens"),
        ("qa", "a model that answers questions"),
    ],
)
def test_a_model_that_does_not_fit_is_told_what_the_task_needs(kind: str, needs: str) -> None:
    case = TASK_CASES[kind]

    class Wide(torch.nn.Module):
        """A model that takes two texts for one."""

        def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> Any:
            some = torch.ones(1, input_ids.shape[1], 9)
            return type("Out", (), {"logits": some, "start_logits": some, "end_logits": some})

    why = case.task().trial(Wide(), torch.device("cpu"))
    assert why.endswith(f"choose {needs}")
