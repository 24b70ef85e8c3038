"""One surface under a coverage-guided fuzzer, atheris: ``python -m tests.fuzz.guided SURFACE [libFuzzer's options]``.

What it keeps as interesting and what it finds lie in ``.fuzz/<surface>/``. An input with a finding is written there as a file;
once the fault is mended, it goes into ``tests/fuzz/found/<surface>/``.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedpeft"]):
    from tests.fuzz.mutate import NUMBERS, TOKENS
    from tests.fuzz.surfaces import SURFACES

FOLDER = Path(".fuzz")


def _escaped(token: bytes) -> str:
    """Return a word as libFuzzer's dictionaries have it."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in token) + '"'


def main(name: str, options: list[str]) -> None:
    """Fuzz a surface until libFuzzer's own options end it."""
    surface = SURFACES[name]
    corpus, found = FOLDER / name / "corpus", FOLDER / name / "found"
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    for number, seed in enumerate(surface.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    words = FOLDER / name / "words"
    words.write_text(
        "".join(f"{_escaped(token)}\n" for token in [*TOKENS, *NUMBERS] if len(token) < 64)
    )

    def target(content: bytes) -> None:
        surface.target(content)

    arguments = [
        sys.argv[0],
        f"-artifact_prefix={found}/",
        f"-dict={words}",
        "-max_len=65536",
        "-timeout=10",
        "-rss_limit_mb=3000",
        "-print_final_stats=1",
        *options,
        str(corpus),
    ]
    atheris.Setup(arguments, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
