"""Laws of the built-in data: each text of the standard library in one split, labelled by its module's chapter."""

import os
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import fedpeft.data
from fedpeft.data import Dataset, pydocs
from fedpeft.errors import BadInput

CHAPTERS = tomllib.loads(
    Path(fedpeft.data.__file__).with_name("chapters.toml").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return pydocs()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that stands for the standard library; what is found there is kept beside it."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "library"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "library"


def write(path: Path, *docstrings: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(f'def f{n}():\n    """{text}"""' for n, text in enumerate(docstrings)),
        encoding="utf-8",
    )


def sentences(topic: str, number: int) -> list[str]:
    return [f"Sentence number {n} of several about {topic}." for n in range(number)]


def texts(data: Dataset) -> list[str]:
    return [text for split in (data.train, data.validation, data.test) for text in split.texts]


def test_it_is_large_enough_to_learn_from(data: Dataset) -> None:
    assert len(data.labels) >= 10
    assert len(texts(data)) >= 3000
    assert min(map(len, texts(data))) >= 30


def test_no_text_occurs_twice(data: Dataset) -> None:
    assert Counter(texts(data)).most_common(1)[0][1] == 1


def test_every_label_is_in_every_split_by_the_same_proportions(data: Dataset) -> None:
    train, validation, test = (
        Counter(split.labels) for split in (data.train, data.validation, data.test)
    )
    for label in CHAPTERS:
        total = train[label] + validation[label] + test[label]
        assert total >= 40, label
        assert test[label] == pytest.approx(0.2 * total, abs=0.5)
        assert validation[label] == pytest.approx(0.1 * total, abs=0.6)
    assert set(data.labels) == set(CHAPTERS) == set(train)


def test_the_key_is_the_module_and_decides_the_label(data: Dataset) -> None:
    for split in (data.train, data.validation, data.test):
        assert all(
            key in CHAPTERS[label] for key, label in zip(split.keys, split.labels, strict=True)
        )


def test_no_module_is_in_two_chapters() -> None:
    modules = Counter(module for chapter in CHAPTERS.values() for module in chapter)
    assert max(modules.values()) == 1
    assert modules.keys() <= sys.stdlib_module_names | {
        "_ast_unparse",  # 3.14
        "_compression",  # until 3.13
        "_py_warnings",  # 3.14
        "_pydatetime",  # 3.12
        "annotationlib",  # 3.14
        "compression",  # 3.14
    }


def test_another_process_builds_the_same(library: Path) -> None:
    for module in ("json", "re", "ast"):
        write(library / module / "__init__.py", *sentences(module, 20), *sentences("everything", 5))
    code = "import sys, sysconfig; sysconfig.get_path = lambda name: sys.argv[1]\n"
    code += "from fedpeft.data import pydocs; print(pydocs().digest())"
    environment = os.environ | {
        "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    }
    command = [sys.executable, "-c", code, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == pydocs().digest()


def test_sources_are_parsed_once_for_as_long_as_they_stay_as_they_are(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(library / "json" / "decoder.py", *sentences("JSON", 50))
    first = pydocs()
    with monkeypatch.context() as parsing:
        parsing.setattr("ast.parse", lambda _: pytest.fail("parsed again"))
        assert pydocs() == first
        assert pydocs(1) != first
    (kept,) = (library.parent / "cache" / "fedpeft").iterdir()
    for damaged in (b"", b"[1, 2]", b"[1, 2, 3]", b'{"a": 1}', b"[[], [], []]", b"\xff"):
        kept.write_bytes(damaged)
        assert pydocs() == first
    write(library / "json" / "decoder.py", *sentences("XML!", 50))
    assert set(texts(pydocs())) == set(sentences("XML!", 50))


def test_a_cache_that_cannot_be_written_is_done_without(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(library / "json" / "decoder.py", *sentences("JSON", 50))
    (library.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(library.parent / "file"))
    assert len(texts(pydocs())) == 50


def test_a_seed_moves_rows_between_splits_and_changes_no_text(library: Path) -> None:
    write(library / "json" / "decoder.py", *sentences("JSON", 50))
    first, again, other = pydocs(0), pydocs(0), pydocs(1)
    assert first == again
    assert sorted(texts(first)) == sorted(texts(other)) == sorted(sentences("JSON", 50))
    assert set(first.test.texts) != set(other.test.texts)


def test_splits_depend_on_the_texts_alone(library: Path) -> None:
    write(library / "json" / "decoder.py", *sentences("JSON", 50))
    before = pydocs()
    write(library / "json" / "decoder.py", *sentences("JSON", 25))
    write(library / "base64.py", *reversed(sentences("JSON", 50)[25:]))
    after = pydocs()
    assert [split.texts for split in (before.train, before.test)] == [
        split.texts for split in (after.train, after.test)
    ]


def test_tests_short_docstrings_and_unmapped_modules_are_left_out(library: Path) -> None:
    write(library / "json" / "decoder.py", *sentences("JSON", 10), "Twenty-nine characters long..")
    write(library / "json" / "test" / "test_decoder.py", *sentences("testing", 10))
    write(library / "ctypes" / "tests" / "test_c.py", *sentences("testing", 10))
    write(library / "tkinter" / "ttk.py", *sentences("windows", 10))
    assert sorted(texts(pydocs())) == sentences("JSON", 10)


def test_docstrings_of_modules_classes_and_methods_are_cleaned(library: Path) -> None:
    (library / "json").mkdir(parents=True)
    (library / "json" / "decoder.py").write_text(
        '"""The module says something here.\n\n    More of it.\n    """\n'
        'class A:\n    """The class says something here."""\n'
        '    async def b(self):\n        """The method says\n        something here."""\n'
        'raise RuntimeError("parsed, never run")\n'
    )
    assert sorted(texts(pydocs())) == [
        "The class says something here.",
        "The method says\nsomething here.",
        "The module says something here.\n\nMore of it.",
    ]


def test_of_equal_texts_the_first_module_keeps_it(library: Path) -> None:
    for module in ("json", "ast", "re"):
        write(library / module / "__init__.py", *sentences("everything", 10))
    assert set(pydocs().train.keys) == {"ast"}
    assert len(texts(pydocs())) == 10


@pytest.mark.usefixtures("library")
def test_a_library_without_source_is_refused() -> None:
    with pytest.raises(BadInput, match="holds no Python source"):
        pydocs()


def test_a_user_without_a_home_has_nothing_kept(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("could not determine home directory")

    write(library / "os.py", *sentences("files", 40))
    write(library / "abc.py", *sentences("classes", 40))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", staticmethod(nowhere))
    assert len(texts(pydocs())) == 80
