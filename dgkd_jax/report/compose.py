"""Writes the report page about work directories."""

import sys
import time
import warnings
from collections.abc import Iterable

from etils import epath

from dgkd_jax.errors import BadInput
from dgkd_jax.report import figures, grouping, page, sections, work_directories

_LONGEST_NAME = 300  # characters of a data set's name
_QUIET_S = 10.0  # between two lines of progress


def write(workdirs: Iterable[str | epath.Path], output: str | epath.Path | None = None) -> epath.Path:
    """Read runs and write a report about them.

    Args:
        workdirs: of runs, or folders that contain runs.
        output: a folder, created if missing; None: `report` in the first of `workdirs`.

    Returns:
        The page, index.html in `output`; each figure is next to it as PNG.

    Raises:
        BadInput: no readable run, or `output` cannot be written.
    """
    workdirs = [epath.Path(workdir) for workdir in workdirs]
    if not workdirs:
        raise BadInput("no work directory given")
    paths, notes = work_directories.find(workdirs)
    found, progress = [], _Progress()
    for number, path in enumerate(paths, start=1):
        progress.show(f"reading run {number} of {len(paths)}")
        run = work_directories.read(path)
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
        text = _page(found, notes, title=_title(workdirs), folder=folder, progress=progress)
        # A folder's name may have bytes that are no text.
        (folder / "index.html").write_bytes(text.encode(errors="replace"))
    except OSError as error:
        raise BadInput(
            f"the report cannot be written to {folder}: {error.strerror or error}; choose --output=DIR"
        ) from error
    return folder / "index.html"


class _Progress:
    """Says every few seconds what is being done, so that a report that takes long is seen to go on."""

    def __init__(self):
        self._next = time.monotonic() + _QUIET_S
        self._figures = 0

    def show(self, text: str) -> None:
        if time.monotonic() >= self._next:
            print(f"report: {text}", file=sys.stderr, flush=True)
            self._next = time.monotonic() + _QUIET_S

    def drawn(self) -> None:
        self._figures += 1
        self.show(f"{_count(self._figures, 'figure')} drawn")


def _title(workdirs: list[epath.Path]) -> str:
    more = f" and {len(workdirs) - 1} more" if len(workdirs) > 1 else ""
    return f"Distillation report: {workdirs[0]}{more}"


def _page(
    found: list[work_directories.Run], notes: list[str], *, title: str, folder: epath.Path, progress: _Progress
) -> str:
    students = [run for run in found if not work_directories.is_teacher(run)] or found
    teachers = [run for run in found if work_directories.is_teacher(run)] if students is not found else []
    data_sets = list(dict.fromkeys(run.data_set for run in students))
    parts = []
    with figures.look(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # it shows as a box
        for number, data_set in enumerate(data_sets):
            groups, dropped = grouping.group(run for run in students if run.data_set == data_set)
            notes = notes + dropped
            prefix = "" if len(data_sets) == 1 else f"set{number + 1}-"

            def draw(name: str, figure, prefix: str = prefix) -> str:
                progress.drawn()
                return figures.embed(figure, prefix + name, folder)

            own = [run for run in teachers if run.data_set == data_set]
            heading = None if len(data_sets) == 1 else f"Data set: {data_set[:_LONGEST_NAME]}"
            parts.append((heading, sections.sections(groups, own, draw=draw)))
    finished = sum(run.finished for run in students)
    own = f"; {_count(len(teachers), 'own run')} of a teacher" if teachers else ""
    names = ", ".join(name[:_LONGEST_NAME] for name in data_sets)
    introduction = page.paragraph(f"{_count(len(students), 'student')}, {finished} finished{own}. Data: {names}.")
    if len(data_sets) > 1:
        introduction += page.missing(
            [f"These runs use {len(data_sets)} data sets. Each has a part of its own; nothing is averaged or compared "
             "across them."]
        )  # fmt: skip
    return page.document(title, introduction + page.missing(notes), parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
