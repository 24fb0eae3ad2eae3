"""After the confirmation: its two forms of the coupling with the weight of the tuned DKD, and DKD with theirs.

    CIFAR10_FOLDER=DIR python -m dgkd_jax.study --config=configs/study/cifar10_weights.py --cache-teacher --workers=2

The same seeds, teachers and rows as in the confirmation: what is done there is not done again.
"""

from configs.study import cifar10
from dgkd_jax.study import Study

_REGIME = "10,000 images"


def get_study() -> Study:
    confirmed = cifar10.get_study()
    overrides, (baseline, apart, together, _) = confirmed.regimes[_REGIME]
    weights = {key: overrides[key] for key in ("dkd.alpha", "dkd.beta")}
    arms = {baseline: confirmed.arms[baseline], "dkd": {"method": "dkd"} | cifar10.SCREENED_WEIGHTS}
    for arm in (apart, together):
        arms[arm] = confirmed.arms[arm]
        arms[f"{arm} with tuned weight"] = confirmed.arms[arm] | weights
    return confirmed._replace(
        about="The confirmation's images, teachers and seeds; each of its two forms of the coupling with DKD's weight "
        "of the screening (α = 1, β = 2) and with the tuned one (α = 2, β = 4).",
        arms=arms,
        regimes={_REGIME: (overrides, tuple(arms))},
        seeds_in={},
        decides=False,
    )
