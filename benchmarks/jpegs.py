"""Generated photographs of ImageNet's size: smooth colours and noise, 500x375 pixels, about 100 kB."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375


def encoded(count: int) -> list[bytes]:
    """Files in JPEG format, all different."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
        pixels = np.asarray(coarse) + random.normal(0, 14, (HEIGHT, WIDTH, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=93)
        files.append(file.getvalue())
    return files


def write_folder(folder: Path, *, images: list[bytes]) -> list[Path]:
    """Two classes in the layout of `data.name=image_folder`; the first two images are the validation split too.

    Returns:
        The files of the training split.
    """
    paths = []
    for split, files in (("train", images), ("validation", images[:2])):
        for index, file in enumerate(files):
            path = folder / split / f"class{index % 2}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
            paths += [path] if split == "train" else []
    return paths
