"""The tuned DKD of the confirmation once more, on CPUs, for the seeds that ran on a GPU: what the machine does.

CIFAR10_FOLDER=DIR python -m dgkd_jax.study --config=configs/study/cifar10_machines.py --cache-teacher --workers=2
"""

from configs.study import cifar10
from dgkd_jax.study import Study

_REGIME = "10,000 images"


def get_study() -> Study:
    confirmed = cifar10.get_study()
    overrides, _ = confirmed.regimes[_REGIME]
    arms = {"tuned dkd": confirmed.arms["tuned dkd"], "tuned dkd on CPUs": confirmed.arms["tuned dkd"]}
    return confirmed._replace(
        name="cifar10_machines",
        about="The confirmation's images and teachers; the tuned DKD on an H100 and again on CPUs, both in bfloat16.",
        arms=arms,
        regimes={_REGIME: (overrides, tuple(arms))},
        seeds=tuple(range(112, 129)),
        seeds_in={},
        decides=False,
    )
