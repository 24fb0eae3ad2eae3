"""Verified checkpoints: a restored checkpoint is bit for bit what was saved, or it is not used.

Orbax writes and commits them. But it restores flipped bits and casts types without notice, so each checkpoint has a
digest of its arrays, which every restore compares. A damaged checkpoint is moved aside and the newest good one is used.
"""

import errno
import hashlib
import json
import logging
import os
import re
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

# Error codes of a network or a bucket that is unavailable for now: not a sign of damage.
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

    A bijection (the finaliser of MurmurHash3, public domain) mixes each element's bits with its index, so one changed
    element always changes its own term; the terms are added modulo 2³², so their order does not matter.
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


def _seal(meta: dict[str, Any], step: int) -> str:
    """A digest of a checkpoint's metadata, the array digests included. It protects from accidents, not from attacks."""
    sealed = {name: value for name, value in meta.items() if name != "seal"}
    return hashlib.sha256(json.dumps([step, sealed], sort_keys=True).encode()).hexdigest()


def _by_place(digests: dict[str, int]) -> dict[tuple[str, ...], int]:
    """Digests by the names along an array's path; the same for a dataclass's fields as for a dictionary's keys."""
    return {tuple(re.findall(r"[^.'\[\]]+", path)): value for path, value in digests.items()}


def fingerprint(tree: Any) -> str:
    """`digest` as eight hexadecimal digits: identifies a teacher's weights."""
    return f"{zlib.crc32(json.dumps(digest(tree), sort_keys=True).encode()):08x}"


def _arrays_written_whole():
    """Orbax's handler for arrays, set not to split replicated arrays among their devices.

    Splitting is its default and compiles a slice per shape and device: the first save of a small network took three
    times as long on eight devices. States here are small, or their large arrays are sharded.
    """
    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False))
    )


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: created if missing.
        keep: number of newest checkpoints to keep, in addition to the one with the best score.
        read_only: change nothing on disk, so that a running run's folder can be read.

    Raises:
        BadInput: a step's folder is a symbolic link, which could not be deleted later; not if `read_only`.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int, read_only: bool = False):
        self.directory = epath.Path(directory).resolve()
        self._read_only = read_only
        if not read_only:
            self._refuse_links()
        by_score = policies.BestN(
            get_metric_fn=lambda metrics: (metrics["score"], -metrics["step"]),  # the earliest of equal scores
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

    def _refuse_links(self) -> None:
        if "://" in str(self.directory) or not self.directory.exists():
            return
        for entry in os.scandir(self.directory):
            if entry.is_symlink():
                raise BadInput(
                    f"{entry.path} is a symbolic link; a run deletes its old checkpoints, and would not delete what is "
                    f"elsewhere. Put the folder itself there: cp -rL {entry.name} copy && rm {entry.name} && "
                    f"mv copy {entry.name}"
                )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, _) -> None:
        """Wait until everything saved is committed.

        Raises:
            StorageFailure: a commit failed.
        """
        try:
            self._manager.close()
        except Exception as failure:
            if error is None:
                raise self._not_saved(failure) from failure
            logging.error("%s", self._not_saved(failure))  # the error already being raised matters more

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending; a damaged one is included until a restore finds it."""
        return sorted(self._manager.all_steps())

    def save(self, state: Any, *, record: dict[str, Any], score: float | None = None) -> None:
        """Save in the background; the arrays are copied before this returns.

        Args:
            state: arrays on the mesh, such as a `TrainState`; its `step` names the checkpoint. A step that is already
                saved is not saved again, unless it has a score now.
            record: JSON-serialisable data to save with the arrays.
            score: by which the best checkpoint is chosen, higher is better; None if this step was not evaluated.

        Raises:
            NumericFailure: an array has a NaN or an infinity; nothing is written.
            StorageFailure: this checkpoint or the one before could not be written.
        """
        step = int(state.step)
        if step == self.latest_step:
            if score is None:
                return
            self._manager.wait_until_finished()
            self._manager.delete(step)  # saved without a score when the run was stopped
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
        meta["seal"] = _seal(meta, step)
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
        self, like: Any = None, *, step: int | None = None, accept: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest undamaged checkpoint, or None where there are no checkpoints.

        Args:
            like: gives the structure, shapes, types and shardings to restore to. None: nested dictionaries with the
                shapes and types that were saved, on the first device; nothing need be known about the run.
            step: restore this one only.
            accept: called with a checkpoint's record before its arrays are read; an exception it raises is passed on.

        Returns:
            (state, record) as saved.

        Raises:
            BadInput: there are checkpoints, but none is usable. Nothing on disk is changed.
            OSError, or an error of a bucket's client: the storage is unavailable for now. Nothing on disk is changed.
        """
        wanted = self._manager.all_steps() if step is None else [step]
        failures: dict[int, str] = {}
        for candidate in sorted(wanted, reverse=True):
            meta, why = self._attempt(lambda candidate=candidate: self._read_meta(candidate))
            if not why:
                accept(meta["record"])
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
        """(result of `read`, "") or (None, why it is damaged); all processes decide the same."""
        result, why = None, ""
        try:
            result = read()
        except Exception as error:  # a damaged file makes Orbax, TensorStore or JSON raise anything
            if _is_passing(error):
                raise
            why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(why))).any():
            return None, why or "another process could not read it"
        return result, why

    def _read_meta(self, step: int) -> dict[str, Any]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if not isinstance(meta, dict) or not isinstance(meta.get("record"), dict) or "digest" not in meta:
            raise ValueError("its record is not one")
        if "seal" not in meta:
            logging.warning("checkpoint %d was written by a version that sealed only the arrays", step)
        elif meta["seal"] != _seal(meta, step):
            raise ValueError("its record, or the number of its step, is not what was saved")
        return meta

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        if like is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            saved = self._manager.item_metadata(step)["state"].tree
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), saved)
        else:
            abstract = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
            )
        how = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
        meta = self._read_meta(step)
        state = self._manager.restore(step, args=ocp.args.Composite(state=how))["state"]
        found, expected = _by_place(digest(state)), _by_place(meta["digest"])
        if found != expected:
            differing = [place for place in sorted(found | expected) if found.get(place) != expected.get(place)]
            raise ValueError(f"{len(differing)} arrays are not what was saved, the first is {'/'.join(differing[0])}")
        return state, meta["record"]

    def _move_aside(self, step: int, why: str) -> None:
        # Orbax refuses to save a step that is not newer than the latest it knows, so the damaged one must be removed.
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
    """Whether the storage is only unavailable for now, so that the checkpoint must not be taken for damaged."""
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
        return True
    return any(str(error).startswith(word) or f" {word}:" in str(error) for word in _PASSING)
