"""The measures of neural collapse as they are defined, for the tests of what computes them in passes."""

import numpy as np


def by_definition(features, labels, predicted, classifier):
    """Each formula written out with loops and numpy's pseudo-inverse."""
    features, weights = features.astype(np.float64), classifier.astype(np.float64).T
    classes = np.unique(labels)
    count = len(classes)
    mu = {c: features[labels == c].mean(0) for c in classes}
    middle = np.mean(list(mu.values()), axis=0)
    within = sum(np.outer(h - mu[c], h - mu[c]) for h, c in zip(features, labels, strict=True)) / len(labels)
    between = sum(np.outer(mu[c] - middle, mu[c] - middle) for c in classes) / count
    norms = [np.linalg.norm(mu[c] - middle) for c in classes]
    angles = [
        abs((mu[a] - middle) @ (mu[b] - middle) / np.linalg.norm(mu[a] - middle) / np.linalg.norm(mu[b] - middle)
            + 1 / (count - 1))
        for a in classes for b in classes if a != b
    ]  # fmt: skip
    frame = np.stack([mu[c] - middle for c in classes])
    chosen = weights[classes]
    nearest = [classes[np.argmin([np.linalg.norm(h - mu[c]) for c in classes])] for h in features]
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / count,
        "nc2_norms": np.std(norms) / np.mean(norms),
        "nc2_angles": np.mean(angles),
        "nc3": np.linalg.norm(chosen / np.linalg.norm(chosen) - frame / np.linalg.norm(frame)) ** 2,
        "nc4": np.mean(np.asarray(nearest) == predicted),
    }
