"""PyTorch `state_dict` <-> variables: entry names and shapes must match exactly; both directions are lossless.

    arrays = torch_port.load("resnet50.pth")                           # or .safetensors, .npz
    variables = torch_port.from_torch(arrays, model, "resnet50")
    state_dict = torch_port.to_torch(variables, model, "resnet50")     # of numpy arrays

torch is needed only to read `.pth` files. This command exports a student from a work directory:

    python -m dgkd_jax.torch_port export --workdir=DIR --output=student.safetensors [--step=N|best|last] [--overwrite]
"""

from dgkd_jax.torch_port.convert import classes_of, from_torch, to_torch
from dgkd_jax.torch_port.files import DOWNLOADS, load

__all__ = ["DOWNLOADS", "classes_of", "from_torch", "load", "to_torch"]
