"""The work of ``benchmarks.steps`` by fedpeft, messages included. Run in a process of its own; prints one line of JSON.

Left out is the one trial step by which a run learns once what a step of a client alone takes.
"""

import json
import os
import sys
from dataclasses import replace
from typing import Any

from fedpeft.cli.app import WAITING

os.environ |= WAITING  # before torch is loaded, as the command line does

from benchmarks.works import Work, round_of
from fedpeft.ledger import measured


def run(work: Work) -> dict[str, Any]:
    """Do ``work``, after a step that does not count: seconds of a client's step, losses, and bytes of memory."""
    whole = work.federation()
    state = whole.first_state()
    worker = replace(whole.worker, step_alone=None)
    round_of(replace(worker, training=replace(worker.training, steps=1)), state, 1, 1)
    with measured() as meter:
        responses = round_of(worker, state, work.clients, work.stack)
    # The worker's own measurement begins the mark of memory anew.
    peaks = [response.measured.peak_memory for response in responses]
    return {
        "seconds": meter.seconds / sum(response.measured.steps for response in responses),
        "losses": [response.measured.loss for response in responses],
        "peak": max(meter.peak_memory, *peaks),
        "hardware": whole.hardware.describe(),
    }


if __name__ == "__main__":
    print(json.dumps(run(Work(**json.loads(sys.argv[1])))))
