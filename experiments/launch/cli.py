"""What the entry points share: errors of one line, and compiled programs kept for the next run."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments.launch.interrupts import Stop
from experiments.storage import leases, paths
from experiments.tasks.ranges import ValueRange

# ml_collections' traceback of a config whose get_config() has no parameter, or one more.
_CONFIG_ARGUMENT = re.compile(
    r"flag --\w+=(?P<path>[^:]*):?(?P<arg>.*?): Error whilst .*get_config\(\) "
    r"(takes 0 positional|missing 1 required positional argument: '(?P<missing>\w+)')",
    re.DOTALL,
)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """`absl.app.run` whose flag and config errors are one line each, and libraries are quiet."""
    app.run(main, flags_parser=_parse)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program in one line where what the user asked for is found to be wrong.

    Only for code that checks and reads; a ValueError from training is a fault of ours and keeps
    its traceback.
    """
    try:
        yield
    except (ValueError, KeyError, AttributeError, OSError, ImportError) as error:
        fail(error)


def leave(stop: Stop) -> NoReturn:
    """Ends the program as the signal of `stop` asked, without waiting for threads that compile.

    May be called where the signal finds the program.
    """
    leases.give_back()
    show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""  # a progress bar hides it
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{show_cursor}\n{stop.line()}\n".encode())
    os._exit(stop.status)


def keep_compiled() -> None:
    """Keeps every program that JAX compiles on disk, where the next process finds it.

    In the folder of JAX_COMPILATION_CACHE_DIR or of jax's own setting if there is one, else in the
    user's caches, $XDG_CACHE_HOME/attention-jax or ~/.cache/attention-jax, which holds 512 MiB:
    what was used least recently makes room. JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing.
    """
    import jax

    # jax tells type checkers of few of its settings.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = paths.cache_folder("attention-jax")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 2**29)
        _drop_halves(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def limit(flag: flags.FlagHolder, allowed: ValueRange) -> None:
    """Makes the values of a flag that are out of a range an error, None aside."""
    text = f"must be {allowed.text}"
    flags.register_validator(flag.name, lambda x: x is None or allowed.holds(x), text)


def output_file(flag: flags.FlagHolder) -> Any:
    """The path of a flag, of a file to write.

    ValueError where its folder is not there, and where it is a folder itself.
    """
    path = paths.as_path(flag.value)
    if isinstance(path, Path) and not path.parent.is_dir():
        raise ValueError(f"--{flag.name}={path}: there is no folder {path.parent}")
    if isinstance(path, Path) and path.is_dir():
        raise ValueError(f"--{flag.name}={path} is a folder: give a file in it")
    return path


def config(flag: flags.FlagHolder) -> tuple[ConfigDict, dict[str, Any]]:
    """The config of a flag, and by dotted name the settings that other flags have changed.

    ValueError where none is given or its file returns none, OSError where there is no such file.
    """
    if not flags.FLAGS[flag.name].present:
        raise ValueError(f"--{flag.name} says what to train: give a file such as those in configs/")
    if not hasattr(flag.value, "task"):
        kind = type(flag.value).__name__
        raise ValueError(
            "get_config() must return what settings.config(task) does, with some settings changed; "
            f"it returned a {kind} without a task"
        )
    changed = config_flags.get_override_values(flags.FLAGS[flag.name])
    return flag.value, {name.removeprefix(f"{flag.name}."): x for name, x in changed.items()}


def _drop_halves(folder):
    """Removes programs that a killed process has not written to the end.

    jax writes the time of the last use after the program, and could not add any other program to a
    folder that holds one without.
    """
    for path in folder.glob("*-cache"):
        last_use = path.with_name(path.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(OSError):
            if not last_use.exists() and time.time() - path.stat().st_mtime > 60:
                path.unlink()


def _parse(argv):
    try:
        configs = [text for text in argv[1:] if re.match("--?config(=|$)", text)]
        if len(configs) > 1:
            raise ValueError(f"one --config says what to train: got {' '.join(configs)}")
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f"cannot use {' '.join(rest[1:])!r}; flags are --name=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        return rest
    except Exception as error:
        fail(error)


def fail(error: BaseException) -> NoReturn:
    """Ends the program with an error of one line."""
    wrong = _CONFIG_ARGUMENT.search(str(error))
    if "\n" in str(error):
        while cause := error.__cause__ or error.__context__:
            error = cause
    text = " ".join(str(error).split())
    if misspelt := re.search(r'Did you mean "(.*)" instead of "(.*)"\?', text):
        text = f"no setting {misspelt[2]!r}; did you mean {misspelt[1]!r}?"
    elif wrong and wrong["missing"]:
        text = f"{wrong['path']} needs an argument: --config={wrong['path']}:{wrong['missing']}"
    elif wrong:
        text = f"{wrong['path']} takes no argument; got {wrong['arg']!r}"
    elif isinstance(error, KeyError | AttributeError):
        text = f"no setting {text.strip(chr(39) + chr(34))!r}"
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)
