r"""Logit distillation losses: KD, DKD, DGKD and their peers, pure and exact.

Every per-sample loss takes logits `[..., classes]` and returns `[...]`, never reduced, in at least float32
(bfloat16 and float16 logits are promoted before anything is computed; float64 stays float64). The teacher's
logits are always under `stop_gradient`. Values and gradients are finite for margins up to ±1e4 at T = 1.

Notation: z the student's and v the teacher's logits, y the target (ground-truth) class, T the temperature and

    p, q     probability of the target at temperature T, student's and teacher's
    ŝ, t̂     softmax over the non-target classes at temperature T, student's and teacher's; 0 at the target
    δ        p − q
    e_y      one-hot of y

    TCKD_i  = T²·KL([q, 1−q] ‖ [p, 1−p])          ∇TCKD_i = T·δ·(e_y − ŝ)
    NCKD_i  = T²·KL(t̂ ‖ ŝ)                        ∇NCKD_i = T·(ŝ − t̂)
    DKD_i   = α·TCKD_i + β·NCKD_i
    DGKD    = mean_i DKD_i − ε·G,   where G grows with D_i = ∇TCKD_i − ∇NCKD_i in one of four conventions

Sources: Hinton et al., arXiv:1503.02531 (KD); Zhao et al., CVPR 2022, arXiv:2203.08679 (DKD, equations 5–7);
the DGKD blog post and PyTorch repository (the coupling); the peers name theirs.
"""

from dgkd_jax.losses.comparison import compare, diagnostics, examine
from dgkd_jax.losses.coupling import (
    CONVENTIONS,
    DISTANCES,
    NORMALIZED_GUARD,
    WRT,
    Convention,
    Distance,
    Wrt,
    coupling_of_gradients,
)
from dgkd_jax.losses.decoupled_gradients import DgkdTerms, dgkd, dgkd_terms, gradient_coupling
from dgkd_jax.losses.distillation import cross_entropy, dkd, kd, logit_mse, nckd, tckd
from dgkd_jax.losses.gradients import GradientMethod, nckd_gradient, tckd_gradient
from dgkd_jax.losses.partitions import gdkd, partition, rld
from dgkd_jax.losses.peers import dist, mlkd, nkd, wttm
from dgkd_jax.losses.standardization import standardize

__all__ = [
    "CONVENTIONS",
    "DISTANCES",
    "NORMALIZED_GUARD",
    "WRT",
    "Convention",
    "DgkdTerms",
    "Distance",
    "GradientMethod",
    "Wrt",
    "compare",
    "coupling_of_gradients",
    "cross_entropy",
    "dgkd",
    "dgkd_terms",
    "diagnostics",
    "dist",
    "dkd",
    "examine",
    "gdkd",
    "gradient_coupling",
    "kd",
    "logit_mse",
    "mlkd",
    "nckd",
    "nckd_gradient",
    "nkd",
    "partition",
    "rld",
    "standardize",
    "tckd",
    "tckd_gradient",
    "wttm",
]
