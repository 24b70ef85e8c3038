"""Laws of the built-in functions: each prompt in one split, its response what the function is said to do."""

import ast
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import fedpeft.data
from fedpeft.data import Dataset, pycode
from fedpeft.errors import BadInput
from fedpeft.experiment.config import from_tree
from fedpeft.experiment.reading import read_data

CHAPTERS = tomllib.loads(
    Path(fedpeft.data.__file__).with_name("chapters.toml").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return pycode()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that stands for the standard library; what is found there is kept beside it."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "library"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "library"


def write(path: Path, code: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")


def functions(topic: str, number: int) -> str:
    """Return the code of so many functions."""
    code = ""
    for n in range(number):
        code += (
            f'def f{n}():\n    """Return number {n} of {topic}."""\n    return {n}, {topic!r}\n\n'
        )
    return code


def pairs(data: Dataset) -> dict[str, str]:
    """Return prompt -> response of all splits."""
    found: dict[str, str] = {}
    for split in (data.train, data.validation, data.test):
        found |= dict(zip(split.columns["prompt"], split.columns["response"], strict=True))
    return found


def only(library: Path, code: str) -> dict[str, str]:
    """Return prompt -> response of ``code``, which is a module among functions of no interest."""
    write(library / "json" / "decoder.py", functions("JSON", 10))
    ordinary = set(pairs(pycode()))
    write(library / "json" / "encoder.py", code)
    return {prompt: said for prompt, said in pairs(pycode()).items() if prompt not in ordinary}


def test_it_is_large_enough_to_learn_from(data: Dataset) -> None:
    assert len(data.labels) >= 10
    assert len(pairs(data)) >= 2000


def test_prompts_are_short_and_responses_are_one_line(data: Dataset) -> None:
    for prompt, response in pairs(data).items():
        assert len(prompt) <= 200
        assert prompt.startswith(("def ", "async def "))
        assert "\n" in prompt  # the signature, and a line of the body at least
        assert 15 <= len(response) <= 150
        assert len(response.splitlines()) == 1


def test_no_prompt_occurs_twice(data: Dataset) -> None:
    splits = (data.train, data.validation, data.test)
    prompts = [prompt for split in splits for prompt in split.columns["prompt"]]
    assert Counter(prompts).most_common(1)[0][1] == 1


def test_no_prompt_holds_what_it_asks_for(data: Dataset) -> None:
    """The docstring is taken out; a comment may still use the same words."""
    told = [prompt for prompt, response in pairs(data).items() if response in prompt]
    assert len(told) <= 0.005 * len(pairs(data))


def test_every_label_is_in_every_split_and_the_key_decides_it(data: Dataset) -> None:
    for split in (data.train, data.validation, data.test):
        assert set(split.labels) == set(data.labels) <= set(CHAPTERS)
        for key, label in zip(split.keys, split.labels, strict=True):
            assert key in CHAPTERS[label]
    total = len(pairs(data))
    assert len(data.test) == pytest.approx(0.2 * total, rel=0.02)
    assert len(data.validation) == pytest.approx(0.1 * total, rel=0.05)


def test_a_prompt_is_signature_and_body_without_docstring_and_blank_lines(library: Path) -> None:
    code = (
        "class A:\n"
        "    @staticmethod\n"
        "    async def load(\n        name: str,\n    ) -> int:\n"
        '        """Load the thing of that name.\n\n        And more.\n        """\n'
        "        # why\n\n"
        "        return await load(name)\x0c\n"
    )
    prompt = "async def load(\n    name: str,\n) -> int:\n    # why\n    return await load(name)"
    assert only(library, code) == {prompt: "Load the thing of that name."}


def test_a_long_body_is_cut_after_a_whole_line(library: Path) -> None:
    body = "".join(f"    value_{n:02} = compute(value_{n:02})\n" for n in range(20))
    code = f'def long():\n    """Compute very many values."""\n{body}'
    [prompt] = only(library, code)
    lines = body.splitlines()
    assert prompt.splitlines() == ["def long():", *lines[:5]]  # 12 + 5 * 35 = 187 characters


@pytest.mark.parametrize(
    "code",
    [
        'def f():\n    """Say nothing but this."""\n',
        'def f(): """Stand on one line with code."""; return 1\n',
        'def f():\n    """Share the line with code."""; return 1\n',
        'def f():\n    """Too short."""\n    return 1\n',
        "def f():\n    return 'no docstring at all'\n",
        f'def f({", ".join(f"argument_{n}" for n in range(30))}):\n    """Take far too many."""\n    return 1\n',
        'class A:\n    """A class is no function."""\n    x = 1\n',
    ],
    ids=["no body", "one line", "shared line", "short", "none", "long signature", "class"],
)
def test_what_says_too_little_is_left_out(library: Path, code: str) -> None:
    assert only(library, code) == {}


def test_form_feeds_and_declared_encodings_are_read_as_python_does(library: Path) -> None:
    code = (
        "# coding: latin-1\n\x0c\n" + functions("form feeds", 1) + 'x = "\x0c"\n\n'
        'def café():\n    """Serve the guests outside."""\n    return "\xe9"\n'
    )
    write(library / "json" / "decoder.py", functions("JSON", 10))
    (library / "json" / "encoder.py").write_bytes(code.encode("latin-1"))
    found = pairs(pycode())
    assert found['def café():\n    return "é"'] == "Serve the guests outside."


def test_sources_are_parsed_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(library / "json" / "decoder.py", functions("JSON", 50))
    first = pycode()
    monkeypatch.setattr("ast.parse", lambda _: pytest.fail("parsed again"))
    assert pycode() == first
    assert pycode(1) != first
    assert pairs(pycode(1)) == pairs(first)


def test_of_equal_prompts_the_first_module_keeps_it(library: Path) -> None:
    for module in ("json", "ast", "re"):
        write(library / module / "__init__.py", functions("everything", 10))
    assert set(pycode().train.keys) == {"ast"}
    assert len(pairs(pycode())) == 10


@pytest.mark.usefixtures("library")
def test_a_library_without_source_is_refused() -> None:
    with pytest.raises(BadInput, match=r"data.source = 'pycode': .* holds no Python source"):
        pycode()


def test_prompts_are_the_beginnings_of_code(data: Dataset) -> None:
    """Where nothing was cut, a prompt is a function that Python can read."""
    whole = 0
    for prompt in data.test.columns["prompt"]:
        try:
            ast.parse(prompt)
        except SyntaxError:
            continue
        whole += 1
    assert whole >= 0.7 * len(data.test)


@pytest.mark.parametrize(
    ("source", "kind", "reader"),
    [("pycode", "classification", "causal_lm"), ("pydocs", "tagging", "classification")],
)
def test_data_of_another_task_is_refused_with_the_right_one(
    source: str, kind: str, reader: str
) -> None:
    config = from_tree({"data": {"source": source}, "task": {"kind": kind}})
    with pytest.raises(BadInput, match=f"task.kind = '{kind}': .*'{source}' .* for {reader}"):
        read_data(config)
