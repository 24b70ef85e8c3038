"""What ``fedpeft deploy init`` writes can be used as it is, and nothing that exists is overwritten."""

import re
import stat
import tomllib
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedpeft.deployment.join import gate_of
from fedpeft.deployment.site import read_site
from fedpeft.engines.flower.app_folder import APP
from fedpeft.engines.flower.gate import FLEET
from fedpeft.engines.flower.reach import public_bytes
from fedpeft.engines.flower.sites import numbers_of
from fedpeft.errors import BadInput
from fedpeft.experiment.config import from_tree, merge, read

from .builders import Ground, cli_call, refused

PRIVATE = {"ca.key", "server.key", "site.key"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "fl"
    outcome = cli_call("deploy", "init", folder, "--sites", "2", "--host", "fl.example.org")
    assert outcome.code == 0, outcome
    assert outcome.out.count("fedpeft join") == 2
    return folder


def test_private_keys_are_their_users_alone(made: Path) -> None:
    files = [path for path in made.rglob("*") if path.is_file()]
    assert {path.name for path in files if b"PRIVATE KEY" in path.read_bytes()} == PRIVATE
    for path in files:
        if path.name in PRIVATE:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_the_certificate_is_signed_by_the_ca_for_the_host_and_the_loopback(made: Path) -> None:
    ca = x509.load_pem_x509_certificate((made / "ca" / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((made / "server" / "server.crt").read_bytes())
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    for site in ("site-0", "site-1"):
        assert (made / site / "ca.crt").read_bytes() == (made / "ca" / "ca.crt").read_bytes()


def test_each_site_reads_its_settings_and_the_server_knows_its_key_by_its_number(
    made: Path,
) -> None:
    numbers = numbers_of(made / "server" / "sites")
    for number in range(2):
        site = read_site(made / f"site-{number}" / "site.toml")
        gate = gate_of(site)
        assert (gate.host, gate.port) == ("fl.example.org", 9443)
        assert numbers[public_bytes(gate.key)] == site.client == number
        key = load_ssh_private_key(site.key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp384r1"


def test_the_server_reads_its_settings(made: Path) -> None:
    config = from_tree(merge(read(made / "server" / "server.toml"), {"engine": {"kind": "sites"}}))
    assert config.server.certificate == made / "server" / "server.crt"
    assert config.server.min_sites == 2
    assert config.federation.clients_per_round == 2


def test_settings_of_a_simulation_are_taken_over_but_for_what_sites_have(
    ground: Ground, tmp_path: Path
) -> None:
    outcome = cli_call("deploy", "init", tmp_path / "fl", "--config", ground.config)
    assert outcome.code == 0, outcome
    tree = tomllib.loads((tmp_path / "fl" / "server" / "server.toml").read_text())
    assert tree["training"] == ground.tree()["training"]
    assert "train" not in tree["data"]
    assert "partition" not in tree
    site = tomllib.loads((tmp_path / "fl" / "site-0" / "site.toml").read_text())
    assert site["models"] == {"bert": "bert"}
    assert site["limits"]["methods"] == ["lora"]


def test_nothing_is_overwritten(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    refused(cli_call("deploy", "init", made), str(made), "exists")
    key = made / "site-0" / "site.key"
    refused(cli_call("deploy", "key", key, made / "new.pub"), str(key), "exists")
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_one_more_key_is_taken_in_and_a_file_of_another_kind_is_named(made: Path) -> None:
    sites = made / "server" / "sites"
    outcome = cli_call("deploy", "key", made / "third.key", sites / "site-2.pub")
    assert outcome.code == 0
    assert sorted(numbers_of(sites).values()) == [0, 1, 2]
    for name, content, told in (
        ("anna.pub", (sites / "site-2.pub").read_bytes(), "after the client's number"),
        ("site-7.pub", b"ssh-rsa AAAA", "is no public key"),
        ("site-8.pub", (sites / "site-2.pub").read_bytes(), "that of another file"),
    ):
        (sites / name).write_bytes(content)
        with pytest.raises(BadInput, match=told):
            numbers_of(sites)
        (sites / name).unlink()


def test_a_server_section_of_ones_own_is_not_lost_in_silence(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("[server]\nport = 1\n")
    refused(cli_call("deploy", "init", tmp_path / "fl", "--config", config), "[server] already")
    assert not (tmp_path / "fl").exists()


def test_nginx_passes_what_the_gate_passes(made: Path) -> None:
    text = (made / "server" / "nginx.conf").read_text()
    calls = re.search(r"\^/v1/fleet/\(([a-z|-]+)\)\$ \{", text)
    assert calls is not None
    assert {f"/v1/fleet/{call}" for call in calls[1].split("|")} == FLEET
    assert "listen 9443 ssl" in text
    assert "server_name fl.example.org" in text


def test_what_a_unit_of_systemd_writes_lies_where_it_may_write(made: Path) -> None:
    """``ProtectSystem=full`` makes /usr, /boot and /etc read-only."""
    for unit in (
        made / "server" / "fedpeft-server.service",
        made / "site-0" / "fedpeft-site.service",
    ):
        lines = dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))
        assert lines["ProtectSystem"] == "full"
        folders = [lines["WorkingDirectory"], lines["Environment"].removeprefix("XDG_CACHE_HOME=")]
        assert all(folder.startswith("/var/lib/fedpeft/") for folder in folders), unit
    text = (made / "server" / "nginx.conf").read_text()
    assert "/var/lib/fedpeft/server/server.crt" in text


def test_the_containers_name_what_is_there_and_go_on_with_a_run(made: Path) -> None:
    services = yaml.safe_load((made / "compose.yaml").read_text())["services"]
    assert sorted(services) == ["server", "site-0", "site-1"]
    for name, service in services.items():
        assert (made / service["build"] / "Dockerfile").is_file()
        [volume] = service["volumes"]
        place, inside = volume.split(":")
        assert inside == service["working_dir"]
        command, file, *options = service["command"].split()
        assert (command, options) in (("serve", ["--resume"]), ("join", []))
        assert (made / place / file).is_file(), name
    assert services["server"]["networks"]["default"]["aliases"] == ["fl.example.org"]


def test_the_app_for_flowers_own_programs_is_a_kilobyte_without_code(tmp_path: Path) -> None:
    assert cli_call("flower-app", tmp_path / "app").code == 0
    assert [path.name for path in (tmp_path / "app").iterdir()] == ["pyproject.toml"]
    assert len(APP) < 1024
    components = tomllib.loads(APP.decode())["tool"]["flwr"]["app"]["components"]
    for reference in components.values():
        module, _, name = reference.partition(":")
        assert hasattr(__import__(module, fromlist=[name]), name)
    refused(cli_call("flower-app", tmp_path / "app"), "exists")


@pytest.mark.parametrize("missing", ["certificate", "key", "sites"])
def test_a_server_without_keys_is_told_how_to_make_them(
    missing: str, made: Path, tmp_path: Path
) -> None:
    tree = tomllib.loads((made / "server" / "server.toml").read_text())
    del tree["server"][missing]
    import tomli_w

    path = made / "server" / f"without-{missing}.toml"
    path.write_text(tomli_w.dumps(tree))
    refused(
        cli_call("serve", path, "--runs", tmp_path), f"server.{missing} is missing", "deploy init"
    )
