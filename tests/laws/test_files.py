"""Laws of the user's files: what was written is read, in every format; what is wrong is named with file and line."""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data import Dataset, Rows, from_files, read
from fedpeft.data.rows import stratified
from fedpeft.types import BadInput

ENDINGS = [".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz"]
COLUMNS = ["other", "y", "x", "who"]

a_text = st.text(st.characters(codec="utf-8"))
a_name = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
some_rows = st.lists(st.tuples(a_text, a_name, a_name), min_size=1, max_size=8).map(
    lambda rows: Rows(*(tuple(column) for column in zip(*rows, strict=True)))
)


def written(path: Path, rows: Rows) -> Path:
    """Write ``rows`` in the format that the ending of ``path`` names."""
    records = [("?", label, text, key) for text, label, key in zip(rows.texts, rows.labels, rows.keys, strict=True)]
    if ".csv" in path.suffixes:
        stream = io.StringIO(newline="")
        csv.writer(stream).writerows([COLUMNS, *records])
        content = stream.getvalue()
    else:
        content = "".join(json.dumps(dict(zip(COLUMNS, record, strict=True))) + "\n" for record in records)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def balanced(labels: Sequence[str], each: int) -> Rows:
    names = [label for label in labels for _ in range(each)]
    return Rows(tuple(f"text {n}" for n in range(len(names))), tuple(names), tuple("abc"[n % 3] for n in range(len(names))))


def together(*splits: Rows) -> list[tuple[str, str, str]]:
    return sorted(row for rows in splits for row in zip(rows.texts, rows.labels, rows.keys, strict=True))


def load(folder: Path, train: str, validation: str | None, test: str | None, fraction: float = 0.1) -> Dataset:
    return from_files(
        train=folder / train,
        validation=folder / validation if validation else None,
        test=folder / test if test else None,
        text="x",
        label="y",
        key="who",
        validation_fraction=fraction,
        test_fraction=0.2,
        seed=3,
    )


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=30, deadline=None)
@given(rows=some_rows)
def test_what_was_written_is_read(ending: str, rows: Rows) -> None:
    with TemporaryDirectory() as folder:
        path = written(Path(folder, f"train{ending}"), rows)
        assert read(path, text="x", label="y", key="who") == rows
        assert read(path, text="x", label="y") == replace(rows, keys=())


def test_numbers_become_the_strings_that_json_writes(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"x": "a", "y": 1, "who": 7}\n\n{"x": "", "y": 1.5, "who": 8}\n{"x": "c", "y": true, "who": "9"}')
    assert read(path, text="x", label="y", key="who") == Rows(("a", "", "c"), ("1", "1.5", "true"), ("7", "8", "9"))


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes("\ufeffx,y\r\n\ufeffa,b\r\n".encode())
    assert read(path, text="x", label="y") == Rows(("\ufeffa",), ("b",))


GOOD = b'{"x": "a", "y": "b"}\n'
BROKEN = {
    "no column": (
        "a.jsonl",
        GOOD + b'{"X": "a", "y": "b"}',
        "data.text = \"x\": {path}:2 has no column 'x'; its columns",
    ),
    "near column": ("a.csv", b"xx,y\na,b\n", "its columns are 'xx', 'y'; did you mean 'xx'?"),
    "bad JSON": ("a.jsonl", GOOD + b'{"x": "a" "y": 1}', "{path}:2: not JSON: Expecting ',' delimiter"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "{path}:1: not JSON: "),
    "an array": ("a.json", b'[{"x": "a", "y": "b"}]', "{path}:1: each line must hold one JSON object, not '[{"),
    "number as text": (
        "a.jsonl",
        GOOD * 2 + b'{"x": 3, "y": "b"}',
        "{path}:3: the text in column 'x' must be a string, not 3",
    ),
    "null label": ("a.jsonl", b'{"x": "a", "y": null}', "{path}:1: the label in column 'y' must be a string, not null"),
    "empty label": ("a.csv", b"x,y\na,b\nc, \n", "{path}:3: the label in column 'y' is empty"),
    "half a pair": (
        "a.jsonl",
        b'{"x": "\\ud83d", "y": "b"}',
        "{path}:1: the text in column 'x' holds half a surrogate pair",
    ),
    "not UTF-8": (
        "a.jsonl",
        GOOD + b'{"x": "\xe9", "y": "b"}',
        "{path}:2: not UTF-8: invalid continuation byte at byte 7",
    ),
    "too many fields": ("a.csv", b"x,y\na,b\na,b,c\n", "{path}:3: 3 fields where the header names 2"),
    "too few fields": ("a.csv", b"x,y\na\n", "{path}:2: 1 fields where the header names 2"),
    "open quote": ("a.csv", b'x,y\n"a,b\n', "{path}:2: not CSV: unexpected end of data"),
    "twin columns": ("a.csv", b"x,y,x\na,b,c\n", "{path}:1: two columns have the same name among 'x', 'y', 'x'"),
    "empty": ("a.jsonl", b"", "{path}: holds no rows"),
    "header only": ("a.csv", b"x,y\n", "{path}: holds no rows"),
    "empty gzip": ("a.csv.gz", b"", "{path}: holds no rows"),
    "not gzip": ("a.jsonl.gz", GOOD, "{path}: cannot be read: Not a gzipped file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD)[:-4], "cannot be read: Compressed file ended before"),
    "garbled gzip": ("a.jsonl.gz", gzip.compress(GOOD)[:10] + bytes([255] * 20), "cannot be read: Error -3 while"),
    "damaged gzip": ("a.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(8), "cannot be read: CRC check failed"),
    "ending": ("a.txt", GOOD, "{path}: unknown ending '.txt'; known are .jsonl, .json, .csv, each also with .gz"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_with_file_and_line(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read(path, text="x", label="y")
    assert message.replace("{path}", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", balanced("ab", 2))
    with pytest.raises(BadInput, match=r"no such file; did you mean 'train\.jsonl'"):
        read(tmp_path / "tran.jsonl", text="x", label="y")
    with pytest.raises(BadInput, match=r"there is no folder .*nowhere"):
        read(tmp_path / "nowhere" / "train.jsonl", text="x", label="y")
    with pytest.raises(BadInput, match="is a folder"):
        read(tmp_path, text="x", label="y")


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5), fraction=st.floats(0.01, 0.99))
def test_stratified_takes_its_share_of_every_label(sizes: list[int], fraction: float) -> None:
    labels = tuple(str(label) for label, size in enumerate(sizes) for _ in range(size))
    rows = Rows(tuple(f"text {n}" for n in range(len(labels))), labels, labels)
    kept, taken = stratified(rows, fraction, 0)
    assert together(kept, taken) == together(rows)
    for label, size in enumerate(sizes):
        expected = 0 if size == 1 else min(max(round(fraction * size), 1), size - 1)
        assert Counter(taken.labels)[str(label)] == expected
    moved = stratified(rows.take(reversed(range(len(labels)))), fraction, 0)
    assert [together(part) for part in moved] == [together(kept), together(taken)]


def test_splits_that_are_not_given_are_taken_from_train(tmp_path: Path) -> None:
    rows = balanced(["a", "b", "c"], 50)
    written(tmp_path / "train.jsonl", rows)
    written(tmp_path / "test.csv.gz", balanced(["a", "c"], 5))
    both = load(tmp_path, "train.jsonl", None, None)
    assert together(both.train, both.validation, both.test) == together(rows)
    assert Counter(both.test.labels) == {"a": 10, "b": 10, "c": 10}
    assert [text for text in rows.texts if text in both.test.texts] == list(both.test.texts)  # in the file's order
    assert Counter(both.validation.labels) == {"a": 4, "b": 4, "c": 4}  # a tenth of the 40 that are left
    one = load(tmp_path, "train.jsonl", None, "test.csv.gz", 0.3)
    assert one.test == balanced(["a", "c"], 5)
    assert together(one.train, one.validation) == together(rows)
    assert Counter(one.validation.labels) == {"a": 15, "b": 15, "c": 15}
    none = load(tmp_path, "train.jsonl", "train.jsonl", "test.csv.gz")
    assert (none.train, none.validation, none.test) == (rows, rows, one.test)
    assert none.name == f"{tmp_path.name}/train.jsonl"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_that_train_lacks_is_refused(split: str, tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", balanced(["sport", "travel"], 4))
    path = written(tmp_path / "other.jsonl", balanced(["sport", "travels"], 2))
    validation, test = ("other.jsonl" if name == split else "train.jsonl" for name in ("validation", "test"))
    with pytest.raises(BadInput) as caught:
        load(tmp_path, "train.jsonl", validation, test)
    assert str(caught.value) == f"{path}:3: train has no label 'travels'; did you mean 'travel'?"


def test_train_that_is_too_small_to_split_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", balanced(["a", "b"], 1))
    with pytest.raises(BadInput, match=r"data\.test: every label has a single row in train"):
        load(tmp_path, "train.jsonl", None, None)
    with pytest.raises(BadInput, match=r"data\.validation_fraction = 1\.0: must lie between 0 and 1"):
        load(tmp_path, "train.jsonl", None, "train.jsonl", 1.0)


def test_digest_tells_data_apart_and_ignores_the_name() -> None:
    rows = balanced(["a", "b"], 3)
    data = Dataset("one", rows, rows, rows)
    assert replace(data, name="two").digest() == data.digest()
    swapped = rows.take([1, 0, 2, 3, 4, 5])
    changed = [swapped, replace(rows, keys=()), replace(rows, labels=(*rows.labels[:-1], "a"))]
    others = [Dataset("one", *splits) for other in changed for splits in set(permutations([rows, rows, other]))]
    assert len({data.digest(), *(other.digest() for other in others)}) == 1 + 3 * 3


def test_majority_is_what_always_saying_trains_commonest_label_scores() -> None:
    train, test = balanced(["b", "c"], 3), Rows(("", "", "", ""), ("b", "b", "c", "b"))
    assert Dataset("", train, train, test).majority(test.labels) == 0.75  # of equals, the first
    more = train.take([0, 3, 4, 5])
    assert Dataset("", more, more, test).majority(test.labels) == 0.25
