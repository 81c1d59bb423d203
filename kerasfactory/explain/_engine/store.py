"""Results larger than memory: streamed to disk batch by batch, and continued after a kill at any moment.

The store is a directory in Zarr's format 2, which xarray reads as it is. Each layer is a group, and each of its
variables an array that grows along its first dimension. Three facts make it survive a kill:

- Zarr writes every file beside its place and renames it: after a kill a file is the old one or the new one.
- The record in the root's attributes, one such file, says how many batches and rows count. It is written after them.
- What was written before its record was is written again, at the same place, by the run that continues.

So nothing is lost, and nothing is there twice. A power failure is another matter: nothing is forced onto the disk.
"""

import collections
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from keras import tree

from kerasfactory import _backend
from kerasfactory.explain._engine.data import batches_of
from kerasfactory.explain._engine.observe import build_model

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

# Batches are collected up to this size: a file for each would cost more time than what is in it.
_WRITTEN_AT_ONCE = 4 << 20
_LARGEST_CHUNK = 64 << 20  # readers hold whole chunks, and no codec takes 2 GiB
_RECORD = "kerasfactory"


class Store:
    """Datasets, one for each layer, that grow batch by batch in a directory.

    It stands in for the `x` of `observe`: it gives the first batch, by which the model is known again, and then those
    that are not stored yet.

        with Store(path, "capture", model, x, batch_size, arguments, tolerance) as store:
            for batch in observe(model, store, layers, None, verbose, measure):
                store.append({name: xr.Dataset(...) for name in batch.measured}, batch.changes_state)
            store.finish()
        datasets = store.open()

    Args:
        path: The directory, `*.zarr`. Made if it is not there; continued if it belongs to the same call.
        function: Name of the public function whose results these are.
        model: The model that makes them.
        x: What `observe` takes.
        batch_size: As for `observe`.
        arguments: All else on which the results depend, as JSON.
        tolerance: From the model to how far apart, relative to the largest entry, two runs of it may lie.

    Raises:
        ImportError: If Zarr is not installed, or too old.
        ValueError: If `path` is no `*.zarr`, or holds something else; if the model, its weights, `x` or the arguments
            are not those that the store was made with.
        RuntimeError: If another process is writing to it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        function: str,
        model: Any,
        x: Any,
        batch_size: int | None,
        arguments: Mapping[str, Any],
        tolerance: Callable[[Any], float],
    ):
        self._path = _checked_path(path)
        self._zarr = _import_zarr()
        self._source, self._expected = batches_of(x, batch_size)
        self._model, self._tolerance = model, tolerance
        self._made_by = {"function": function, **arguments}
        self._digests: collections.deque[str] = collections.deque()  # of batches drawn and not yet appended
        self._waiting: list[dict[str, xr.Dataset]] = []
        self._waiting_bytes = 0
        self._layout: dict[str, dict[Any, tuple]] = {}  # dimensions and lengths, by layer and variable
        self._lock: int | None = None
        self._found: dict[str, Any] = {}  # the record as the store has it
        self._record: dict[str, Any] = {}  # as it will be when all that waits is written
        self._complete = False
        self._done = 0  # batches that need not be run again
        self._written: dict[str, int] = {}  # rows, by layer

    def __enter__(self) -> "Store":
        if self._path.exists():
            self._take_lock()
            try:
                self._found = self._read_record()
            except ValueError:
                self.__exit__()
                raise
            self._complete = (self._path / ".zmetadata").exists()  # written last of all
            # A model that goes on from what the last batch left in it can leave out no batch.
            if self._found and (self._complete or self._found["can_continue"]):
                self._done = self._found["batches"]
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __len__(self) -> int:
        if self._expected is None:
            raise TypeError("Nobody knows how many batches there will be.")
        return max(self._expected - max(self._done - 1, 0), 1)

    def __iter__(self) -> Iterator[tuple]:
        number, digest = 0, ""
        for number, data in enumerate(self._source, start=1):
            digest = digest_of(tree.flatten(data), digest)
            if number == 1:
                self._identify(data, digest)
            if number == self._done and digest != self._record["data"]:
                raise ValueError(
                    f"`x` is not what {self._path} was made of: it differs somewhere in its first {number} batches. "
                    "Shuffled data come in another order each time: turn that off. For other data choose another "
                    "`store`."
                )
            if number > self._done and self._complete:
                raise ValueError(
                    f"`x` has more batches than the {self._done} that {self._path} was made of. Choose another "
                    "`store`, for all of them or for the new ones."
                )
            if number == 1 or number > self._done:
                self._digests.append(digest)
                yield data
        if 0 < number < self._done:
            raise ValueError(
                f"`x` has {number} batches, fewer than the {self._done} in {self._path}. Choose another `store`."
            )

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows of each layer."""
        return self._record["rows"]

    @property
    def nan(self) -> dict[str, list[int]]:
        """Of each layer that has NaN: the number of rows that hold one, and the first of them."""
        return self._record["nan"]

    def append(self, results: dict[str, xr.Dataset], changes_state: bool = False) -> None:
        """Adds what was made of the batch drawn last.

        Args:
            results: From the layer's name to variables, all with the same first dimension, along which they grow, and
                to coordinates of the other dimensions.
            changes_state: For the first batch, whether what the model does with a batch depends on those before.

        Raises:
            ValueError: If the batch has other variables, dimensions or lengths than the first, or if the results of the
                first are not those in the store.
        """
        digest = self._digests.popleft()
        layout = {
            name: {variable: (array.dims, array.shape[1:]) for variable, array in dataset.data_vars.items()}
            for name, dataset in results.items()
        }
        if not self._layout:
            self._layout = layout
            if self._done:
                self._compare(results)
                return
            self._record["can_continue"] = not changes_state
        if layout != self._layout:
            raise ValueError(
                "All batches in a store must have the dimensions and lengths of the first, which are "
                f"{self._layout}. Received a batch with: {layout}"
            )
        for name, dataset in results.items():
            before = self.rows.get(name, 0)
            nan = np.flatnonzero(_has_nan(dataset))
            if len(nan):
                count, first = self.nan.get(name, [0, before + int(nan[0])])
                self.nan[name] = [count + len(nan), first]
            self.rows[name] = before + len(next(iter(dataset.data_vars.values())))
        self._record |= {"batches": self._record["batches"] + 1, "data": digest}
        self._waiting.append(results)
        self._waiting_bytes += sum(dataset.nbytes for dataset in results.values())
        if self._waiting_bytes >= _WRITTEN_AT_ONCE:
            self._write()

    def finish(self) -> None:
        """Writes what is waiting, and marks the store as complete."""
        if self._complete:
            return
        root = self._write()
        for name, rows in self.rows.items():
            for variable in self._layout[name]:  # a killed run may have begun on a batch that `x` has no more
                array = root[f"{name}/{variable}"]
                array.resize((rows, *array.shape[1:]))
        for path in self._path.rglob("*.partial"):  # of runs that were killed
            if path.is_file():
                path.unlink()
        for name in (*self.rows, ""):  # without it xarray warns that opening takes long
            self._zarr.consolidate_metadata(self._path, path=name, zarr_format=2)

    def open(self) -> dict[str, xr.Dataset]:
        """The results, which are read from the disk when they are used; in pieces, if Dask is installed."""
        datasets = {}
        for name, variables in self._layout.items():
            ((first_dimension, *_), _) = next(iter(variables.values()))
            numbers = {first_dimension: np.arange(self.rows[name])}
            datasets[name] = xr.open_zarr(self._path, group=name).assign_coords(numbers)
        return datasets

    def _read_record(self) -> dict[str, Any]:
        """What the directory says of itself, nothing if nothing was stored in it."""
        file = self._path / ".zattrs"
        attributes = json.loads(file.read_text()) if file.exists() else {}
        record = attributes.get(_RECORD)
        if record is None:
            of_ours = {".zgroup"} if attributes else {".zgroup", ".zattrs"}  # what the first moments leave
            names = {path.name for path in self._path.iterdir() if path.suffix != ".partial"}
            others = sorted(names - of_ours)
            if others:
                raise ValueError(
                    f"{self._path} holds what this package did not store: {', '.join(others[:3])}. Choose "
                    "another `store`."
                )
        return record if record and record["batches"] else {}

    def _take_lock(self) -> None:
        """Two that write would undo each other's work; one that was killed has let go of its lock."""
        if fcntl is None or self._lock is not None:
            return
        self._lock = os.open(self._path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.__exit__()
            raise RuntimeError(
                f"Another process or thread is writing to {self._path}. Wait until it has finished, or choose another "
                "`store`."
            ) from None

    def _identify(self, data: tuple, digest: str) -> None:
        """Makes sure that the store is of this call, or begins the record of a new one."""
        build_model(self._model, data)
        made_by = self._made_by | {"x": digest, "weights": digest_of(weight.value for weight in self._model.weights)}
        if self._found:
            differing = [key for key in made_by if made_by[key] != self._found["made_by"].get(key)]
            if differing:
                raise ValueError(
                    f"{self._path} belongs to another call, which differs in: {', '.join(differing)}. Choose another "
                    "`store`, or delete this one."
                )
        if self._done:
            self._record = self._found
            self._written = dict(self.rows)
        else:
            self._record = {"made_by": made_by, "batches": 0, "data": "", "rows": {}, "nan": {}}

    def _compare(self, results: dict[str, xr.Dataset]) -> None:
        """The model is the one whose results are stored if it gives them again; its weights are not all of it."""
        root = self._zarr.open_group(self._path, mode="r", zarr_format=2)
        tolerance = self._tolerance(self._model)
        same = results.keys() == self.rows.keys()
        for name, dataset in results.items() if same else ():
            for variable, array in dataset.data_vars.items():
                stored = root[f"{name}/{variable}"][: len(array)] if f"{name}/{variable}" in root else np.empty(0)
                same &= stored.shape == array.shape
                if same and array.dtype.kind == "f":  # whole numbers, such as a rank, may jump where values are close
                    largest = np.nanmax(np.abs(stored), initial=0.0)
                    same &= np.allclose(stored, array, rtol=0, atol=tolerance * largest, equal_nan=True)
        if not same:
            raise ValueError(
                f"The model has the weights with which {self._path} was made, and gives other results for the first "
                "batch: its code or its settings have changed, or its outputs are random. Choose another `store`."
            )

    def _write(self) -> Any:
        """Writes what is waiting, and after it the record, which makes it count. Returns the root."""
        if not self._done and not self._written:
            self._begin()
        root = self._zarr.open_group(self._path, mode="r+", zarr_format=2)
        if self._waiting:
            for name, variables in self._layout.items():
                start = self._written.get(name, 0)
                for variable, (_, lengths) in variables.items():
                    rows = np.concatenate([batch[name][variable].values for batch in self._waiting])
                    array = root[f"{name}/{variable}"]
                    array.resize((start + len(rows), *lengths))
                    array[start:] = rows
            root.attrs[_RECORD] = self._record
            self._written = dict(self.rows)
            self._waiting.clear()
            self._waiting_bytes = 0
        return root

    def _begin(self) -> None:
        """Makes the directory, and in it arrays without rows, with their dimensions, coordinates and attributes."""
        self._path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        for path in self._path.iterdir():  # what a killed run had begun and never recorded
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        root = self._zarr.open_group(self._path, mode="a", zarr_format=2)
        root.attrs[_RECORD] = self._record | {"batches": 0}
        for name, dataset in self._waiting[0].items():
            chunks = {}
            for variable, array in dataset.data_vars.items():
                rows = sum(len(batch[name][variable]) for batch in self._waiting)
                chunks[variable] = {"chunks": _chunks((rows, *array.shape[1:]), array.dtype.itemsize)}
            empty = dataset.isel({array.dims[0]: slice(0, 0)})
            empty.to_zarr(self._path, group=name, mode="a", encoding=chunks, consolidated=False, zarr_format=2)


def _checked_path(store: Any) -> Path:
    if not isinstance(store, str | os.PathLike):
        raise ValueError(f"`store` must be a path. Received: store={store!r} of type {type(store).__name__}")
    path = Path(store)
    if path.suffix == ".nc":
        raise ValueError(
            "`store` must be a Zarr directory, such as 'scores.zarr': a kill damages a netCDF file that is being "
            "written. A finished store becomes one with `xarray.open_zarr(store, group=layer).to_netcdf(...)`. "
            f"Received: store={str(store)!r}"
        )
    if path.suffix != ".zarr" or (path.exists() and not path.is_dir()):
        raise ValueError(f"`store` must be a directory whose name ends in .zarr. Received: store={str(store)!r}")
    return path


def _import_zarr() -> Any:
    try:
        import zarr
        from packaging.version import Version  # comes with Zarr

        old = Version(zarr.__version__) < Version("3.1.3")  # did not write files beside their places yet
    except ImportError:
        old = True
    if old:
        raise ImportError("`store` needs Zarr 3.1.3 or later: pip install 'kerasfactory[store]'")
    return zarr


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape, with its first dimensions halved until it is small enough for readers."""
    chunks = list(shape)
    while np.prod(chunks, dtype=float) * itemsize > _LARGEST_CHUNK:
        axis = next(axis for axis, length in enumerate(chunks) if length > 1)
        chunks[axis] = -(-chunks[axis] // 2)
    return tuple(chunks)


def _has_nan(dataset: xr.Dataset) -> np.ndarray:
    """Which rows hold a NaN."""
    arrays = [array.values for array in dataset.data_vars.values() if array.dtype.kind == "f"]
    return np.any([np.isnan(array).reshape(len(array), -1).any(axis=1) for array in arrays], axis=0)


def digest_of(tensors: Any, before: str = "") -> str:
    """A hash of all values, and of what came before."""
    digest = hashlib.sha256(before.encode())
    for tensor in tensors:
        array = _backend.as_numpy(tensor)
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes())  # "O": strings
    return digest.hexdigest()
