"""Models from configurations, on any device, and workers around them: what ``benchmarks.gpu`` measures, without a download."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fedpeft.federation.client import ClientData, Worker
from fedpeft.methods.lora import LoRA
from fedpeft.models.tokens import spare_last_block
from fedpeft.mounting import BLOCK, Packed, PackedLinear, describe
from fedpeft.tasks import CausalLM, Classification, Encoded, Example, Task
from fedpeft.tasks.dialogue import Writer
from fedpeft.training.hardware import Machine, resolve
from fedpeft.training.loop import Training
from fedpeft.types import State
from fedpeft.wire.messages import digest

LABELS = ("a", "b", "c", "d")
HEAD = frozenset({"classifier.weight", "classifier.bias"})
CONFIG = digest(b"benchmark")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Padding:
    """All that is asked of a tokenizer once texts are numbers."""

    pad_token_id: int = 0


@dataclass(frozen=True)
class Shapes:
    """How large everything is.

    ``clients``: small ones, at once and one by one. ``encoder`` and ``llama``: configurations.
    ``ladder``: shapes of Llama by name, ascending, as changes of ``llama``. ``size``: rows and
    columns of the products by which the peak is measured.
    """

    encoder: Mapping[str, int]
    llama: Mapping[str, int]
    ladder: Mapping[str, Mapping[str, int]]
    clients: int
    batch: int
    length: int
    steps: int
    llm_batch: int
    llm_length: int
    llm_steps: int
    size: int


FULL = Shapes(
    # MiniLM-L6.
    encoder={
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    # TinyLlama-1.1B.
    llama={
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
    },
    ladder={
        "Llama 2 7B": {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
        },
        "Llama 2 13B": {
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "intermediate_size": 13824,
        },
        "Code Llama 34B": {
            "hidden_size": 8192,
            "num_hidden_layers": 48,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 22016,
        },
        "Llama 2 70B": {
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
        },
        "Llama 3.1 405B": {
            "hidden_size": 16384,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "intermediate_size": 53248,
        },
    },
    clients=32,
    batch=16,
    length=64,
    steps=8,
    llm_batch=8,
    llm_length=512,
    llm_steps=4,
    size=8192,
)
_TINY_LLAMA: Mapping[str, int] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
TINY = replace(
    FULL,
    encoder={
        "vocab_size": 200,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    llama=_TINY_LLAMA,
    ladder={"2 blocks": {}, "3 blocks": {"num_hidden_layers": 3}},
    clients=4,
    batch=2,
    length=8,
    steps=2,
    llm_batch=2,
    llm_length=16,
    llm_steps=2,
    size=128,
)


def encoder(shapes: Shapes, device: torch.device) -> nn.Module:
    """Return a text classifier of random weights, frozen, without dropout, as it is loaded."""
    make: Any = BertForSequenceClassification
    configuration: Any = BertConfig
    config = configuration(
        **shapes.encoder,
        num_labels=len(LABELS),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model: nn.Module = make(config).requires_grad_(False)
    spare_last_block(model)
    return model.to(device)


def llama_config(shapes: Shapes, changes: Mapping[str, int] | None = None) -> Any:
    """Return the configuration of a Llama; ``changes``: of that of ``shapes``."""
    chosen: dict[str, Any] = {**shapes.llama, **(changes or {}), "attn_implementation": "sdpa"}
    return LlamaConfig(**chosen)


def llama(shapes: Shapes, device: torch.device, precision: str) -> nn.Module:
    """Return a Llama of random weights, frozen, all of them in one number format."""
    make: Any = LlamaForCausalLM
    before = torch.get_default_dtype()
    try:
        # Made where it computes and as it computes: no float32 copy in the machine's memory.
        torch.set_default_dtype(DTYPES[precision])
        torch.manual_seed(0)
        with device:
            model: nn.Module = make(llama_config(shapes)).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return model


def llama_in_4_bits(
    shapes: Shapes, device: torch.device, precision: str, changes: Mapping[str, int]
) -> nn.Module:
    """Return a Llama of random weights whose dense layers have 4 bits a weight, as QLoRA has them.

    They are those of ``model.bits = 4``, packed layer by layer, so that no more than one of them is
    there in full. Raises ImportError without bitsandbytes. ``changes``: of the configuration in
    ``shapes``.
    """
    packing: Any = import_module("bitsandbytes.functional")
    make: Any = LlamaForCausalLM
    rotary: Any = LlamaRotaryEmbedding
    dtype, config = DTYPES[precision], llama_config(shapes, changes)
    with torch.device("meta"):
        model: Any = make(config)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            values = _random(module.weight.shape, device, dtype)
            codes, state = packing.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
            packed = Packed(codes, state.absmax.float(), values.shape, 4)
            layer = PackedLinear(packed, None, is_conv1d=False)
            _put(model.model.layers, name, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            # Vectors are the weights of norms.
            values = torch.ones(parameter.shape, device=device)
            if parameter.ndim > 1:
                values = _random(parameter.shape, device, dtype)
            _put(model, name, nn.Parameter(values, requires_grad=False))
    # Its buffers are computed when it is made.
    model.model.rotary_emb = rotary(config).to(device)
    chosen: nn.Module = model.requires_grad_(False)
    return chosen


def _random(size: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*size, device=device, dtype=dtype) * 0.02


def _put(model: nn.Module, name: str, value: Any) -> None:
    home, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(home), attribute, value)


def texts(shapes: Shapes) -> Encoded:
    """Return texts of one client for all steps of a round, all of the same length."""
    count = shapes.batch * shapes.steps
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, shapes.encoder["vocab_size"], (count, shapes.length), generator=draw)
    labels = torch.randint(0, len(LABELS), (count,), generator=draw)
    return Encoded([Example(row, labels[index], index) for index, row in enumerate(ids)])


def dialogues(shapes: Shapes) -> Encoded:
    """Return prompts with responses of one client, half and half, all of the same length."""
    count, half = shapes.llm_batch * shapes.llm_steps, shapes.llm_length // 2
    draw = torch.Generator().manual_seed(1)
    size = (count, shapes.llm_length + 1)
    ids = torch.randint(1, shapes.llama["vocab_size"], size, generator=draw)
    examples: list[Example] = []
    for row, tokens in enumerate(ids):
        # What a token is read off is the one before it.
        examples.append(Example(tokens[:-1], tokens[half + 1 :], row, weight=half))
    return Encoded(examples)


def encoder_worker(shapes: Shapes, model: nn.Module, device: torch.device) -> tuple[Worker, State]:
    """Return a worker whose clients train an encoder with LoRA on query and value, and the first state."""
    task = Classification(LABELS, shapes.length, tokenizer=Padding())
    training = Training(steps=shapes.steps, batch_size=shapes.batch)
    held = dict.fromkeys(range(shapes.clients), texts(shapes))
    return _worker(model, task, held, training, device, "query|value", HEAD)


def llm_worker(
    shapes: Shapes, model: Any, device: torch.device, clients: int
) -> tuple[Worker, State]:
    """Return a worker whose clients tune a language model with LoRA on q and v, and the first state."""
    writer = Writer(Padding(), has_template=False, start=(), mark=(2,))
    task = CausalLM(max_length=shapes.llm_length, writer=writer)
    training = Training(steps=shapes.llm_steps, batch_size=shapes.llm_batch)
    held = dict.fromkeys(range(clients), dialogues(shapes))
    return _worker(model, task, held, training, device, "q_proj|v_proj", frozenset())


def _worker(
    model: Any,
    task: Task,
    held: Mapping[int, Encoded],
    training: Training,
    device: torch.device,
    targets: str,
    head: frozenset[str],
) -> tuple[Worker, State]:
    """Return a worker on ``model`` whose clients hold ``held``, and LoRA's first state."""
    method = LoRA(targets=targets)
    hardware = resolve(Machine(device=str(device)), max(held[0].lengths))
    base = describe(model, head, without=None if head else model.get_output_embeddings())
    worker = Worker(
        method=method,
        model=model,
        task=task,
        client_data={client: ClientData(rows, rows) for client, rows in held.items()},
        training=training,
        hardware=hardware,
        head=head,
        seed=0,
        config=CONFIG,
        step_alone=None,
    )
    first = method.init(base, 0)
    # What travels lies on the CPU, as it does where models are loaded.
    return worker, replace(
        first, shared={name: value.cpu() for name, value in first.shared.items()}
    )
