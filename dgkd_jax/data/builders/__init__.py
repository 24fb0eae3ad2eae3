"""TFDS builders of data sets that TFDS lacks. They use no network."""
