"""Laws of arrays that are read element by element: the same as at once, however they are cut, in little memory."""

import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data import json_array, unpacking
from fedpeft.data.json_records import json_records
from fedpeft.data.records import records
from fedpeft.data.unpacking import decoded_parts
from fedpeft.errors import BadInput

PATH = Path("a.json")
a_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
an_array = st.lists(st.dictionaries(st.text(), a_value, max_size=4), max_size=6)


def cut(text: str, size: int) -> Iterator[str]:
    """Yield ``text`` in parts of ``size`` characters."""
    for start in range(0, len(text), size):
        yield text[start : start + size]


def read(text: str, size: int, chunk: int) -> list[Any]:
    with mock.patch.object(json_array, "CHUNK", chunk):
        located = list(json_records(PATH, cut(text, size), ()))
    assert [where for where, _ in located] == [
        f"a.json: record {number + 1}" for number in range(len(located))
    ]
    return [record for _, record in located]


@settings(deadline=None)
@given(
    array=an_array,
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    size=st.integers(1, 30),
    chunk=st.integers(1, 40),
    before=st.sampled_from(["", "\n \n", " "]),
)
def test_element_by_element_is_as_at_once(
    array: list[Any], indent: int | None, ascii_only: bool, size: int, chunk: int, before: str
) -> None:
    text = before + json.dumps(array, indent=indent, ensure_ascii=ascii_only)
    assert read(text, size, chunk) == json.loads(text)


@settings(deadline=None)
@given(array=an_array.filter(bool), share=st.floats(0, 1, exclude_max=True), size=st.integers(1, 9))
def test_an_array_that_is_cut_off_is_refused_with_its_line(
    array: list[Any], share: float, size: int
) -> None:
    text = json.dumps(array, indent=1)
    kept = text[: 1 + int(share * (len(text) - 1))].rstrip()
    with pytest.raises(BadInput, match=r"^a\.json:(\d+): not JSON: ") as caught:
        read(kept, size, 4)
    line = int(str(caught.value).split(":")[1])
    assert 1 <= line <= 1 + kept.count("\n")


@pytest.mark.parametrize("chunk", [1, 5, 10**6])
def test_an_error_stands_in_its_line_however_much_was_read_before(chunk: int) -> None:
    good = '{"x": "a",\n "y": 1},\n'
    text = "[" + 40 * good + '{"x": "a" "y": 1},\n' + 40 * good
    with pytest.raises(BadInput, match=r"^a\.json:81: not JSON: Expecting ',' delimiter$"):
        read(text, 7, chunk)


@pytest.mark.parametrize("size", range(1, 12))
def test_a_number_is_read_to_its_end(size: int) -> None:
    with pytest.raises(BadInput, match="record 2: must be a JSON object, not 12345;"):
        read("[{}, 12345]", size, 1)


def test_a_wrong_element_is_refused_before_the_rest_is_read() -> None:
    parts = iter(['[{"x": ' + "?" * 100, *["y"] * 5])
    with mock.patch.object(json_array, "CHUNK", 50), pytest.raises(BadInput, match="Expecting val"):
        list(json_records(PATH, parts, ()))
    assert list(parts) == ["y"] * 5


@settings(deadline=None)
@given(lines=st.lists(st.text(max_size=20), max_size=4), part=st.integers(1, 7))
def test_pieces_of_lines_are_the_text_itself(lines: list[str], part: int) -> None:
    text = "\n".join(lines).lstrip("\ufeff")
    with mock.patch.object(unpacking, "PART", part):
        assert "".join(decoded_parts(PATH, io.BytesIO(text.encode()))) == text


@pytest.mark.parametrize("part", [1, 2, 3, 100])
def test_a_byte_that_is_not_utf8_is_named_wherever_lines_are_cut(part: int) -> None:
    content = "äöü\n€€".encode() + b"\xff" + "€\n".encode()
    with (
        mock.patch.object(unpacking, "PART", part),
        pytest.raises(BadInput, match=r"^a\.json:2: not UTF-8: invalid start byte at byte 6 of"),
    ):
        list(decoded_parts(PATH, io.BytesIO(content)))
    with (
        mock.patch.object(unpacking, "PART", part),
        pytest.raises(BadInput, match=r"^a\.json:1: not UTF-8: unexpected end of data at byte 3"),
    ):
        list(decoded_parts(PATH, io.BytesIO("€€".encode()[:-1])))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """An array on a single line, 40 times as long as what may be in memory."""
    path = tmp_path / "rows.json"
    row = json.dumps({"text": "word " * 200, "label": "a"})
    path.write_text("[" + ", ".join([row] * 8000) + "]")
    size = path.stat().st_size
    tracemalloc.start()
    count = sum(1 for _ in records(path, ("text", "label"), None))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8000
    assert peak < size / 10
