"""The clients of a simulation as files of sites, to try a deployment on the same rows."""

import json
from pathlib import Path
from typing import Any

from fedpeft import data
from fedpeft.experiment.config import Config
from fedpeft.experiment.reading import columns_of, divide, read_data


def carve(config: Config, folder: Path) -> list[Path]:
    """Write what each client of ``config`` would hold into a folder of its own, as JSON Lines.

    They are ``folder/site-<client>/train.jsonl`` and ``test.jsonl``, with the columns that the
    settings name; returns these folders.
    """
    dataset = read_data(config)
    partition = divide(config, dataset)
    names = columns_of(config.data, config.task.kind).names
    folders: list[Path] = []
    for client, (train, test) in enumerate(zip(partition.train, partition.test, strict=True)):
        site = folder / f"site-{client}"
        site.mkdir(parents=True, exist_ok=True)
        _write(site / "train.jsonl", dataset.train.take(train.tolist()), dict(names))
        if len(test):
            _write(site / "test.jsonl", dataset.test.take(test.tolist()), dict(names))
        folders.append(site)
    return folders


def _write(path: Path, rows: data.Rows, names: dict[str, str]) -> None:
    """Write rows, each an object with the columns that ``names`` gives to roles."""
    lines: list[str] = []
    for row in range(len(rows)):
        record: dict[str, Any] = {}
        for role, values in rows.columns.items():
            record[names[role]] = values[row]
        if rows.labels and data.LABEL in names:
            record[names[data.LABEL]] = rows.labels[row]
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
