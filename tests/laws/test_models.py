"""What the head does not read is not computed, and nothing else changes."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from fedpeft.models import READS_FIRST, spare_last_block
from tests.families import BERT, COMMON, FAMILIES, family, texts

MASK = (torch.arange(7) < torch.tensor([[7], [3], [5], [7], [1], [6]])).long()


def outcome(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of ragged texts and the gradients of every parameter."""
    call: Any = model.requires_grad_()
    logits = call(input_ids=texts(6), attention_mask=MASK).logits
    loss, parameters = (
        functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1, 2])),
        dict(model.named_parameters()),
    )
    gradients = torch.autograd.grad(loss, tuple(parameters.values()), materialize_grads=True)
    return logits.detach(), dict(zip(parameters, gradients, strict=True))


def positions(model: nn.Module) -> list[int]:
    """Return for how many tokens of the longest text each dense layer is computed."""
    seen: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, given, __: seen.append(given[0].shape[1] if given[0].dim() == 3 else 1)
            )
    outcome(model)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_a_spared_last_block_says_and_learns_the_same(name: str) -> None:
    plain = family(name)
    spared = deepcopy(plain)
    spare_last_block(spared)
    (logits, gradients), (expected, due) = outcome(spared), outcome(plain)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, due[parameter], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", READS_FIRST)
def test_the_last_block_computes_one_token_after_its_attention(name: str) -> None:
    plain = family(name)
    spared = deepcopy(plain)
    spare_last_block(spared)
    before, after = positions(plain), positions(spared)
    blocks, first_of_last = slice(0, 12), 9 if name != "distilbert" else 10
    assert before[blocks] == [7] * 12
    assert after[blocks] == [7] * first_of_last + [1] * (12 - first_of_last)
    assert before[12:] == after[12:]


def test_a_feed_forward_in_chunks_is_left_alone() -> None:
    model = BertForSequenceClassification(BertConfig(**BERT, **COMMON, chunk_size_feed_forward=7))
    spare_last_block(model)
    assert set(positions(model)) == {7, 1}
    outcome(model)
