"""Checkpoints that are checked: what is restored is what was saved, bit for bit, or it is not used.

Orbax writes and commits them; but it restores flipped bits and casts types silently, so each checkpoint carries a
digest of its arrays, compared after every restore. A damaged step is moved aside and the newest good one is used.
"""

import json
import logging
import zlib
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from dgkd_jax.errors import BadInput
from dgkd_jax.state import TrainState

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


@jax.jit
def _hashes(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_hash(leaf) for leaf in leaves]


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


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: created if missing.
        keep: number of newest checkpoints kept; the one with the best accuracy is kept besides.
        read_only: change nothing on disk, so that the folder of a run that goes on can be read.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int, read_only: bool = False):
        self.directory = epath.Path(directory).resolve()
        self._read_only = read_only
        by_accuracy = policies.BestN(
            get_metric_fn=lambda metrics: (metrics["accuracy"], -metrics["step"]),  # of equals the earliest
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), by_accuracy]),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()  # waits until what was saved is committed

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Of all checkpoints, ascending; a damaged one is among them until it is restored."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, record: dict[str, Any], accuracy: float | None = None) -> None:
        """Save in the background; the arrays are copied before this returns.

        Args:
            state: on the mesh; its step names the checkpoint. A step that is already saved is left as it is.
            record: what else to keep, JSON-serialisable.
            accuracy: on the evaluation split, if it was evaluated at this step.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        meta = {
            "record": record,
            "digest": digest(state),
            "versions": {package: version(package) for package in _PACKAGES},
        }
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
            metrics=None if accuracy is None else {"accuracy": accuracy, "step": step},
            force=True,
        )
        if not saved:
            raise RuntimeError(f"checkpoint {step} was not saved in {self.directory}")

    def restore(self, like: TrainState, *, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        Args:
            like: gives the structure, shapes, types and shardings to restore to.
            step: this one and no other.

        Returns:
            (state, record) as saved.

        Raises:
            BadInput: there are checkpoints, but none can be used. Nothing is changed on disk then.
        """
        wanted = self._manager.all_steps() if step is None else [step]
        failures: dict[int, str] = {}
        for candidate in sorted(wanted, reverse=True):
            try:
                restored = self._read(candidate, like)
            except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or JSON raise
                failures[candidate] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
                continue
            for damaged, why in failures.items():
                if self._read_only:
                    logging.error("checkpoint %d is damaged (%s); left where it is", damaged, why)
                else:
                    self._move_aside(damaged, why)
            return restored
        if failures:
            reasons = "\n".join(f"  step {bad}: {why}" for bad, why in failures.items())
            raise BadInput(
                f"no checkpoint in {self.directory} can be used:\n{reasons}\n"
                "Restore the folder from a copy, or remove it to start from the beginning."
            )
        return None

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        )
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
            logging.error("checkpoint %d is damaged (%s); moved to %s", step, why, target)
        multihost_utils.sync_global_devices(f"moved aside {step}")
        self._manager.reload()
