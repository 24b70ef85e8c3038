"""What a run has learnt, opened from its folder without its data: predict with it, or export it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from fedpeft.errors import BadInput
from fedpeft.experiment.config import Config
from fedpeft.experiment.recorder import CHECKPOINTS, settings_digests
from fedpeft.experiment.run import read_settings, run_row
from fedpeft.federation import checkpoint
from fedpeft.models import Loaded, export, load
from fedpeft.tasks import Task, make_task
from fedpeft.training.evaluation import mounted_state, predictions
from fedpeft.training.hardware import Hardware, use
from fedpeft.types import LocalTask, Method, State


@final
@dataclass(frozen=True)
class Trained:
    """A model with the last state of a run."""

    config: Config
    hardware: Hardware
    loaded: Loaded
    task: Task
    method: Method
    state: State

    @contextmanager
    def mounted(self) -> Iterator[LocalTask]:
        """Mount what was learnt on the model for the length of a ``with``."""
        with mounted_state(
            self.method, self.state, self.loaded.model, self.hardware, self.config.seed
        ) as local:
            yield local

    def predict(
        self, texts: Sequence[str], context: str | None = None
    ) -> Sequence[tuple[Any, ...]]:
        """Return what the model says about every text, as named tuples of the task's own.

        Of a classification these are (label, probability), of tagging the sentence with its names,
        of question answering (answer, start, end, score). ``context``: the second text of every
        pair, or the one that holds the answers. A lone string raises TypeError.
        """
        if isinstance(texts, str):
            raise TypeError(f"predict takes a list of texts, not the text {texts!r}")
        examples = self.task.encode(self.task.unanswered(texts, context))
        with self.mounted():
            outputs = predictions(self.loaded.model, self.task, examples, self.hardware)
        return self.task.answers(outputs, examples)

    def untuned(self) -> "Trained":
        """Return the same model before the first round, with nothing learnt yet."""
        return replace(self, state=self.method.init(self.loaded.base, self.config.seed))

    def export(self, folder: Path | str, *, merge: bool = False) -> None:
        """Write the adapters as a folder for peft.

        With ``merge``, write the whole model as one for transformers. A folder that exists raises
        BadInput, and so does a method without low-rank adapters unless ``merge``.
        """
        # Only what the branches add is needed, and the model is written without its branches.
        with self.mounted() as local:
            pass
        if merge:
            export.merged(self.loaded, local, Path(folder))
        else:
            export.adapter(self.loaded, local, self.config.model.name, Path(folder))


def open_run(folder: Path | str, on_warning: Callable[[str], None] = lambda _: None) -> Trained:
    """Return what the run in ``folder`` has learnt so far, without its data.

    ``on_warning`` is told of a damaged checkpoint that is passed over. Raises BadInput for a folder
    without a run or without a checkpoint, where the model's weights are not those it was trained
    on, and for a method that keeps parts of the model with its clients.
    """
    folder = Path(folder)
    config, hardware, labels = read_settings(folder, on_warning)
    # Read only: the run may be under way, and its process alone mends the folder.
    latest = checkpoint.load(folder / CHECKPOINTS, settings_digests(folder), on_warning, mend=False)
    if latest is None:
        raise BadInput(
            f"{folder}: has no checkpoint yet; go on with it first: fedpeft resume {folder}"
        )
    use(hardware)
    task = make_task(config.task, labels, config.model.max_length)
    loaded = load(config.model, task, hardware, config.seed)
    row = run_row(folder)
    if row is not None and row.model_digest != loaded.digest:
        raise BadInput(
            f"{folder}: the weights of {config.model.name} had digest {row.model_digest} when "
            f"the run was started, and now {loaded.digest}; bring back those it was trained on"
        )
    trained = Trained(
        config=config,
        hardware=hardware,
        loaded=loaded,
        task=task.with_tokenizer(loaded.tokenizer),
        method=config.build_method(),
        state=latest.state,
    )
    # Found out here and not at the first prediction.
    with trained.mounted() as local:
        if local.personal:
            raise BadInput(
                f"{folder}: method {config.method['name']!r} keeps parts of its model with its "
                "clients, so there is no model of the whole federation"
            )
    return trained
