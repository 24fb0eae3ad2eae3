"""SGD with a momentum for each named gradient: DOT and DeepKD, as optax transformations.

The loss is a sum of parts. With the gradient g_i of each part and a momentum μ_i,

    m_i ← μ_i·m_i + g_i;    θ ← θ − η·Σ m_i,

and m_i = g_i in the first step, as in PyTorch's SGD. The momenta being equal, this is SGD on the whole loss.

The null hypothesis: a constant g_i ends as m_i = g_i / (1 − μ_i), so a momentum is also a weight. The control of a
comparison is SGD with momentum μ and each part of the loss, and the weight decay with its part, times
(1 − μ)/(1 − μ_i). `configs/study/arms.py` has these controls.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax


class DecoupledMomentumState(NamedTuple):
    """State of `dot` and `deepkd`.

    Attributes:
        count: int32 scalar, steps done.
        momenta: name of a gradient -> m of it, a tree like the parameters.
    """

    count: jax.Array
    momenta: dict[str, Any]


def dot(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum_task: float,
    momentum_kd: float,
    weight_decay: float,
    mask: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """DOT: one momentum for the gradient of the task's loss, a larger one for that of the distillation.

    The weight decay λ·θ is added to the task's gradient. The authors take μ_task = μ − Δ and μ_kd = μ + Δ with μ = 0.9
    and, for CIFAR-100, Δ = 0.075. Zhao et al., ICCV 2023, arXiv:2307.08436; mdistiller's `DistillationOrientedTrainer`.

    Args:
        learning_rate: η, or a function of the number of steps done.
        momentum_task, momentum_kd: in [0, 1).
        weight_decay: λ, 0 or more.
        mask: parameters -> tree of bool, the parameters that decay; None: all.

    Returns:
        A transformation whose `update` takes {"task": gradient, "kd": gradient}, trees like the parameters, and gives
        one tree of updates. It raises ValueError for other names, and without parameters.
    """
    momenta = {"task": momentum_task, "kd": momentum_kd}
    return _decoupled(learning_rate, momenta, decayed="task", weight_decay=weight_decay, mask=mask)


def deepkd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum_task: float,
    momentum_tckd: float,
    momentum_nckd: float,
    weight_decay: float,
    form: Literal["paper", "released"] = "paper",
    mask: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """DeepKD: a momentum each for the gradients of the task's loss, of TCKD and of NCKD.

    Huang et al., arXiv:2505.15133; its code's settings for DKD are 0.975, 0.825 and 0.95. The released code
    (haiduo/DeepKD, `DEEPKDTrainer`) differs: the task's buffer decays with TCKD's momentum, so `momentum_task` has no
    effect, and the weight decay goes to TCKD's gradient, of parameters that the other two have moved already.

    Args:
        learning_rate: η, or a function of the number of steps done.
        momentum_task, momentum_tckd, momentum_nckd: in [0, 1).
        weight_decay: λ, 0 or more.
        form: `paper`: each gradient has its own momentum, and λ·θ goes to the task's gradient (our choice, as in DOT).
            `released`: as above.
        mask: parameters -> tree of bool, the parameters that decay; None: all.

    Returns:
        As `dot`, with the names "task", "tckd" and "nckd".

    Raises:
        ValueError: no such form.
    """
    if form not in ("paper", "released"):
        raise ValueError(f"form={form!r}: 'paper' or 'released'")
    momenta = {"task": momentum_task, "tckd": momentum_tckd, "nckd": momentum_nckd}
    if form == "paper":
        return _decoupled(learning_rate, momenta, decayed="task", weight_decay=weight_decay, mask=mask)
    momenta["task"] = momentum_tckd
    return _decoupled(
        learning_rate,
        momenta,
        decayed="tckd",
        decays_after=("task", "nckd"),
        weight_decay=weight_decay,
        mask=mask,
    )


def _decoupled(
    learning_rate: optax.ScalarOrSchedule,
    momenta: Mapping[str, float],
    *,
    decayed: str,
    weight_decay: float,
    mask: Callable[[Any], Any] | None,
    decays_after: tuple[str, ...] = (),
) -> optax.GradientTransformation:
    """SGD with these momenta.

    Args:
        decayed: the gradient that the weight decay is added to.
        decays_after: the gradients whose updates are in the parameters that decay.
    """

    def init(params: Any) -> DecoupledMomentumState:
        zeros = {name: jax.tree.map(jnp.zeros_like, params) for name in momenta}
        return DecoupledMomentumState(jnp.zeros((), jnp.int32), zeros)

    def update(gradients: dict[str, Any], state: DecoupledMomentumState, params: Any = None):
        if set(gradients) != set(momenta):
            raise ValueError(f"gradients named {', '.join(gradients)}: have to be {', '.join(momenta)}")
        if params is None:
            raise ValueError("weight decay reads the parameters: give them to `update`")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        new = {name: _accumulated(state.momenta[name], gradients[name], momenta[name]) for name in momenta}
        moved = params
        for name in decays_after:
            moved = jax.tree.map(lambda p, m: p - (rate * m).astype(p.dtype), moved, new[name])
        decays = mask(params) if mask else jax.tree.map(lambda _: True, params)
        new[decayed] = jax.tree.map(
            lambda m, p, decay: m + weight_decay * p if decay else m, new[decayed], moved, decays
        )
        updates = jax.tree.map(lambda *m: (-rate * sum(m)).astype(m[0].dtype), *new.values())
        return updates, DecoupledMomentumState(optax.safe_increment(state.count), new)

    return optax.GradientTransformation(init, update)


def _accumulated(buffer: Any, gradient: Any, momentum: float) -> Any:
    return jax.tree.map(lambda m, g: momentum * m + g, buffer, gradient)
