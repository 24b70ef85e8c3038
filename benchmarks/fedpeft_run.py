"""One federation by fedpeft, timed round by round; prints one line of JSON. Run by the benchmarks in a process of its own."""

import json
import os
import sys
import time

from fedpeft.cli.app import WAITING

os.environ |= WAITING  # before torch is loaded, as the command line does

from safetensors.torch import save_file

from benchmarks.setting import Setting
from fedpeft.engines.local import LocalEngine
from fedpeft.federation.server import federate
from fedpeft.ledger import ClientRow, to_json
from fedpeft.training.evaluation import mounted_state, score


def main() -> None:
    """Play the setting given as JSON and say when each round ended, how long clients trained, and what came out."""
    setting = Setting(**json.loads(sys.argv[1]))
    whole = setting.assembly()
    rows: list[ClientRow] = []
    engine = LocalEngine(whole.worker, stack=whole.hardware.stack)
    ends = []
    last = whole.first_state()
    for state in federate(
        whole.method,
        last,
        engine,
        lambda _: whole.clients,
        range(setting.rounds),
        config=whole.worker.config,
        min_replies=1,
        record=rows.append,
    ):
        ends.append(time.time())
        last = state
    lost = [row.lost for row in rows if row.lost]
    if lost:
        raise SystemExit(f"lost: {lost}")
    with mounted_state(whole.method, last, whole.loaded.model, whole.hardware, 0):
        counts = score(whole.loaded.model, whole.task, whole.scored, whole.hardware)
    accuracy = whole.task.metrics(counts)["accuracy"]
    if setting.out:
        save_file(dict(last.shared), setting.out)
    found = {
        "ends": ends,
        "accuracy": accuracy,
        "rows": [to_json(row) for row in rows],
        "hardware": whole.hardware.describe(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
