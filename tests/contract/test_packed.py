"""Every method on a base of 4 and of 8 bits trains as on the same matrices in ordinary layers, and writes none of it."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from fedpeft.errors import BadInput
from fedpeft.federation.client import Worker
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.hardware import Hardware
from fedpeft.types import Client, Method, Payload, State
from fedpeft.wire.messages import Kind, Request, Response, decode
from tests.contract.reference import core_rows
from tests.packed import BITS, KINDS, SIZES, bases, kept, loaded, worker
from tests.tiny import CONFIG, FIELDS, SEED, assert_same_state, close, small

TARGETS = {"bert": "query|value", "llama": "q_proj|v_proj"}
NORMS = {"bert": ["LayerNorm"], "llama": ["input_layernorm", "post_attention_layernorm"]}
REFUSED = {
    *(("full", "bert"), ("full", "llama"), ("slora_full", "bert"), ("slora_full", "llama")),
    ("bitfit", "llama"),
}
"""What trains every weight; biases, of which Llama has none."""
LEFT_OUT = [(*refused, bits) for refused in REFUSED for bits in BITS]
TABLE = core_rows(KINDS, BITS, without=LEFT_OUT)
SIDE_BY_SIDE = core_rows(["bert"], [4], without=[*LEFT_OUT, "sparse", "peft"])
SIDE_BY_SIDE += core_rows(["llama"], [8], without=[*LEFT_OUT, "sparse", "peft"])


def method_of(name: str, kind: str, **fields: object) -> Method:
    chosen: dict[str, object] = {}
    if "targets" in FIELDS[name]:
        chosen = {"targets": TARGETS[kind]}
    if name == "peft":  # a tuner that does not change what is packed
        chosen = {"tuner": "ln_tuning", "settings": {"target_modules": NORMS[kind]}}
    return small(name, **{**chosen, **fields})


def handled(playing: Worker, state: State, stack: list[int]) -> list[Payload]:
    """Return what each client of ``stack`` replies and remembers, under different names."""
    blobs: list[bytes] = []
    for client in stack:
        down = playing.method.send(state, Client(client))
        blobs.append(Request(Kind.TRAIN, state.round, CONFIG, down).encode())
    replies: list[Payload] = []
    for reply, memory in playing.handle(stack, blobs, [b""] * len(stack)):
        response = Response.decode(reply)
        stays = decode(memory) if memory else {}
        remembered = {f"memory {name}": tensor for name, tensor in stays.items()}
        loss = torch.tensor(response.measured.loss)
        replies.append({**response.payload, **remembered, "its loss": loss})
    return replies


@cache
def alone(name: str, kind: str, bits: int) -> tuple[State, list[Payload]]:
    """Return the first state, and what each client replies that trains alone."""
    method = method_of(name, kind)
    state = method.init(loaded(kind, bits).base, SEED)
    playing = worker(kind, bits, method)
    return state, [handled(playing, state, [client])[0] for client in SIZES]


@pytest.mark.parametrize(("name", "kind", "bits"), TABLE)
def test_a_round_is_that_on_the_same_matrices_unpacked(name: str, kind: str, bits: int) -> None:
    """SVDs see the unpacked matrices, to the bit; forward and backward passes go through them."""
    before = kept(loaded(kind, bits).model)
    state, replies = alone(name, kind, bits)
    method = method_of(name, kind)
    _, plain_base = bases(kind, bits)
    assert_same_state(state, method.init(plain_base, SEED))
    playing = worker(kind, bits, method, plain=True)
    for client in SIZES:
        close(replies[client], handled(playing, state, [client])[0], 2e-5)
    assert kept(loaded(kind, bits).model) == before


@pytest.mark.parametrize(("name", "kind", "bits"), SIDE_BY_SIDE)
def test_k_clients_at_once_equal_k_one_by_one(name: str, kind: str, bits: int) -> None:
    method = method_of(name, kind)
    if name == "slora":  # its first stage is that of ``sparse``
        method = method_of(name, kind, stage1=0.0)
    state = method.init(loaded(kind, bits).base, SEED)
    playing = worker(kind, bits, method)
    together = handled(playing, state, list(SIZES))
    for client in SIZES:
        single = handled(playing, state, [client])[0]
        close(together[client], single, 2e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_kept_hidden_states_change_nothing(kind: str, bits: int) -> None:
    last = {"bert": r"layer\.1\..*(query|value)", "llama": r"layers\.1\..*(q|v)_proj"}
    method = method_of("lora", kind, targets=last[kind])
    state = method.init(loaded(kind, bits).base, SEED)
    playing = worker(kind, bits, method)
    caching = replace(playing, cache=ActivationCache(SIZES, rows=4))
    plain = handled(playing, state, list(SIZES))
    for _ in range(2):
        for one, other in zip(plain, handled(caching, state, list(SIZES)), strict=True):
            close(one, other, 1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["bitfit", "federa", "sparse"])
def test_training_in_bf16_is_near_training_in_float32(name: str, bits: int) -> None:
    """Also where the layer is frozen and only its bias is trained."""
    state, replies = alone(name, "bert", bits)
    bf16 = Hardware("cpu", "bf16", "eager", 1)
    playing = worker("bert", bits, method_of(name, "bert"), hardware=bf16)
    before = kept(loaded("bert", bits).model)
    reply = handled(playing, state, [0])[0]
    assert kept(loaded("bert", bits).model) == before
    exact = replies[0]
    for part, tensor in reply.items():
        assert tensor.dtype == exact[part].dtype
    trained = [part for part in exact if part in state.shared]
    off = torch.cat([(reply[part] - exact[part]).flatten() for part in trained])
    moved = torch.cat([(exact[part] - state.shared[part]).flatten() for part in trained])
    assert float(off.norm()) < 0.1 * float(moved.norm())


@pytest.mark.parametrize(("name", "kind"), sorted(REFUSED))
def test_what_cannot_be_trained_is_refused_in_one_line(name: str, kind: str) -> None:
    words = f"method.name = '{name}'.*choose 'lora'"
    if name == "slora_full":
        words = "method.stage1_method = 'full'.*choose 'sparse'"
    with pytest.raises(BadInput, match=words) as error:
        method_of(name, kind).init(loaded(kind, 4).base, SEED)
    assert "\n" not in str(error.value)
    if name != "bitfit":
        assert "model.bits" in str(error.value)


def test_a_tuner_of_peft_that_changes_what_is_packed_is_refused_in_one_line() -> None:
    with pytest.raises(
        BadInput, match="method.tuner = 'ia3' does not fit: .*PackedLinear"
    ) as error:
        small("peft").init(loaded("bert", 4).base, SEED)
    assert "\n" not in str(error.value)
