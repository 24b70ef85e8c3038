"""What a site agrees to, what it tells of itself, and what it remembers."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.deployment.carving import carve
from fedpeft.deployment.memories import DiskMemories
from fedpeft.deployment.offer import (
    Offer,
    Refusal,
    accepted,
    check_sections,
    offer_of,
    read_offer,
)
from fedpeft.deployment.replies import LastReply
from fedpeft.deployment.required import shortfall
from fedpeft.deployment.site import Limits, Site, read_site
from fedpeft.deployment.trainer import Trainer
from fedpeft.errors import BadInput
from fedpeft.federation.memory import used
from fedpeft.wire.frames import Frame
from fedpeft.wire.messages import Kind, Request, encode
from fedpeft.wire.versions import ONCE
from tests.e2e.builders import LABELS, Ground, write_ground
from tests.parity.sockets import own_site

RUN = "0123456789abcdef"
MARK = "PLANTED"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return write_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def site(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp(f"sites-{MARK}")
    config = ground.chosen({"partition": {"clients": 2}, "data": {"labels": list(LABELS)}})
    made = own_site(0, carve(config, folder)[0], {"bert": str(ground.model)})
    yield made
    shutil.rmtree(made.state)


@pytest.fixture
def offer(ground: Ground) -> Offer:
    return offer_of(ground.chosen(), RUN, "0", LABELS)


def about(trainer: Trainer, offer: Offer) -> Any:
    return trainer.answer(Frame({"kind": "about", "config": offer.to_json()})).header


def test_an_offer_holds_no_path_and_reads_as_it_was_written(ground: Ground, offer: Offer) -> None:
    assert read_offer(offer.to_json()) == offer
    assert str(ground.folder) not in offer.to_json()
    assert offer.model["name"] == "bert"


def test_a_site_trains_on_its_own_data_with_its_own_model_on_its_own_machine(
    ground: Ground, site: Site, offer: Offer
) -> None:
    config = accepted(offer, site)
    assert str(config.data.train) == site.data["train"]
    assert config.data.labels == LABELS
    assert config.model.name == str(ground.model)
    assert config.machine.threads == 1
    assert config.training == ground.chosen().training


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {"name": "other"}}, "does not train model 'other'"),
        ({"model": {"name": "../bert"}}, "does not train model"),
        ({"model": {"name": "bert", "trust_remote_code": True}}, "which is the site's affair"),
        ({"method": {"name": "full"}}, "does not train method 'full'"),
        ({"method": {"name": "lora", "rank": -1}}, "method.rank"),
        ({"training": {"steps": 10**6}}, "at most 100000 steps"),
        ({"training": {"output": "/etc/passwd"}}, "unknown key 'training.output'"),
        ({"seed": "one"}, "offer.seed"),
        ({"wrap": []}, "this site trains only under secagg"),
        ({"wrap": [{"name": "secagg"}]}, "with smallest of secagg at least 4, not 3"),
        ({"wrap": [{"name": "secagg", "smallest": 4}]}, "this site trains only under dpsgd"),
        (
            {"wrap": [{"name": "dpsgd"}, {"name": "secagg", "smallest": 4}]},
            "with noise of dpsgd at least 1.5, not 1.0",
        ),
        ({"form": 2}, "install the same version"),
        ({"data": {"train": "/etc/passwd"}}, "unknown key 'offer.data'"),
        ({"machine": {"device": "cuda"}}, "unknown key 'offer.machine'"),
    ],
)
def test_a_site_refuses_by_name_what_it_does_not_agree_to(
    change: dict[str, Any], told: str, site: Site, offer: Offer
) -> None:
    insists: dict[str, dict[str, Any]] = {"secagg": {"smallest": 4}, "dpsgd": {"noise": 1.5}}
    careful = replace(site, limits=Limits(methods=("lora", "fedara"), require=insists))
    tree = {**asdict(offer), **change}
    trainer = Trainer(careful)
    answer = trainer.answer(Frame({"kind": "about", "config": json.dumps(tree)})).header
    assert told in answer["error"]


def test_a_site_agrees_to_what_is_as_strict_as_it_insists(site: Site, offer: Offer) -> None:
    insists = {
        "secagg": {},
        "dp": {"noise": 1, "clip": 0.5, "sharers": 3, "sampling": "cohort"},
    }
    careful = replace(site, limits=Limits(require=insists))
    strict = {"name": "dp", "noise": 1.25, "clip": 0.25, "sharers": 3}
    said = about(Trainer(careful), replace(offer, wrap=({"name": "secagg"}, strict)))
    assert said["trains"] == "lora under secagg, dp"


@pytest.mark.parametrize(
    ("require", "change", "lack"),
    [
        ({"clip": 0.5}, {"clip": 0.75}, "with clip of dp at most 0.5, not 0.75"),
        ({"sharers": 3}, {}, "with sharers of dp at least 3, not left out"),
        ({"quantile": 0.5}, {}, "with quantile of dp at least 0.5, not left out"),
        (
            {"sampling": "cohort"},
            {"sampling": "poisson"},
            "with sampling of dp = 'cohort', not 'poisson'",
        ),
    ],
)
def test_what_is_less_strict_than_a_site_insists_is_named(
    require: dict[str, Any], change: dict[str, Any], lack: str
) -> None:
    assert shortfall({"dp": require}, [{"name": "dp", **change}]) == lack


@pytest.mark.parametrize(
    ("require", "told"),
    [
        ({"secag": {}}, "limits.require.secag: is not a wrapper; did you mean 'secagg'?"),
        (
            {"secagg": {"smalest": 3}},
            "unknown key 'limits.require.secagg.smalest'; did you mean 'smallest'?",
        ),
        ({"secagg": {"smallest": 1}}, "limits.require.secagg.smallest = 1: must be at least 2"),
        ({"dpsgd": {"noise": float("inf")}}, "limits.require.dpsgd.noise = inf: give a finite"),
    ],
)
def test_a_mistake_in_what_a_site_insists_on_is_one_line(
    require: dict[str, dict[str, Any]], told: str, site: Site
) -> None:
    with pytest.raises(BadInput) as refusal:
        check_sections(replace(site, limits=Limits(require=require)))
    assert str(refusal.value).startswith(told)


def test_epochs_are_held_against_the_steps_that_they_take(site: Site, offer: Offer) -> None:
    examples = len(Path(site.data["train"]).read_text().splitlines())
    steps = 2 * -(-examples // 4)
    training = {**offer.training, "steps": None, "epochs": 2, "batch_size": 4}
    offer = replace(offer, training=training)
    enough = replace(site, limits=Limits(steps=steps))
    too_few = replace(site, limits=Limits(steps=steps - 1))
    assert "error" not in about(Trainer(enough), offer)
    assert f"at most {steps - 1} steps a round" in about(Trainer(too_few), offer)["error"]


@pytest.mark.parametrize("text", ["", "[]", "1", "{", "[" * 10**5])
def test_what_is_no_offer_is_refused(text: str) -> None:
    with pytest.raises(Refusal):
        read_offer(text)


def test_a_site_tells_how_much_it_has_and_nothing_else(site: Site, offer: Offer) -> None:
    said = about(Trainer(site), offer)
    lines = Path(site.data["train"]).read_text().splitlines()
    assert said.keys() == {"client", "examples", "texts", "tests", "weights", "agreed", "trains"}
    assert (said["client"], said["examples"]) == (0, len(lines))


def test_errors_that_leave_a_site_hold_nothing_of_its_data_or_its_paths(
    site: Site, offer: Offer, tmp_path: Path
) -> None:
    """Texts, labels and file names are planted; each way of failing is asked what it says."""
    logged: list[BaseException] = []
    bad = tmp_path / f"{MARK}.jsonl"
    told: list[str] = []
    for rows in (
        [{"text": f"{MARK} text", "label": f"{MARK} label"}],
        [{f"{MARK} column": "x"}],
        [{"text": 5, "label": MARK}],
        [],
    ):
        bad.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        planted = replace(site, data={"train": str(bad)})
        told.append(about(Trainer(planted, logged.append), offer)["error"])
    missing = replace(site, data={"train": str(tmp_path / f"{MARK}-missing.jsonl")})
    told.append(about(Trainer(missing, logged.append), offer)["error"])
    lost = replace(site, models={"bert": str(tmp_path / MARK)})
    told.append(about(Trainer(lost, logged.append), offer)["error"])
    for line in told:
        assert MARK not in line
        assert str(tmp_path) not in line
    # The site's own log has it all.
    assert sum(MARK in str(error) for error in logged) >= 4


def handle(trainer: Trainer, offer: Offer, request: bytes, **changes: Any) -> Frame:
    header = {"kind": "handle", "config": offer.to_json(), "client": 0, "memory": -1, **changes}
    return trainer.answer(Frame(header, request))


def request_for(trainer: Trainer, offer: Offer, round_number: int = 0, phase: int = 0) -> bytes:
    agreed = bytes.fromhex(about(trainer, offer)["agreed"])
    run = trainer._run
    assert run is not None
    state = run.worker.method.init(run.loaded.base, offer.seed)
    return Request(Kind.TRAIN, round_number, agreed, state.shared, phase=phase).encode()


def test_a_site_trains_no_more_often_than_it_likes(site: Site, offer: Offer) -> None:
    trainer = Trainer(replace(site, limits=Limits(interval=1000.0)))
    request = request_for(trainer, offer)
    assert "error" not in handle(trainer, offer, request).header
    assert "at most once in 1000 s" in handle(trainer, offer, request).header["error"]


@pytest.mark.parametrize(
    ("change", "asked", "begun"),
    [
        # (round, phase) of each request, and which of them are not told to wait.
        ({"wrap": [{"name": "secagg"}]}, [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)], 4),
        ({"method": {"name": "lora_a2"}}, [(0, 0), (0, 1), (0, 2)], 2),
        ({"method": {"name": "lora"}}, [(0, 0), (0, 1)], 1),
        ({"wrap": [{"name": "secagg"}]}, [(0, 0), (0, 1), (0, 1)], 2),
        ({"wrap": [{"name": "secagg"}]}, [(0, 0), (0, 2)], 1),
        ({"wrap": [{"name": "secagg"}]}, [(0, 0), (1, 1)], 1),
        ({"wrap": [{"name": "secagg"}]}, [(0, 0), (0, 1), (0, 0)], 2),
        ({"wrap": [{"name": "secagg"}]}, [(0, 2), (0, 3), (0, 4)], 2),
    ],
)
def test_the_exchanges_of_a_round_follow_each_other_without_waiting(
    change: dict[str, Any],
    asked: list[tuple[int, int]],
    begun: int,
    site: Site,
    offer: Offer,
) -> None:
    """What else may fail in a later exchange, such as keys that are missing, is not looked at."""
    trainer = Trainer(replace(site, limits=Limits(interval=1000.0)))
    offer = read_offer(json.dumps({**asdict(offer), **change}))
    waits: list[bool] = []
    for round_number, phase in asked:
        request = request_for(trainer, offer, round_number, phase)
        error = handle(trainer, offer, request).header.get("error", "")
        waits.append("at most once in 1000 s" in error)
    assert waits == [False] * begun + [True] * (len(asked) - begun)


def test_what_a_site_has_forgotten_is_sent_again_without_waiting(site: Site, offer: Offer) -> None:
    trainer = Trainer(replace(site, limits=Limits(interval=1000.0)))
    request = request_for(trainer, offer)
    assert "done" not in handle(trainer, offer, request, memory=7).header
    assert "done" in handle(trainer, offer, request).header


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"client": 1}, "client 1 is not held here"),
        ({"client": True}, "a frame without 'client'"),
        ({"memory": "0"}, "a frame without 'memory'"),
        ({"kind": "run"}, "unknown kind"),
    ],
)
def test_a_frame_of_another_form_is_refused(
    changes: dict[str, Any], told: str, site: Site, offer: Offer
) -> None:
    trainer = Trainer(site)
    assert told in handle(trainer, offer, b"", **changes).header["error"]


def test_memories_are_kept_in_two_versions_and_of_few_runs(tmp_path: Path) -> None:
    memories = DiskMemories(tmp_path, client=3, most=2)
    first, second, third = (encode({"anchor": torch.tensor(number)}) for number in range(3))
    memories.put(RUN, 0, first, assumed=-1)
    memories.put(RUN, 1, second, assumed=0)
    assert [memories.get(RUN, version) for version in (-1, 0, 1, 2)] == [b"", first, second, None]
    memories.put(RUN, 2, third, assumed=1)
    assert [memories.get(RUN, version) for version in (0, 1, 2)] == [None, second, third]
    for other in ("a" * 16, "b" * 16):
        memories.put(other, 0, first, assumed=-1)
    assert memories.get(RUN, 2) is None
    assert DiskMemories(tmp_path, client=3, most=2).get("b" * 16, 0) == first


@pytest.fixture
def open_to_all() -> Iterator[None]:
    """A umask that keeps nothing from anybody."""
    usual = os.umask(0)
    yield
    os.umask(usual)


@pytest.mark.usefixtures("open_to_all")
@pytest.mark.skipif(os.name != "posix", reason="files have no modes here")
def test_others_read_neither_memories_nor_the_last_reply(tmp_path: Path) -> None:
    """Under secure aggregation memories hold a round's secrets, and are written anew once these are used."""
    memories = DiskMemories(tmp_path, client=3, most=2)
    secrets = encode({ONCE + "seed": torch.ones(4), "anchor": torch.ones(2)})
    memories.put(RUN, 0, secrets, assumed=-1)
    kept = tmp_path / "memories" / RUN / "client-3-0.memory"
    # What a crash has left under the temporary name does not pass its mode on.
    left = kept.with_name("client-3-1.memory.tmp")
    left.write_bytes(b"half")
    assert mode(left) == 0o666
    memories.put(RUN, 1, encode({"anchor": torch.ones(2)}), assumed=0)
    assert kept.read_bytes() == used(secrets) != secrets
    LastReply(tmp_path).put("key", b"reply")
    written = [*tmp_path.rglob("*.memory"), tmp_path / "last.reply"]
    assert [mode(path) for path in written] == [0o600] * 3
    assert mode(kept.parent) == 0o700


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_memory_that_is_damaged_counts_as_forgotten(tmp_path: Path) -> None:
    """So the server sends what it held anew; it would refuse the round for ever otherwise."""
    memories = DiskMemories(tmp_path, client=3, most=2)
    memories.put(RUN, 0, encode({"anchor": torch.ones(9)}), assumed=-1)
    [path] = tmp_path.rglob("*.memory")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        assert memories.get(RUN, 0) is None
    path.write_bytes(whole)
    assert memories.get(RUN, 0) == whole


@pytest.mark.parametrize("run", ["", "..", "../../etc", "A" * 16, "a" * 65, "aaaaaaaa/b"])
def test_the_name_of_a_run_leads_nowhere_else(run: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal):
        DiskMemories(tmp_path, client=3, most=2).put(run, 0, b"x", assumed=-1)
    assert list(tmp_path.iterdir()) == []


def test_the_last_reply_answers_the_very_same_request_alone(tmp_path: Path) -> None:
    last, key = LastReply(tmp_path), LastReply.key({"client": 1, "memory": 0}, b"request")
    assert last.get(key) is None
    last.put(key, b"reply")
    assert LastReply(tmp_path).get(key) == b"reply"
    for other in (
        LastReply.key({"client": 1, "memory": 1}, b"request"),
        LastReply.key({"client": 1, "memory": 0}, b"request."),
    ):
        assert last.get(other) is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("server = 'http://localhost:9443'", "sites speak TLS alone"),
        ("server = 'localhost'", "write it as host:port"),
        ("server = 'localhost:99999'", "write it as host:port"),
        ("client = -1", "client = -1: must be at least 0"),
        ("models = {}", "name at least one base model"),
        ("data = {text = 'x'}", "data.train is missing"),
        ("colour = 1", "unknown key 'colour'"),
        ("limits = {message = 0}", "limits.message"),
        ("limits = {require = {secagg = 3}}", "limits.require.secagg = 3: is a section"),
    ],
)
def test_a_mistake_in_a_sites_settings_is_one_line(line: str, told: str, tmp_path: Path) -> None:
    settings = {
        "client": "client = 0",
        "server": "server = 'localhost:9443'",
        "ca": "ca = 'ca.crt'",
        "key": "key = 'site.key'",
        "data": "data = {train = 'train.jsonl'}",
        "models": "models = {minilm = 'minilm'}",
    }
    settings[line.split(maxsplit=1)[0]] = line
    path = tmp_path / "site.toml"
    path.write_text("\n".join(settings.values()))
    with pytest.raises(BadInput) as refusal:
        read_site(path)
    assert told in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_paths_of_a_site_start_at_its_file(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(
        "client = 0\nserver = 'https://fl.example.org:9443/'\nca = 'ca.crt'\nkey = 'site.key'\n"
        "[data]\ntrain = 'train.jsonl'\n[models]\nminilm = 'minilm'\n"
    )
    site = read_site(path)
    assert (site.ca, site.key) == (tmp_path / "ca.crt", tmp_path / "site.key")
    assert site.data["train"] == str(tmp_path / "train.jsonl")
    assert site.models == {"minilm": "minilm"}
    assert site.address == ("fl.example.org", 9443)
