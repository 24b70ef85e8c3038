"""GGUF files, as llama.cpp has them: converted once into a folder that transformers loads."""

import json
import os
import shutil
from functools import lru_cache
from hashlib import blake2b, file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedpeft.data.user_cache import cache_folder
from fedpeft.errors import BadInput
from fedpeft.models.causes import absent, cause, quiet
from fedpeft.models.choice import locate
from fedpeft.wire.durable import sync

MAGIC: Final = b"GGUF"
"""How every such file begins."""
ORIGIN: Final = "converted_from.json"
"""The file in a converted folder that says where it is from."""


def located(name: str) -> str:
    """Return the folder or hub id that transformers loads for ``name``.

    That of a GGUF file is a folder in the user's cache, into which it is converted the first time.
    """
    location = locate(name)
    return str(converted(Path(location), name)) if Path(location).is_file() else location


def converted(file: Path, name: str) -> Path:
    """Return the folder that holds the model in a GGUF file, with tokenizer and chat template.

    Its weights are float32, whatever they were quantised to in the file. ``name``: the user's name
    for the model. A file that cannot be converted raises BadInput.
    """
    _check_kind(file, name)
    stat = file.stat()
    digest = _digest(file, stat.st_size, stat.st_mtime_ns)
    cache = cache_folder() / "gguf"
    # Another version of transformers may read the same file in another way.
    folder = cache / f"{digest}-{transformers.__version__}"
    if folder.is_dir():
        return folder
    if missing := absent("gguf"):
        raise BadInput(f"model.name = {name!r}: to read a GGUF file: pip install {missing}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One conversion at a time: it takes the memory of two models.
        with FileLock(cache / "lock"):
            _convert(file, folder, digest)
    # Libraries raise what they like for a damaged file: struct.error, IndexError, OverflowError.
    except Exception as error:
        raise BadInput(
            f"model.name = {name!r}: {file.name} cannot be converted: {cause(error)}; "
            "give another file, or a folder or hub id of the model"
        ) from error
    return folder


def _check_kind(file: Path, name: str) -> None:
    """Raise BadInput for a file of another kind than GGUF."""
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(MAGIC))
    except OSError as error:
        why = f"{file} cannot be read: {error.strerror}"
        raise BadInput(f"model.name = {name!r}: {why}") from error
    if magic != MAGIC:
        why = f"is no GGUF file, as it begins with {magic!r}"
        raise BadInput(f"model.name = {name!r}: {why}; give a GGUF file, a folder or a hub id")


# Asked for several times a run; size and time tell whether the file is still the same.
@lru_cache
def _digest(file: Path, size: int, modified: int) -> str:  # noqa: ARG001
    """Return a digest of the content of ``file``."""
    with file.open("rb") as opened:
        return file_digest(opened, lambda: blake2b(digest_size=8)).hexdigest()


def _convert(file: Path, folder: Path, digest: str) -> None:
    """Write the model in ``file`` into ``folder``, whole or not at all."""
    # What a killed conversion has left.
    for left in folder.parent.glob("*.part"):
        shutil.rmtree(left)
    if folder.is_dir():  # another process was faster
        return
    part = folder.with_name(f"{folder.name}.part")
    try:
        _write(file, part)
        about = {
            "file": str(file.resolve()),
            "blake2b": digest,
            "transformers": transformers.__version__,
            "gguf": version("gguf"),
        }
        (part / ORIGIN).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        # To the disk before the rename, or a power cut could leave a folder of empty files.
        for written in part.iterdir():
            sync(written)
        os.replace(part, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(file: Path, folder: Path) -> None:
    """Write what transformers reads from ``file`` as a folder of its own."""
    place, asked = str(file.parent), {"gguf_file": file.name}
    models: Any = AutoModelForCausalLM  # without types
    with quiet():
        config: Any = AutoConfig.from_pretrained(place, **asked)
        tokenizer: Any = AutoTokenizer.from_pretrained(place, **asked)
        model, report = models.from_pretrained(
            place, config=config, dtype=torch.float32, output_loading_info=True, **asked
        )
        # transformers would draw what is missing at random, without a word.
        if missing := sorted(report["missing_keys"]):
            few = ", ".join(missing[:3])
            raise ValueError(f"{len(missing)} parameters are missing in it, such as {few}")
        # A model that was read from GGUF refuses to be saved; one made of its parameters does not.
        with torch.device("meta"):
            plain = models.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
