"""Settings -> the data set, and which client holds what of it."""

from dataclasses import replace
from functools import partial

from fedpeft import data
from fedpeft.errors import BadInput
from fedpeft.experiment.config import Config
from fedpeft.experiment.sections import CLIENTS, DataSection
from fedpeft.models import embed
from fedpeft.tasks import TASKS, make_task


def read_data(config: Config) -> data.Dataset:
    """Return the data that the settings name, as their task reads it."""
    choice = config.data
    if choice.source in data.BUILT_IN:
        return _built_in(data.BUILT_IN[choice.source], config.task.kind)
    columns = columns_of(choice, config.task.kind)
    if choice.source == "hub":
        assert choice.name is not None  # checked with the settings
        return data.from_hub(
            data.HubChoice(
                choice.name,
                choice.config,
                choice.train_split,
                choice.validation_split,
                choice.test_split,
            ),
            columns=columns,
            validation_fraction=choice.validation_fraction,
            test_fraction=choice.test_fraction,
        )
    assert choice.train is not None  # checked with the settings
    return data.from_files(
        train=choice.train,
        validation=choice.validation,
        test=choice.test,
        columns=columns,
        validation_fraction=choice.validation_fraction,
        test_fraction=choice.test_fraction,
    )


def columns_of(choice: DataSection, kind: str) -> data.Columns:
    """Return which columns of the user's files a task of that ``kind`` reads, and as what."""
    schema = TASKS[kind].schema
    named = {column.role: getattr(choice, column.role) for column in schema.columns}
    names = schema.read(named)
    if choice.label is not None or (schema.is_labelled and schema.label is None):
        names[data.LABEL] = choice.label or data.LABEL
    if choice.key is not None:
        names[data.KEY] = choice.key
    return data.Columns(schema, names, choice.delimiter, choice.labels or ())


def read_test(config: Config) -> data.Dataset:
    """Return what a server of sites reads: label names, and test texts where it has any.

    Training texts are the sites'. Those of a built-in source are read for its labels and left out.
    BadInput where the labels are nowhere named.
    """
    choice, kind = config.data, config.task.kind
    if choice.source in data.BUILT_IN:
        whole = read_data(config)
        names = TASKS[kind].names(whole)
        return replace(whole, train=whole.train.take([]), listed=names)
    columns = columns_of(choice, kind)
    schema = columns.schema
    if not columns.labels and (schema.answers is not None or data.LABEL in columns.names):
        raise BadInput(
            "data.labels is missing: the server sees no training texts, so name all labels, "
            "in the order of the model's outputs, such as ['neg', 'pos']"
        )
    nothing = data.Rows({role: () for role in columns.names if role not in (data.LABEL, data.KEY)})
    if choice.test is None:
        if config.evaluation.where == "server":
            raise BadInput(
                "data.test is missing: name a file of test texts of the server's own, or let the "
                "sites score, each on its own: evaluation.where = 'sites'"
            )
        return data.Dataset("sites", nothing, nothing, nothing, columns.labels)
    test = data.read(choice.test, columns)
    return data.Dataset("sites", nothing, nothing, test, columns.labels)


def read_own(choice: DataSection, kind: str) -> data.Dataset:
    """Return what a site holds: all rows of train, and of test where that is named.

    Nothing is held out. Raises BadInput as ``data.read`` does.
    """
    columns = columns_of(choice, kind)
    assert choice.train is not None  # checked with the settings
    train = data.read(choice.train, columns)
    nothing = train.take([])
    # Read without train: a site's test texts may have labels that its train lacks.
    test = nothing if choice.test is None else data.read(choice.test, columns)
    return data.Dataset(choice.train.name, train, nothing, test, columns.labels)


def _built_in(source: data.Collection, kind: str) -> data.Dataset:
    """Return data that come with Python; BadInput where a task of that kind does not read them."""
    readers: list[str] = []
    for name, task_kind in TASKS.items():
        read = {column.role for column in task_kind.schema.columns}
        if read.issuperset(source.columns):
            readers.append(name)
    if kind not in readers:
        raise BadInput(
            f"task.kind = {kind!r}: data.source = {source.name!r} has the columns "
            f"{', '.join(source.columns)}, for {' or '.join(readers)}; "
            "name files of yours in data.train"
        )
    return source.dataset(seed=0)


def divide(config: Config, dataset: data.Dataset) -> data.Partition:
    """Return who holds what.

    A partition by clusters of texts loads the model by itself, without a head and on the CPU.
    """
    choice, seed = config.partition, config.seed
    clients = choice.clients or CLIENTS
    match choice.kind:
        case "iid":
            divided = data.iid(dataset, clients, seed)
        case "quantity":
            divided = data.quantity(
                dataset, clients, seed, beta=choice.beta, min_examples=choice.min_examples
            )
        case "dirichlet":
            divided = data.dirichlet(
                dataset, clients, seed, alpha=choice.alpha, min_examples=choice.min_examples
            )
        case "label_skew":
            divided = data.label_skew(dataset, clients, seed, alpha=choice.alpha)
        case "shards":
            divided = data.shards(
                dataset, clients, seed, shards_per_client=choice.shards_per_client
            )
        case "cluster":
            names = TASKS[config.task.kind].names(dataset)
            task = make_task(config.task, names, config.model.max_length)
            divided = data.cluster(
                dataset,
                clients,
                seed,
                embed=partial(embed, config.model, task),
                clusters=choice.clusters,
                alpha=choice.alpha,
                min_examples=choice.min_examples,
            )
        case "by_key":
            # Left out, it means all keys, unless they are grouped.
            number = clients if choice.group else choice.clients
            divided = data.by_key(dataset, number, group=choice.group)
        case "file":
            assert choice.file is not None  # checked with the settings
            divided = data.from_file(dataset, choice.file)
        case "flower":
            arguments = dict(choice.flower)
            name = arguments.pop("name")  # checked with the settings
            number = choice.clients or arguments.get("num_partitions", CLIENTS)
            divided = data.flower(dataset, number, seed, name=name, arguments=arguments)
    return divided
