"""Named tensors as a safetensors file in memory, written and read without a copy more than needed.

The format is safetensors' own (https://huggingface.co/docs/safetensors): the length of a JSON
header in 8 bytes, the header with the dtype, shape and place of every tensor, then the tensors. The
format's own library copies every tensor twice. In full fine-tuning, where every message has 90 MB
of parameters, these copies would take the larger part of a round.

A sender may be malicious, so the header is not given to a JSON parser, which would build whatever
the text says. One regular expression reads it instead. It knows only what the library and
``buffers`` write: compact JSON without metadata, one tensor after another. So nothing can nest, no
number is long, and the memory and time needed are bounded by the tensors in the file.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from fedpeft.errors import WireError
from fedpeft.types import Payload

FORMATS: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER: Final = 1 << 24
"""Bytes of a header at most: 256 for each of ``TENSORS``, about twice what an entry takes."""
TENSORS: Final = 1 << 16
"""Tensors in a file at most; LoRA on a mixture of 128 experts in 48 layers has 36,864."""
NAME: Final = 512
"""Characters of a tensor's name at most, as JSON escapes them."""
AXES: Final = 8
"""Dimensions of a tensor at most."""
EMPTY: Final = 1 << 16
"""What the other dimensions of an empty tensor multiply to at most.

They take no bytes in the file. But what is later made to fit them takes memory, such as the other
factor of a branch.
"""

_NAMES: Final = {dtype: name for name, dtype in FORMATS.items()}
# Bytes of the header's length; safetensors also pads the header to a multiple of them.
_LENGTH: Final = 8
# At most 15 digits: enough for any size, and far from the 64 bits where sizes would overflow.
_NUMBER: Final = r"(?:0|[1-9][0-9]{0,14})"
# The possessive + never backtracks, so the search takes linear time on any text.
_TEXT: Final = rf"""[^"\\\x00-\x1f]{{0,{NAME}}}+"""
_TENSOR: Final = re.compile(
    rf"""
    "(?P<name> {_TEXT} (?: \\. {_TEXT} ){{0,{NAME}}}+ )":
    {{
    "dtype":"(?P<format> \w{{1,8}} )",
    "shape":\[ (?P<shape> (?: {_NUMBER} (?: ,{_NUMBER} ){{0,{AXES - 1}}} )? ) \],
    "data_offsets":\[ (?P<start> {_NUMBER} ),(?P<stop> {_NUMBER} ) \]
    }}
    (?: ,(?=") | \Z )
    """.encode(),
    re.VERBOSE,
)
"""One tensor of a header, and the comma before the next one."""

with warnings.catch_warnings():
    # Torch warns, once in a process, that the memory is read-only. This call uses the warning up.
    warnings.simplefilter("ignore")
    torch.frombuffer(b" ", dtype=torch.uint8)


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its format, its shape, and its bytes ``start`` to ``stop`` of the file."""

    format: str
    shape: tuple[int, ...]
    start: int
    stop: int


def buffers(payload: Payload) -> list[memoryview]:
    """Return the pieces of the file that holds ``payload``, in order: its header, then the tensors.

    Equal names, shapes and dtypes give equal headers. The pieces may be views of the tensors' own
    memory. WireError for a dtype that the format lacks and for a payload beyond the bounds above,
    which no receiver would read.
    """
    # 1. Bring every tensor into plain memory; refuse what no receiver would read.
    tensors: dict[str, Tensor] = {}
    for name, tensor in payload.items():
        tensors[name] = tensor.detach().cpu().contiguous()
        _check_sendable(name, tensors[name])
    if len(tensors) > TENSORS:
        raise WireError(f"{len(tensors)} tensors cannot be sent at once; at most {TENSORS}")
    # 2. Lay them out: widest dtypes first, so that every tensor begins at a multiple of its width.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    entries: dict[str, object] = {}
    data: list[memoryview] = []
    end = 0
    for name in order:
        tensor = tensors[name]
        begin = end
        end = begin + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        if tensor.numel() > 0:
            # Viewed as bytes, since numpy has no bfloat16. A tensor of one number may keep any
            # stride and still call itself contiguous, but only a stride of 1 can be viewed so.
            flat = tensor.as_strided((tensor.numel(),), (1,))
            data.append(flat.view(torch.uint8).numpy().data)
    # 3. Write the header, padded with spaces so that the tensors after it are aligned, too.
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH)
    if len(header) > HEADER:
        raise WireError(f"a header of {len(header)} bytes cannot be sent; at most {HEADER}")
    return [memoryview(len(header).to_bytes(_LENGTH, "little") + header), *data]


def _check_sendable(name: str, tensor: Tensor) -> None:
    """Raise WireError for a tensor that no receiver would read."""
    if tensor.dtype not in _NAMES:
        raise WireError(
            f"tensor {name!r} is {tensor.dtype}, which cannot be sent; "
            f"choose from: {', '.join(FORMATS)}"
        )
    # Counted as the receiver does: with JSON's escapes, without the quotes.
    if len(json.dumps(name)) - len('""') > NAME:
        start = f"{name[:40]!r}..."
        raise WireError(f"tensor {start} cannot be sent: its name has over {NAME} characters")
    if fault := _fault(tensor.shape):
        raise WireError(f"tensor {name!r} cannot be sent: {fault}")


def places(file: bytes | bytearray | memoryview) -> dict[str, Place]:
    """Return where every tensor is.

    A file of another format, or with bytes that belong to no tensor, raises WireError.
    """
    try:
        # Byte at which the header ends and the tensors begin.
        data = _LENGTH + int.from_bytes(file[:_LENGTH], "little")
        if not _LENGTH <= data <= min(len(file), _LENGTH + HEADER):
            raise ValueError(f"{len(file)} bytes are no header")
        return dict(_layout(bytes(file[_LENGTH:data]), len(file)))
    except ValueError as error:
        raise WireError(f"not a safetensors message: {error}") from error


# The requests of an exchange have one header, and so have its replies, and the memories before and
# after it: each is read once.
@lru_cache(maxsize=4)
def _layout(header: bytes, end: int) -> Mapping[str, Place]:
    """Return the places in a file of ``end`` bytes that begins with ``header``."""
    data = _LENGTH + len(header)
    by_name = _entries(header, data)
    # Sorted by the end, too: an empty tensor stands before another at the same byte.
    in_file = sorted(by_name.values(), key=lambda place: (place.start, place.stop))
    _check_cover(in_file, data, end)
    return by_name


def _entries(header: bytes, data: int) -> dict[str, Place]:
    """Return the entries of ``header`` by name; the tensors begin at byte ``data`` of the file."""
    header = header.rstrip(b" ")
    if header[:1] + header[-1:] != b"{}":
        raise ValueError("its header is no JSON object")
    by_name: dict[str, Place] = {}
    position, end = len(b"{"), len(header) - len(b"}")
    while position < end:
        # Every match begins where the last one ended, so no byte is skipped.
        entry = _TENSOR.match(header, position, end)
        if entry is None:
            raise ValueError(f"no tensor is described at byte {position} of its header")
        # A string alone is safe to give to the parser: it cannot nest.
        name = str(json.loads(b'"' + entry["name"] + b'"'))
        if len(entry["name"]) > NAME:
            raise ValueError(f"a tensor's name is longer than {NAME} characters")
        if name in by_name:
            raise ValueError(f"two tensors are called {name!r}")
        if len(by_name) == TENSORS:
            raise ValueError(f"it has more than {TENSORS} tensors")
        by_name[name] = _place(entry, data)
        position = entry.end()
    return by_name


def _place(entry: re.Match[bytes], data: int) -> Place:
    """Return the place that an entry of the header describes; ValueError where it is impossible."""
    name = entry["format"].decode()
    # A scalar has the shape [], without any size between the brackets.
    sizes = entry["shape"].split(b",") if entry["shape"] else []
    shape = tuple(int(size) for size in sizes)
    start, stop = int(entry["start"]), int(entry["stop"])
    if name not in FORMATS:
        raise ValueError(f"{name!r} is no dtype; choose from: {', '.join(FORMATS)}")
    if stop - start != FORMATS[name].itemsize * math.prod(shape):
        raise ValueError(f"{start} to {stop} is no place for {name} of shape {shape}")
    if fault := _fault(shape):
        raise ValueError(fault)
    return Place(name, shape, data + start, data + stop)


def _fault(shape: Sequence[int]) -> str:
    """Return why a tensor of ``shape`` is refused; empty where it is not."""
    if len(shape) > AXES:
        return f"it has {len(shape)} dimensions, more than {AXES}"
    if 0 not in shape:
        return ""
    others = math.prod(size for size in shape if size != 0)
    if others > EMPTY:
        return f"it is empty, and its other sizes, {tuple(shape)}, multiply to more than {EMPTY}"
    return ""


def _check_cover(in_file: Sequence[Place], data: int, end: int) -> None:
    """Raise ValueError unless the places follow each other from ``data`` to ``end``."""
    # Neither gaps, where bytes could hide, nor overlaps, by which a short file could claim much.
    for place in in_file:
        if place.start != data:
            raise ValueError(f"a tensor begins at byte {place.start}, not at {data}")
        data = place.stop
    if data != end:
        raise ValueError(f"{end - data} bytes belong to no tensor")


def tensors(file: bytes, offset: int) -> dict[str, Tensor]:
    """Return the tensors of the file that begins at ``offset`` in ``file``, in order of names.

    They are read-only views of its memory: nobody may write to a received message. WireError as in
    ``places``, and for a truth value that is neither 0 nor 1.
    """
    views: dict[str, Tensor] = {}
    for name, place in sorted(places(memoryview(file)[offset:]).items()):
        dtype = FORMATS[place.format]
        if place.start == place.stop:
            # ``frombuffer`` refuses a count of 0.
            views[name] = torch.empty(place.shape, dtype=dtype)
            continue
        count, start = math.prod(place.shape), offset + place.start
        flat = torch.frombuffer(file, dtype=dtype, count=count, offset=start)
        # Torch takes it for granted that the byte of a truth value is 0 or 1.
        if dtype == torch.bool and flat.view(torch.uint8).max() > 1:
            raise WireError(f"tensor {name!r} holds a truth value that is neither 0 nor 1")
        views[name] = flat.view(place.shape)
    return views
