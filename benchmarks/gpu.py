"""What a GPU gives: parity with the CPU, clients at once, share of the peak, a 4-bit base; at most 8 minutes.

    python -m benchmarks.gpu                        # needs a card and no download
    python -m benchmarks.gpu --device cpu --tiny    # the same code with tiny shapes, in a minute
    python -m benchmarks.gpu llama 4bit             # some parts

Models come from configurations, with random weights, and texts are random tokens.

- ``parity``: every method on every task, three rounds in fp32 here and on the CPU.
- ``clients``: 32 small clients at once over one by one, MiniLM's shape, 16 texts of 64 tokens.
- ``llama``: LoRA on q and v of a Llama of 1.1 B parameters, 8 texts of 512 tokens a step, half of
  them response: one client, a stack of 4, and a plain peft loop. FLOPs are those of products with
  frozen matrices, 2 per entry and token forward and 2 back, the output layer at responses alone;
  attention and adapters are not counted. The peak is the best product of two square matrices.
- ``4bit``: the largest shape of Llama whose base, 4 bits a weight, lets a step of one text fit.

What does not run is a row that says why; then, and where parity is missed, the command ends with 1.
"""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import Figure, interleaved, ratio, report
from benchmarks.on_device import (
    FULL,
    TINY,
    Shapes,
    encoder,
    encoder_worker,
    llama,
    llama_in_4_bits,
    llm_worker,
)
from benchmarks.plain_loop import adapted, train
from benchmarks.works import as_transformers_has_it, round_of
from fedpeft.engines.local import LocalEngine
from fedpeft.errors import BadInput
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.config import from_tree, merge
from fedpeft.federation.client import Worker
from fedpeft.federation.server import federate
from fedpeft.ledger import ClientRow, measured
from fedpeft.methods import METHODS
from fedpeft.mounting import keep_matrices_in
from fedpeft.training.evaluation import mounted_state, score
from fedpeft.training.loop import plan
from fedpeft.types import State
from tests.e2e.builders import write_ground
from tests.e2e.task_grounds import TASK_GROUNDS
from tests.tiny import FIELDS

ROUNDS = 3
TOLERANCE = 1e-3
"""How far figures may be from the CPU's, as a share of the largest of a tensor."""
STACK = 4
Row = tuple[object, ...]


# Parity with the CPU.


def parity(device: torch.device, _: Shapes, __: int) -> Iterator[Row]:
    """Yield the largest difference from the CPU for every task, and the method that has it."""
    with tempfile.TemporaryDirectory() as place:
        ground = write_ground(Path(place))
        for kind, made in TASK_GROUNDS.items():
            folder = Path(place) / kind
            folder.mkdir()
            tree = merge(ground.tree(), made.tree(folder))
            differences = dict(_differences(tree, kind, device))
            worst = max(differences, key=differences.__getitem__)
            left_out = ", ".join(name for name in METHODS if name not in differences)
            said = "" if differences[worst] <= TOLERANCE else "MISSED"
            if left_out:
                said += f" without {left_out}"
            yield f"parity, {kind}", f"{differences[worst]:.1e} ({worst})", f"{TOLERANCE}", said


def _differences(
    tree: Mapping[str, Any], kind: str, device: torch.device
) -> Iterator[tuple[str, float]]:
    """Yield how far a method is from the CPU's outcome, for all that can train the task's model."""
    reuse: dict[str, Federation] = {}
    for name in METHODS:
        chosen: dict[str, Any] = {**FIELDS[name], "name": name}
        if kind == "causal_lm" and "targets" in chosen:
            chosen["targets"] = "q_proj|v_proj"
        outcomes: list[dict[str, Tensor]] = []
        for where in ("cpu", str(device)):
            settings = {
                **merge(
                    dict(tree),
                    {"machine": {"device": where}},
                    # The rounding of a small gradient would be a whole step of AdamW's.
                    {"training": {"optimizer": "sgd", "lr": 0.1}},
                    {"federation": {"rounds": ROUNDS}},
                ),
                "method": chosen,
            }
            reuse[where] = build(from_tree(settings), reuse=reuse.get(where))
            try:
                reuse[where].first_state()
            except BadInput:  # such as BitFit of a Llama, which has no biases
                break
            outcomes.append(_outcome(reuse[where]))
        if outcomes:
            yield name, _apart(*outcomes)


def _outcome(whole: Federation) -> dict[str, Tensor]:
    """Return the state after a round, and all losses of three rounds and of the evaluation after them."""
    rows: list[ClientRow] = []
    stream = federate(
        whole.method,
        whole.first_state(),
        LocalEngine(whole.worker, stack=whole.hardware.stack),
        lambda _: whole.clients[:2],
        range(ROUNDS),
        config=whole.worker.config,
        min_replies=1,
        record=rows.append,
    )
    states = list(stream)
    with mounted_state(whole.method, states[-1], whole.loaded.model, whole.hardware, 0):
        counts = score(whole.loaded.model, whole.task, whole.scored, whole.hardware)
    losses = [row.measured.loss or 0.0 for row in rows]
    losses.append(whole.task.metrics(counts)["loss"])
    return {**states[0].shared, "losses": torch.tensor(losses)}


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference as a share of the largest value of its tensor, or of 0.01."""
    if one.keys() != other.keys():
        raise SystemExit(f"other tensors than on the CPU: {one.keys() ^ other.keys()}")
    largest = 0.0
    for name, tensor in one.items():
        difference = float((tensor.float() - other[name].float()).abs().max())
        largest = max(largest, difference / max(float(tensor.float().abs().max()), 0.01))
    return largest


# Small clients at once.


def clients(device: torch.device, shapes: Shapes, repeats: int) -> Iterator[Row]:
    """Yield the seconds of a client's step for all clients at once and one by one, and the ratio."""
    worker, state = encoder_worker(shapes, encoder(shapes, device), device)

    def step(stack: int) -> dict[str, float]:
        seconds, _ = _round(worker, state, shapes.clients, stack)
        return {"ms": 1000 * seconds / shapes.clients / shapes.steps}

    for stack in (1, shapes.clients):
        step(stack)  # makes kernels and claims memory
    found = interleaved(repeats, one_by_one=partial(step, 1), at_once=partial(step, shapes.clients))
    alone, together = found["one_by_one"]["ms"], found["at_once"]["ms"]
    yield "small clients one by one, ms a client step", alone, "", ""
    yield f"{shapes.clients} at once, ms a client step", together, "", ""
    yield "one by one over at once", ratio(alone, together), "5 / 15", ""


def _round(worker: Worker, state: State, count: int, stack: int) -> tuple[float, int]:
    """Return the seconds of a round, messages included, and the most memory that torch had."""
    with measured(worker.hardware.torch_device) as meter:
        responses = round_of(worker, state, count, stack)
    return meter.seconds, max(response.measured.peak_memory for response in responses)


# A language model.


def language_model(device: torch.device, shapes: Shapes, repeats: int) -> Iterator[Row]:
    """Yield share of the peak, tokens a second and memory of one client, of a stack, of a plain loop."""
    worker, state = llm_worker(shapes, llama(shapes, device, _precision(device)), device, STACK)
    precision = worker.hardware.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if precision == "bf16":
        keep_matrices_in(worker.model, dtype, ())
    peak = Figure(tuple(product_peak(dtype, device, shapes.size) for _ in range(repeats)))
    yield f"peak of {precision} products, TFLOP/s", Figure(_scaled(peak, 1e-12)), "", ""
    tokens = shapes.llm_batch * shapes.llm_steps * shapes.llm_length
    flops = _flops(worker, tokens)

    def ours(count: int) -> dict[str, float]:
        seconds, memory = _round(worker, state, count, count)
        return {"tokens": count * tokens / seconds, "memory": memory / 1e9}

    for count in (1, STACK):
        ours(count)  # makes kernels and claims memory
    found = interleaved(repeats, one=partial(ours, 1), stack=partial(ours, STACK))
    found["plain"] = _plain(shapes, worker, state, device, repeats)
    names = {"one": "one client", "stack": f"stack of {STACK}", "plain": "plain peft loop"}
    for key, name in names.items():
        figures = found[key]
        yield f"Llama, {name}, tokens/s", figures["tokens"], "", ""
        # Of the plain loop the same FLOPs count, though it computes logits at all positions.
        shares = _scaled(figures["tokens"], flops / tokens / peak.median)
        yield f"Llama, {name}, share of the peak", Figure(shares), "", ""
        yield f"Llama, {name}, peak GB", figures["memory"], "", ""


def _precision(device: torch.device) -> str:
    """Return the number format that is fast: bf16 on cards of today."""
    on_card = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if on_card else "fp32"


def product_peak(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Return the FLOP/s of a product of two (``size``, ``size``) matrices, the best of several."""
    one, other = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    for _ in range(5):
        with measured(device) as meter:
            for _ in range(10):
                one @ other
        best = max(best, 10 * 2 * size**3 / meter.seconds)
    return best


def _flops(worker: Worker, tokens: int) -> float:
    """Return the FLOPs of one client's round of so many tokens, half of which are responses."""
    model: Any = worker.model
    blocks = sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)
    # Below the adapters of the first block nothing has a gradient.
    attention = model.model.layers[0].self_attn
    entering = (attention.q_proj, attention.k_proj, attention.v_proj)
    below = sum(layer.weight.numel() for layer in entering)
    output = model.lm_head.weight.numel()
    return float(4 * blocks * tokens - 2 * below * tokens + 4 * output * (tokens // 2))


def _plain(
    shapes: Shapes, worker: Worker, state: State, device: torch.device, repeats: int
) -> dict[str, Figure]:
    """Return tokens a second and memory of a plain peft loop on the batches of client 0."""
    work = {
        "peft_type": "CAUSAL_LM",
        "targets": ["q_proj", "v_proj"],
        "heads": [],
        "rank": 8,
        "lr": worker.training.lr,
        "clip": worker.training.clip,
        "precision": worker.hardware.precision,
    }
    examples = worker.client_data[0].train
    steps = [
        [as_transformers_has_it("causal_lm", examples[row]) for row in rows]
        for rows in plan(len(examples), worker.training, worker.seed, 0, 0)
    ]
    ours = round_of(worker, state, 1, 1)[0].measured.loss or 0.0
    first = {name: tensor.to(device) for name, tensor in state.shared.items()}
    worker.model.to("meta")  # makes room
    _tidy(device)
    net = adapted(llama(shapes, device, worker.hardware.precision), work)
    tokens = sum(map(len, steps)) * shapes.llm_length
    train(net, first, steps[:1], work, device)  # makes kernels and claims memory
    speeds: list[float] = []
    memories: list[float] = []
    for _ in range(repeats):
        with measured(device) as meter:
            theirs = train(net, first, steps, work, device)
        speeds.append(tokens / meter.seconds)
        memories.append(meter.peak_memory / 1e9)
    if abs(ours - theirs) > 0.02 * abs(theirs):
        raise RuntimeError(f"the losses differ: {ours} here, {theirs} in the plain loop")
    return {"tokens": Figure(tuple(speeds)), "memory": Figure(tuple(memories))}


def _scaled(figure: Figure, factor: float) -> tuple[float, ...]:
    return tuple(factor * value for value in figure.values)


# A 4-bit base.


def four_bits(device: torch.device, shapes: Shapes, _: int) -> Iterator[Row]:
    """Yield the largest shape whose step fits, its parameters, its tokens a second, its memory."""
    one_text = replace(shapes, llm_batch=1)
    for name in reversed(list(shapes.ladder)):
        rows: list[Row] = []
        try:
            rows = _step_in_4_bits(name, shapes.ladder[name], one_text, device)
        except torch.OutOfMemoryError:
            print(f"  {name}: does not fit", file=sys.stderr, flush=True)
        # Not within ``except``: until its end the error holds on to the model.
        _tidy(device)
        if rows:
            yield from rows
            return
    yield "largest Llama with a 4-bit base", "none fits", "", ""


def _step_in_4_bits(
    name: str, changes: Mapping[str, int], shapes: Shapes, device: torch.device
) -> list[Row]:
    """Train on a base in 4 bits; return what it says."""
    model: Any = llama_in_4_bits(shapes, device, _precision(device), changes)
    worker, state = llm_worker(shapes, model, device, 1)
    _round(worker, state, 1, 1)
    seconds, memory = _round(worker, state, 1, 1)
    tokens = shapes.llm_steps * shapes.llm_length
    layers = [layer for layer in model.model.layers.modules() if hasattr(layer, "in_features")]
    count = sum(layer.in_features * layer.out_features for layer in layers)
    count += sum(weight.numel() for weight in model.get_input_embeddings().parameters())
    count += sum(weight.numel() for weight in model.get_output_embeddings().parameters())
    size = f"{name}, {count / 1e9:.1f} B parameters"
    return [
        ("largest Llama with a 4-bit base", size, "", ""),
        ("its tokens/s, one text a step", f"{tokens / seconds:.0f}", "", ""),
        ("its peak GB", f"{memory / 1e9:.1f}", "", ""),
    ]


def _tidy(device: torch.device) -> None:
    """Give back the memory of what is no longer there."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


PARTS: Mapping[str, Callable[[torch.device, Shapes, int], Iterator[Row]]] = {
    "parity": parity,
    "clients": clients,
    "llama": language_model,
    "4bit": four_bits,
}


def rows_of(parts: Sequence[str], device: torch.device, shapes: Shapes, repeats: int) -> list[Row]:
    """Return the rows of ``parts``; one that does not run has a row that says why."""
    rows: list[Row] = []
    for part in parts:
        began = time.perf_counter()
        try:
            rows += PARTS[part](device, shapes, repeats)
        except Exception as error:  # of any library; the other parts still run
            line = (str(error).splitlines() or [""])[0]
            rows.append((part, f"does not run: {type(error).__name__}: {line:.200}", "", ""))
        _tidy(device)
        rows.append((f"seconds of {part}", f"{time.perf_counter() - began:.0f}", "", ""))
    return rows


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(PARTS)}.")] = None,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny shapes, to try the code.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions.")] = 5,
) -> None:
    """Print one table of all figures."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.gpu: torch finds no GPU here; to try the code: --device cpu --tiny"
        )
    shapes = TINY if tiny else FULL
    rows = rows_of(parts or list(PARTS), torch.device(device), shapes, repeats)
    columns = ("figure", "measured", "floor / stretch", "")
    report("gpu_tiny" if tiny else "gpu", columns, rows, device=device, repeats=repeats)
    said = json.dumps(rows, default=str)
    if "MISSED" in said or "does not run" in said:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
