"""Who holds what: a partition as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from fedpeft.data import Dataset, Partition, label_counts
from fedpeft.data.integers import ordered
from fedpeft.errors import BadInput
from fedpeft.report.names import MOST, literal, plain

MOST_NAMED = 240
"""Clients or labels whose names fit a picture; of more, only every second, third ... is named."""


def table(dataset: Dataset, partition: Partition) -> Table:
    """Return a row per client: examples, labels held, and the commonest ones with their shares."""
    counts, labels = label_counts(dataset.train, partition), ordered(dataset.train.labels)
    title = f"{dataset.name}: {len(partition.train)} clients, {int(counts.sum())} examples"
    shown = Table(title=Text(literal(title)), box=None)
    shown.add_column("client")
    for name in ("train", "test", "labels"):
        shown.add_column(name, justify="right")
    shown.add_column("mostly")
    for name, test, row in zip(partition.names, partition.test, counts, strict=True):
        total = int(row.sum())
        shares: list[str] = []
        # The three commonest labels, the first of equals first; fewer where it holds fewer.
        for label in np.argsort(-row, kind="stable")[:3]:
            if row[label]:
                shares.append(f"{labels[label]} {row[label] / total:.0%}")
        numbers = (str(total), str(len(test)), str(int((row > 0).sum())))
        # As Text, since a string would be read as markup: "[/x]" or ":fire:".
        shown.add_row(Text(literal(name)), *numbers, Text(literal(", ".join(shares))))
    return shown


def picture(dataset: Dataset, partition: Partition, path: Path) -> None:
    """Draw a circle for every client and label; its area is the number of examples.

    Raises BadInput without matplotlib, and where ``path`` cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise BadInput(
            "the picture needs matplotlib; get it with: pip install 'fedpeft[plots]'"
        ) from error
    counts = label_counts(dataset.train, partition)
    clients, labels = counts.shape
    # Long names are cut, so that one of them does not squeeze the picture.
    label_names = [literal(label, MOST) for label in ordered(dataset.train.labels)]
    client_names = [literal(name, MOST) for name in partition.names]
    largest = f"who holds what (largest circle: {int(counts.max())} examples)"
    title = f"{literal(dataset.name, MOST)}: {largest}"
    # Inches: margins, about a third of an inch a client and label, and room for their names.
    width = 2.5 + 0.32 * min(clients, MOST_NAMED) + _beyond_a_dozen(label_names)
    height = 1.2 + 0.3 * min(labels, MOST_NAMED) + _beyond_a_dozen(client_names)
    wide_enough = 1.0 + 0.07 * len(title)
    figure = Figure(figsize=(max(width, wide_enough), height), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    where = np.argwhere(counts > 0)  # (circles, 2): client, label
    # Areas in square points: the largest circle, 12.6 points wide, fits into a row of 0.3 inches.
    sizes = 160 * counts[tuple(where.T)] / counts.max()
    axes.scatter(where[:, 0], where[:, 1], s=sizes, color="#0072B2", alpha=0.85, linewidths=0)
    named_labels, named_clients = _named(labels), _named(clients)
    axes.set_yticks(named_labels, label_names[:: named_labels.step], fontsize=7)
    axes.set_xticks(named_clients, client_names[:: named_clients.step], fontsize=7, rotation=90)
    axes.set_xlim(-0.7, clients - 0.3)
    axes.set_ylim(labels - 0.3, -0.7)  # upside down: the first label on top
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    above = axes.set_title(title, fontsize=9, loc="left")
    # Names are the user's own; "$" in them must not start a formula.
    for text in (above, *axes.get_xticklabels(), *axes.get_yticklabels()):
        plain(text)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: the picture cannot be written: {error}") from error


def _beyond_a_dozen(names: Sequence[str]) -> float:
    """Return the inches that the longest of ``names`` needs beyond twelve characters."""
    return 0.06 * max(0, max(map(len, names)) - 12)


def _named(count: int) -> range:
    """Return which of ``count`` rows or columns are named: all where there is room."""
    # -(-a // b) rounds up.
    return range(0, count, -(-count // MOST_NAMED))
