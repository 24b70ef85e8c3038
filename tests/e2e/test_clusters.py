"""A partition by clusters: what texts are embedded as, and that runs of it are as others are."""

import builtins
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from fedpeft.data import Rows
from fedpeft.experiment.build import build
from fedpeft.experiment.reading import divide, read_data
from fedpeft.experiment.run import resume, start
from fedpeft.models import ModelSection, embed
from fedpeft.tasks import Encoded, Example, TaskSection, make_task

from .builders import Ground, cli_call, refused, write_bert, write_gpt2

CLUSTERS = {"partition": {"kind": "cluster", "clusters": 4, "alpha": 0.5}}
TEXTS = ("birds0 word1", "fish0 word2 word3 word4 word5", "", "trees1", *["winds0"] * 5)


@pytest.mark.parametrize("write", [write_bert, write_gpt2])
def test_a_text_is_embedded_as_the_mean_of_its_last_states(write: Any, tmp_path: Path) -> None:
    """As transformers computes it for one text after the other, without padding."""
    folder = write(tmp_path / "model")
    task = make_task(TaskSection(), ("a", "b"), max_length=16)
    rows = Rows.of_texts(TEXTS, ["a"] * len(TEXTS))
    [embedded, nothing] = embed(ModelSection(name=str(folder)), task, [rows, rows.take([])])
    assert nothing.shape == (0, 32)
    model: Any = AutoModel.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(TEXTS, embedded, strict=True):
        ids = tokenizer(text)["input_ids"]
        if ids:
            with torch.no_grad():
                states = model(input_ids=torch.tensor([ids])).last_hidden_state
            assert np.abs(states[0].mean(dim=0).numpy() - vector).max() < 1e-5


def test_windows_of_a_row_are_taken_together(tmp_path: Path) -> None:
    """The mean is over the tokens of all windows, and a row without any has the vector 0."""
    folder = write_bert(tmp_path / "model")
    first, second = torch.tensor([2, 5, 6, 3]), torch.tensor([2, 7, 3])

    class Windows:
        def with_tokenizer(self, tokenizer: Any) -> "Windows":
            return self

        def encode(self, rows: Rows) -> Encoded:
            label = torch.tensor(0)
            return Encoded([Example(first, label, row=1), Example(second, label, row=1)])

    task: Any = Windows()
    rows = Rows.of_texts(["", ""], ["a", "a"])
    [embedded] = embed(ModelSection(name=str(folder)), task, [rows])
    model: Any = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = [model(input_ids=ids[None]).last_hidden_state[0] for ids in (first, second)]
    assert np.abs(torch.cat(states).mean(dim=0).numpy() - embedded[1]).max() < 1e-5
    assert not embedded[0].any()


def test_runs_by_clusters_resume_and_share_what_was_found(ground: Ground, tmp_path: Path) -> None:
    config = ground.chosen(CLUSTERS, {"federation": {"rounds": 2}, "evaluation": {"every": 1}})
    federation = build(config)
    assert federation.partition.clusters is not None
    # Texts of a label share words, so that clusters are about labels: the tiny model tells words.
    again = divide(config, read_data(config))
    assert again.digest() == federation.partition.digest()
    # A federation of another method takes over who holds what; one of another seed divides anew.
    other = ground.chosen(CLUSTERS, {"method": {"name": "bitfit"}})
    assert build(other, reuse=federation).partition is federation.partition
    reseeded = ground.chosen(CLUSTERS, {"seed": 1})
    assert build(reseeded, reuse=federation).partition.digest() != again.digest()
    start(federation, tmp_path / "run")
    resume(tmp_path / "run")  # would refuse another partition


def test_without_scikit_learn_the_remedy_is_told(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    outcome = cli_call("partition", ground.config, "--set", "partition.kind=cluster")
    refused(outcome, "partition.kind = 'cluster' needs scikit-learn", "pip install 'fedpeft[data]'")
