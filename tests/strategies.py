"""What Hypothesis draws: payloads of every number format and shape."""

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
]
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="@", exclude_categories=["Cs"]),
    min_size=1,
    max_size=8,
)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Return a tensor of any format and shape, 0-d and empty ones included, from random bytes."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    count = int(torch.tensor(shape, dtype=torch.int64).prod())
    if dtype == torch.bool:
        return torch.tensor(
            draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype
        ).reshape(shape)
    width = torch.empty(0, dtype=dtype).element_size()
    raw = bytearray(draw(st.binary(min_size=count * width, max_size=count * width)))
    flat = torch.frombuffer(raw, dtype=dtype).clone() if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


PAYLOADS = st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), tensors(), max_size=4)


def bits(tensor: Tensor) -> tuple[object, ...]:
    """Return a tensor as something that is equal for equal bits only; NaNs have bits too."""
    flat = tensor.contiguous().view(-1)
    return (
        tensor.dtype,
        tuple(tensor.shape),
        flat.view(torch.uint8).tolist() if flat.numel() else [],
    )
