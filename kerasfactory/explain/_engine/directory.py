r"""A directory in Zarr's format 2 in which nothing is lost, changed or another's without notice.

It holds a group for each layer, in it an array for each variable, and a record in the root's attributes. These rules
make it one to rely on; `Store` says what they are for.

- Each file is written beside its place and renamed. After a kill it is the old one or the new one.
- One process writes, which holds a lock on the directory. The record is read, and what it lists is looked for, under
  that lock. No write of a run comes after its lock is released.
- Each chunk ends in a checksum (CRC-32), which is compared whenever the chunk is read, by all readers of Zarr. A chunk
  that is missing is an error to those that are opened here; to others it is NaN, or 0 where the numbers are whole.
  The record holds checksums of itself and of Zarr's metadata.
- Files are deleted by their names: chunks, metadata and parts of files, in the places that the record lists. All else
  is left alone, and nothing is read or written through a symbolic link.
"""

import asyncio
import hashlib
import itertools
import json
import os
import re
import threading
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import xarray as xr
import zarr
from numcodecs import CRC32, Zstd
from zarr.storage import LocalStore, WrapperStore

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_RECORD = "kerasfactory"
_FORMAT = 2  # the first had no checksums
_GROUP = {"zarr_format": 2}
_LARGEST_CHUNK = 64 << 20  # readers hold whole chunks, and no codec takes 2 GiB
_CHUNK = re.compile(r"\d+(\.\d+)*")
_FILE = re.compile(rf"\.z(group|array|attrs|metadata)|{_CHUNK.pattern}")
_PART = re.compile(rf"({_FILE.pattern})\.[0-9a-f]{{32}}\.kerasfactory")  # of a file that is being written
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows


class Directory:
    """The directory `path`, which need not exist yet."""

    def __init__(self, path: Path):
        self.path = path
        self._files = WrittenFiles(path)
        self._lock: int | None = None

    def take_lock(self) -> None:
        """Two that write would undo each other's work; one that was killed has let go of its lock."""
        if fcntl is None or self._lock is not None:
            return
        self._check_no_link(self.path)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_lock()
        except BlockingIOError:
            self.release()
            raise RuntimeError(
                f"Another process or thread is writing to {self.path}. Wait until it has finished, or choose another "
                "`store`."
            ) from None
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Lets go of the lock as soon as no write is under way; none begins afterward."""
        self._files.stop()
        lock, self._lock = self._lock, None
        if lock is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a fork's copy of it would hold it
            finally:
                os.close(lock)

    def read(self) -> dict[str, Any]:
        """The record; empty if there is none, because nothing has been written yet."""
        if not os.path.lexists(self.path):
            return {}
        self._check_no_link(self.path)
        names = self._names("")
        attributes = self._json(".zattrs") if ".zattrs" in names else {}
        record = attributes.get(_RECORD) if isinstance(attributes, dict) else None
        if record is None:
            # The first moments leave no more than this.
            others = sorted(name for name in names if name != ".zgroup" and not _PART.fullmatch(name))
            if others:
                raise self._foreign(others)
            return {}
        if isinstance(record, dict) and "format" not in record:
            raise ValueError(
                f"{self.path} was made by an earlier version of this package, without checksums, and is not continued. "
                "`xarray.open_zarr(store, group=layer)` reads what is in it. Choose another `store`, or delete this "
                "one."
            )
        if not isinstance(record, dict) or record.pop("sha256", None) != _digest(record):
            raise _damaged(self.path / ".zattrs", "does not have the checksum that is written in it")
        version = record.pop("format")
        if version != _FORMAT:
            raise ValueError(
                f"{self.path} has format {version}, and this version of the package writes format {_FORMAT}. Choose "
                "another `store`, or use the version that wrote it."
            )
        layers = record.get("layers", {})
        groups = [layer["group"] for layer in layers.values()]
        if groups != group_names(layers) or not all(
            name.isidentifier() for one in layers.values() for name in _arrays(one)
        ):
            raise _damaged(self.path / ".zattrs", "lists other places than this package writes to")
        return record

    def check(self, record: dict[str, Any]) -> None:
        """Makes sure that all is there that the record lists: metadata as they were, and all chunks."""
        if self._json(".zgroup") != _GROUP:
            raise _damaged(self.path / ".zgroup", "is not what was written")
        if record["complete"] and self._json(".zmetadata") != self._metadata_of_all(record):
            raise _damaged(self.path / ".zmetadata", "is not what was written")
        for name, layer in record["layers"].items():
            metadata = self._metadata(layer)
            if _digest_of_metadata(layer, metadata) != layer["metadata"]:
                raise _damaged(self.path / layer["group"], "has other metadata than were written")
            if record["complete"] and self._json(f"{layer['group']}/.zmetadata") != _consolidated(metadata):
                raise _damaged(self.path / layer["group"] / ".zmetadata", "is not what was written")
            for array in _arrays(layer):
                shape, chunks = (metadata[f"{array}/.zarray"][key] for key in ("shape", "chunks"))
                rows = record["rows"][name]
                if array in layer["variables"]:
                    if record["complete"] and shape[0] != rows:
                        raise _damaged(self.path / layer["group"] / array, f"has {shape[0]} rows instead of {rows}")
                    shape = [rows, *shape[1:]]  # a killed run may have made room for more
                numbers = (range(-(-length // chunk)) for length, chunk in zip(shape, chunks, strict=True))
                expected = (".".join(map(str, chunk)) or "0" for chunk in itertools.product(*numbers))
                lost = sorted(set(expected) - self._names(f"{layer['group']}/{array}"))
                if lost:
                    raise _damaged(
                        self.path / layer["group"] / array, f"has lost {len(lost)} of its files, such as {lost[0]}"
                    )
            if record["complete"] and self._digest_of_chunks(layer) != layer["chunks"]:
                raise _damaged(self.path / layer["group"], "has other files, or in another order, than were written")

    def begin(
        self, found: dict[str, Any], record: dict[str, Any], datasets: Mapping[str, xr.Dataset], rows: Mapping[str, int]
    ) -> None:
        """Makes arrays without rows, with their dimensions, coordinates and attributes, and adds them to the record.

        Args:
            found: The record that the directory must still have. What it lists is deleted.
            record: The new one.
            datasets: By layer: its variables, without rows.
            rows: By layer: how many make a chunk.
        """
        self._check_no_link(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.take_lock()
        if self.read() != found:
            raise RuntimeError(
                f"Another process or thread has written to {self.path} since this call began. Its results are kept. "
                "Make the call again, or choose another `store`."
            )
        self._clear(found)
        layers: dict[str, dict[str, Any]] = {
            name: {"group": group, "variables": list(dataset.data_vars), "coordinates": list(dataset.coords)}
            for (name, dataset), group in zip(datasets.items(), group_names(datasets), strict=True)
        }
        others = [layer["group"] for layer in layers.values() if os.path.lexists(self.path / layer["group"])]
        if others:
            raise self._foreign(others)
        self._write_json(".zgroup", _GROUP)
        self.write_record(record | {"batches": 0, "layers": layers})
        for name, dataset in datasets.items():
            # The checksum comes last: it is of what lies on the disk.
            encoding: dict[Any, Any] = {
                variable: {"compressors": CRC32()} | ({} if array.dtype.kind == "O" else {"filters": [Zstd()]})
                for variable, array in dataset.variables.items()
            }
            for variable, array in dataset.data_vars.items():
                encoding[variable]["chunks"] = _chunks((rows[name], *array.shape[1:]), array.dtype.itemsize)
            dataset.to_zarr(
                self._files,
                mode="a",
                group=layers[name]["group"],
                encoding=encoding,
                consolidated=False,
                zarr_format=2,
                write_empty_chunks=True,
            )
            layers[name]["metadata"] = _digest_of_metadata(layers[name], self._metadata(layers[name]))
        record["layers"] = layers

    def append(self, layer: dict[str, Any], start: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes rows from `start` on; what was there after it is gone."""
        self._check_lock()
        for variable, rows in arrays.items():
            for folder in (layer["group"], f"{layer['group']}/{variable}"):
                self._check_no_link(self.path / folder)
            array = self._array(self._files, layer, variable)
            array.resize((start + len(rows), *rows.shape[1:]))
            array[start:] = rows

    def finish(self, record: dict[str, Any]) -> None:
        """Takes away what is left of killed runs, and marks the store as complete."""
        self._check_lock()
        for name, layer in record["layers"].items():
            for variable in layer["variables"]:  # a killed run may have begun on a batch that `x` has no more
                array = self._array(self._files, layer, variable)
                array.resize((record["rows"][name], *array.shape[1:]))
            self._write_json(f"{layer['group']}/.zmetadata", _consolidated(self._metadata(layer)))
            layer["chunks"] = self._digest_of_chunks(layer)
        for folder in ["", *(folder for layer in record["layers"].values() for folder in _folders(layer))]:
            for name in self._names(folder):
                if _PART.fullmatch(name):
                    (self.path / folder / name).unlink()
        self._write_json(".zmetadata", self._metadata_of_all(record))  # without it, opening takes xarray long
        self.write_record(record)

    def write_record(self, record: dict[str, Any]) -> None:
        self._check_lock()
        self._write_json(".zattrs", _attributes(record))

    def first_rows(self, layer: dict[str, Any], variable: str, rows: int) -> np.ndarray:
        """The first rows of a variable, in the shape and type that they have in the store."""
        return self._array(Files(self.path), layer, variable)[:rows]

    def open(self, layer: dict[str, Any]) -> xr.Dataset:
        """What is stored of a layer, read when it is used."""
        return xr.open_zarr(Files(self.path), group=layer["group"])

    def _array(self, files: "Files", layer: dict[str, Any], variable: str) -> Any:
        mode: Any = "r" if files.read_only else "r+"
        array: Any = zarr.open_array(files, path=f"{layer['group']}/{variable}", mode=mode, zarr_format=2)
        # Chunks that hold only the fill value are written too. Otherwise they could not be told from lost ones.
        config: Any = {"order": "C", "write_empty_chunks": True}
        return zarr.Array(zarr.AsyncArray(array.metadata, array.store_path, config))

    def _names(self, folder: str) -> set[str]:
        """What is in a folder of ours, where nothing may be a link, and nothing else than a file have a file's name."""
        try:
            with os.scandir(self.path / folder) as entries:
                names = set()
                for entry in entries:
                    if entry.is_symlink():
                        raise _link(entry.path)
                    if _is_ours(entry.name) and not entry.is_file():
                        raise ValueError(
                            f"{entry.path} is no file, and this package did not make it. Move it out of the store, or "
                            "choose another `store`."
                        )
                    names.add(entry.name)
                return names
        except (FileNotFoundError, NotADirectoryError):
            raise _damaged(self.path / folder, "is missing, or no folder") from None

    def _metadata(self, layer: dict[str, Any]) -> dict[str, Any]:
        """Zarr's metadata of a layer, by the files that hold them."""
        for folder in _folders(layer):
            self._names(folder)
        files = [".zattrs", ".zgroup", *(f"{a}/{file}" for a in _arrays(layer) for file in (".zarray", ".zattrs"))]
        return {file: self._json(f"{layer['group']}/{file}") for file in files}

    def _metadata_of_all(self, record: dict[str, Any]) -> dict[str, Any]:
        metadata = {".zattrs": _attributes(record), ".zgroup": self._json(".zgroup")}
        for layer in record["layers"].values():
            metadata |= {f"{layer['group']}/{file}": content for file, content in self._metadata(layer).items()}
        return _consolidated(metadata)

    def _digest_of_chunks(self, layer: dict[str, Any]) -> str:
        """Of the checksums, with which the files end: each is right for its own file, wherever that is."""
        checksums = {}
        for array in _arrays(layer):
            folder = f"{layer['group']}/{array}"
            for name in filter(_CHUNK.fullmatch, sorted(self._names(folder))):
                with open(self.path / folder / name, "rb") as chunk:
                    chunk.seek(-min(4, os.fstat(chunk.fileno()).st_size), os.SEEK_END)
                    checksums[f"{array}/{name}"] = chunk.read().hex()
        return _digest(checksums)

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_bytes())
        except (ValueError, RecursionError):
            raise _damaged(self.path / name, "is not JSON") from None
        except FileNotFoundError:
            raise _damaged(self.path / name, "is missing") from None

    def _write_json(self, name: str, content: Any) -> None:
        self._files.write(name, json.dumps(content, indent=2).encode())

    def _clear(self, record: dict[str, Any]) -> None:
        """Deletes our files of the layers in a record, and the folders that are empty then."""
        folders = [folder for layer in record.get("layers", {}).values() for folder in reversed(_folders(layer))]
        there = {folder: self._names(folder) for folder in folders if os.path.lexists(self.path / folder)}
        (self.path / ".zmetadata").unlink(missing_ok=True)
        for folder, names in there.items():
            for name in filter(_is_ours, names):
                (self.path / folder / name).unlink()
            if not any((self.path / folder).iterdir()):
                (self.path / folder).rmdir()

    def _foreign(self, names: list[str]) -> ValueError:
        return ValueError(
            f"{self.path} holds what this package did not store: {', '.join(names[:3])}. Choose another `store`."
        )

    def _check_no_link(self, path: Path) -> None:
        if path.is_symlink():
            raise _link(path)

    def _check_lock(self) -> None:
        """The lock is of the directory that had this name when it was taken."""
        if self._lock is not None:
            try:
                same = os.path.samestat(os.fstat(self._lock), os.stat(self.path, follow_symlinks=False))
            except FileNotFoundError:
                same = False
            if not same:
                raise RuntimeError(
                    f"{self.path} was deleted or replaced while this call was using it. Make the call again."
                )


class Files(WrapperStore[LocalStore]):
    """Files as Zarr reads them: what is lost or has changed is an error."""

    def __init__(self, path: Path):
        super().__init__(LocalStore(path, read_only=True))
        self.path = path

    def _with_store(self, store: LocalStore) -> "Files":
        return self

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    def __dask_tokenize__(self) -> tuple:
        # Of two stores that had one name, one after the other, Dask must not take the one for the other.
        return str(self.path), (self.path / ".zattrs").read_bytes()

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        value = await super().get(key, prototype, byte_range)
        if _CHUNK.fullmatch(key.rpartition("/")[2]):
            if value is None:
                self._is_missing(key)
            else:
                try:
                    CRC32().decode(value.to_bytes())
                except (RuntimeError, ValueError):
                    raise _damaged(self.path / key, "does not have the checksum that is written in it") from None
        return value

    def _is_missing(self, key: str) -> None:
        raise _damaged(self.path / key, "is missing")


class WrittenFiles(Files):
    """Files as Zarr writes them: one at a time, and none after `stop`."""

    def __init__(self, path: Path):
        super().__init__(path)  # whatever is not written by the methods below is not written
        self._one_at_a_time = threading.Lock()
        self._stopped = False

    @property
    def read_only(self) -> bool:
        return False

    def stop(self) -> None:
        with self._one_at_a_time:
            self._stopped = True

    def write(self, name: str, content: bytes) -> None:
        """Writes a file beside its place, and renames it."""
        path = self.path / name
        with self._one_at_a_time:
            self._check_not_stopped()
            path.parent.mkdir(exist_ok=True)
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.kerasfactory")
            try:
                partial.write_bytes(content)
                partial.replace(path)
            except Exception:
                partial.unlink(missing_ok=True)
                raise

    async def set(self, key: str, value: Any) -> None:
        await asyncio.to_thread(self.write, key, value.to_bytes())

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        if not await self.exists(key):
            await self.set(key, value)

    async def delete(self, key: str) -> None:
        with self._one_at_a_time:
            self._check_not_stopped()
            (self.path / key).unlink(missing_ok=True)

    def _is_missing(self, key: str) -> None:
        pass  # not written yet: whether it should be there was checked

    def _check_not_stopped(self) -> None:
        if self._stopped:
            raise RuntimeError("The run that should have written this file has ended.")


def group_names(names: Iterable[str]) -> list[str]:
    """A name for the group of each layer that all file systems take: the layer's own, or one that is made of it.

    Percent signs stand for what is not a letter, digit, `-`, `_` or `#`, and for a first `_` if another follows, as in
    addresses. A name that is long, reserved, a number, or another's in other letters ends in a part of its SHA-256.
    """
    groups: dict[str, None] = {}
    for name in names:
        group = quote(name, safe="#", errors="surrogatepass").replace(".", "%2E").replace("~", "%7E")
        group = "%5F" + group[1:] if group.startswith("__") else group
        taken = group.casefold() in map(str.casefold, groups)
        if not group or taken or len(group) > 100 or _RESERVED.fullmatch(group) or _FILE.fullmatch(group):
            group = f"{group[:64]}%{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"
        groups[group] = None
    return list(groups)


def _is_ours(name: str) -> bool:
    return bool(_FILE.fullmatch(name) or _PART.fullmatch(name))


def _arrays(layer: dict[str, Any]) -> list[str]:
    return sorted([*layer["variables"], *layer["coordinates"]])


def _folders(layer: dict[str, Any]) -> list[str]:
    return [layer["group"], *(f"{layer['group']}/{array}" for array in _arrays(layer))]


def _attributes(record: dict[str, Any]) -> dict[str, Any]:
    record = {"format": _FORMAT, **record}
    return {_RECORD: record | {"sha256": _digest(record)}}


def _consolidated(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": metadata, "zarr_consolidated_format": 1}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest_of_metadata(layer: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Of all but the number of rows, which grows."""
    fixed = dict(metadata)
    for variable in layer["variables"]:
        try:
            array = fixed[f"{variable}/.zarray"]
            fixed[f"{variable}/.zarray"] = array | {"shape": array["shape"][1:]}
        except (TypeError, KeyError):
            return "none"
    return _digest(fixed)


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape, with its first dimensions halved until it is small enough for readers."""
    chunks = list(shape)
    while np.prod(chunks, dtype=float) * itemsize > _LARGEST_CHUNK:
        axis = next(axis for axis, length in enumerate(chunks) if length > 1)
        chunks[axis] = -(-chunks[axis] // 2)
    return tuple(chunks)


def _link(path: Any) -> ValueError:
    return ValueError(
        f"{path} is a symbolic link, and a store is neither read nor written through links. Remove it, or give the "
        "place itself as `store`."
    )


def _damaged(path: Any, what: str) -> ValueError:
    return ValueError(
        f"{path} {what}. Something other than this package has changed the store. Delete the store and make it again, "
        "or take it from a copy."
    )
