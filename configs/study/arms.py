"""The arms and regimes that the studies share; written before the first run.

Candidates for a regime in which gradient coupling beats DKD: a decayed ε, ε < 0 (together), the four distances,
gradients with respect to parameters, a larger gap between teacher and student, few training images, noisy labels,
T = 1, no cross-entropy, longer training.

Beside them, in the regime `momenta`: DOT and DeepKD, each with the control that it must beat to be more than a weight.
"""

from ml_collections import ConfigDict


def _dgkd(convention: str, epsilon: float, **more) -> dict:
    return {"method": "dgkd", "dgkd.convention": convention, "dgkd.epsilon": epsilon} | {
        f"dgkd.{key}": value for key, value in more.items()
    }


BASELINE = "dkd"

# Added when ε < 0 was ahead with noisy labels: controls that strengthen the distillation term instead.
_CONTROLS = {
    "dkd x 2": {"method": "dkd", "dkd.alpha": 2.0, "dkd.beta": 4.0},
    "dkd x 4": {"method": "dkd", "dkd.alpha": 4.0, "dkd.beta": 8.0},
}

ARMS = {
    "ce": {"method": "ce"},
    "kd": {"method": "kd"},
    "dkd": {"method": "dkd"},
    # each convention with several ε, including the published values; ε < 0 brings the gradients together
    "per_sample 0.03": _dgkd("per_sample", 0.03),
    "per_sample 0.1": _dgkd("per_sample", 0.1),
    "per_sample 0.3": _dgkd("per_sample", 0.3),
    "per_sample 1": _dgkd("per_sample", 1.0),
    "per_sample -0.1": _dgkd("per_sample", -0.1),
    "per_sample -0.5": _dgkd("per_sample", -0.5),
    "literal 6": _dgkd("literal", 6.0),
    "normalized 1": _dgkd("normalized", 1.0),
    "normalized 6": _dgkd("normalized", 6.0),
    "normalized -3": _dgkd("normalized", -3.0),
    "self_normalized 1": _dgkd("self_normalized", 1.0),
    "self_normalized 6": _dgkd("self_normalized", 6.0),
    "self_normalized -3": _dgkd("self_normalized", -3.0),
    # other forms of the coupling
    "per_sample 1 decayed": _dgkd("per_sample", 1.0, epsilon_schedule="linear"),
    "cosine 0.3": _dgkd("per_sample", 0.3, distance="cosine"),
    "cosine -0.3": _dgkd("per_sample", -0.3, distance="cosine"),
    "kl 0.3": _dgkd("per_sample", 0.3, distance="kl"),
    "wasserstein 0.3": _dgkd("per_sample", 0.3, distance="wasserstein"),
    "parameters 0.1": _dgkd("per_sample", 0.1, wrt="params"),
    "parameters -0.1": _dgkd("per_sample", -0.1, wrt="params"),
} | _CONTROLS


def with_momenta(base: ConfigDict) -> dict:
    """DKD with an optimizer that has a momentum for each part of the loss, and the same without: arm -> overrides.

    In the steady state a momentum μ_i is a gain 1/(1 − μ_i). So `NAME as weights` is SGD with the base's momentum μ,
    each part of the loss times (1 − μ)/(1 − μ_i), and the weight decay times the factor of its part. That last factor
    is taken out of all of them and put into the learning rate, which makes the same steps and leaves the key of the
    weight decay, with which the teacher is trained too, as it is.

    Args:
        base: of the study.
    """
    settings, dkd = base.optimizer, base.dkd
    low, high = settings.momentum - settings.momentum_delta, settings.momentum + settings.momentum_delta
    task, tckd, nckd = settings.momentum_task, settings.momentum_tckd, settings.momentum_nckd

    def gains(momenta: tuple[float, float, float], *, of_decay: float) -> dict:
        ce_weight, alpha, beta = ((1 - of_decay) / (1 - momentum) for momentum in momenta)
        return {
            "method": "dkd",
            "optimizer.learning_rate": settings.learning_rate * (1 - settings.momentum) / (1 - of_decay),
            "dkd.ce_weight": dkd.ce_weight * ce_weight,
            "dkd.alpha": dkd.alpha * alpha,
            "dkd.beta": dkd.beta * beta,
        }

    return {
        "dot": {"method": "dkd", "optimizer.name": "dot"},
        "dot as weights": gains((low, high, high), of_decay=low),
        "deepkd": {"method": "dkd", "optimizer.name": "deepkd"},
        "deepkd as weights": gains((task, tckd, nckd), of_decay=task),
        "deepkd_released": {"method": "dkd", "optimizer.name": "deepkd_released"},
        "deepkd_released as weights": gains((tckd, tckd, nckd), of_decay=tckd),
    }


_MOMENTA = ("dot", "deepkd", "deepkd_released")

# In the other regimes: the baseline, and the forms that might do well there.
_FEW = ("dkd", "per_sample 0.1", "per_sample 1", "per_sample -0.5", "self_normalized -3")


def regimes(*, few: int, epochs: int) -> dict:
    """Regime -> (overrides, arms).

    Args:
        few: number of training images in the regime `few images`.
        epochs: of the base config.
    """
    return {
        "standard": ({}, tuple(ARMS)),
        "small student": ({"student.model": "small_cnn_w4"}, _FEW),
        "few images": ({"data.train_examples": few, "epochs": 4 * epochs, "teacher.epochs": 4 * epochs}, _FEW),
        "noisy labels": ({"data.label_noise": 0.3}, (*_FEW, *_CONTROLS)),
        "T = 1": ({"dkd.temperature": 1.0}, _FEW),
        "no CE": ({"dkd.ce_weight": 0.0}, _FEW),
        "longer": ({"epochs": 3 * epochs}, _FEW),
        "momenta": ({}, (BASELINE, *_MOMENTA, *(f"{name} as weights" for name in _MOMENTA))),
    }


# -- the screening on photographs (docs/study_plan.md) -----------------------------------------------------------------


def _weighted(weight: float) -> dict:
    return {"method": "dkd", "dkd.alpha": weight, "dkd.beta": 2 * weight}


def _own(name: str, **arguments: float) -> dict:
    given = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return {"method": f"configs.study.objectives:{name}({given})"}


_WEIGHTS = {f"dkd x {weight}": _weighted(float(weight)) for weight in (2, 4, 8, 16)}
_APART = {
    "apart per_sample 0.1": _dgkd("per_sample", 0.1),
    "apart per_sample 1": _dgkd("per_sample", 1.0),
    "apart normalized 6": _dgkd("normalized", 6.0),
    "apart self_normalized 1": _dgkd("self_normalized", 1.0),
    "apart own_logits 1": _dgkd("per_sample", 1.0, wrt="own_logits"),
}
_TOGETHER = {
    "together per_sample 0.5": _dgkd("per_sample", -0.5),
    "together per_sample 3": _dgkd("per_sample", -3.0),
    "together self_normalized 1": _dgkd("self_normalized", -1.0),
    "together self_normalized 3": _dgkd("self_normalized", -3.0),
    "together own_logits 3": _dgkd("per_sample", -3.0, wrt="own_logits"),
    "together own_logits log 3": _dgkd("self_normalized", -3.0, wrt="own_logits"),
}


def screened(base: ConfigDict) -> dict:
    """Arm -> overrides, for the screening on photographs."""
    momenta = with_momenta(base)
    return {
        "ce": {"method": "ce"},
        "kd": {"method": "kd"},
        "kd standardized": {"method": "kd", "kd.standardize": True, "kd.temperature": 2.0, "kd.weight": 9.0},
        "dkd": {"method": "dkd"},
        **_WEIGHTS,
        "dkd standardized x 4": _weighted(4.0) | {"dkd.standardize": True, "dkd.temperature": 2.0},
        **{name: {"method": name} for name in ("nkd", "dist", "wttm", "gdkd", "rld")},
        **{name: momenta[name] for name in ("dot", "dot as weights", "deepkd", "deepkd as weights")},
        **_APART,
        **_TOGETHER,
        "log dkd 1": _own("LogDKD", weight=1.0),
        "log dkd 3": _own("LogDKD", weight=3.0),
        "log dkd 3 at once": _own("LogDKD", weight=3.0, warmup_epochs=0.0),
        "kd apart 0.1": _own("CoupledKD", epsilon=0.1),
        "kd together 0.5": _own("CoupledKD", epsilon=-0.5),
        "dkd mixup": {"method": "dkd", "data.mixup": 0.2},
    }


_LOGARITHMS = ("together self_normalized 3", "together own_logits log 3")


def screened_regimes(arms: dict) -> dict:
    """Regime -> (overrides, arms), of the arms of `screened`."""
    apart = ("apart per_sample 1", "apart normalized 6")
    noisy = (*_LOGARITHMS, "log dkd 3", "together per_sample 3", "apart per_sample 1", "dist")
    return {
        "10,000 images": ({}, tuple(arm for arm in arms if arm != "log dkd 3 at once")),
        "30 % wrong labels": ({"data.label_noise": 0.3}, ("ce", "kd", "dkd", *_WEIGHTS, *noisy)),
        "8 epochs": (
            {"epochs": 8, "dkd.warmup_epochs": 0.0, "schedule.warmup_epochs": 0.0},
            ("ce", "kd", "dkd", "dkd x 4", "dkd x 16", *_LOGARITHMS, "log dkd 3 at once", *apart),
        ),
    }
