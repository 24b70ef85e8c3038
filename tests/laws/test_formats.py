"""Laws of formats: what was written is read in every one, packed or not; the same rows come of all; what is wrong is told in a line."""

import bz2
import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from fedpeft import data
from fedpeft.data import Columns, Dataset, Rows, from_files
from fedpeft.data.integers import integer
from fedpeft.data.records import records
from fedpeft.errors import BadInput
from fedpeft.tasks import TASKS
from fedpeft.tasks.tag_schemes import bio

TEXTS = Columns(TASKS["classification"].schema, {"text": "x", "label": "y", "key": "who"})
WORDS = Columns(TASKS["tagging"].schema, {"words": "tokens", "tags": "tags"})
COLUMNS = ("other", "y", "x", "who")

Record = dict[str, Any]


def as_lines(rows: Sequence[Record]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_array(rows: Sequence[Record]) -> bytes:
    return json.dumps(list(rows)).encode()


def as_columns(rows: Sequence[Record], mark: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=mark)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def of_table(table: Any, group: int = 3) -> bytes:
    stream = io.BytesIO()
    write_table(table, stream, row_group_size=group)
    return stream.getvalue()


def as_parquet(rows: Sequence[Record], group: int = 3) -> bytes:
    return of_table(pyarrow.Table.from_pylist(list(rows)), group)


FORMATS: dict[str, Callable[[Sequence[Record]], bytes]] = {
    ".jsonl": as_lines,
    ".ndjson": as_lines,
    ".json": as_array,
    ".csv": lambda rows: as_columns(rows, ","),
    ".tsv": lambda rows: as_columns(rows, "\t"),
    ".parquet": as_parquet,
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}

a_text = st.text(st.characters(codec="utf-8"))
a_name = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
a_name = a_name.filter(lambda name: integer(name) is None)  # numbers may be written anew
some_rows = st.lists(st.tuples(a_text, a_name, a_name), min_size=1, max_size=8).map(
    lambda rows: Rows.of_texts(*zip(*rows, strict=True))
)
# Neither blanks nor line ends, which would part words.
a_word = st.text(st.characters(codec="utf-8", exclude_characters=" \t\r\n\ufeff"), min_size=1)
a_word = a_word.filter(lambda word: word != "-DOCSTART-")
a_tag = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "ORG"])
a_sentence = st.lists(st.tuples(a_word, a_tag), min_size=1, max_size=6)
# A folder's name; no file system takes all others.
a_folder = st.text("abcdef 0123-", min_size=1, max_size=6).map(lambda name: f"n{name}n")


def spoken(rows: Rows) -> list[Record]:
    values = zip(rows.labels, rows.texts, rows.keys, strict=True)
    return [dict(zip(COLUMNS, ("?", *row), strict=True)) for row in values]


def put(path: Path, content: bytes) -> Path:
    """Write a file that is packed as its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packing = path.suffix if path.suffix in PACKINGS else ""
    path.write_bytes(PACKINGS[packing](content))
    return path


def balanced(labels: Sequence[str], each: int) -> Rows:
    names = tuple(label for label in labels for _ in range(each))
    texts = tuple(f"text {number}" for number in range(len(names)))
    return Rows.of_texts(texts, names, tuple("ab"[number % 2] for number in range(len(names))))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ending", FORMATS)
@settings(max_examples=15, deadline=None)
@given(rows=some_rows)
def test_what_was_written_is_read(ending: str, packing: str, rows: Rows) -> None:
    with TemporaryDirectory() as folder:
        path = put(Path(folder, f"train{ending}{packing}"), FORMATS[ending](spoken(rows)))
        assert data.read(path, TEXTS) == rows


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(a_folder, a_text), min_size=1, max_size=8))
def test_what_was_written_is_read_from_a_folder(packing: str, rows: list[tuple[str, str]]) -> None:
    columns = Columns(
        TASKS["classification"].schema, {"text": "text", "label": "label", "key": "file"}
    )
    with TemporaryDirectory() as folder:
        for number, (label, text) in enumerate(rows):
            put(Path(folder, label, f"{number}.txt{packing}"), ("\ufeff" + text).encode())
        found = data.read(Path(folder), columns)
    expected = {
        (f"{label}/{number}.txt{packing}", label, text) for number, (label, text) in enumerate(rows)
    }
    assert set(zip(found.keys, found.labels, found.texts, strict=True)) == expected
    assert list(found.keys) == sorted(found.keys)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ending", [".conll", ".bio", ".iob"])
@pytest.mark.parametrize("mark", [" ", "\t", "   "])
@settings(max_examples=10, deadline=None)
@given(sentences=st.lists(a_sentence, min_size=1, max_size=5))
def test_what_was_written_is_read_from_columns_of_words(
    mark: str, ending: str, packing: str, sentences: list[list[tuple[str, str]]]
) -> None:
    written = f"-DOCSTART-{mark}-X-{mark}O\n\n"
    for sentence in sentences:
        written += "".join(f"{word}{mark}NN{mark}{tag}\r\n" for word, tag in sentence) + " \n"
    with TemporaryDirectory() as folder:
        path = put(Path(folder, f"train{ending}{packing}"), written.encode())
        rows = data.read(path, WORDS)
        numbered = data.read(path, Columns(WORDS.schema, {"words": "1", "tags": "3"}))
        middle = [record["2"] for _, record in records(path, (), None)]
    assert rows.columns["words"] == tuple(tuple(w for w, _ in one) for one in sentences)
    assert rows.columns["tags"] == tuple(tuple(t for _, t in one) for one in sentences)
    assert numbered == rows
    assert middle == [["NN"] * len(one) for one in sentences]


def test_the_same_rows_come_of_every_format(tmp_path: Path) -> None:
    """Of text columns and of columns of numbers; 2 stands before 10."""
    rows = balanced(["10", "2", "9"], 4)
    numbers = [{**row, "y": int(row["y"])} for row in spoken(rows)]
    points = [{**row, "y": float(row["y"])} for row in spoken(rows)]
    read: list[Rows] = []
    for ending, write in FORMATS.items():
        for packing in PACKINGS:
            for number, records_of in enumerate((spoken(rows), numbers, points)):
                path = put(tmp_path / f"{number}{ending}{packing}", write(records_of))
                read.append(data.read(path, TEXTS))
    assert read == [rows] * len(read)
    whole = from_files(train=path, validation=path, test=path, columns=TEXTS)
    assert whole.labels == ("2", "9", "10")


def test_sentences_are_the_same_in_every_format(tmp_path: Path) -> None:
    """IOB1, as CoNLL-2003 has it, in columns; lists in JSON and in Parquet."""
    tokens, tags = ["U.N.", "official", "Ekeus"], ["I-ORG", "O", "I-PER"]
    record = {"tokens": tokens, "tags": tags}
    columns = b"U.N. NNP I-NP I-ORG\nofficial NN I-NP O\nEkeus NNP I-NP I-PER\n\n"
    paths = [
        put(tmp_path / "a.jsonl", as_lines([record] * 2)),
        put(tmp_path / "a.parquet.zst", as_parquet([record] * 2)),
        put(tmp_path / "a.conll", columns * 2),
    ]
    read = [data.read(path, WORDS) for path in paths]
    assert read[0] == read[1] == read[2]
    assert bio(read[0].columns["tags"][0]) == ("B-ORG", "O", "B-PER")


@pytest.mark.parametrize("ending", [*FORMATS, ".conll"])
def test_a_pattern_names_files_packed_in_any_way(ending: str, tmp_path: Path) -> None:
    if ending == ".conll":
        part, columns = b"Ada B-PER\nleft O\n", WORDS
    else:
        part, columns = FORMATS[ending](spoken(balanced("ab", 2))), TEXTS
    for number, packing in enumerate(PACKINGS):
        put(tmp_path / f"part{number}{ending}{packing}", part)
    one = data.read(tmp_path / f"part0{ending}", columns)
    assert len(data.read(tmp_path / f"part*{ending}*", columns)) == 3 * len(one)


def test_a_file_of_several_zstd_frames_is_read_to_its_end(tmp_path: Path) -> None:
    rows = balanced("ab", 2)
    pack = zstandard.ZstdCompressor().compress
    frames = [pack(line + b"\n") for line in as_lines(spoken(rows)).splitlines()]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert data.read(tmp_path / "a.jsonl.zst", TEXTS) == rows


STREAMED: dict[str, bytes] = {
    ".jsonl": as_lines([{"x": "a", "y": "b"}] * 3) + b"{broken",
    ".csv": b"x,y\na,b\na,b\na,b,c\n",
    ".conll": b"a O\n\na O\n\nbroken\n",
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ending", STREAMED)
def test_records_come_before_the_file_is_read_to_its_end(
    ending: str, packing: str, tmp_path: Path
) -> None:
    path = put(tmp_path / f"a{ending}{packing}", STREAMED[ending])
    located = records(path, ("x", "y"), None)
    next(located)
    next(located)
    with pytest.raises(BadInput):
        list(located)


def test_parquet_is_read_by_batches_and_only_what_is_wanted(tmp_path: Path) -> None:
    rows = [{"x": str(number), "y": "b", "picture": b"\xff"} for number in range(2500)]
    path = put(tmp_path / "a.parquet", as_parquet(rows, group=1000))
    located = list(records(path, ("y", "x"), None, only_these=True))
    assert [record for _, record in located] == [{"x": row["x"], "y": "b"} for row in rows]
    assert located[2499][0] == f"{path}: record 2500"
    assert next(records(path, ("y", "x"), None))[1] == rows[0]
    assert next(records(path, ("lacking",), None, only_these=True))[1] == rows[0]


def test_numbers_of_classes_in_a_file_of_the_hub_become_their_names(tmp_path: Path) -> None:
    """What ``datasets`` writes into a Parquet file, also of lists; -1 is no class."""
    label = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    for list_of in (
        {"feature": label, "_type": "List"},
        {"feature": label, "length": -1, "_type": "Sequence"},
        [label],
    ):
        about = {"info": {"features": {"y": label, "all": list_of, "x": {"_type": "Value"}}}}
        table = pyarrow.table({"x": ["a", "b"], "y": [1, -1], "all": [[0, 1], []]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
        write_table(table, tmp_path / "a.parquet")
        found = [record for _, record in records(tmp_path / "a.parquet", (), None)]
        assert found == [
            {"x": "a", "y": "pos", "all": ["neg", "pos"]},
            {"x": "b", "y": None, "all": []},
        ]


def test_what_is_no_text_beside_the_texts_of_a_folder_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "pos" / "1.txt", b"good")
    put(tmp_path / "pos" / "notes.md", b"?")
    put(tmp_path / "pos" / ".2.txt", b"?")
    put(tmp_path / ".cache" / "1.txt", b"?")
    put(tmp_path / "urls.txt", b"?")
    (tmp_path / "empty").mkdir()
    assert data.read(tmp_path, Columns(TEXTS.schema, {"text": "text", "label": "label"})) == (
        Rows.of_texts(("good",), ("pos",))
    )


GOOD = as_lines([{"x": "a", "y": "b"}])
ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD * 50)
PARQUET = as_parquet([{"x": "a", "y": "b"}])
BROKEN: dict[str, tuple[str, bytes, Columns, str]] = {
    "no zstd": ("a.jsonl.zst", GOOD, TEXTS, "{path}: cannot be read: not zstd: "),
    "cut zstd": ("a.jsonl.zst", ZSTD[:-9], TEXTS, "ends before its last frame does"),
    "no gzip": ("a.conll.gz", b"a O", WORDS, "{path}: cannot be read: Not a gzipped file"),
    "empty zstd": ("a.csv.zst", b"", TEXTS, "{path}: holds no rows"),
    "bzip2": ("a.jsonl.bz2", bz2.compress(GOOD), TEXTS, "{path}: unknown ending '.bz2'; known are"),
    "line in zstd": ("a.jsonl.zst", PACKINGS[".zst"](GOOD + b"{"), TEXTS, "{path}:1 has no column"),
    "no Parquet": ("a.parquet", GOOD * 9, TEXTS, "{path}: not Parquet: "),
    "empty Parquet": ("a.parquet", b"", TEXTS, "{path}: not Parquet: "),
    "cut Parquet": ("a.parquet", PARQUET[:-20], TEXTS, "{path}: not Parquet: "),
    "damaged Parquet": (
        "a.parquet",
        PARQUET[:4] + bytes(40) + PARQUET[44:],
        TEXTS,
        "{path}: not Parquet: ",
    ),
    "twin columns": (
        "a.parquet",
        of_table(pyarrow.Table.from_arrays([["a"], ["b"]], ["x", "x"])),
        TEXTS,
        "{path}: two columns have the same name among 'x', 'x'",
    ),
    "no rows": (
        "a.parquet",
        of_table(pyarrow.table({"x": [], "y": [], "who": []})),
        TEXTS,
        "{path}: holds no rows",
    ),
    "near column": (
        "a.parquet",
        as_parquet([{"xx": "a", "y": "b"}]),
        TEXTS,
        "data.text = \"x\": {path}: record 1 has no column 'x'; its columns are 'xx', 'y'; did you",
    ),
    "null": (
        "a.parquet",
        as_parquet([{"x": "a", "y": "b", "who": "c"}, {"x": None, "y": "b", "who": "c"}]),
        TEXTS,
        "{path}: record 2: the text in column 'x' must be a string, not null",
    ),
    "bytes": (
        "a.parquet",
        as_parquet([{"x": b"a", "y": "b", "who": "c"}]),
        TEXTS,
        "{path}: record 1: the text in column 'x' must be a string, not \"b'a'\"",
    ),
    "word alone": (
        "a.conll",
        b"Ada B-PER\nleft\n",
        WORDS,
        "{path}:2: 'left' stands alone; a line holds a word and its tag",
    ),
    "columns": (
        "a.bio",
        b"\nAda NNP B-PER\nleft O\n",
        WORDS,
        "{path}:3: 2 columns where line 2, of the same sentence, has 3",
    ),
    "empty column": ("a.iob", b"Ada\t\tO\n", WORDS, "{path}:1: column 2 is empty"),
    "no tag": (
        "a.conll",
        b"x O\n\nAda B-\n",
        WORDS,
        "{path}:3: the tags in column 'tags' holds 'B-'",
    ),
    "no sentence": ("a.conll", b"-DOCSTART- O\n\n", WORDS, "{path}: holds no rows"),
    "not UTF-8": ("a.conll", b"x O\n\xe9 O\n", WORDS, "{path}:2: not UTF-8: "),
    "no such column": (
        "a.conll",
        b"x O\n",
        Columns(WORDS.schema, {"words": "tokens", "tags": "ner_tags"}),
        "data.tags = \"ner_tags\": {path}:1 has no column 'ner_tags'; its columns are 'tokens', 'tags', '1'",
    ),
    "text alone": ("a.txt", b"good", TEXTS, "of texts in .txt name the folder, which holds"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_with_file_and_place(case: str, tmp_path: Path) -> None:
    name, content, columns, message = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        data.read(path, columns)
    assert message.replace("{path}", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_a_folder_is_told_in_a_line(tmp_path: Path) -> None:
    columns = Columns(TEXTS.schema, {"text": "text", "label": "label"})
    put(tmp_path / "parts" / "a.csv", b"?")
    with pytest.raises(BadInput, match=r"parts: is a folder, .*; to read files, .*parts/\*\.csv"):
        data.read(tmp_path / "parts", columns)
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match=r"none: is a folder, .* files \.txt in it$"):
        data.read(tmp_path / "none", columns)
    deep = put(tmp_path / "deep" / "pos" / "more" / "1.txt", b"good")
    with pytest.raises(BadInput, match=rf"{deep}: lies too deep; "):
        data.read(tmp_path / "deep", columns)
    wrong = put(tmp_path / "latin" / "pos" / "1.txt", b"good\n\xe9")
    with pytest.raises(BadInput, match=rf"{wrong}:2: not UTF-8: "):
        data.read(tmp_path / "latin", columns)


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")]
)
def test_without_its_package_a_format_is_refused_with_the_remedy(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInput) as caught:
        data.read(tmp_path / name, TEXTS)
    assert f"{name}: reading" in str(caught.value)
    assert str(caught.value).endswith(f"needs {package}; get it with: pip install 'fedpeft[data]'")


def listed(folder: Path, rows: Rows, labels: tuple[str, ...], test: Rows | None = None) -> Dataset:
    """Read ``rows``, given a list of labels."""
    columns = Columns(TEXTS.schema, TEXTS.names, labels=labels)
    train = put(folder / "train.csv", FORMATS[".csv"](spoken(rows)))
    other = put(folder / "test.csv", FORMATS[".csv"](spoken(test or rows)))
    return from_files(train=train, validation=other, test=other, columns=columns)


def test_a_list_of_labels_gives_the_names_and_their_order(tmp_path: Path) -> None:
    rows = balanced(["bad", "good"], 3)
    names = ("good", "fair", "bad")
    dataset = listed(tmp_path, rows, names)
    assert TASKS["classification"].names(dataset) == names
    assert dataset.labels == ("good", "bad")  # of those that there are
    assert dataset.digest() == listed(tmp_path, rows, ()).digest()
    plain = listed(tmp_path, rows, ())
    assert TASKS["classification"].names(plain) == plain.labels == ("bad", "good")


def test_a_label_that_the_list_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        listed(tmp_path, balanced(["good", "bad"], 2), ("good", "bat"))
    place = f"{tmp_path / 'train.csv'}:4"
    assert str(caught.value) == f"{place}: data.labels has no label 'bad'; did you mean 'bat'?"
    with pytest.raises(BadInput, match=r"test\.csv:2: data\.labels has no label 'fair'"):
        listed(tmp_path, balanced(["good", "bad"], 2), ("good", "bad"), balanced(["fair"], 1))
    with pytest.raises(BadInput, match=r"test\.csv:2: train has no label 'fair'"):
        listed(tmp_path, balanced(["good"], 2), ("good", "fair"), balanced(["fair"], 1))


def test_a_list_of_whole_numbers_meets_numbers_however_they_are_written(tmp_path: Path) -> None:
    rows = balanced(["2.0", "10.0"], 2)
    assert listed(tmp_path, rows, ("10", "2")).labels == ("10", "2")
    assert listed(tmp_path, rows, ("10.0", "2.0")).listed == ("10", "2")
    with pytest.raises(BadInput, match=r"data\.labels has no label '10'"):
        listed(tmp_path, rows, ("1", "2"))
    assert listed(tmp_path, rows, ("10.0", "2.0", "none")).labels == ("10.0", "2.0")


@pytest.mark.parametrize(
    ("labels", "message"),
    [(("a", "b", "a"), "names 'a' twice"), (("1", "1.0"), "'1' twice"), (("a", " "), "empty name")],
)
def test_a_list_of_labels_names_each_once(
    labels: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        listed(tmp_path, balanced("ab", 2), labels)


def tagged(folder: Path, labels: tuple[str, ...], test: bytes = b"Ada B-PER\n") -> tuple[str, ...]:
    """Return the tags of two sentences with PER and LOC, given a list of types."""
    train = put(folder / "train.conll", b"Ada B-PER\nin O\nRome B-LOC\n\nno O\n")
    other = put(folder / "test.conll", test)
    columns = Columns(WORDS.schema, WORDS.names, labels=labels)
    dataset = from_files(train=train, validation=other, test=other, columns=columns)
    return TASKS["tagging"].names(dataset)


def test_of_tagging_the_list_holds_types(tmp_path: Path) -> None:
    assert tagged(tmp_path, ()) == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    named = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
    assert tagged(tmp_path, ("PER", "ORG", "LOC")) == named
    assert tagged(tmp_path, ("PER", "ORG", "LOC"), b"UN B-ORG\n") == named  # train need not have it
    with pytest.raises(BadInput, match=r"train\.conll:1: data\.labels has no label 'LOC'"):
        tagged(tmp_path, ("PER", "ORG"))
    with pytest.raises(BadInput, match=r"test\.conll:1: data\.labels has no .* did you mean 'LOC'"):
        tagged(tmp_path, ("PER", "LOC"), b"Rome B-LOCC\n")
    with pytest.raises(BadInput, match=r"names the tag 'O'; list types alone"):
        tagged(tmp_path, ("O", "PER", "LOC"))
