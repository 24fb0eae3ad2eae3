"""A folder as huggingface.co keeps models: a card, the weights, and the configuration that timm's `hf-hub:` reads."""

import json
import re
from typing import Any

from dgkd_jax import own_code
from dgkd_jax.errors import BadInput
from dgkd_jax.export import card
from dgkd_jax.report.work_directories import Run
from dgkd_jax.runs.student import Student
from dgkd_jax.torch_port import export as torch_export

EXTRA, PACKAGE = "hf", "huggingface_hub"
# Networks that timm has under the same name with the same entries -> its names of the first and the last layer.
_IN_TIMM = {
    r"resnet(18|34|50|101)": ("conv1", "fc"),
    r"(vit_tiny|vit_small|deit_small)_patch16_224": ("patch_embed.proj", "head"),
}
_OWN_PREFIX = "dgkd_jax/"  # of the others: a name that timm refuses


def files(student: Student, run: Run) -> dict[str, bytes]:
    """File name -> content, for `huggingface_hub.upload_folder`.

    Raises:
        BadInput: a weight is not finite, or the network has no names in PyTorch.
    """
    name = student.config.student.model
    if own_code.is_own(name):
        raise BadInput(
            f"--format=huggingface is for the networks of dgkd_jax.models.NAMES, and {name} is none; take "
            "safetensors or stablehlo"
        )
    weights = torch_export.encode(student, suffix=".safetensors")
    layers = next((layers for pattern, layers in _IN_TIMM.items() if re.fullmatch(pattern, name)), None)
    head = card.front_matter(student, run, library="timm" if layers else "dgkd_jax")
    text = card.body(student, run, usage=_TIMM_USAGE if layers else _own_usage(student))
    return {
        "README.md": f"---\n{head}\n---\n\n{text}".encode(),
        "config.json": (json.dumps(_config(student, layers), indent=2) + "\n").encode(),
        "model.safetensors": weights,
    }


def _config(student: Student, layers: tuple[str, str] | None) -> dict[str, Any]:
    """The content of config.json, in timm's layout: `timm.models.save_for_hf` writes the same keys."""
    about, data, name = student.about, student.config.data, student.config.student.model
    height, width, channels = about["image_shape"]
    pixels = {
        "input_size": [channels, height, width],
        "mean": about["mean"],
        "std": about["std"],
        "interpolation": data.eval_interpolation,
        "crop_pct": min(height, width) / data.eval_resize if data.eval_resize else 1.0,
        "crop_mode": "center",
    }
    shared = {"num_classes": about["num_classes"]}
    if layers is None:
        return {"architecture": f"{_OWN_PREFIX}{name}", **shared, "pretrained_cfg": pixels}
    arguments = {} if channels == 3 else {"in_chans": channels}
    if (height, width) != tuple(student.model.image_shape[:2]) and name.startswith(("vit", "deit")):
        arguments["dynamic_img_size"] = True  # the position embeddings are those of 224 pixels, resampled by each call
    first, last = layers
    names = {"num_classes": about["num_classes"], "first_conv": first, "classifier": last, "custom_load": False}
    return {"architecture": name, **shared, "model_args": arguments, "pretrained_cfg": pixels | names}


_TIMM_USAGE = """## Load it

```python
import timm

network = timm.create_model("hf-hub:ORG/NAME", pretrained=True)  # or local-dir:FOLDER
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=network))
```
"""


def _own_usage(student: Student) -> str:
    name, about = student.config.student.model, student.about
    return f"""## Load it

```python
from dgkd_jax import models, torch_port

model = models.create("{name}", num_classes={about["num_classes"]})
arrays = torch_port.load("model.safetensors")  # or hf:ORG/NAME
variables = torch_port.from_torch(arrays, model, "{name}", image_shape={tuple(about["image_shape"])})
logits = model.apply(variables, images)  # [batch, height, width, channels]
```
"""
