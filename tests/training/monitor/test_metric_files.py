"""Metrics on disk."""

import json
from types import SimpleNamespace

from dgkd_jax.training.monitor.metric_files import MetricWriter


def test_lists_go_to_json_with_null_for_nan_and_not_to_trackers(tmp_path):
    scalars = []
    tracker = SimpleNamespace(
        resumed=False, write=lambda step, values: scalars.append((step, values)), close=lambda results: None
    )
    with MetricWriter(tmp_path, step=0, trackers=[tracker]) as out:
        out.write(3, "eval", {"ece": 0.25, "class_accuracy": [0.5, float("nan")]})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "kind": "eval", "ece": 0.25, "class_accuracy": [0.5, None]}
    assert scalars == [(3, {"eval/ece": 0.25})]
