"""Results that grow batch by batch: in memory, or streamed to disk and continued after a kill at any moment.

The store on disk is a directory in Zarr's format 2, which xarray reads as it is. Each layer is a group, and each of its
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
from kerasfactory._warnings import warn
from kerasfactory.explain._engine.data import batches_of
from kerasfactory.explain._engine.observe import build_model, rounding_of

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

# Batches are collected up to this size: a file for each would cost more time than what is in it.
_WRITTEN_AT_ONCE = 4 << 20
_LARGEST_CHUNK = 64 << 20  # readers hold whole chunks, and no codec takes 2 GiB
_RECORD = "kerasfactory"


def results_of(
    store: Any, function: str, model: Any, x: Any, batch_size: int | None, arguments: Mapping[str, Any]
) -> "Memory | Store":
    """Where the results of a public function grow batch by batch: in memory, or in the directory `store`.

        with results_of(store, "capture", model, x, batch_size, arguments) as results:
            for batch in observe(model, results.x, layers, results.batch_size, verbose, measure):
                results.append(arrays, nan, labeled, batch.expected, batch.changes_state)
            results.finish()
        datasets = results.open()

    From the layer's name, `arrays` leads to what the function `labeled(name, arrays)` makes a Dataset of, along whose
    first dimension the results grow, and `nan` to a boolean array that says which rows hold a NaN.
    """
    if store is None:
        return Memory(x, batch_size)
    return Store(store, function, model, x, batch_size, arguments, rounding_of)


class Memory:
    """Datasets, one for each layer, that grow batch by batch in memory."""

    def __init__(self, x: Any, batch_size: int | None):
        self.x, self.batch_size = x, batch_size
        self.rows: dict[str, int] = {}
        self.nan: dict[str, list[int]] = {}
        self._without_rows: dict[str, xr.Dataset] = {}
        self._arrays: dict[str, dict[str, np.ndarray]] = {}

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def append(
        self,
        arrays: dict[str, dict[str, np.ndarray]],
        nan: dict[str, np.ndarray],
        labeled: Callable[[str, Any], xr.Dataset],
        expected: int | None = None,
        changes_state: bool = False,
    ) -> None:
        """Adds what was made of a batch, one of so many if that is known."""
        for name, arrays_of_layer in arrays.items():
            start = self.rows.get(name, 0)
            if name not in self._arrays:
                self._arrays[name] = {}
                self._without_rows[name] = _without_rows(labeled(name, arrays_of_layer))
            for variable, values in arrays_of_layer.items():
                grown = _grown(self._arrays[name].get(variable), values, start, expected)
                self._arrays[name][variable] = grown
            _count(self.rows, self.nan, name, nan[name])

    def finish(self) -> None:
        """Does nothing: `Store` writes here what is waiting."""

    def open(self) -> dict[str, xr.Dataset]:
        """The results so far. Nothing can be added afterward."""
        datasets = {}
        for name, arrays in self._arrays.items():
            empty, rows = self._without_rows[name], self.rows[name]
            variables = {}
            for variable, array in arrays.items():
                array.resize((rows, *array.shape[1:]), refcheck=False)
                variables[variable] = (empty[variable].dims, array, empty[variable].attrs)
            numbers = {_first_dimension(empty): np.arange(rows)}
            datasets[name] = xr.Dataset(variables, dict(empty.coords) | numbers, empty.attrs)
        return datasets


def _grown(grown: np.ndarray | None, values: np.ndarray, start: int, expected: int | None) -> np.ndarray:
    """An array with `values` in its rows from `start` on, and room for more. It never lies in memory twice."""
    if grown is None:
        if expected == 1 and values.flags.owndata and values.flags.writeable:
            return values  # not copied: it may be as large as all the rest
        grown = np.empty((len(values) * (expected or 1), *values.shape[1:]), values.dtype)
    if start + len(values) > len(grown):
        grown.resize((start + len(values), *grown.shape[1:]), refcheck=False)
    grown[start : start + len(values)] = values
    return grown


def _first_dimension(dataset: xr.Dataset) -> Any:
    return next(iter(dataset.data_vars.values())).dims[0]


def _without_rows(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.isel({_first_dimension(dataset): slice(0, 0)}).copy(deep=True)


def _count(rows: dict[str, int], nan: dict[str, list[int]], name: str, has_nan: np.ndarray) -> None:
    """Counts further rows of a layer; of those with a NaN, `nan` says how many there are, and which is the first."""
    before = rows.get(name, 0)
    found = np.flatnonzero(has_nan)
    if len(found):
        count, first = nan.get(name, [0, before + int(found[0])])
        nan[name] = [count + len(found), first]
    rows[name] = before + len(has_nan)


def warn_of_nan(nan: dict[str, list[int]], rows: dict[str, int]) -> None:
    """Warns of layers whose results hold NaN, as `_count` counts them."""
    for name, (count, first) in nan.items():
        warn(
            f"The scores of layer {name!r} are NaN in {count} of {rows[name]} samples, the first of them number "
            f"{first}. Look for NaN or infinite numbers in these samples, and in the model's weights."
        )


class Store:
    """Datasets, one for each layer, that grow batch by batch in a directory: see `results_of`.

    It stands in for the `x` of `observe`: it gives the first batch, by which the model is known again, and then those
    that are not stored yet.

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
        self.x, self.batch_size = self, None  # for `observe`
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
                self._complete = (self._path / ".zmetadata").exists()  # written last of all
                # A model that goes on from what the last batch left in it can leave out no batch.
                if self._found and (self._complete or self._found["can_continue"]):
                    self._done = self._found["batches"]
            except BaseException:
                self.__exit__()
                raise
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

    def append(
        self,
        arrays: dict[str, Any],
        nan: dict[str, np.ndarray],
        labeled: Callable[[str, Any], xr.Dataset],
        expected: int | None = None,
        changes_state: bool = False,
    ) -> None:
        """Adds what was made of the batch drawn last; see `results_of`.

        Args:
            arrays: By layer.
            nan: By layer: which rows hold a NaN.
            labeled: Makes a Dataset of the arrays of a layer.
            expected: Not used: room is made on disk as it is needed.
            changes_state: For the first batch, whether what the model does with a batch depends on those before.

        Raises:
            ValueError: If the batch has other variables, dimensions or lengths than the first, or if the results of the
                first are not those in the store.
        """
        digest = self._digests.popleft()
        results = {name: labeled(name, arrays_of_layer) for name, arrays_of_layer in arrays.items()}
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
        for name in results:
            _count(self.rows, self.nan, name, nan[name])
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
        if self._read_record() != self._found:
            raise RuntimeError(
                f"Another process or thread has written to {self._path} since this call began. What it wrote is left as "
                "it is. Make the call again, or choose another `store`."
            )
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
            empty = _without_rows(dataset)
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


def digest_of(tensors: Any, before: str = "") -> str:
    """A hash of all values, and of what came before."""
    digest = hashlib.sha256(before.encode())
    for tensor in tensors:
        array = _backend.as_numpy(tensor)
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes())  # "O": strings
    return digest.hexdigest()
