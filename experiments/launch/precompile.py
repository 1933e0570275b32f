"""Compiles the programs of a sweep's next cell in another process, while this one trains.

They come back through the folder of `cli.keep_compiled`: what is left to do here is to trace, lower
and load them. A thread would not do: tracing holds Python's lock, and the training waits.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from concurrent import futures
from typing import IO, NamedTuple

import jax
from ml_collections import ConfigDict

from experiments.config import settings
from experiments.launch import cli
from experiments.training import loop
from experiments.training.compilation import compile_program, kept_in


class Ahead:
    """The process that compiles ahead; it ends with the context, or when this process is killed.

        with Ahead() as ahead:
            for config, following in ...:
                seconds = ahead.turn(config, following)
                ...  # train config

    Where it dies, this process compiles by itself. There is none on a GPU or TPU, whose memory is
    all this process's, and none where compiled programs are not kept.
    """

    def __init__(self):
        self._child: _Child | None = None
        self._known: set[tuple] = set()  # programs that were compiled, here or there
        self._compiling, self._since = None, 0.0  # what the child compiles, and since when

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        if self._child:
            self._child.process.kill()
            self._child.process.communicate()

    def turn(self, config: ConfigDict, following: ConfigDict | None) -> float:
        """Waits for the programs of `config` if they are under way, then begins `following`'s.

        Programs that nobody has begun are compiled here. Returns the seconds that it took.
        """
        began = time.perf_counter()
        with contextlib.suppress(Exception):  # a cell's mistakes are told at its own turn
            program = loop.prepare(config).program
            if self._child and self._compiling:
                # A child that needs more than twice the time it has had finds no free core.
                patience = min(began - self._since, 60) if self._compiling == program else 0
                if select.select([self._child.replies], [], [], patience)[0]:
                    self._child.replies.readline()  # nothing if it is dead, which ends it as well
                    self._compiling = None
            if program not in self._known:  # before a child asks for a core as well
                self._known.add(program)
                compile_program(*program)
            if following and not self._compiling:
                self._begin(following, loop.prepare(following).program)
        return time.perf_counter() - began

    def _begin(self, config, program):
        if program in self._known or not kept_in() or jax.default_backend() != "cpu":
            return
        self._child = self._child or _start()
        print(json.dumps(settings.describe(config)), file=self._child.orders, flush=True)
        self._known.add(program)
        self._compiling, self._since = program, time.perf_counter()


class _Child(NamedTuple):
    process: subprocess.Popen[str]
    orders: IO[str]
    replies: IO[str]


def _start():
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(jax.config.jax_compilation_cache_max_size),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.launch.precompile"],
        env={**os.environ, **settings},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,  # Ctrl-C is for the sweep alone
    )
    assert process.stdin and process.stdout  # both are pipes
    return _Child(process, process.stdin, process.stdout)


def main() -> None:
    """Compiles each config that comes as a line of JSON, and writes a line when it is done."""
    os.nice(5)  # the training goes first; at 19 it leaves too little on two cores
    cli.keep_compiled()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    with futures.ThreadPoolExecutor(1) as worker:
        for line in sys.stdin:
            worker.submit(_compile, line, replies)
        os._exit(0)  # the sweep is gone, and with it the need of what is being compiled


def _compile(line, replies):
    try:
        compile_program(*loop.prepare(settings.read(json.loads(line))).program)
        compile_program.cache_clear()
    finally:
        print(file=replies, flush=True)


if __name__ == "__main__":
    main()
