"""A teacher that is not run in training: each batch holds its logits."""

import flax.struct
import jax
import jax.numpy as jnp

from dgkd_jax.models.host_network import HostNetwork
from dgkd_jax.models.network import Network
from dgkd_jax.runs.record import TaughtBy


@flax.struct.dataclass
class CachedTeacher:
    """Stands in for a teacher whose logits of the training batches are cached.

    Attributes:
        network: the teacher itself, for evaluations.
        description: of what the cache stores.
    """

    network: Network | HostNetwork
    description: str = flax.struct.field(pytree_node=False)

    def logits(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Float32 `[batch, classes]`, from the batch's "teacher_logits", float16 or float32."""
        return batch["teacher_logits"].astype(jnp.float32)


def live(teacher: Network | CachedTeacher | None) -> Network | HostNetwork | None:
    """The teacher as a network that can be run; None where there is no teacher."""
    return teacher.network if isinstance(teacher, CachedTeacher) else teacher


def taught_by(teacher: Network | CachedTeacher | None) -> TaughtBy | None:
    """What a checkpoint records of a teacher."""
    if isinstance(teacher, CachedTeacher):
        return TaughtBy(teacher.network.fingerprint, teacher.description)
    return teacher and TaughtBy(teacher.fingerprint)
