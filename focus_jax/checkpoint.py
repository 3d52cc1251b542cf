"""Checkpoints of a run, and parameters alone: saved atomically, checked before they are read.

A step on disk is a folder with the items `state` (arrays), `data` and `meta` (JSON). A folder
written by `save_params` has the same layout without `data`, so that one reader serves both.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding

from focus_jax.distributed import first_line, is_loss

PyTree = Any
Entry = tuple[tuple[int, ...], np.dtype]
# Where a parameter of that name and shape is to lie.
Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

_MAKE = "train one with `python train.py`, or name the folder of a finished run"
# Seconds between looks at a write that is waited for.
_POLL = 0.01
# Failures of the machine or the user's rights, which say nothing about the files.
_NOT_DAMAGE = (PermissionError, MemoryError, jax.errors.JaxRuntimeError)


class CheckpointMismatch(ValueError):
    """The checkpoint's arrays are not those of the model that asks for them."""


class CheckpointDamaged(ValueError):
    """Files of the checkpoint are missing or cut short."""


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class _Manager(ocp.CheckpointManager):
    failure: BaseException | None = None

    def _wait_for_checkpointers(self) -> None:
        # Called by the thread that finishes a write. Where a write has failed, that thread goes on
        # to wait for the other processes, which wait for this one.
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self.failure = error
            raise

    def writes(self) -> bool:
        """Whether a write is under way; raises what made it fail."""
        if self.failure is not None:
            raise self.failure
        return self.is_saving_in_progress()

    def reached_preemption(self, step: int) -> bool:
        # Asked for a step that is over, from the thread that finishes a write, the agreement on
        # where all processes stop would believe that this one is still there.
        return False


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them; reading alone creates nothing.

    `async_` writes in the background: `save` returns once the arrays may be donated. A step's
    folder gets its name when it is complete, so an interrupted write is never picked up.
    """

    def __init__(self, directory: epath.PathLike, keep: int, async_: bool = True):
        if keep < 1:
            raise ValueError(f"keep is {keep}; keep at least 1 checkpoint")
        self.directory = _absolute(directory)
        self.keep = keep
        self.async_ = async_
        self._manager: _Manager | None = None

    def save(self, step: int, state: PyTree, data: dict[str, Any], meta: dict[str, Any]) -> None:
        """Save a step; drops the oldest beyond `keep`.

        With several processes all of them call it, and arrays lie on devices of all.
        Raises ValueError when `step` is not beyond the latest one (see `rewind`), or when `data`
        or `meta` is not JSON; CheckpointNotWritten, also for an earlier background write.
        """
        _require_json("data", data)
        _require_json("meta", meta)
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f"cannot save step {step}: {self.directory} already holds step {latest}; "
                f"call rewind({step - 1}) to drop the later steps, or choose another directory"
            )
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(jax.tree.map(_words, state)),
            data=ocp.args.JsonSave(data),
            meta=ocp.args.JsonSave(meta),
        )
        with self._failure_named():
            self._writer().save(step, args=items, force=True)

    def check(self) -> None:
        """Raise CheckpointNotWritten when a background write has failed; never waits."""
        if self._manager is not None:
            with self._failure_named():
                if not self._manager.writes():
                    self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Finished steps, ascending; waits for a write under way."""
        self.wait()
        return _steps(self.directory)

    def latest(self) -> int | None:
        """The newest finished step, or None; waits for a write under way."""
        return max(self.steps(), default=None)

    def restore(
        self, step: int | None, template: PyTree
    ) -> tuple[PyTree, dict[str, Any], dict[str, Any]]:
        """Read a step (None: the latest) as (state, data, meta).

        template: pytree of arrays or ShapeDtypeStruct. Arrays come back with its structure,
            floating dtypes and shardings (the default device where it has none).
        Raises FileNotFoundError, CheckpointMismatch or CheckpointDamaged.
        """
        self.wait()
        folder = _step_folder(self.directory, step)
        state = _restore_arrays(folder, template, unexpected_is_error=True)
        return state, _restore_json(folder, "data"), _restore_json(folder, "meta")

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The `meta` of a step (None: the latest), without its arrays."""
        self.wait()
        return _restore_json(_step_folder(self.directory, step), "meta")

    def rewind(self, step: int) -> None:
        """Delete every checkpoint after `step`, before a run goes on from it."""
        for later in self.steps():
            if later > step:
                self._writer().delete(later)

    def wait(self) -> None:
        """Return when no write is under way; CheckpointNotWritten when one has failed."""
        if self._manager is not None:
            with self._failure_named():
                while self._manager.writes():
                    time.sleep(_POLL)
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing; the object may be used again afterwards."""
        self.wait()
        if self._manager is not None:
            with self._failure_named():
                manager, self._manager = self._manager, None
                manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A write that waits for a lost process would hold its end up.
        if not is_loss(error):
            self.close()

    @contextlib.contextmanager
    def _failure_named(self) -> Iterator[None]:
        # A full disk is an OSError to Python and a ValueError or more to the library that writes
        # arrays, so whatever is raised counts; the cause stays chained.
        try:
            yield
        except Exception as error:
            if is_loss(error) or isinstance(error, MemoryError):
                raise
            # A manager that failed once tells so for ever; the next save starts with a new one.
            self._manager = None
            steps = _steps(self.directory) if self.directory.is_dir() else []
            kept = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is none"
            raise CheckpointNotWritten(
                f"a checkpoint could not be written to {self.directory} ({first_line(error)}): "
                f"{kept}; free the disk, mend the folder or choose another, then start again"
            ) from error

    def _writer(self) -> _Manager:
        # Made at the first write: a reader must neither create the folder nor sweep another
        # process's temporary files out of it.
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(self.keep),
                enable_async_checkpointing=self.async_,
                cleanup_tmp_directories=True,
            )
            self._manager = _Manager(self.directory, options=options)
        return self._manager


def save_params(
    path: epath.PathLike, params: PyTree, meta: dict[str, Any], overwrite: bool = False
) -> None:
    """Save parameters alone into the new folder `path`, atomically.

    Raises FileExistsError when `path` exists and `overwrite` is False.
    """
    _require_json("meta", meta)
    folder = _absolute(path)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another path or pass overwrite=True")
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(jax.tree.map(_words, {"params": params})),
        meta=ocp.args.JsonSave(meta),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=items, force=overwrite)


def load_params(
    path: epath.PathLike, template: PyTree | None = None, place: Place | None = None
) -> tuple[PyTree, dict[str, Any]]:
    """Read (params, meta); of a run's checkpoint only the arrays under `params` are read.

    path: what `save_params` wrote, a step's folder, or a `Checkpoints` folder (latest step).
    template: as in `Checkpoints.restore`; None gives nested dicts and lists as stored, each array
        where `place` puts it (the default device without one).
    Raises FileNotFoundError, CheckpointMismatch or CheckpointDamaged.
    """
    folder = _params_folder(path)
    if template is None:
        with _damage_named(folder):
            stored = _stored_tree(folder)
        if "params" not in stored:
            raise CheckpointMismatch(
                f"checkpoint {folder} has no parameters under `params`, only {sorted(stored)}; "
                "name another checkpoint"
            )

        def shape(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
            at = None if place is None else place(path[0].key, leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

        template = jax.tree_util.tree_map_with_path(shape, stored["params"])
    state = _restore_arrays(folder, {"params": template}, unexpected_is_error=False)
    return state["params"], _restore_json(folder, "meta")


def load_meta(path: epath.PathLike) -> dict[str, Any]:
    """Read `meta` alone: what a caller needs to build the template for `load_params`."""
    return _restore_json(_params_folder(path), "meta")


def _absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()
    return path if path.is_absolute() else path.resolve()


def _require_json(name: str, value: dict[str, Any]) -> None:
    try:
        json.dumps(value)
    except TypeError as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}; convert it first") from error


def _steps(directory: epath.Path) -> list[int]:
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise NotADirectoryError(
            f"{directory} is a file, and checkpoints need a folder there: move it away, or choose "
            "another workdir"
        )
    return sorted(ocp.utils.checkpoint_steps(directory))


def _step_folder(directory: epath.Path, step: int | None) -> epath.Path:
    if not directory.exists():
        raise FileNotFoundError(f"no checkpoint directory {directory}; {_MAKE}")
    steps = _steps(directory)
    if not steps:
        raise FileNotFoundError(f"no finished checkpoint in {directory}; {_MAKE}")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; it holds {steps}")
    return directory / str(steps[-1] if step is None else step)


def _params_folder(path: epath.PathLike) -> epath.Path:
    folder = _absolute(path)
    is_step = any((folder / item).exists() for item in ("state", "meta"))
    return folder if is_step else _step_folder(folder, None)


@contextlib.contextmanager
def _damage_named(folder: epath.Path) -> Iterator[None]:
    # The readers below raise bare Exception, ValueError, OSError and more for bad files, so
    # everything that is not clearly something else counts as damage; the cause stays chained.
    try:
        yield
    except _NOT_DAMAGE:
        raise
    except Exception as error:
        others = [step for step in _steps(folder.parent) if str(step) != folder.name]
        if others:
            mend = f"restore another step, one of {others}"
        else:
            mend = f"there is no other step beside it; {_MAKE}"
        what = f"step {folder.name}" if folder.name.isdigit() else folder.name
        raise CheckpointDamaged(
            f"checkpoint {folder} ({what}) is damaged, a file is missing or cut short: {mend}"
        ) from error


def _stored_tree(folder: epath.Path) -> PyTree:
    # Nested dicts and lists of ArrayMetadata; reads no array.
    return ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree


def _restore_json(folder: epath.Path, item: str) -> dict[str, Any]:
    with _damage_named(folder):
        return ocp.JsonCheckpointHandler().restore(folder / item)


def _restore_arrays(folder: epath.Path, template: PyTree, unexpected_is_error: bool) -> PyTree:
    with _damage_named(folder):
        stored = _stored_tree(folder)
    _require_same(folder, _entries(stored), _entries(template), unexpected_is_error)
    target = jax.tree.map(_placed, template)
    args = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=not unexpected_is_error,
    )
    with _damage_named(folder):
        words = ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)
    return jax.tree.map(_like, template, words)


def _entries(tree: PyTree) -> dict[str, Entry]:
    # Keyed by the path as text: orbax stores integer keys, tuples and named tuples as other kinds
    # of node, with the same path.
    entries = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None:
            leaf = np.asarray(leaf)
        elif _is_key(leaf):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        entries[jax.tree_util.keystr(path, simple=True, separator="/")] = (
            tuple(leaf.shape),
            np.dtype(leaf.dtype),
        )
    return entries


def _require_same(
    folder: epath.Path,
    stored: dict[str, Entry],
    wanted: dict[str, Entry],
    unexpected_is_error: bool,
) -> None:
    differing = [
        path for path in wanted if path in stored and not _fits(stored[path], wanted[path])
    ]
    missing = [path for path in wanted if path not in stored]
    unexpected = [path for path in stored if path not in wanted]
    if not unexpected_is_error:
        # The rest of the state is not asked for, but another model's parameter still counts.
        unexpected = [path for path in unexpected if path.startswith("params/")]
    if not (differing or missing or unexpected):
        return
    # A parameter tells more than the optimiser state that follows its shape.
    paths = [*differing, *missing, *unexpected]
    first = min(paths, key=lambda path: not path.startswith("params/"))
    found = _show(stored[first]) if first in stored else "nothing"
    needed = _show(wanted[first]) if first in wanted else "nothing"
    raise CheckpointMismatch(
        f"checkpoint {folder} is of another architecture: at {first} it has {found}, the model "
        f"needs {needed} ({len(differing)} of {len(wanted)} arrays differ, {len(missing)} missing "
        f"from the checkpoint, {len(unexpected)} unexpected). Build the model with the "
        "checkpoint's own config, which its `meta` holds, or name another checkpoint"
    )


def _fits(stored: Entry, wanted: Entry) -> bool:
    # Floating dtypes are cast on restore; any other change of kind is another architecture.
    return stored[0] == wanted[0] and _kind(stored[1]) == _kind(wanted[1])


def _kind(dtype: np.dtype) -> str:
    return "float" if jax.dtypes.issubdtype(dtype, np.floating) else dtype.kind


def _show(entry: Entry) -> str:
    return f"{entry[1].name}{list(entry[0])}"


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def _words(leaf: Any) -> Any:
    # A random key is stored as its words, so that reading it rests on no side file.
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(template: Any, leaf: Any) -> Any:
    return jax.random.wrap_key_data(leaf, impl=_key_impl(template)) if _is_key(template) else leaf


def _key_impl(template: Any) -> Any:
    # key_impl takes arrays and tracers but no ShapeDtypeStruct, hence the trace.
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), template)
    return found[0]


def _placed(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    stored = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=_concrete(leaf.sharding))


def _concrete(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding:
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        if not sharding.mesh.empty:
            raise ValueError(
                f"the template's sharding {sharding.spec} is on an abstract mesh, which has no "
                "devices; rebuild it as NamedSharding(mesh, spec)"
            )
        sharding = None
    return SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
