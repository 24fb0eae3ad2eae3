"""The confirmation on photographs: six contrasts with DKD of tuned weight, on images that decided nothing, fresh seeds.

    CIFAR10_FOLDER=DIR python -m dgkd_jax.study --config=configs/study/cifar10.py --cache-teacher --workers=2

docs/study_plan.md says how the arms follow from the screening, and how many seeds there are.
"""

from configs.study import arms
from configs.study.cifar10_screening import get_base
from dgkd_jax.study import Study

SCREENED_WEIGHTS = {"dkd.alpha": 1.0, "dkd.beta": 2.0}
_TUNED = {"dkd.alpha": 2.0, "dkd.beta": 4.0}
_CONTRASTS = {
    "10,000 images": ("apart own_logits 1", "together self_normalized 3", "gdkd"),
    "30 % wrong labels": ("together own_logits log 3", "log dkd 3"),
    "8 epochs": ("apart per_sample 1",),
}

_SIZED = (*range(100, 107), *range(112, 129))
_AT_THE_CAP = (*range(100, 129), *range(131, 150))


def get_study() -> Study:
    base = get_base("confirmation")
    base.student.dtype = base.teacher.dtype = "bfloat16"
    screened = arms.screened(base)
    of_regimes = {name: overrides for name, (overrides, _) in arms.screened_regimes(screened).items()}
    chosen = {arm for each in _CONTRASTS.values() for arm in each}
    return Study(
        name="cifar10",
        about="10,000 CIFAR-10 photographs train, the 10,000 test images and 30,000 other training images evaluate, 30 "
        "epochs; teachers resnet20 (three, 60 epochs), student resnet8.",
        base=base,
        seeds=_SIZED,
        seeds_in={"30 % wrong labels": _AT_THE_CAP},
        teachers=3,
        arms={"tuned dkd": {"method": "dkd"}} | {arm: SCREENED_WEIGHTS | screened[arm] for arm in sorted(chosen)},
        regimes={
            regime: (of_regimes[regime] | ({} if regime == "8 epochs" else _TUNED), ("tuned dkd", *contrasts))
            for regime, contrasts in _CONTRASTS.items()
        },
        baseline="tuned dkd",
        rows="docs/results/cifar10.jsonl",
    )
