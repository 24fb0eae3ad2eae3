"""Opens the sets that `evaluate --data=` names: the clean split, corruptions of it, and foreign sets."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from dgkd_jax import own_code
from dgkd_jax.data import item_source
from dgkd_jax.data.open import open_source
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput, did_you_mean
from dgkd_jax.evaluate import corruptions
from dgkd_jax.evaluate.evaluator import EvaluationSet

_NUMBERED = re.compile(r"(?P<kind>[a-z_]+)-(?P<number>\d+)(?P<wrapped>-wrapped)?")
_EXAMPLES = ("noised-8", "noised-8-wrapped", "scrambled-4", "image_folder:PATH", "tfds:NAME")


def evaluation_sets(names: str, *, run: Any, data: Any, workdir: epath.Path, seed: int = 0) -> list[EvaluationSet]:
    """Open the sets of a comma-separated list; a name for several sets, such as `corruptions`, is expanded.

    Args:
        names: as described in `evaluate/__main__.py`.
        run: what the networks see: num_classes, image_shape, mean, std (the work directory's student.json).
        data: the section `data` of the run's config.
        workdir: of the run; it holds the evaluation split of images that came from Python.
        seed: for noise and scrambling.

    Raises:
        BadInput: an unknown name, a side that does not fit the images, or a set that cannot be opened.
    """
    expanded = [single for name in names.split(",") for single in _expand(name.strip())]
    changes = {name: _change(name, run.image_shape, seed) for name in expanded if not _is_foreign(name)}
    source = _opened(data, workdir) if changes else None
    opened = []
    for name in dict.fromkeys(expanded):
        if name in changes:
            on_host, on_device = changes[name]
            opened.append(EvaluationSet(name, source.num_eval, functools.partial(_batches, source, on_host), on_device))
            continue
        from dgkd_jax.evaluate import foreign_sets  # imports TFDS

        kind, _, where = name.partition(":")
        if kind == "tfds":
            tfds_name, _, split = where.partition(":")
            foreign = foreign_sets.open_tfds(tfds_name, split, run=run, data=data)
        else:
            foreign = foreign_sets.open_folder(where, run=run, data=data)
        opened.append(EvaluationSet(name, foreign.source.num_eval, foreign.batches, classes=foreign.restricted_to))
    return opened


def _opened(data: Any, workdir: epath.Path) -> Source:
    path = workdir / item_source.KEPT_FILE
    if not own_code.is_given(data.name):
        return open_source(data)
    if not path.exists():
        raise BadInput(
            f"the images of {workdir} came from Python and were too many to be kept there: evaluate another set, "
            "--data=image_folder:PATH, or in Python with the network that distill returned"
        )
    try:
        return item_source.open_kept(path.read_bytes(), data)
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error})") from error


def _is_foreign(name: str) -> bool:
    return name.startswith(("tfds:", "image_folder:"))


def _expand(name: str) -> list[str]:
    if name == "corruptions":
        return [
            f"{corruption}-{severity}" for corruption in corruptions.CORRUPTIONS for severity in corruptions.SEVERITIES
        ]
    if name in corruptions.CORRUPTIONS:
        return [f"{name}-{severity}" for severity in corruptions.SEVERITIES]
    return [name]


def _change(name: str, image_shape: tuple[int, ...], seed: int) -> tuple[Callable | None, Callable | None]:
    """The change to the images, as functions (on the host, on the device); None where there is none."""
    if name == "clean":
        return None, None
    match = _NUMBERED.fullmatch(name)
    kind, number = (match["kind"], int(match["number"])) if match else (name, None)
    wrapped = bool(match and match["wrapped"])
    if kind == "noised" and number is not None:
        largest = corruptions.largest_noise_patch(image_shape)
        if not 1 <= number <= largest:
            raise BadInput(
                f"--data={name}: a side of 1 to {largest} pixels fits between the patch's corner and the edge"
            )
        return None, functools.partial(corruptions.noise_patch, side=number, wrapped=wrapped, seed=seed)
    if kind == "scrambled" and number is not None and not wrapped:
        sides = corruptions.patch_sides(image_shape)
        if number not in sides:
            height, width = image_shape[:2]
            raise BadInput(
                f"--data={name}: patches of {number} pixels do not divide an image of {height}x{width} into several; "
                f"these do: {', '.join(map(str, sides))}"
            )
        return None, functools.partial(corruptions.scramble_patches, side=number, seed=seed)
    if kind in corruptions.CORRUPTIONS and not wrapped:
        if number not in corruptions.SEVERITIES:
            raise BadInput(f"--data={name}: the severity is 1 to 5, or left out for all five")
        if kind in corruptions.ON_HOST:
            return functools.partial(corruptions.jpeg_compression, severity=number), None
        return None, functools.partial(corruptions.corrupt, name=kind, severity=number, seed=seed)
    known = ("clean", "corruptions", *corruptions.CORRUPTIONS, *_EXAMPLES)
    raise BadInput(
        f"--data={name}: no such set{did_you_mean(name, known)} There are {', '.join(known)}; "
        "a corruption may have a severity: contrast-3"
    )


def _batches(source: Any, on_host: Callable | None, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    for batch in source.eval_batches(batch_size=batch_size):
        yield batch if on_host is None else {**batch, "image": on_host(batch["image"])}
