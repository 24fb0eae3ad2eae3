"""Named gradients: each is that of its own terms, with the loss's weights, and together they are the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgkd_jax.methods import DGKD, DKD, KD
from dgkd_jax.methods.progress import Progress
from dgkd_jax.training.named_gradients import value_and_named_gradients

PROGRESS = Progress(jnp.asarray(1), 4, 100)  # a quarter of the first epoch
LABELS = jnp.array([0, 2, 1, 1])
RAMPED = DKD(ce_weight=0.7, alpha=2.0, beta=3.0, warmup_epochs=0.5)  # to one half


def linear_network():
    """Terms of a linear network's logits for a method, and the network's parameters."""
    random = np.random.default_rng(0)
    images, teacher = random.normal(size=(4, 5)), random.normal(size=(4, 3))
    params = {"kernel": jnp.asarray(random.normal(size=(5, 3))), "bias": jnp.asarray(random.normal(size=3))}

    def terms_of(method):
        def compute(params):
            logits = images @ params["kernel"] + params["bias"]
            ce = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), LABELS])
            terms = jax.tree.map(jnp.mean, method.terms(logits, teacher, LABELS))
            return {"ce": ce} | terms, logits

        return compute

    return terms_of, params


def in_float64(method, names):
    """(loss, logits), gradients by name, and a function: factors of the terms -> gradient of the loss so weighted."""
    terms_of, params = linear_network()

    def loss_of(terms):
        return method.loss(terms, PROGRESS)

    def with_factors(**factors):
        def loss(params):
            terms, _ = terms_of(method)(params)
            return loss_of({name: factors.get(name, 0.0) * term for name, term in terms.items()})

        return jax.grad(loss)(params)

    return *value_and_named_gradients(terms_of(method), loss_of, names)(params), with_factors


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "terms"),
    [
        (KD(), {"task": ["ce"], "kd": ["kd"]}),
        (RAMPED, {"task": ["ce"], "kd": ["tckd", "nckd"]}),
        (RAMPED, {"task": ["ce"], "tckd": ["tckd"], "nckd": ["nckd"]}),
        (DGKD(dkd=RAMPED, epsilon=0.5), {"task": ["ce"], "kd": ["tckd", "nckd", "coupling"]}),
    ],
)
def test_each_gradient_is_that_of_its_terms_and_they_add_up_to_that_of_the_loss(method, terms):
    with jax.enable_x64(True):
        (loss, logits), gradients, with_factors = in_float64(method, tuple(terms))
        assert list(gradients) == list(terms)
        for name, chosen in terms.items():
            assert_same(gradients[name], with_factors(**dict.fromkeys(chosen, 1.0)))
        every = [term for chosen in terms.values() for term in chosen]
        whole = jax.tree.map(lambda *parts: sum(parts), *gradients.values())
        assert_same(whole, with_factors(**dict.fromkeys(every, 1.0)))
        assert loss.shape == ()
        assert logits.shape == (4, 3)


@pytest.mark.parametrize(("method", "name"), [(KD(), "tckd"), (KD(), "coupling")])
def test_a_gradient_of_no_term_is_refused(method, name):
    with pytest.raises(ValueError, match=f"no gradient '{name}': the terms of the loss are ce, kd"):
        in_float64(method, ("task", name))
