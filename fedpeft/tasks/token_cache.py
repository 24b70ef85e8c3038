"""Encoded splits, kept between runs in the user's cache under a digest of all they depend on."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from xxhash import xxh3_128_digest

from fedpeft.data.rows import Rows
from fedpeft.data.user_cache import cache_folder, keep
from fedpeft.tasks.choice import TaskSection
from fedpeft.tasks.padding import joined
from fedpeft.tasks.task import Encoded, Example, SourceForm, Task

FEWEST: Final = 500
"""Rows from which an encoding is kept: fewer are encoded faster than they are looked up."""
DIGEST: Final = 16
"""Bytes of the digest in front of a file."""

SOURCE: Final = "source "
"""Before the names of the tensors that sources are kept in."""


@final
@dataclass(frozen=True)
class TokenCache:
    """The encodings that a task and a tokenizer have made before.

    ``choice``, ``names`` and ``max_length``: of the task. ``limit``: bytes of all files together,
    of which the longest unused go first; 0 keeps none. ``sources``: how the sources of examples are
    kept; without it, splits whose examples have any are not.

    A file is a digest, then tensors in the format of safetensors. One that is damaged is as good as
    none. Where the folder cannot be written, nothing is kept.
    """

    tokenizer: Any
    choice: TaskSection
    names: tuple[str, ...]
    max_length: int
    limit: int
    sources: SourceForm | None = None

    def encode(self, task: Task, rows: Rows) -> Encoded:
        """Return what ``task.encode`` returns, from the cache where that is possible."""
        # Only a fast tokenizer can say all that its tokens depend on.
        if not self.limit or len(rows) < FEWEST or not self.tokenizer.is_fast:
            return task.encode(rows)
        path = cache_folder() / "tokens" / f"{self._key(rows)}.safetensors"
        kept = _read(path, self.sources)
        if kept is not None:
            return kept
        encoded = task.encode(rows)
        content = packed(encoded, self.sources)
        if content is not None:
            _write(path, content, self.limit)
        return encoded

    def _key(self, rows: Rows) -> str:
        """Return a digest of all that the encoding of ``rows`` depends on."""
        # The numbers, too: notes name rows by them.
        parts = [list(rows.columns.items()), rows.labels, rows.numbers]
        held = json.dumps(parts, ensure_ascii=False)
        hashed = blake2b(held.encode("utf-8", "surrogatepass"), digest_size=DIGEST)
        hashed.update(self._about)
        return hashed.hexdigest()

    @cached_property
    def _about(self) -> bytes:
        """What tokens depend on besides rows: tokenizer, task, versions and this code."""
        about = [
            _content(self.tokenizer),
            asdict(self.choice),
            self.names,
            self.max_length,
            [version(name) for name in ("fedpeft", "transformers", "tokenizers")],
            _code(),
        ]
        return json.dumps(about, sort_keys=True).encode()


def _content(tokenizer: Any) -> list[object]:
    """Return all that decides what a fast tokenizer makes of texts."""
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set anew in every call, so that they would tell what was tokenised before.
    del pipeline["truncation"], pipeline["padding"]
    sides = [tokenizer.truncation_side, tokenizer.padding_side]
    # Which token begins or ends a text, and which stands for no answer, the pipeline does not say.
    roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    return [
        type(tokenizer).__name__,
        pipeline,
        sides,
        roles,
        tokenizer.split_special_tokens,
        tokenizer.model_input_names,
        tokenizer.chat_template,
    ]


@cache
def _code() -> str:
    """Return a digest of the code of all tasks, so that a change of it makes old files useless."""
    hashed = blake2b(digest_size=DIGEST)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def packed(encoded: Encoded, sources: SourceForm | None = None) -> bytes | None:
    """Return examples as the content of a file; None for those that cannot be kept.

    Tensors of all examples stand one after another, beside their lengths and shapes.
    """
    examples = encoded.examples
    has_sources = any(example.source is not None for example in examples)
    label_dims = {example.labels.dim() for example in examples}
    with_segments = {example.segments is not None for example in examples}
    if (has_sources and sources is None) or len(label_dims) != 1 or len(with_segments) != 1:
        return None
    about: dict[str, object] = {"notes": encoded.notes}
    parts: Mapping[str, Tensor] = {}
    if has_sources and sources is not None:
        about["sources"], parts = sources.pack([example.source for example in examples])
    tensors = {
        "ids": joined([example.ids for example in examples]),
        "lengths": torch.tensor(encoded.lengths),
        "labels": joined([example.labels.flatten() for example in examples]),
        "label_shapes": torch.tensor(
            [list(example.labels.shape) for example in examples], dtype=torch.int64
        ),
        "rows": torch.tensor([example.row for example in examples]),
        "weights": torch.tensor([example.weight for example in examples]),
        "about": torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8),
    }
    if with_segments == {True}:
        segments = [example.segments for example in examples if example.segments is not None]
        tensors["segments"] = joined(segments)
    for name, tensor in parts.items():
        tensors[SOURCE + name] = tensor
    content = save(tensors)
    return xxh3_128_digest(content) + content


def unpacked(content: bytes, sources: SourceForm | None = None) -> Encoded:
    """Return the examples that ``packed`` made ``content`` of; ValueError for damaged content."""
    digest, tensor_bytes = content[:DIGEST], content[DIGEST:]
    if digest != xxh3_128_digest(tensor_bytes):
        raise ValueError("damaged")
    tensors = load(tensor_bytes)
    about = json.loads(tensors["about"].numpy().tobytes())
    lengths = tensors["lengths"].tolist()
    ids = torch.split_with_sizes(tensors["ids"].long(), lengths)
    shapes = tensors["label_shapes"]
    labels = torch.split_with_sizes(tensors["labels"].long(), shapes.prod(dim=1).tolist())
    segments: Sequence[Tensor | None] = [None] * len(ids)
    if "segments" in tensors:
        segments = torch.split_with_sizes(tensors["segments"].long(), lengths)
    sources_of: Sequence[Any] = [None] * len(ids)
    if sources is not None and "sources" in about:
        parts: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name.startswith(SOURCE):
                parts[name.removeprefix(SOURCE)] = tensor
        sources_of = sources.unpack(about["sources"], parts)
    columns = zip(
        ids,
        labels,
        shapes.tolist(),
        tensors["rows"].tolist(),
        segments,
        tensors["weights"].tolist(),
        sources_of,
        strict=True,
    )
    examples: list[Example] = []
    for one_ids, one_labels, shape, row, one_segments, weight, source in columns:
        examples.append(Example(one_ids, one_labels.view(shape), row, one_segments, weight, source))
    return Encoded(examples, tuple(about["notes"]))


def _read(path: Path, sources: SourceForm | None) -> Encoded | None:
    """Return what a file holds, and note that it was used; None where it is of no use."""
    try:
        encoded = unpacked(path.read_bytes(), sources)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    with suppress(OSError):
        os.utime(path)
    return encoded


def _write(path: Path, content: bytes, limit: int) -> None:
    """Write a file whole or not at all; remove others until all have ``limit`` bytes at most."""
    if len(content) > limit:
        return
    keep(path, content)
    with suppress(OSError):  # a folder that cannot be read has no room to make
        _make_room(path.parent, limit)


def _make_room(folder: Path, limit: int) -> None:
    """Remove the files that were not used for longest until all have ``limit`` bytes at most."""
    ages: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        # Another process may remove it meanwhile.
        with suppress(FileNotFoundError):
            stat = path.stat()
            ages.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in ages)
    for _, size, path in sorted(ages):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size
