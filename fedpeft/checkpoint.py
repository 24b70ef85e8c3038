"""Save and resume: state, memories and the length of the ledger, made one by a manifest that is renamed into place last."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedpeft.memory import Memories, written
from fedpeft.types import BadInput, State, WireError
from fedpeft.wire import decode, digest, encode

KEEP = 2
"""Checkpoints kept, so that a damaged one leaves another to fall back to."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from: the state, every client's memory, and the ledger's length in bytes."""

    state: State
    memories: Memories
    ledger: int


def pack(state: State) -> bytes:
    """Return a state as bytes."""
    known = sorted(state.memories.items())
    return encode(
        {
            **{f"shared/{name}": tensor for name, tensor in state.shared.items()},
            **{f"server/{name}": tensor for name, tensor in state.server.items()},
            "round": torch.tensor(state.round),
            "memories": torch.tensor(known, dtype=torch.int64).reshape(-1, 2),
        }
    )


def unpack(blob: bytes) -> State:
    """Return the state that ``pack`` turned into ``blob``; anything else raises WireError."""
    fields = decode(blob)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}

    memories = dict(fields["memories"].tolist())
    return State(int(fields["round"]), part("shared/"), part("server/"), memories)


def manifest(folder: Path, number: int) -> Path:
    """Return the path of the manifest of the checkpoint after ``number`` rounds."""
    return folder / f"{number:06d}.json"


def save(folder: Path, state: State, memories: Memories, ledger: int, config: str) -> None:
    """Write a checkpoint into ``folder``; until its manifest is in place, the one before it is the latest.

    ``ledger``: length of the ledger, in bytes, that is known to be on the disk. ``config``: digest of the configuration.
    Of memories that clients keep elsewhere nothing is saved: a resumed run takes these clients for new. OSError as the
    disk gives it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = replace(state, memories={c: v for c, v in state.memories.items() if memories.holds(c, v)})
    blob = pack(state)
    files = {f"{state.round:06d}.state": digest(blob).hex()}
    write(folder / f"{state.round:06d}.state", blob)
    for client, version in state.memories.items():
        name = f"client-{client}-{version:06d}.memory"
        memory = memories.get(client, version)
        files[name] = digest(memory).hex()
        # What a crash left of this round is not trusted.
        if written(version) >= state.round - 1 or not (folder / name).exists():
            write(folder / name, memory)
    content = {"round": state.round, "config": config, "ledger": ledger, "files": files}
    write(manifest(folder, state.round), json.dumps(content, indent=1).encode())
    _prune(folder)


def load(folder: Path, config: str, say: Callable[[str], None], *, mend: bool = True) -> Checkpoint | None:
    """Return the latest whole checkpoint in ``folder``, None where none was ever written.

    A damaged one is passed over, and ``say`` told so; ``mend`` deletes it, so that its files are written anew.
    BadInput when all are damaged or they belong to another ``config``.
    """
    damaged: list[Path] = []
    for path in sorted(folder.glob("*.json"), reverse=True):
        try:
            found = _read(path, config)
        except (WireError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            say(f"checkpoint {path} is damaged ({error}); falling back to the one before")
            damaged.append(path)
        else:
            if mend and damaged:
                for other in damaged:
                    other.unlink()
                _prune(folder)
            return found
    if damaged:
        raise BadInput(f"{folder}: every checkpoint is damaged; start again with --overwrite")
    return None


def _read(path: Path, config: str) -> Checkpoint:
    content = json.loads(path.read_bytes())
    if content["config"] != config:
        raise BadInput(
            f"{path} belongs to configuration {content['config']}, the run folder says {config}; "
            "restore the configuration it was made with, or start again with --overwrite"
        )
    blobs: dict[str, bytes] = {}
    for name, expected in content["files"].items():
        blobs[name] = (path.parent / name).read_bytes()
        if digest(blobs[name]).hex() != expected:
            raise WireError(f"{name} does not match its digest")
    state = unpack(blobs[f"{content['round']:06d}.state"])
    memories = Memories()
    for client, version in state.memories.items():
        memories.put(client, version, blobs[f"client-{client}-{version:06d}.memory"])
    return Checkpoint(state, memories, content["ledger"])


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under a temporary name, to the disk, then renamed. I/O errors raise OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync(folder: Path) -> None:
    """Make the names in ``folder`` durable, where the system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path) -> None:
    """Delete all but the last checkpoints, and every file that none of them names."""
    manifests = sorted(folder.glob("*.json"))
    kept = manifests[-KEEP:]
    named = {name for path in kept for name in json.loads(path.read_bytes())["files"]}
    for path in folder.iterdir():
        if path not in kept and path.name not in named:
            path.unlink()
