"""`capture(..., store=)`: the same scores on disk, whatever happens to the process that writes them."""

import functools
import json
import os
import random
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers, ops

from kerasfactory import explain
from kerasfactory.explain._engine import directory
from kerasfactory.explain._engine import store as _store
from kerasfactory.explain._engine.observe import Batch

zarr = pytest.importorskip("zarr")
_directory = pytest.importorskip("kerasfactory.explain._engine.directory")
BACKEND = keras.config.backend()
X = np.random.default_rng(3).normal(size=(22, 5, 8)).astype("float32")  # three batches of 6 and one of 4
NAMES = ["a", "b", "c", "d", "é"]


@keras.saving.register_keras_serializable("tests")
class NextRandom(layers.Layer):
    """What it does to a batch depends on those before."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x):
        return x + keras.random.normal(ops.shape(x), seed=self.seed_generator, dtype=x.dtype)


def two_layers(*before):
    keras.utils.set_random_seed(5)
    inputs = x = keras.Input((5, 8))
    for layer in before:
        x = layer(x)
    attention = layers.MultiHeadAttention(2, 4, dropout=0.1, name="twice")
    x = attention(attention(x, x), x)
    x = layers.MultiHeadAttention(2, 4, name="last")(x[:, :3], x)
    return keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(x)))


@pytest.fixture(scope="module")
def model():
    return two_layers()


@pytest.fixture(scope="module")
def expected(model):
    return explain.capture(model, X, feature_names=NAMES, batch_size=6, verbose=0)


@pytest.fixture
def each_batch_is_written(monkeypatch):
    monkeypatch.setattr(_store, "_WRITTEN_AT_ONCE", 1)


def stored(model, path, x=X, **arguments):
    return explain.capture(model, x, **{"feature_names": NAMES, "batch_size": 6, "verbose": 0} | arguments, store=path)


def assert_same(scores, expected):
    assert list(scores) == list(expected)
    for name in expected:
        xr.testing.assert_identical(scores[name].compute(), expected[name])


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("at_once", [1, 7000, 4 << 20])
def test_what_is_stored_is_what_is_captured_in_memory(model, expected, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(_store, "_WRITTEN_AT_ONCE", at_once)
    scores = stored(model, tmp_path / "scores.zarr")
    assert set(expected) == {"twice#1", "twice#2", "last"}
    assert_same(scores, expected)
    assert {name: array.dtype for name, array in scores.items()} == dict.fromkeys(expected, "float32")
    for name, array in expected.items():  # without us
        alone = xr.open_zarr(tmp_path / "scores.zarr", group=name)["scores"]
        np.testing.assert_array_equal(alone.sel(key="b"), array.sel(key="b"))
        assert alone.attrs == array.attrs
    tree = xr.open_datatree(tmp_path / "scores.zarr", engine="zarr")
    assert set(tree.children) == set(expected)


@pytest.mark.backend_independent
def test_without_dask_arrays_are_read_when_they_are_used(model, expected, tmp_path, monkeypatch):
    def no_dask(*arguments, **keywords):
        raise ImportError

    monkeypatch.setattr("xarray.backends.zarr.guess_chunkmanager", no_dask)
    scores = stored(model, tmp_path / "scores.zarr")
    assert not scores["last"].variable._in_memory
    np.testing.assert_array_equal(scores["last"].sel(sample=[3, 21]), expected["last"].sel(sample=[3, 21]))


def names_with_paths(folder):
    """A layer inside a layer, and a name that is also part of another one's path."""

    class Pair(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.attention, self.second = (layers.MultiHeadAttention(2, 4, name=name) for name in ("attention", "pair"))

        def call(self, x):
            return self.second(self.attention(x, x), x)

    inputs = keras.Input((5, 8))
    return keras.Model(inputs, layers.MultiHeadAttention(2, 4, name="attention")(*[Pair(name="pair")(inputs)] * 2))


def test_names_that_are_paths(tmp_path):
    model = names_with_paths(tmp_path)
    in_memory = explain.capture(model, X, batch_size=6, verbose=0)
    assert set(in_memory) == {"attention", "pair", "pair/attention"}
    for _ in range(2):
        assert_same(explain.capture(model, X, batch_size=6, verbose=0, store=tmp_path / "a.zarr"), in_memory)


def as_tf_data(x):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((x, np.zeros(len(x)))).batch(6)


INPUTS = {
    "generator": lambda x: ((x[start : start + 6], np.zeros(len(x[start : start + 6]))) for start in range(0, 22, 6)),
    "batches of any size": lambda x: (x[start:stop] for start, stop in [(0, 6), (6, 7), (7, 18), (18, 22)]),
    "tf.data": as_tf_data,
    "list": lambda x: [x],
}


@pytest.mark.filterwarnings("ignore:The structure of `inputs`:UserWarning")  # Keras, of a list of one input
@pytest.mark.usefixtures("each_batch_is_written")
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_every_kind_are_stored_and_continued(kind, model, expected, tmp_path, monkeypatch):
    batch_size = 6 if kind == "list" else None
    with monkeypatch.context() as patch:
        stop_after_two_batches(patch)
        with pytest.raises(Killed):
            stored(model, tmp_path / "scores.zarr", INPUTS[kind](X), batch_size=batch_size)
    scores = stored(model, tmp_path / "scores.zarr", INPUTS[kind](X), batch_size=batch_size)
    for name in expected:
        np.testing.assert_allclose(scores[name], expected[name], atol=1e-6)


class Killed(BaseException):
    """Not caught by anything between a write and the test."""


def stop_at_write(monkeypatch, count):
    """Writing raises at the `count`th write, and at all later ones."""
    write, left = _directory.WrittenFiles.write, iter(range(count - 1))

    def counted(*arguments):
        if next(left, None) is None:
            raise Killed
        write(*arguments)

    monkeypatch.setattr(_directory.WrittenFiles, "write", counted)


def stop_after_two_batches(monkeypatch):
    write, left = _store.Store._write, iter(range(2))

    def counted(self):
        if next(left, None) is None:
            raise Killed
        return write(self)

    monkeypatch.setattr(_store.Store, "_write", counted)


def measured(data):
    """Something of each kind that can be stored of a batch; of two layers, in two numbers of rows."""
    (x,) = (ops.convert_to_numpy(array) for array in data)
    ranked = {
        "top_key": (("sample", "query", "rank"), np.argsort(x).astype("int32")),
        "top_weight": (("sample", "query", "rank"), np.sort(x)),
    }
    folded = {"map": (("sequence", "bin"), x.reshape(-1, 8))}
    return {"ranked": xr.Dataset(ranked, {"query": NAMES}), "inner/folded#2": xr.Dataset(folded, attrs={"of": "x"})}


def plain_model():
    return keras.Sequential([keras.Input((5, 8)), layers.Dense(1, kernel_initializer="ones")])


BATCH = Batch(6, 1, None, {}, {}, 0.0, changes_state=False)


def store_measured(model, path, x=X[:16]):
    run = []
    with _store.Store(path, "measured", model, x, 6, {"top_k": 8}) as store:
        for data in store:
            run.append(len(data[0]))
            datasets = measured(data)
            nan = {name: np.zeros(len(next(iter(dataset.values()))), bool) for name, dataset in datasets.items()}
            store.append(BATCH, datasets, nan, lambda name, dataset: dataset)
        store.finish()
    return store.open(), run


@pytest.mark.backend_independent
def test_variables_of_all_kinds_are_stored(tmp_path):
    datasets, run = store_measured(plain_model(), tmp_path / "measured.zarr")
    assert run == [6, 6, 4]
    for name, dataset in measured((X[:16],)).items():
        dim = next(iter(dataset.sizes))
        xr.testing.assert_identical(
            datasets[name].compute(), dataset.assign_coords({dim: np.arange(dataset.sizes[dim])})
        )
        assert {key: array.dtype for key, array in datasets[name].items()} == {
            key: array.dtype for key, array in dataset.items()
        }


@pytest.mark.backend_independent
@pytest.mark.usefixtures("each_batch_is_written")
def test_stopping_at_any_write_and_going_on_gives_the_same_files(tmp_path, monkeypatch):
    model = plain_model()
    store_measured(model, tmp_path / "undisturbed.zarr")
    undisturbed = files(tmp_path / "undisturbed.zarr")
    runs = []
    for count in range(1, 1000):
        path = tmp_path / f"{count}.zarr"
        with monkeypatch.context() as patch:
            stop_at_write(patch, count)
            try:
                store_measured(model, path)
                break
            except Killed:
                pass
        runs.append(store_measured(model, path)[1])
        assert files(path) == undisturbed
    assert count > 60, "nearly nothing was written"
    # The first batch, by which the model is known again, and then those that are not stored.
    assert sorted(set(map(tuple, runs)), reverse=True) == [(6, 6, 4), (6, 4), (6,)]


# Keras is imported once; what is killed are copies of that process, each of which goes on where the last one was.
KILLED_CHILDREN = """
    import os, random, signal, sys, time
    from pathlib import Path
    import keras, numpy as np, xarray, zarr
    from kerasfactory import explain
    from kerasfactory.explain._engine import store as _store

    def run(path):
        keras.utils.set_random_seed(5)
        inputs = keras.Input((5, 8))
        attention = keras.layers.MultiHeadAttention(2, 4, dropout=0.1, name="attention")
        model = keras.Model(inputs, attention(inputs, inputs))
        x = np.random.default_rng(0).normal(size=(601, 5, 8)).astype("float32")
        explain.capture(model, x, batch_size=10, verbose=0, store=path)

    _store._WRITTEN_AT_ONCE = 1
    seed = int(sys.argv[1])
    rng = random.Random(seed)
    kills = 0
    for path in ["killed.zarr", "undisturbed.zarr"]:
        while True:
            child = os.fork()
            if child == 0:
                run(path)
                os._exit(0)
            if path == "killed.zarr" and kills < 3:
                record, before = Path(path, ".zattrs"), time.time()
                while os.waitpid(child, os.WNOHANG) == (0, 0):
                    if record.exists() and record.stat().st_mtime > before:  # it has begun to write
                        time.sleep(rng.uniform(0, 0.06))
                        os.kill(child, signal.SIGKILL)
                        kills += 1
                        os.waitpid(child, 0)
                        break
                    time.sleep(0.001)
            elif os.waitpid(child, 0)[1] == 0:
                break
            else:
                sys.exit(f"failed, with seed {seed}")
    print(kills)
"""


@pytest.mark.backend_independent
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killing_at_random_moments_and_going_on_gives_the_same_files(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED_CHILDREN), str(seed)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) == 3
    assert files(tmp_path / "killed.zarr") == files(tmp_path / "undisturbed.zarr")
    scores = xr.open_zarr(tmp_path / "killed.zarr", group="attention")["scores"]
    assert scores.shape == (601, 2, 5, 5)
    np.testing.assert_allclose(scores.sum("key"), 1, atol=1e-5)


@pytest.mark.usefixtures("each_batch_is_written")
def test_a_model_that_goes_on_from_its_last_batch_starts_over(tmp_path, monkeypatch):
    model = two_layers(NextRandom())
    in_memory = explain.capture(model, X, feature_names=NAMES, batch_size=6, verbose=0)
    with monkeypatch.context() as patch:
        stop_after_two_batches(patch)
        with pytest.raises(Killed):
            stored(model, tmp_path / "scores.zarr")
    for _ in range(2):
        assert_same(stored(model, tmp_path / "scores.zarr"), in_memory)


def other_weights(model):
    other = keras.models.clone_model(model)
    other.set_weights([weight * 1.01 for weight in model.get_weights()])
    return other


def other_code(model):
    """The same weights, used in another way."""
    inputs = keras.Input((5, 8))
    first, second = model.get_layer("twice"), model.get_layer("last")
    x = 2 * first(first(inputs, inputs), inputs)
    return keras.Model(inputs, model.layers[-1](layers.GlobalAveragePooling1D()(second(x[:, :3], x))))


@pytest.mark.backend_independent
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": other_weights}, "belongs to another call, which differs in: weights. Choose another `store`"),
        ({"model": other_code}, "gives other results for the first batch"),
        ({"layers": "last"}, "belongs to another call, which differs in: layers"),
        ({"feature_names": None}, "belongs to another call, which differs in: feature_names"),
        ({"x": X + 1}, "belongs to another call, which differs in: x"),
        ({"x": np.concatenate([X[:7], X[8:9], X[8:]])}, "differs somewhere in its first (12|22) samples"),
        ({"x": X[:6]}, "`x` has 6 samples, fewer than the (12|22) in"),
    ],
)
@pytest.mark.usefixtures("each_batch_is_written")
def test_the_store_of_another_call_is_refused(model, tmp_path, monkeypatch, finished, other, message):
    path = tmp_path / "scores.zarr"
    if finished:
        stored(model, path)
    else:
        with monkeypatch.context() as patch:
            stop_after_two_batches(patch)
            with pytest.raises(Killed):
                stored(model, path)
        assert json.loads((path / ".zattrs").read_text())["kerasfactory"]["batches"] == 2
    before = files(path)
    arguments = other | {"model": other.get("model", lambda model: model)(model)}
    with pytest.raises(ValueError, match=message):
        stored(path=path, **arguments)
    assert files(path) == before


@pytest.mark.parametrize("batch_size", [1, 5, 20, None])
@pytest.mark.usefixtures("each_batch_is_written")
def test_another_batch_size_is_no_other_call(model, expected, tmp_path, monkeypatch, batch_size):
    path = tmp_path / "scores.zarr"
    with monkeypatch.context() as patch:
        stop_after_two_batches(patch)
        with pytest.raises(Killed):
            stored(model, path)
    assert json.loads((path / ".zattrs").read_text())["kerasfactory"]["samples"] == 12
    scores = stored(model, path, batch_size=batch_size)
    for name in expected:
        xr.testing.assert_identical(scores[name][:12].compute(), expected[name][:12])  # stored before, and not touched
        xr.testing.assert_allclose(scores[name], expected[name], atol=1e-6)
    before = files(path)
    for other in (batch_size, 6, 7):
        again = stored(model, path, batch_size=other)
        assert all(again[name].identical(scores[name]) for name in scores)
    assert files(path) == before


@pytest.mark.parametrize("batches", [[5, 5, 5, 5, 2], [6, 6, 10]])
def test_a_model_that_goes_on_from_its_last_batch_needs_the_same_batches(batches, tmp_path):
    model, path = two_layers(NextRandom()), tmp_path / "scores.zarr"
    stored(model, path)
    before = files(path)
    with pytest.raises(
        ValueError, match=r"was made in batches of other sizes.* Give the `batch_size` of the first call"
    ):
        stored(model, path, iter(np.split(X, np.cumsum(batches)[:-1])), batch_size=None)
    assert files(path) == before


def test_of_two_first_runs_the_later_leaves_the_other_alone(model, expected, tmp_path):
    def batches():
        yield X[:12]
        lazy.update(stored(model, tmp_path / "scores.zarr"))
        yield X[12:]

    lazy = {}
    with pytest.raises(RuntimeError, match="Another process or thread has written to"):
        stored(other_weights(model), tmp_path / "scores.zarr", batches(), batch_size=None)
    assert_same(lazy, expected)
    assert_same(stored(model, tmp_path / "scores.zarr"), expected)


def test_a_chunk_that_is_lost_or_changes_is_an_error(model, expected, tmp_path):
    lazy = stored(model, tmp_path / "scores.zarr")
    chunk = tmp_path / "scores.zarr" / "last" / "scores" / "0.0.0.0"
    content = chunk.read_bytes()
    chunk.unlink()
    for use in (lambda: lazy["last"].mean().compute(), lambda: stored(model, tmp_path / "scores.zarr")):
        with pytest.raises(
            ValueError, match=r"(is missing|has lost 1 of its files, such as 0.0.0.0)\. .*Delete the store"
        ):
            use()
    chunk.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    for use in (lambda: lazy["last"].mean().compute(), lambda: stored(model, tmp_path / "scores.zarr")["last"].load()):
        with pytest.raises(ValueError, match=r"0\.0\.0\.0 does not have the checksum that is written in it"):
            use()
    chunk.write_bytes(content)
    assert_same(lazy, expected)


def test_chunks_that_have_changed_places_are_an_error(model, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "_LARGEST_CHUNK", 1000)
    assert_same(stored(model, tmp_path / "scores.zarr"), expected)
    one, other = (tmp_path / "scores.zarr" / "last" / "scores" / f"{number}.0.0.0" for number in (1, 2))
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    with pytest.raises(ValueError, match="last has other files, or in another order"):
        stored(model, tmp_path / "scores.zarr")


def test_layers_with_names_that_no_file_may_have(tmp_path):
    names = ["__init__", "a\\b", "Attention", "attention", " ", "a" * 300, "nul\0", "é", "7", "con"]
    names += [] if BACKEND == "torch" else ["..", ".zattrs"]  # PyTorch takes no dots
    inputs = x = keras.Input((5, 8))
    for name in names:
        x = layers.MultiHeadAttention(1, 2, name=name)(x, x)
    model = keras.Model(inputs, x)
    in_memory = explain.capture(model, X, verbose=0)
    assert list(in_memory) == names
    for _ in range(2):
        assert_same(explain.capture(model, X, verbose=0, store=tmp_path / "a.zarr"), in_memory)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.backend_independent
def test_a_finished_store_does_not_grow(model, tmp_path):
    stored(model, tmp_path / "scores.zarr", X[:12])
    with pytest.raises(ValueError, match="`x` has more samples than the 12"):
        stored(model, tmp_path / "scores.zarr")


@pytest.mark.backend_independent
def test_a_call_that_fails_before_anything_is_stored_leaves_nothing(model, expected, tmp_path):
    with pytest.raises(ValueError, match="no layer 'lost'"):
        stored(model, tmp_path / "scores.zarr", layers="lost")
    with pytest.raises(ValueError, match="`x` is empty"):
        stored(model, tmp_path / "scores.zarr", X[:0])
    with pytest.raises(ValueError, match=r"`model` must be a keras\.Model"):
        stored(None, tmp_path / "scores.zarr")
    assert not (tmp_path / "scores.zarr").exists()
    assert_same(stored(model, tmp_path / "scores.zarr"), expected)


@pytest.mark.backend_independent
def test_a_directory_of_somebody_else_is_left_alone(model, tmp_path):
    path = tmp_path / "mine.zarr"
    xr.Dataset({"mine": ("x", [1.0])}).to_zarr(path, zarr_format=2)
    before = files(path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"holds what this package did not store: \.zattrs, \.zmetadata, mine"):
            stored(model, path)
    assert files(path) == before


@pytest.mark.backend_independent
@pytest.mark.skipif(_directory.fcntl is None, reason="Windows has no such locks")
def test_two_do_not_write_at_once(model, expected, tmp_path):
    path = tmp_path / "scores.zarr"

    def batches():
        yield X[:6]
        yield X[6:12]
        with pytest.raises(RuntimeError, match="Another process or thread is writing to"):
            stored(model, path)
        yield X[12:18]
        yield X[18:]

    _store_at_once, _store._WRITTEN_AT_ONCE = _store._WRITTEN_AT_ONCE, 1
    try:
        stored(model, path, batches(), batch_size=None)
    finally:
        _store._WRITTEN_AT_ONCE = _store_at_once
    assert_same(stored(model, path), expected)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("scores.nc", "a kill damages a netCDF file that is being written.* Received: store='scores.nc'"),
        ("scores", "must be a directory whose name ends in .zarr. Received: store='scores'"),
        (3, "`store` must be a path. Received: store=3"),
    ],
)
def test_other_places_are_refused(model, store, message):
    with pytest.raises(ValueError, match=message):
        stored(model, store)


@pytest.mark.backend_independent
def test_a_finished_store_becomes_a_netcdf_file(model, expected, tmp_path):
    stored(model, tmp_path / "scores.zarr")
    xr.open_zarr(tmp_path / "scores.zarr", group="last").to_netcdf(tmp_path / "last.nc")
    with xr.open_dataset(tmp_path / "last.nc") as dataset:
        np.testing.assert_array_equal(dataset["scores"], expected["last"])


@pytest.mark.backend_independent
def test_without_zarr_the_error_says_how_to_get_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr, "__version__", "3.1.2")
    with pytest.raises(ImportError, match=r'Zarr 3.1.3 or later.* pip install "\.\[store\]"$'):
        stored(model, tmp_path / "scores.zarr")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[store\]"$'):
        stored(model, tmp_path / "scores.zarr")


def test_nan_are_told_of_stored_scores_too(model, tmp_path):
    x = X.copy()
    x[[3, 20], 2] = np.nan
    for _ in range(2):
        with pytest.warns(UserWarning, match="NaN in 2 of 22 samples") as warned:
            stored(model, tmp_path / "scores.zarr", x)
        assert [str(one.message).partition(". ")[0] for one in warned] == [
            f"The scores of layer {name!r} are NaN in 2 of 22 samples, the first of them number 3"
            for name in ("twice#1", "twice#2", "last")
        ]
        assert {one.filename for one in warned} == {__file__}


@pytest.mark.backend_independent
def test_batches_of_another_kind_are_refused(tmp_path):
    with _store.Store(tmp_path / "a.zarr", "measured", plain_model(), X, 6, {}) as store:
        batches = iter(store)
        next(batches)
        append = functools.partial(
            store.append, BATCH, nan={"a": np.zeros(6, bool)}, labeled=lambda name, dataset: dataset
        )
        append({"a": xr.Dataset({"b": (("sample", "key"), X[:6, 0])})})
        next(batches)
        with pytest.raises(ValueError, match="must have the dimensions and lengths of the first"):
            append({"a": xr.Dataset({"b": (("sequence", "key"), X[:6, 0])})})


MEMORY = """
    import resource, sys
    import keras, numpy as np
    from kerasfactory import explain

    keras.utils.set_random_seed(5)
    inputs = keras.Input((128, 4))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)[:, 0])
    x = np.zeros((1600, 128, 4), "float32")
    explain.capture(model, x[:32], verbose=0)
    assert not {"zarr", "distributed"} & set(sys.modules)
    explain.capture(model, x[:320], verbose=0, store="small.zarr")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = explain.capture(model, x, verbose=0, store="large.zarr")["attention"]
    print(scores.nbytes >> 20, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.backend_independent
@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units")
def test_without_store_zarr_is_not_imported_and_with_it_memory_does_not_grow_with_the_result(tmp_path):
    program = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(MEMORY)]
    result, more = map(int, subprocess.run(program, cwd=tmp_path, capture_output=True, check=True).stdout.split())
    assert result == 200
    assert more < 30
