"""TensorFlow's stateless uniform random numbers in numpy, for many seeds at once.

`tf.random.stateless_uniform` takes one seed per call, at about 10 µs; an epoch needs one call per image. The numbers
here are the same bit for bit, which a test checks.
"""

import numpy as np

# Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
# Constants with which TensorFlow scrambles a seed into a key (tensorflow/core/kernels/stateless_random_ops.cc).
_SCRAMBLE = 0x3EC8F720, 0x02461E29
_LOW = np.uint64(2**32 - 1)
_HALF = np.uint64(32)


def uniforms(seed: int, places: np.ndarray) -> np.ndarray:
    """`tf.random.stateless_uniform([4], [seed, place])` for each place.

    Args:
        seed: in [0, 2⁶³).
        places: `[...]` int64, not negative.

    Returns:
        `[..., 4]` float32 in [0, 1).
    """
    seeds, places = np.broadcast_arrays(np.uint64(seed), places.astype(np.uint64))
    seed_words = [seeds & _LOW, seeds >> _HALF, places & _LOW, places >> _HALF]
    mixed = _philox(seed_words, [np.full_like(places, word) for word in _SCRAMBLE])
    nothing = np.zeros_like(places)
    bits = _philox([nothing, nothing, mixed[2], mixed[3]], mixed[:2])
    # 23 random bits are the mantissa of a number in [1, 2).
    mantissas = np.stack(bits, axis=-1).astype(np.uint32) & np.uint32(2**23 - 1)
    return (mantissas | np.uint32(127 << 23)).view(np.float32) - np.float32(1)


def _philox(counter: list[np.ndarray], key: list[np.ndarray]) -> list[np.ndarray]:
    """Four words per counter of four words and key of two words; a word is a uint64 below 2³²."""
    for number in range(_ROUNDS):
        keys = [(word + np.uint64(number * step)) & _LOW for word, step in zip(key, _KEY_STEPS, strict=True)]
        first, second = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            (second >> _HALF) ^ counter[1] ^ keys[0],
            second & _LOW,
            (first >> _HALF) ^ counter[3] ^ keys[1],
            first & _LOW,
        ]
    return counter
