"""A teacher that is any function of images, run outside JAX: of PyTorch, timm, Keras, ONNX Runtime and the like."""

from collections.abc import Callable

import flax.struct
import numpy as np

from dgkd_jax.errors import BadInput


@flax.struct.dataclass
class HostNetwork:
    """A function of uint8 images. It cannot be part of a compiled program, so training reads its logits from a cache.

    Attributes:
        function: numpy uint8 `[batch, height, width, channels]` -> logits `[batch, classes]`, of any array library.
        name: for messages.
        num_classes: that it must return.
        fingerprint: by which its cache is recognised.
    """

    function: Callable[[np.ndarray], object] = flax.struct.field(pytree_node=False)
    name: str = flax.struct.field(pytree_node=False)
    num_classes: int = flax.struct.field(pytree_node=False)
    fingerprint: str = flax.struct.field(pytree_node=False, default="")

    def on_host(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 `[batch, classes]` of uint8 images.

        Raises:
            BadInput: the function fails, or returns something else.
        """
        try:
            found = self.function(np.array(images))  # a copy: PyTorch wants memory that may be written
            if hasattr(found, "detach"):
                found = found.detach().cpu()
            logits = np.asarray(found, np.float32)
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise BadInput(
                f"the teacher {self.name} fails on uint8 images of shape {images.shape}: {type(error).__name__}: {why}"
            ) from error
        if logits.shape != (len(images), self.num_classes):
            raise BadInput(
                f"the teacher {self.name} returns shape {logits.shape} for {len(images)} images of {self.num_classes} "
                f"classes; it must return ({len(images)}, {self.num_classes})"
            )
        return logits
