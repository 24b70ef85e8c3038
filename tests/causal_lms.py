"""Tiny language models, a tokenizer of whole words for them, and workers whose clients hold prompts and responses."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedpeft.data import Rows
from fedpeft.federation.client import ClientData, Worker
from fedpeft.seeds import generator
from fedpeft.tasks import CausalLM
from fedpeft.training.loop import Training
from fedpeft.types import Method
from tests.tiny import CONFIG, CPU, SEED, shaken

SPECIAL = ("<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<system>")
WORDS = tuple(f"w{number}" for number in range(54))
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

SMALL: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 48,
    "initializer_range": 0.3,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}

# Their constructors are untyped.
_LLAMA: Callable[[LlamaConfig], nn.Module] = LlamaForCausalLM
_GEMMA: Callable[[Gemma2Config], nn.Module] = Gemma2ForCausalLM
_GPT2: Callable[[GPT2Config], nn.Module] = GPT2LMHeadModel

CAUSAL_LMS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": lambda: _LLAMA(LlamaConfig(**SMALL)),
    "gpt2": lambda: _GPT2(GPT2Config(**GPT2)),
    "gemma2": lambda: _GEMMA(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0, tie_word_embeddings=True)
    ),
}
"""Llama has an output layer of its own, GPT-2 and Gemma that of the embeddings; Gemma bends its logits."""


def tokenizer(template: str | None = None) -> Any:
    """Return a tokenizer of words parted by blanks."""
    numbers = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=template,
    )


def task(template: str | None = None, **changes: Any) -> CausalLM:
    """Return the task with the tokenizer of words."""
    return CausalLM(**{"max_length": 24, **changes}).with_tokenizer(tokenizer(template))


def causal_lm(name: str) -> nn.Module:
    """Return a frozen tiny language model."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return shaken(CAUSAL_LMS[name]())


def sentence(draw: torch.Generator, longest: int) -> str:
    """Return 1 to ``longest`` random words."""
    length = int(torch.randint(1, longest + 1, (1,), generator=draw))
    chosen = torch.randint(0, len(WORDS), (length,), generator=draw)
    return " ".join(WORDS[number] for number in chosen.tolist())


def rows(count: int, seed: int = 0) -> Rows:
    """Return random prompts with random responses."""
    draw = generator(SEED, "rows", seed)
    pairs = [(sentence(draw, 7), sentence(draw, 5)) for _ in range(count)]
    prompts, responses = zip(*pairs, strict=True)
    return Rows({"prompt": prompts, "response": responses})


def worker(
    name: str, method: Method, sizes: Mapping[int, int], training: Training, **changes: Any
) -> Worker:
    """Return a worker on a tiny language model, which has been tried as at loading."""
    chosen, model = task(), causal_lm(name)
    assert not chosen.trial(model, CPU.torch_device)
    held: dict[int, ClientData] = {}
    for client, size in sizes.items():
        own = chosen.encode(rows(size, client))
        held[client] = ClientData(own, own)
    whole = Worker(
        method=method,
        model=model,
        task=chosen,
        client_data=held,
        training=training,
        hardware=CPU,
        head=frozenset(),
        seed=SEED,
        config=CONFIG,
    )
    return replace(whole, **changes)
