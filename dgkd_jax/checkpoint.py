"""Checkpoints that are checked: what is restored is what was saved, bit for bit, or it is not used.

Orbax writes and commits them; but it restores flipped bits and casts types silently, so each checkpoint carries a
digest of its arrays, compared after every restore. A damaged step is moved aside and the newest good one is used.
"""

import errno
import json
import logging
import zlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from dgkd_jax.errors import BadInput, NumericFailure, StorageFailure
from dgkd_jax.state import TrainState

# What a network or a bucket answers when it cannot for now: no sign of damage.
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED")
_PASSING_ERRNO = {
    errno.EACCES,
    errno.EAGAIN,
    errno.EINTR,
    errno.EIO,
    errno.EMFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


@jax.jit
def _hashes(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_hash(leaf) for leaf in leaves]


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def _hash(leaf: jax.Array) -> jax.Array:
    """A uint32 that changes with any single bit and does not depend on how the array is sharded.

    Each element's bits are mixed with its index by a bijection (the finaliser of MurmurHash3, public domain), so one
    changed element always changes its own term; the terms are added modulo 2³², in any order.
    """
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = bits ^ (index * np.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> np.uint32(16)), dtype=jnp.uint32)


def digest(tree: Any) -> dict[str, int]:
    """Path of each array in `tree` -> a hash of its bits, the same on any mesh."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    return dict(zip(map(jax.tree_util.keystr, paths), map(int, jax.device_get(_hashes(list(leaves)))), strict=True))


def fingerprint(tree: Any) -> str:
    """All of `digest` in eight hexadecimal digits: names a teacher's weights."""
    return f"{zlib.crc32(json.dumps(digest(tree), sort_keys=True).encode()):08x}"


def _arrays_written_whole():
    """What Orbax does with arrays, but without cutting replicated ones up among their devices.

    That is its default, for which it compiles a slice for each shape and device: the first save of a small network
    took three times as long on eight devices. States here are small, or their large arrays sharded.
    """
    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False))
    )


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: created if missing.
        keep: number of newest checkpoints kept; the one with the best score is kept besides.
        read_only: change nothing on disk, so that the folder of a run that goes on can be read.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int, read_only: bool = False):
        self.directory = epath.Path(directory).resolve()
        self._read_only = read_only
        by_score = policies.BestN(
            get_metric_fn=lambda metrics: (metrics["score"], -metrics["step"]),  # of equals the earliest
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=_arrays_written_whole()),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), by_score]),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, _) -> None:
        """Waits until what was saved is committed.

        Raises:
            StorageFailure: it could not be.
        """
        try:
            self._manager.close()
        except Exception as failure:
            if error is None:
                raise self._not_saved(failure) from failure
            logging.error("%s", self._not_saved(failure))  # the error that is on its way says more

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Of all checkpoints, ascending; a damaged one is among them until it is restored."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, record: dict[str, Any], score: float | None = None) -> None:
        """Save in the background; the arrays are copied before this returns.

        Args:
            state: on the mesh; its step names the checkpoint. A step that is already saved is left as it is, unless
                it has a score now.
            record: what else to keep, JSON-serialisable.
            score: by which the best is chosen, the higher the better, if it was evaluated at this step.

        Raises:
            NumericFailure: an array has a NaN or an infinity. Nothing is written then.
            StorageFailure: this one, or the one before, could not be written.
        """
        step = int(state.step)
        if step == self.latest_step:
            if score is None:
                return
            self._manager.wait_until_finished()
            self._manager.delete(step)  # was saved when the run had to stop before its evaluation
        leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if not _all_finite(leaves):
            raise NumericFailure(
                f"the state after step {step} has values that are not finite; it is not saved. "
                "Try a lower optimizer.learning_rate or optimizer.clip_norm=5."
            )
        meta = {
            "record": record,
            "digest": digest(state),
            "versions": {package: version(package) for package in _PACKAGES},
        }
        try:
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)),
                metrics=None if score is None else {"score": score, "step": step},
                force=True,
            )
        except Exception as failure:
            raise self._not_saved(failure) from failure
        if not saved:
            raise RuntimeError(f"checkpoint {step} was not saved in {self.directory}")

    def restore(
        self, like: TrainState, *, step: int | None = None, accept: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        Args:
            like: gives the structure, shapes, types and shardings to restore to.
            step: this one and no other.
            accept: called with a checkpoint's record before its arrays are read; what it raises ends the search.

        Returns:
            (state, record) as saved.

        Raises:
            BadInput: there are checkpoints, but none can be used. Nothing is changed on disk then.
            OSError, or what a bucket's client raises: the storage does not answer for now. Nothing is changed on disk.
        """
        wanted = self._manager.all_steps() if step is None else [step]
        failures: dict[int, str] = {}
        for candidate in sorted(wanted, reverse=True):
            record, why = self._attempt(lambda candidate=candidate: self._read_meta(candidate)["record"])
            if record is not None:
                accept(record)
                restored, why = self._attempt(lambda candidate=candidate: self._read(candidate, like))
            if why:
                failures[candidate] = why
                continue
            for damaged, reason in failures.items():
                if self._read_only:
                    logging.error("checkpoint %d is damaged (%s); left where it is", damaged, reason)
                else:
                    self._move_aside(damaged, reason)
            return restored
        if failures:
            reasons = "\n".join(f"  step {bad}: {why}" for bad, why in failures.items())
            raise BadInput(
                f"no checkpoint in {self.directory} can be used:\n{reasons}\n"
                "Restore the folder from a copy, or remove it to start from the beginning."
            )
        return None

    def _attempt(self, read: Callable[[], Any]) -> tuple[Any, str]:
        """(what `read` returns, ""), or (None, why it is damaged): the same decision on all processes."""
        result, why = None, ""
        try:
            result = read()
        except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or JSON raise
            if _is_passing(error):
                raise
            why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(why))).any():
            return None, why or "another process could not read it"
        return result, why

    def _read_meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
        how = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
        restored = self._manager.restore(step, args=ocp.args.Composite(state=how, meta=ocp.args.JsonRestore()))
        state, meta = restored["state"], restored["meta"]
        found, expected = digest(state), meta["digest"]
        if found != expected:
            differing = [path for path in sorted(found | expected) if found.get(path) != expected.get(path)]
            raise ValueError(f"{len(differing)} arrays are not what was saved, the first is {differing[0]}")
        return state, meta["record"]

    def _move_aside(self, step: int, why: str) -> None:
        # Orbax refuses to save steps that are not newer than the latest it knows, so the damaged one has to go.
        aside = self.directory.parent / "damaged_checkpoints"
        if jax.process_index() == 0:
            aside.mkdir(parents=True, exist_ok=True)
            target = aside / str(step)
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
            logging.error("checkpoint %s is damaged (%s); moved to %s", step, why, target)
        multihost_utils.sync_global_devices(f"moved aside {step}")
        self._manager.reload()

    def _not_saved(self, error: Exception) -> StorageFailure:
        there = ", ".join(map(str, self.steps)) or "none"
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return StorageFailure(
            f"a checkpoint could not be written in {self.directory}: {reason}. Complete are those of steps {there}. "
            "Make room or mend the storage, then give the same command again."
        )


def _is_passing(error: Exception) -> bool:
    """Whether reading may succeed later, so that it would be wrong to take the checkpoint for damaged."""
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
        return True
    return any(str(error).startswith(word) or f" {word}:" in str(error) for word in _PASSING)
