"""Instruction tuning of a language model: a loss on responses alone, scored by their perplexity."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.data.rows import Dataset, Rows
from fedpeft.data.schema import Column, Schema, text
from fedpeft.errors import BadInput
from fedpeft.tasks.choice import Chat, TaskSection
from fedpeft.tasks.dialogue import Message, Writer, fitted, messages, writer
from fedpeft.tasks.generation import NOTHING, continued
from fedpeft.tasks.logits import logits_at, looks_ahead
from fedpeft.tasks.padding import IGNORED, inputs, joined, padded, read_by_model, width_of
from fedpeft.tasks.task import (
    TRIAL,
    Batch,
    Counts,
    Encoded,
    Example,
    Metric,
    ModelForm,
    Prediction,
    SourceForm,
    TaskKind,
    primary,
)

PERPLEXITY: Final = Metric("perplexity", higher_is_better=False, share=False)
EXACT_MATCH: Final = Metric("exact_match")
PREDICTED: Final = 64
"""Tokens that a response to a user has at most where ``task.generate`` leaves it open."""
TOO_MANY: Final = 0.05
"""Share of rows without a response beyond which something is wrong with the data."""
LARGEST: Final = 700.0
"""The exponential of a larger mean loss is no float any more."""


class Answer(NamedTuple):
    """What a model says to a prompt."""

    response: str


@final
@dataclass(frozen=True)
class Turn:
    """A prompt, uncut, and its response; None where nobody knows one."""

    prompt: Sequence[int]
    response: str | None


@final
@dataclass(frozen=True)
class CausalLM:
    """Continue prompts; prompt and response have at most ``max_length`` tokens together.

    ``chat``: whether the tokenizer's chat template is used. ``generate``: tokens that are generated
    for a scored prompt at most, 0 for none; ``generate_limit``: how many prompts are. ``pattern``:
    what of a response is compared with the reference, as a regular expression with one group; None
    for all of it. ``writer``: comes with the tokenizer.
    """

    max_length: int
    metric: Metric = PERPLEXITY
    chat: Chat = "auto"
    generate: int = 0
    generate_limit: int = 64
    pattern: str | None = None
    labels: tuple[str, ...] = ()
    writer: Writer | None = None

    @property
    def form(self) -> ModelForm:
        """A language model, whose output layer belongs to the frozen base."""
        return ModelForm(
            auto_class="AutoModelForCausalLM",
            labels=(),
            outputs=0,
            peft_type="CAUSAL_LM",
            reads="every",
            head_is_trained=False,
        )

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """Return the task with the tokenizer that was loaded with its model.

        One that names no end of text raises BadInput, and so does one without a chat template where
        the settings want it, and a ``max_length`` without room for a prompt and a response.
        """
        if self.max_length < 2:
            raise BadInput(
                f"model.max_length = {self.max_length}: leaves no room for a prompt and a "
                "response; choose 2 or more"
            )
        return replace(self, writer=writer(tokenizer, self.chat))

    def unanswered(self, texts: Sequence[str], context: str | None = None) -> Rows:
        """Return rows of prompts without responses; ``context``: the input of every instruction."""
        columns = {"prompt": tuple(texts)}
        if context is not None:
            columns["input"] = (context,) * len(texts)
        return Rows(columns)

    def encode(self, rows: Rows) -> Encoded:
        """Return prompts and responses as numbers.

        Of an example ``ids`` are prompt and response without its last token, which nothing follows;
        ``labels``, (m,), the tokens of the response, each of which is read off the token before it.
        The prompt has none. Rows whose response has no token within ``max_length`` are passed over
        and counted in a note; BadInput where they are more than 5 %. Rows without responses become
        prompts to be continued (see ``to_score``).
        """
        if not len(rows):
            return Encoded([])
        dialogues, references = self._dialogues(rows)
        records = [rows.record_of(row) for row in range(len(rows))]
        prompts = self._writer.prompts(dialogues, records)
        if not references:
            return Encoded(
                [self._prompt(row, Turn(prompt, None)) for row, prompt in enumerate(prompts)]
            )
        responses = self._writer.responses(references)
        examples: list[Example] = []
        passed_over: list[int] = []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            example = self._example(row, Turn(prompt, references[row]), response)
            if response and example.weight:
                examples.append(example)
            else:
                passed_over.append(records[row])
        return Encoded(examples, self._notes(passed_over, len(rows)))

    def to_score(self, examples: Encoded) -> Encoded:
        """Return ``examples`` and, where responses are generated, the prompts of the first rows.

        A prompt is an example of its own, without labels.
        """
        if not self.generate:
            return examples
        prompts: list[Example] = []
        for example in examples[: self.generate_limit]:
            prompts.append(self._prompt(example.row, example.source))
        return Encoded([*examples, *prompts])

    def collate(
        self, examples: Encoded, device: torch.device, pad_to_multiple_of: int = 1
    ) -> Batch:
        """Return a padded batch: input_ids, attention_mask, (n, L); labels, positions, (n, R).

        ``positions``: where the logits of each label are. R is the longest response. Behind the end
        of a shorter one ``labels`` is -100.
        """
        width = width_of(max(examples.lengths), pad_to_multiple_of, self.max_length)
        batch = inputs(examples, width, self._writer.tokenizer.pad_token_id)
        positions: list[Tensor] = []
        for example in examples:
            length, num_labels = len(example), len(example.labels)
            positions.append(torch.arange(length - num_labels, length))
        longest = max(len(example.labels) for example in examples)
        # Like lengths, so that a shape comes again; a row has no more labels than tokens.
        read = width_of(longest, pad_to_multiple_of, width) if longest else 0
        batch["labels"] = padded([example.labels for example in examples], read, IGNORED)
        batch["positions"] = padded(positions, read, 0)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of each response's tokens, (n,); 0 without any."""
        losses = _token_losses(model, batch)
        return losses.sum(dim=1) / (batch["labels"] != IGNORED).sum(dim=1).clamp(min=1)

    def predict(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return ``losses`` of the labels, (n, R), and the ``tokens`` generated, (n, T).

        Rows with labels have no tokens, and rows without have nothing else; in ``tokens`` -1 stands
        for none, in ``losses`` 0.
        """
        labels, mask = batch["labels"], batch["attention_mask"]
        losses = torch.zeros(labels.shape, device=labels.device)
        tokens = torch.zeros(len(labels), 0, dtype=torch.int64, device=labels.device)
        answered = (labels != IGNORED).any(dim=1)  # (n,)
        if bool(answered.any()):
            losses[answered] = _token_losses(model, _rows(batch, answered))
        if not bool(answered.all()):
            prompts = _rows(batch, ~answered)
            limits = self.max_length - prompts["attention_mask"].sum(dim=1)
            limits = limits.clamp(max=self.generate or PREDICTED)
            generated = continued(
                model,
                prompts["input_ids"],
                prompts["attention_mask"],
                limits,
                self._writer.ends,
            )
            tokens = generated.new_full((len(mask), generated.shape[1]), NOTHING)
            tokens[~answered] = generated
        return {"losses": losses, "tokens": tokens}

    def score(self, predictions: Sequence[Prediction], examples: Encoded) -> Counts:
        """Count the loss, a sum over ``tokens``, and the generated responses that are right.

        ``generated`` and ``matches``: how many responses were generated, and how many of them are,
        or have, what the reference is or has.
        """
        loss = torch.tensor(0.0, dtype=torch.float64)
        tokens = generated = matches = 0
        for prediction, example in zip(predictions, examples, strict=True):
            loss += prediction["losses"][: example.weight].double().sum()
            tokens += example.weight
            if not example.weight:
                said = self._said(prediction)
                generated += 1
                matches += self._is_match(said, example.source.response)
        return {
            "examples": torch.tensor(examples.num_rows),
            "tokens": torch.tensor(tokens),
            "loss": loss,
            "generated": torch.tensor(generated),
            "matches": torch.tensor(matches),
        }

    def no_counts(self) -> Counts:
        """Return the counts of no response."""
        return self.score([], Encoded([]))

    def metrics(self, counts: Counts) -> Mapping[str, float]:
        """Return ``perplexity``, ``exact_match`` where responses are generated, and ``loss``.

        The perplexity is the exponential of the mean loss of all tokens.
        """
        loss = float(counts["loss"]) / max(1, int(counts["tokens"]))
        named = {PERPLEXITY.name: math.exp(min(loss, LARGEST))}
        if self.generate:
            generated = max(1, int(counts["generated"]))
            named[EXACT_MATCH.name] = int(counts["matches"]) / generated
        return {**named, "loss": loss}

    def fault(self, counts: Counts) -> str:
        """Return why counts cannot be true, empty where they can."""
        whole = {name: int(counts[name]) for name in ("tokens", "generated", "matches")}
        rows = 0 <= whole["matches"] <= whole["generated"] <= int(counts["examples"])
        if rows and whole["tokens"] >= 0 and float(counts["loss"]) >= 0:
            return ""
        said = ", ".join(f"{name} = {count}" for name, count in whole.items())
        return f"{said}, loss = {float(counts['loss'])}: are no scores of responses"

    def trivial(self, dataset: Dataset, scored: Encoded) -> None:
        """Return None: no response is right whatever the prompt is."""

    def answers(self, predictions: Sequence[Prediction], examples: Encoded) -> list[Answer]:
        """Return what was generated for every prompt."""
        del examples
        return [Answer(self._said(prediction)) for prediction in predictions]

    def trial(self, model: nn.Module, device: torch.device) -> str:
        """Return what is wrong with what ``model`` says of two short texts, empty if nothing."""
        examples = self.encode(Rows({"prompt": TRIAL, "response": TRIAL}))
        longest = max(examples, key=len)
        if looks_ahead(model, longest.ids.unsqueeze(0).to(device)):
            why = "it reads texts from both sides, so it would see the response that it has to give"
            return f"{why}; choose a language model that reads from left to right"
        losses = self.predict(model, self.collate(examples, device))["losses"]
        finite = bool(torch.isfinite(losses).all())
        return "" if finite else "its loss of a short text is no number; choose another model"

    @property
    def _writer(self) -> Writer:
        assert self.writer is not None, "with_tokenizer comes first"
        return self.writer

    def _dialogues(self, rows: Rows) -> tuple[list[Sequence[Message]], Sequence[str]]:
        """Return the messages of each prompt, and the responses, none where there are none.

        Messages without a chat template raise BadInput.
        """
        if "messages" in rows.columns:
            if not self._writer.has_template:
                why = "the model's tokenizer has no chat template"
                if self.chat == "never":
                    why = "task.chat = 'never'"
                raise BadInput(
                    f"data.messages: {why}, which messages are written with; "
                    "name data.prompt and data.response, or choose another model"
                )
            dialogues = rows.columns["messages"]
            return [one[:-1] for one in dialogues], [one[-1].content for one in dialogues]
        prompts: list[Sequence[Message]] = []
        for row, prompt in enumerate(rows.columns["prompt"]):
            more = rows.columns["input"][row] if "input" in rows.columns else ""
            prompts.append([Message("user", f"{prompt}\n{more}" if more else prompt)])
        return prompts, rows.columns.get("response", ())

    def _example(self, row: int, turn: Turn, response: Sequence[int]) -> Example:
        """Return prompt and response as one example, cut to fit."""
        marked = [*response, *self._writer.mark]
        prompt, kept = fitted(turn.prompt, marked, self.max_length)
        # A token is read off the one before it: of a row without a prompt the first has none.
        labels = kept if prompt else kept[1:]
        return Example(
            ids=torch.tensor([*prompt, *kept][:-1], dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            row=row,
            weight=len(labels),
            source=turn,
        )

    def _prompt(self, row: int, turn: Turn) -> Example:
        """Return a prompt to be continued, cut so that there is room for a response."""
        room = min(self.generate or PREDICTED, self.max_length // 2)
        kept = turn.prompt[-(self.max_length - room) :] or self._writer.mark[-1:]
        nothing = torch.tensor([], dtype=torch.int64)
        return Example(torch.tensor(kept), nothing, row, weight=0, source=turn)

    def _notes(self, passed_over: Sequence[int], total: int) -> tuple[str, ...]:
        """Return what to say of rows that have no token to learn; BadInput where they are many.

        ``passed_over``: the numbers of their records.
        """
        if not passed_over:
            return ()
        limit = f"model.max_length = {self.max_length}, such as record {passed_over[0]}"
        said = f"{len(passed_over)} of {total} rows have no token of a response within {limit}"
        if len(passed_over) > TOO_MANY * total:
            raise BadInput(f"{said}; raise it, or look at the column that data.response names")
        return (f"{said}: they are passed over",)

    def _said(self, prediction: Prediction) -> str:
        """Return what was generated, as text."""
        tokens = prediction["tokens"]
        return self._writer.text(tokens[tokens != NOTHING].tolist())

    def _is_match(self, said: str, reference: str) -> bool:
        """Return whether a response is the reference, or has what the pattern finds there last."""
        if self.pattern is None:
            return said == reference.strip()
        wanted, found = re.findall(self.pattern, reference), re.findall(self.pattern, said)
        return bool(wanted) and wanted[-1:] == found[-1:]


def _rows(batch: Batch, chosen: Tensor) -> dict[str, Tensor]:
    """Return the rows of a batch where ``chosen``, (n,), says so."""
    return {name: tensor[chosen] for name, tensor in batch.items()}


def _token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of every label, (n, R), 0 where there is none."""
    labels = batch["labels"]
    logits = logits_at(model, read_by_model(batch), batch["positions"])
    losses = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape)


def _no_names(dataset: Dataset) -> tuple[str, ...]:
    """Return nothing: responses have no names."""
    del dataset
    return ()


def _make(choice: TaskSection, names: tuple[str, ...], max_length: int) -> CausalLM:
    del names
    metrics = (PERPLEXITY, EXACT_MATCH)
    metric = primary(choice, metrics)
    if metric is EXACT_MATCH and not choice.generate:
        raise BadInput(
            "task.metric = 'exact_match': no response is generated; "
            "set task.generate to the tokens that one may have, such as 64"
        )
    if choice.answer_pattern is not None:
        _check_pattern(choice.answer_pattern)
    return CausalLM(
        max_length=max_length,
        metric=metric,
        chat=choice.chat,
        generate=choice.generate,
        generate_limit=choice.generate_limit,
        pattern=choice.answer_pattern,
    )


def _check_pattern(pattern: str) -> None:
    """Raise BadInput for what is no regular expression with one group."""
    setting = f"task.answer_pattern = {pattern!r}"
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise BadInput(f"{setting}: is no regular expression ({error})") from error
    if groups != 1:
        raise BadInput(
            f"{setting}: has {groups} groups; put what counts in one, as in '#### (-?[0-9.,]+)'"
        )


def _pack(turns: Sequence[Turn]) -> tuple[Any, Mapping[str, Tensor]]:
    """Return prompts as tensors, responses as JSON."""
    prompts = [torch.tensor(turn.prompt, dtype=torch.int64) for turn in turns]
    parts = {
        "prompts": joined(prompts),
        "lengths": torch.tensor([len(prompt) for prompt in prompts]),
    }
    return [turn.response for turn in turns], parts


def _unpack(kept: Any, parts: Mapping[str, Tensor]) -> list[Turn]:
    """Return the turns that ``_pack`` was given."""
    prompts = torch.split_with_sizes(parts["prompts"], parts["lengths"].tolist())
    turns: list[Turn] = []
    for prompt, response in zip(prompts, kept, strict=True):
        turns.append(Turn(prompt.tolist(), response))
    return turns


KIND: Final = TaskKind(
    schema=Schema(
        columns=(
            Column("prompt", text),
            Column("input", text),
            Column("response", text),
            Column("messages", messages, instead_of=("prompt", "input", "response")),
        ),
        is_labelled=False,
    ),
    names=_no_names,
    make=_make,
    sources=SourceForm(_pack, _unpack),
)
