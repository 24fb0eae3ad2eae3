"""Writes the report page about work directories."""

from collections.abc import Iterable

from etils import epath

from dgkd_jax.errors import BadInput
from dgkd_jax.report import figures, page, sections, work_directories


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
    found = []
    for path in paths:
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


def _page(found: list[work_directories.Run], notes: list[str], *, title: str, folder: epath.Path) -> str:
    students = [run for run in found if not work_directories.is_teacher(run)] or found
    teachers = [run for run in found if work_directories.is_teacher(run)] if students is not found else []
    data_sets = list(dict.fromkeys(run.data_set for run in students))
    parts = []
    with figures.look():
        for number, data_set in enumerate(data_sets):
            groups, dropped = work_directories.group(run for run in students if run.data_set == data_set)
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
