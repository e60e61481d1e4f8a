"""Several fits in one process that take turns, one training step at a time."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import lightning as L
import torch


class Clock(NamedTuple):
    """Seconds of one step, or a point in time."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.process_time(), time.perf_counter())

    def since(self, start: Clock) -> Clock:
        return Clock(self.cpu - start.cpu, self.wall - start.wall)


class Turns(L.Callback):
    """Stops a fit whenever a batch is about to start, until it is its turn again.

    It is the last callback of its Trainer, so the time from one batch's start to the next is a whole period of the
    training loop: forward, backward, the optimizer's step, all hooks of all callbacks, logging, fetching the next
    batch and, after the last batch of an epoch, the end of the epoch and the start of the next one.
    """

    def __init__(self) -> None:
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.steps: list[Clock] = []
        self._start: Clock | None = None

    def on_train_batch_start(self, *_: object) -> None:
        self._stop()
        self.back.release()
        self.go.acquire()
        self._start = Clock.now()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == trainer.max_epochs - 1:
            self._stop()  # what callbacks do when the fit ends is no part of an epoch

    def _stop(self) -> None:
        if self._start is not None:
            self.steps.append(Clock.now().since(self._start))


class Runner:
    """A fit in a thread of its own, which runs only while it is its turn."""

    def __init__(self, fit: Callable[[Turns], None]) -> None:
        self.turns = Turns()
        self.done = False
        self._fit, self._error = fit, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def turn(self) -> None:
        """Let the fit go on to the start of its next batch, or to its end."""
        self.turns.go.release()
        self.turns.back.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        self.turns.go.acquire()
        torch.set_num_threads(1)  # holds for one thread only
        try:
            self._fit(self.turns)
        except BaseException as error:
            self._error = error
        self.done = True
        self.turns.back.release()


def in_turns(fits: Sequence[Callable[[Turns], None]], say: Callable[[str], None]) -> list[list[Clock]]:
    """Run fits of equally many steps, step by step in turns, in a new order each round; seconds of each step."""
    runners = [Runner(fit) for fit in fits]
    order, shuffle, rounds = list(runners), random.Random(0).shuffle, 0
    gc.disable()  # garbage of one fit must not be collected in the turn of another
    try:
        while not runners[0].done:
            shuffle(order)
            for runner in order:
                runner.turn()
            gc.collect()
            rounds += 1
            if rounds % 10 == 1:
                say(f"round {rounds}")
    finally:
        gc.enable()
    return [runner.turns.steps for runner in runners]
