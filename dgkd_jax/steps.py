"""One training step and one evaluation step: the only file where student, teacher and loss meet.

Both are pure functions of global arrays; `train` compiles them once for the mesh they run on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dgkd_jax import losses, metrics
from dgkd_jax.analysis import calibration, collapse
from dgkd_jax.state import TrainState

METHODS = ("ce", "kd", "dkd", "dgkd", "logit_mse")

# What a training loss is made of, in the order of its computation: the keys of `finite_rows`.
PARTS = ("teacher logits", "student logits", "CE", "KD", "TCKD", "NCKD", "logit MSE", "coupling")

# (variables, images, train, mutable) -> logits, or (logits, updated collections) where mutable: a Linen module's apply.
Apply = Callable[..., Any]


class Objective(NamedTuple):
    """What is minimised: ce_weight·CE + the method's distillation term. Hashable, so it can be static under jit.

    Attributes:
        method: one of `METHODS`.
        ce_weight: weight of the cross-entropy.
        label_smoothing: in the cross-entropy.
        weight: of KD or of logit_mse.
        temperature: T of KD, DKD and DGKD, and of the diagnostics.
        alpha, beta: weights of TCKD and NCKD.
        convention, distance, parity_batch, kappa: as `losses.coupling_of_gradients`.
        wrt: the coupled gradients are those with respect to the student's "logits" or "params".
    """

    method: str
    ce_weight: float = 1.0
    label_smoothing: float = 0.0
    weight: float = 0.0
    temperature: float = 1.0
    alpha: float = 0.0
    beta: float = 0.0
    convention: str = "per_sample"
    distance: str = "mse"
    wrt: str = "logits"
    parity_batch: int | None = None
    kappa: float = 1e-8

    @property
    def needs_teacher(self) -> bool:
        return self.method != "ce"


def objective_of(config: ConfigDict) -> Objective:
    """The objective of `config.method`, from the method's own section of the configuration."""
    smoothing = config.label_smoothing
    if config.method == "ce":
        return Objective("ce", label_smoothing=smoothing)
    if config.method == "kd":
        return Objective(
            "kd",
            ce_weight=config.kd.ce_weight,
            label_smoothing=smoothing,
            weight=config.kd.weight,
            temperature=config.kd.temperature,
        )
    if config.method == "logit_mse":
        return Objective(
            "logit_mse",
            ce_weight=config.logit_mse.ce_weight,
            label_smoothing=smoothing,
            weight=config.logit_mse.weight,
        )
    decoupled = Objective(
        "dkd",
        ce_weight=config.dkd.ce_weight,
        label_smoothing=smoothing,
        temperature=config.dkd.temperature,
        alpha=config.dkd.alpha,
        beta=config.dkd.beta,
    )
    if config.method == "dkd":
        return decoupled
    return decoupled._replace(
        method="dgkd",
        convention=config.dgkd.convention,
        distance=config.dgkd.distance,
        wrt=config.dgkd.wrt,
        parity_batch=config.dgkd.parity_batch or None,
        kappa=config.dgkd.kappa,
    )


def normalize(images: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 `[batch, height, width, channels]` -> float32 (pixel/255 − mean) / std; float images pass as they are.

    Float images are taken as normalised already: what parity checks feed.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def metric_names(objective: Objective) -> tuple[str, ...]:
    """The names that `train_step` adds to `TrainState.totals`, known without running it."""
    names = ("loss", "accuracy", "grad_norm", "ce")
    if not objective.needs_teacher:
        return names
    names += ("kd", "tckd", "nckd", "logit_mse") + (("coupling",) if objective.method == "dgkd" else ())
    return names + (
        "grad_similarity",
        "target_gradmag",
        "nontarget_gradmag",
        "target_norm",
        "nontarget_norm",
        "covariance",
        "logit_msd",
        "agreement",
    )


def train_step(
    state: TrainState,
    teacher_variables: Any,
    batch: dict[str, jax.Array],
    *,
    student: Apply,
    teacher: Apply | None,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    ramp: optax.Schedule,
    epsilon: optax.Schedule,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    teacher_mean: tuple[float, ...] | None = None,
    teacher_std: tuple[float, ...] | None = None,
    ema_decay: float = 0.0,
    skip_limit: int = 1,
) -> TrainState:
    """One step of the student on one global batch.

    A step whose loss or gradient is not finite changes nothing but the counts of steps. From `skip_limit` such steps in
    a row on, every step is such a step, so that the state stays that before the first of them until somebody looks.

    Args:
        state: donated by the caller's `jit`.
        teacher_variables: the teacher's, never changed, never donated; None for method `ce`.
        batch: {"image": uint8 `[batch, height, width, channels]`, "label": int32 `[batch]`}; with "teacher_logits",
            float16 `[batch, classes]` (`teacher_cache`), these are taken and the teacher is not run.
        student, teacher: the models' `apply`; the teacher runs in evaluation mode, outside the differentiated function.
        optimizer: as from `state.make_optimizer`.
        objective: what is minimised.
        ramp, epsilon: the factor on the distillation terms and ε, as functions of the number of steps done.
        mean, std: of the pixels as the student sees them, per channel, in units of pixel/255.
        teacher_mean, teacher_std: likewise for the teacher; None = as the student sees them.
        ema_decay: per step, of the average in `state.ema`; read only where there is one.
        skip_limit: 1 or more.

    Returns:
        The next state, with this step's metrics added to `totals` and `epoch_totals` unless it was skipped.
    """
    images, labels = normalize(batch["image"], mean=mean, std=std), batch["label"]
    teacher_logits = None
    if objective.needs_teacher:
        seen_as = {"mean": teacher_mean or mean, "std": teacher_std or std}
        teacher_logits = _teacher_logits(teacher, teacher_variables, batch, **seen_as)

    def forward(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        return student(variables, images, train=True, mutable=["batch_stats"])

    def loss_of(params):
        logits, updated = forward(params)
        terms = loss_terms(logits, teacher_logits, labels, objective)
        if objective.method == "dgkd":
            terms |= (
                _parameter_coupling(lambda p: forward(p)[0], params, teacher_logits, labels, objective)
                if objective.wrt == "params"
                else _coupled_terms(logits, teacher_logits, labels, objective)
            )
        loss = weigh(terms, objective, ramp=ramp(state.step), epsilon=epsilon(state.step))
        return loss, (logits, terms, updated.get("batch_stats", {}))

    (loss, (logits, terms, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    gradient_norm = optax.tree.norm(gradients)
    means = {"loss": loss, "grad_norm": gradient_norm, **terms}
    if objective.needs_teacher:
        logits = jax.lax.stop_gradient(logits)
        means |= losses.diagnostics(logits, teacher_logits, labels, temperature=objective.temperature)
    step_totals = metrics.of_batch_means(means) | {"accuracy": metrics.accuracy(logits, labels)}

    ema = state.ema
    if ema is not None:
        current = {"params": params, "batch_stats": batch_stats}
        ema = optax.incremental_update(current, ema, 1.0 - ema_decay)
    updated = state.replace(
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema=ema,
        totals=metrics.merge(state.totals, step_totals),
        epoch_totals=metrics.merge(state.epoch_totals, step_totals),
    )
    sound = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & (state.skipped_in_a_row < skip_limit)
    kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, state)
    return kept.replace(
        step=state.step + 1,
        skipped=state.skipped + ~sound,
        skipped_in_a_row=jnp.where(sound, 0, state.skipped_in_a_row + 1),
    )


def finite_rows(
    state: TrainState,
    teacher_variables: Any,
    batch: dict[str, jax.Array],
    *,
    student: Apply,
    teacher: Apply | None,
    objective: Objective,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    teacher_mean: tuple[float, ...] | None = None,
    teacher_std: tuple[float, ...] | None = None,
) -> dict[str, jax.Array]:
    """For each part of the training loss: in which rows of a batch it is finite.

    Returns:
        Those of `PARTS` that there are -> bool `[batch]`. All true where only the gradient with respect to the
        parameters is not finite.
    """
    images, labels = normalize(batch["image"], mean=mean, std=std), batch["label"]
    logits, _ = student(state.variables, images, train=True, mutable=["batch_stats"])
    rows = {}
    if objective.needs_teacher:
        seen_as = {"mean": teacher_mean or mean, "std": teacher_std or std}
        teacher_logits = _teacher_logits(teacher, teacher_variables, batch, **seen_as)
        rows["teacher logits"] = teacher_logits
    rows |= {"student logits": logits, "CE": losses.cross_entropy(logits, labels)}
    if objective.needs_teacher:
        at_temperature = {"temperature": objective.temperature}
        gradients = [
            gradient(logits, teacher_logits, labels, **at_temperature)
            for gradient in (losses.tckd_gradient, losses.nckd_gradient)
        ]
        rows |= {
            "KD": losses.kd(logits, teacher_logits, **at_temperature),
            "TCKD": losses.tckd(logits, teacher_logits, labels, **at_temperature),
            "NCKD": losses.nckd(logits, teacher_logits, labels, **at_temperature),
            "logit MSE": losses.logit_mse(logits, teacher_logits),
            "coupling": jnp.square(gradients[0] - gradients[1]),
        }
    return {name: jnp.isfinite(value).reshape(len(labels), -1).all(axis=1) for name, value in rows.items()}


def _teacher_logits(teacher: Apply, variables: Any, batch: dict[str, jax.Array], *, mean, std) -> jax.Array:
    """What the batch brings along; else the teacher is asked. Where it is not, the compiled step does not hold it."""
    if "teacher_logits" in batch:
        return batch["teacher_logits"].astype(jnp.float32)
    return teacher(variables, normalize(batch["image"], mean=mean, std=std))


def loss_terms(
    logits: jax.Array, teacher_logits: jax.Array | None, labels: jax.Array, objective: Objective
) -> dict[str, jax.Array]:
    """Batch means of every per-sample loss, so that runs of different methods can be compared term by term.

    Returns:
        Scalars `ce` and, where there is a teacher, `kd`, `tckd`, `nckd` (at the objective's temperature), `logit_mse`.
    """
    terms = {"ce": losses.cross_entropy(logits, labels, label_smoothing=objective.label_smoothing)}
    if teacher_logits is not None:
        at_temperature = {"temperature": objective.temperature}
        terms["kd"] = losses.kd(logits, teacher_logits, **at_temperature)
        terms["tckd"] = losses.tckd(logits, teacher_logits, labels, **at_temperature)
        terms["nckd"] = losses.nckd(logits, teacher_logits, labels, **at_temperature)
        terms["logit_mse"] = losses.logit_mse(logits, teacher_logits)
    return jax.tree.map(jnp.mean, terms)


def weigh(terms: dict[str, jax.Array], objective: Objective, *, ramp: jax.Array, epsilon: jax.Array) -> jax.Array:
    """The training loss: ce_weight·CE + weight·KD, or + weight·MSE, or + ramp·(α·TCKD + β·NCKD − ε·G)."""
    loss = objective.ce_weight * terms["ce"]
    if objective.method in ("kd", "logit_mse"):
        return loss + objective.weight * terms[objective.method]
    if objective.method in ("dkd", "dgkd"):
        distillation = objective.alpha * terms["tckd"] + objective.beta * terms["nckd"]
        if objective.method == "dgkd":
            distillation -= epsilon * terms["coupling"]
        return loss + ramp * distillation
    return loss


def _coupled_terms(logits, teacher_logits, labels, objective: Objective) -> dict[str, jax.Array]:
    """`tckd`, `nckd` and `coupling` from one pass; the `tckd` and `nckd` of `loss_terms` are then not computed."""
    terms = losses.dgkd_terms(
        logits,
        teacher_logits,
        labels,
        temperature=objective.temperature,
        convention=objective.convention,
        distance=objective.distance,
        parity_batch=objective.parity_batch,
        kappa=objective.kappa,
    )
    return jax.tree.map(jnp.mean, terms._asdict())


def _parameter_coupling(logits_of, params, teacher_logits, labels, objective: Objective) -> dict[str, jax.Array]:
    """`coupling` of the gradients of the batch means of TCKD and NCKD with respect to all P parameters.

    There is one such pair of gradients per batch, not one per sample, so it counts as a batch of one sample with P
    coordinates: `per_sample` is ‖∇TCKD − ∇NCKD‖², `literal` the same over P (`mse_loss`).
    """
    logits, pull_back = jax.vjp(logits_of, params)

    def gradient(logit_gradient) -> jax.Array:
        per_sample = logit_gradient(logits, teacher_logits, labels, temperature=objective.temperature)
        (tree,) = pull_back(per_sample / len(labels))
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])[None]

    coupling = losses.coupling_of_gradients(
        gradient(losses.tckd_gradient),
        gradient(losses.nckd_gradient),
        convention=objective.convention,
        distance=objective.distance,
        parity_batch=1,
        kappa=objective.kappa,
    )
    return {"coupling": coupling}


def eval_step(
    variables: Any,
    batch: dict[str, jax.Array],
    *,
    model: Apply,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> metrics.Totals:
    """Accuracy and cross-entropy of one global batch.

    Args:
        variables: of the model, in evaluation mode.
        batch: {"image": uint8 `[batch, height, width, channels]`, "label": int32 `[batch]`, "mask": bool `[batch]`}.
        model: the model's `apply`.
        mean, std: per channel, in units of pixel/255.

    Returns:
        Totals `accuracy` (int32, int32) and `ce` (float32, int32) over the rows where `mask`.
    """
    logits = model(variables, normalize(batch["image"], mean=mean, std=std))
    return _evaluation_totals(logits, batch["label"], batch["mask"])


class Diagnosis(NamedTuple):
    """Sums over a batch, or over all batches of a split when they are added.

    Attributes:
        means: as of `eval_step`, and where there is a teacher `kl` (KL(teacher ‖ student) at T = 1, nats), `agreement`
            (share with the same top class) and `logit_msd` (‖z − v‖²).
        bins: of the confidences.
        classes: correct answers by class.
        features: by class.
    """

    means: metrics.Totals
    bins: calibration.Bins
    classes: calibration.ClassCounts
    features: collapse.ClassSums


class Rows(NamedTuple):
    """What is kept of each example until the class means are known.

    Attributes:
        features: float `[batch, width]`, before the classifier.
        labels: int32 `[batch]`.
        mask: bool `[batch]`.
        predicted: int32 `[batch]`, top class.
    """

    features: jax.Array
    labels: jax.Array
    mask: jax.Array
    predicted: jax.Array


def diagnose_step(
    variables: Any,
    teacher_variables: Any,
    batch: dict[str, jax.Array],
    *,
    model: Apply,
    teacher: Apply | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    teacher_mean: tuple[float, ...] | None = None,
    teacher_std: tuple[float, ...] | None = None,
) -> tuple[Diagnosis, Rows]:
    """`eval_step` with calibration, neural collapse and the distance to a teacher.

    Args:
        variables, batch, mean, std: as `eval_step`.
        teacher_variables: the teacher's; None without one.
        model: the model's `apply`; with `features=True` it gives (logits, features).
        teacher: the teacher's `apply`, or None.
        teacher_mean, teacher_std: as `train_step`.
    """
    images, labels, mask = normalize(batch["image"], mean=mean, std=std), batch["label"], batch["mask"]
    logits, features = model(variables, images, features=True)
    predicted = jnp.argmax(logits, axis=-1)
    means = _evaluation_totals(logits, labels, mask)
    if teacher is not None:
        seen = normalize(batch["image"], mean=teacher_mean or mean, std=teacher_std or std)
        teacher_logits = teacher(teacher_variables, seen)
        means["kl"] = metrics.masked_mean(losses.kd(logits, teacher_logits, temperature=1.0), mask)
        means["agreement"] = metrics.accuracy(teacher_logits, predicted, mask)
        means["logit_msd"] = metrics.masked_mean(jnp.sum((logits - teacher_logits) ** 2, axis=-1), mask)
    diagnosis = Diagnosis(
        means=means,
        bins=calibration.bins(logits, labels, mask),
        classes=calibration.class_counts(logits, labels, mask),
        features=collapse.class_sums(features, labels, mask, num_classes=logits.shape[-1]),
    )
    return diagnosis, Rows(features, labels, mask, predicted)


def _evaluation_totals(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> metrics.Totals:
    return {
        "accuracy": metrics.accuracy(logits, labels, mask),
        "ce": metrics.masked_mean(losses.cross_entropy(logits, labels), mask),
    }
