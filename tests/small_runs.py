"""Runs of a few steps on generated images, how they are stopped, and what two of them are compared by."""

import json

import jax
import numpy as np

from configs import mnist5k
from dgkd_jax import models
from dgkd_jax.models.network import Network
from dgkd_jax.runs import checkpoint, sharding
from dgkd_jax.runs import config as rules


def small(**changes):
    """A run of mnist5k's recipe on generated images of 16 pixels, in batches of 16."""
    config = mnist5k.get_config()
    config.update_from_flattened_dict(
        {
            "student.model": "small_cnn_w8",
            "teacher.model": "small_cnn_w8",
            "data.mock": True,
            "data.image_size": 16,
            "batch_size": 16,
        }
        | changes
    )
    rules.validate(config)
    return config


def a_teacher(source, mesh) -> Network:
    """A network with random weights, placed on the mesh."""
    model = models.create("small_cnn_w8", num_classes=source.num_classes)
    variables = sharding.place(models.initialise(model, source.image_shape, 7), mesh)
    return Network(model.apply, variables, source.mean, source.std, checkpoint.fingerprint(variables))


class Asked:
    """Says to stop at the `number`-th question, counted from 0."""

    def __init__(self, number):
        self._left = number

    def __call__(self):
        self._left -= 1
        return self._left < 0


def lines(workdir):
    """metrics.jsonl without rates and times, which are measured."""
    parsed = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "images_per_second"}
        for line in parsed
        if line["kind"] != "goodput"
    ]


def assert_bit_equal(found, expected):
    """Of two trees of arrays."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
