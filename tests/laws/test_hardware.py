"""What is resolved for this machine, and what an earlier run resolved."""

from pathlib import Path
from typing import Literal

import pytest
from transformers import LlamaConfig

from fedpeft.models import ModelSection, is_large_model
from fedpeft.tasks import CausalLM
from fedpeft.training.hardware import FEW_TOKENS, GRAIN, TOKENS, Hardware, Machine, resolve


@pytest.mark.parametrize(("precision", "pad_to_multiple_of"), [("fp32", 1), ("bf16", GRAIN)])
def test_shapes_come_in_grains_where_kernels_are_made_for_each(
    precision: Literal["fp32", "bf16"], pad_to_multiple_of: int
) -> None:
    machine = Machine(device="cpu", precision=precision)
    assert resolve(machine, 64).pad_to_multiple_of == pad_to_multiple_of


@pytest.mark.parametrize(("vocabulary", "large"), [(1_000, False), (800_000, True)])
def test_fewer_tokens_of_a_large_model_go_through_together(
    vocabulary: int, large: bool, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path)  # no weights: its size follows from this
    model = ModelSection(name=str(tmp_path))
    assert is_large_model(model, CausalLM(max_length=16)) is large
    machine = Machine(device="cpu", precision="fp32")
    assert resolve(machine, 64, is_large=large).tokens == (FEW_TOKENS if large else TOKENS)


def test_what_was_resolved_before_there_were_grains_stays_as_it_was() -> None:
    known = {
        "device": "cpu",
        "precision": "bf16",
        "attention": "eager",
        "threads": 2,
        "tokens": 1280,
        "stack": 4,
    }
    assert Hardware(**known).pad_to_multiple_of == 1  # type: ignore[arg-type]
