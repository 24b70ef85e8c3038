"""What the cache of tokens saves: a split from its file to tokens without it, over with it.

    python -m benchmarks.encoding           # about 2 minutes on 2 cores
    python -m benchmarks.encoding --quick

20 Newsgroups (`experiments/data/20news.toml` says where to put it), or another file with text and label. The file is read
either way; with the cache, its rows are hashed and their tokens read. How much longer a tokeniser takes depends on how long
the texts are.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from benchmarks.common import interleaved, ratio, report
from fedpeft import data
from fedpeft.data.user_cache import cache_folder
from fedpeft.models import locate
from fedpeft.tasks import TASKS, TaskSection, TokenCache, make_task
from fedpeft.training.hardware import Machine

LENGTH = 128
"""Tokens kept of a text."""


def seconds(path: Path, tokenizer: object, megabytes: int) -> dict[str, float]:
    """Return the wall time of each step from the file to its tokens, and of both."""
    choice = TaskSection()
    columns = data.Columns(TASKS[choice.kind].schema, {"text": "text", "label": "label"})
    began = time.perf_counter()
    rows = data.read(path, columns)
    read = time.perf_counter()
    names = tuple(sorted(set(rows.labels)))
    task = make_task(choice, names, LENGTH).with_tokenizer(tokenizer)
    cache = TokenCache(tokenizer, choice, names, LENGTH, 10**6 * megabytes)
    examples = cache.encode(task, rows)
    ended = time.perf_counter()
    assert len(examples) == len(rows)
    return {"read": read - began, "encode": ended - read, "total": ended - began}


def cold(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what ``measure`` says with nothing kept."""
    shutil.rmtree(cache_folder(), ignore_errors=True)
    return measure()


def main(
    file: Annotated[Path, typer.Option(help="A file with the columns text and label.")] = Path(
        "data/20news/train.jsonl.gz"
    ),
    look: Annotated[bool, typer.Option("--quick", help="One repetition.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions.")] = 5,
) -> None:
    """Print seconds and the ratio; the cache of the user is left alone."""
    tokenizer = AutoTokenizer.from_pretrained(locate("minilm"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        measure = partial(seconds, file, tokenizer, Machine().token_cache)
        found = interleaved(
            1 if look else repeats,
            # What "cold" leaves is what "warm" finds.
            **{"cold": partial(cold, measure), "warm": measure},
        )
        kept = sum(path.stat().st_size for path in cache_folder().rglob("*") if path.is_file())
    rows = [
        (
            name,
            one["read"],
            one["encode"],
            one["total"],
            ratio(found["cold"]["total"], one["total"]),
        )
        for name, one in found.items()
    ]
    columns = ("", "s to read the file", "s to encode", "s in all", "cold over it")
    report("encoding", columns, rows, file=str(file), max_length=LENGTH, bytes_kept=kept)


if __name__ == "__main__":
    typer.run(main)
