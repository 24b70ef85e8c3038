"""The sections of a configuration besides method, task, model, training and machine, field by field."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from fedpeft.mounting import Targets


@dataclass(frozen=True)
class DataSection:
    """Which texts.

    Files are JSON (`.jsonl`, `.ndjson`, `.json`) or separated columns (`.csv`, `.tsv`), each also
    with `.gz`. A pattern such as `data/*.jsonl` names several. Relative paths start at the folder
    of the configuration file, `~` is the user's home.
    """

    source: Literal["pydocs", "pycode", "files"] = "pydocs"
    """Where the texts come from: the docstrings of Python's own library (`pydocs`), its functions
    with what each one does (`pycode`, of `causal_lm`), or files of yours."""
    train: Path | None = None
    """The file of the training texts; needed with `source = "files"`."""
    validation: Path | None = None
    """The file of the validation texts; left out, a part of train is held out."""
    test: Path | None = None
    """The file of the test texts; left out, a part of train is held out."""
    text: str = "text"
    """The column that holds the text, of a classification."""
    text2: str | None = None
    """The column that holds the second text of a pair, of a classification of pairs."""
    label: str | None = None
    """The column that holds the label: the answer of a classification, there `label` where left
    out; otherwise what partitions by label divide by. Left out, `tagging` takes the type of most
    names in a sentence, and `causal_lm` has none."""
    words: str = "tokens"
    """The column that holds the list of words, of `tagging`."""
    tags: str = "tags"
    """The column that holds the list of the words' tags, of `tagging`: BIO, BIOES, IOB1 or types."""
    prompt: str = "prompt"
    """The column that holds the prompt, of `causal_lm`."""
    input: str | None = None
    """The column that holds what a prompt is about, appended to it, of `causal_lm`."""
    response: str = "response"
    """The column that holds the response to a prompt, of `causal_lm`."""
    messages: str | None = None
    """The column that holds a list of `{"role", "content"}`, of `causal_lm`, instead of prompt and
    response; the last message of the assistant is the response."""
    key: str | None = None
    """The column that names each row's natural client, for `partition.kind = "by_key"`."""
    delimiter: str | None = None
    """What separates columns: one character or `tab`. Left out: a comma in `.csv`, a tab in
    `.tsv`."""
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of each label's train rows that is held out where there is no validation file."""
    test_fraction: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Share of each label's train rows that is held out where there is no test file."""


CLIENTS = 20
"""How many clients there are where nothing says otherwise."""


@dataclass(frozen=True)
class PartitionSection:
    """Who holds which texts."""

    kind: Literal["iid", "dirichlet", "shards", "by_key", "file"] = "dirichlet"
    """How rows are dealt: evenly at random, by Dirichlet shares of each label, in shards sorted by
    label, by the column `data.key`, or as a file says."""
    clients: Annotated[int, Ge(1)] | None = None
    """How many clients. Left out: 20, or all that the data (`by_key`) or the file names. With
    `by_key`, so many of the largest."""
    alpha: Annotated[float, Gt(0)] = 0.1
    """Parameter of the Dirichlet law, at least 0.001: the smaller, the less alike the clients."""
    min_examples: Annotated[int, Ge(1)] = 8
    """Training rows that every client has at least, with `dirichlet`."""
    shards_per_client: Annotated[int, Ge(1)] = 2
    """Shards that every client is dealt, with `shards`: the fewer, the fewer labels it sees."""
    file: Path | None = None
    """JSON object of client name -> row numbers in train's file, from 0; needed with `file`."""


@dataclass(frozen=True)
class FederationSection:
    """How server and clients take turns."""

    rounds: Annotated[int, Ge(1)] = 20
    """Rounds of the whole run."""
    clients_per_round: Annotated[int, Ge(1)] = 4
    """Clients that are drawn at random for each round."""
    min_replies: Annotated[int, Ge(1)] = 1
    """With fewer usable replies a round changes nothing; at most `clients_per_round`."""


@dataclass(frozen=True)
class EvaluationSection:
    """When the model is scored, and on what."""

    every: Annotated[int, Ge(1)] = 5
    """Rounds between two evaluations; the last round is followed by one in any case."""
    start: bool = False
    """Also score what the first round starts from."""
    limit: Annotated[int, Ge(1)] | None = None
    """Texts that are scored; left out: all of the split."""
    split: Literal["validation", "test"] = "test"
    """Which texts are scored."""
    per_client: bool = False
    """Also score every client on its own part of the test set."""


@dataclass(frozen=True)
class EngineSection:
    """How messages travel between server and clients."""

    kind: Literal["local", "flower"] = "local"
    """In this process, or in Flower's simulation (extra `flower`)."""
    stack: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    """Clients that train side by side, where method and model can; `auto` finds out by trying. It
    is 1 with dropout in the base. Equal bits hold between runs with the same stack."""


Reference = Literal["centralised", "local-only"]
"""A yardstick: all data in one place, or no exchange at all."""


@dataclass(frozen=True)
class CompareSection:
    """What `fedpeft compare` runs."""

    methods: tuple[str, ...] = ("full", "bitfit", "lora", "ffa_lora", "federa", "slora", "fedara")
    """Names of the methods that are compared."""
    seeds: tuple[Annotated[int, Ge(0), Le(2**62)], ...] = (0,)
    """Every method is run once with each of these seeds."""
    recipe: Literal["equal", "paper"] = "equal"
    """`equal` gives all methods that have them the same targets and starting rank; `paper` leaves
    every method its own defaults."""
    targets: Targets = "query|value"
    """Which dense layers are adapted at an equal recipe; written as a method's `targets`."""
    rank: Annotated[int, Ge(1)] = 8
    """The rank of the adapters at the start, at an equal recipe."""
    references: tuple[Reference, ...] = ()
    """Yardsticks that are run beside the methods: all data in one place, or no exchange at all."""
    reference_method: str = "lora"
    """The method of the centralised yardstick."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of single rows by label, such as `[compare.settings.lora]` with
    `training.lr = 3e-3`."""
