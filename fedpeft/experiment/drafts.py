"""What a first configuration of each task says: the columns that it reads, numbers to try."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from fedpeft.data import Rows
from fedpeft.errors import BadInput
from fedpeft.experiment.checking import nearest
from fedpeft.experiment.columns import (
    LABELS,
    TEXTS,
    Profile,
    Roles,
    by_names,
    profile,
    text_and_label,
    usual_label,
)

Names = Mapping[str, Sequence[str]]
"""Role -> what columns for it are usually called, the likeliest first."""


@final
@dataclass(frozen=True)
class Draft:
    """What a first configuration of a task says.

    ``forms``: the columns by which the task is known, one mapping for each way of writing its data.
    ``optional``: columns that it may read besides. ``otherwise``: how columns are found where no
    form is there; None where they cannot be. ``texts``: what goes through the model together, as a
    text each. ``extra_tokens``: that come to a text's own. ``shared``: what of it clients have
    different shares of. ``model``: that it runs on as it is. ``rates``: the file of the demo whose
    sweep chose rates. ``has_head``: whether the task trains an output module. ``steps`` and
    ``batch_size``: of a client in a round. ``settings``: further lines of the section ``task``, for
    a length in tokens. ``evaluation``: lines of that section.
    """

    forms: tuple[Names, ...]
    texts: Callable[[Rows], Sequence[str]]
    extra_tokens: int
    shared: str
    model: str = 'name = "minilm"  # or a local folder, or an id on the Hugging Face hub'
    rates: str = "demo.toml"
    optional: Names = field(default_factory=dict)
    otherwise: Callable[[Profile], Roles] | None = None
    has_head: bool = True
    steps: int = 4
    batch_size: int = 16
    settings: Callable[[int], Sequence[str]] = lambda _: ()
    evaluation: tuple[str, ...] = ()

    def roles(self, found: Profile) -> Roles | None:
        """Return the columns of the first form that is there, None where none is."""
        for form in self.forms:
            roles = by_names(found, form)
            if roles is not None:
                return roles
        return None


@final
@dataclass(frozen=True)
class Found:
    """A task, and the columns of a file that it reads.

    ``roles``: the task's own. ``label``: what partitions divide by, where that is none of these.
    ``key``: names natural clients.
    """

    task: str
    roles: Roles
    label: str | None
    key: str | None
    delimiter: str | None


def find(train: Path, task: str | None = None) -> Found:
    """Return the task of the data in ``train``, a file or a pattern, and its columns.

    ``task``: the kind, where the user names it; otherwise it is told from the columns' names: the
    one whose usual columns are there, and classification where none is. Raises BadInput for files
    that cannot be read, where several tasks would do, and where a column is missing.
    """
    if task is not None and task not in DRAFTS:
        raise BadInput(f"--task {task}: is no task; {nearest(task, list(DRAFTS))}")
    found = profile(train)
    kind = task or _told(found)
    draft = DRAFTS[kind]
    roles = draft.roles(found) if draft.otherwise is None else draft.otherwise(found)
    if roles is None:
        raise BadInput(
            f"{train}: no columns for {kind}: its columns are {found.shown}, and read are "
            f"{' or '.join(_spelled(form) for form in draft.forms)}; rename them, or write "
            f"{_fields(draft.forms[0])} into a configuration of your own"
        )
    more = {**roles}
    for role, usual in draft.optional.items():
        more |= by_names(found, {role: usual}) or {}
    label = None if "label" in more else usual_label(found, more.values())
    key = found.key([*more.values()])
    return Found(kind, more, label, None if key is None else key.name, found.delimiter)


def _told(found: Profile) -> str:
    """Return the task whose usual columns are there; BadInput where several would do."""
    fitting: dict[str, Roles] = {}
    for kind, draft in DRAFTS.items():
        roles = draft.roles(found)
        if roles is not None:
            fitting[kind] = roles
    # The columns of one task may be among those of another: a question, with or without a context.
    chosen: list[str] = []
    for kind, roles in fitting.items():
        columns = {*roles.values()}
        others = [{*other.values()} for name, other in fitting.items() if name != kind]
        if not any(columns < other for other in others):
            chosen.append(kind)
    if len(chosen) > 1:
        ways = " or ".join(f"{kind} ({', '.join(fitting[kind].values())})" for kind in chosen)
        raise BadInput(f"{found.where}: may be read for {ways}; name one with --task")
    return chosen[0] if chosen else "classification"


def _spelled(form: Names) -> str:
    """Return the usual names of a form, for an error."""
    return " + ".join("/".join(names) for names in form.values())


def _fields(form: Names) -> str:
    """Return the fields of the configuration that name a form's columns."""
    return " and ".join(f"data.{role}" for role in form)


def _joined(rows: Rows, *roles: str) -> list[str]:
    """Return the texts of several columns as one a row; a column that is not read is left out."""
    columns = [rows.columns[role] for role in roles if role in rows.columns]
    return [" ".join(parts) for parts in zip(*columns, strict=True)]


def _sentences(rows: Rows) -> list[str]:
    return [" ".join(words) for words in rows.columns["words"]]


def _questions(rows: Rows) -> list[str]:
    return _joined(rows, "question", "context")


def _dialogues(rows: Rows) -> list[str]:
    """Return prompts with their responses, or all messages of a dialogue, as a text each."""
    if "messages" not in rows.columns:
        return _joined(rows, "prompt", "input", "response")
    dialogues: list[str] = []
    for messages in rows.columns["messages"]:
        dialogues.append(" ".join(message.content for message in messages))
    return dialogues


def _stride(max_length: int) -> list[str]:
    return [
        f"stride = {max_length // 4}  # tokens that neighbouring windows of a long context share"
    ]


DRAFTS: Final[Mapping[str, Draft]] = {
    "classification": Draft(
        forms=({"text": TEXTS, "label": LABELS},),
        texts=lambda rows: rows.texts,
        extra_tokens=2,
        shared="the labels",
        otherwise=text_and_label,
    ),
    "tagging": Draft(
        forms=({"words": ("tokens", "words"), "tags": ("tags", "ner_tags")},),
        texts=_sentences,
        extra_tokens=2,
        shared="the types of names",
        steps=8,
    ),
    "qa": Draft(
        forms=(
            {
                "question": ("question",),
                "context": ("context", "passage"),
                "answers": ("answers", "answer"),
            },
        ),
        texts=_questions,
        extra_tokens=3,
        shared="the question words",
        steps=8,
        settings=_stride,
        evaluation=("limit = 500  # questions that are scored",),
    ),
    "causal_lm": Draft(
        forms=(
            {"messages": ("messages",)},
            {
                "prompt": ("prompt", "instruction", "question"),
                "response": ("response", "output", "completion", "answer"),
            },
        ),
        optional={"input": ("input", "context")},
        texts=_dialogues,
        extra_tokens=40,  # of a chat template
        shared="the labels",
        model='name = "smollm2"  # or a local folder, a GGUF file, or an id on the hub',
        rates="demo_llm.toml",
        has_head=False,
        batch_size=4,
        evaluation=("limit = 100  # responses that are scored",),
    ),
}
"""Every task, as ``task.kind`` names it."""
