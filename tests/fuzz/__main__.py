"""``make fuzz``: for each surface 10,000 mutations of valid inputs, Hypothesis at length, and atheris for a while.

``python -m tests.fuzz [--seconds 30] [--mutations 10000] [SURFACE ...]`` from the repository's folder. The exit code is the
number of surfaces with a finding.
"""

import argparse
import re
import resource
import subprocess
import sys
from importlib.util import find_spec

import torch

from .surfaces import REFUSED, SURFACES, TAKEN
from .trying import FOUND, found_inputs, try_mutations, try_one, warmed
from .trying import Tally as Seen


def main() -> int:
    """Fuzz what is asked for, with a line for each surface and way, and return how many have a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("surfaces", nargs="*", metavar="SURFACE", help=", ".join(SURFACES))
    parser.add_argument("--seconds", type=int, default=30, help="of atheris for each surface")
    parser.add_argument("--mutations", type=int, default=10_000, help="for each surface")
    asked = parser.parse_args()
    if unknown := set(asked.surfaces) - SURFACES.keys():
        parser.error(f"no surface {min(unknown)}; choose from: {', '.join(SURFACES)}")
    torch.set_num_threads(1)
    guided = find_spec("atheris") is not None and asked.seconds > 0
    if not guided:
        print("without atheris (extra `fuzz`: Linux, Python 3.11 to 3.13), mutations alone")
    broken = 0
    for name in asked.surfaces or SURFACES:
        mended = mutations(name, asked.mutations)
        covered = coverage(name, asked.seconds) if guided else True
        broken += not (mended and covered)
    print("nothing was found" if not broken else f"{broken} surfaces have a finding")
    return broken


def mutations(name: str, count: int) -> bool:
    """Try mutations, and what was found earlier; return whether nothing is broken."""
    before = _resident()
    surface, _ = warmed(name)
    try:
        for found_in, path in found_inputs():
            if found_in == name:
                try_one(surface, path.read_bytes(), Seen())
        tally = try_mutations(name, count, seed=1)
    except AssertionError as error:
        print(f"{name:11} FOUND {error}\n{'':11} {error.__cause__!r}", flush=True)
        return False
    print(
        f"{name:11} {count} mutations: {tally.outcomes[REFUSED]} refused, {tally.outcomes[TAKEN]} taken as equal; "
        f"at most {tally.peak:,} bytes, {tally.worst:.0%} of the bound {surface.fixed:,} + {surface.each} n; "
        f"the process grew by {(_resident() - before) >> 20} MiB; {tally.seconds:.1f} s",
        flush=True,
    )
    return True


def _resident() -> int:
    """Return the most that this process ever had in memory, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def coverage(name: str, seconds: int) -> bool:
    """Let atheris try for so many seconds; return whether it found nothing."""
    command = [sys.executable, "-m", "tests.fuzz.guided", name, f"-max_total_time={seconds}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = done.stderr
    runs = re.findall(r"stat::number_of_executed_units:\s+(\d+)", told)
    covered = re.findall(r"cov: (\d+)", told)
    if done.returncode != 0:
        print(
            f"{name:11} FOUND by atheris; see .fuzz/{name}/found, then keep the input in {FOUND / name}"
        )
        print(told[-3000:], flush=True)
        return False
    print(
        f"{'':11} atheris: {runs[-1] if runs else '?'} inputs, {covered[-1] if covered else '?'} edges, {seconds} s",
        flush=True,
    )
    return True


if __name__ == "__main__":
    sys.exit(main())
