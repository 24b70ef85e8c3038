"""Save and resume: state, memories and the length of the ledger, made one by a manifest that is renamed into place last."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import torch

from fedpeft.errors import BadInput, WireError
from fedpeft.federation.memory import Memories
from fedpeft.types import State
from fedpeft.wire.durable import write
from fedpeft.wire.messages import decode, digest, encode

KEEP = 2
"""Checkpoints kept, so that a damaged one leaves another to fall back to."""

_NOTHING = torch.zeros(0, 0)
_DAMAGE = (WireError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a damaged checkpoint may raise; the last one for JSON that is nested too deep."""
_OURS = re.compile(r"(\d{6,}\.(json|state)|client-\d+-\d{6,}\.memory)(\.tmp)?")


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from: the state, every client's memory, and the ledger's length in bytes.

    ``files``: name -> digest of what it was read from; none for a run that begins.
    """

    state: State
    memories: Memories
    ledger: int
    files: Mapping[str, str] = field(default_factory=dict)


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
    number = fields.pop("round", _NOTHING)
    known = fields.pop("memories", _NOTHING)
    if (number.shape, number.dtype) != ((), torch.int64) or number < 0:
        raise WireError("not a state: its round is missing or of another form")
    if (known.ndim, known.dtype) != (2, torch.int64) or known.shape[1] != 2:
        raise WireError("not a state: its clients' memories are missing or of another form")
    parts: dict[str, dict[str, torch.Tensor]] = {"shared": {}, "server": {}}
    for name, tensor in fields.items():
        part, slash, own = name.partition("/")
        if part not in parts or not slash:
            raise WireError(f"not a state: tensor {name!r} is of no use in one")
        parts[part][own] = tensor
    return State(int(number), parts["shared"], parts["server"], dict(known.tolist()))


def manifest(folder: Path, number: int) -> Path:
    """Return the path of the manifest of the checkpoint after ``number`` rounds."""
    return folder / f"{number:06d}.json"


@final
@dataclass
class Written:
    """What a run knows to be in its folder of checkpoints, and so neither writes nor hashes again.

    ``checkpoints``: of the last ones, number of rounds -> name of a file -> its digest. ``tidy``:
    whether there is nothing else.
    """

    checkpoints: dict[int, Mapping[str, str]] = field(default_factory=dict)
    tidy: bool = False


def save(
    folder: Path,
    state: State,
    memories: Memories,
    ledger: int,
    config: str,
    written: Written | None = None,
) -> None:
    """Write a checkpoint into ``folder``; until its manifest is in place, the one before it is the latest.

    ``ledger``: length of the ledger, in bytes, that is known to be on the disk. ``config``: digest of the configuration.
    ``written``: what earlier calls have left there, brought up to date; what it does not name is
    written anew, as a crash may have left it. Of memories that clients keep elsewhere nothing is
    saved: a resumed run takes these clients for new. OSError as the disk gives it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = Written() if written is None else written
    held = {c: v for c, v in state.memories.items() if memories.holds(c, v)}
    state = replace(state, memories=held)
    known = written.checkpoints.get(max(written.checkpoints, default=0), {})
    files: dict[str, str] = {}
    new = {_state_file(state.round): pack(state)}
    for client, version in held.items():
        name = _memory_file(client, version)
        if name in known:  # a client's memory of one round never changes
            files[name] = known[name]
        else:
            new[name] = memories.get(client, version)
    for name, blob in new.items():
        files[name] = digest(blob).hex()
        write(folder / name, blob)
    content = {"round": state.round, "config": config, "ledger": ledger, "files": files}
    write(manifest(folder, state.round), json.dumps(content, indent=1).encode())
    written.checkpoints[state.round] = files
    if written.tidy:
        _drop_oldest(folder, written)
    else:
        _prune(folder)
        written.tidy = True


def _state_file(number: int) -> str:
    return f"{number:06d}.state"


def _memory_file(client: int, version: int) -> str:
    return f"client-{client}-{version:06d}.memory"


def is_ours(name: str) -> bool:
    """Return whether a file of this name in a folder of checkpoints is one of ours.

    >>> is_ours("000012.state"), is_ours("client-3-000011.memory.tmp"), is_ours("notes.json")
    (True, True, False)
    """
    return _OURS.fullmatch(name) is not None


def manifests(folder: Path) -> list[Path]:
    """Return the paths of the manifests in ``folder``, by number of rounds."""
    found = [path for path in folder.glob("*.json") if is_ours(path.name)]
    return sorted(found, key=lambda path: int(path.stem))


def load(
    folder: Path,
    configs: Collection[str],
    on_warning: Callable[[str], None],
    *,
    mend: bool = True,
) -> Checkpoint | None:
    """Return the latest whole checkpoint in ``folder``, None where none was ever written.

    A damaged one is passed over, and ``say`` told so; ``mend`` deletes it, so that its files are
    written anew. A run that is at work may overtake who reads: then what has come is read. BadInput
    when all are damaged or belong to none of ``configs``, digests of the configuration.
    """
    tried: set[Path] = set()
    damaged: list[Path] = []
    while left := [path for path in manifests(folder) if path not in tried]:
        path = left[-1]
        tried.add(path)
        try:
            found = _read(path, configs)
        except _DAMAGE as error:
            if path.exists():  # otherwise the run has got further, and has dropped it
                on_warning(
                    f"checkpoint {path} is damaged ({error}); falling back to the one before"
                )
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


def _read(path: Path, configs: Collection[str]) -> Checkpoint:
    content = json.loads(path.read_bytes())
    if content["config"] not in configs:
        raise BadInput(
            f"{path} belongs to configuration {content['config']}, "
            f"the run folder says {next(iter(configs))}; "
            "restore the configuration it was made with, or start again with --overwrite"
        )
    blobs: dict[str, bytes] = {}
    for name, expected in content["files"].items():
        blobs[name] = (path.parent / name).read_bytes()
        if digest(blobs[name]).hex() != expected:
            raise WireError(f"{name} does not match its digest")
    state = unpack(blobs[_state_file(content["round"])])
    if state.round != content["round"] or type(content["ledger"]) is not int:
        raise WireError("its manifest disagrees with its state, or holds no length of the ledger")
    memories = Memories()
    for client, version in state.memories.items():
        memories.put(client, version, blobs[_memory_file(client, version)])
    return Checkpoint(state, memories, content["ledger"], content["files"])


def _prune(folder: Path) -> None:
    """Delete all but the last checkpoints and all files of ours that none of them names."""
    found = manifests(folder)
    kept = found[-KEEP:]
    for path in found[:-KEEP]:  # before the files that they name: no reader takes them for damaged
        path.unlink()
    named = {path.name for path in kept}
    for path in kept:
        named |= _files(path)
    for path in folder.iterdir():
        if is_ours(path.name) and path.name not in named:
            path.unlink()


def _drop_oldest(folder: Path, written: Written) -> None:
    """Delete what ``_prune`` would, without a look at the disk."""
    checkpoints = written.checkpoints
    while len(checkpoints) > KEEP:
        oldest = min(checkpoints)
        gone = set(checkpoints.pop(oldest))
        manifest(folder, oldest).unlink(missing_ok=True)
        for files in checkpoints.values():
            gone -= files.keys()
        for name in gone:
            (folder / name).unlink(missing_ok=True)


def _files(path: Path) -> set[str]:
    """Return the names of the files that a manifest names; none for one that cannot be read."""
    try:
        return set(json.loads(path.read_bytes())["files"])
    except _DAMAGE:
        return set()
