"""What a plan suggests to change, one line each."""

import math

from ml_collections import ConfigDict

from dgkd_jax.plan.estimate import Plan, whole

FEW_PER_CHIP = 32  # below, a chip waits for its weights and for the others more than it computes
USEFUL_PER_CHIP = 128
# The largest batch at which the linear rule was shown to keep ResNet-50's accuracy on ImageNet, after five epochs of
# warm-up: Goyal et al., arXiv:1706.02677, figure 1.
LARGEST_BATCH = 8192
MANY_EXCHANGES = 20


def advice(plan: Plan, config: ConfigDict) -> list[str]:
    """What to change.

    Args:
        plan: of the program.
        config: before any change of its batch.
    """
    if not plan.fits:
        return [_too_large(plan)]
    found = _training(plan, config) if plan.target == "train" else []
    copies = [(share, layer) for share, _, layer in plan.cost.costliest if layer.startswith("copy of") and share > 0.1]
    found += [f"{share:.0%} of the time is a {layer}, in every step: report it" for share, layer in copies]
    blocking = sum(each.count for each in plan.cost.collectives if not each.overlaps)
    if plan.target == "train" and blocking >= MANY_EXCHANGES:
        way_out = (
            f"; BatchNorm needs none with --config.batch_norm_groups={plan.topology.chips}: each chip's own "
            "statistics, as in PyTorch's DistributedDataParallel, which gives other results"
            if config.batch_norm_groups == 1 and plan.topology.chips > 1
            else ""
        )
        found.append(f"in {blocking} exchanges the chips wait for each other, and nothing overlaps{way_out}")
    return found


def _too_large(plan: Plan) -> str:
    parts = math.ceil(plan.per_chip / max(plan.largest or 1, 1))
    smaller = f"--per-chip={plan.largest} should fit" if plan.largest else "give fewer images, --per-chip=N"
    if plan.target != "train":
        return smaller
    return (
        f"{smaller}; or compute the batch in parts, --config.accumulate={max(parts, 2)} (BatchNorm then sees one part "
        "at a time); or shard the large parameters, --config.mesh.fsdp=N"
    )


def _training(plan: Plan, config: ConfigDict) -> list[str]:
    chips, found = plan.topology.chips, []
    readers, hosts = config.data.readers, plan.topology.hosts
    if plan.streamed and not config.data.mock and readers > 1 and readers % hosts:
        enough = hosts * math.ceil(readers / hosts)
        found.append(
            f"config.data.readers={readers} would be refused, since {hosts} hosts cannot share them evenly: "
            f"--config.data.readers={enough}"
        )
    if plan.per_chip < FEW_PER_CHIP:
        most = whole(min(USEFUL_PER_CHIP, plan.largest or USEFUL_PER_CHIP))
        useful = min(most, whole(max(LARGEST_BATCH // chips, 1)))
        text = f"{_images(plan.per_chip)} a chip leave it idle"
        if useful > plan.per_chip:
            text += (
                f": --per-chip={useful} makes the batch {useful * chips:,}, for which the linear rule gives "
                f"--config.optimizer.learning_rate={_rate(config, useful * chips)} with "
                "--config.schedule.warmup_epochs=5"
            )
        fewer = math.ceil(plan.batch_size / most)
        found.append(f"{text}; or take fewer chips: this batch fills {max(fewer, 1)} with {most} each")
    elif plan.batch_size != config.batch_size:
        found.append(
            f"the config's rate is for a batch of {config.batch_size:,}: for {plan.batch_size:,} the linear rule gives "
            f"--config.optimizer.learning_rate={_rate(config, plan.batch_size)} with --config.schedule.warmup_epochs=5"
        )
    if plan.batch_size > LARGEST_BATCH:
        found.append(
            f"a batch of {plan.batch_size:,} is beyond {LARGEST_BATCH:,}, the largest that kept ResNet-50's accuracy "
            f"by that rule (arXiv:1706.02677): {max(LARGEST_BATCH // USEFUL_PER_CHIP, 1)} chips with "
            f"{USEFUL_PER_CHIP} each stay within it"
        )
    return found


def _images(count: float) -> str:
    return f"{count:.3g} image{'' if count == 1 else 's'}"


def _rate(config: ConfigDict, batch_size: int) -> str:
    return f"{config.optimizer.learning_rate * batch_size / config.batch_size:.3g}"
