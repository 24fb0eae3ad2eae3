"""The common start of every command with a --config: parse, join the other processes, listen to signals."""

import logging
import os
import sys
import threading
from collections.abc import Callable

import jax
from ml_collections import ConfigDict, config_flags

from dgkd_jax import errors
from dgkd_jax.data import quiet
from dgkd_jax.runs import allocator, command_line, config, default
from dgkd_jax.runs.interruption import Interruption

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file; keys: --help", lock_config=True)


def command(argv: list[str], *, usage: str, work: Callable[[ConfigDict, Callable[[], bool]], None]) -> int:
    """Parse a command line with --config, join the other processes and do the work; returns the exit code.

    Args:
        argv: as sys.argv.
        usage: text for --help.
        work: called with the validated config and `stop`, a function as `training.loop.fit` takes it.
    """
    try:
        settings = parsed(argv, usage=usage)
        set_up(settings)
        _join_processes(settings)
        _print_note(settings)
        with Interruption() as interruption:
            work(settings, interruption.agreed)
    except errors.EXPECTED as error:
        code = errors.report(error)
        if jax.distributed.is_initialized():
            _keep_exit_code(code, seconds=0.5 * _CONFIG.value.heartbeat_timeout_s)
        return code
    return 0


def parsed(argv: list[str], *, usage: str) -> ConfigDict:
    """The validated config of a command line.

    Args:
        argv, usage: as for `command`.

    Raises:
        BadInput: the command line, the config or a combination of its keys is wrong.
        SystemExit: --help was asked for and printed.
    """
    overrides = command_line.parse(argv, usage=usage)
    settings = _CONFIG.value
    _check_returned(settings)
    if any(key in default.TEACHERS_OWN for key in overrides):
        config.fill_in_teacher(settings, command_line.config_of_file(argv))
    config.validate(settings)
    command_line.check_read(overrides, settings)
    return settings


def _check_returned(settings: object) -> None:
    if not isinstance(settings, ConfigDict):
        raise errors.BadInput(
            f"--config: get_config() returned {type(settings).__name__}; it has to return the configuration that it "
            "made, an ml_collections.ConfigDict"
        )


def set_up(settings: ConfigDict) -> None:
    """Apply the process's settings: memory, log levels, compilation cache, precision."""
    allocator.keep_freed_memory()
    quiet.for_good()
    logging.getLogger().setLevel(logging.WARNING)
    use_compilation_cache(settings)
    if settings.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", settings.matmul_precision)
    if "float64" in (settings.student.dtype, settings.teacher.dtype):
        jax.config.update("jax_enable_x64", True)


def use_compilation_cache(settings: ConfigDict) -> None:
    """Keep compiled programs between runs, if the config or the environment names a folder."""
    if settings.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(settings.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _join_processes(settings: ConfigDict) -> None:
    """Join the other processes: JAX finds them on TPU pods, GKE, SLURM, Open MPI; elsewhere by three variables."""
    jax.config.update("jax_enable_preemption_service", False)  # `interruption` handles SIGTERM
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
            raise  # a misconfigured cluster, not a single machine


def _print_note(settings: ConfigDict) -> None:
    if settings.note and jax.process_index() == 0:
        print(settings.note, file=sys.stderr, flush=True)


def _keep_exit_code(code: int, *, seconds: float) -> None:
    """Exit with `code` while other processes still run: JAX's shutdown waits for them, and aborts (134) without one."""
    farewell = threading.Timer(seconds, os._exit, [code])
    farewell.daemon = True  # no delay if all processes exit
    farewell.start()
