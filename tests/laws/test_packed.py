"""A packed layer computes with the matrix that bitsandbytes unpacks, and a base of packed layers is one value everywhere."""

from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedpeft.mounting import (
    Packed,
    PackedLinear,
    cast_once,
    dense_layer,
    dense_shape,
    keep_matrices_in,
    mounted,
    packed_layers,
    shifted,
    trace,
)
from fedpeft.training.evaluation import mounted_state
from tests.packed import BITS, KINDS, bases, folder, kept, loaded, task_of
from tests.tiny import CPU, SEED, small

SHAPES = [(32, 64), (24, 16), (5, 6), (3, 7), (33, 10)]
"""Also with an odd number of entries, and with a last block that is not full."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))


def pack(matrix: Tensor, bits: int) -> tuple[Packed, Tensor]:
    """Return a matrix as bitsandbytes packs it, and as it unpacks that."""
    if bits == 8:
        codes, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
        return Packed(codes, scales, matrix.shape, 8), bnb.int8_vectorwise_dequant(codes, scales)
    codes, state = bnb.quantize_4bit(matrix, quant_type="nf4")
    return Packed(codes, state.absmax, matrix.shape, 4), bnb.dequantize_4bit(codes, state)


def layer(out: int, width: int, bits: int) -> tuple[PackedLinear, nn.Linear]:
    """Return a packed layer, and an ordinary one with the same matrix and bias."""
    packed, matrix = pack(drawn(out, width), bits)
    plain = nn.Linear(width, out).requires_grad_(False)
    plain.weight.copy_(matrix)
    return PackedLinear(packed, plain.bias, is_conv1d=False), plain


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrix_is_what_bitsandbytes_unpacks(shape: tuple[int, int], bits: int) -> None:
    matrix = drawn(*shape)
    packed, expected = pack(matrix, bits)
    torch.testing.assert_close(packed.float(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        packed.unpacked(torch.bfloat16), expected.bfloat16(), rtol=0.008, atol=0
    )
    off = float((packed.float() - matrix).norm() / matrix.norm())
    assert off < {4: 0.12, 8: 0.01}[bits]
    assert off > {4: 0.05, 8: 0.001}[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axes", [(), (4,), (2, 3)])
def test_forward_and_backward_are_those_of_an_ordinary_layer(
    axes: tuple[int, ...], bits: int
) -> None:
    ours, plain = layer(33, 10, bits)
    assert (ours.in_features, ours.out_features) == (10, 33)
    bias = plain.bias.clone().requires_grad_()
    ours.bias, plain.bias = nn.Parameter(bias.clone()), nn.Parameter(bias.clone())
    results: list[tuple[Tensor, ...]] = []
    for module in (ours, plain):
        x = drawn(*axes, 10).requires_grad_()
        y = module(x)
        own_bias: Any = module.bias
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, own_bias])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_does_not_depend_on_the_rows_beside_it(bits: int) -> None:
    """One with outliers, as LLM.int8() looks for them, changes the others in bitsandbytes' own 8-bit layer."""
    ours, _ = layer(32, 64, bits)
    x = drawn(4, 64)
    x[3, 5] = 40.0
    torch.testing.assert_close(ours(x)[:3], ours(x[:3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_under_autocast_it_computes_in_that_format(bits: int) -> None:
    ours, plain = layer(32, 64, bits)
    x = drawn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = ours(x), plain(x)
    assert one.dtype == other.dtype == torch.bfloat16
    torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("bits", BITS)
def test_the_backward_pass_keeps_no_copy_of_the_matrix(bits: int) -> None:
    ours, _ = layer(32, 64, bits)
    saved: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ours(drawn(4, 64).requires_grad_()).sum()
    assert saved == []  # of W nothing but its codes, which the layer has anyway


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_head_embeddings_and_poolers_keep_their_numbers(kind: str, bits: int) -> None:
    one, plain = loaded(kind, bits), loaded(kind, 0)
    packed = packed_layers(one.model)
    assert packed.keys() == one.base.packed
    assert one.base.layers.keys() == plain.base.layers.keys()
    due = {"bert": {"classifier", "bert.pooler.dense"}, "llama": set()}
    assert one.base.layers.keys() - packed.keys() == due[kind]
    for name, layer in packed.items():
        assert dense_shape(one.model, name) == plain.base.layers[name].shape
        assert torch.equal(dense_layer(one.model, name), layer.packed.float())
        assert torch.equal(one.base.layers[name], layer.packed.float())
    others = dict(one.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(others.pop(name), parameter), name
    assert not others


def says(model: Any) -> Tensor:
    ids = torch.tensor([[3, 9, 20, 31, 7], [12, 4, 4, 50, 2]])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


@pytest.mark.parametrize("bits", BITS)
def test_a_model_computes_what_bitsandbytes_own_layers_do(bits: int) -> None:
    """Those of 8 bits unpack the matrix, too, on a CPU in training; there is no dropout."""
    auto: Any = AutoModelForCausalLM
    settings: Any = BitsAndBytesConfig
    theirs = auto.from_pretrained(
        folder("llama"),
        attn_implementation="eager",
        dtype=torch.float32,
        quantization_config=settings(
            load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4"
        ),
    ).train()
    torch.testing.assert_close(
        says(loaded("llama", bits).model), says(theirs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_federa_begins_with_what_the_packed_base_says(kind: str, bits: int) -> None:
    """Exact, as the base is never written: the anchor is a branch beside it."""
    one = loaded(kind, bits)
    targets = {"bert": "query|value", "llama": "q_proj|v_proj"}[kind]
    method = small("federa", targets=targets)
    before = kept(one.model), says(one.model)
    state = method.init(one.base, SEED)
    with mounted_state(method, state, one.model, CPU, SEED):
        begun = says(one.model)
    torch.testing.assert_close(begun, before[1], rtol=1e-5, atol=1e-5)
    assert kept(one.model) == before[0]


@pytest.mark.parametrize("bits", BITS)
def test_a_difference_is_added_to_the_matrix(bits: int) -> None:
    ours, plain = layer(33, 10, bits)
    model, x, difference = nn.Sequential(ours), drawn(4, 10), drawn(33, 10)
    before = trace(model)
    with shifted(model, {"0": lambda: difference}):
        shifted_output = model(x)
    due = nn.functional.linear(x, plain.weight + difference, plain.bias)
    torch.testing.assert_close(shifted_output, due, rtol=1e-5, atol=1e-5)
    assert trace(model) == before


@pytest.mark.parametrize("bits", BITS)
def test_casting_and_mounting_leave_codes_alone(bits: int) -> None:
    ours, _ = layer(33, 10, bits)
    model = nn.Sequential(ours)
    before = kept(model)
    keep_matrices_in(model, torch.bfloat16, head=())
    adapter = {"0:A": drawn(2, 3, 10), "0:B": drawn(2, 33, 3)}
    with cast_once(model, torch.bfloat16), mounted(model, adapter):
        assert ours.weight.dtype in (torch.uint8, torch.int8)
    assert kept(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_digests_tell_bits_apart_and_come_again(kind: str) -> None:
    digests = [loaded(kind, bits).digest for bits in (0, *BITS)]
    assert len(set(digests)) == 3
    loaded.cache_clear()
    assert [loaded(kind, bits).digest for bits in (0, *BITS)] == digests


def test_the_task_reads_a_packed_model() -> None:
    for kind in KINDS:
        with torch.no_grad():
            assert not task_of(kind).trial(loaded(kind, 4).model, CPU.torch_device)
            assert not bases(kind, 4)[1].packed
