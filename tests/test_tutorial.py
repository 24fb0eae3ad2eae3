"""docs/tutorial.ipynb runs, and its networks learn.

It costs five whole trainings in a new process: most of the time is XLA compiling their steps and evaluations.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
SAYS_THE_ACCURACIES = """
import json as _json
print(_json.dumps({"teacher": teacher.accuracy, "own": own.accuracy}
                  | {method: student.accuracy for method, student in students.items()}))
"""


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory) -> dict[str, float]:
    """What the notebook's code, in a process and a folder of its own, says of its networks."""
    code = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
    one_device = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"  # as users have it
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*code, SAYS_THE_ACCURACIES])],
        cwd=tmp_path_factory.mktemp("tutorial"), env=os.environ | {"MPLBACKEND": "Agg", "XLA_FLAGS": one_device},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_tutorials_networks_learn_the_digits(accuracies):
    assert accuracies["teacher"] > 0.9
    assert set(accuracies) == {"teacher", "own", "ce", "kd", "dkd"}
    assert min(accuracies.values()) > 0.8
    assert min(accuracies["kd"], accuracies["dkd"]) > accuracies["ce"]


def test_the_tutorial_keeps_small_pictures_and_no_errors():
    outputs = [output for cell in CELLS if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    assert max(map(len, pictures)) * 3 / 4 <= 60_000  # bytes; base64 writes three as four characters
