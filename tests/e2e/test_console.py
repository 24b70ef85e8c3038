"""Whatever the console's encoding, commands print what they have to say; files stay UTF-8."""

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from fedpeft.cli.console import NEAREST, in_ascii, show_nearest

from .builders import LABELS, OWN_WORDS, Ground, examples, to_toml
from .reading import SHEETS

NAMES = dict(zip(LABELS, ("forêt → 漢", "naïve ± 1", "Straße", "plain"), strict=True))
"""Labels that no 8-bit encoding has all of."""
ALL = """
import importlib.util, json, sys, warnings
from fedpeft.cli import app as cli
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "matplotlib" else find_spec(name)
warnings.filterwarnings("ignore", "Glyph")  # of fonts in pictures
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["fedpeft", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
"""
ENCODINGS: dict[str, dict[str, str]] = {
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C locale": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}

FAST = ("cp1252",)


@pytest.fixture(scope="module")
def place(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a configuration; labels and clients have names beyond ASCII."""
    folder = tmp_path_factory.mktemp("accents")
    lines = []
    for row in examples():
        named = {**row, "label": NAMES[row["label"]], "site": f"h{row['site']} é漢"}
        lines.append(json.dumps(named, ensure_ascii=False) + "\n")
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    tree = {
        **ground.tree(),
        "data": {"source": "files", "train": "data.jsonl", "key": "site"},
        "partition": {"kind": "by_key"},
        "federation": {"rounds": 1, "clients_per_round": 2},
        "training": {"steps": 1, "batch_size": 4},
        "method": {"name": "fedara", "rank": 2},
        "evaluation": {"limit": 20},
    }
    (folder / "mine.toml").write_text(to_toml(tree), encoding="utf-8")
    return folder


def in_process(
    folder: Path,
    surroundings: dict[str, str],
    *commands: tuple[str, ...],
) -> tuple[int, bytes, str]:
    """Run commands, one after another, in a process; return its exit code and what it printed."""
    kept = {name: value for name, value in os.environ.items() if name[:3] not in ("LC_", "LAN")}
    done = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(commands)],
        cwd=folder,
        env={**kept, "COLUMNS": "200", **surroundings},
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace")


def commands(run: str) -> tuple[tuple[str, ...], ...]:
    """Return every command that prints names, texts or tables."""
    own = " ".join(OWN_WORDS["birds"])
    return (
        ("--help",),
        ("methods",),
        ("partition", "mine.toml", "--png", f"{run}.png"),
        ("run", "mine.toml", "--set", f"name={run}"),
        ("report", f"runs/{run}", "--to", f"{run}-report"),
        ("predict", f"runs/{run}", f"{own} → ± é 漢 :heart: [red]"),
    )


@pytest.mark.parametrize("name", [*FAST, pytest.param("ascii", marks=pytest.mark.slow)])
def test_every_command_prints_in_every_encoding_and_an_error_is_one_line(
    place: Path, name: str
) -> None:
    run = name.replace(" ", "-")
    mistake = ("run", "mine.toml", "--set", "method.targets=漢→é")
    code, printed, err = in_process(place, ENCODINGS[name], *commands(run), mistake)
    assert code == 2, err
    [line] = err.splitlines()
    assert "method.targets" in line
    encoding = "ascii" if name == "C locale" else name
    out = printed.decode(encoding)
    assert "majority class" in out
    if encoding == "utf-8":
        assert "forêt → 漢" in out
        assert "→ ± é 漢 :heart: [red]" in out
        assert "± sample standard deviation" in out
        return
    accent = "e" if encoding == "ascii" else "é"
    assert ("forêt -> ?" if encoding != "ascii" else "foret -> ?") in out
    assert f" {accent} ? :heart: [red]" in out
    assert "-----" in out
    for sheet in SHEETS:
        text = (place / f"{run}-report" / sheet).read_text(encoding="utf-8")
        assert "fedara" in text
    labels = json.loads((place / "runs" / run / "labels.json").read_text(encoding="utf-8"))
    assert labels == sorted(NAMES.values())


def test_what_ascii_lacks_is_shown_by_its_nearest() -> None:
    shown = {
        "3 ± 1": "3 +- 1",
        "1k→2k": "1k->2k",
        "a · b": "a - b",
        "café, Straße, naïve, Łódź": "cafe, Strasse, naive, Lodz",
        "½ µs ≥ 1 … ﬁn": "1/2 us >= 1 ... fin",
        "┏━┳━┓ ╭─╮ │ ╵": "+-+-+ +-+ | |",
        "漢字 🙂": "?? ?",
        "plain": "plain",
    }
    for text, ascii_text in shown.items():
        assert in_ascii(text) == ascii_text
    for character, near in NEAREST.items():
        assert near.isascii(), unicodedata.name(character)


def test_every_character_has_something_that_ascii_can_print() -> None:
    for code in [
        *range(0x3000),
        *range(0xD7F0, 0xE010),
        *range(0xFF00, 0x10100),
        0x1F642,
        0x10FFFF,
    ]:
        assert in_ascii(chr(code)).isascii()


def test_bytes_of_a_file_name_that_python_could_not_decode_are_printed_as_they_were() -> None:
    for encoding in ("utf-8", "ascii", "cp1252"):
        printed = io.BytesIO()
        stream = io.TextIOWrapper(printed, encoding=encoding)
        show_nearest(stream)
        stream.write(b"caf\xc3\xa9\xff".decode("ascii", "surrogateescape"))
        stream.flush()
        assert printed.getvalue() == b"caf\xc3\xa9\xff"
