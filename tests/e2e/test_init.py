"""``fedpeft init``: a configuration for texts of one's own, found out from the file, that runs as it is."""

import csv
import io
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedpeft.experiment.config import from_tree, read
from fedpeft.experiment.reading import divide, read_data
from fedpeft.methods import METHODS

from .builders import Ground, cli_call, examples, refused, write_causal_lm
from .reading import evaluations
from .task_grounds import instructions, questions, sentences

pytestmark = pytest.mark.usefixtures("no_figures")


def rows_named(text: str, label: str, **others: str) -> list[dict[str, Any]]:
    """Return the rows of ``examples`` in columns of these names, after a number of the row."""
    found: list[dict[str, Any]] = []
    for number, row in enumerate(examples()):
        named = {name: row[column] for name, column in others.items()}
        found.append({"id": f"row {number}", text: row["text"], label: row["label"], **named})
    return found


def separated(rows: Sequence[Mapping[str, Any]], delimiter: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


USUAL = rows_named("sentence", "category")
OWN = rows_named("was steht da", "worüber", group="site")
FORMATS = {
    "train.jsonl": as_lines(USUAL),
    "train.json": json.dumps(OWN),
    "object.json": json.dumps({"version": 1, "data": USUAL}),
    "train.csv": separated(OWN, ","),
    "german.csv": separated(USUAL, ";"),
    "train.tsv": separated(USUAL, "\t"),
    "tabs.csv": separated(OWN, "\t"),
}


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A file to be, in a folder beside that of the data."""
    (tmp_path / "settings").mkdir()
    return tmp_path / "settings" / "mine.toml"


def write(toml: Path, name: str, text: str) -> Path:
    path = toml.parent.parent / "data" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_runs_as_it_is(name: str, toml: Path, ground: Ground, runs: Path) -> None:
    train = write(toml, name, FORMATS[name])
    outcome = cli_call("init", toml, "--train", train)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert f"fedpeft run {toml}" in outcome.out
    assert tomllib.loads(toml.read_text(encoding="utf-8"))["data"]["train"] == f"../data/{name}"
    tiny = ("--set", f"model.name={ground.model}", "--set", "federation.rounds=1")
    ran = cli_call("run", toml, "--runs", runs, *tiny)
    assert ran.code == 0, ran
    assert evaluations(runs / "mine")[-1].examples > 0
    dataset = read_data(from_tree(read(toml)))
    assert {*dataset.train.texts} < {row["text"] for row in examples()}
    assert set(dataset.labels) == {row["label"] for row in examples()}


def as_squad(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the questions of each title as one article, in SQuAD's form."""
    articles: dict[str, Any] = {}
    for row in rows:
        texts = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        asked = {
            "question": row["question"],
            "answers": [{"text": text, "answer_start": start} for text, start in texts],
        }
        article = articles.setdefault(row["title"], {"title": row["title"], "paragraphs": []})
        article["paragraphs"].append({"context": row["context"], "qas": [asked]})
    return json.dumps({"version": "1.1", "data": list(articles.values())})


def as_conll(rows: Sequence[Mapping[str, Any]]) -> str:
    sentences: list[str] = []
    for row in rows:
        pairs = zip(row["tokens"], row["tags"], strict=True)
        sentences.append("".join(f"{word}\t{tag}\n" for word, tag in pairs))
    return "\n".join(sentences)


def as_messages(rows: Sequence[Mapping[str, Any]]) -> str:
    lines: list[dict[str, Any]] = []
    for row in rows:
        asked = {"role": "user", "content": row["prompt"]}
        lines.append({"messages": [asked, {"role": "assistant", "content": row["response"]}]})
    return as_lines(lines)


TASK_FILES: dict[str, tuple[str, Callable[[], str], set[str]]] = {
    "sentences.jsonl": ("tagging", lambda: as_lines(sentences()), {"words", "tags"}),
    "sentences.conll": ("tagging", lambda: as_conll(sentences()), {"words", "tags"}),
    "squad.json": ("qa", lambda: as_squad(questions()), {"question", "context", "answers"}),
    "questions.jsonl": (
        "qa",
        lambda: as_lines(questions()),
        {"question", "context", "answers"},
    ),
    "prompts.csv": (
        "causal_lm",
        lambda: separated(instructions(), ","),
        {"prompt", "response"},
    ),
    "chat.jsonl": ("causal_lm", lambda: as_messages(instructions()), {"messages"}),
}


@pytest.mark.parametrize("name", TASK_FILES)
def test_every_task_is_told_from_its_file_and_runs(
    name: str, toml: Path, ground: Ground, runs: Path, tmp_path: Path
) -> None:
    kind, text, roles = TASK_FILES[name]
    train = write(toml, name, text())
    outcome = cli_call("init", toml, "--train", train)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert f"task: {kind}: " in outcome.out
    tree = tomllib.loads(toml.read_text(encoding="utf-8"))
    assert tree["task"]["kind"] == kind
    assert tree["data"].keys() - {"source", "train", "key"} == roles
    model = ground.model
    if kind == "causal_lm":
        model = write_causal_lm(tmp_path / "model")
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        tokenizer.save_pretrained(model)
    tiny = ("--set", f"model.name={model}", "--set", "federation.rounds=1")
    short = ("--set", "model.max_length=24", "--set", "evaluation.limit=8")
    ran = cli_call("run", toml, "--runs", runs, *tiny, *short)
    assert ran.code == 0, ran
    assert evaluations(runs / "mine")[-1].examples == 8


def test_a_task_that_is_named_is_the_one(toml: Path) -> None:
    """A question with an answer may be one for a language model, and a text with a label."""
    rows = [{"question": f"q {n}", "answer": f"a {n}", "category": "ab"[n % 2]} for n in range(60)]
    train = write(toml, "train.jsonl", as_lines(rows))
    ways = ("classification (question, category)", "causal_lm (question, answer)", "--task")
    refused(cli_call("init", toml, "--train", train), "train.jsonl", *ways)
    assert not toml.exists()
    for kind in ("classification", "causal_lm"):
        path = toml.with_name(f"{kind}.toml")
        outcome = cli_call("init", path, "--train", train, "--task", kind)
        assert outcome.code == 0, outcome
        chosen = from_tree(read(path))
        assert (chosen.task.kind, chosen.data.label) == (kind, "category")
    assert chosen.data.prompt == "question"


def test_prompts_without_labels_are_dealt_to_clients_that_are_alike(toml: Path) -> None:
    """And may have more than a prompt: an input."""
    rows = [{"instruction": f"do {n}", "input": f"{n}", "output": f"o {n}"} for n in range(90)]
    train = write(toml, "train.json", json.dumps(rows))
    assert cli_call("init", toml, "--train", train).code == 0
    chosen = from_tree(read(toml))
    assert chosen.partition.kind == "iid"
    assert (chosen.data.prompt, chosen.data.input, chosen.data.response) == (
        "instruction",
        "input",
        "output",
    )
    assert chosen.model.name == "smollm2"


def test_a_task_without_its_columns_is_refused(toml: Path) -> None:
    train = write(toml, "train.jsonl", as_lines(USUAL))
    refused(
        cli_call("init", toml, "--train", train, "--task", "tagging"),
        "no columns for tagging",
        "'sentence', 'category'",
        "tokens/words + tags/ner_tags",
        "data.words and data.tags",
    )
    refused(cli_call("init", toml, "--train", train, "--task", "taging"), "did you mean 'tagging'")
    assert not toml.exists()


@pytest.mark.parametrize("method", METHODS)
def test_it_is_written_for_every_method(method: str, toml: Path) -> None:
    train = write(toml, "train.jsonl", as_lines(USUAL))
    outcome = cli_call("init", toml, "--train", train, "--method", method)
    assert outcome.code == 0, outcome
    assert from_tree(read(toml)).method["name"] == method


def test_natural_clients_are_offered_in_a_comment_that_works(toml: Path) -> None:
    train = write(toml, "train.csv", separated(rows_named("text", "label", site_id="site"), ","))
    outcome = cli_call("init", toml, "--train", train)
    assert "'site_id'" in outcome.out
    written = toml.read_text(encoding="utf-8")
    before, kept, after = written.partition("# kind = ")
    assert kept
    offered, _, rest = after.partition("\n")
    others = rest.splitlines(keepends=True)[4:]
    toml.write_text(f"{before}kind = {offered}\n{''.join(others)}", encoding="utf-8")
    chosen = from_tree(read(toml))
    assert chosen.partition.kind == "by_key"
    partition = divide(chosen, read_data(chosen))
    assert partition.names == tuple(f"site{number}" for number in range(5))
    assert chosen.federation.clients_per_round <= 5


def test_natural_clients_that_the_test_file_lacks_are_not_offered(toml: Path) -> None:
    train = write(toml, "train.csv", separated(rows_named("text", "label", site="site"), ","))
    test = write(toml, "test.jsonl", as_lines(rows_named("text", "label")))
    assert cli_call("init", toml, "--train", train, "--test", test).code == 0
    chosen = from_tree(read(toml)).data
    assert chosen.key is None
    assert chosen.test is not None
    assert chosen.test.samefile(test)


@pytest.mark.parametrize("rows", [18, 32, 60, 200])
def test_there_are_as_many_clients_as_the_rows_allow(toml: Path, rows: int) -> None:
    train = write(toml, "train.jsonl", as_lines(rows_named("text", "label")[:rows]))
    outcome = cli_call("init", toml, "--train", train)
    assert outcome.code == 0, outcome
    chosen = from_tree(read(toml))
    held = divide(chosen, read_data(chosen)).train
    assert min(map(len, held)) >= chosen.partition.min_examples == 8
    assert chosen.federation.clients_per_round <= len(held)
    assert len(held) == {18: 1, 32: 2, 60: 2, 200: 3}[rows]


def test_length_follows_the_texts(toml: Path) -> None:
    long = [{**row, "text": "word " * 90} for row in rows_named("text", "label")]
    assert cli_call("init", toml, "--train", write(toml, "train.jsonl", as_lines(long))).code == 0
    assert from_tree(read(toml)).model.max_length == 128  # 90 * 4 / 3 + 2, up to a multiple of 16


def test_names_with_quotes_and_line_ends_are_written_as_they_are(toml: Path) -> None:
    rows = rows_named('a "text"\n[x]', "\\label", site="site")
    assert (
        cli_call("init", toml, "--train", write(toml, 'my "data".json', json.dumps(rows))).code == 0
    )
    assert from_tree(read(toml)).data.text == 'a "text"\n[x]'
    assert from_tree(read(toml)).data.label == "\\label"


def test_nothing_is_overwritten(toml: Path) -> None:
    toml.write_text("# mine")
    train = write(toml, "train.jsonl", as_lines(USUAL))
    refused(cli_call("init", toml, "--train", train), str(toml), "exists")
    assert toml.read_text() == "# mine"


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no label": ([{"id": f"{n}", "text": f"text {n}"} for n in range(50)], "'id'"),
    "one label": ([{"flag": n % 2, "text": f"{n}", "label": "a"} for n in range(50)], "'label'"),
    "no text": ([{"number": n, "label": n % 2} for n in range(50)], "'number', 'label'"),
    "gaps": ([{"text": f"{n}", "label": "ab "[n % 3]} for n in range(50)], "'label'"),
    "only texts": ([{"text": f"text {n}"} for n in range(50)], "none"),
    "few rows": ([{"text": f"{n}", "label": "ab"[n % 2]} for n in range(10)], "at least"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_in_a_line(case: str, toml: Path) -> None:
    rows, needle = REFUSED[case]
    train = write(toml, "train.jsonl", as_lines(rows))
    refused(cli_call("init", toml, "--train", train), "train.jsonl", needle)
    assert not toml.exists()


def test_other_mistakes_are_told_in_a_line(toml: Path) -> None:
    train = write(toml, "train.jsonl", as_lines(USUAL))
    headless = write(toml, "headless.csv", "good day,birds\nbad day,fish\n" * 40)
    refused(cli_call("init", toml, "--train", train.with_name("tarin.jsonl")), "did you mean")
    refused(cli_call("init", toml, "--train", headless), "headless.csv:1", "not a header")
    refused(cli_call("init", toml, "--train", train, "--method", "lroa"), "did you mean 'lora'")
    refused(cli_call("init", toml.parent / "no" / "x.toml", "--train", train), "no folder")
    assert not toml.exists()
