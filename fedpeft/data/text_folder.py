"""A folder of texts: a folder for each label, and in it a file for each text."""

from collections.abc import Iterator
from pathlib import Path

from fedpeft.data.json_records import Located
from fedpeft.data.paths import readable
from fedpeft.data.unpacking import decoded, opened, unpacked_name
from fedpeft.errors import BadInput

TEXT = ".txt"


def folder_records(folder: Path) -> Iterator[Located]:
    """Yield every text: ``text``, ``label`` (its folder) and ``file``, as ``pos/1.txt``.

    They come in the order of their names. What ends otherwise than in ``.txt``, plain or packed, is
    passed over, and so are texts beside the folders of labels.

    Raises BadInput where there is no text, for one that lies deeper, and for bytes that are not
    UTF-8, with the text's file.
    """
    found = 0
    for path in _texts(folder):
        name = path.relative_to(folder)
        if len(name.parts) > 2:
            raise BadInput(
                f"{path}: lies too deep; in {folder} there is one folder for each label, "
                "and texts lie right in it"
            )
        if len(name.parts) == 2:
            found += 1
            yield str(path), {"text": _text(path), "label": name.parts[0], "file": name.as_posix()}
    if not found:
        raise BadInput(
            f"{folder}: is a folder, not a file, and without texts: as a folder it holds one "
            f"folder for each label with files {TEXT} in it{_instead(folder)}"
        )


def _texts(folder: Path) -> list[Path]:
    """Return all texts below ``folder``, sorted, without names that begin with a dot."""
    texts: list[Path] = []
    with readable(folder):
        for path in folder.rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if not hidden and unpacked_name(path).endswith(TEXT) and path.is_file():
                texts.append(path)
    return sorted(texts, key=lambda path: path.relative_to(folder).as_posix())


def _text(path: Path) -> str:
    """Return the whole text of a file as it stands."""
    with readable(path), opened(path) as stream:
        return "".join(decoded(path, stream))


def _instead(folder: Path) -> str:
    """Return what the user may have meant: the files of the commonest kind in ``folder``."""
    with readable(folder):
        endings = [path.suffix for path in sorted(folder.iterdir()) if path.is_file()]
    if not endings:
        return ""
    commonest = max(endings, key=endings.count)
    return f"; to read files, name them, as {folder / ('*' + commonest)}"
