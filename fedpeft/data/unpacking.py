"""Files as bytes and as lines, whether they are packed (gzip, zstd) or not."""

import codecs
import gzip
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, cast, final

from fedpeft.errors import BadInput

PACKED: Final = (".gz", ".zst")
"""Endings that stand behind the ending of the format."""

CHUNK: Final = 1 << 17
"""Packed bytes that are read at once."""

PART: Final = 1 << 16
"""Bytes of a line that are read at once where it may be long."""


def unpacked_name(path: Path) -> str:
    """Return the name of ``path`` in small letters, without the ending of its packing.

    >>> unpacked_name(Path("data/Train.JSONL.gz")), unpacked_name(Path("test.csv"))
    ('train.jsonl', 'test.csv')
    """
    name = path.name.lower()
    for packing in PACKED:
        name = name.removesuffix(packing)
    return name


def is_packed(path: Path) -> bool:
    """Return whether the name of ``path`` says that it is packed."""
    return path.suffix.lower() in PACKED


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read its bytes, unpacked.

    A damaged file raises OSError, EOFError or zlib.error, at once or while it is read; zstd without
    its package raises BadInput.
    """
    packing = path.suffix.lower()
    if packing == ".gz":
        with gzip.open(path) as unpacked:
            yield cast(IO[bytes], unpacked)
    elif packing == ".zst":
        decompressor = _decompressor(path)
        with path.open("rb") as packed:
            yield io.BufferedReader(_Zstandard(packed, decompressor), CHUNK)
    else:
        with path.open("rb") as stream:
            yield stream


def decoded(path: Path, stream: Iterable[bytes]) -> Iterator[str]:
    """Yield the decoded lines of ``path`` with their ends; a byte order mark is dropped.

    Bytes that are not UTF-8 raise BadInput with file and line.
    """
    # Decoded line by line, so that an error can name the line.
    for line_number, line in enumerate(stream, 1):
        encoding = "utf-8-sig" if line_number == 1 else "utf-8"
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, line_number, error.reason, error.start) from error


def decoded_parts(path: Path, stream: IO[bytes]) -> Iterator[str]:
    """Yield what ``decoded`` yields, but lines of more than ``PART`` bytes in pieces.

    So a file of a single line, as JSON may be, need not be in memory at once.
    """
    line_number = 1
    read = 0  # bytes of the line that were decoded before
    held = b""  # bytes that begin a character
    part = stream.readline(PART).removeprefix(codecs.BOM_UTF8)
    while part or held:
        ends = not part or part.endswith(b"\n")  # so that no character may be cut off there
        content = held + part
        try:
            text, count = codecs.utf_8_decode(content, "strict", ends)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, line_number, error.reason, read + error.start) from error
        read, held = read + count, content[count:]
        if ends:
            line_number, read = line_number + 1, 0
        yield text
        part = stream.readline(PART)


def _not_utf8(path: Path, line_number: int, reason: str, byte: int) -> BadInput:
    """Return the error for a byte of a line that is not UTF-8."""
    fault = f"{reason} at byte {byte} of the line"
    return BadInput(f"{path}:{line_number}: not UTF-8: {fault}; save it as UTF-8")


def _decompressor(path: Path) -> Any:
    """Return a decompressor of the package zstandard; BadInput without that."""
    try:
        import zstandard  # noqa: PLC0415
    except ImportError as error:
        raise BadInput(
            f"{path}: reading .zst needs zstandard; get it with: pip install 'fedpeft[data]'"
        ) from error
    return zstandard.ZstdDecompressor()


@final
class _Zstandard(io.RawIOBase):
    """The unpacked bytes of a file in zstd's format, which is one frame or several.

    The package's own reader takes the end of a file for the end of its frame, so it would pass over
    that a file is cut off.
    """

    def __init__(self, packed: IO[bytes], decompressor: Any) -> None:
        self._packed = packed
        self._decompressor = decompressor
        self._frame: Any = None  # the frame that has begun and not ended
        self._unread = b""  # unpacked

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` and return with how many bytes; 0 at the end."""
        while not self._unread:
            chunk = self._packed.read(CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends before its last frame does")
                return 0
            self._unread = self._unpack(chunk)
        count = min(len(buffer), len(self._unread))
        buffer[:count] = self._unread[:count]
        self._unread = self._unread[count:]
        return count

    def _unpack(self, chunk: bytes) -> bytes:
        """Return what ``chunk`` holds, unpacked; OSError where it is damaged."""
        import zstandard  # noqa: PLC0415

        parts: list[bytes] = []
        while chunk:
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                parts.append(self._frame.decompress(chunk))
            except zstandard.ZstdError as error:
                raise OSError(f"not zstd: {error}") from error
            chunk = b""
            if self._frame.eof:
                chunk = self._frame.unused_data  # of the frame that follows
                self._frame = None
        return b"".join(parts)
