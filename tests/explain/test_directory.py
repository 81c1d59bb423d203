"""What lies on the disk in a store: nothing is lost, changed, deleted or written elsewhere without notice."""

import _thread
import asyncio
import errno
import itertools
import json
import operator
import os
import pickle
import shutil
import subprocess
import threading
import time
import uuid
from pathlib import Path

import keras
import numpy as np
import pytest
import xarray as xr

from kerasfactory.explain._engine import store as _store
from kerasfactory.explain._engine.observe import Batch

zarr = pytest.importorskip("zarr")
_directory = pytest.importorskip("kerasfactory.explain._engine.directory")
pytestmark = pytest.mark.backend_independent

X = np.random.default_rng(3).normal(size=(22, 5, 8)).astype("float32")
BATCH = Batch(6, 1, None, {}, {}, 0.0, changes_state=False)
NAMES = ("attention",)


class Killed(BaseException):
    """Not caught by anything between a write and the test."""


@pytest.fixture(scope="module")
def model():
    return keras.Sequential([keras.Input((5, 8)), keras.layers.Dense(1, kernel_initializer="ones")])


@pytest.fixture(scope="module")
def other_model():
    return keras.Sequential([keras.Input((5, 8)), keras.layers.Dense(1, kernel_initializer="zeros")])


@pytest.fixture(autouse=True)
def each_batch_is_written(monkeypatch):
    monkeypatch.setattr(_store, "_WRITTEN_AT_ONCE", 1)


def run(model, path, x=X, names=NAMES, before=None):
    """Stores something of every kind for each of `names`: numbers, whole numbers, names and attributes."""
    with _store.Store(path, "measured", model, x, 6 if isinstance(x, np.ndarray) else None, {}) as store:
        for data in store:
            (batch,) = (keras.ops.convert_to_numpy(array) for array in data)
            variables = {
                "scores": (("sample", "key"), batch[:, 0]),
                "top": (("sample",), batch[:, 1, 0].astype("int32")),
            }
            dataset = xr.Dataset(variables, {"key": list("abcdefgé")}, {"of": "x"})
            nan = np.zeros(len(batch), bool)
            store.append(BATCH, dict.fromkeys(names, dataset), dict.fromkeys(names, nan), lambda name, dataset: dataset)
        store.finish()
    return store.open()


def is_right(datasets, names=NAMES):
    right = xr.Dataset(
        {"scores": (("sample", "key"), X[:, 0]), "top": (("sample",), X[:, 1, 0].astype("int32"))},
        {"sample": np.arange(22), "key": list("abcdefgé")},
        {"of": "x"},
    )
    return list(datasets) == list(names) and all(dataset.compute().identical(right) for dataset in datasets.values())


def killed_at(monkeypatch, method, count, model, path):
    with monkeypatch.context() as patch:
        original, left = getattr(_directory.Directory, method), iter(range(count - 1))

        def counted(*arguments):
            if next(left, None) is None:
                raise Killed
            return original(*arguments)

        patch.setattr(_directory.Directory, method, counted)
        with pytest.raises(Killed):
            run(model, path)


# Where a run may have stopped: nothing is recorded yet, two of four batches are, all are.
STATES = {
    "begun": lambda monkeypatch, *run: killed_at(monkeypatch, "append", 1, *run),
    "unfinished": lambda monkeypatch, *run: killed_at(monkeypatch, "append", 3, *run),
    "finished": lambda _, *arguments: run(*arguments),
}


@pytest.fixture
def in_state(monkeypatch, model, tmp_path):
    def make(state, name="scores.zarr"):
        STATES[state](monkeypatch, model, tmp_path / name)
        return tmp_path / name

    return make


def tree(path):
    """All that is in a directory: files with their content, links with their target, folders."""
    return {
        str(file.relative_to(path)): os.readlink(file)
        if file.is_symlink()
        else file.read_bytes()
        if file.is_file()
        else None
        for file in sorted(path.rglob("*"))
    }


def is_free(path):
    lock = os.open(path, os.O_RDONLY)
    try:
        _directory.fcntl.flock(lock, _directory.fcntl.LOCK_EX | _directory.fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


needs_locks = pytest.mark.skipif(_directory.fcntl is None, reason="Windows has no such locks")


@pytest.mark.parametrize("of_the_same_model", [False, True])
@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_of_two_first_runs_the_later_leaves_the_other_alone(
    state, of_the_same_model, in_state, model, other_model, tmp_path, monkeypatch
):
    path, before = tmp_path / "scores.zarr", []

    def batches():
        monkeypatch.setattr(_store, "_WRITTEN_AT_ONCE", 1 << 20)
        yield X[:12]
        monkeypatch.setattr(_store, "_WRITTEN_AT_ONCE", 1)
        in_state(state)
        if state == "finished":
            lazy.update(run(model, path))
        before.append(tree(path))
        yield X[12:]

    lazy = {}
    with pytest.raises(
        RuntimeError, match=r"has written to .*scores\.zarr since this call began. Its results are kept"
    ):
        run(model if of_the_same_model else other_model, tmp_path / "scores.zarr", batches())
    assert [tree(path)] == before
    assert state == "unfinished" or is_right(lazy)
    assert is_right(run(model, tmp_path / "scores.zarr"))


def test_a_directory_that_is_replaced_while_it_is_written_is_left_alone(model, other_model, tmp_path):
    path = tmp_path / "scores.zarr"

    def batches():
        yield X[:12]
        shutil.rmtree(path)
        lazy.append(run(model, path))
        yield X[12:]

    lazy = []
    with pytest.raises(RuntimeError, match="was deleted or replaced while this call was using it"):
        run(other_model, path, batches())
    assert is_right(*lazy)
    with pytest.raises(RuntimeError, match="was deleted or replaced while this call was using it"):
        run(
            model,
            tmp_path / "gone.zarr",
            (X[:6] if not shutil.rmtree(tmp_path / "gone.zarr", number < 2) else 0 for number in range(3)),
        )


def raising(error):
    yield X[:6]
    raise error


DAMAGED = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "deep": b"[" * 200_000,
    "a number": b'{"kerasfactory": 3}',
    "a list": b'{"kerasfactory": []}',
    "other types": b'{"kerasfactory": {"format": 2, "batches": "x", "layers": 3}}',
    "empty": b"",
    "of an earlier version": b'{"kerasfactory": {"made_by": {}, "batches": 3, "can_continue": true}}',
}


@needs_locks
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_record_is_refused_and_does_not_keep_the_lock(damage, in_state, model):
    path = in_state("finished")
    intact = (path / ".zattrs").read_bytes()
    (path / ".zattrs").write_bytes(DAMAGED[damage])
    before = tree(path)
    message = "by an earlier version of this package, without checksums" if "earlier" in damage else "Delete the store"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            run(model, path)
        assert is_free(path)
    assert tree(path) == before
    (path / ".zattrs").write_bytes(intact)
    assert is_right(run(model, path))


@needs_locks
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ZeroDivisionError(), MemoryError()], ids=repr)
def test_whatever_ends_a_run_lets_go_of_the_lock(error, in_state, model, tmp_path):
    for path in (tmp_path / "new.zarr", in_state("unfinished")):
        with pytest.raises(type(error)):
            run(model, path, raising(error))
        assert not path.exists() or is_free(path)
    assert is_right(run(model, path))


@needs_locks
def test_a_copy_of_the_lock_in_a_child_does_not_keep_it(tmp_path):
    directory = _directory.Directory(tmp_path)
    directory.take_lock()
    copy = os.dup(directory._lock)  # as a fork makes one
    assert not is_free(tmp_path)
    directory.release()
    assert is_free(tmp_path)
    os.close(copy)


def test_after_an_interrupt_no_write_is_under_way(model, tmp_path, monkeypatch):
    path = tmp_path / "scores.zarr"

    def slow():  # called while a file is written, by a thread of Zarr's
        if threading.current_thread() is not threading.main_thread() and not slow.interrupted:
            slow.interrupted = True
            _thread.interrupt_main()
            time.sleep(0.3)
        return uuid4()

    slow.interrupted, uuid4 = False, uuid.uuid4
    monkeypatch.setattr(_directory.uuid, "uuid4", slow)
    with pytest.raises(KeyboardInterrupt):
        run(model, path)
    before = tree(path)
    time.sleep(0.4)
    assert tree(path) == before
    assert is_right(run(model, path))


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_a_lost_file_is_an_error(state, in_state, model):
    path = in_state(state)
    lost = [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in lost:
        content = file.read_bytes()
        file.unlink()
        before = tree(path)
        with pytest.raises(ValueError, match=r"Delete the store|holds what this package did not store"):
            run(model, path)
        assert tree(path) == before, "a store that is damaged is not changed"
        file.write_bytes(content)
    assert len(lost) > 14
    assert is_right(run(model, path))


@pytest.mark.parametrize("dask", [True, False])
def test_a_file_that_is_lost_or_changes_later_is_an_error_when_it_is_read(dask, in_state, model, monkeypatch):
    def no_dask(*arguments, **keywords):
        raise ImportError

    path = in_state("finished")
    if not dask:
        monkeypatch.setattr("xarray.backends.zarr.guess_chunkmanager", no_dask)
    chunks = [file for file in sorted(path.rglob("[0-9]*")) if file.is_file() and file.parent.name != "key"]
    assert len(chunks) == 8
    for file in chunks:
        lazy, content = run(model, path), file.read_bytes()
        for changed in (None, b"", content[:-1], flipped(content, 3), flipped(content, len(content) - 1)):
            file.unlink() if changed is None else file.write_bytes(changed)
            with pytest.raises(ValueError, match="is missing" if changed is None else "does not have the checksum"):
                is_right(lazy)
        file.write_bytes(content)
    assert is_right(run(model, path))


def flipped(content, number):
    return content[:number] + bytes([content[number] ^ 1 << number % 8]) + content[number + 1 :]


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_a_flipped_bit_is_an_error_or_changes_nothing(state, in_state, model, tmp_path):
    intact, path = in_state(state, "intact.zarr"), tmp_path / "scores.zarr"
    rng = np.random.default_rng(0)
    noticed = []
    for file in sorted(intact.rglob("*")):
        if file.is_file():
            for number in rng.integers(file.stat().st_size, size=2):
                shutil.copytree(intact, path)
                (path / file.relative_to(intact)).write_bytes(flipped(file.read_bytes(), number))
                try:
                    assert is_right(run(model, path)), (file, number)
                    noticed.append(0)
                except ValueError:
                    noticed.append(1)
                shutil.rmtree(path)
    assert np.mean(noticed) > 0.5


def test_others_notice_flipped_bits_too(in_state):
    path = in_state("finished")
    (path / "attention" / "scores" / "1.0").write_bytes(
        flipped((path / "attention" / "scores" / "1.0").read_bytes(), 9)
    )
    dataset = xr.open_zarr(path, group="attention")
    np.testing.assert_array_equal(dataset["scores"][12:], X[12:, 0])
    with pytest.raises(RuntimeError, match="crc32 checksum do not match"):
        dataset.compute()


def test_a_chunk_of_nothing_but_the_fill_value_is_there(model, tmp_path):
    x = X.copy()
    x[:, 0], x[:, 1] = np.nan, 0
    for _ in range(2):
        datasets = run(model, tmp_path / "scores.zarr", x)
    assert np.isnan(datasets["attention"]["scores"]).all()
    assert not datasets["attention"]["top"].any()


def test_two_stores_with_one_name_are_two_to_dask(model, other_model, tmp_path):
    pytest.importorskip("dask")
    names = []
    for one in (model, other_model):
        dataset = run(one, tmp_path / "scores.zarr")["attention"]
        assert pickle.loads(pickle.dumps(dataset)).identical(dataset)
        names.append(dataset["scores"].data.name)
        shutil.rmtree(tmp_path / "scores.zarr")
    assert len(set(names)) == 2


FOREIGN = [
    "download.partial/half.bin",
    "attention.partial",
    ".zattrs.partial",
    ".zattrs.0123456789abcdef0123456789abcdef.partial",
    "notes.txt",
    "7 notes/0.0",
    "mine/.zgroup",
]


@pytest.mark.parametrize("state", ["begun", "unfinished", "finished"])
def test_what_is_not_ours_stays(state, in_state, model, other_model):
    path = in_state(state)
    within = ["attention/notes.txt", "attention/scores/notes.txt", "attention/scores/backup/0.0"]
    for name in FOREIGN + within:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("not ours")
    if state == "begun":  # the group is to be made again, and there is something in it
        with pytest.raises(ValueError, match=r"holds what this package did not store: attention\. Choose another"):
            run(model, path)
    else:
        assert is_right(run(model, path))
    assert {(path / name).read_text() for name in FOREIGN + within} == {"not ours"}
    if state == "begun":
        for name in within:
            (path / name).unlink()
        shutil.rmtree(path / "attention")
        assert is_right(run(other_model, path))
        assert {(path / name).read_text() for name in FOREIGN} == {"not ours"}


def test_zarr_writes_and_deletes_by_our_methods_only(tmp_path):
    files = _directory.WrittenFiles(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("not ours")
    for method in (files.clear(), files.delete_dir("folder"), files.delete("folder")):
        with pytest.raises((ValueError, OSError)):
            asyncio.run(method)
    assert tree(tmp_path) == {"folder": None, "folder/notes.txt": b"not ours"}
    files.stop()
    for method in (
        files.set("late", zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(b"late")),
        files.delete("folder/notes.txt"),
    ):
        with pytest.raises(RuntimeError, match="The run that should have written this file has ended"):
            asyncio.run(method)
    assert tree(tmp_path) == {"folder": None, "folder/notes.txt": b"not ours"}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_with_something_in_it_is_not_taken(name, model, tmp_path):
    (tmp_path / "scores.zarr" / name).parent.mkdir(parents=True)
    (tmp_path / "scores.zarr" / name).write_text("not ours")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="holds what this package did not store"):
        run(model, tmp_path / "scores.zarr")
    assert tree(tmp_path) == before


def test_what_another_call_had_begun_is_deleted_wholly(in_state, other_model, tmp_path):
    path = in_state("begun")
    names = ("other",)
    assert is_right(run(other_model, path, names=names), names)
    assert sorted(file.name for file in path.iterdir()) == [".zattrs", ".zgroup", ".zmetadata", "other"]


HOSTILE = [
    *("..", ".", "", " ", "/", "a/b", "a\\b", "../../victim", ".zattrs", ".zgroup", "zarr.json", "__init__", "_", "__"),
    *(
        "a" * 300,
        "a" * 299 + "b",
        "Attention",
        "attention",
        "ATTENTION",
        "é",
        "e\u0301",
        "\udc80",
        "nul\0",
        "\0",
        "CON",
        "a.",
    ),
    *(
        "com1.txt",
        "0",
        "0.0",
        "%2E%2E",
        "a%2Fb",
        "a b",
        "a\nb",
        "\u202e",
        "\u200b",
        "🙂",
        "c:",
        "*?<>|",
        "~",
        "layer#2",
    ),
]


def test_layers_may_have_any_name(model, tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "_WRITTEN_AT_ONCE", 1 << 20)
    for _ in range(2):
        assert is_right(run(model, tmp_path / "scores.zarr", names=HOSTILE), HOSTILE)
    groups = _directory.group_names(HOSTILE)
    assert len({group.casefold() for group in groups}) == len(HOSTILE)
    assert all(len(group) <= 100 and set(group) <= set(PLAIN) and not group.startswith(("__", ".")) for group in groups)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.zarr"}
    of_zarr = {".zattrs", ".zgroup", ".zmetadata"}
    assert {path.name for path in (tmp_path / "scores.zarr").iterdir()} == of_zarr | set(groups)


PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-#%"


def test_usual_names_stay_as_they_are():
    names = ["attention", "multi_head_attention_1", "attention#2", "encoder-3", "Attention2"]
    assert _directory.group_names(names) == names


LINKED = [
    *(".", ".zattrs", ".zgroup", "attention", "attention/.zattrs", "attention/.zgroup", "attention/scores"),
    *("attention/scores/.zarray", "attention/scores/.zattrs", "attention/scores/0.0", "attention/scores/1.0"),
    *("attention/scores/9.0", "attention/key/0", "link", "attention/link"),
]


@pytest.mark.parametrize("state", ["begun", "unfinished", "finished"])
def test_nothing_is_written_through_a_link(state, in_state, model, tmp_path):
    intact, path, victim = in_state(state, "intact.zarr"), tmp_path / "scores.zarr", tmp_path / "victim"
    for name in LINKED:
        shutil.copytree(intact, path)
        if (path / name).exists():
            (path / name).rename(victim)
        else:
            victim.mkdir()
        (path / name).symlink_to(victim)
        before = tree(tmp_path)
        with pytest.raises(
            ValueError, match="is a symbolic link, and a store is neither read nor written through links"
        ):
            run(model, path)
        assert tree(tmp_path) == before
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()


@pytest.mark.parametrize("name", [".", ".zattrs", ".zgroup", "attention"])
def test_a_link_is_not_followed_by_a_first_run(name, model, tmp_path):
    path, victim = tmp_path / "scores.zarr", tmp_path / "victim"
    for exists in (False, True):
        if name != ".":
            path.mkdir()
        (path / name).symlink_to(victim)
        before = tree(tmp_path)
        with pytest.raises(ValueError, match="is a symbolic link"):
            run(model, path)
        assert tree(tmp_path) == before
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
        victim.mkdir(exist_ok=exists)


def test_a_link_that_is_made_while_a_store_is_written_is_not_followed(model, tmp_path):
    path, victim = tmp_path / "scores.zarr", tmp_path / "victim"

    def batches():
        yield X[:6]
        (path / "attention").rename(victim)
        (path / "attention").symlink_to(victim)
        before.append(tree(victim))
        yield X[6:]

    before = []
    with pytest.raises(ValueError, match="is a symbolic link"):
        run(model, path, batches())
    assert [tree(victim)] == before


def test_a_record_that_names_other_places_is_refused(in_state, model, tmp_path):
    path = in_state("begun")
    (tmp_path / "victim" / "scores").mkdir(parents=True)
    (tmp_path / "victim" / "scores" / "0.0").write_text("not ours")
    record = json.loads((path / ".zattrs").read_text())["kerasfactory"]
    del record["sha256"]
    for change in ({"group": "../victim"}, {"variables": ["../../victim/scores"]}):
        forged = record | {"layers": {"attention": record["layers"]["attention"] | change}}
        content = {"kerasfactory": forged | {"sha256": _directory._digest(forged)}}
        (path / ".zattrs").write_text(json.dumps(content))
        before = tree(tmp_path)
        with pytest.raises(ValueError, match="lists other places than this package writes to"):
            run(model, path)
        assert tree(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_what_is_no_file_is_not_waited_for(in_state, model):
    path = in_state("finished")
    for name in (".zattrs", "attention/scores/0.0", "attention/.zattrs"):
        content = (path / name).read_bytes()
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(ValueError, match="is no file, and this package did not make it"):
            run(model, path)
        (path / name).unlink()
        (path / name).write_bytes(content)


def test_a_disk_that_fails_at_any_write_loses_nothing(model, tmp_path, monkeypatch):
    run(model, tmp_path / "undisturbed.zarr")
    undisturbed, write = tree(tmp_path / "undisturbed.zarr"), Path.write_bytes
    for count in range(1000):
        path, left = tmp_path / f"{count}.zarr", itertools.repeat(None, count)
        number = [errno.ENOSPC, errno.EROFS, errno.EACCES][count % 3]

        def failing(self, content, left=left, number=number):
            if operator.length_hint(left):
                next(left)
                return write(self, content)
            write(self, content[: len(content) // 2])
            raise OSError(number, os.strerror(number), str(self))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", failing)
            error = failure_of(model, path)
        if error is None:
            break
        assert error.errno == number
        assert not [name for name in tree(path) if name.endswith(".kerasfactory")]
        assert is_right(run(model, path))
        assert tree(path) == undisturbed
    assert count > 40


def failure_of(model, path):
    """The error of a run that cannot write, and says what that means."""
    try:
        run(model, path)
    except OSError as error:
        return error if "What was stored in it is valid" in error.__notes__[0] else None


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system, or mounts it again with other options."""
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("mount"):
        pytest.skip("needs to be root")
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("needs to be allowed to mount")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True)


def test_a_disk_that_is_full_and_one_that_is_read_only(mounted, model):
    folder = mounted("size=40k")
    path, sizes, failures = folder / "scores.zarr", iter(range(60, 1000, 20)), []
    for _ in range(100):
        error = failure_of(model, path)
        if error is None:
            break
        failures.append(error.errno)
        mounted("remount,ro")
        assert failure_of(model, path).errno == errno.EROFS
        mounted(f"remount,rw,size={next(sizes)}k")
    assert len(failures) > 2
    assert set(failures) == {errno.ENOSPC}
    mounted("remount,ro")
    assert is_right(run(model, path))
