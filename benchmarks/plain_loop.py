"""What a competent user writes with transformers and peft: one client after another. Knows nothing of fedpeft's training.

The model is loaded once and frozen, its texts are tokens already, batches are padded to their
longest text, no KV cache is kept in training, gradients of adapters and head alone are computed,
clipped, and applied by torch's fused AdamW. The loss is that of transformers, ``labels=``; in
question answering padding is taken from the possible answers, as fedpeft does, so that losses can
be compared. Attention is transformers' own choice, SDPA. In bf16 weights are loaded in bf16, the
adapters stay float32, and the forward pass runs under autocast.

Run by ``benchmarks.steps`` in a process of its own, on the work that it prepared; prints one line of JSON.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from fedpeft.ledger import measured

Row = Mapping[str, Sequence[int]]
CPU = torch.device("cpu")
FILL = {"input_ids": 0, "labels": -100, "token_type_ids": 0}
"""What each part of a row is filled up with."""


def loaded(work: Mapping[str, Any]) -> Any:
    """Return the pre-trained model without dropout."""
    config = transformers.AutoConfig.from_pretrained(work["model"])
    if work["outputs"]:
        config.num_labels = work["outputs"]
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    dtype = torch.bfloat16 if work["precision"] == "bf16" else torch.float32
    auto: Any = getattr(transformers, work["auto_class"])
    return auto.from_pretrained(work["model"], config=config, dtype=dtype)


def adapted(base: Any, work: Mapping[str, Any]) -> Any:
    """Return ``base`` with LoRA on the targets, frozen but for these and the head."""
    base.config.use_cache = False
    adapter = LoraConfig(
        task_type=TaskType[work["peft_type"]],
        r=work["rank"],
        lora_alpha=work["rank"],
        target_modules=list(work["targets"]),
        modules_to_save=list(work["heads"]) or None,
    )
    return get_peft_model(base, adapter).train()


def train(
    net: Any,
    first: Mapping[str, Tensor],
    steps: Sequence[Sequence[Row]],
    work: Mapping[str, Any],
    device: torch.device = CPU,
) -> float:
    """Train one client from its ``first`` adapter on; return its mean loss over its steps."""
    parameters = _trained(net)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(first[name])
    trained = list(parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=work["lr"], weight_decay=0.0, fused=True)
    losses: list[Tensor] = []
    for rows in steps:
        loss: Any  # torch's backward is untyped
        batch = {name: tensor.to(device) for name, tensor in collate(rows).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=work["precision"] == "bf16"):
            loss = _loss(net, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, work["clip"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return a batch padded to its longest text."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], longest, 0)}
    for name in rows[0]:
        values = [row[name] for row in rows]
        per_token = len(values[0]) == len(rows[0]["input_ids"])
        batch[name] = _padded(values, longest, FILL[name]) if per_token else torch.tensor(values)
    return batch


def _padded(rows: Sequence[Sequence[int]], longest: int, fill: int) -> Tensor:
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def _loss(net: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss of a batch."""
    labels = batch["labels"]
    if labels.shape == batch["input_ids"].shape:
        loss: Tensor = net(**batch).loss
        return loss
    # Question answering, with labels (n, 2): the cross-entropies of start and end, padding apart.
    out = net(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    padding = batch["attention_mask"] == 0
    losses: list[Tensor] = []
    for logits, places in zip((out.start_logits, out.end_logits), labels.unbind(1), strict=True):
        possible = logits.float().masked_fill(padding, -torch.inf)
        losses.append(torch.nn.functional.cross_entropy(possible, places))
    return (losses[0] + losses[1]) / 2


def _trained(net: Any) -> dict[str, Tensor]:
    """Return the trained parameters by fedpeft's names for them."""
    named: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            named[re.sub(r"\.lora_([AB])\.default\.weight$", r":\1", plain)] = parameter
    return named


def run(folder: Path) -> dict[str, Any]:
    """Do the work in ``folder``, after a step that does not count: seconds, losses, bytes of memory."""
    work = json.loads((folder / "work.json").read_text())
    first = load_file(folder / "first.safetensors")
    net = adapted(loaded(work), work)
    clients: list[list[list[Row]]] = work["clients"]
    train(net, first, clients[0][:1], work)
    with measured() as meter:
        losses = [train(net, first, steps, work) for steps in clients]
    return {
        "seconds": meter.seconds / sum(map(len, clients)),
        "losses": losses,
        "peak": meter.peak_memory,
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(json.loads(sys.argv[1])["folder"]))))
