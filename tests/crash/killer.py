"""Kills a training process again and again, until it has come to its end in spite of it.

``python -m tests.crash.killer FOLDER KILLS SEED WAY WAY`` trains in two ways, each twice: without a break in an
interpreter of its own, and in a chain of processes that are killed. Each of the chain is a fork of this one, which
imports what they need, since that takes seconds, and does nothing with it.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

KINDS = ("half step=", "pruned ", "batch ", "round ", "save ", "saved ")


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after an announcement; with 0 before the announced can begin.

    Args:
        events: The announcement, and all later ones: a checkpoint may lie beyond the first of them.
        delay: The seconds.
    """

    events: list[str]
    delay: float


def dealt(kills):
    """The kinds of the moments of two chains: half of the kinds each, then the other half, and so on."""
    hands = [], []
    for kill in range(kills):
        hands[(kill // 3 + kill // 6) % 2].append(KINDS[kill % 6])
    return hands


def moments(events, kinds, seed):
    """One moment for each kind, in the order in which an uninterrupted fit comes by them."""
    chance = random.Random(seed)
    lasts = {name: later - now for (name, now), (_, later) in pairwise(events)}
    order = [name for name, _ in events]
    chosen = []
    for kind in kinds:
        event = chance.choice([name for name in lasts if name.startswith(kind)])
        at_once = kind in ("half step=", "pruned ")
        delay = 0.0 if at_once else chance.uniform(0, lasts[event])
        chosen.append(Moment(order[order.index(event) :], delay))
    return sorted(chosen, key=lambda moment: -len(moment.events))


def run_until(moment, train):
    """Run a function in a new process and kill it at a moment, if there is one; whether the process was killed."""
    heard, tells = os.pipe()
    waits, answers = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(heard), os.close(answers)
        os._exit(be_the_child(train, tells, waits))
    os.close(tells), os.close(waits)
    try:
        killed = listen(moment, heard, answers)
    finally:
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        os.close(heard), os.close(answers)
    if killed:
        assert os.WTERMSIG(status) == signal.SIGKILL
    elif status:
        raise RuntimeError("the process failed by itself; its error is above")
    return killed


def be_the_child(train, tells, waits):
    """Train, and go on after each announcement only when told to."""

    def announce(event):
        os.write(tells, f"{event}\n".encode())
        os.read(waits, 1)

    try:
        train(announce)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def listen(moment, heard, answers):
    """Answer every announcement until it is time to kill; false if there is nobody left to kill."""
    deadline = None
    while True:
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([heard], [], [], patience)[0]:
            return True
        event = os.read(heard, 1000).decode().strip()  # one: the next one comes after the answer
        if not event:
            return False
        if moment is not None and deadline is None and event in moment.events:
            if moment.delay == 0:
                return True
            deadline = time.monotonic() + moment.delay
        if deadline is None or event != "end":  # who shall be killed does not get away
            os.write(answers, b".")


def main(folder, kills, seed, ways):
    """Both runs of each way; writes down the moments and how often a process was killed."""
    command = [sys.executable, "-m", "tests.crash.fit", str(folder / "whole"), *ways]
    with subprocess.Popen(command) as whole:
        from tests.crash import fit  # while the other process trains

        if whole.wait():
            raise RuntimeError("the uninterrupted fit failed; its error is above")
    for way, kinds in zip(ways, dealt(kills), strict=True):
        events = json.loads((folder / "whole" / way / "events").read_text())
        planned = moments(events, kinds, f"{seed} {way}")
        own = folder / "killed" / way
        fit.prepare(own)
        (own / "moments").write_text(json.dumps([(moment.events[0], moment.delay) for moment in planned]))
        train = partial(fit.go_on, own, way)
        killed = [run_until(moment, train) for moment in planned]
        run_until(None, train)
        (own / "kills").write_text(str(sum(killed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
