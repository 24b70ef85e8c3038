"""What every end-to-end test stands on: a tiny base model, an easy data set, a configuration, and a way to call the CLI."""

import contextlib
import io
import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from fedpeft.cli import app as cli
from fedpeft.experiment.config import Config, from_tree, merge
from fedpeft.types import State

LABELS = ("birds", "fish", "trees", "winds")
OWN_WORDS = {label: [f"{label}{number}" for number in range(2)] for label in LABELS}
"""Words that only texts of that label hold, so the task is easy."""
NOISE = [f"word{number}" for number in range(188)]
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *NOISE,
    *(word for own in OWN_WORDS.values() for word in own),
]
SIZES = {"birds": 65, "fish": 55, "trees": 45, "winds": 35}
POSITIONS = 32
"""Texts this long are the longest that the tiny models take."""


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str


def cli_call(*arguments: str | Path) -> Outcome:
    """Run ``fedpeft`` with ``arguments`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fedpeft", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def refused(outcome: Outcome, *needles: str) -> str:
    """Assert that a command was refused as bad input is, in one line that holds ``needles``; return the line."""
    assert outcome.code == 2, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("fedpeft: ")
    for needle in needles:
        assert needle in lines[0]
    return lines[0]


def write_tokenizer(folder: Path, special: bool = True) -> None:
    """Save a tokenizer that knows the words of ``examples``; ``special``: with [CLS] and [SEP] around every text."""
    numbers = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        around = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=around
        )
    names = (
        {"unk_token": "[UNK]", "pad_token": "[PAD]"}
        if special
        else {"unk_token": "[UNK]", "eos_token": "[SEP]"}
    )
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def write_bert(folder: Path) -> Path:
    """Save a BERT encoder without a head, as a pre-trained one comes, with its tokenizer."""
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
    )
    return _write(folder, BertModel, config, special=True)


def write_gpt2(folder: Path) -> Path:
    """Save a GPT-2 without a head: its dense layers are Conv1D, and its tokenizer has no padding token."""
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=POSITIONS,
        initializer_range=0.2,
        bos_token_id=3,
        eos_token_id=3,
    )
    return _write(folder, GPT2Model, config, special=False)


def write_llama(folder: Path) -> Path:
    """Save a Llama without a head: it has no bias anywhere."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=3,
        eos_token_id=3,
    )
    return _write(folder, LlamaModel, config, special=False)


def write_causal_lm(folder: Path) -> Path:
    """Save a Llama with its output layer, a language model without a chat template."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
        bos_token_id=3,
        eos_token_id=3,
    )
    return _write(folder, LlamaForCausalLM, config, special=False)


def _write(folder: Path, kind: Any, config: Any, special: bool) -> Path:
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    write_tokenizer(folder, special)
    return folder


def examples() -> list[dict[str, str]]:
    """Return 200 rows of four labels in a fixed random order; three words of each tell its label, two tell nothing."""
    draw = random.Random(0)
    rows = []
    for label, size in SIZES.items():
        for number in range(size):
            words = draw.choices(OWN_WORDS[label], k=3) + draw.sample(NOISE, 2)
            draw.shuffle(words)
            rows.append(
                {
                    "text": " ".join(words),
                    "label": label,
                    "site": f"site{number % 5}",
                    "unused": "x",
                }
            )
    draw.shuffle(rows)
    return rows


def write_examples(path: Path) -> Path:
    """Save the rows of ``examples`` as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in examples()))
    return path


SMALL: Mapping[str, Mapping[str, object]] = {
    "lora": {"rank": 4},
    "ravan": {"rank": 4},
}
"""Fields of methods whose defaults are for wider models."""


@dataclass(frozen=True)
class Ground:
    """A folder that holds the tiny model, the data and ``config.toml``, which points to both."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def data(self) -> Path:
        return self.folder / "examples.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "bert"

    def tree(self) -> dict[str, Any]:
        """Return the settings: 5 clients, 2 a round, 6 rounds of 2 steps, in fp32 on one thread."""
        return {
            "name": "tiny",
            "model": {"name": str(self.model), "max_length": 16},
            "machine": {"device": "cpu", "precision": "fp32", "attention": "eager", "threads": 1},
            "engine": {"stack": 2},
            "data": {"source": "files", "train": str(self.data)},
            "partition": {"kind": "dirichlet", "clients": 5, "alpha": 1.0, "min_examples": 8},
            "federation": {"rounds": 6, "clients_per_round": 2},
            "training": {"steps": 2, "batch_size": 8, "lr": 0.01},
            "method": {"name": "lora", "rank": 4},
            "evaluation": {"every": 3},
        }

    def chosen(self, *trees: Mapping[str, Any]) -> Config:
        """Return the settings with ``trees`` laid over them."""
        return from_tree(merge(self.tree(), *trees))


def write_ground(folder: Path) -> Ground:
    """Make the model, the data and the configuration in ``folder``."""
    ground = Ground(folder)
    write_bert(ground.model)
    write_examples(ground.data)
    ground.config.write_text(to_toml(ground.tree()))
    return ground


def to_toml(tree: Mapping[str, Any]) -> str:
    """Return a tree of sections, one deep, as TOML."""
    plain = [
        f"{key} = {json.dumps(value)}"
        for key, value in tree.items()
        if not isinstance(value, Mapping)
    ]
    for section, fields in tree.items():
        if isinstance(fields, Mapping):
            plain += [
                f"[{section}]",
                *(f"{key} = {json.dumps(value)}" for key, value in fields.items()),
            ]
    return "\n".join(plain) + "\n"


def assert_same(one: State, other: State) -> None:
    """Assert that two states are equal to the bit: round, names, dtypes, values and known memories."""
    assert one.round == other.round
    assert dict(one.memories) == dict(other.memories)
    for mine, theirs in ((one.shared, other.shared), (one.server, other.server)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name
