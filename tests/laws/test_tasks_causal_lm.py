"""A language model learns responses alone: its losses, perplexity and generated text are those of transformers."""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig

from fedpeft.data import Columns, Rows, read
from fedpeft.errors import BadInput, NotStackable
from fedpeft.federation.client import Worker
from fedpeft.methods import METHODS
from fedpeft.models import Loaded, export, load
from fedpeft.models import loading as loading_module
from fedpeft.models.checkpointing import checkpoint_blocks
from fedpeft.models.choice import ModelSection
from fedpeft.mounting import describe, mounted
from fedpeft.tasks import CausalLM, Encoded, TaskSection, make_task
from fedpeft.tasks.causal_lm import KIND
from fedpeft.tasks.dialogue import messages
from fedpeft.tasks.logits import logits_at
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.evaluation import mounted_state, predictions, score
from fedpeft.training.hardware import Hardware
from fedpeft.training.loop import Training
from fedpeft.types import NO_MEMORY, Client, Method, State
from fedpeft.wire.messages import Kind, Request, Response, decode
from tests.causal_lms import CAUSAL_LMS, TEMPLATE, causal_lm, rows, task, tokenizer, worker
from tests.contract.reference import PHASES, SINGLE
from tests.tiny import CONFIG, CPU, SEED, close, small

SGD = Training(optimizer="sgd", lr=0.2, momentum=0.9, batch_size=4, clip=0.3)
SIZES = {0: 6, 1: 11, 2: 9, 3: 7}
DEVICE = CPU.torch_device


def whole(examples: Encoded, chosen: CausalLM) -> list[tuple[list[int], list[int]]]:
    """Return of each example all ids and, as transformers wants them, labels: -100 but for the response."""
    both: list[tuple[list[int], list[int]]] = []
    for example in examples:
        ids = [*example.ids.tolist(), int(example.labels[-1])]
        labels = [-100] * (len(ids) - len(example.labels)) + example.labels.tolist()
        both.append((ids, labels))
    return both


def by_transformers(model: Any, examples: Encoded, chosen: CausalLM) -> list[tuple[float, int]]:
    """Return the mean loss of each example alone by transformers, and how many tokens it is of."""
    found: list[tuple[float, int]] = []
    for ids, labels in whole(examples, chosen):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        found.append((float(out.loss), sum(label != -100 for label in labels[1:])))
    return found


# What is read: prompts, responses, messages.


def test_prompt_new_line_response_and_end_of_text() -> None:
    chosen = task()
    [example] = chosen.encode(Rows({"prompt": ("w1 w2",), "response": ("w3 w4",)}))
    words = tokenizer()
    ids = words("w1 w2\nw3 w4 <end>")["input_ids"]
    assert example.ids.tolist() == ids[:-1]  # nothing follows the last
    assert example.labels.tolist() == ids[2:]
    assert example.weight == 3


def test_an_input_is_appended_to_its_prompt() -> None:
    columns = {"prompt": ("w1", "w1"), "input": ("w2", ""), "response": ("w3", "w3")}
    with_input, without = task().encode(Rows(columns))
    both = task().encode(Rows({"prompt": ("w1\nw2", "w1"), "response": ("w3", "w3")}))
    assert with_input.ids.tolist() == both[0].ids.tolist()
    assert without.ids.tolist() == both[1].ids.tolist()


def test_the_chat_template_writes_what_transformers_writes() -> None:
    """Up to the mark that ends the response; messages and a pair are the same dialogue."""
    chosen = task(TEMPLATE)
    said = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    [of_messages] = chosen.encode(Rows({"messages": (messages(said),)}))
    [of_pair] = chosen.encode(Rows({"prompt": ("w1 w2",), "response": ("w3",)}))
    words = tokenizer(TEMPLATE)
    rendered = words(words.apply_chat_template(said, tokenize=False))["input_ids"]
    end = words.convert_tokens_to_ids("<end>")
    assert rendered[-1] == end
    for example in (of_messages, of_pair):
        assert [*example.ids.tolist(), end] == rendered
        assert example.labels.tolist() == rendered[-2:]


@pytest.mark.parametrize(("chat", "uses"), [("auto", True), ("always", True), ("never", False)])
def test_the_template_is_used_as_the_settings_say(chat: Any, uses: bool) -> None:
    chosen = task(TEMPLATE, chat=chat)
    [example] = chosen.encode(Rows({"prompt": ("w1",), "response": ("w2",)}))
    user = tokenizer().convert_tokens_to_ids("<user>")
    assert (user in example.ids.tolist()) == uses


def test_without_a_template_nothing_claims_one() -> None:
    with pytest.raises(BadInput, match=r"task.chat = 'always'.*no chat template"):
        task(chat="always")
    dialogue = messages([{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}])
    with pytest.raises(BadInput, match=r"data.messages.*no chat template"):
        task().encode(Rows({"messages": (dialogue,)}))
    with pytest.raises(BadInput, match=r"data.messages: task.chat = 'never'"):
        task(TEMPLATE, chat="never").encode(Rows({"messages": (dialogue,)}))


def test_a_prompt_too_long_loses_its_beginning() -> None:
    prompt, response = "w1 w2 w3 w4 w5 w6", "w7 w8"
    [example] = task(max_length=6).encode(Rows({"prompt": (prompt,), "response": (response,)}))
    kept = tokenizer()("w4 w5 w6 w7 w8 <end>")["input_ids"]
    assert [*example.ids.tolist(), int(example.labels[-1])] == kept
    assert example.weight == 3


def test_rows_without_a_response_are_counted_and_passed_over() -> None:
    responses = ("",) + ("w3",) * 39
    encoded = task().encode(Rows({"prompt": ("w1",) * 40, "response": responses}))
    assert [example.row for example in encoded] == list(range(1, 40))
    [note] = encoded.notes
    assert "1 of 40 rows" in note
    with pytest.raises(BadInput, match=r"3 of 40 rows .* model.max_length = 24.*data.response"):
        task().encode(Rows({"prompt": ("w1",) * 40, "response": ("",) * 3 + ("w3",) * 37}))
    with pytest.raises(BadInput, match="model.max_length = 1: .* choose 2 or more"):
        task(max_length=1).encode(Rows({"prompt": ("w1",), "response": ("w3",)}))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("hello", "must be a list of messages"),
        ([{"role": "user"}], "message 1"),
        ([{"role": "user", "content": 5}], "message 1.*must be a string"),
        ([{"role": "user", "content": "Hi"}], "no message of role 'assistant'"),
        ([{"role": "assistant", "content": "Hi"}], "no message before"),
    ],
)
def test_what_is_no_dialogue_is_refused(value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        messages(value)


def test_rows_need_no_label(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b", "label": "x"}\n')
    names = {"prompt": "prompt", "response": "response"}
    assert read(path, Columns(KIND.schema, names)).labels == ()
    assert read(path, Columns(KIND.schema, {**names, "label": "label"})).labels == ("x",)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"metric": "exact_match"}, "task.generate"),
        ({"metric": "f1"}, "perplexity, exact_match"),
        ({"answer_pattern": "("}, "no regular expression"),
        ({"answer_pattern": "a"}, "has 0 groups"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        make_task(TaskSection(kind="causal_lm", **settings), (), 16)


# Losses.


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_losses_are_those_of_transformers(name: str, template: str | None) -> None:
    chosen, model = task(template), causal_lm(name)
    examples = chosen.encode(rows(9))
    expected = by_transformers(model, examples, chosen)
    with torch.no_grad():
        ours = chosen.losses(model, chosen.collate(examples, DEVICE, 4))
    torch.testing.assert_close(
        ours, torch.tensor([loss for loss, _ in expected]), atol=1e-5, rtol=1e-5
    )
    assert [example.weight for example in examples] == [count for _, count in expected]


def test_a_step_has_the_loss_and_the_gradient_of_transformers() -> None:
    """Of all tokens of its rows together."""
    chosen, model = task(), causal_lm("llama").requires_grad_(True)
    examples = chosen.encode(rows(5))
    losses = chosen.losses(model, chosen.collate(examples, DEVICE))
    weights = torch.tensor([float(example.weight) for example in examples])
    ours = (losses * weights).sum() / weights.sum()
    batch = whole(examples, chosen)
    width = max(len(ids) for ids, _ in batch)
    padded: dict[str, Tensor] = {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch]),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]
        ),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in batch]),
    }
    transformer: Any = model
    theirs = transformer(**padded).loss
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    for mine, their in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_the_output_layer_sees_the_responses_alone(name: str) -> None:
    chosen, model = task(), causal_lm(name)
    chosen.trial(model, DEVICE)
    transformer: Any = model
    seen: list[torch.Size] = []
    transformer.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape)
    )
    batch = chosen.collate(chosen.encode(rows(6)), DEVICE)
    chosen.losses(model, batch)
    assert seen == [(*batch["labels"].shape, 16)]
    assert batch["labels"].shape[1] < batch["input_ids"].shape[1]


class Deaf(nn.Module):
    """A model of a family that takes the positions and makes something else of them."""

    def __init__(self, model: nn.Module, then: str) -> None:
        super().__init__()
        self.model, self.then = model, then

    def forward(self, logits_to_keep: Tensor | None = None, **read: Any) -> Any:
        if logits_to_keep is not None and self.then == "raise":
            raise TypeError("logits_to_keep")
        out = self.model(**read)
        if logits_to_keep is not None and self.then == "last":
            out.logits = out.logits[:, -logits_to_keep.shape[1] :]
        return out


@pytest.mark.parametrize("then", ["raise", "last", "everything"])
def test_a_model_that_cannot_choose_is_found_out(then: str) -> None:
    chosen, model = task(), causal_lm("llama")
    batch = chosen.collate(chosen.encode(rows(6)), DEVICE)
    torch.testing.assert_close(
        chosen.losses(Deaf(model, then), batch), chosen.losses(model, batch), atol=1e-6, rtol=1e-6
    )


def test_no_cache_is_made_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm("llama")
    made: list[object] = []
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama, "DynamicCache", lambda **_: made.append(1)
    )
    chosen = task()
    chosen.losses(model, chosen.collate(chosen.encode(rows(3)), DEVICE))
    assert not made


# Scores.


def test_perplexity_is_that_of_a_plain_loop() -> None:
    """Over all tokens of all responses; the sum of counts is that of all examples."""
    chosen, model = task(), causal_lm("gpt2")
    examples = chosen.encode(rows(13))
    expected = by_transformers(model, examples, chosen)
    total = sum(loss * count for loss, count in expected)
    tokens = sum(count for _, count in expected)
    counts = score(model, chosen, examples, replace(CPU, tokens=40, threads=2))
    metrics = chosen.metrics(counts)
    assert list(metrics) == ["perplexity", "loss"]
    assert metrics["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert not chosen.metric.higher_is_better
    parts = [score(model, chosen, part, CPU) for part in (examples[:4], examples[4:])]
    assert int(parts[0]["tokens"] + parts[1]["tokens"]) == tokens
    assert float(parts[0]["loss"] + parts[1]["loss"]) == pytest.approx(total, rel=1e-5)
    assert not chosen.fault(counts)
    assert "matches" in chosen.fault({**counts, "matches": torch.tensor(1)})
    assert chosen.no_counts().keys() == counts.keys()


def generated_by_transformers(
    model: Any, prompts: Sequence[Tensor], tokens: int
) -> list[list[int]]:
    """Return what ``model.generate`` says to each prompt alone, up to its end."""
    make: Any = GenerationConfig  # its constructor is untyped
    settings = make(do_sample=False, max_new_tokens=tokens, eos_token_id=2, pad_token_id=0)
    found: list[list[int]] = []
    for prompt in prompts:
        whole = model.generate(
            input_ids=prompt.unsqueeze(0),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            generation_config=settings,
        )
        found.append(whole[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_generated_text_is_that_of_transformers(name: str) -> None:
    """Prompts of unequal length in one batch, under an adapter; some end before others."""
    chosen, model = task(generate=8, max_length=24), causal_lm(name)
    base = describe(model, (), without=_output(model))
    draw = torch.Generator().manual_seed(1)
    adapter: dict[str, Tensor] = {}
    for layer, weight in base.layers.items():
        adapter[f"{layer}:A"] = torch.randn(1, 2, weight.shape[1], generator=draw)
        adapter[f"{layer}:B"] = torch.randn(1, weight.shape[0], 2, generator=draw) / 4
    prompts = chosen.encode(Rows({"prompt": rows(24).columns["prompt"]}))
    with mounted(model, adapter):
        outputs = predictions(model, chosen, prompts, CPU)
        expected = generated_by_transformers(model, [prompt.ids for prompt in prompts], 8)
    ours = [output["tokens"][output["tokens"] >= 0].tolist() for output in outputs]
    assert ours == expected
    lengths = {len(said) for said in ours}
    assert len({len(prompt) for prompt in prompts}) > 2
    assert 8 in lengths or len(lengths) > 1
    texts = [answer.response for answer in chosen.answers(outputs, prompts)]
    assert texts == [tokenizer().decode(said, skip_special_tokens=True) for said in expected]


def test_prompt_and_answer_stay_within_the_length() -> None:
    chosen, model = task(generate=8, max_length=12), causal_lm("gpt2")
    prompts = chosen.encode(Rows({"prompt": ("w1 " * 30, "w1")}))
    assert [len(prompt) for prompt in prompts] == [6, 1]
    long, short = predictions(model, chosen, prompts, CPU)
    assert int((long["tokens"] >= 0).sum()) <= 6
    assert int((short["tokens"] >= 0).sum()) <= 8


def test_exact_match_counts_generated_responses() -> None:
    """The reference is what the model says, for every other row; at most so many are generated."""
    model = causal_lm("llama")
    chosen = task(generate=4, generate_limit=6, metric=make_metric("exact_match"))
    prompts = rows(10).columns["prompt"]
    encoded = chosen.encode(Rows({"prompt": prompts}))
    said = [a.response for a in chosen.answers(predictions(model, chosen, encoded, CPU), encoded)]
    references = [one if row % 2 else f"{one} w1" for row, one in enumerate(said)]
    examples = chosen.encode(Rows({"prompt": prompts, "response": tuple(references)}))
    counts = score(model, chosen, examples, CPU)
    assert (int(counts["generated"]), int(counts["matches"])) == (6, 3)
    assert int(counts["examples"]) == 10
    assert chosen.metrics(counts)["exact_match"] == 0.5


@pytest.mark.parametrize(
    ("said", "reference", "is_match"),
    [
        ("so #### 42", "6 * 7 = 42 #### 42", True),
        ("#### 41 no #### 42", "#### 42", True),
        ("#### 41", "#### 42", False),
        ("42", "#### 42", False),
        ("nothing", "nothing", False),
    ],
)
def test_a_pattern_finds_what_counts(said: str, reference: str, is_match: bool) -> None:
    chosen = task(pattern=r"#### (-?[0-9.,]+)")
    assert chosen._is_match(said, reference) == is_match


def make_metric(name: str) -> Any:
    return make_task(TaskSection(kind="causal_lm", metric=name, generate=1), (), 8).metric


# Methods.


def answers(playing: Worker, stack: Sequence[int], blob: bytes) -> dict[int, Response]:
    found = playing.handle(stack, [blob] * len(stack), [b""] * len(stack))
    decoded: dict[int, Response] = {}
    for client, (reply, memory) in zip(stack, found, strict=True):
        response = Response.decode(reply)
        decoded[client] = replace(response, payload=response.payload or decode(memory))
    return decoded


def asked(method: Method, model: nn.Module) -> tuple[bytes, State]:
    state = method.init(describe(model, (), without=_output(model)), SEED)
    return Request(Kind.TRAIN, 0, CONFIG, method.send(state, Client(0)), NO_MEMORY).encode(), state


def _output(model: Any) -> nn.Module:
    layer: nn.Module = model.get_output_embeddings()
    return layer


LM_PAIRS = [
    (family, name)
    for family in ("llama", "gpt2")
    for name in METHODS
    if (family, name) != ("llama", "bitfit")
]
"""Llama has no biases for BitFit to train."""
ALONE = {name for name, _ in SINGLE}
"""Methods that train one client at a time, SLoRA in its first stage."""


def tuned(name: str) -> Method:
    settings = {"targets": "attention"} if hasattr(METHODS[name], "targets") else {}
    return small(name, **settings)


@pytest.mark.parametrize(("family", "name"), LM_PAIRS)
def test_every_method_trains_a_language_model(family: str, name: str) -> None:
    """One by one; and four at once, in parts in which clients mix, which is the same."""
    method = tuned(name)
    playing = worker(family, method, SIZES, SGD)
    blob, state = asked(method, playing.model)
    alone = {client: answers(playing, [client], blob)[client] for client in SIZES}
    moved = 0.0
    for answer in alone.values():
        for part, tensor in answer.payload.items():
            start = {**state.shared, **state.server}.get(part)
            if start is None and part.endswith(":B"):  # clients begin a branch of their own, at 0
                start = torch.zeros_like(tensor)
            if start is not None and start.shape == tensor.shape:
                moved = max(moved, float((tensor - start).abs().max()))
    # In the first of several exchanges a client may only say what it will train.
    assert moved > 1e-3 or name in PHASES
    mixed = replace(playing, hardware=replace(CPU, tokens=60, threads=2, pad_to_multiple_of=4))
    if name in ALONE:
        with pytest.raises(NotStackable):
            mixed.handle([0, 1], [blob] * 2, [b""] * 2)
        return
    together = answers(mixed, list(SIZES), blob)
    for client in SIZES:
        close(together[client].payload, alone[client].payload, 2e-5)


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_cached_states_change_nothing(family: str) -> None:
    method = METHODS["lora"](targets=r"(h|layers)\.1\.", rank=2)  # type: ignore[call-arg]
    plain = worker(family, method, SIZES, SGD)
    blob, _ = asked(method, plain.model)
    cached = replace(plain, cache=ActivationCache(SIZES))
    expected = answers(plain, [0, 1], blob)
    for client, answer in answers(cached, [0, 1], blob).items():
        close(answer.payload, expected[client].payload, 1e-5)
    # Read from the second block on: the first one is exact.
    assert cached.cache._lowest == 1


def test_the_output_layer_is_not_adapted() -> None:
    for name in CAUSAL_LMS:
        model = causal_lm(name)
        assert not [
            layer for layer in describe(model, (), without=_output(model)).layers if "head" in layer
        ]


# Gradient checkpointing.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stack", [[1], [0, 1, 2]], ids=["alone", "side by side"])
def test_checkpointing_changes_no_gradient(family: str, stack: list[int]) -> None:
    """Blocks run again in the backward pass, when the rows' clients are no longer at hand but as they were then."""
    method = METHODS["lora"](targets="all-linear", rank=2)  # type: ignore[call-arg]
    plain = worker(family, method, SIZES, SGD)
    blob, _ = asked(method, plain.model)
    expected = answers(plain, stack, blob)
    again = worker(family, method, SIZES, SGD, hardware=replace(CPU, tokens=40, threads=2))
    checkpoint_blocks(again.model, ModelSection(checkpointing=True))
    calls: list[int] = []
    block = again.model.get_submodule("model.layers.0" if family == "llama" else "transformer.h.0")
    inner = next(module for name, module in block.named_modules() if "norm" in name or "ln" in name)
    inner.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for client, answer in answers(again, stack, blob).items():
        close(answer.payload, expected[client].payload, 1e-6)
    assert len(calls) >= 4


# Loading and export.


def write(folder: Path, name: str, *, dtype: torch.dtype = torch.float32) -> Path:
    model: Any = causal_lm(name)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, hardware: Hardware = CPU, **changes: Any) -> Loaded:
    section = ModelSection(name=str(folder), max_length=24, **changes)
    return load(section, CausalLM(24), hardware, SEED)


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_a_checkpoint_is_loaded_whole(name: str, tmp_path: Path) -> None:
    found = loaded(write(tmp_path / name, name))
    assert not found.base.head
    assert not found.notes
    assert found.form.peft_type == "CAUSAL_LM"
    for key, parameter in causal_lm(name).named_parameters():
        assert torch.equal(found.base.parameters[key], parameter)


def test_a_checkpoint_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    model: Any = causal_lm("llama")
    model.model.save_pretrained(tmp_path / "headless")
    tokenizer().save_pretrained(tmp_path / "headless")
    with pytest.raises(BadInput, match=r"lacks 1 .*lm_head.weight"):
        loaded(tmp_path / "headless")


BF16 = Hardware("cpu", "bf16", "eager", 1, pad_to_multiple_of=4)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_large_model_is_kept_once_in_bf16(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "model", "llama", dtype=stored)
    small_one, exact = loaded(folder, BF16), loaded(folder)
    monkeypatch.setattr(loading_module, "LARGE", 1000)
    large = loaded(folder, BF16)
    assert large.digest == small_one.digest == exact.digest
    for parameter in large.model.parameters():
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim > 1 else torch.float32)
    # What methods read is float32, and nothing keeps it.
    for name, weight in large.base.layers.items():
        assert weight.dtype == torch.float32
        assert weight.data_ptr() != large.base.layers[name].data_ptr()
    # It computes what the copy beside a float32 model computes, to the bit.
    chosen = task()
    batch = chosen.collate(chosen.encode(rows(4)), DEVICE)
    said: list[Tensor] = []
    for one in (small_one, large):
        with torch.no_grad(), BF16.computing(one.model), BF16.autocast():
            said.append(chosen.losses(one.model, batch))
    assert torch.equal(*said)


@pytest.mark.parametrize("name", ["full", "lora", "federa", "sparse", "fedara"])
def test_a_large_model_is_trained_in_float32(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "model", "llama")
    monkeypatch.setattr(loading_module, "LARGE", 1000)
    large = loaded(folder, BF16)
    method = tuned(name)
    playing = worker("llama", method, {0: 6}, SGD, model=large.model, hardware=BF16)
    state = method.init(large.base, SEED)
    assert {tensor.dtype for tensor in state.shared.values()} == {torch.float32}
    blob = Request(Kind.TRAIN, 0, CONFIG, method.send(state, Client(0)), NO_MEMORY).encode()
    exact = worker("llama", method, {0: 6}, SGD)
    exact_blob, _ = asked(method, exact.model)
    ours, theirs = answers(playing, [0], blob)[0], answers(exact, [0], exact_blob)[0]
    assert ours.measured.loss == pytest.approx(theirs.measured.loss, rel=0.02)
    for tensor in ours.payload.values():  # FedARA's votes are bytes
        assert tensor.dtype in {torch.float32, torch.uint8}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_what_is_exported_has_our_logits(name: str, merge: bool, tmp_path: Path) -> None:
    found = loaded(write(tmp_path / name, name))
    method = tuned("federa")
    state = method.init(found.base, SEED)
    draw = torch.Generator().manual_seed(2)
    shaken = {
        part: tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
        for part, tensor in state.shared.items()
    }
    state = replace(state, shared=shaken)
    ids = torch.randint(6, 60, (3, 9), generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    everywhere = torch.arange(9).expand(3, 9)
    with mounted_state(method, state, found.model, CPU, SEED) as local:
        ours = logits_at(found.model, inputs, everywhere)
    out = tmp_path / "exported"
    auto: Any = transformers.AutoModelForCausalLM
    if merge:
        export.merged(found, local, out)
        model = auto.from_pretrained(out, attn_implementation="eager")
    else:
        export.adapter(found, local, str(tmp_path / name), out)
        base = auto.from_pretrained(tmp_path / name, attn_implementation="eager")
        peft: Any = PeftModel
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, to peft
            model = peft.from_pretrained(base, out)
        assert model.peft_config["default"].task_type == "CAUSAL_LM"
    with torch.no_grad():
        theirs = model.eval()(**inputs).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_losses_by_hand() -> None:
    """Cross-entropy of the response's tokens, each read off the token before it."""
    chosen, model = task(), causal_lm("llama")
    [example] = chosen.encode(Rows({"prompt": ("w1 w2",), "response": ("w3",)}))
    transformer: Any = model
    with torch.no_grad():
        logits = transformer(input_ids=example.ids.unsqueeze(0)).logits[0]
        ours = chosen.losses(model, chosen.collate(Encoded([example]), DEVICE))
    expected = functional.cross_entropy(logits[-2:], example.labels)
    torch.testing.assert_close(ours[0], expected, atol=1e-6, rtol=1e-6)
    assert re.match(r"w3", tokenizer().decode(example.labels[:1]))
