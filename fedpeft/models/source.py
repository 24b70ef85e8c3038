"""Read configuration, weights and tokenizer with transformers; whatever fails becomes one line."""

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, final

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from fedpeft.errors import BadInput
from fedpeft.models.causes import absent, cause, chain, line, quiet
from fedpeft.models.choice import ModelSection
from fedpeft.models.gguf import located
from fedpeft.models.hub import fetched, unfetched

ADAPTER: Final = "adapter_config.json"
"""The file by which peft knows a folder of its own."""
ON_CPU: Final[Mapping[str, Any]] = {"device_map": {"": "cpu"}}
"""Where weights are packed wherever the model computes later: to the same bits on every machine."""


@final
@dataclass(frozen=True)
class Source:
    """Where the files of a model are.

    ``name``: the user's name for it. ``place``: the folder or hub id behind that name. ``trusted``:
    whether Python files that come with the model may run. ``auto_class``: the name of the class of
    transformers that loads it.
    """

    name: str
    place: str
    trusted: bool
    auto_class: str

    def configuration(self) -> Any:
        """Return the configuration of the checkpoint; one that cannot be read raises BadInput."""
        with self._reading("configuration"):
            return AutoConfig.from_pretrained(self.place, trust_remote_code=self.trusted)

    def supports_sdpa(self, config: Any) -> bool:
        """Return whether the model for ``config`` knows torch's fused attention kernel.

        BadInput is raised where transformers has no model of this kind for such a configuration.
        """
        # A model with Python files of its own names its classes in `auto_map`.
        foreign = (getattr(config, "auto_map", None) or {}).get(self.auto_class)
        kind: Any = None
        if foreign is not None and self.trusted:
            with self._reading("code"):
                kind = get_class_from_dynamic_module(foreign, self.place)
        elif type(config) in self._auto()._model_mapping:
            kind = self._auto()._model_mapping[type(config)]
        if kind is None:
            why = f"transformers has no {_words(self.auto_class)} of type {config.model_type!r}"
            raise BadInput(f"model.name = {self.name!r}: {why}; choose another model")
        return bool(kind._supports_sdpa)

    def _renamed(self, config: Any) -> dict[str, str]:
        """Return a pattern and what stands in its place, where names of parameters must change.

        A checkpoint has the name of the base model in front of its names. In some families one
        task's class has another for it: Llamas call it ``model``, to answer questions
        ``transformer``.
        """
        classes = self._auto()._model_mapping
        if not config.architectures or type(config) not in classes:
            return {}
        saved_by = getattr(transformers, config.architectures[0], None)
        theirs = getattr(saved_by, "base_model_prefix", "")
        ours = classes[type(config)].base_model_prefix
        return {rf"^{theirs}\.": f"{ours}."} if theirs and theirs != ours else {}

    def weights(
        self,
        config: Any,
        attention: str,
        seed: int,
        *,
        as_stored: bool = False,
        quantisation: Any = None,
    ) -> tuple[Any, Mapping[str, Any]]:
        """Return a model in float32, and transformers' report on what the checkpoint lacks.

        Missing parameters are drawn from ``seed``. A parameter that has another shape in the
        checkpoint counts as missing. ``as_stored``: in the number format of the checkpoint instead.
        ``quantisation``: what transformers packs while it reads (see ``quantising``).
        """
        packing: dict[str, Any] = {}
        if quantisation is not None:
            packing = {"quantization_config": quantisation, **ON_CPU}
        # transformers draws from torch's global generator, which is put back afterwards.
        with self._reading("weights"), torch.random.fork_rng():
            torch.manual_seed(seed)
            model, report = self._auto().from_pretrained(
                self.place,
                config=config,
                attn_implementation=attention,
                dtype="auto" if as_stored else torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=self.trusted,
                key_mapping=self._renamed(config) or None,
                **packing,
            )
        return model, report

    def outline(self, config: Any) -> Any:
        """Return the model of a configuration without the values of its parameters."""
        # On the meta device tensors have shapes and no memory.
        with self._reading("configuration"), torch.random.fork_rng(), torch.device("meta"):
            return self._auto().from_config(copy.deepcopy(config), trust_remote_code=self.trusted)

    def num_parameters(self, config: Any) -> int:
        """Return how many parameters the model of a configuration has, without loading any."""
        return sum(parameter.numel() for parameter in self.outline(config).parameters())

    def redrawn(self, model: Any, names: Collection[str], seed: int) -> Any:
        """Return ``model`` with the parameters ``names`` drawn as if the checkpoint lacked them."""
        kept: dict[str, torch.Tensor] = {}
        for name, tensor in model.state_dict().items():
            if name not in names:
                kept[name] = tensor
        config = model.config
        device: Mapping[str, Any] = {}
        if hasattr(config, "quantization_config"):
            # Packed tensors go in as they are: transformers wants the settings of a checkpoint.
            config = copy.deepcopy(config)
            config.quantization_config = config.quantization_config.to_dict()
            device = ON_CPU
        # From a state dictionary alone: the checkpoint's own rows must not come back.
        with self._reading("weights"), torch.random.fork_rng():
            torch.manual_seed(seed)
            return type(model).from_pretrained(
                None,
                config=config,
                state_dict=kept,
                attn_implementation=model.config._attn_implementation,
                dtype=torch.float32,
                **device,
            )

    def tokenizer(self, config: Any) -> Any:
        """Return the tokenizer; a folder without one raises BadInput.

        The head of an encoder-decoder reads the position of the one end-of-text token. A text that
        spells this token must not add another: there, special tokens are split like any word.
        """
        with self._reading("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                self.place,
                trust_remote_code=self.trusted,
                split_special_tokens=bool(config.is_encoder_decoder),
            )
            # Without files of a tokenizer transformers may build one of special tokens alone.
            if len(tokenizer) <= len(tokenizer.all_special_tokens):
                raise ValueError(f"{self.place} has no tokenizer beside the model")
        return tokenizer

    def _auto(self) -> Any:
        """Return the class of transformers that loads such models."""
        return getattr(transformers, self.auto_class)

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """Turn whatever goes wrong in the ``with`` into one line about ``part`` of the model."""
        with quiet() as heard:
            try:
                yield
            # Libraries raise what they like: tokenizers a bare Exception, pickle errors of its own.
            except Exception as error:
                warnings = [record.getMessage() for record in heard.buffer]
                why = _why(part, error, warnings)
                raise BadInput(f"model.name = {self.name!r}: {why}") from error


def find(choice: ModelSection, auto_class: str) -> Source:
    """Return where the files of the chosen model are; a name of none raises BadInput."""
    location = located(choice.name)
    folder = Path(location)
    if not folder.is_dir():  # an id on the hub
        return Source(choice.name, fetched(location), choice.trust_remote_code, auto_class)
    # Looked for first: an adapter's folder lacks config.json, too, and this message says more.
    if (folder / ADAPTER).exists():
        why = f"holds an adapter of {_base_of(folder)}, no model"
        remedy = "merge the two first, as fedpeft export RUN FOLDER --merge does"
        raise BadInput(f"model.name = {choice.name!r}: {why}; {remedy}")
    if not (folder / "config.json").exists():
        why = "holds no model, as it has no config.json"
        raise BadInput(f"model.name = {choice.name!r}: {why}; give another folder or a hub id")
    return Source(choice.name, location, choice.trust_remote_code, auto_class)


def _words(auto_class: str) -> str:
    """Return what a class of transformers loads, in words.

    >>> _words("AutoModelForCausalLM")
    'model for CausalLM'
    """
    if auto_class == "AutoModelForSequenceClassification":
        return "text classifier"
    return auto_class.replace("AutoModelFor", "model for ")


def _base_of(folder: Path) -> str:
    """Return the name of the model to which the adapter in ``folder`` belongs."""
    try:
        about = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        return repr(about["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError):
        return "another model"


def _why(part: str, error: Exception, warnings: Sequence[str]) -> str:
    """Return why ``part`` cannot be loaded; ``warnings``: of transformers, before it failed."""
    # Matched by their texts: the libraries have no classes of their own for these errors.
    text = str(error)
    if "trust_remote_code" in text:
        remedy = "read them, and set model.trust_remote_code = true to let them run"
        return f"its {part} needs Python files that it brings along; {remedy}"
    if any(isinstance(one, LocalEntryNotFoundError) for one in chain(error)):
        return unfetched(f"the hub ({constants.ENDPOINT}) does not give its {part}")
    # When transformers cannot read a SentencePiece model it tries another kind, and the error is
    # about that one; only the warning before it tells the cause.
    pieces: list[str] = []
    for warning in warnings:
        if "SentencePiece" in warning:
            pieces.append(" ".join(warning.split()))
    if pieces and (missing := absent("sentencepiece", "protobuf")):
        return f"its tokenizer is a SentencePiece model; to read it: pip install {missing}"
    if pieces:
        return f"its {part} cannot be loaded: {cause(error)} ({line(pieces[0])})"
    if "untagged enum" in text:  # tokenizers' word for a kind that it does not know
        kinds = f"of a kind that tokenizers {version('tokenizers')} does not know"
        return f"its tokenizer is {kinds}: {cause(error)}"
    return f"its {part} cannot be loaded: {cause(error)}"
