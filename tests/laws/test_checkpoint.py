"""A checkpoint comes back as it was, or not at all: what is damaged is passed over, what is half-written was never there."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.errors import BadInput, WireError
from fedpeft.federation import checkpoint
from fedpeft.federation.memory import Memories
from fedpeft.types import NO_MEMORY, State
from fedpeft.wire import durable
from fedpeft.wire import messages as wire
from fedpeft.wire.messages import digest, encode
from tests.strategies import PAYLOADS, bits

CONFIG = "c0ffee"


def state(number: int) -> State:
    """Return the state after ``number`` rounds: client 1 remembers the last one, client 2 round 0."""
    known = {1: number - 1, 2: 0} if number else {}
    return State(
        number,
        {"x:A": torch.full((2, 2), float(number))},
        {"alive": torch.tensor([True, False])},
        known,
    )


def remembered(number: int) -> Memories:
    """Return the memories that go with ``state(number)``."""
    memories = Memories()
    if number:
        memories.put(1, number - 1, encode({"m": torch.tensor(number)}))
        memories.put(2, 0, encode({"anchor": torch.arange(5.0)}))
    return memories


def saved(folder: Path, *numbers: int, written: checkpoint.Written | None = None) -> None:
    """Save as one run, which knows what it has ``written``, or as one that begins here."""
    written = checkpoint.Written() if written is None else written
    for number in numbers:
        checkpoint.save(folder, state(number), remembered(number), 10 * number, CONFIG, written)


def loaded(folder: Path, says: list[str] | None = None) -> checkpoint.Checkpoint:
    found = checkpoint.load(folder, [CONFIG], pytest.fail if says is None else says.append)
    assert found is not None
    return found


def known(tensors: dict[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


@settings(deadline=None, max_examples=50)
@given(
    PAYLOADS,
    PAYLOADS,
    st.integers(0, 10**6),
    st.dictionaries(st.integers(0, 2**40), st.integers(0, 10**6), max_size=3),
)
def test_a_state_comes_back_to_the_bit(
    shared: dict[str, Tensor], server: dict[str, Tensor], number: int, memories: dict[int, int]
) -> None:
    found = checkpoint.unpack(checkpoint.pack(State(number, shared, server, memories)))
    assert (found.round, found.memories) == (number, memories)
    assert (known(dict(found.shared)), known(dict(found.server))) == (known(shared), known(server))


def test_what_is_saved_is_loaded_with_memories_and_the_ledgers_length(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "none", [CONFIG], pytest.fail) is None
    folder = tmp_path / "made" / "here"
    saved(folder, 0, 1, 2)
    found = loaded(folder)
    assert checkpoint.pack(found.state) == checkpoint.pack(state(2))
    assert found.ledger == 20
    for client, version in ((1, 1), (2, 0)):
        assert found.memories.get(client, version) == remembered(2).get(client, version)


def test_two_checkpoints_are_kept_and_no_file_that_they_do_not_name(tmp_path: Path) -> None:
    (tmp_path / "000001.state.tmp").write_bytes(b"left by a crash")
    saved(tmp_path, 0, 1, 2, 3)
    manifests = sorted(path.name for path in tmp_path.glob("*.json"))
    assert manifests == ["000002.json", "000003.json"]
    named = {
        name for path in manifests for name in json.loads((tmp_path / path).read_text())["files"]
    }
    assert {path.name for path in tmp_path.iterdir()} == {*manifests, *named}
    assert checkpoint.manifest(tmp_path, 3).name == "000003.json"


FILES = ["000003.json", "000003.state", "client-1-000002.memory"]
DAMAGES = [
    (name, damage) for name in FILES for damage in ("cut", "emptied", "missing", "one bit off")
]
DAMAGES.remove(("000003.json", "missing"))  # a checkpoint without manifest never was


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_said_so_and_played_again(
    tmp_path: Path, name: str, damage: str
) -> None:
    """The round that was damaged is played and saved once more: it must then be whole, whatever lies in the folder."""
    saved(tmp_path, 2, 3)
    whole = (tmp_path / name).read_bytes()
    changed = {
        "cut": whole[:-7],
        "emptied": b"",
        "missing": b"",
        "one bit off": whole[:60] + bytes([whole[60] ^ 1]) + whole[61:],
    }
    (tmp_path / name).write_bytes(changed[damage])
    if damage == "missing":
        (tmp_path / name).unlink()
    says: list[str] = []
    found = loaded(tmp_path, says)
    assert (found.state.round, found.ledger) == (2, 20)
    assert len(says) == 1
    assert str(tmp_path / "000003.json") in says[0]
    assert checkpoint.pack(found.state) == checkpoint.pack(state(2))
    saved(tmp_path, 3)
    again = loaded(tmp_path)
    assert again.state.round == 3
    assert again.memories.get(1, 2) == remembered(3).get(1, 2)


def test_what_a_crash_left_of_a_round_is_written_anew(tmp_path: Path) -> None:
    """The round is played again, and perhaps not to the bit: on a GPU, or with other threads."""
    saved(tmp_path, 4)
    (tmp_path / "client-1-000004.memory").write_bytes(encode({"m": torch.tensor(99)}))
    saved(tmp_path, 5)
    found = loaded(tmp_path)
    assert found.state.round == 5
    assert found.memories.get(1, 4) == remembered(5).get(1, 4)


def test_where_all_are_damaged_nothing_is_loaded_in_silence(tmp_path: Path) -> None:
    saved(tmp_path, 2, 3)
    for path in tmp_path.glob("*.state"):
        path.write_bytes(b"")
    with pytest.raises(BadInput, match="every checkpoint is damaged"):
        checkpoint.load(tmp_path, [CONFIG], lambda _: None)


def without_digest(path: Path) -> dict[str, Any]:
    """Return a manifest as version 0.1 wrote it: nothing vouches for what it says."""
    content: dict[str, Any] = json.loads(path.read_text())
    del content["digest"]
    return content


@pytest.mark.parametrize("changed", ["round", "config", "ledger", "files", "digest", "other"])
def test_a_manifest_with_any_field_changed_counts_as_damaged(tmp_path: Path, changed: str) -> None:
    saved(tmp_path, 2, 3)
    path = tmp_path / "000003.json"
    content = json.loads(path.read_text())
    other = {"round": 2, "ledger": 31, "files": {}}.get(changed, "0")
    path.write_text(json.dumps({**content, changed: other}))
    assert loaded(tmp_path, []).state.round == 2


def test_a_manifest_without_a_digest_is_read_if_it_says_no_more_than_those_that_had_none(
    tmp_path: Path,
) -> None:
    saved(tmp_path, 2, 3)
    path = tmp_path / "000003.json"
    content = without_digest(path)
    path.write_text(json.dumps(content))
    assert loaded(tmp_path).state.round == 3
    path.write_text(json.dumps({**content, "digesx": "0"}))
    assert loaded(tmp_path, []).state.round == 2


MANIFESTS = [
    b"[]",
    b"null",
    b"7",
    b'{"config": "c0ffee"}',
    b'{"config": "c0ffee", "files": 3}',
    b'{"config": "c0ffee", "files": {"../000002.state": ""}}',
    b'{"config": "c0ffee", "files": {"\\u0000": ""}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", MANIFESTS)
def test_a_manifest_that_is_none_counts_as_damaged(tmp_path: Path, content: bytes) -> None:
    saved(tmp_path, 2)
    (tmp_path / "000003.json").write_bytes(content)
    assert loaded(tmp_path, []).state.round == 2


def test_a_checkpoint_of_another_configuration_is_refused_and_both_are_named(
    tmp_path: Path,
) -> None:
    saved(tmp_path, 2)
    with pytest.raises(BadInput, match=r"belongs to configuration c0ffee, the run folder says 7ea"):
        checkpoint.load(tmp_path, ["7ea"], pytest.fail)


@pytest.mark.parametrize("wrong", [{"round": "3"}, {"ledger": "30"}, {"ledger": None}])
def test_a_manifest_with_fields_of_another_form_counts_as_damaged(
    tmp_path: Path,
    wrong: dict[str, object],
) -> None:
    saved(tmp_path, 2, 3)
    path = tmp_path / "000003.json"
    path.write_text(json.dumps({**without_digest(path), **wrong}))
    assert loaded(tmp_path, []).state.round == 2


def test_a_state_under_the_name_of_another_round_counts_as_damaged(tmp_path: Path) -> None:
    saved(tmp_path, 2, 3)
    path = tmp_path / "000003.json"
    content = without_digest(path)
    (tmp_path / "000003.state").write_bytes((tmp_path / "000002.state").read_bytes())
    earlier = json.loads((tmp_path / "000002.json").read_text())["files"]
    content["files"] |= {**earlier, "000003.state": earlier["000002.state"]}
    path.write_text(json.dumps(content))
    assert loaded(tmp_path, []).state.round == 2


def test_a_damaged_manifest_before_the_one_that_is_whole_is_in_nobodys_way(tmp_path: Path) -> None:
    saved(tmp_path, 2, 3)
    (tmp_path / "000002.json").write_bytes(b"{")
    (tmp_path / "000004.json").write_bytes(b"{")
    says: list[str] = []
    assert loaded(tmp_path, says).state.round == 3
    assert len(says) == 1
    saved(tmp_path, 4)
    assert loaded(tmp_path).state.round == 4


NUMBER = torch.tensor(3)
KNOWN = torch.tensor([[1, 2], [2, 0]])
STATES = {
    "no field": {},
    "no memories": {"round": NUMBER},
    "no round": {"memories": KNOWN},
    "memories that are flat": {"round": NUMBER, "memories": KNOWN.view(-1)},
    "memories of three numbers": {"round": NUMBER, "memories": KNOWN.repeat(1, 2)[:, :3]},
    "memories of one number": {"round": NUMBER, "memories": NUMBER},
    "memories of fractions": {"round": NUMBER, "memories": KNOWN + 0.5},
    "a round of two numbers": {"round": torch.tensor([3, 4]), "memories": KNOWN},
    "half a round": {"round": torch.tensor(2.5), "memories": KNOWN},
    "a round that is true": {"round": torch.tensor(True), "memories": KNOWN},
    "a round before the first": {"round": torch.tensor(-1), "memories": KNOWN},
    "a tensor of neither part": {"round": NUMBER, "memories": KNOWN, "x": NUMBER},
    "a tensor of another part": {"round": NUMBER, "memories": KNOWN, "other/x": NUMBER},
}


@pytest.mark.parametrize("name", STATES)
def test_tensors_that_are_no_state_are_refused(name: str) -> None:
    whole = {"round": NUMBER, "memories": KNOWN, "shared/x": NUMBER}
    assert checkpoint.unpack(encode(whole)) == State(3, {"x": NUMBER}, {}, {1: 2, 2: 0})
    with pytest.raises(WireError):
        checkpoint.unpack(encode(STATES[name]))
    with pytest.raises(WireError):
        checkpoint.unpack(b"")


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_none_counts_as_damaged_under_a_true_digest(
    tmp_path: Path,
    name: str,
) -> None:
    saved(tmp_path, 2, 3)
    path = tmp_path / "000003.json"
    content = without_digest(path)
    blob = encode(STATES[name])
    (tmp_path / "000003.state").write_bytes(blob)
    content["files"]["000003.state"] = digest(blob).hex()
    path.write_text(json.dumps(content))
    assert loaded(tmp_path, []).state.round == 2


@pytest.mark.parametrize("step", range(1, 8))
def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the syncs fails, first of a file's content or its name, then of the next one's."""
    saved(tmp_path, 1, 2)
    left = [step]
    sync = os.fsync

    def failing(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        try:
            saved(tmp_path, 3)
        except OSError as error:
            full = error.errno == 28
        else:
            full = False
    assert full == (left[0] <= 0)
    found = loaded(tmp_path)
    assert found.state.round in ((2, 3) if full else (3,))
    assert checkpoint.pack(found.state) == checkpoint.pack(state(found.state.round))
    assert found.memories.get(1, found.state.round - 1) == remembered(found.state.round).get(
        1, found.state.round - 1
    )
    assert not list(tmp_path.glob("*.tmp"))
    saved(tmp_path, 3)
    assert loaded(tmp_path).state.round == 3


def test_clients_that_keep_their_memory_elsewhere_are_new_after_a_resume(tmp_path: Path) -> None:
    memories = Memories()
    memories.put(1, 1, b"here")
    checkpoint.save(tmp_path, state(2), memories, 0, CONFIG)
    found = loaded(tmp_path)
    assert found.state.memories == {1: 1}
    assert found.memories.get(1, 1) == b"here"
    assert found.memories.get(2, NO_MEMORY) == b""


class Spy:
    """Counts the bytes that checkpoints hash, the files they write and the folders they list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hashed, self.listed = 0, 0
        self.written: list[str] = []
        digest, write, listing = wire.digest, durable.write, Path.iterdir

        def hashing(blob: bytes) -> bytes:
            self.hashed += len(blob)
            return digest(blob)

        def writing(path: Path, content: bytes) -> None:
            self.written.append(path.name)
            write(path, content)

        def looking(path: Path) -> Iterator[Path]:
            self.listed += 1
            return listing(path)

        monkeypatch.setattr(checkpoint, "digest", hashing)
        monkeypatch.setattr(checkpoint, "write", writing)
        monkeypatch.setattr(Path, "iterdir", looking)


def many(count: int, number: int) -> tuple[State, Memories]:
    """Return a state after ``number`` rounds and ``count`` memories, of which client 0's is new."""
    versions = dict.fromkeys(range(count), 0) | {0: number - 1}
    memories = Memories()
    for client, version in versions.items():
        memories.put(client, version, encode({"m": torch.full((256,), float(client + version))}))
    return State(number, {"x": torch.zeros(4)}, {}, versions), memories


def test_saving_costs_what_has_changed_however_many_memories_there_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent = []
    for count in (3, 300):
        folder, written = tmp_path / str(count), checkpoint.Written()
        for number in (1, 2, 3):
            checkpoint.save(folder, *many(count, number), 0, CONFIG, written)
        with monkeypatch.context() as patched:
            spy = Spy(patched)
            checkpoint.save(folder, *many(count, 4), 0, CONFIG, written)
        assert spy.written == ["000004.state", "client-0-000003.memory", "000004.json"]
        assert spy.listed == 0
        list_of_versions = 16 * count  # two int64 a client in the state itself
        about = without_digest(checkpoint.manifest(folder, 4))
        manifest = len(json.dumps(about, separators=(",", ":")))  # is written anew as a whole, too
        spent.append(spy.hashed - list_of_versions - manifest)
        found = loaded(folder)
        assert checkpoint.pack(found.state) == checkpoint.pack(many(count, 4)[0])
        for client, version in found.state.memories.items():
            assert found.memories.get(client, version) == many(count, 4)[1].get(client, version)
        named = {name for path in checkpoint.manifests(folder) for name in files_of(path)}
        assert {path.name for path in folder.iterdir()} == {"000003.json", "000004.json", *named}
    assert spent[0] == pytest.approx(spent[1], abs=64)  # but for a longer header


def files_of(path: Path) -> dict[str, str]:
    return dict(json.loads(path.read_text())["files"])


def test_a_resumed_run_writes_and_hashes_only_what_has_changed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint.save(tmp_path, *many(5, 1), 0, CONFIG)
    checkpoint.save(tmp_path, *many(5, 2), 0, CONFIG)
    found = loaded(tmp_path)
    assert found.files == files_of(checkpoint.manifest(tmp_path, 2))
    spy = Spy(monkeypatch)
    checkpoint.save(tmp_path, *many(5, 3), 0, CONFIG, checkpoint.Written({2: found.files}))
    assert spy.written == ["000003.state", "client-0-000002.memory", "000003.json"]
    assert loaded(tmp_path).files.keys() == {"000003.state", "client-0-000002.memory"} | {
        f"client-{client}-000000.memory" for client in range(1, 5)
    }


@pytest.mark.parametrize("damage", ["cut", "one bit off", "missing"])
def test_damage_to_a_memory_that_was_written_long_ago_is_found(tmp_path: Path, damage: str) -> None:
    written = checkpoint.Written()
    for number in (1, 2, 3, 4):
        checkpoint.save(tmp_path, *many(3, number), 0, CONFIG, written)
    path = tmp_path / "client-2-000000.memory"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    if damage == "missing":
        path.unlink()
    with pytest.raises(BadInput, match="every checkpoint is damaged"):
        checkpoint.load(tmp_path, [CONFIG], lambda _: None)


def test_what_is_not_ours_is_neither_read_nor_deleted(tmp_path: Path) -> None:
    names = ["notes.json", "9.json", "x.state", ".DS_Store", "000001.state.bak"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder").mkdir()
    saved(tmp_path, 1, 2, 3, 4)
    checkpoint.save(tmp_path, state(5), remembered(5), 50, CONFIG)
    assert loaded(tmp_path).state.round == 5
    (tmp_path / "000005.state").write_bytes(b"")
    assert loaded(tmp_path, []).state.round == 4
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * len(names)
    assert (tmp_path / "folder").exists()


def test_a_million_rounds_come_after_all_before_them(tmp_path: Path) -> None:
    saved(tmp_path, 999_998, 999_999, 1_000_000, 1_000_001)
    found = [path.name for path in checkpoint.manifests(tmp_path)]
    assert found == ["1000000.json", "1000001.json"]
    assert loaded(tmp_path).state.round == 1_000_001


def test_whoever_reads_while_the_run_goes_on_finds_a_whole_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the manifest and its files the run saves twice, which deletes both."""
    written = checkpoint.Written()
    saved(tmp_path, 1, 2, written=written)
    read = Path.read_bytes
    overtaken: list[Path] = []

    def reading(path: Path) -> bytes:
        if path.name == "000002.state" and not overtaken:
            overtaken.append(path)
            saved(tmp_path, 3, 4, written=written)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    found = checkpoint.load(tmp_path, [CONFIG], pytest.fail, mend=False)
    assert overtaken
    assert found is not None
    assert found.state.round == 4


def test_a_damaged_older_manifest_does_not_stop_the_run(tmp_path: Path) -> None:
    saved(tmp_path, 2, 3)
    (tmp_path / "000002.json").write_text("{")
    saved(tmp_path, 3)
    assert loaded(tmp_path).state.round == 3
