"""What a user gives to launch/gke.sh arrives in the manifest as it is, also where it looks like a template's word."""

import subprocess
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / "launch" / "gke.sh"
WORDS = ("NAME", "NAMESPACE", "IMAGE", "TPU_ACCELERATOR", "TOPOLOGY", "HOSTS", "CHIPS_PER_HOST", "MAX_RESTARTS",
         "GRACE_S", "COMMAND", "WORD")  # fmt: skip


def manifest(*arguments, command):
    given = ["--name=r50", "--image=r/x", "--tpu-accelerator=tpu-v6e-slice", "--topology=4x4", "--hosts=4", *arguments]
    done = subprocess.run(
        ["bash", SCRIPT, *given, "--dry-run", "--", *command], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def container(document):
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("word", WORDS)
def test_a_value_that_is_a_word_of_the_template_stays_as_it_is(word):
    document = manifest(
        f"--image=r/x@{word}@/y", command=["echo", f"@{word}@", f"@@{word}@@", "@", "@@HOSTS", "HOSTS@"]
    )
    assert container(document)["image"] == f"r/x@{word}@/y"
    assert container(document)["args"] == ["echo", f"@{word}@", f"@@{word}@@", "@", "@@HOSTS", "HOSTS@"]
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (4, 4)


@pytest.mark.parametrize("value", ["&", "\\", "\\&", '"', "a b", "$HOME", "`date`", "%s", "'", "#", ": ", "*"])
def test_signs_of_the_shell_and_of_yaml_stay_as_they_are(value):
    assert container(manifest(command=["echo", value, f"x{value}y"]))["args"] == ["echo", value, f"x{value}y"]


def test_every_word_of_the_template_is_filled_in():
    text = "".join(str(manifest(*more, command=["true"])) for more in ([], ["--spot"]))
    assert not [word for word in WORDS if f"@{word}@" in text]
