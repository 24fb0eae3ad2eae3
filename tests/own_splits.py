"""Data sets as a user would write them, for import paths."""

import numpy as np
import tensorflow_datasets as tfds
from own_networks import images_and_labels


class Squares(tfds.core.GeneratorBasedBuilder):
    """A user's builder: ten grey squares for training, four for the test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(12, 12, 1)), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"image": np.full((12, 12, 1), number, np.uint8), "label": number % 3}


def pair():
    return images_and_labels(30), images_and_labels(12, seed=1)


def nothing():
    return 3
