"""peft 0.21 is the yardstick: on the same factors our forward passes, merges and starts are its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn

from fedpeft.algebra.masks import positions
from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.lora import LoRA
from fedpeft.methods.sparse import Sparse
from fedpeft.mounting import mounted, select
from fedpeft.seeds import generator
from fedpeft.training.evaluation import mounted_state
from tests.families import FAMILIES, family, says, texts
from tests.tiny import CPU, SEED, TARGETS, base_of, bert, federation, logits, small

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
"""transformers 5.23 warns about what peft 0.21 calls in ``get_peft_model``; to go when peft calls the new name."""

RANK, ALPHA = 3, 6
LAYERS = [
    f"bert.encoder.layer.{layer}.attention.self.{part}"
    for layer in (0, 1)
    for part in ("query", "value")
]
TARGETED = ["query", "value"]
DENSITY = RANK * (32 + 32) / (32 * 32)
"""SHiRA has as many values as a LoRA of the same rank."""


def layer_of(model: nn.Module, name: str) -> Any:
    """Return peft's layer in the place of module ``name``."""
    return model.get_submodule(f"base_model.model.{name}")


def factors(names: list[str], out: int = 32, width: int = 32) -> dict[str, Tensor]:
    draw = generator(2, "factors")
    found = {}
    for name in names:
        found[f"{name}:A"] = 0.3 * torch.randn(1, RANK, width, generator=draw)
        found[f"{name}:B"] = 0.3 * torch.randn(1, out, RANK, generator=draw)
    return found


def filled(config: LoraConfig, tensors: dict[str, Tensor]) -> nn.Module:
    """Return peft's model with our factors in it."""
    theirs = get_peft_model(bert(), config)
    for name in LAYERS:
        layer = layer_of(theirs, name)
        layer.lora_A["default"].weight.data.copy_(tensors[f"{name}:A"][0])
        layer.lora_B["default"].weight.data.copy_(tensors[f"{name}:B"][0])
    return theirs.eval()


@pytest.mark.parametrize("alpha", [3, 6, 12])
def test_loras_forward_and_merge_are_pefts(alpha: int) -> None:
    """Our scale is their alpha / r."""
    tensors, model = factors(LAYERS), bert()
    theirs = filled(
        LoraConfig(r=RANK, lora_alpha=alpha, target_modules=TARGETED, lora_dropout=0.0), tensors
    )
    with mounted(model, tensors, alpha / RANK):
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(theirs) - logits(model)).abs().max() > 1e-2
    whole: Any = theirs
    merged = whole.merge_and_unload()
    for name in LAYERS:
        ours = (
            model.get_parameter(f"{name}.weight")
            + alpha / RANK * tensors[f"{name}:B"][0] @ tensors[f"{name}:A"][0]
        )
        torch.testing.assert_close(
            merged.get_parameter(f"{name}.weight"), ours, rtol=1e-5, atol=1e-6
        )


def test_a_trained_loras_deltas_are_what_peft_merges() -> None:
    method = LoRA(TARGETS, RANK, ALPHA / RANK)
    after = federation(method).play(2)
    model = bert()
    with mounted_state(method, after, model, CPU, SEED) as local:
        deltas, said = local.deltas(), logits(model)
    tensors = {part: tensor.unsqueeze(0) for part, tensor in after.shared.items() if ":" in part}
    theirs = filled(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETED, lora_dropout=0.0), tensors
    )
    for part in ("classifier.weight", "classifier.bias"):
        theirs.get_parameter(f"base_model.model.{part}").data.copy_(after.shared[part])
    torch.testing.assert_close(said, logits(theirs), rtol=1e-5, atol=1e-5)
    for name in LAYERS:
        torch.testing.assert_close(
            deltas[name].dense()[0], layer_of(theirs, name).get_delta_weight("default")
        )


LISTS: dict[str, list[str]] = {
    "query and value": ["query", "value"],
    "one layer": ["0.attention.self.query"],
    "several parts": ["attention.output.dense", "bert.pooler.dense"],
    "many": ["output.dense", "key"],
}


@pytest.mark.parametrize("targets", LISTS.values(), ids=LISTS)
def test_a_list_of_targets_chooses_what_peft_adapts(targets: list[str]) -> None:
    theirs = get_peft_model(bert(), LoraConfig(r=1, target_modules=targets))
    adapted = set()
    for name, _ in theirs.named_modules():
        if name.endswith(".lora_A"):
            adapted.add(name.removeprefix("base_model.model.").removesuffix(".lora_A"))
    assert select(base_of(bert()), tuple(targets)).keys() == adapted
    assert adapted


def test_loras_forward_is_pefts_on_gpt2s_turned_layers() -> None:
    """``fan_in_fan_out``: GPT-2 stores (in, out)."""
    names = [f"transformer.h.{layer}.attn.c_attn" for layer in (0, 1)]
    tensors, ids, model = factors(names, 48, 16), texts(4), family("gpt2")
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["c_attn"], lora_dropout=0.0, fan_in_fan_out=True
    )
    theirs = get_peft_model(family("gpt2"), config).eval()
    for name in names:
        layer_of(theirs, name).lora_A["default"].weight.data.copy_(tensors[f"{name}:A"][0])
        layer_of(theirs, name).lora_B["default"].weight.data.copy_(tensors[f"{name}:B"][0])
    with mounted(model, tensors, ALPHA / RANK):
        torch.testing.assert_close(says(model, ids), says(theirs, ids), rtol=1e-5, atol=1e-5)
    assert FAMILIES["gpt2"].head == {"score.weight"}


def test_federas_start_is_pefts_pissa() -> None:
    """Up to the sign of each component: B_0, A_0, the residual base, and the logits, which are the base model's."""
    method, model = FeDeRA(TARGETS, RANK, ALPHA / RANK), bert()
    start = method.init(base_of(model), SEED)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=TARGETED,
        lora_dropout=0.0,
        init_lora_weights="pissa",
    )
    theirs = get_peft_model(bert(), config).eval()
    for name in LAYERS:
        layer = layer_of(theirs, name)
        their_a, their_b = (
            layer.lora_A["default"].weight.detach(),
            layer.lora_B["default"].weight.detach(),
        )
        A, B = start.shared[f"{name}:A"], start.shared[f"{name}:B"]
        sign = torch.sign((A * their_a).sum(1))
        torch.testing.assert_close(sign[:, None] * A, their_a, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(sign * B, their_b, rtol=1e-3, atol=1e-4)
        residual = model.get_parameter(f"{name}.weight") - ALPHA / RANK * B @ A
        torch.testing.assert_close(residual, layer.base_layer.weight.detach(), rtol=1e-4, atol=1e-5)
    with mounted_state(method, start, model, CPU, SEED):
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_sparse_values_are_shiras() -> None:
    """The same values at the same positions; SHiRA's own mask is ours here, as a user's ``mask_fn``."""
    method, model = Sparse(TARGETS, DENSITY), bert()
    after = federation(method).play(2)
    config = ShiraConfig(r=RANK, target_modules=TARGETED, mask_type="random")
    count = RANK * (32 + 32)

    def mask(layer: nn.Module, r: int, **_: object) -> Tensor:
        found = torch.zeros(32 * 32)
        found[positions((32, 32), DENSITY, SEED, next(places))] = 1.0
        return found.view(32, 32)

    places = iter(LAYERS)
    config.mask_fn = mask  # type: ignore[assignment]
    theirs = get_peft_model(bert(), config).eval()
    for name in LAYERS:
        layer = layer_of(theirs, name)
        rows, columns = layer.shira_indices["default"]
        flat = (rows * 32 + columns).long()
        assert torch.equal(flat.sort().values, positions((32, 32), DENSITY, SEED, name))
        assert len(flat) == count
        dense = method.differences(after)[name].flatten()
        layer.shira_weight["default"].data.copy_(dense[flat])
    for part in ("classifier.weight", "classifier.bias"):
        theirs.get_parameter(f"base_model.model.{part}").data.copy_(after.shared[part])
    with mounted_state(method, after, model, CPU, SEED):
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(theirs) - logits(model)).abs().max() > 1e-2


def test_fedaras_triplet_is_adaloras_with_its_scaling_undone() -> None:
    """peft scales by alpha / (ranknum + 1e-5), fedpeft by alpha / r for good."""
    model, draw = bert(), generator(2, "triplets")
    config = AdaLoraConfig(
        init_r=RANK,
        target_r=1,
        lora_alpha=ALPHA,
        target_modules=TARGETED,
        lora_dropout=0.0,
        total_step=10,
    )
    theirs = get_peft_model(bert(), config).eval()
    tensors = factors(LAYERS)
    for name in LAYERS:
        tensors[f"{name}:e"] = torch.randn(1, RANK, generator=draw)
        layer = layer_of(theirs, name)
        for part, own in (("A", layer.lora_A), ("B", layer.lora_B), ("e", layer.lora_E)):
            own["default"].data.copy_(tensors[f"{name}:{part}"][0].view(own["default"].shape))
        layer.ranknum["default"].data.fill_(RANK)
    with mounted(model, tensors, ALPHA / (RANK + 1e-5)):
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(theirs) - logits(model)).abs().max() > 1e-2


def test_fedaras_scores_are_adaloras() -> None:
    """peft's RankAllocator after three backward passes, against ours, on the very same gradients."""
    method = small("fedara", rank=RANK)
    start = method.init(base_of(bert()), SEED)
    config = AdaLoraConfig(
        init_r=RANK, target_r=1, tinit=0, tfinal=0, beta1=0.85, beta2=0.85, total_step=10
    )
    with (
        scores_of(config, start.shared) as (allocator, theirs),
        mounted_state(method, start, bert(), CPU, SEED) as local,
    ):
        own = {part: parameter for part, parameter in local.trainable.items() if ":" in part}
        for step in range(3):
            draw = generator(step, "gradients")
            for part, parameter in own.items():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
                theirs[part].grad = parameter.grad[0].view(theirs[part].shape).clone()
            local.after_backward(slice(0, 1))
            allocator.update_ipt(allocator.model)
        expected = []
        for name in sorted(LAYERS):
            parts = {
                part: allocator._element_score(f"{name}.lora_{part.upper()}.default")
                for part in "ABe"
            }
            expected.append(parts["e"].flatten() + parts["A"].mean(1) + parts["B"].mean(0))
        votes = local.reply()[0]["votes"][0]
    best = torch.cat(expected).argsort(descending=True)[: method.budget(0, 12)]  # type: ignore[attr-defined]
    bits = "".join(f"{byte:08b}" for byte in votes.tolist())
    assert {place for place, bit in enumerate(bits) if bit == "1"} == set(best.tolist())


@contextmanager
def scores_of(config: AdaLoraConfig, shared: Any) -> Iterator[tuple[Any, dict[str, nn.Parameter]]]:
    """Give peft's rank allocator over parameters with our values, by the names that we use."""
    from peft.tuners.adalora.layer import RankAllocator

    holder: Any = nn.Module()
    theirs: dict[str, nn.Parameter] = {}
    named: list[tuple[str, nn.Parameter]] = []
    for part, tensor in shared.items():
        module, colon, letter = part.partition(":")
        if colon:
            value = tensor.view(-1, 1) if letter == "e" else tensor
            theirs[part] = nn.Parameter(value.clone())
            named.append((f"{module}.lora_{letter.upper()}.default", theirs[part]))
    holder.named_parameters = lambda: iter(named)
    allocator: Any = RankAllocator.__new__(RankAllocator)
    allocator.model, allocator.adapter_name, allocator.peft_config = holder, "default", config
    allocator.beta1, allocator.beta2 = config.beta1, config.beta2
    allocator.reset_ipt()
    yield allocator, theirs
