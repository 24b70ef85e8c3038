"""What a site writes down of itself, as lines or as JSON, holds nothing of its texts, its labels and its paths."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedpeft.deployment import child
from fedpeft.deployment.carving import carve
from fedpeft.deployment.child import TrainerProcess
from fedpeft.deployment.join import Answering
from fedpeft.deployment.offer import Offer, offer_of
from fedpeft.deployment.site import Site
from fedpeft.deployment.telling import JsonLog, in_lines
from fedpeft.deployment.trainer import Trainer
from fedpeft.engines.flower.connector import Asked
from fedpeft.errors import BadInput, WireError
from fedpeft.wire.messages import Kind, Request
from tests.e2e.builders import LABELS, OWN_WORDS, Ground, write_ground
from tests.parity.sockets import own_site

MARK = "PLANTED"
RUN = "0123456789abcdef"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return write_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def site(ground: Ground, tmp_path: Path) -> Iterator[Site]:
    config = ground.chosen({"partition": {"clients": 2}, "data": {"labels": list(LABELS)}})
    made = own_site(0, carve(config, tmp_path / MARK)[0], {"bert": str(ground.model)})
    yield made
    shutil.rmtree(made.state)


@pytest.fixture
def offer(ground: Ground) -> Offer:
    return offer_of(ground.chosen(), RUN, "0", LABELS)


def asked_of(site: Site, kind: str, to: dict[str, Any], request: bytes, log: Any) -> None:
    """Ask a site as its connector is asked; what goes wrong is told the server, and logged."""
    trainer: Any = SimpleNamespace(ask=Trainer(site).answer)
    with contextlib.suppress(WireError):
        Answering(site, trainer, log.say, log.tell)(Asked(kind, to, request))


@pytest.mark.parametrize("form", ["json", "lines"])
def test_a_sites_log_tells_what_it_did_and_nothing_of_what_it_holds(
    site: Site, offer: Offer, tmp_path: Path, form: str
) -> None:
    written: list[str] = []
    as_lines = SimpleNamespace(say=written.append, tell=in_lines(written.append))
    log = JsonLog("join", written.append) if form == "json" else as_lines
    config = {"config": offer.to_json()}

    # 1. A site in order: it is asked what it has, is asked to train, and is asked the same again.
    trainer = Trainer(site)
    run = trainer._built(offer.to_json())
    state = run.worker.method.init(run.loaded.base, offer.seed)
    request = Request(Kind.TRAIN, 0, run.worker.config, state.shared).encode()
    asked_of(site, "query", config, b"", log)
    for _ in range(2):
        asked_of(site, "train", {**config, "client": 0, "memory": -1}, request, log)

    # 2. Each way of failing: texts, labels, columns and names of files that must not show.
    bad = tmp_path / f"{MARK}.jsonl"
    for rows in (
        [{"text": f"{MARK} text", "label": f"{MARK} label"}],
        [{f"{MARK} column": "x"}],
        [{"text": 5, "label": MARK}],
        [],
    ):
        bad.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        asked_of(replace(site, data={"train": str(bad)}), "query", config, b"", log)
    asked_of(replace(site, data={"train": f"{MARK}-missing.jsonl"}), "query", config, b"", log)
    asked_of(replace(site, models={"bert": str(tmp_path / MARK)}), "query", config, b"", log)
    asked_of(site, "train", {**config, "client": 7, "memory": -1}, request, log)

    words = [word for own in OWN_WORDS.values() for word in own]
    for mark in (MARK, str(tmp_path), str(site.state), *LABELS, *words):
        assert not any(mark in line for line in written), mark
    assert len(written) == 10
    assert f"ready for a run of lora, with {len(run.dataset.train)} examples" in written[0]
    if form == "json":
        told = [json.loads(line) for line in written]
        assert [one["event"] for one in told] == ["ready", "answered", "again", *["refused"] * 7]
        assert told[0]["examples"] == len(run.dataset.train)
        assert (told[1]["round"], told[1]["down"]) == (0, len(request))
        assert told[1]["up"] == told[2]["up"] > 0


def test_a_trainers_own_words_go_into_a_file_of_its_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "program"
    program.write_text(
        f"#!/bin/sh\necho 'fedpeft: {MARK} first' >&2\necho 'fedpeft: {MARK}' >&2\nexit 2\n"
    )
    program.chmod(0o700)
    monkeypatch.setattr(child, "sys", SimpleNamespace(executable=str(program)))
    trainer = TrainerProcess(
        tmp_path / "site.toml", tmp_path / "state" / "trainer.sock", pytest.fail
    )
    # What ends the program at once is told whoever has started it; what was said before is kept.
    for times in (1, 2):
        with pytest.raises(BadInput, match=f"did not start: {MARK}$"):
            trainer.start()
        trainer.stop()
        log = tmp_path / "state" / child.LOG
        assert log.read_text().count(MARK) == 2 * times
        assert log.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(child, "LARGEST", 10)
    with pytest.raises(BadInput):
        trainer.start()
    trainer.stop()
    assert log.read_text().count(MARK) == 2
    assert MARK not in "".join(capfd.readouterr())
    assert sys.executable != str(program)
