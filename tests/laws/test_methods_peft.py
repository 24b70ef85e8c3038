"""peft's own LoRA, put in by peft, trains and merges as ours does; its other tuners train on every task they fit."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpeft.errors import BadInput
from fedpeft.methods.peft import TRIED
from fedpeft.mounting import describe, twin_of
from fedpeft.training.evaluation import mounted_state
from fedpeft.types import Base, Client, State
from fedpeft.wire.messages import Kind, Request, Response
from tests.causal_lms import worker
from tests.contract.test_tasks import Played
from tests.products import LAYERS
from tests.tiny import CONFIG, CPU, HEAD, SEED, SGD, base_of, bert, close, federation, logits, small
from tests.tiny_tasks import TASK_CASES

TUNERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "target_modules": ["query", "value"]},
    "dora": {"r": 2, "target_modules": ["query", "value"], "use_dora": True},
    "ia3": {},
    "vera": {"r": 4, "target_modules": ["query", "value"]},
    "ln_tuning": {"target_modules": ["LayerNorm"]},
    "oft": {"oft_block_size": 4, "target_modules": ["query", "value"]},
    "boft": {"boft_block_size": 4, "target_modules": ["query", "value"]},
    "loha": {"r": 2, "target_modules": ["query", "value"]},
    "lokr": {"r": 2, "target_modules": ["query", "value"]},
    "hra": {"r": 2, "target_modules": ["query", "value"]},
    "fourierft": {"n_frequency": 20, "target_modules": ["query", "value"]},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prefix_tuning": {"num_virtual_tokens": 3},
}
LENGTHENING = {"prompt_tuning", "p_tuning"}


def tuned(name: str, **changes: Any) -> dict[str, Any]:
    """Return the fields of the method for one of the tuners above."""
    return {"tuner": "lora" if name == "dora" else name, "settings": {**TUNERS[name], **changes}}


def in_pefts_names(shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of our LoRA under peft's names."""
    renamed = {}
    for part, tensor in shared.items():
        module, _, factor = part.partition(":")
        name = f"peft:base_model.model.{module}.lora_{factor}.default.weight" if factor else part
        renamed[name] = tensor
    return renamed


def test_pefts_own_lora_trains_and_merges_as_ours_does() -> None:
    settings = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["query", "value"]}
    ours = federation(small("lora"))
    theirs = federation(small("peft", tuner="lora", settings=settings))
    start = in_pefts_names(dict(ours.start.shared))
    assert start.keys() == theirs.start.shared.keys()
    last = theirs.play(3, State(0, start))
    close(last.shared, in_pefts_names(dict(ours.play(3).shared)), 1e-4)
    for name in LAYERS:
        assert f"peft:base_model.model.{name}.lora_A.default.weight" in last.shared


def test_a_twin_has_the_very_parameters_and_modules_of_its_own() -> None:
    model = bert()
    twin = twin_of(model)
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    assert all(one[0] == other[0] and one[1] is other[1] for one, other in pairs)
    assert not set(model.modules()) & set(twin.modules())
    assert torch.equal(logits(model), logits(twin))


def test_the_mode_of_the_model_is_that_of_what_stands_in_for_it() -> None:
    method = small("peft")
    model = bert(hidden_dropout_prob=0.5)
    state = method.init(describe(model, HEAD), SEED)
    with mounted_state(method, state, model, CPU, SEED):
        model.eval()
        assert torch.equal(logits(model), logits(model))
        model.train()
        assert not torch.equal(logits(model), logits(model))


QUICK = {"dora", "vera", "prompt_tuning", "prefix_tuning"}
"""Tuners that ``make test`` tries; the others are in ``make test-all``."""


def quickly(names: Iterable[str]) -> list[Any]:
    """Return the names of tuners, those that are not quick marked as slow."""
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("kind", ["classification", "tagging", "qa"])
@pytest.mark.parametrize("name", quickly(TUNERS))
def test_a_tuner_trains_on_a_task_or_is_refused_in_one_line(name: str, kind: str) -> None:
    if name in LENGTHENING and kind != "classification":
        with pytest.raises(BadInput, match=f"method.tuner = '{name}'") as refused:
            Played("peft", TASK_CASES[kind].ground(), **tuned(name)).handled([0])
        assert "\n" not in str(refused.value)
        assert str(refused.value).endswith(f"fit every task: {TRIED}")
        return
    played = Played("peft", TASK_CASES[kind].ground(), **tuned(name))
    [reply] = played.handled([0])
    moved = {
        part: float((reply[part] - tensor).abs().max())
        for part, tensor in played.state.shared.items()
    }
    assert max(size for part, size in moved.items() if part.startswith("peft:")) > 1e-5
    assert max(size for part, size in moved.items() if not part.startswith("peft:")) > 1e-3
    update = Response.decode(
        played.worker.handle([0], [played.asked(Kind.TRAIN, 0)], [b""])[0][0]
    ).payload
    assert update.keys() == played.method.expects(played.state, played.state.shared).keys()


LM_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"r": 2, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "ia3": {},
    "vera": {"r": 4, "target_modules": ["q_proj", "o_proj"]},
    "ln_tuning": {"target_modules": ["input_layernorm"]},
    "oft": {"oft_block_size": 4, "target_modules": ["q_proj"]},
    "boft": {"boft_block_size": 4, "target_modules": ["q_proj"]},
    "loha": {"r": 2, "target_modules": ["q_proj"]},
    "lokr": {"r": 2, "target_modules": ["q_proj"]},
    "hra": {"r": 2, "target_modules": ["q_proj"]},
    "fourierft": {"n_frequency": 20, "target_modules": ["q_proj"]},
    "prefix_tuning": {"num_virtual_tokens": 3},
}


def test_tuners_that_are_named_as_fitting_are_those_tried_on_every_task() -> None:
    assert set(TRIED.split(", ")) == (TUNERS.keys() & LM_SETTINGS.keys()) - {"dora"}


@pytest.mark.parametrize("name", quickly(LM_SETTINGS))
def test_a_tuner_trains_a_language_model(name: str) -> None:
    fields = {**tuned(name), "settings": LM_SETTINGS[name]}
    method = small("peft", **fields)
    playing = worker("llama", method, {0: 5}, SGD)
    state = method.init(describe(playing.model, ()), SEED)
    blob = Request(Kind.TRAIN, 0, CONFIG, method.send(state, Client(0))).encode()
    reply = Response.decode(playing.handle([0], [blob], [b""])[0][0]).payload
    assert max(float((reply[part] - state.shared[part]).abs().max()) for part in reply) > 1e-5


def test_what_peft_does_not_have_or_cannot_do_is_refused_in_one_line() -> None:
    base = base_of(bert())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tuner": "loraa"}, "'loraa' is none of peft's; choose from: "),
        (
            {"tuner": "lora", "settings": {"ranks": 3}},
            "does not fit: .*ranks.*; look at method.settings$",
        ),
        ({"tuner": "lora", "settings": {"target_modules": ["nothing"]}}, "does not fit: .*nothing"),
    ]
    for fields, words in wrong:
        with pytest.raises(BadInput, match=words) as refused:
            small("peft", **fields).init(base, SEED)
        assert "\n" not in str(refused.value)
    with pytest.raises(BadInput, match="needs the model itself"):
        small("peft").init(Base({}, {}, frozenset()), SEED)


def test_what_peft_draws_is_everywhere_the_same() -> None:
    """VeRA's frozen matrices do not travel: server and clients draw them alike."""
    method = small("peft", **tuned("vera"))
    model = bert()
    state = method.init(base_of(model), SEED)
    moved = State(1, {n: t + 0.1 if n.startswith("peft:") else t for n, t in state.shared.items()})
    said = []
    for _ in range(2):
        torch.rand(3)
        fresh: nn.Module = bert()
        with mounted_state(method, moved, fresh, CPU, SEED):
            said.append(logits(fresh))
    assert torch.equal(*said)
    assert (said[0] - logits(model)).abs().max() > 1e-3
