"""Every model family on every task: tiny checkpoints, opened as a user's own are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

from fedpeft.models import Loaded, ModelSection, kernels, load
from fedpeft.tasks import CausalLM, Task
from tests import causal_lms
from tests.e2e import zoo
from tests.tiny import CPU, SEED
from tests.tiny_tasks import MAX_LENGTH, TASK_CASES, WORDS, Ground, tokenizer

BLOCKS = 3
SLIDING = 4
"""Tokens of a sliding window, fewer than most texts here have."""


def _marked(kind: str) -> Any:
    """Return the tokenizer with which others try the task ``kind``."""
    return causal_lms.tokenizer() if kind == "causal_lm" else tokenizer()


def _of_bytes(kind: str) -> Any:
    """Return a tokenizer of pieces of UTF-8 without marks, for which transformers takes any of Qwen2's."""
    del kind
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    # With a blank before and without: these are two pieces.
    words.train_from_iterator([f"{word} {word}" for word in (*WORDS, *causal_lms.WORDS)], trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=words, eos_token=end, pad_token=end)


@dataclass(frozen=True)
class Family:
    """A model family.

    ``title``: as people call it. ``auto``: the class of transformers whose checkpoints of it people
    have. ``attention`` and ``linear``: how many dense layers of a text classifier ``attention`` and
    ``all-linear`` choose. ``segments``: whether its tokenizer tells two texts apart. ``changes``: of
    the configuration in ``zoo``. ``words``: the task -> a tokenizer.
    """

    title: str
    auto: Any
    attention: int
    linear: int
    segments: bool = False
    changes: Mapping[str, Any] = field(default_factory=lambda: {"num_hidden_layers": BLOCKS})
    words: Callable[[str], Any] = _marked


FAMILIES: Mapping[str, Family] = {
    "bert": Family("BERT", AutoModelForMaskedLM, 12, 18, segments=True),
    "roberta": Family(
        "RoBERTa",
        AutoModelForMaskedLM,
        12,
        18,
        changes={"num_hidden_layers": BLOCKS, "type_vocab_size": 1},
    ),
    "distilbert": Family("DistilBERT", AutoModelForMaskedLM, 12, 18, changes={"n_layers": BLOCKS}),
    "albert": Family("ALBERT", AutoModelForMaskedLM, 4, 7, segments=True),
    "electra": Family("ELECTRA", AutoModelForMaskedLM, 12, 18, segments=True),
    "modernbert": Family(
        "ModernBERT",
        AutoModelForMaskedLM,
        6,
        12,
        changes={"num_hidden_layers": BLOCKS, "local_attention": SLIDING},
    ),
    "deberta-v2": Family(
        "DeBERTaV3",
        AutoModelForMaskedLM,
        12,
        18,
        segments=True,
        changes={
            "num_hidden_layers": BLOCKS,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "gpt2": Family("GPT-2", AutoModelForCausalLM, 6, 12, changes={"n_layer": BLOCKS}),
    "llama": Family("Llama", AutoModelForCausalLM, 12, 21),
    "qwen2": Family(
        "Qwen2",
        AutoModelForCausalLM,
        12,
        21,
        changes={
            "num_hidden_layers": BLOCKS,
            "use_sliding_window": True,
            "sliding_window": SLIDING,
            "max_window_layers": 1,
        },
        words=_of_bytes,
    ),
    "t5": Family("T5", AutoModelForSeq2SeqLM, 36, 48, changes={"num_layers": BLOCKS}),
}
"""ModernBERT and Qwen2 with windows that slide in all blocks but the first."""

KINDS = (*TASK_CASES, "causal_lm")

BOTH_SIDES = "reads texts from both sides"
NO_MODEL = "transformers has no model for CausalLM"
REFUSED: Mapping[tuple[str, str], str] = {
    ("bert", "causal_lm"): BOTH_SIDES,
    ("roberta", "causal_lm"): BOTH_SIDES,
    ("electra", "causal_lm"): BOTH_SIDES,
    ("distilbert", "causal_lm"): NO_MODEL,
    ("albert", "causal_lm"): NO_MODEL,
    ("modernbert", "causal_lm"): NO_MODEL,
    ("deberta-v2", "causal_lm"): NO_MODEL,
    ("t5", "causal_lm"): NO_MODEL,
}
"""Families that a task does not run on, and what says so."""

ALONE: Mapping[str, str] = {
    "deberta-v2": "it sends its relative positions, which belong to no client, through the layers "
    "of query and key",
}
"""Families whose clients train one by one, and why."""

UNCACHED: Mapping[str, str] = {
    "albert": "it runs one block many times",
    "t5": "its first block makes what all blocks add to their attention",
}
"""Families of which no hidden states are cached, and why."""

NO_BIASES = ("modernbert", "llama", "t5")
"""Families that BitFit has nothing to train of."""

PAIRS = [(family, kind) for family in FAMILIES for kind in KINDS if (family, kind) not in REFUSED]


def opened(family: str, kind: str, **changes: Any) -> Loaded:
    """Return a fresh tiny checkpoint of a family, loaded for a task; BadInput where it is refused.

    It is what pre-training leaves: a language model, without a head for any task but its own.
    ``changes``: of its configuration.
    """
    with TemporaryDirectory() as folder:
        _write(Path(folder), family, kind, changes)
        choice = ModelSection(folder, max_length=MAX_LENGTH)
        kernels(choice, _task(kind))  # comes first in a run, too
        return load(choice, _task(kind), CPU, SEED)


_shared = cache(opened)


def ground(family: str, kind: str) -> Ground:
    """Return a family on a task. One model for all who ask: mounting leaves no trace on it."""
    # A model for pairs is one for texts.
    loaded = _shared(family, "classification" if kind == "pairs" else kind)
    rows = causal_lms.rows if kind == "causal_lm" else TASK_CASES[kind].rows
    task = _task(kind).with_tokenizer(loaded.tokenizer)
    return Ground(task, loaded.model, loaded.base, rows)


def _task(kind: str) -> Task:
    if kind == "causal_lm":
        return CausalLM(MAX_LENGTH)
    return TASK_CASES[kind].task()


def _write(folder: Path, family: str, kind: str, changes: Mapping[str, Any]) -> None:
    """Write a checkpoint with the tokenizer that ``kind`` is tried with."""
    chosen = FAMILIES[family]
    settings, _ = zoo.FAMILIES[family]
    words = chosen.words(kind)
    marks: dict[str, Any] = {"vocab_size": len(words)}
    if kind == "causal_lm":
        marks |= {"bos_token_id": None, "eos_token_id": words.eos_token_id}
    config = AutoConfig.for_model(family, **{**settings, **chosen.changes, **marks, **changes})
    zoo.save(folder, chosen.auto.from_config, config)
    words.save_pretrained(folder)
    if not chosen.segments:
        names = ["input_ids", "attention_mask"]
        zoo.edit(folder / "tokenizer_config.json", model_input_names=names)
