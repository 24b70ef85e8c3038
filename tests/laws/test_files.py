"""Laws of the user's files: what was written is read, in every format; what is wrong is named with file and line."""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import data
from fedpeft.data import Columns, Dataset, Rows, from_files
from fedpeft.data.integers import integer, ordered
from fedpeft.data.rows import stratified
from fedpeft.errors import BadInput
from fedpeft.tasks import TASKS

SCHEMA = TASKS["classification"].schema
ENDINGS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz"]
COLUMNS = ["other", "y", "x", "who"]

a_text = st.text(st.characters(codec="utf-8"))
a_name = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
a_name = a_name.filter(lambda name: integer(name) is None)  # numbers may be written anew
some_rows = st.lists(st.tuples(a_text, a_name, a_name), min_size=1, max_size=8).map(
    lambda rows: Rows.of_texts(*zip(*rows, strict=True))
)


def read(
    path: Path, *, text: str, label: str, key: str | None = None, delimiter: str | None = None
) -> Rows:
    """Read texts with one label each."""
    names = {"text": text, "label": label} | ({} if key is None else {"key": key})
    return data.read(path, Columns(SCHEMA, names, delimiter))


def written(path: Path, rows: Rows) -> Path:
    """Write ``rows`` in the format that the ending of ``path`` names."""
    records = [
        ("?", label, text, key)
        for text, label, key in zip(rows.texts, rows.labels, rows.keys, strict=True)
    ]
    if {".csv", ".tsv"} & set(path.suffixes):
        stream = io.StringIO(newline="")
        delimiter = "\t" if ".tsv" in path.suffixes else ","
        csv.writer(stream, delimiter=delimiter).writerows([COLUMNS, *records])
        content = stream.getvalue()
    else:
        content = "".join(
            json.dumps(dict(zip(COLUMNS, record, strict=True))) + "\n" for record in records
        )
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def spoken(rows: Rows) -> list[dict[str, str]]:
    """Return ``rows`` as objects."""
    return [{"x": text, "y": label} for text, label in zip(rows.texts, rows.labels, strict=True)]


def balanced(labels: Sequence[str], each: int) -> Rows:
    names = [label for label in labels for _ in range(each)]
    return Rows.of_texts(
        tuple(f"text {n}" for n in range(len(names))),
        tuple(names),
        tuple("abc"[n % 3] for n in range(len(names))),
    )


def together(*splits: Rows) -> list[tuple[str, str, str]]:
    return sorted(
        row for rows in splits for row in zip(rows.texts, rows.labels, rows.keys, strict=True)
    )


def load(
    folder: Path, train: str, validation: str | None, test: str | None, fraction: float = 0.1
) -> Dataset:
    return from_files(
        train=folder / train,
        validation=folder / validation if validation else None,
        test=folder / test if test else None,
        columns=Columns(SCHEMA, {"text": "x", "label": "y", "key": "who"}),
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
    path.write_text(
        '{"x": "a", "y": 1, "who": 7}\n\n{"x": "", "y": 1.5, "who": 8}\n{"x": "c", "y": true, "who": "9"}'
    )
    assert read(path, text="x", label="y", key="who") == Rows.of_texts(
        ("a", "", "c"), ("1", "1.5", "true"), ("7", "8", "9")
    )


def test_a_label_may_be_a_very_long_number(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f'{{"x": "a", "y": {"9" * 400}}}')
    assert read(path, text="x", label="y").labels == ("9" * 400,)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes("\ufeffx,y\r\n\ufeffa,b\r\n".encode())
    assert read(path, text="x", label="y") == Rows.of_texts(("\ufeffa",), ("b",))


SHAPES: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "array": json.dumps,
    "array, an object a line": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    "array, a value a line": lambda rows: json.dumps(rows, indent=2),
    "list in an object": lambda rows: json.dumps({"version": 1, "of": ["x", "y"], "rows": rows}),
    "list in an object, a value a line": lambda rows: "\n\n" + json.dumps({"data": rows}, indent=2),
    "an object a line": lambda rows: "\n".join(map(json.dumps, rows)),
}


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_json_is_read_in_every_shape(shape: str, ending: str, tmp_path: Path) -> None:
    rows = balanced(["a", "b"], 3)
    path = tmp_path / f"train{ending}"
    content = SHAPES[shape](spoken(rows)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert read(path, text="x", label="y") == replace(rows, keys=())


def test_an_object_alone_in_its_file_is_a_row_where_it_has_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    for content in ('{"x": "a", "y": "b", "seen": [{}]}', '{\n "x": "a",\n "y": "b"\n}'):
        path.write_text(content)
        assert read(path, text="x", label="y") == Rows.of_texts(("a",), ("b",))


@pytest.mark.parametrize("mark", [";", "\t", "|", "~", ","])
def test_any_character_may_separate_columns(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(f'y{mark}x\nb{mark}"one{mark} two"\n')
    rows = Rows.of_texts((f"one{mark} two",), ("b",))
    names = {"\t": ("\t", "tab", "\\t")}.get(mark, (mark,))
    for name in names:
        assert read(path, text="x", label="y", delimiter=name) == rows
    for above in (f"sep={mark}\n", f'"SEP={mark}"\r\n'):
        path.write_text(f"{above}y{mark}x\nb{mark}two\n")
        assert read(path, text="x", label="y") == Rows.of_texts(("two",), ("b",))


@pytest.mark.parametrize("mark", ["", "ab", '"', "\n"])
def test_what_cannot_separate_columns_is_refused(mark: str, tmp_path: Path) -> None:
    path = written(tmp_path / "train.csv", balanced("ab", 2))
    with pytest.raises(BadInput, match=r"data\.delimiter = .*: must be one character"):
        read(path, text="x", label="y", delimiter=mark)


def test_blank_columns_and_lines_around_a_table_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    for content in (
        "x,y,,\na,b,,\nc,d,,\n",  # a spreadsheet saves columns that were once filled
        "x,y,,\na,b\nc,d\n",
        "x,y\na,b,,\nc,d\n",
        "\n\nx,y\na,b\n\nc,d\n",
        ",,x,y\n0,,a,b\n1,,c,d\n",
        "x,y,\na,b,a remark\nc,d,\n",
    ):
        path.write_text(content)
        assert read(path, text="x", label="y") == Rows.of_texts(("a", "c"), ("b", "d")), content


def test_a_text_may_be_long(tmp_path: Path) -> None:
    rows = Rows.of_texts(("w" * 140_000, "short"), ("a", "b"), ("c", "d"))
    assert read(written(tmp_path / "train.csv", rows), text="x", label="y", key="who") == rows


def test_a_pattern_names_many_files(tmp_path: Path) -> None:
    """Brackets in the folder's name are no pattern; files are read in the order of their names."""
    folder = tmp_path / "data[1]" / "parts"
    folder.mkdir(parents=True)
    parts = [balanced(["a", "b"], size) for size in (3, 1, 2)]
    for name, part in zip(("p3.jsonl", "p1.jsonl", "p2.jsonl.gz"), parts, strict=True):
        written(folder / name, part)
    written(folder / "other.csv", parts[0])
    (folder / "p4.jsonl").mkdir()
    for pattern in ("p*.jsonl*", "p?.json*", "../**/p[0-9].*"):
        assert read(folder / pattern, text="x", label="y", key="who").texts == (
            parts[1].texts + parts[2].texts + parts[0].texts
        )
    with pytest.raises(BadInput, match=r"\*: matches files of several kinds, \.csv, \.jsonl; name"):
        read(folder / "*", text="x", label="y")
    with pytest.raises(BadInput, match=r"q\*\.jsonl: no file matches this pattern"):
        read(folder / "q*.jsonl", text="x", label="y")
    (folder / "p2.jsonl.gz").write_bytes(gzip.compress(b"{"))
    with pytest.raises(BadInput, match=r"parts/p2\.jsonl\.gz:1: not JSON"):
        read(folder / "p*.jsonl*", text="x", label="y")
    written(folder / "[x].jsonl", parts[0])  # what is there is taken as it is
    assert len(read(folder / "[x].jsonl", text="x", label="y")) == 6


def test_a_path_that_the_system_cannot_look_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot be read: .*name too long"):
        read(tmp_path / f"{'long' * 100}.csv", text="x", label="y")


GOOD = b'{"x": "a", "y": "b"}\n'
BROKEN = {
    "no column": (
        "a.jsonl",
        GOOD + b'{"X": "a", "y": "b"}',
        "data.text = \"x\": {path}:2 has no column 'x'; its columns",
    ),
    "near column": ("a.csv", b"xx,y\na,b\n", "its columns are 'xx', 'y'; did you mean 'xx'?"),
    "bad JSON": (
        "a.jsonl",
        GOOD + b'{"x": "a" "y": 1}',
        "{path}:2: not JSON: Expecting ',' delimiter",
    ),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "{path}:1: not JSON: "),
    "no object": (
        "a.jsonl",
        GOOD + b"[1, 2]",
        "{path}:2: each line must hold one JSON object, not '[1",
    ),
    "number in array": (
        "a.json",
        b'[{"x": "a", "y": "b"}, 7]',
        "{path}: record 2: must be a JSON object, not 7; read",
    ),
    "null in array": (
        "a.json",
        b'[\n{"x": "a", "y": null}]',
        "{path}: record 1: the label in column 'y' must be a str",
    ),
    "no column in array": (
        "a.json",
        b'[{"X": "a", "y": "b"}]',
        "{path}: record 1 has no column 'x'; its columns are 'X'",
    ),
    "bad array": (
        "a.json",
        b'[{"x": "a", "y": "b"},\n{"x": "a" "y": 1}]',
        "{path}:2: not JSON: Expecting ',' delimiter",
    ),
    "cut array": (
        "a.json",
        b'[{"x": "a", "y": "b"},\n{"x": "a"\n',
        "{path}:2: not JSON: Expecting ',' delimiter",
    ),
    "cut array between objects": (
        "a.json",
        b'[{"x": "a", "y": "b"}\n\n',
        "{path}:1: not JSON: Expecting ',' delimiter",
    ),
    "no comma in array": (
        "a.json",
        b'[{"x": "a", "y": "b"}\n{"x": "a", "y": "b"}]',
        "{path}:2: not JSON: Expecting ',' delimiter",
    ),
    "comma at the end of array": (
        "a.json",
        b'[{"x": "a", "y": "b"},\n]',
        "{path}:2: not JSON: Illegal trailing comma",
    ),
    "two arrays": (
        "a.json",
        b'[{"x": "a", "y": "b"}]\n[]',
        "{path}:2: not JSON: Extra data; read are: an object a line",
    ),
    "twin names in array": (
        "a.json",
        b'[{"x": "a", "y": "b"},\n{"x": "a", "x": "b", "y": "b"}]',
        "{path}:2: not JSON: two values of one object are",
    ),
    "not UTF-8 in array": (
        "a.json",
        b'[{"x": "a", "y": "b"},\n{"x": "\xe9", "y": "b"}]',
        "{path}:2: not UTF-8: invalid continuation byte at byte 7",
    ),
    "cut first line": (
        "a.json",
        b'{"x": "a", "y":\n' + GOOD,
        "{path}:1: not JSON: Expecting value",
    ),
    "arrays a line": (
        "a.jsonl",
        b'["x", "y"]\n["a", "b"]\n',
        '{path}: record 1: must be a JSON object, not "x"; read are: an object a line',
    ),
    "two lists": (
        "a.json",
        b'{"p": [{"x": "a"}], "q": [{}]}',
        "{path}:1: one object, and its lists of objects are: 'p', 'q'",
    ),
    "columns of lists": (
        "a.json",
        b'{"x": ["a"], "y": ["b"]}',
        "{path}:1: one object, and its lists of objects are: none",
    ),
    "columns of objects": (
        "a.json",
        b'{\n"x": {"0": "a"},\n"y": {"0": "b"}}',
        "lists of objects are: none; read are: an",
    ),
    "empty array": ("a.json", b"[]", "{path}: holds no rows"),
    "empty list": ("a.json", b'{"data": []}', "{path}: holds no rows"),
    "colon": ("a.jsonl", b'{"x" 1}', "{path}:1: not JSON: Expecting ':' delimiter"),
    "twin names": (
        "a.jsonl",
        GOOD + b'{"x": "a", "x": "b", "y": "b"}',
        "{path}:2: not JSON: two values of one object are",
    ),
    "NaN": ("a.jsonl", GOOD + b'{"x": "a", "y": NaN}', "{path}:2: the label in column 'y' is NaN"),
    "infinity": (
        "a.json",
        b'[{"x": "a", "y": -Infinity}]',
        "{path}: record 1: the label in column 'y' is -Infinity",
    ),
    "nan as text": (
        "a.csv",
        b"x,y\na,1.0\nb,nan\nc,0.0\n",
        "{path}:3: the label is 'nan', and all others are whole num",
    ),
    "semicolons": (
        "a.csv",
        b"x;y\na;b\n",
        "{path}:1: the columns are 'x;y'; if it is ; that stands between them, set data.delimiter",
    ),
    "semicolons and a comma": ("a.csv", b"x;y;a, b\na;b;c\n", 'set data.delimiter = ";"'),
    "tabs": ("a.csv", b"x\ty\na\tb\n", 'set data.delimiter = "tab"'),
    "bars": ("a.csv", b"x|y\na|b\n", 'set data.delimiter = "|"'),
    "commas": ("a.tsv", b"x,y\na,b\n", 'set data.delimiter = ","'),
    "no header": (
        "a.csv",
        b"good film,yes\nbad film,no\nfine,yes\n",
        "{path}:1: the first line is data, not a header: 'good film', 'yes'; "
        "write a line above it that names the columns, such as x,y",
    ),
    "no header, long": (
        "a.tsv",
        b"word " * 20 + b"\tyes\nb\tno\n",
        "first line is data, not a header: 'word word",
    ),
    "pandas without names": (
        "a.csv",
        b"0,1\na,1\nb,0\n",
        "{path}:2 has no column 'x'; its columns are '0', '1'",
    ),
    "misspelt": ("a.csv", b"xx,y\na,y\n", "its columns are 'xx', 'y'; did you mean 'xx'?"),
    "Mac": ("a.csv", b"x,y\ra,b\r", "{path}:1: not CSV: new-line character seen"),
    "open quote far below": (
        "a.csv",
        b'x,y\na,b\n"c,d\n' + b"e,f\n" * 9,
        "{path}:3: not CSV: unexpected end of data; the",
    ),
    "below Excel's line": (
        "a.csv",
        b"sep=;\nx;y\na;b;c\n",
        "{path}:3: 3 fields where the header names 2",
    ),
    "UTF-16": (
        "a.csv",
        "x,y\na,b\n".encode("utf-16"),
        "{path}:1: not UTF-8: invalid start byte at byte 0 of the line; s",
    ),
    "number as text": (
        "a.jsonl",
        GOOD * 2 + b'{"x": 3, "y": "b"}',
        "{path}:3: the text in column 'x' must be a string, not 3",
    ),
    "null label": (
        "a.jsonl",
        b'{"x": "a", "y": null}',
        "{path}:1: the label in column 'y' must be a string, not null",
    ),
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
    "too many fields": (
        "a.csv",
        b"x,y\na,b\na,b,c\n",
        "{path}:3: 3 fields where the header names 2",
    ),
    "too few fields": ("a.csv", b"x,y\na\n", "{path}:2: 1 fields where the header names 2"),
    "open quote": ("a.csv", b'x,y\n"a,b\n', "{path}:2: not CSV: unexpected end of data"),
    "twin columns": (
        "a.csv",
        b"x,y,x\na,b,c\n",
        "{path}:1: two columns have the same name among 'x', 'y', 'x'",
    ),
    "empty": ("a.jsonl", b"", "{path}: holds no rows"),
    "header only": ("a.csv", b"x,y\n", "{path}: holds no rows"),
    "empty gzip": ("a.csv.gz", b"", "{path}: holds no rows"),
    "not gzip": ("a.jsonl.gz", GOOD, "{path}: cannot be read: Not a gzipped file"),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(GOOD)[:-4],
        "cannot be read: Compressed file ended before",
    ),
    "garbled gzip": (
        "a.jsonl.gz",
        gzip.compress(GOOD)[:10] + bytes([255] * 20),
        "cannot be read: Error -3 while",
    ),
    "damaged gzip": (
        "a.jsonl.gz",
        gzip.compress(GOOD)[:-8] + bytes(8),
        "cannot be read: CRC check failed",
    ),
    "ending": (
        "a.txt",
        GOOD,
        "{path}: unknown ending '.txt'; known are .jsonl, .ndjson, .json, .csv, .tsv, .parquet",
    ),
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
    rows = Rows.of_texts(tuple(f"text {n}" for n in range(len(labels))), labels, labels)
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
    assert [text for text in rows.texts if text in both.test.texts] == list(
        both.test.texts
    )  # in the file's order
    assert Counter(both.validation.labels) == {
        "a": 4,
        "b": 4,
        "c": 4,
    }  # a tenth of the 40 that are left
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
    validation, test = (
        "other.jsonl" if name == split else "train.jsonl" for name in ("validation", "test")
    )
    with pytest.raises(BadInput) as caught:
        load(tmp_path, "train.jsonl", validation, test)
    assert str(caught.value) == f"{path}:3: train has no label 'travels'; did you mean 'travel'?"


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_whole_numbers_are_labels_in_the_order_of_numbers(ending: str, tmp_path: Path) -> None:
    numbers = [str(number) for number in range(-2, 12)]
    written(tmp_path / f"train{ending}", balanced([*reversed(numbers)], 3))
    data = load(tmp_path, f"train{ending}", None, None)
    assert data.labels == tuple(numbers)
    assert Dataset("", data.train, data.validation, data.train).labels == tuple(numbers)


WRITTEN = {
    "numbers": ('{"x": "t%d", "y": %d, "who": %d}', ".jsonl"),
    "numbers with a point": ('{"x": "t%d", "y": %d.0, "who": %d.00}', ".jsonl"),
    "text": ('{"x": "t%d", "y": "%d", "who": " %d"}', ".jsonl"),
    "columns": ("t%d,%d,%d", ".csv"),
    "columns with a point": ("t%d,%d.0,%d.0", ".csv"),
}


def numbered(folder: Path, name: str, how: str) -> str:
    """Write 12 rows of labels 0 to 2 and keys 7 and 8 and return the file's name."""
    line, ending = WRITTEN[how]
    head = ["x,y,who"] if ending == ".csv" else []
    lines = [line % (number, number % 3, 7 + number % 2) for number in range(12)]
    (folder / f"{name}{ending}").write_text("\n".join(head + lines))
    return f"{name}{ending}"


@pytest.mark.parametrize("test", WRITTEN)
@pytest.mark.parametrize("train", WRITTEN)
def test_a_number_is_one_label_and_one_key_however_it_is_written(
    train: str,
    test: str,
    tmp_path: Path,
) -> None:
    files = [numbered(tmp_path, "train", train), numbered(tmp_path, "test", test)]
    data = load(tmp_path, files[0], files[1], files[1])
    for rows in (data.train, data.validation, data.test):
        assert rows.labels == tuple("012" * 4)
        assert rows.keys == tuple("78" * 6)
    assert data.labels == ("0", "1", "2")


def test_a_number_is_one_label_within_a_file(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    values = ("0", "0.0", '"-0"', "1e1")
    path.write_text("\n".join(f'{{"x": "a", "y": {value}}}' for value in values))
    assert read(path, text="x", label="y").labels == ("0", "0", "0", "10")


NOT_NUMBERS = [
    ["0", "1.0", "none"],
    ["01", "02", "10"],
    ["+1", "-1"],
    ["1.5", "1", "1.0"],
    ["a", "nan"],
]


@pytest.mark.parametrize("labels", NOT_NUMBERS)
def test_labels_that_are_not_all_whole_numbers_stay_as_they_are(
    labels: list[str],
    tmp_path: Path,
) -> None:
    written(tmp_path / "train.csv", balanced(labels, 4))
    data = load(tmp_path, "train.csv", "train.csv", "train.csv")
    assert data.labels == tuple(sorted(labels))
    assert data.test.labels == tuple(label for label in labels for _ in range(4))


def test_a_whole_number_that_train_lacks_is_refused(tmp_path: Path) -> None:
    files = [numbered(tmp_path, "train", "numbers"), "test.csv"]
    for label, said in (("3.0", "'3'"), ("x", "'x'"), ("nan", "'nan'")):
        (tmp_path / "test.csv").write_text(f"x,y,who\na,1.0,7\nb,{label},7\n")
        with pytest.raises(BadInput, match=rf"test\.csv:3: .*{said}"):
            load(tmp_path, files[0], files[0], files[1])


def test_order_is_that_of_numbers_only_where_all_are() -> None:
    assert ordered(["2", "10", "-3", "2"]) == ("-3", "2", "10")
    assert ordered(["2", "10", "x"]) == ("10", "2", "x")
    assert [integer(name) for name in ("3", " 3.00\n", "-0.0")] == ["3", "3", "0"]
    assert not any(integer(name) for name in ("03", "+3", "3.5", "1e3", "", "9" * 5000))


def test_rows_know_where_they_stood_in_trains_file(tmp_path: Path) -> None:
    rows = balanced(["a", "b"], 20)
    written(tmp_path / "train.jsonl", rows)
    data = load(tmp_path, "train.jsonl", None, None)
    for part in (data.train, data.validation, data.test):
        assert part.texts == tuple(rows.texts[number] for number in part.numbers)
    numbers = data.train.numbers + data.validation.numbers + data.test.numbers
    assert sorted(numbers) == list(range(40))
    assert load(tmp_path, "train.jsonl", None, "train.jsonl").test.numbers == ()


def test_train_that_is_too_small_to_split_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", balanced(["a", "b"], 1))
    with pytest.raises(BadInput, match=r"data\.test: every label has a single row in train"):
        load(tmp_path, "train.jsonl", None, None)
    with pytest.raises(
        BadInput, match=r"data\.validation_fraction = 1\.0: must lie between 0 and 1"
    ):
        load(tmp_path, "train.jsonl", None, "train.jsonl", 1.0)


def test_digest_tells_data_apart_and_ignores_the_name() -> None:
    rows = balanced(["a", "b"], 3)
    data = Dataset("one", rows, rows, rows)
    assert replace(data, name="two").digest() == data.digest()
    swapped = rows.take([1, 0, 2, 3, 4, 5])
    changed = [swapped, replace(rows, keys=()), replace(rows, labels=(*rows.labels[:-1], "a"))]
    others = [
        Dataset("one", *splits)
        for other in changed
        for splits in ((other, rows, rows), (rows, other, rows), (rows, rows, other))
    ]
    assert len({data.digest(), *(other.digest() for other in others)}) == 1 + 3 * 3


def test_majority_is_what_always_saying_trains_commonest_label_scores() -> None:
    train, test = balanced(["b", "c"], 3), Rows.of_texts(("", "", "", ""), ("b", "b", "c", "b"))
    assert Dataset("", train, train, test).majority(test.labels) == 0.75  # of equals, the first
    more = train.take([0, 3, 4, 5])
    assert Dataset("", more, more, test).majority(test.labels) == 0.25
