"""Writes a file so that it is there completely or not at all."""

import os

from etils import epath


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Write under another name, then rename: neither a reader nor a kill can leave a half-written file."""
    path = epath.Path(os.fspath(path))
    unfinished = path.with_name(f"{path.name}.unfinished")
    if isinstance(content, str):
        unfinished.write_text(content)
    else:
        unfinished.write_bytes(content)
    unfinished.replace(path)
