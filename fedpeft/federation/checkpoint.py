"""Save and resume: state, memories and the length of the ledger.

A manifest makes them one checkpoint: it names their files and is renamed into place last.
"""

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
_WITHOUT_DIGEST = frozenset({"round", "config", "ledger", "files"})
"""What a manifest holds of a version that wrote none; nothing vouches for it."""
# The `.tmp` files are those that a crash left behind before their rename.
_OURS = re.compile(r"(\d{6,}\.(json|state)|client-\d+-\d{6,}\.memory)(\.tmp)?")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run resumes: the state, every client's memory, and the ledger's length in bytes.

    ``files``: name -> digest of every file that it was read from; empty for a run that begins.
    """

    state: State
    memories: Memories
    ledger: int
    files: Mapping[str, str] = field(default_factory=dict)


def pack(state: State) -> bytes:
    """Return a state as bytes.

    >>> state = State(3, {"w": torch.ones(2)}, memories={7: 2})
    >>> unpack(pack(state)).memories
    {7: 2}
    """
    fields: dict[str, torch.Tensor] = {}
    for name, tensor in state.shared.items():
        fields[f"shared/{name}"] = tensor
    for name, tensor in state.server.items():
        fields[f"server/{name}"] = tensor
    versions = sorted(state.memories.items())  # (client, version), one a row
    fields["round"] = torch.tensor(state.round)
    fields["memories"] = torch.tensor(versions, dtype=torch.int64).reshape(-1, 2)
    return encode(fields)


def unpack(blob: bytes) -> State:
    """Return the state that ``pack`` turned into ``blob``; anything else raises WireError."""
    fields = decode(blob)
    round_number = fields.pop("round", _NOTHING)
    versions = fields.pop("memories", _NOTHING)
    # Shapes and dtypes are checked before any value is used: a damaged file may hold anything.
    if (round_number.shape, round_number.dtype) != ((), torch.int64) or round_number < 0:
        raise WireError("not a state: its round is missing or of another form")
    if (versions.ndim, versions.dtype) != (2, torch.int64) or versions.shape[1] != 2:
        raise WireError("not a state: its clients' memories are missing or of another form")
    groups: dict[str, dict[str, torch.Tensor]] = {"shared": {}, "server": {}}
    for full_name, tensor in fields.items():
        group, slash, name = full_name.partition("/")
        if group not in groups or not slash:
            raise WireError(f"not a state: tensor {full_name!r} is of no use in one")
        groups[group][name] = tensor
    memories = dict(versions.tolist())  # (clients, 2) -> client: version
    return State(int(round_number), groups["shared"], groups["server"], memories)


def manifest(folder: Path, rounds: int) -> Path:
    """Return the path of the manifest of the checkpoint after so many ``rounds``.

    >>> manifest(Path("checkpoints"), 12).name
    '000012.json'
    """
    return folder / f"{rounds:06d}.json"


@final
@dataclass
class Written:
    """What a run knows to be in its folder of checkpoints: it neither writes nor hashes it again.

    ``checkpoints``: of the last ones, number of rounds -> name of a file -> its digest. ``tidy``:
    whether the folder holds nothing else.
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
    """Write a checkpoint into ``folder``; until its manifest is there, the one before is latest.

    ``ledger``: length of the ledger, in bytes, that is known to be on the disk. ``config``: digest
    of the configuration. ``written``: what earlier calls have left there; it is brought up to date.
    A file that it does not name is written anew, as a crash may have damaged it. Memories that
    clients keep in processes of the run are not saved: a resumed run treats these clients as new.
    Of those kept elsewhere for good the versions are saved. Errors of the disk raise OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = Written() if written is None else written
    # 1. Collect what has to be written: the state, and memories that are not there yet.
    versions: dict[int, int] = {}
    for client, version in state.memories.items():
        if memories.holds(client, version):
            versions[client] = version
    if not memories.elsewhere:
        state = replace(state, memories=versions)
    known = written.checkpoints.get(max(written.checkpoints, default=0), {})
    files: dict[str, str] = {}
    new = {_state_file(state.round): pack(state)}
    for client, version in versions.items():
        name = _memory_file(client, version)
        if name in known:  # a client's memory of one round never changes
            files[name] = known[name]
        else:
            new[name] = memories.get(client, version)
    # 2. Write the files, and the manifest last: a crash in between leaves the checkpoint before.
    for name, blob in new.items():
        files[name] = digest(blob).hex()
        write(folder / name, blob)
    content: dict[str, object] = {
        "round": state.round,
        "config": config,
        "ledger": ledger,
        "files": files,
    }
    if memories.elsewhere:
        content["elsewhere"] = True
    content["digest"] = _vouched(content)
    write(manifest(folder, state.round), json.dumps(content, indent=1).encode())
    written.checkpoints[state.round] = files
    # 3. Drop old checkpoints. Once the folder is tidy, what to drop is known without a look at it.
    if written.tidy:
        _drop_oldest(folder, written)
    else:
        _prune(folder)
        written.tidy = True


def _state_file(rounds: int) -> str:
    """Return the name of the file with the state after so many ``rounds``."""
    return f"{rounds:06d}.state"


def _memory_file(client: int, version: int) -> str:
    """Return the name of the file with one version of a client's memory."""
    return f"client-{client}-{version:06d}.memory"


def is_ours(name: str) -> bool:
    """Return whether a file of this name in a folder of checkpoints is one of ours.

    >>> is_ours("000012.state"), is_ours("client-3-000011.memory.tmp"), is_ours("notes.json")
    (True, True, False)
    """
    return _OURS.fullmatch(name) is not None


def manifests(folder: Path) -> list[Path]:
    """Return the paths of the manifests in ``folder``, by number of rounds."""
    ours = [path for path in folder.glob("*.json") if is_ours(path.name)]
    return sorted(ours, key=lambda path: int(path.stem))


def load(
    folder: Path,
    configs: Collection[str],
    on_warning: Callable[[str], None],
    *,
    mend: bool = True,
) -> Checkpoint | None:
    """Return the latest whole checkpoint in ``folder``, None where none was ever written.

    A damaged checkpoint is passed over, and ``on_warning`` is told so; ``mend`` deletes it, so that
    its files are written anew. A run may write newer checkpoints while this function reads: then
    these are read. ``configs``: accepted digests of the configuration. BadInput when all
    checkpoints are damaged, or when one belongs to another configuration.
    """
    tried: set[Path] = set()
    damaged: list[Path] = []
    # The folder is looked at anew each time: a run at work may have written and dropped some.
    while left := [path for path in manifests(folder) if path not in tried]:
        path = left[-1]
        tried.add(path)
        try:
            latest = _read(path, configs)
        except _DAMAGE as error:
            if path.exists():  # otherwise the run has got further, and has dropped it
                on_warning(
                    f"checkpoint {path} is damaged ({error}); falling back to the one before"
                )
                damaged.append(path)
        else:
            if mend and damaged:
                # Manifests first, then the files that no manifest names any more.
                for other in damaged:
                    other.unlink()
                _prune(folder)
            return latest
    if damaged:
        raise BadInput(f"{folder}: every checkpoint is damaged; start again with --overwrite")
    return None


def _read(path: Path, configs: Collection[str]) -> Checkpoint:
    """Return the checkpoint with the manifest at ``path``, one of ``_DAMAGE`` where it is damaged.

    BadInput where it belongs to none of ``configs``.
    """
    content = json.loads(path.read_bytes())
    _check_vouched(content)
    if content["config"] not in configs:
        raise BadInput(
            f"{path} belongs to configuration {content['config']}, "
            f"the run folder says {next(iter(configs))}; "
            "restore the configuration it was made with, or start again with --overwrite"
        )
    # Every file is read once: the bytes that match the digest are the bytes that are used.
    blobs: dict[str, bytes] = {}
    for name, expected in content["files"].items():
        blobs[name] = (path.parent / name).read_bytes()
        if digest(blobs[name]).hex() != expected:
            raise WireError(f"{name} does not match its digest")
    state = unpack(blobs[_state_file(content["round"])])
    # Not isinstance: JSON's true is an int, too.
    if state.round != content["round"] or type(content["ledger"]) is not int:
        raise WireError("its manifest disagrees with its state, or holds no length of the ledger")
    memories = Memories(elsewhere=bool(content.get("elsewhere")))
    if not memories.elsewhere:
        for client, version in state.memories.items():
            memories.put(client, version, blobs[_memory_file(client, version)])
    return Checkpoint(state, memories, content["ledger"], content["files"])


def _vouched(content: Mapping[str, object]) -> str:
    """Return the digest of what a manifest says besides it."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return digest(canonical.encode()).hex()


def _check_vouched(content: dict[str, object]) -> None:
    """Raise WireError unless a manifest is as it was written."""
    if content.keys() - {"elsewhere"} == _WITHOUT_DIGEST:
        return
    said = content.pop("digest", None)
    if said != _vouched(content):
        raise WireError("its manifest does not match its digest")


def _prune(folder: Path) -> None:
    """Delete all but the last checkpoints, and our files that none of them names.

    Files with other names stay.
    """
    by_round = manifests(folder)
    kept = by_round[-KEEP:]
    # Manifests go before the files that they name: otherwise a reader would find them damaged.
    for path in by_round[:-KEEP]:
        path.unlink()
    named: set[str] = set()
    for path in kept:
        named.add(path.name)
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
        # A memory that has not changed since is a file of the later checkpoints as well.
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
