"""What the test of `experiments.bench.isolate` runs in other processes; light to import."""

import os
import signal
import time


def add(a, b, note):
    return a + b


def eat(amount, note):
    note(1)
    held = bytearray(b"x") * amount
    time.sleep(60)
    return held


def sleep(note):
    note(0)
    time.sleep(60)


def die(note):
    note(2)
    os.kill(os.getpid(), signal.SIGKILL)


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def fail(note):
    raise Unpicklable("a", "reason")
