"""What a run has learnt, opened from its folder without its data: predict with it, or export it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from fedpeft.errors import BadInput
from fedpeft.experiment.config import Config
from fedpeft.experiment.recorder import CHECKPOINTS, settings_digests
from fedpeft.experiment.run import read_settings, run_row
from fedpeft.federation import checkpoint
from fedpeft.models import Loaded, export, load
from fedpeft.tasks import Classification
from fedpeft.training.evaluation import FULL_CLIENT, mounted_state, predict_logits
from fedpeft.training.hardware import Hardware, use
from fedpeft.types import LocalTask, Method, State


@final
@dataclass(frozen=True)
class Trained:
    """A model with the last state of a run."""

    config: Config
    hardware: Hardware
    loaded: Loaded
    task: Classification
    method: Method
    state: State

    @contextmanager
    def mounted(self) -> Iterator[LocalTask]:
        """Mount what was learnt on the model for the length of a ``with``."""
        with mounted_state(
            self.method, self.state, self.loaded.model, self.hardware, self.config.seed
        ) as local:
            yield local

    def predict(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Return the likeliest label of every text and its probability; a lone string raises TypeError."""
        if isinstance(texts, str):
            raise TypeError(f"predict takes a list of texts, not the text {texts!r}")
        examples = self.task.encode(texts, [self.task.labels[0]] * len(texts))
        with self.mounted():
            best = (
                predict_logits(self.loaded.model, self.task, examples, self.hardware)
                .softmax(dim=1)
                .max(dim=1)
            )
        return [
            (self.task.labels[i], p)
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def export(self, folder: Path | str, *, merge: bool = False) -> None:
        """Write the adapters as a folder for peft, or with ``merge`` the whole model as one for transformers.

        A folder that exists, or a method without low-rank adapters unless ``merge``, raises BadInput.
        """
        with self.mounted() as local:
            pass
        if merge:
            export.merged(self.loaded, local, Path(folder))
        else:
            export.adapter(self.loaded, local, self.config.model.name, Path(folder))


def open_run(folder: Path | str, on_warning: Callable[[str], None] = lambda _: None) -> Trained:
    """Return what the run in ``folder`` has learnt so far; BadInput for a folder without a run or without a checkpoint."""
    folder = Path(folder)
    config, hardware, labels = read_settings(folder)
    found = checkpoint.load(folder / CHECKPOINTS, settings_digests(folder), on_warning, mend=False)
    if found is None:
        raise BadInput(
            f"{folder}: has no checkpoint yet; go on with it first: fedpeft resume {folder}"
        )
    method = config.build_method()
    if not method.expects(found.state, method.send(found.state, FULL_CLIENT)):
        raise BadInput(
            f"{folder}: method {config.method['name']!r} shares nothing, so there is no model of the whole federation"
        )
    use(hardware)
    loaded = load(config.model, labels, hardware, config.seed)
    first = run_row(folder)
    if first and first.model_digest != loaded.digest:
        raise BadInput(
            f"{folder}: the weights of {config.model.name} had digest {first.model_digest} when the run was started, and now "
            f"{loaded.digest}; bring back those it was trained on"
        )
    task = Classification(labels, loaded.tokenizer, config.model.max_length)
    return Trained(config, hardware, loaded, task, method, found.state)
