"""The tuned DKD of the confirmation once more, on CPUs, for the seeds that ran on a GPU: what the machine does.

    CIFAR10_FOLDER=DIR python -m dgkd_jax.study --config=configs/study/cifar10_machines.py --cache-teacher --workers=2

With it the arms of `cifar10_weights` have a baseline of their own machine for these seeds as well.
"""

from configs.study import cifar10_weights
from dgkd_jax.study import Study

_BASELINE = "tuned dkd on CPUs"


def get_study() -> Study:
    weights = cifar10_weights.get_study()
    ((regime, (overrides, arms)),) = weights.regimes.items()
    on_cpus = [arm for arm in arms if arm == "dkd" or arm.endswith("with tuned weight")]
    return weights._replace(
        name="cifar10_machines",
        about="The 17 seeds that the confirmation ran on an H100: its tuned DKD there and once more on CPUs, where the "
        "other arms ran too. All in bfloat16.",
        arms=weights.arms | {_BASELINE: weights.arms["tuned dkd"]},
        regimes={regime: (overrides, (_BASELINE, "tuned dkd", *on_cpus))},
        baseline=_BASELINE,
        seeds=tuple(range(112, 129)),
    )
