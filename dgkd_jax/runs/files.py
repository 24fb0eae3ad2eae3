"""Writes a file so that it is there completely or not at all; says how large something is."""

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


def size_in_words(count: int) -> str:
    """A number of bytes, in the largest unit of which there is at least one."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
