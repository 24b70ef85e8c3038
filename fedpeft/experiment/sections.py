"""The sections of a configuration besides method, task, model, training and machine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from fedpeft.federation.cohort import Sampling
from fedpeft.federation.fleet import Device
from fedpeft.mounting import Targets


@dataclass(frozen=True)
class DataSection:
    """Which texts.

    Files are JSON (`.jsonl`, `.ndjson`, `.json`), separated columns (`.csv`, `.tsv`), Parquet
    (`.parquet`, extra `data`), CoNLL's columns (`.conll`, `.bio`, `.iob`), each also with `.gz` or
    `.zst` (extra `data`), or a folder with a folder of `.txt` files for each label. A pattern such
    as `data/*.jsonl` names several files. Relative paths start at the folder of the configuration
    file, `~` is the user's home. docs/data.md has an example of each.
    """

    source: Literal["pydocs", "pycode", "files", "hub"] = "pydocs"
    """Where the texts come from: the docstrings of Python's own library (`pydocs`), its functions
    with what each one does (`pycode`, of `causal_lm`), files of yours, or the Hugging Face hub
    (extra `data`)."""
    train: Path | None = None
    """The file of the training texts, or their folder; needed with `source = "files"`."""
    validation: Path | None = None
    """The file of the validation texts; left out, a part of train is held out."""
    test: Path | None = None
    """The file of the test texts; left out, a part of train is held out."""
    name: str | None = None
    """The set of the hub, such as `fancyzhx/ag_news`, or a folder that the package `datasets`
    reads; needed with `source = "hub"`."""
    config: str | None = None
    """The configuration of the hub's set, where it has several."""
    train_split: str = "train"
    """The split of the hub's set with the training texts."""
    validation_split: str | None = None
    """The split of the hub's set with the validation texts; left out, a part of train is held
    out."""
    test_split: str | None = None
    """The split of the hub's set with the test texts; left out, a part of train is held out."""
    text: str = "text"
    """The column that holds the text, of a classification."""
    text2: str | None = None
    """The column that holds the second text of a pair, of a classification of pairs."""
    label: str | None = None
    """The column that holds the label: the answer of a classification, there `label` where left
    out; otherwise what partitions by label divide by. Left out, `tagging` takes the type of most
    names in a sentence, `qa` the question word, and `causal_lm` has none."""
    words: str = "tokens"
    """The column that holds the list of words, of `tagging`."""
    tags: str = "tags"
    """The column that holds the list of the words' tags, of `tagging`: BIO, BIOES, IOB1, types."""
    question: str = "question"
    """The column that holds the question, of `qa`."""
    context: str = "context"
    """The column that holds the text with the answers, of `qa`."""
    answers: str = "answers"
    """The column that holds the right answers, of `qa`: `{"text": [...], "answer_start": [...]}`, a
    list of `{"text": ..., "answer_start": ...}`, a list of texts or one text; empty where there is
    none."""
    prompt: str = "prompt"
    """The column that holds the prompt, of `causal_lm`."""
    input: str | None = None
    """The column that holds what a prompt is about, appended to it, of `causal_lm`."""
    response: str = "response"
    """The column that holds the response to a prompt, of `causal_lm`."""
    messages: str | None = None
    """The column that holds a list of `{"role", "content"}`, of `causal_lm`, instead of prompt and
    response; the last message of the assistant is the response."""
    labels: tuple[str, ...] | None = None
    """All labels in the order of the model's outputs, such as `["neg", "pos"]`; of `tagging` all
    types of names, such as `["PER", "LOC"]`. The data may lack some, but hold no others. Left out:
    those of train, sorted."""
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

    kind: Literal[
        "iid",
        "quantity",
        "dirichlet",
        "label_skew",
        "shards",
        "cluster",
        "by_key",
        "file",
        "flower",
    ] = "dirichlet"
    """How rows are dealt: evenly at random, in sizes that differ, by Dirichlet shares of each
    label, by labels that each client draws, in shards sorted by label, by Dirichlet shares of
    clusters of texts, by the column `data.key`, as a file says, or by a partitioner of Flower; see
    docs/partitions.md."""
    clients: Annotated[int, Ge(1)] | None = None
    """How many clients. Left out: 20, or all that the data (`by_key`) or the file names. With
    `by_key`, so many of the largest, unless keys are grouped."""
    alpha: Annotated[float, Gt(0)] = 0.1
    """Parameter of the Dirichlet law of `dirichlet`, `label_skew` and `cluster`, at least 0.001:
    the smaller, the less alike the clients."""
    beta: Annotated[float, Gt(0)] = 1.0
    """Parameter of the Dirichlet law of sizes, with `quantity`, at least 0.001: the smaller, the
    more sizes differ."""
    min_examples: Annotated[int, Ge(1)] = 8
    """Training rows that every client has at least, with `dirichlet`, `quantity` and `cluster`."""
    shards_per_client: Annotated[int, Ge(1)] = 2
    """Shards that every client is dealt, with `shards`: the fewer, the fewer labels it sees."""
    clusters: Annotated[int, Ge(1)] = 10
    """Clusters of texts, with `cluster` (extra `data`)."""
    group: bool = False
    """With `by_key`, deal all keys to `clients` groups of like size, each a client."""
    file: Path | None = None
    """JSON object of client name -> row numbers in train's file, from 0; needed with `file`."""
    flower: dict[str, Any] = field(default_factory=dict)
    """With `flower` (extra `flower-data`), the `name` of a partitioner's class, as
    `PathologicalPartitioner`, and its arguments, such as `partition_by = "label"`."""


@dataclass(frozen=True)
class FederationSection:
    """How server and clients take turns."""

    rounds: Annotated[int, Ge(1)] = 20
    """Rounds of the whole run."""
    clients_per_round: Annotated[int, Ge(1)] = 4
    """Clients that are drawn at random for each round."""
    sampling: Sampling = "uniform"
    """How they are drawn: all alike, or one after another by their number of training examples
    (`size`). A mean that weights by examples then counts size twice: choose
    `method.weighting = "uniform"`."""
    trace: Path | None = None
    """A CSV file that says which clients are there in which rounds, with the columns `client`,
    `from`, `to`; only those are drawn. See docs/fleet.md."""
    fleet: dict[str, Device] = field(default_factory=dict)
    """The classes of devices that clients have, each a table `[federation.fleet.NAME]`; left out,
    all clients are alike and always answer. For simulations."""
    deadline: Annotated[float, Gt(0)] | None = None
    """Modelled seconds after which a reply counts as lost, by the classes in `fleet`; left out,
    there is no deadline."""
    min_replies: Annotated[int, Ge(1)] = 1
    """With fewer usable replies a round changes nothing; at most `clients_per_round`."""
    largest_update: Annotated[float, Gt(0)] | None = None
    """Largest L2 norm of an update, the difference between what a client replies and what it was
    sent; a reply with a larger one is not used. Left out: any finite update is."""


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
    where: Literal["server", "sites"] = "server"
    """Who scores: the server, on test texts of its own, or the clients, each on its own part of the
    test set; then what they count is added up."""


@dataclass(frozen=True)
class EngineSection:
    """How messages travel between server and clients."""

    kind: Literal["local", "flower", "sites"] = "local"
    """In this process, or in Flower's simulation (extra `flower`). `sites`, real ones, is what
    `fedpeft serve` sets."""
    stack: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    """Clients that train side by side, where method and model can; `auto` finds out by trying. It
    is 1 with dropout in the base. Equal bits hold between runs with the same stack."""


@dataclass(frozen=True)
class ServerSection:
    """The server of real sites, which `fedpeft serve` starts; see docs/deploy.md."""

    host: str = "127.0.0.1"
    """The address on which the gate listens for sites; `0.0.0.0` for all of this machine."""
    port: Annotated[int, Ge(0), Le(65535)] = 9443
    """The gate's port, the only one that sites have to reach; 0 for one that is free."""
    certificate: Path | None = None
    """The gate's TLS certificate (PEM), with the chain up to the CA that sites trust."""
    key: Path | None = None
    """The private key of that certificate (PEM); its file must be readable by its user alone."""
    sites: Path | None = None
    """The folder of the public keys of sites, each called after its client's number, such as
    `site-0.pub`; a file that is added while the server runs is taken in."""
    state: Path | None = None
    """The folder in which the server keeps the SuperLink's database, secret and log; left out,
    `server-state` beside the configuration."""
    database: bool = True
    """Whether the SuperLink keeps nodes and messages on disk, so that it may be restarted during a
    run; it takes about a second a round."""
    gate: bool = True
    """Whether the embedded gate is started; `false` where another proxy, such as nginx, stands in
    its place, which passes to `127.0.0.1:<link_port>`."""
    link_port: Annotated[int, Ge(0), Le(65535)] = 0
    """The SuperLink's port on 127.0.0.1; 0 for one that is free."""
    min_sites: Annotated[int, Ge(1)] = 1
    """So many sites are waited for before the first round."""
    joining: Annotated[float, Gt(0)] = 600.0
    """Seconds for which sites are waited for before the first round, and whenever fewer than
    `federation.min_replies` are online."""
    deadline: Annotated[float, Gt(0)] = 3600.0
    """Seconds in which a site has to answer, counted from when it is asked."""
    tries: Annotated[int, Ge(1)] = 3
    """How often a round is played, each time by a fresh cohort, before it is left without effect
    because it got fewer than `federation.min_replies`."""
    window: Annotated[int, Ge(1)] = 16
    """Sites that are at work at once."""
    metrics: Annotated[int, Ge(0), Le(65535)] | None = None
    """The port of 127.0.0.1 on which `/metrics` is answered, in Prometheus' format; 0 for one that
    is free; left out, there is none."""


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
    rates: Path | None = None
    """The file of rates that `fedpeft tune` has written; what was picked for a row goes before
    `settings`."""


@dataclass(frozen=True)
class TunedSection:
    """Where the learning rate comes from; `fedpeft tune` and `fedpeft compare` write it."""

    trials: Annotated[int, Ge(0)] = 0
    """Trials among which `fedpeft tune` picked the rate; 0 where it did not."""
    source: str = ""
    """The file that the rate is from, or the sweep where it is proposed; empty where the
    configuration gives it."""
    other: list[str] = field(default_factory=list)
    """Fields that were others when the rate was picked, such as `federation.rounds`."""
