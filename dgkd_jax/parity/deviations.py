"""How much each known deviation matters: between the DGKD repository, its README, its blog, and this project.

Every figure is computed when the command runs; nothing here needs torch. What the deviations are and what to choose:
docs/deviations.md.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dgkd_jax import losses
from dgkd_jax.methods.progress import RAMP_FORMS, Progress, ramp
from dgkd_jax.parity import deviations_training
from dgkd_jax.parity.findings import Report, Row, effect
from dgkd_jax.parity.losses import first_failure, margin_logits
from dgkd_jax.training.optimizer import learning_rate_schedule, make_optimizer

TEMPERATURE, ALPHA, BETA = 4.0, 1.0, 8.0
# ε as in the PyTorch repository where it divides or normalises; as in our default for the bare mean.
EPSILONS = {"per_sample": 0.1, "literal": 6.0, "normalized": 6.0, "self_normalized": 0.1}

# (standard deviation of the teacher's logits, of the student's distance from them; None: independent logits)
STUDENTS = {"unconfident": (1.0, None), "confident": (10.0, None), "near the teacher": (5.0, 0.3)}
SHAPES = ((64, 100), (4096, 1000))

# Each program runs once or twice, so that optimising it costs more than it saves.
_compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def run() -> Report:
    """Measure every deviation that can be measured here."""
    rows = [
        *coupling_sizes(),
        *batch_dependence(),
        *logit_matching(),
        *temperature_factors(),
        *ramps(),
        *milestones(),
        *optimizer_step(),
        *last_batch(),
        *flag(),
        *noise(),
        *breaking_margins(),
        *deviations_training.rows(),
        *not_measured(),
    ]
    return Report("deviations", "the repository, its README and its blog", rows, rows, [])


def coupling_sizes() -> list[Row]:
    """Each convention's gradient relative to DKD's, and the guard of `normalized`."""
    found = []
    for (batch, classes), name in [(shape, name) for shape in SHAPES for name in STUDENTS]:
        shares, guard = gradient_shares(*random_logits(batch, classes, name))
        setting = f"B={batch} C={classes}, {name}"
        for convention, epsilon in EPSILONS.items():
            quantity = f"|ε·∇G| / |∇DKD|, {convention}, ε = {epsilon:g}"
            found.append(effect("conventions", setting, quantity, float(shares[convention])))
        found.append(effect("conventions", setting, "guard G/(G + 1e-8) of normalized", float(guard)))
    return found


def batch_dependence() -> list[Row]:
    """`normalized` on the same logits, told that the batch is another."""
    logits = random_logits(64, 100, "unconfident")
    quantity = f"|ε·∇G| / |∇DKD|, normalized, ε = {EPSILONS['normalized']:g}, same logits"
    return [
        effect("normalized and the batch", f"B={batch} C=100, unconfident", quantity, float(shares["normalized"]))
        for batch in (16, 64, 256, 4096)
        for shares, _ in [gradient_shares(*logits, parity_batch=batch)]
    ]


@functools.partial(_compiled, static_argnames="parity_batch")
def gradient_shares(student, teacher, labels, *, parity_batch: int | None = None) -> tuple[dict, jax.Array]:
    """Per convention ‖ε·∇G‖ / ‖∇ mean DKD‖ with respect to the student's logits; and the guard of `normalized`."""

    def coupling(z, convention):
        settings = {"temperature": TEMPERATURE, "convention": convention, "parity_batch": parity_batch}
        return losses.gradient_coupling(z, teacher, labels, **settings)

    def dkd(z):
        return jnp.mean(losses.dkd(z, teacher, labels, alpha=ALPHA, beta=BETA, temperature=TEMPERATURE))

    of_dkd = jnp.linalg.norm(jax.grad(dkd)(student))
    shares = {
        convention: jnp.linalg.norm(epsilon * jax.grad(coupling)(student, convention)) / of_dkd
        for convention, epsilon in EPSILONS.items()
    }
    return shares, coupling(student, "normalized")


def random_logits(batch: int, classes: int, name: str) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Logits of a kind of `STUDENTS`: student's, teacher's, labels."""
    scale, distance = STUDENTS[name]
    rng = np.random.Generator(np.random.Philox(key=[batch, classes]))
    first, second = rng.standard_normal((2, batch, classes))
    teacher = scale * first
    student = scale * second if distance is None else teacher + distance * second
    return jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32), rng.integers(0, classes, batch)


def logit_matching() -> list[Row]:
    """The README's "logit matching" is T²·KL; how far that is from a squared error."""
    found = []
    for name in STUDENTS:
        student, teacher, _ = random_logits(64, 100, name)
        of_kl = jax.grad(lambda z, v=teacher: jnp.mean(losses.kd(z, v, temperature=TEMPERATURE)))(student)
        of_mse = jax.grad(lambda z, v=teacher: jnp.mean(losses.logit_mse(z, v)))(student)
        cosine = jnp.vdot(of_kl, of_mse) / (jnp.linalg.norm(of_kl) * jnp.linalg.norm(of_mse))
        setting = f"T={TEMPERATURE:g} C=100, {name}"
        found.append(
            effect("logit matching", setting, "cosine of the gradients of T²·KL and of the squared error", cosine)
        )
        ratio = jnp.linalg.norm(of_kl) / jnp.linalg.norm(of_mse)
        found.append(effect("logit matching", setting, "length of KL's gradient / squared error's", ratio))
    return [entry | {"value": float(entry["value"])} for entry in found]


def temperature_factors() -> list[Row]:
    """The same probabilities at T = 1 and at T = 4."""
    z, v, labels = random_logits(64, 100, "unconfident")
    found = []
    for name, value in (
        ("T²·KL", lambda t: jnp.mean(losses.kd(t * z, t * v, temperature=t))),
        (
            "G, per_sample",
            lambda t: losses.gradient_coupling(t * z, t * v, labels, temperature=t, convention="per_sample"),
        ),
        (
            "G, normalized",
            lambda t: losses.gradient_coupling(t * z, t * v, labels, temperature=t, convention="normalized"),
        ),
    ):
        at_four, at_one = _compiled(lambda value=value: (value(4.0), value(1.0)))()
        ratio = float(at_four / at_one)
        found.append(effect("T²", "same probabilities, T = 4 over T = 1", f"{name}: ratio", ratio))
    return found


def ramps() -> list[Row]:
    """The factor on the distillation loss: its mean over an epoch and over the whole warm-up."""
    epochs, steps = 20, 781  # CIFAR-100 at batch 64
    found = []
    for form in RAMP_FORMS:

        def factor(step, form=form):
            return ramp(Progress(step, steps, epochs * steps), warmup_epochs=epochs, form=form)

        factors = np.asarray(jax.vmap(factor)(jnp.arange(epochs * steps))).reshape(epochs, steps).mean(1)
        for quantity, value in (
            ("1st epoch", factors[0]),
            ("2nd epoch", factors[1]),
            ("whole warm-up", factors.mean()),
        ):
            found.append(effect("ramp", f"{form}, {epochs} epochs", f"mean factor, {quantity}", float(value)))
    return found


def milestones() -> list[Row]:
    """The learning rate over 240 epochs, by the code's default milestones and by its help text's."""
    found, epochs = [], 240
    for which, epochs_of in (("code: 60/75/90", (60, 75, 90)), ("help text: 150/180/210", (150, 180, 210))):
        schedule = ConfigDict({"name": "step", "warmup_epochs": 0.0, "milestones": epochs_of, "factor": 0.1})
        rate = learning_rate_schedule(schedule, peak=1.0, steps_per_epoch=1, total_steps=epochs)
        mean = float(np.mean(jax.vmap(rate)(jnp.arange(epochs))))
        found.append(effect("milestones", f"{which}, {epochs} epochs", "mean learning rate / peak", mean))
    return found


def optimizer_step() -> list[Row]:
    """First update of AdamW and of SGD for the same gradient, as large as it is in a network's kernel."""
    rng = np.random.Generator(np.random.Philox(key=0))
    params = {"kernel": jnp.asarray(rng.standard_normal((3, 3, 64, 64)) * math.sqrt(2 / (9 * 64)), jnp.float32)}
    gradients = {"kernel": jnp.asarray(rng.standard_normal((3, 3, 64, 64)) * 1e-3, jnp.float32)}
    found = []
    for name in ("sgd", "adamw"):
        optimizer = make_optimizer(deviations_training.optimizer_config(name), lambda step: 0.05)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        share = float(jnp.linalg.norm(updates["kernel"]) / jnp.linalg.norm(params["kernel"]))
        setting = f"{name}, rate 0.05, He-initialised 3×3 kernel"
        found.append(effect("AdamW at 0.05", setting, "|first update| / |weights|, gradient entries of 1e-3", share))
    return found


def last_batch() -> list[Row]:
    """What dropping the last incomplete batch of an epoch leaves out."""
    found = []
    for name, images, batch, epochs in (("CIFAR-100", 50_000, 64, 240), ("ImageNet", 1_281_167, 512, 100)):
        setting = f"{name}, batch {batch}, {epochs} epochs"
        found.append(effect("last batch", setting, "share of an epoch's images left out", images % batch / images))
        found.append(effect("last batch", setting, "steps fewer in all", float(epochs * (images % batch > 0))))
    return found


def flag() -> list[Row]:
    """`type=bool` of argparse."""
    return [effect("--augment False", 'bool("False")', "1: augmentation is on", float(bool("False")))]


def noise() -> list[Row]:
    """Gaussian noise stored as uint8 before it is added, where negative samples become 256 more."""
    rng = np.random.Generator(np.random.Philox(key=0))
    found = []
    for sigma in (10, 25, 50):
        sample = np.rint(sigma * rng.standard_normal(200_000)).astype(np.int64)
        pixels = rng.integers(0, 256, sample.size)
        intended = np.clip(pixels + sample, 0, 255)
        for how, wrong in (
            ("added in uint8", (pixels + sample) % 256),
            ("added wide, then clipped", np.clip(pixels + sample % 256, 0, 255)),
        ):
            setting = f"σ = {sigma} grey levels, uniform pixels, {how}"
            found.append(
                effect("uint8 noise", setting, "mean |error| of a pixel", float(np.abs(wrong - intended).mean()))
            )
    return found


def breaking_margins() -> list[Row]:
    """Smallest target margin at which the form that is usual in PyTorch, written in JAX, is not finite in float32.

    PyTorch itself, and DGKD's second derivatives: `python -m dgkd_jax.parity losses`.
    """

    def usual_tckd(z, v, labels, temperature):
        is_target = labels[:, None] == jnp.arange(z.shape[-1])
        pairs = []
        for logits in (z, v):
            share = jax.nn.softmax(logits / temperature)
            pairs.append(jnp.stack([jnp.sum(jnp.where(mask, share, 0.0), -1) for mask in (is_target, ~is_target)]))
        student, teacher = pairs
        return temperature**2 * jnp.sum(jax.scipy.special.xlogy(teacher, teacher) - teacher * jnp.log(student))

    found = []
    for temperature in (1.0, 4.0):
        for name, function in (("usual form", usual_tckd), ("ours", _tckd_sum)):
            slope = _compiled(jax.value_and_grad(lambda z, v, y, f=function, t=temperature: f(z, v, y, t)))

            def parts(margin, slope=slope):
                z, v, labels = margin_logits(margin, (1, 1))
                return np.concatenate([np.ravel(part) for part in slope(z, v, jnp.asarray(labels))])

            margin = first_failure(parts)
            quantity = "TCKD: first margin that is not finite" + (" (none up to 10,000)" if margin is None else "")
            found.append(
                effect("float32", f"T = {temperature:g}, both sure, {name}", quantity, margin and float(margin))
            )
    return found


def _tckd_sum(z, v, labels, temperature):
    return jnp.sum(losses.tckd(z, v, labels, temperature=temperature))


def not_measured() -> list[Row]:
    """What there is nothing to measure with here, and why."""
    return [
        effect(
            "scrambled set",
            "-",
            "not measured: with images of another size than 224 pixels it stops, it does not err",
            None,
        ),
        effect(
            "author's recheck",
            "-",
            "not measured: CIFAR-100 is not here; reported: DKD about 53 %, DGKD about 51 %",
            None,
        ),
    ]
