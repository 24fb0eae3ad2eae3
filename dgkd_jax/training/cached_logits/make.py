"""Makes the cache of logits that a config describes."""

from collections.abc import Callable

from etils import epath
from ml_collections import ConfigDict

from dgkd_jax.errors import BadInput
from dgkd_jax.methods import METHODS, from_config
from dgkd_jax.training.cached_logits import source as cached_logits
from dgkd_jax.training.cached_logits.fill import Made, fill
from dgkd_jax.training.run import prepare, root_of


def make(
    config: ConfigDict,
    folder: str | None = None,
    *,
    epochs: int | None = None,
    top_k: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Made:
    """Store the teacher's logits of every training batch; blocks that are already stored are kept.

    Args:
        config: validated.
        folder: of the cache; None: runs/NAME/teacher-logits-seedSEED.
        epochs: to store; None: config.epochs.
        top_k: classes stored of each image; 0: all.
        stop: as for `loop.fit`.

    Raises:
        BadInput: the method has no teacher, or the teacher, the data set or the folder cannot be used.
        NumericFailure: a logit is not finite, or too large for float16.
        StorageFailure, Preempted: the same call continues from there.
    """
    epochs = epochs or config.epochs
    temperature = _temperature(config) if top_k else None
    if config.method in METHODS and not METHODS[config.method].needs_teacher:
        raise BadInput(f"config.method={config.method} has no teacher; leave --config.method out")
    if top_k and (config.data.mixup or config.data.cutmix):
        raise BadInput(
            f"--top-k={top_k} stores one label's logit of each image, and config.data.mixup and cutmix give it two: "
            "leave --top-k out"
        )
    config = config.copy_and_resolve_references()
    config.teacher.cache = ""  # the folder that is about to be made may be named here
    source, mesh, taught = prepare(config, stop=stop)
    if top_k >= source.num_classes:
        raise BadInput(f"--top-k={top_k}: {source.name} has {source.num_classes} classes; leave --top-k out for all")
    target = epath.Path(folder) if folder else root_of(config) / f"teacher-logits-seed{config.seed}"
    about = cached_logits.about(
        config, teacher=taught.network.fingerprint, source=source, top_k=top_k, temperature=temperature
    )
    return fill(target, about, config, epochs=epochs, teacher=taught.network, source=source, mesh=mesh, stop=stop)


def _temperature(config: ConfigDict) -> float:
    method = METHODS.get(config.method)
    temperature = method and from_config(config).teacher_temperature
    if temperature is None:
        fitting = [
            name for name, each in METHODS.items() if each.needs_teacher and each.teacher_temperature is not None
        ]
        raise BadInput(
            f"--top-k stores the sum of the other classes at one temperature, and config.method={config.method} has "
            f"none: give --config.method={', '.join(fitting[:-1])} or {fitting[-1]}, or leave --top-k out"
        )
    return temperature
