"""The report of a run directory: one self-contained page, tables and figures for a paper.

    python -m experiments.report --workdir=runs/quickstart

reads what is in the directory, finished or not, prints the table and writes report.html, report.md,
results.csv, tables/ (LaTeX) and plots/ (PDF, PNG, SVG) anew.

    python -m experiments.report --workdir=runs/a --workdir=runs/b --output=runs/a-and-b

compares experiments: all their groups in one report, and cells of the same name with each other.

    python -m experiments.report --workdir=runs/quickstart --watch

serves the page to browsers of this machine while a sweep runs, and writes nothing.
"""

from collections.abc import Sequence

from absl import flags

from experiments.launch import cli
from experiments.reporting import page
from experiments.storage import paths
from experiments.tasks.ranges import between


def main(argv: Sequence[str]) -> None:
    del argv
    with cli.user_errors():
        workdirs = [paths.as_path(workdir) for workdir in _WORKDIR.value]
        if _WATCH.value and _OUTPUT.value is not None:
            raise ValueError("--watch writes nothing: leave out --output, or --watch")
        if _PORT.value and not _WATCH.value:
            raise ValueError("--port says where to serve the live page: give --watch")
        if _WATCH.value:
            page.watch(workdirs, _PORT.value)
        else:
            page.publish(*workdirs, output=_OUTPUT.value)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_multi_string(
        "workdir", None, "A run directory; several are compared.", required=True
    )
    _OUTPUT = flags.DEFINE_string("output", None, "Where to write to, unless into the directory.")
    _WATCH = flags.DEFINE_bool("watch", False, "Serve the live page on 127.0.0.1 instead.")
    _PORT = flags.DEFINE_integer("port", 0, "Of --watch; 0: any that is free.")
    cli.limit(_PORT, between(0, 65535))
    cli.run(main)
