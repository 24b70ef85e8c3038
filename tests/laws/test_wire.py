"""What is decoded is what was encoded, to the bit; what was touched on the way is refused."""

import json
import math
import random
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from fedpeft.engines.local import LocalEngine
from fedpeft.errors import Forgotten, WireError
from fedpeft.federation.memory import Memories
from fedpeft.ledger import COUNTS, REALS, Measured
from fedpeft.types import NO_MEMORY, Client, Lost, Reply
from fedpeft.wire import tensors as codec
from fedpeft.wire.messages import (
    DIGEST,
    Kind,
    Request,
    Response,
    Status,
    check,
    decode,
    digest,
    encode,
    forgotten,
    form,
)
from fedpeft.wire.versions import PHASES, ROUNDS
from tests.contract.reference import replayed
from tests.strategies import PAYLOADS, bits
from tests.tiny import CONFIG as TINY
from tests.tiny import SEED, assert_same_state, base_of, bert, small, worker

CONFIG = digest(b"a configuration")
SIGNED = st.integers(-(2**63), 2**63 - 1)
NUMBER = st.integers(0, 2**63 - 1)
FIGURES = st.builds(
    Measured,
    loss=st.none() | st.floats(allow_nan=False),
    **dict.fromkeys(COUNTS, SIGNED),
    **{name: st.floats() for name in REALS if name != "loss"},
)
"""Whatever a client may say of itself; NaN for a loss is no loss."""


def known(payload: dict[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: bits(tensor) for name, tensor in payload.items()}


@settings(deadline=None, max_examples=60)
@given(PAYLOADS)
def test_decoding_undoes_encoding_for_every_format_and_shape(payload: dict[str, Tensor]) -> None:
    blob = encode(payload)
    assert known(decode(blob)) == known(payload)
    assert encode(dict(reversed(payload.items()))) == blob, "the order of names does not travel"


@settings(deadline=None)
@given(PAYLOADS)
def test_a_message_is_as_long_as_any_other_of_its_names_formats_and_shapes(
    payload: dict[str, Tensor],
) -> None:
    assert len(encode({name: torch.zeros_like(tensor) for name, tensor in payload.items()})) == len(
        encode(payload)
    )


@settings(deadline=None)
@given(PAYLOADS, st.data())
def test_a_message_with_any_byte_changed_or_missing_or_added_is_refused(
    payload: dict[str, Tensor], data: st.DataObject
) -> None:
    blob = encode(payload)
    place = data.draw(st.integers(0, len(blob) - 1))
    flipped = (
        blob[:place] + bytes([blob[place] ^ data.draw(st.integers(1, 255))]) + blob[place + 1 :]
    )
    for damaged in (flipped, blob[:place], blob + b"\0"):
        with pytest.raises(WireError):
            decode(damaged)


def test_every_single_byte_of_a_message_is_covered_by_its_digest() -> None:
    blob = encode({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)})
    for place in range(len(blob)):
        with pytest.raises(WireError, match="damaged"):
            decode(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])


def test_bytes_with_a_true_digest_that_are_no_tensors_are_refused() -> None:
    for body in (b"", b"{}", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]"):
        with pytest.raises(WireError, match="safetensors"):
            decode(digest(body) + body)
    with pytest.raises(WireError):
        decode(b"short")


@settings(deadline=None)
@given(PAYLOADS)
def test_a_message_is_a_safetensors_file_after_its_digest(payload: dict[str, Tensor]) -> None:
    """Read by the library, and the library's own is read here."""
    assert known(load(encode(payload)[DIGEST:])) == known(payload)
    theirs = save({name: tensor.contiguous() for name, tensor in payload.items()})
    assert known(decode(digest(theirs) + theirs)) == known(payload)


def _whole(header: bytes, data: bytes) -> bytes:
    """Return the message with this header, under a true digest."""
    body = len(header).to_bytes(8, "little") + header + data
    return digest(body) + body


def _file(about: object, data: bytes = b"\0" * 16) -> bytes:
    """Return the message whose header is ``about`` as JSON, or ``about`` itself if it is bytes."""
    if isinstance(about, bytes):
        return _whole(about, data)
    return _whole(json.dumps(about, separators=(",", ":")).encode(), data)


def _tensor(
    shape: object = (4,), offsets: object = (0, 16), dtype: object = "F32"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FORGED: dict[str, object] = {
    "no tensors for the bytes": {},
    "a gap": {"a": _tensor((3,), (4, 16))},
    "bytes left over": {"a": _tensor((3,), (0, 12))},
    "past the end": {"a": _tensor((8,), (0, 32))},
    "an overlap": {"a": _tensor(), "b": _tensor((1,), (8, 12))},
    "a place of another size": {"a": _tensor((3,))},
    "a negative size": {"a": _tensor((-4,), (0, 16))},
    "two negative sizes": {"a": _tensor((-2, -2), (0, 16))},
    "half a size": {"a": _tensor((4.0,), (0, 16))},
    "an unknown dtype": {"a": _tensor(dtype="F4")},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "a list for a tensor": {"a": [1]},
    "metadata": {"__metadata__": {"a": "b"}, "a": _tensor()},
    "a size of 2^63": {"a": _tensor(), "b": _tensor((2**63, 0), (16, 16))},
    "an empty tensor of 2^62 by 2^62": {"a": _tensor(), "b": _tensor((0, 2**62, 2**62), (16, 16))},
    "an empty tensor of 257 by 256": {"a": _tensor(), "b": _tensor((0, 257, 256), (16, 16))},
    "nine dimensions": {"a": _tensor((4, *[1] * 8))},
    "a hundred thousand dimensions": {"a": _tensor((4, *[1] * 100_000))},
    "a size of ten thousand digits": b'{"a":{"dtype":"F32","shape":[%s]}}' % (b"9" * 10_000),
    "a size that is true": {"a": _tensor((True, 4))},
    "a size in words": {"a": _tensor(("4",))},
    "no size": {"a": _tensor((None, 4))},
    "a dtype that is a list": {"a": _tensor(dtype=["F32"])},
    "one offset": {"a": _tensor(offsets=(16,))},
    "three offsets": {"a": _tensor(offsets=(0, 16, 16))},
    "a name of a million characters": {"a" * 1_000_000: _tensor()},
    "a name that is no text": b'{"\xff":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "a name with an unknown escape": b'{"\\x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "one name twice": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "a comma too many": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},}',
    "lists a million deep": b"[" * 1_000_000,
    "objects in a name's place a million deep": b'{"a":' * 1_000_000 + b"}" * 1_000_000,
    "lists in a shape's place": b'{"a":{"shape":%s%s}}' % (b"[" * 100_000, b"]" * 100_000),
    "a text without an end": b'{"' + b"\\\\" * 1_000_000 + b"}",
    "a list": [1, 2],
    "nothing": b"",
    "null": None,
    "infinite": b'{"a":Infinity}',
}


@pytest.mark.parametrize("about", FORGED.values(), ids=FORGED)
def test_a_header_that_does_not_describe_the_bytes_is_refused(about: object) -> None:
    assert torch.equal(decode(_file({"a": _tensor()}))["a"], torch.zeros(4))
    with pytest.raises(WireError, match="safetensors"):
        decode(_file(about))
    with pytest.raises(WireError, match="safetensors"):
        form(_file(about))


def test_a_truth_value_is_0_or_1() -> None:
    """What torch makes of another byte differs from operation to operation."""
    about = {"a": _tensor((16,), dtype="BOOL")}
    assert decode(_file(about, b"\0\1" * 8))["a"].sum() == 8
    with pytest.raises(WireError, match="truth value"):
        decode(_file(about, b"\0\2" * 8))


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        ({"a" * 513: torch.ones(1)}, "512 characters"),
        ({"a": torch.ones([1] * 9)}, "9 dimensions"),
        ({"a": torch.ones(0, 257, 256)}, "multiply to more"),
    ],
    ids=["name", "dimensions", "empty"],
)
def test_what_no_receiver_would_read_is_not_sent(payload: dict[str, Tensor], why: str) -> None:
    with pytest.raises(WireError, match=why):
        encode(payload)


def test_the_bounds_themselves_are_kept() -> None:
    payload = {"a" * 512: torch.ones([1] * 8), "b": torch.ones(0, 256, 256)}
    assert known(decode(encode(payload))) == known(payload)


@pytest.mark.parametrize("bound", ["TENSORS", "HEADER"])
def test_the_number_of_tensors_and_the_length_of_a_header_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
    bound: str,
) -> None:
    few, many = ({str(number): torch.ones(1) for number in range(count)} for count in (10, 11))
    as_many = {"TENSORS": 10, "HEADER": int.from_bytes(encode(few)[DIGEST : DIGEST + 8], "little")}
    blob = encode(many)
    monkeypatch.setattr(codec, bound, as_many[bound])
    assert known(decode(encode(few))) == known(few)
    with pytest.raises(WireError, match="cannot be sent"):
        encode(many)
    for read in (decode, form):
        with pytest.raises(WireError, match="safetensors"):
            read(blob)


WORDS = st.text(max_size=5)
LEAVES = st.none() | st.booleans() | st.integers() | st.integers(2**60, 2**70) | st.floats() | WORDS
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
"""Any JSON value, and NaN and infinities, which Python's reader takes for JSON."""


def _parts(blob: bytes) -> tuple[bytes, bytes]:
    """Return header and data of a message."""
    length = int.from_bytes(blob[DIGEST : DIGEST + 8], "little")
    return blob[DIGEST + 8 : DIGEST + 8 + length], blob[DIGEST + 8 + length :]


@st.composite
def with_other_bytes(draw: st.DrawFn, blob: bytes) -> bytes:
    """Return ``blob`` with bits turned, cut, made longer or with another length of its header."""
    body = bytearray(blob[DIGEST:])
    match draw(st.sampled_from(["bits", "cut", "longer", "length"])):
        case "bits":
            for place in draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=4)):
                body[place] ^= 1 << draw(st.integers(0, 7))
        case "cut":
            del body[draw(st.integers(0, len(body))) :]
        case "longer":
            body += draw(st.binary(max_size=40))
        case "length":
            body[:8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return digest(bytes(body)) + bytes(body)


@st.composite
def with_another_header(draw: st.DrawFn, blob: bytes) -> bytes:
    """Return ``blob`` with a header, or a part of one, that is any JSON, many names, deep lists."""
    header, data = _parts(blob)
    about: dict[str, Any] = json.loads(header)
    name = draw(st.sampled_from([*about, "more"]))
    match draw(st.sampled_from(["header", "tensor", "field", "deep", "names"])):
        case "header":
            return _file(draw(JSON), data)
        case "tensor":
            about[name] = draw(JSON)
        case "field":
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            about[name] = {**about.get(name, _tensor()), field: draw(JSON)}
        case "deep":
            depth = draw(st.integers(1, 50_000))
            left, right = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}"), (b"[[],", b"]")]))
            deep = (json.dumps(name).encode(), left * depth, right * depth)
            return _whole(b"{%s:%s%s}" % deep, data)
        case "names":
            empty = _tensor((0, draw(st.integers(0, 2**65))), (0, 0))
            about |= {str(number): empty for number in range(draw(st.integers(1, 500)))}
    return _file(about, data)


def touched(blob: bytes) -> st.SearchStrategy[bytes]:
    """Return what someone who can make a digest may turn ``blob`` into."""
    return with_other_bytes(blob) | with_another_header(blob)


@settings(deadline=None, max_examples=300)
@given(PAYLOADS, st.data())
def test_whatever_is_done_to_a_message_is_read_as_some_payload_or_refused(
    payload: dict[str, Tensor], data: st.DataObject
) -> None:
    """Within memory of the order of its own length, and whoever reads it."""
    blob = data.draw(touched(Request(Kind.TRAIN, 1, CONFIG, payload).encode()))
    tracemalloc.start()
    try:
        with suppress(WireError):
            form(blob)
        with suppress(WireError):
            Request.decode(blob, CONFIG)
        with suppress(WireError):
            Response.decode(blob)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(blob) + 100_000
    try:
        found = decode(blob)
    except WireError as refusal:
        said = str(refusal)
        assert len(said) < 1000, "whatever was sent, a line says why it is refused"
    else:
        assert known(decode(encode(found))) == known(found)
        assert sum(tensor.nbytes for tensor in found.values()) <= len(blob)


VICTIM = 1


def _spoilt(change: Callable[[bytes], bytes]) -> str | None:
    """Let one of three clients send its reply changed; return why it, and nobody else, was lost."""

    def spoil(_: int, outcome: Reply | Lost) -> Reply | Lost:
        assert isinstance(outcome, Reply)
        if outcome.client.id == VICTIM:
            return replace(outcome, blob=change(outcome.blob))
        return outcome

    playing, state = replayed("lora", 1, spoil)
    spoilt = playing.play(1, state)
    why = {row.client: row.lost for row in playing.rows}
    assert why == {0: None, VICTIM: why[VICTIM], 2: None}
    if why[VICTIM] is not None:
        without, _ = replayed("lora", 1)
        others = [client for client in without.clients() if client.id != VICTIM]
        assert_same_state(spoilt, without.play(1, state, cohort=lambda _: others))
    return why[VICTIM]


@pytest.mark.parametrize("about", FORGED.values(), ids=FORGED)
def test_a_forged_reply_costs_the_client_that_sent_it_and_no_other(about: object) -> None:
    assert _spoilt(lambda _: _file(about)) is not None


FOREIGN = ["a size of 2^63", "nine dimensions", "one name twice", "lists a million deep", "nothing"]


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("what", ["request", "memory"])
def test_a_forged_request_or_memory_costs_the_client_that_has_it_and_no_other(
    what: str,
    kind: str,
) -> None:
    """In a cohort of all three, whose requests and memories are compared before anyone reads them."""
    forged = _file(FORGED[kind])
    memories = Memories()
    memories.put(VICTIM, 0, forged)
    state = small("lora").init(base_of(bert()), SEED)
    whole = Request(Kind.TRAIN, 0, TINY, state.shared).encode()
    clients = [Client(number, memory=NO_MEMORY) for number in range(3)]
    requests = {client.id: whole for client in clients}
    if what == "memory":
        clients[VICTIM] = replace(clients[VICTIM], memory=0)
    else:
        requests[VICTIM] = forged
    engine = LocalEngine(worker(small("lora"), bert()), memories, stack=3)
    found = list(engine.exchange(clients, lambda client: requests[client.id]))
    lost = [outcome.client.id for outcome in found if isinstance(outcome, Lost)]
    assert lost == [VICTIM]
    assert sorted(outcome.client.id for outcome in found) == [0, 1, 2]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_reply_that_was_touched_costs_the_client_that_sent_it_at_most(
    data: st.DataObject,
) -> None:
    assume(_spoilt(lambda blob: data.draw(touched(blob))) is not None)


def test_forms_tell_names_dtypes_shapes_and_whole_numbers_apart_but_no_other_values() -> None:
    payload = {"a": torch.zeros(2, 3), "seed": torch.tensor(5)}
    same = form(
        Request(
            Kind.TRAIN, 3, CONFIG, {"a": torch.ones(2, 3), "seed": torch.tensor(5)}, memory=2
        ).encode()
    )
    assert form(Request(Kind.TRAIN, 3, CONFIG, payload).encode()) == same
    changed: list[Mapping[str, Tensor]] = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.float64)},
        {"seed": torch.tensor(6)},
    ]
    for change in changed:
        assert form(Request(Kind.TRAIN, 3, CONFIG, {**payload, **change}).encode()) != same
    assert form(b"") == ()


def test_what_the_format_lacks_is_refused_by_name() -> None:
    with pytest.raises(WireError, match="'a' is torch.complex64"):
        encode({"a": torch.zeros(1, dtype=torch.complex64)})


def test_names_come_in_one_order_every_time() -> None:
    """Safetensors gives them in any; sums over names, such as the norm that clips, would differ in the last bit."""
    names = [f"layer.{number}" for number in range(40)]
    blob = encode({name: torch.ones(1) for name in random.Random(0).sample(names, 40)})
    assert [list(decode(blob)) for _ in range(3)] == [sorted(names)] * 3


def test_views_and_tensors_that_train_are_sent_as_they_are_seen() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    payload = {
        "turned": whole.t(),
        "row": whole[1],
        "of one row, read down a column": whole[:1, 1],
        "spread": whole[:1].expand(3, 4),
        "trained": whole.clone().requires_grad_(),
    }
    found = decode(encode(payload))
    for name, tensor in payload.items():
        assert torch.equal(found[name], tensor), name
        assert not found[name].requires_grad


def test_two_names_of_one_tensor_are_sent_as_two() -> None:
    whole = torch.arange(4.0)
    found = decode(encode({"one": whole, "two": whole}))
    assert torch.equal(found["one"], whole)
    assert torch.equal(found["two"], whole)


@settings(deadline=None)
@given(
    PAYLOADS,
    st.sampled_from(Kind),
    st.integers(0, ROUNDS - 1),
    st.integers(0, PHASES - 1),
    st.integers(NO_MEMORY, 2**63 - 1),
)
def test_a_request_comes_back_as_it_was(
    payload: dict[str, Tensor], kind: Kind, number: int, phase: int, memory: int
) -> None:
    blob = Request(kind, number, CONFIG, payload, memory, phase).encode()
    found = Request.decode(blob, CONFIG)
    assert (found.kind, found.round, found.phase) == (kind, number, phase)
    assert (found.config, found.memory) == (CONFIG, memory)
    assert known(dict(found.payload)) == known(payload)
    assert len(blob) == len(Request(Kind.TRAIN, 0, CONFIG, payload).encode()), (
        "numbers do not change the length"
    )


@settings(deadline=None)
@given(PAYLOADS, SIGNED, SIGNED, st.sampled_from(Status), FIGURES)
def test_an_answer_comes_back_as_it_was(
    payload: dict[str, Tensor], number: int, memory: int, status: Status, figures: Measured
) -> None:
    answer = Response(number, payload, figures, memory, status)
    found = Response.decode(answer.encode())
    assert repr(found.measured) == repr(figures)  # unlike ==, repr takes NaN for NaN
    assert (found.round, found.memory, found.status) == (number, memory, status)
    assert known(dict(found.payload)) == known(payload)
    assert len(answer.encode()) == len(Response(0, payload).encode())


def test_a_request_for_another_configuration_is_refused_and_both_are_named() -> None:
    other = digest(b"another")
    with pytest.raises(WireError) as refusal:
        Request.decode(Request(Kind.TRAIN, 0, CONFIG, {}).encode(), other)
    assert CONFIG.hex() in str(refusal.value)
    assert other.hex() in str(refusal.value)


FIELDS = {
    "@kind": torch.tensor(0),
    "@round": torch.tensor(0),
    "@phase": torch.tensor(0),
    "@memory": torch.tensor(NO_MEMORY),
    "@config": torch.tensor(list(CONFIG), dtype=torch.uint8),
    "@about": torch.zeros(4, dtype=torch.int64),
    "@counts": torch.zeros(len(COUNTS), dtype=torch.int64),
    "@measures": torch.zeros(len(REALS), dtype=torch.float64),
}
READERS: dict[str, Callable[[bytes], object]] = {
    **dict.fromkeys(
        ["@kind", "@round", "@phase", "@memory", "@config"],
        lambda blob: Request.decode(blob, CONFIG),
    ),
    **dict.fromkeys(["@about", "@counts", "@measures"], Response.decode),
}
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "missing": lambda tensor: None,
    "longer": lambda tensor: torch.cat([tensor.view(-1), tensor.view(-1)]),
    "in one more dimension": lambda tensor: tensor.unsqueeze(-1).expand(*tensor.shape, 2),
    "one number": lambda tensor: torch.tensor(5.5),
    "empty": lambda tensor: tensor.view(-1)[:0],
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", READERS)
def test_a_message_whose_own_fields_are_missing_or_of_another_form_is_refused(
    name: str, kind: str
) -> None:
    read = READERS[name]
    read(encode(FIELDS))
    wrong = WRONG[kind](FIELDS[name])
    fields = {part: tensor for part, tensor in FIELDS.items() if part != name}
    with pytest.raises(WireError):
        read(encode(fields if wrong is None else {**fields, name: wrong}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"@kind": torch.tensor(77)},
        {"@kind": torch.tensor(-1)},
        {"@kind": torch.tensor(True)},
        {"@round": torch.tensor(-1)},
        {"@round": torch.tensor(ROUNDS)},
        {"@phase": torch.tensor(PHASES)},
        {"@round": torch.tensor(3, dtype=torch.int32)},
        {"@memory": torch.tensor(NO_MEMORY - 1)},
        {"@memory": torch.tensor(False)},
        {"@config": torch.tensor(list(CONFIG))},
        {"@config": torch.full((DIGEST,), 256)},
        {"@config": torch.full((DIGEST,), -1, dtype=torch.int8)},
        {"@config": torch.ones(DIGEST, dtype=torch.bool)},
    ],
)
def test_a_request_whose_fields_are_of_another_format_or_out_of_range_is_refused(
    wrong: dict[str, Tensor],
) -> None:
    with pytest.raises(WireError, match="not a request"):
        Request.decode(encode({**FIELDS, **wrong}), CONFIG)


def test_a_digest_has_16_bytes_and_is_the_same_in_every_process() -> None:
    assert DIGEST == len(digest(b"")) == 16
    assert digest(b"fedpeft").hex() == "bbb7fa329c6da031c25045a8034dc4e4"


SOUND = Measured(
    examples=40,
    steps=3,
    trained=9,
    loss=0.5,
    seconds=2.0,
    seconds_alone=3.0,
    peak_memory=10**9,
    shared_by=2,
)
UNSOUND: dict[str, list[float | None]] = {
    "examples": [0, -1, 2**62],
    "steps": [-1, 2**62],
    "trained": [-1, 2**62],
    "loss": [None, math.inf, -1.0],
    "seconds": [math.nan, math.inf, -1.0, 1e30],
    "seconds_alone": [math.nan, math.inf, -1.0, 1e30],
    "peak_memory": [-1, 2**62],
    "shared_by": [0, -1, 2**62],
}
"""Values of every figure that cannot be true."""


def judged(answer: Response, memory: int = NO_MEMORY, examples: int = 0) -> None:
    """Check an answer of round 5 that is due without a payload, as it comes out of the bytes."""
    check(Response.decode(answer.encode()), 5, {}, memory=memory, examples=examples)


@pytest.mark.parametrize("name", [part.name for part in fields(Measured)])
def test_an_answer_with_a_figure_that_cannot_be_true_is_refused_by_name(name: str) -> None:
    judged(Response(5, {}, SOUND))
    for value in UNSOUND[name]:
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(WireError, match=name):
            judged(Response(5, {}, replace(SOUND, **wrong)))


def test_a_loss_that_is_no_number_is_refused_as_diverged() -> None:
    for loss in (None, math.nan, math.inf):
        with pytest.raises(WireError, match="diverged"):
            judged(Response(5, {}, replace(SOUND, loss=loss)))


def test_a_discreet_answer_has_neither_examples_nor_a_loss_and_all_else_is_checked() -> None:
    discreet = Response(0, {}, Measured(), status=Status.DISCREET)
    check(discreet, 0, {}, memory=-1, examples=7)
    # One that keeps the loss alone to itself, as under DP-SGD, has no more examples than it holds.
    check(replace(discreet, measured=Measured(examples=7)), 0, {}, memory=-1, examples=7)
    with pytest.raises(WireError, match="examples = 8: the client holds 7"):
        check(replace(discreet, measured=Measured(examples=8)), 0, {}, memory=-1, examples=7)
    with pytest.raises(WireError, match="steps = -1"):
        check(replace(discreet, measured=Measured(steps=-1)), 0, {}, memory=-1)
    with pytest.raises(WireError, match="examples = 0"):
        check(replace(discreet, status=Status.DONE), 0, {}, memory=-1)


def test_no_client_has_more_examples_than_the_server_knows_it_to_hold() -> None:
    for held in (0, 40, 41):  # 0: nobody knows
        judged(Response(5, {}, SOUND), examples=held)
    with pytest.raises(WireError, match="examples = 40: the client holds 39"):
        judged(Response(5, {}, SOUND), examples=39)


@pytest.mark.parametrize("assumed", [NO_MEMORY, 2])
def test_a_memory_is_of_the_version_assumed_or_of_this_round(assumed: int) -> None:
    for version in (assumed, 5):
        judged(Response(5, {}, SOUND, version), assumed)
    for version in {NO_MEMORY, 0, 2, 3, 4, 6, 2**62} - {assumed}:
        with pytest.raises(WireError, match=f"memory of round {version}"):
            judged(Response(5, {}, SOUND, version), assumed)


def test_a_client_that_lacks_its_memory_says_so_and_which_round_it_is() -> None:
    request = Request(Kind.TRAIN, 5, CONFIG, {"a": torch.ones(3)}, memory=2).encode()
    found = Response.decode(forgotten(request, CONFIG))
    assert (found.round, found.status, found.payload) == (5, Status.FORGOTTEN, {})
    with pytest.raises(Forgotten, match="no memory of round 2"):
        check(found, 5, {"a": torch.ones(3)}, memory=2)
    with pytest.raises(WireError, match="stale"):
        check(found, 6, {"a": torch.ones(3)}, memory=2)
    with pytest.raises(WireError, match="is for configuration"):
        forgotten(request, digest(b"another"))


def test_an_answer_of_an_unknown_status_is_refused() -> None:
    with pytest.raises(WireError, match="not an answer"):
        Response.decode(encode({**FIELDS, "@about": torch.tensor([5, NO_MEMORY, 77])}))
