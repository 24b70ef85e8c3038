"""Laws of kept tokens: what is kept is what would be encoded, for as long as nothing it depends on changes."""

import dataclasses
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedpeft.data import Columns, Dataset, Rows, read
from fedpeft.tasks import (
    TASKS,
    Encoded,
    Example,
    SourceForm,
    Task,
    TaskSection,
    TokenCache,
    make_task,
)
from fedpeft.tasks import token_cache as module
from fedpeft.tasks.token_cache import packed, unpacked
from tests.e2e.builders import NOISE, write_tokenizer
from tests.e2e.task_grounds import TASK_GROUNDS
from tests.tiny_tasks import TASK_CASES

PLENTY = 10**9
AS_JSON = SourceForm(pack=lambda sources: (sources, {}), unpack=lambda kept, parts: kept)
"""Sources that JSON gives back as they are."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, eos_token="[SEP]")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokens are kept; every number of rows is enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "FEWEST", 1)
    return tmp_path / "fedpeft" / "tokens"


class Counting:
    """A task that counts how often it is asked to encode."""

    def __init__(self, task: Task) -> None:
        self.task, self.calls = task, 0

    def encode(self, rows: Rows) -> Encoded:
        self.calls += 1
        return self.task.encode(rows)


def same(one: Encoded, other: Encoded) -> bool:
    """Return whether two encodings are equal in every number, type, shape and source."""
    if one.notes != other.notes or len(one) != len(other):
        return False
    for mine, theirs in zip(one, other, strict=True):
        for field in dataclasses.fields(Example):
            value, its = getattr(mine, field.name), getattr(theirs, field.name)
            if isinstance(value, torch.Tensor):
                if value.dtype != its.dtype or not torch.equal(value, its):
                    return False
            elif type(value) is not type(its) or repr(value) != repr(its):  # it may hold tensors
                return False
    return True


def rows_of(size: int = 6, label: str = "a") -> Rows:
    texts = tuple(" ".join(NOISE[number : number + number % 4]) for number in range(size))
    return Rows.of_texts(texts, (label, "b") * (size // 2))


def cache_of(usual_tokenizer: Any, **changes: Any) -> TokenCache:
    usual = TokenCache(usual_tokenizer, TaskSection(), ("a", "b", "c"), 16, PLENTY)
    return replace(usual, **changes)


def task_of(tokenizer: Any, max_length: int = 16) -> Counting:
    names = ("a", "b", "c")
    return Counting(make_task(TaskSection(), names, max_length).with_tokenizer(tokenizer))


@pytest.mark.parametrize("kind", TASK_GROUNDS)
def test_what_is_kept_is_what_is_encoded(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """For every task, to the last type."""
    ground = TASK_GROUNDS[kind]
    choice = TaskSection(**ground.settings.get("task", {}))
    task_kind = TASKS[choice.kind]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ground.rows()))
    given = ground.settings.get("data", {})
    roles = {column.role: column.role for column in task_kind.schema.columns}
    roles |= {"words": "tokens"} if "words" in roles else {}
    present = json.loads(path.read_text().splitlines()[0])
    names = {role: given.get(role, name) for role, name in roles.items()}
    names = {role: name for role, name in names.items() if name in present}
    if task_kind.schema.label is None:
        names["label"] = given.get("label", "label")
    if names.get("label") not in present:
        names.pop("label", None)
    rows = read(path, Columns(task_kind.schema, names))
    answers = task_kind.names(Dataset("made", rows, rows, rows))
    counting = Counting(make_task(choice, answers, 16).with_tokenizer(tokenizer))
    cache = TokenCache(tokenizer, choice, tuple(answers), 16, PLENTY, task_kind.sources)
    cold = cache.encode(counting, rows)  # type: ignore[arg-type]
    warm = cache.encode(counting, rows)  # type: ignore[arg-type]
    assert same(cold, warm)
    assert same(warm, counting.task.encode(rows))
    assert counting.calls == 1


@pytest.mark.parametrize("kind", TASK_CASES)
def test_windows_segments_and_rows_without_answers_are_kept_too(kind: str) -> None:
    case = TASK_CASES[kind]
    task, sources = case.task(), TASKS[case.kind].sources
    encoded = task.encode(case.rows(12, 0))
    content = packed(encoded, sources)
    assert content is not None
    kept = unpacked(content, sources)
    assert same(kept, encoded)
    # A score reads more of a source than its text does: the very tensors.
    for mine, its in zip(encoded, kept, strict=True):
        for one, other in zip(mine.source or (), its.source or (), strict=True):
            if isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)


def test_a_context_is_written_once() -> None:
    case = TASK_CASES["qa"]
    long = case.rows(1, 0)
    context = "the river went " * 40
    rows = replace(long, columns={**long.columns, "context": (context,), "answers": ((),)})
    encoded = case.task().encode(rows)
    assert len(encoded) > 5
    content = packed(encoded, TASKS["qa"].sources)
    assert content is not None
    assert content.count(context.encode()) == 1


an_example = st.builds(
    lambda ids, labels, row, weight, source: Example(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        row,
        None,
        weight,
        source,
    ),
    st.lists(st.integers(-(2**40), 2**40), max_size=5),
    st.lists(st.integers(-100, 2**33), min_size=2, max_size=2),
    st.integers(0, 9),
    st.integers(0, 9),
    st.none() | st.lists(st.text(), max_size=2),
)


@given(
    examples=st.lists(an_example, min_size=1, max_size=5),
    notes=st.lists(st.text(st.characters(codec="utf-8"))),
    segments=st.booleans(),
)
def test_any_examples_are_what_they_were(
    examples: list[Example], notes: list[str], segments: bool
) -> None:
    if segments:
        examples = [replace(one, segments=torch.zeros_like(one.ids)) for one in examples]
    encoded = Encoded(examples, tuple(notes))
    content = packed(encoded, AS_JSON)
    assert content is not None
    assert same(unpacked(content, AS_JSON), encoded)


def test_every_field_of_an_example_is_kept() -> None:
    """A field more needs a place in the files, and in this list."""
    names = {field.name for field in dataclasses.fields(Example)}
    assert names == {"ids", "labels", "row", "segments", "weight", "source"}


def test_what_cannot_be_kept_is_not() -> None:
    one = Example(torch.tensor([1]), torch.tensor(0))
    wide = replace(one, labels=torch.tensor([0, 1]))
    parted = replace(one, segments=torch.tensor([0]))
    assert packed(Encoded([one, replace(one, source="x")])) is None
    assert packed(Encoded([one, wide])) is None
    assert packed(Encoded([one, parted])) is None
    assert packed(Encoded([])) is None


def test_tokens_are_encoded_anew_once_anything_changes(
    tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, task = rows_of(), task_of(tokenizer)
    other = replace(rows, labels=("b", *rows.labels[1:]))
    pairs = Rows({**rows.columns, "text2": rows.texts}, rows.labels)
    spaced = Rows.of_texts(("word0  ", *rows.texts[1:]), rows.labels)
    wordy: Any = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    wordy.add_tokens(["brandnew"])
    left: Any = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    left.truncation_side = "left"
    ending: Any = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token="[SEP]")
    ending.eos_token = "[PAD]"  # which is a special token of both, so that only the role differs
    chatting: Any = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token="[SEP]")
    chatting.chat_template = "{{ messages[0].content }}"
    asked: list[Callable[[], Encoded]] = []
    for some in (rows, other, pairs, spaced, rows.take([0, 1, 2, 3])):
        asked.append(lambda some=some: cache_of(tokenizer).encode(task, some))  # type: ignore[misc,arg-type]
    for changes in (
        {"tokenizer": wordy},
        {"tokenizer": left},
        {"tokenizer": ending},
        {"tokenizer": chatting},
        {"max_length": 15},
        {"names": ("b", "a", "c")},
        {"choice": TaskSection(metric="macro_f1")},
        {"choice": TaskSection(stride=5)},
        {"choice": TaskSection(chat="never")},
    ):
        asked.append(lambda changes=changes: cache_of(tokenizer, **changes).encode(task, rows))  # type: ignore[misc,arg-type]
    for ask in asked:
        ask()
    assert task.calls == len(asked)
    assert len(list(folder.iterdir())) == len(asked)
    for ask in asked:
        ask()
    assert task.calls == len(asked)
    monkeypatch.setattr(module, "version", lambda name: "next")
    asked[0]()
    assert task.calls == len(asked) + 1


def test_what_a_tokenizer_did_before_changes_nothing(tokenizer: Any) -> None:
    """It sets truncation and padding anew in every call."""
    task = task_of(tokenizer)
    cache_of(tokenizer).encode(task, rows_of())  # type: ignore[arg-type]
    tokenizer(["word0 word1"], truncation=True, max_length=3, padding="max_length")
    cache_of(tokenizer).encode(task, rows_of())  # type: ignore[arg-type]
    assert task.calls == 1


def test_a_damaged_file_is_as_good_as_none(tokenizer: Any, folder: Path) -> None:
    rows, task = rows_of(), task_of(tokenizer)
    right = cache_of(tokenizer).encode(task, rows)  # type: ignore[arg-type]
    [kept] = folder.iterdir()
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for number, damaged in enumerate([b"", b"?", whole[:-1], bytes(flipped), whole[16:]]):
        kept.write_bytes(damaged)
        assert same(cache_of(tokenizer).encode(task, rows), right)  # type: ignore[arg-type]
        assert task.calls == number + 2
        assert kept.read_bytes() == whole


@pytest.mark.skipif(os.name != "posix", reason="files have no modes here")
def test_others_read_no_tokens(tokenizer: Any, folder: Path) -> None:
    """They are a user's texts in another form."""
    usual = os.umask(0)
    try:
        folder.mkdir(parents=True)
        cache_of(tokenizer).encode(task_of(tokenizer), rows_of())  # type: ignore[arg-type]
    finally:
        os.umask(usual)
    [kept] = folder.iterdir()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (kept, folder)]
    assert modes == [0o600, 0o700]


def test_the_longest_unused_go_first(tokenizer: Any, folder: Path) -> None:
    task = task_of(tokenizer)
    several = [rows_of(6, label) for label in ("a", "b", "c")]
    paths: list[Path] = []
    for number, rows in enumerate(several[:2]):
        cache_of(tokenizer).encode(task, rows)  # type: ignore[arg-type]
        paths += set(folder.iterdir()) - set(paths)
        os.utime(paths[-1], (number, number))
    limit = 2 * paths[0].stat().st_size
    cache_of(tokenizer, limit=limit).encode(task, several[0])  # type: ignore[arg-type]  # used again
    assert task.calls == 2
    (folder / "abandoned.17").write_bytes(b"half a file")
    os.utime(folder / "abandoned.17", (0, 0))
    cache_of(tokenizer, limit=limit).encode(task, several[2])  # type: ignore[arg-type]
    left = set(folder.iterdir())
    assert paths[0] in left
    assert len(left) == 2
    assert paths[1] not in left


def test_nothing_is_kept_where_it_may_not_be(
    tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, task = rows_of(), task_of(tokenizer)
    cache_of(tokenizer, limit=0).encode(task, rows)  # type: ignore[arg-type]
    cache_of(tokenizer, limit=50).encode(task, rows)  # type: ignore[arg-type]
    assert not folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "FEWEST", len(rows) + 1)
        cache_of(tokenizer).encode(task, rows)  # type: ignore[arg-type]
    assert not folder.exists()
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    right = task.task.encode(rows)
    assert same(cache_of(tokenizer).encode(task, rows), right)  # type: ignore[arg-type]
