"""TFDS builders of data sets that TFDS does not have. They ask the network for nothing."""
