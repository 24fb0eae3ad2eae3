"""What runs did, as one page: python -m dgkd_jax.report WORKDIR… [--output=DIR]

  WORKDIR     a run's folder, or one that holds several (runs/mnist5k, runs/study/NAME)
  --output    where index.html and the figures as PNG are written; default: report in the first WORKDIR

The page holds everything inside itself and loads nothing: send it as it is. Runs that differ only in their seed are
one group; the folder `teacher` is a teacher's own run. Finished runs and broken-off ones are both read.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import NoReturn

from etils import epath

from dgkd_jax.analysis import figures, page, runs, sections
from dgkd_jax.errors import BadInput


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see python -m dgkd_jax.report --help)")


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    parser = _Parser(
        prog="python -m dgkd_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workdir", nargs="+", metavar="WORKDIR", help="of a run, or a folder with several beneath it")
    parser.add_argument("--output", metavar="DIR", help="default: WORKDIR/report of the first")
    try:
        options = parser.parse_args(arguments)
        written = write(options.workdir, options.output)
    except BadInput as error:
        print(f"dgkd_jax: {error}", file=sys.stderr)
        return error.exit_code
    print(f"the report is in {written}")
    return 0


def write(workdirs: Iterable[str | epath.Path], output: str | epath.Path | None = None) -> epath.Path:
    """Read runs and write their report.

    Args:
        workdirs: of runs, or folders with runs beneath them.
        output: a folder, made if need be; None: report in the first of `workdirs`.

    Returns:
        The page: index.html in `output`, beside it each figure as PNG.

    Raises:
        BadInput: nothing is readable, or `output` cannot be written.
    """
    workdirs = [epath.Path(workdir) for workdir in workdirs]
    if not workdirs:
        raise BadInput("no work directory given")
    paths, notes = runs.find(workdirs)
    found = []
    for path in paths:
        run = runs.read(path)
        if run is None:
            notes.append(f"{path}: left out, its config.json is unreadable")
        elif not (run.train or run.evals):
            notes.append(f"{path}: left out, its metrics.jsonl has no readable line")
        else:
            found.append(run)
    if not found:
        raise BadInput(f"nothing to report: {'; '.join(notes)}")
    folder = epath.Path(output) if output is not None else workdirs[0] / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = _page(found, notes, title=_title(workdirs), folder=folder)
        (folder / "index.html").write_text(text)
    except OSError as error:
        raise BadInput(
            f"the report cannot be written to {folder}: {error.strerror or error}; choose --output=DIR"
        ) from error
    return folder / "index.html"


def _title(workdirs: list[epath.Path]) -> str:
    more = f" and {len(workdirs) - 1} more" if len(workdirs) > 1 else ""
    return f"Distillation report: {workdirs[0]}{more}"


def _page(found: list[runs.Run], notes: list[str], *, title: str, folder: epath.Path) -> str:
    students = [run for run in found if not runs.is_teacher(run)] or found
    teachers = [run for run in found if runs.is_teacher(run)] if students is not found else []
    data_sets = list(dict.fromkeys(run.data_set for run in students))
    parts = []
    with figures.look():
        for number, data_set in enumerate(data_sets):
            groups, dropped = runs.group(run for run in students if run.data_set == data_set)
            notes = notes + dropped
            prefix = "" if len(data_sets) == 1 else f"set{number + 1}-"

            def draw(name: str, figure, prefix: str = prefix) -> str:
                return figures.embed(figure, prefix + name, folder)

            own = [run for run in teachers if run.data_set == data_set]
            heading = None if len(data_sets) == 1 else f"Data set: {data_set}"
            parts.append((heading, sections.sections(groups, own, draw=draw)))
    finished = sum(run.finished for run in students)
    own = f"; {_count(len(teachers), 'own run')} of a teacher" if teachers else ""
    introduction = page.paragraph(
        f"{_count(len(students), 'student')}, {finished} finished{own}. Data: {', '.join(data_sets)}."
    )
    if len(data_sets) > 1:
        introduction += page.missing(
            [f"These runs use {len(data_sets)} data sets. Each has a part of its own; nothing is averaged or compared "
             "across them."]
        )  # fmt: skip
    return page.document(title, introduction + page.missing(notes), parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
