"""The launch scripts: linted, dry runs against recorded text, decisions against stand-ins for gcloud, kubectl and srun.

After a deliberate change of what a dry run prints: UPDATE_LAUNCH_TEXTS=1 python -m pytest tests/test_launch.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ("tpu_vm.sh", "gke.sh", "slurm.sh")
READ_BY_SCRIPTS = ("plan.sh",)
BIN = Path(sys.executable).parent

TRAIN = ["python", "-m", "dgkd_jax.main", "--config=configs/imagenet_r50_r18.py", "--workdir=gs://bucket/it's here"]
TPU_VM = ["--name=r50", "--zone=us-east5-b", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"]
GKE = ["--name=r50", "--image=registry/dgkd:1", "--tpu-accelerator=tpu-v6e-slice", "--topology=4x4", "--hosts=4"]
DRY_RUNS = {
    "local": ["local.py", "--processes=2", "--devices-per-process=2", "--port=4321", "--dry-run", "--", *TRAIN],
    "tpu_vm": ["tpu_vm.sh", *TPU_VM, "--dry-run", "--", *TRAIN],
    "tpu_vm_spot": ["tpu_vm.sh", *TPU_VM, "--project=mine", "--spot", "--dry-run", "--", *TRAIN],
    "gke": ["gke.sh", *GKE, "--dry-run", "--", *TRAIN, '--config.name=a "b" \\ & @NAME@'],
    "gke_spot": ["gke.sh", *GKE, "--spot", "--grace-s=60", "--max-restarts=2", "--dry-run", "--", *TRAIN],
    "slurm": ["slurm.sh", "--dry-run", *TRAIN],
}


@pytest.fixture(autouse=True)
def no_compiler(tmp_path_factory, monkeypatch):
    """The first `python` in PATH has no libtpu: a plan would take minutes."""
    folder = tmp_path_factory.mktemp("no_compiler")
    (folder / "python").write_text("#!/bin/sh\nexit 1\n")
    (folder / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def run(script, *arguments, **environment):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment
    interpreter = [sys.executable] if script.endswith(".py") else ["bash"]
    return subprocess.run(
        [*interpreter, LAUNCH / script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )


def lint(tool, *arguments):
    # Beside this Python, where pip puts it; never skipped, the extra `test` installs it.
    done = subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_pass_shellcheck():
    lint("shellcheck", *(LAUNCH / script for script in (*SCRIPTS, *READ_BY_SCRIPTS)))


def test_scripts_pass_shfmt():
    lint("shfmt", "--indent=2", "--diff", *(LAUNCH / script for script in (*SCRIPTS, *READ_BY_SCRIPTS)))


def test_dockerfile_passes_hadolint_and_does_not_run_as_root():
    lint("hadolint", LAUNCH / "Dockerfile")
    users = [line.split()[1] for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("USER")]
    assert users == ["1000"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stop_at_the_first_error(script):
    assert "\nset -euo pipefail\n" in (LAUNCH / script).read_text()


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_prints_the_recorded_commands_and_no_secret(name):
    done = run(*DRY_RUNS[name], TMPDIR="/tmp", HF_TOKEN="secret-in-the-environment", PATH=os.environ["PATH"])
    assert (done.returncode, done.stderr) == (0, "")
    assert "secret" not in done.stdout
    recorded = ROOT / "tests" / "launch" / f"{name}.txt"
    if "UPDATE_LAUNCH_TEXTS" in os.environ:
        recorded.write_text(done.stdout)
    assert done.stdout == recorded.read_text()


@pytest.mark.parametrize("script", [*SCRIPTS, "local.py"])
def test_help_describes_the_dry_run_and_the_exit_code(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout
    assert "Exit code: " in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_vm.sh", [], "needs --name, --zone, --accelerator-type and --runtime-version"),
        ("tpu_vm.sh", TPU_VM, "no command: give one after --"),
        ("tpu_vm.sh", [*TPU_VM, "--spto", "--", "true"], "unknown argument '--spto'"),
        ("tpu_vm.sh", [*TPU_VM, "--name=R 50", "--", "true"], "--name=R 50 is not"),
        ("gke.sh", GKE[:-1], "needs --name, --image"),
        ("gke.sh", [*GKE, "--hosts=four", "--", "true"], "'four' is no number"),
        ("gke.sh", [*GKE, "--image=a\nb: c", "--", "true"], "is no image's name"),
        ("gke.sh", [*GKE, "--topology=4by4", "--", "true"], "is not like 4x4"),
        ("gke.sh", [*GKE, "--dry-run", "--", "two\nlines"], "control character"),
        ("slurm.sh", [], "no command"),
        ("slurm.sh", ["--nodes=2", "true"], "options of sbatch come before the script"),
        ("slurm.sh", ["true"], "start it with sbatch"),
    ],
)
def test_bad_arguments_are_one_message_and_code_2(script, arguments, message):
    done = run(script, *arguments, SLURM_JOB_ID="")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: ")
    assert message in done.stderr
    assert done.stdout == ""


# -- what each script decides, with stand-ins for the tools first in PATH ---------------------------------------------


@pytest.fixture
def stand_in(tmp_path):
    """Put a command into tmp_path/bin that notes its arguments in tmp_path/log and then runs `body`."""
    (tmp_path / "bin").mkdir()

    def make(name, body):
        path = tmp_path / "bin" / name
        path.write_text(f'#!/usr/bin/env bash\nhere={tmp_path}\necho "{name} $*" >>$here/log\n{body}\n')
        path.chmod(0o755)

    return make


def with_stand_ins(tmp_path):
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}


GCLOUD = """
next() { head -n 1 $here/$1; sed -i 1d $here/$1; }
case "$*" in
*queued-resources\\ list*) next states ;;
*"exec false"*) exit "$(next codes)" ;;
esac
"""
VERBS = {"create", "delete", "scp", "ssh"}


def use_tpu_vm(tmp_path, stand_in, *, states, codes):
    stand_in("gcloud", GCLOUD)
    stand_in("sleep", "")
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    done = run("tpu_vm.sh", *TPU_VM, "--max-restarts=1", "--", "false", **with_stand_ins(tmp_path))
    log = (tmp_path / "log").read_text().splitlines()
    return done.returncode, [word for line in log for word in line.split()[3:5] if word in VERBS]


PLANNER = """
case "$*" in
*find_spec*) ;;
*2x2*|*v5e-4*) echo 'dgkd_jax: does not fit' >&2; exit 2 ;;
*) echo 'a page'; echo; echo 'of figures' ;;
esac
"""
SLICES = {
    "tpu_vm.sh": (TPU_VM, "--topology=v6e-16", "--accelerator-type=v5e-4"),
    "gke.sh": (GKE, "--topology=tpu-v6e-slice:4x4", "--topology=2x2"),
}


@pytest.mark.parametrize("script", SLICES)
def test_a_dry_run_says_what_the_run_would_cost_on_the_slice(tmp_path, stand_in, script):
    given, topology, _ = SLICES[script]
    stand_in("python", PLANNER)
    done = run(script, *given, "--dry-run", "--", *TRAIN, **with_stand_ins(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# a page\n#\n# of figures\n")
    assert f"python -m dgkd_jax.plan {topology} {' '.join(TRAIN[3:])}" in (tmp_path / "log").read_text()


@pytest.mark.wrong_input
@pytest.mark.parametrize("script", SLICES)
def test_a_dry_run_of_what_does_not_fit_is_refused_unless_forced(tmp_path, stand_in, script):
    given, _, small = SLICES[script]
    stand_in("python", PLANNER)
    refused = run(script, *given, small, "--dry-run", "--", *TRAIN, **with_stand_ins(tmp_path))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"dgkd_jax: does not fit\n{script}: refused; --force")
    forced = run(script, *given, small, "--dry-run", "--force", "--", *TRAIN, **with_stand_ins(tmp_path))
    assert (forced.returncode, forced.stderr) == (0, "dgkd_jax: does not fit\n")
    assert "dgkd_jax.main" in forced.stdout


@pytest.mark.parametrize("script", SLICES)
def test_of_another_command_there_is_no_plan(tmp_path, stand_in, script):
    stand_in("python", PLANNER)
    done = run(script, *SLICES[script][0], "--dry-run", "--", "python", "mine.py", **with_stand_ins(tmp_path))
    assert done.returncode == 0
    assert not (tmp_path / "log").exists()


RUN = ["scp", "ssh", "ssh"]  # the archive, its installation, the command


@pytest.mark.parametrize(
    ("states", "verbs"),
    [
        (["ACTIVE"], []),
        (["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], ["create"]),
        (["SUSPENDING", "SUSPENDED", "", "ACTIVE"], ["delete", "create"]),
        (["FAILED", "DELETING", "", "ACTIVE"], ["delete", "create"]),
    ],
)
def test_tpu_vm_makes_what_is_missing_and_waits(tmp_path, stand_in, states, verbs):
    assert use_tpu_vm(tmp_path, stand_in, states=states, codes=[0]) == (0, [*verbs, *RUN])


@pytest.mark.parametrize(
    ("codes", "code", "runs"),
    [([0], 0, 1), ([2], 2, 1), ([3], 3, 1), ([143, 143, 143, 0], 0, 4), ([1, 255], 255, 2), ([134, 143, 0], 0, 3)],
)
def test_tpu_vm_starts_again_what_may_be_retried(tmp_path, stand_in, codes, code, runs):
    assert use_tpu_vm(tmp_path, stand_in, states=["ACTIVE"] * 5, codes=codes) == (code, RUN * runs)


def test_tpu_vm_gets_a_new_slice_after_the_old_one_was_taken_away(tmp_path, stand_in):
    found = use_tpu_vm(tmp_path, stand_in, states=["ACTIVE", "SUSPENDED", "", "ACTIVE"], codes=[143, 0])
    assert found == (0, [*RUN, "delete", "create", *RUN])


def test_tpu_vm_stops_where_gcloud_fails(tmp_path, stand_in):
    stand_in("gcloud", "echo 'no account' >&2; exit 7")
    done = run("tpu_vm.sh", *TPU_VM, "--", "false", **with_stand_ins(tmp_path))
    assert (done.returncode, done.stderr) == (7, "no account\n")


def test_tpu_vm_brings_nothing_where_the_repository_cannot_be_packed(tmp_path, stand_in):
    stand_in("tar", "exit 2")
    code, verbs = use_tpu_vm(tmp_path, stand_in, states=["ACTIVE"], codes=[0])
    assert (code, verbs) == (2, [])


def test_tpu_vm_ends_a_run_that_is_left_over_before_the_next(tmp_path):
    """The command that each host is given, twice, in a home folder of its own."""
    dry = run("tpu_vm.sh", *TPU_VM, "--dry-run", "--", "bash", "-c", 'trap "echo saved; exit 143" TERM; '
              'echo up; for i in {1..100}; do sleep 0.1; done').stdout  # fmt: skip
    line = dry[dry.rindex("gcloud") :]
    command = subprocess.run(
        ["bash", "-c", f'gcloud() {{ printf %s "${{@: -1}}"; }}; {line}'], capture_output=True, text=True, check=True
    ).stdout.removeprefix("--command=")
    (tmp_path / "dgkd_jax").mkdir()

    def start():
        return subprocess.Popen(["bash", "-c", command], cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    with start() as first:
        assert first.stdout.readline() == "up\n"
        with start() as second:
            assert second.stdout.readline() == "up\n"
            assert first.wait(timeout=20) == 143
            assert first.stdout.read() == "saved\n"
            second.terminate()


@pytest.mark.parametrize(
    ("state", "verbs"),
    [
        ("", ["get", "apply"]),
        ("Completed", ["get", "delete", "apply"]),
        ("Failed", ["get", "delete", "apply"]),
    ],
)
def test_gke_replaces_a_jobset_that_has_ended_and_leaves_one_that_runs(tmp_path, stand_in, state, verbs):
    stand_in("kubectl", f"case $1 in get) printf '{state}' ;; apply) cat >$here/applied ;; esac")
    done = run("gke.sh", *GKE, "--", *TRAIN, **with_stand_ins(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()] == verbs
    assert yaml.safe_load((tmp_path / "applied").read_text()) == jobset()


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, False),
        (2, 0, False),
        (3, 0, False),
        (143, 0, True),
        (143, 99, True),
        (1, 2, True),
        (1, 3, False),
        (134, 0, True),
    ],
)
def test_slurm_requeues_what_may_be_retried(tmp_path, stand_in, code, restarts, requeued):
    stand_in("srun", f"exit {code}")
    stand_in("scontrol", "")
    done = run("slurm.sh", "true", SLURM_JOB_ID="17", SLURM_RESTART_COUNT=str(restarts), **with_stand_ins(tmp_path))
    assert done.returncode == code
    assert ("scontrol requeue 17" in (tmp_path / "log").read_text()) == requeued


def test_slurm_accepts_the_batch_script():
    if shutil.which("sbatch") is None:
        pytest.skip("needs SLURM (Debian: slurm-wlm): checked where it is installed")
    if subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode:
        pytest.skip("needs a running slurmctld")
    done = subprocess.run(
        ["sbatch", "--test-only", LAUNCH / "slurm.sh", "true"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# -- the manifest -----------------------------------------------------------------------------------------------------


def jobset(*arguments):
    text = run("gke.sh", *GKE, *arguments, "--dry-run", "--", *TRAIN).stdout
    return yaml.safe_load(text)


@pytest.mark.parametrize("arguments", [[], ["--spot"]])
def test_the_jobs_of_the_jobset_fit_the_kubernetes_schema(tmp_path, arguments):
    document = jobset(*arguments)
    # What kubernetes-validate does not know, it passes: the JobSet's own fields are compared with its API v1alpha2.
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(document["spec"]) == {"failurePolicy", "replicatedJobs"}
    (replicated,) = document["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": document["metadata"], **replicated["template"]}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    lint("kubernetes-validate", "--strict", tmp_path / "job.yaml")


def test_the_schema_check_can_fail(tmp_path):
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": {"templat": {}}}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    with pytest.raises(AssertionError, match="templat"):
        lint("kubernetes-validate", "--strict", tmp_path / "job.yaml")


def test_the_jobset_restarts_what_may_be_retried_and_nothing_else():
    document = jobset("--max-restarts=7", "--grace-s=120")
    policy = document["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    by_code = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", ())
    }
    assert by_code == {2: "FailJob", 3: "FailJob", 143: "Ignore"}
    assert job["backoffLimit"] == 0  # any other code fails the Job, and with it the JobSet starts again
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (4, 4, "Indexed")
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 120)
    assert pod["containers"][0]["args"] == TRAIN
    assert "command" not in pod["containers"][0]  # it would replace the image's entry point, which passes signals on


def test_spot_nodes_are_chosen_only_when_asked_for():
    def spot(*arguments):
        job = jobset(*arguments)["spec"]["replicatedJobs"][0]["template"]["spec"]
        return "cloud.google.com/gke-spot" in job["template"]["spec"]["nodeSelector"]

    assert (spot(), spot("--spot")) == (False, True)
