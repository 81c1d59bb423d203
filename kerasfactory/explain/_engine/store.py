"""Results that grow batch by batch: in memory, or streamed to disk and continued after a kill at any moment.

Three facts make the store on disk survive a kill:

- A file is the old one or the new one: see `directory`, which keeps them.
- The record says how many samples and rows count. It is written after them.
- What was written before its record was is written again, at the same place, by the run that continues.

So nothing is lost, and nothing is there twice. A power failure is another matter: nothing is forced onto the disk.
"""

import collections
import contextlib
import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from keras import tree

from kerasfactory import _backend
from kerasfactory._warnings import warn
from kerasfactory.explain._engine.data import batch_size_of, batches_of, size_of
from kerasfactory.explain._engine.observe import Batch, build_model, rounding_of

# Batches are collected up to this size: a file for each would cost more time than what is in it.
_WRITTEN_AT_ONCE = 4 << 20


def results_of(
    store: Any, function: str, model: Any, x: Any, batch_size: int | None, arguments: Mapping[str, Any]
) -> "Memory | Store":
    """Where the results of a public function grow batch by batch: in memory, or in the directory `store`.

        with results_of(store, "capture", model, x, batch_size, arguments) as results:
            for batch in observe(model, results.x, layers, results.batch_size, verbose, measure):
                results.append(batch, arrays, nan, labeled)
            results.finish()
        datasets = results.open()

    From the layer's name, `arrays` leads to what the function `labeled(name, arrays)` makes a Dataset of, along whose
    first dimension the results grow, and `nan` to a boolean array that says which rows hold a NaN.
    """
    if store is None:
        return Memory(x, batch_size)
    return Store(store, function, model, x, batch_size, arguments)


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
        batch: Batch,
        arrays: dict[str, dict[str, np.ndarray]],
        nan: dict[str, np.ndarray],
        labeled: Callable[[str, Any], xr.Dataset],
    ) -> None:
        """Adds what was made of a batch."""
        for name, arrays_of_layer in arrays.items():
            start = self.rows.get(name, 0)
            if name not in self._arrays:
                self._arrays[name] = {}
                self._without_rows[name] = _without_rows(labeled(name, arrays_of_layer))
            for variable, values in arrays_of_layer.items():
                grown = _grown(self._arrays[name].get(variable), values, start, batch.expected)
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

    It stands in for the `x` of `observe`. It gives samples that are stored, by which the model is known again, and then
    those that are not stored yet.

    Args:
        path: The directory, `*.zarr`. Made if it is not there; continued if it belongs to the same call.
        function: Name of the public function whose results these are.
        model: The model that makes them.
        x: What `observe` takes.
        batch_size: As for `observe`.
        arguments: All else on which the results depend, as JSON.

    Raises:
        ImportError: If Zarr is not installed, or too old.
        ValueError: If `path` is not a `*.zarr`, or holds something else, or has been changed; if the model, its
            weights, `x` or the arguments are not those that the store was made with.
        RuntimeError: If another process is writing to it.
        OSError: If it cannot be written, as to a full disk. What is stored stays valid.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        function: str,
        model: Any,
        x: Any,
        batch_size: int | None,
        arguments: Mapping[str, Any],
    ):
        self._path = _checked_path(path)
        self._directory = _directory(self._path)
        self._source, self._expected = batches_of(x, batch_size)
        self.x, self.batch_size = self, None  # for `observe`
        self._model = model
        self._made_by = {"function": function, **arguments}
        self._batch_size = None if batch_size_of(x) is None else batch_size or batch_size_of(x)  # of arrays
        # What the record will say of batches that were given and are not yet appended.
        self._drawn: collections.deque[dict[str, Any]] = collections.deque()
        self._waiting: list[dict[str, xr.Dataset]] = []
        self._waiting_bytes = 0
        self._layout: dict[str, dict[Any, tuple]] = {}  # dimensions and lengths, by layer and variable
        self._found: dict[str, Any] = {}  # the record as the store has it
        self._record: dict[str, Any] = {}  # as it will be when all that waits is written
        self._done = 0  # samples on which the model need not run again
        self._written: dict[str, int] = {}  # rows, by layer

    def __enter__(self) -> "Store":
        try:
            if os.path.lexists(self._path):
                self._directory.take_lock()
                self._found = self._directory.read()
            # A model that goes on from what the last batch left in it can leave out no batch.
            if self._found.get("batches") and (self._found["complete"] or self._found["can_continue"]):
                self._directory.check(self._found)
                self._done = self._found["samples"]
        except BaseException:
            self._directory.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._directory.release()

    def __len__(self) -> int:
        if self._expected is None:
            raise TypeError("The number of batches is not known.")
        if not self._done:
            return self._expected
        done = self._done // self._batch_size if self._batch_size else self._found["batches"]
        return 1 if self._complete else max(self._expected - done, 0) + 1

    def __iter__(self) -> Iterator[tuple]:
        digest, first = _Digest(), None
        for data in self._source:
            size = size_of(data)
            digest.begin_batch(size)
            if first is None:
                first = data
                self._identify(data)
            stored = min(max(self._done - digest.samples, 0), size)  # of its samples
            if stored:
                digest.add(_samples(data, 0, stored))
                if digest.samples == self._done:
                    yield self._known(digest, first)
            if stored < size:
                data = _samples(data, stored, size)
                if self._complete:
                    raise ValueError(
                        f"`x` has more samples than the {self._done} that {self._path} was made of. Choose another "
                        "`store`, for all of them or for the new ones."
                    )
                digest.add(data)
                self._drawn.append(digest.entries())
                yield data
        if 0 < digest.samples < self._done:
            raise ValueError(
                f"`x` has {digest.samples} samples, fewer than the {self._done} in {self._path}. Choose another "
                "`store`."
            )

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows of each layer."""
        return self._record["rows"]

    @property
    def nan(self) -> dict[str, list[int]]:
        """Of each layer that has NaN: the number of rows that hold one, and the first of them."""
        return self._record["nan"]

    @property
    def _complete(self) -> bool:
        return bool(self._done and self._found["complete"])

    def append(
        self,
        batch: Batch,
        arrays: dict[str, Any],
        nan: dict[str, np.ndarray],
        labeled: Callable[[str, Any], xr.Dataset],
    ) -> None:
        """Adds what was made of the batch drawn last; see `results_of`.

        Raises:
            ValueError: If the batch has other variables, dimensions or lengths than the first, or if the results of the
                first are not those in the store.
        """
        drawn = self._drawn.popleft()
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
            self._record["can_continue"] = not batch.changes_state
        if layout != self._layout:
            raise ValueError(
                "All batches in a store must have the dimensions and lengths of the first, which are "
                f"{self._layout}. Received a batch with: {layout}"
            )
        for name in results:
            _count(self.rows, self.nan, name, nan[name])
        self._record |= {"batches": self._record["batches"] + 1, **drawn}
        self._waiting.append(results)
        self._waiting_bytes += sum(dataset.nbytes for dataset in results.values())
        if self._waiting_bytes >= _WRITTEN_AT_ONCE:
            self._write()

    def finish(self) -> None:
        """Writes what is waiting, and marks the store as complete."""
        if not self._complete:
            self._write()
            self._record["complete"] = True
            with self._explained():
                self._directory.finish(self._record)

    def open(self) -> dict[str, xr.Dataset]:
        """The results, which are read from the disk when they are used; in pieces, if Dask is installed."""
        datasets = {}
        for name, variables in self._layout.items():
            ((first_dimension, *_), _) = next(iter(variables.values()))
            numbers = {first_dimension: np.arange(self.rows[name])}
            datasets[name] = self._directory.open(self._record["layers"][name]).assign_coords(numbers)
        return datasets

    def _identify(self, data: tuple) -> None:
        """Makes sure that the store is of this call, or begins the record of a new one."""
        build_model(self._model, data)
        sample = _Digest()
        sample.add(_samples(data, 0, 1))
        weights = digest_of(weight.value for weight in self._model.weights)
        made_by = self._made_by | {"x": sample.entries()["data"], "weights": weights}
        if self._found.get("batches"):
            differing = [key for key in made_by if made_by[key] != self._found["made_by"].get(key)]
            if differing:
                raise ValueError(
                    f"{self._path} belongs to another call, which differs in: {', '.join(differing)}. Choose another "
                    "`store`, or delete this one."
                )
        if self._done:
            self._record = copy.deepcopy(self._found)
            self._written = dict(self.rows)
        else:
            self._record = {
                "made_by": made_by,
                "batches": 0,
                "samples": 0,
                "data": "",
                "sizes": "",
                "rows": {},
                "nan": {},
                "complete": False,
            }

    def _known(self, digest: "_Digest", first: tuple) -> tuple:
        """Samples that are stored, for `_compare`: all that are in the first batch."""
        drawn = digest.entries()
        if drawn["data"] != self._found["data"]:
            raise ValueError(
                f"`x` is not what {self._path} was made of: it differs somewhere in its first {self._done} samples. "
                "Shuffled data have another order each time, so turn shuffling off. For other data, choose another "
                "`store`."
            )
        if drawn["sizes"] != self._found["sizes"] and not self._found["can_continue"]:
            raise ValueError(
                f"{self._path} was made in batches of other sizes. The model's results for a batch depend on earlier "
                "batches, as with random numbers, so other sizes give other results. Give the `batch_size` of the "
                "first call, or choose another `store`."
            )
        self._drawn.append(drawn)
        return _samples(first, 0, min(size_of(first), self._done))

    def _compare(self, results: dict[str, xr.Dataset]) -> None:
        """The model is the one whose results are stored if it gives them again; its weights are not all of it."""
        tolerance = rounding_of(self._model)
        same = results.keys() == self.rows.keys()
        for name, dataset in results.items() if same else ():
            layer = self._record["layers"][name]
            same &= list(dataset.data_vars) == layer["variables"]
            for variable, array in dataset.data_vars.items() if same else ():
                stored = self._directory.first_rows(layer, str(variable), len(array))
                same &= stored.shape == array.shape
                if same and array.dtype.kind == "f":  # whole numbers, such as a rank, may jump where values are close
                    largest = np.nanmax(np.abs(stored), initial=0.0)
                    same &= np.allclose(stored, array, rtol=0, atol=tolerance * largest, equal_nan=True)
        if not same:
            raise ValueError(
                f"The model has the weights with which {self._path} was made, but gives other results for the first "
                "batch: its code or its settings have changed, or its outputs are random, or they depend on which "
                "samples are in a batch. Choose another `store`."
            )

    def _write(self) -> None:
        """Writes what is waiting, and after it the record, which makes it count."""
        if not self._waiting:
            return
        with self._explained():
            if not self._written:
                datasets = {name: _without_rows(dataset) for name, dataset in self._waiting[0].items()}
                self._directory.begin(self._found, self._record, datasets, self.rows)
            for name, variables in self._layout.items():
                rows = {
                    str(variable): np.concatenate([batch[name][variable].values for batch in self._waiting])
                    for variable in variables
                }
                self._directory.append(self._record["layers"][name], self._written.get(name, 0), rows)
            self._directory.write_record(self._record)
        self._written = dict(self.rows)
        self._waiting.clear()
        self._waiting_bytes = 0

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.add_note(
                f"{self._path} could not be written. What was stored in it is valid. When the cause is mended, the "
                "same call continues from there."
            )
            raise


class _Digest:
    """A hash of samples, which is the same in whatever batches they come, and one of the sizes of these batches."""

    def __init__(self) -> None:
        self.samples = 0
        self._inputs: list[Any] = []
        self._kinds: list[str] = []
        self._sizes = hashlib.sha256()

    def begin_batch(self, size: int) -> None:
        self._sizes.update(f"{size},".encode())

    def add(self, data: tuple) -> None:
        """Adds a batch, or a part of it."""
        self.samples += size_of(data)
        for number, tensor in enumerate(tree.flatten(data)):
            array = _backend.as_numpy(tensor)
            if number == len(self._inputs):
                self._inputs.append(hashlib.sha256())
                self._kinds.append("")
            kind = f"{array.shape[1:]} {array.dtype}"
            if kind != self._kinds[number]:
                self._inputs[number].update(kind.encode())
                self._kinds[number] = kind
            self._inputs[number].update(_bytes_of(array))

    def entries(self) -> dict[str, Any]:
        """For the record."""
        data = hashlib.sha256("".join(one.hexdigest() for one in self._inputs).encode())
        return {"samples": self.samples, "data": data.hexdigest(), "sizes": self._sizes.hexdigest()}


def _samples(data: tuple, start: int, stop: int) -> tuple:
    if (start, stop) == (0, size_of(data)):
        return data
    return tree.map_structure(lambda tensor: tensor[start:stop], data)


def _bytes_of(array: np.ndarray) -> bytes:
    if array.dtype.kind == "O":  # strings
        return "".join(f"{entry!r}," for entry in array.ravel()).encode()
    return array.tobytes()


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


def _directory(path: Path) -> Any:
    try:
        import zarr
        from packaging.version import Version  # comes with Zarr

        old = Version(zarr.__version__) < Version("3.1.3")
    except ImportError:
        old = True
    if old:
        raise ImportError(
            "`store` needs Zarr 3.1.3 or later. In a clone of this package's repository, install it with: "
            'pip install ".[store]"'
        )
    from kerasfactory.explain._engine.directory import Directory

    return Directory(path)


def digest_of(tensors: Any) -> str:
    """A hash of all values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = _backend.as_numpy(tensor)
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(_bytes_of(array))
    return digest.hexdigest()
