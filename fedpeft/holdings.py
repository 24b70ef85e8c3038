"""Who holds what: a partition as a table and as a picture."""

from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from fedpeft.data import Dataset, Partition, label_counts
from fedpeft.types import BadInput


def table(dataset: Dataset, partition: Partition) -> Table:
    """Return a row per client: examples, labels held, and the commonest ones with their shares."""
    counts = label_counts(dataset.train, partition)
    shown = Table(title=f"{dataset.name}: {len(partition.train)} clients, {int(counts.sum())} examples", box=None)
    shown.add_column("client")
    for name in ("train", "test", "labels"):
        shown.add_column(name, justify="right")
    shown.add_column("mostly")
    for name, test, row in zip(partition.names, partition.test, counts, strict=True):
        total, top = int(row.sum()), np.argsort(-row, kind="stable")[:3]
        mostly = ", ".join(f"{dataset.labels[label]} {row[label] / total:.0%}" for label in top if row[label])
        shown.add_row(escape(name), str(total), str(len(test)), str(int((row > 0).sum())), escape(mostly))
    return shown


def picture(dataset: Dataset, partition: Partition, path: Path) -> None:
    """Draw the examples of every client and label as circles, their area the number; needs matplotlib, or raises BadInput."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise BadInput("the picture needs matplotlib; get it with: pip install 'fedpeft[plots]'") from error
    counts = label_counts(dataset.train, partition)
    clients, labels = counts.shape
    figure = Figure(figsize=(2.5 + 0.32 * clients, 1.2 + 0.3 * labels), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    where = np.argwhere(counts > 0)
    sizes = 160 * counts[tuple(where.T)] / counts.max()
    axes.scatter(where[:, 0], where[:, 1], s=sizes, color="#0072B2", alpha=0.85, linewidths=0)
    axes.set_yticks(range(labels), dataset.labels, fontsize=7)
    axes.set_xticks(range(clients), partition.names, fontsize=7, rotation=90)
    axes.set_xlim(-0.7, clients - 0.3)
    axes.set_ylim(labels - 0.3, -0.7)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(f"{dataset.name}: who holds what (largest circle: {int(counts.max())} examples)", fontsize=9, loc="left")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: the picture cannot be written: {error}") from error
