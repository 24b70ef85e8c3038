"""Laws of classification: the loss of transformers, the correlation of scikit-learn."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import XLNetConfig, XLNetForSequenceClassification

from fedpeft.models.tokens import pad_on_the_left
from fedpeft.tasks import Classification, Encoded, Example
from tests.tiny import Padding
from tests.tiny_tasks import TASK_CASES, one_hot

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["classification", "pairs"])
def test_the_loss_of_a_batch_is_that_of_transformers(kind: str) -> None:
    case = TASK_CASES[kind]
    task, model = case.task(), case.make()
    call: Any = model
    batch = task.collate(task.encode(case.rows(9, 3)), CPU)
    assert ("token_type_ids" in batch) == (kind == "pairs")
    expected = call(**batch).loss
    torch.testing.assert_close(task.losses(model, batch).mean(), expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_for_a_family_that_pads_on_the_left() -> None:
    """XLNet reads the last position, and of a pair which of the two texts a token belongs to."""
    config = XLNetConfig(
        vocab_size=60,
        d_model=16,
        n_layer=2,
        n_head=2,
        d_inner=24,
        dropout=0.0,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    model: Any = XLNetForSequenceClassification(config)
    model.eval()
    pad_on_the_left(model)
    short = Example(torch.tensor([5, 6, 7]), torch.tensor(0), 0, torch.tensor([0, 0, 1]))
    longer = Example(torch.tensor([8, 9, 10, 11]), torch.tensor(1), 1, torch.tensor([0, 1, 1, 2]))
    task = Classification(("a", "b"), 16, tokenizer=Padding())
    with torch.no_grad():
        alone = task.logits(model, task.collate(Encoded([short]), CPU))
        together = task.logits(model, task.collate(Encoded([short, longer]), CPU))
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-5)


pairs_of_labels = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)


@given(pairs_of_labels)
def test_metrics_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    task = TASK_CASES["classification"].task()
    true, predicted = [list(labels) for labels in zip(*pairs, strict=True)]
    ids = torch.tensor([1])
    examples = Encoded([Example(ids, torch.tensor(label), row) for row, label in enumerate(true)])
    counts = task.score([{"logits": logits} for logits in one_hot(predicted, 3)], examples)
    metrics = task.metrics(counts)
    correct = sum(one == other for one, other in pairs)
    assert metrics["accuracy"] == pytest.approx(correct / len(pairs))
    # scikit-learn warns of degenerate confusion matrices; there both are 0.
    degenerate = len(set(true)) == 1 or len(set(predicted)) == 1
    matthews = 0.0 if degenerate else matthews_corrcoef(true, predicted)
    assert metrics["matthews"] == pytest.approx(matthews, abs=1e-9)
    macro = f1_score(true, predicted, average="macro", labels=sorted(set(true)), zero_division=0)
    assert metrics["macro_f1"] == pytest.approx(macro)
