"""`python -m dgkd_jax.main --config=FILE [--workdir=DIR] [--config.KEY=VALUE …]`: flags, processes, dispatch."""

import logging
import os
import sys
import threading
from collections.abc import Callable

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dgkd_jax import command_line, config, job
from dgkd_jax.errors import BadInput, NumericFailure, Preempted, StorageFailure
from dgkd_jax.interruption import Interruption

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configuration file; keys: configs/default.py", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "where everything is left; default runs/NAME/METHOD-seedSEED")


def main(argv: list[str]) -> int:
    """Run the job that the command line describes; returns the exit code."""

    def work(settings: ConfigDict, stop: Callable[[], bool]) -> None:
        results = job.run(settings, _WORKDIR.value, stop=stop)
        if jax.process_index() == 0:
            print(f"\n{job.table(results)}\nEverything is in {', '.join(result['workdir'] for result in results)}")

    return command(argv, usage=__doc__, work=work)


def command(argv: list[str], *, usage: str, work: Callable[[ConfigDict, Callable[[], bool]], None]) -> int:
    """Parse a command line with --config, join the other processes, do the work; returns the exit code.

    Args:
        argv: as sys.argv.
        usage: for --help.
        work: of the validated configuration and `stop`, which is asked as `train.fit` asks it.
    """
    try:
        command_line.parse(argv, usage=usage)
        config.validate(_CONFIG.value)
        set_up(_CONFIG.value)
        _join_processes(_CONFIG.value)
        with Interruption() as interruption:
            work(_CONFIG.value, interruption.agreed)
    except (BadInput, NumericFailure, StorageFailure, Preempted) as error:
        print(f"dgkd_jax: {error}", file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            _keep_exit_code(error.exit_code, seconds=0.5 * _CONFIG.value.heartbeat_timeout_s)
        return error.exit_code
    return 0


def set_up(settings) -> None:
    """Settings of the process: noise of libraries, compilation cache, precision."""
    for name, value in {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}.items():
        os.environ.setdefault(name, value)  # TensorFlow only reads data here; its notes on CPUs are noise
    logging.getLogger().setLevel(logging.WARNING)
    # TFDS warns of what it does itself; Orbax of what is meant, and of errors that it raises besides.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if settings.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(settings.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if settings.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", settings.matmul_precision)
    if "float64" in (settings.student.dtype, settings.teacher.dtype):
        jax.config.update("jax_enable_x64", True)


def _join_processes(settings) -> None:
    """Find the others: JAX does on TPU pods, GKE, SLURM and Open MPI; else three variables say (launch/local.py)."""
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: `interruption`
    timeouts = {
        "initialization_timeout": settings.join_timeout_s,
        "heartbeat_timeout_seconds": settings.heartbeat_timeout_s,
        "shutdown_timeout_seconds": settings.heartbeat_timeout_s,
    }
    if "JAX_NUM_PROCESSES" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
            **timeouts,
        )
        return
    try:
        jax.distributed.initialize(**timeouts)
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise  # a cluster that is misconfigured, not a bare machine


def _keep_exit_code(code: int, *, seconds: float) -> None:
    """Exit with `code` though the others stay: JAX's farewell waits for all processes, and aborts (134) without one."""
    farewell = threading.Timer(seconds, os._exit, [code])
    farewell.daemon = True  # does not delay an exit that all processes make
    farewell.start()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
