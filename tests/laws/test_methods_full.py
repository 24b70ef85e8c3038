"""Full fine-tuning trains every parameter, BitFit the biases and nothing else."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fedpeft.errors import BadInput
from fedpeft.mounting import describe
from fedpeft.training.evaluation import mounted_state
from fedpeft.types import Client
from tests.families import FAMILIES, GPT2, GPT2_PLAIN, family
from tests.tiny import CPU, HEAD, SEED, bert, federation, small

BIASES = {name for name, _ in bert().named_parameters() if name.endswith(".bias")}


def test_full_sends_and_trains_every_parameter() -> None:
    playing = federation(small("full"))
    start, after = playing.start, playing.play(1)
    everything = {name for name, _ in bert().named_parameters()}
    assert start.shared.keys() == after.shared.keys() == everything
    for answer in playing.answers(0).values():
        assert answer.payload.keys() == everything
        weights = sum(parameter.numel() for parameter in bert().parameters())
        assert answer.measured.trained == weights


def test_full_leaves_the_frozen_model_as_it_was() -> None:
    """The state holds the pre-trained parameters themselves, so nothing may be written into them."""
    playing = federation(small("full"))
    before = {
        name: parameter.clone() for name, parameter in playing.worker.model.named_parameters()
    }
    start = playing.start
    playing.play(2)
    for name, parameter in playing.worker.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(start.shared[name], before[name])


def test_bitfit_touches_biases_and_the_head_only() -> None:
    playing = federation(small("bitfit"))
    after = playing.play(1)
    assert after.shared.keys() == BIASES | HEAD
    assert "bert.embeddings.LayerNorm.bias" in BIASES
    model = playing.worker.model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with mounted_state(playing.method, after, model, CPU, SEED):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (
                name not in BIASES | HEAD
            ) or name.endswith("key.bias")


def test_bitfit_needs_biases() -> None:
    """Llama has none; the head's own would not be the method's."""
    with pytest.raises(BadInput, match="'bitfit' matches nothing: the model has no biases"):
        small("bitfit").init(describe(family("llama"), FAMILIES["llama"].head), SEED)
    headed = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    with pytest.raises(BadInput, match="no biases"):
        small("bitfit").init(describe(headed, {"1.weight", "1.bias"}), SEED)


def test_a_uniform_mean_counts_every_client_once() -> None:
    playing = federation(small("full", weighting="uniform"))
    after = playing.play(1)
    payloads = [
        answer.payload["classifier.weight"].double() for answer in playing.answers(0).values()
    ]
    expected = (payloads[0] + payloads[1] + payloads[2]) / 3
    torch.testing.assert_close(
        after.shared["classifier.weight"].double(), expected, rtol=1e-6, atol=1e-8
    )


def test_tied_parameters_are_sent_once() -> None:
    model = GPT2LMHeadModel(GPT2Config(**{**GPT2, **GPT2_PLAIN, "num_labels": 2}))
    method = small("full")
    down = method.send(method.init(describe(model, ()), SEED), Client(0))
    assert "transformer.wte.weight" in down
    assert "lm_head.weight" not in down
