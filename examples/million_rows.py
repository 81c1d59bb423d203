# %% [markdown] level="advanced" data="any"
# # More rows than fit into memory
#
# **The scores of all your rows do not fit into memory, and one process takes long. What now?**
#
# Cut the rows into blocks, and let several processes capture them and write the scores to disk. Here two processes
# capture 30,000 rows in three blocks, 69 MB, and xarray reads them as one array. A million rows of this small table
# would be 2.3 GB, and a hundred million 230 GB.
#
# It is worth it: the hottest bin holds 24 of the 30,000 rows, and none of the first 1,000.
#
# The rows are simulated, and a Dask cluster distributes the blocks. The recipe needs `pip install ".[store,plot,jax]"
# "dask[distributed]"` in a clone of the repository. You need to know [`capture`](existing_model.ipynb). What happens if
# a process is killed is a [recipe of its own](after_a_kill.ipynb).

# %%
import importlib
import logging
import math
import os
import random
import tempfile
import time
from pathlib import Path

# JAX starts quickly. For so little work, one thread and quickly compiled code are
# fastest. The processes that are started below inherit this.
os.environ |= {
    "KERAS_BACKEND": "jax",
    "OMP_NUM_THREADS": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}

import keras
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from dask.distributed import Client, LocalCluster

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer

# %% [markdown]
# ## A table and a model
#
# We simulate the wear of a machine. It depends on the load, except when the machine runs hot, which is rare. Then it
# depends on the vibration. Nine more sensors have nothing to do with it. Every column is a token, and the tokens attend
# to each other. The prediction is made from what the temperature token has read.

# %%
rows, block = 30_000, 10_000
names = ["temperature", "load", "vibration", *(f"sensor {n}" for n in range(1, 10))]


def simulated():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(rows, len(names))).astype("float32")
    hot = 1 / (1 + np.exp(-8 * (table[:, 0] - 2)))
    return table, ((1 - hot) * table[:, 1] + 2 * hot * table[:, 2]).astype("float32")


def build_model():
    inputs = keras.Input((len(names),))
    tokens = FeatureTokenizer(16, feature_names=names)(inputs)
    attended = keras.layers.MultiHeadAttention(
        num_heads=4, key_dim=8, name="attention"
    )(tokens, tokens)
    hidden = keras.layers.Dense(16, activation="relu")(attended[:, 0])
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


def trained_model(table, wear):
    # Keras takes its seeds from here. keras.utils.set_random_seed loads TensorFlow.
    random.seed(0)
    model = build_model()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    once = {"batch_size": 100, "epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(table[:10_000], wear[:10_000], **once)
    predicted = model.predict(table[10_000:20_000], batch_size=1000, verbose=0)[:, 0]
    unseen = wear[10_000:20_000]
    error = np.mean((predicted - unseen) ** 2)
    print(f"Explained variance of unseen rows: {1 - error / unseen.var():.2f}")
    return model


# %% [markdown]
# ## One block
#
# A worker needs the model, the table and the range of its rows. The model is its code and a file of weights;
# `keras.models.load_model` works as well. `np.load(..., mmap_mode="r")` reads only the rows of the block. With
# `store=`, the scores go to disk as they are captured. Each block has a store of its own, because one process at a time
# writes to a store.


# %%
def capture_block(folder, start, stop):
    model = build_model()
    model.load_weights(folder / "wear.weights.h5")
    x = np.load(folder / "table.npy", mmap_mode="r")[start:stop]
    explain.capture(
        model, x, batch_size=500, verbose=0, store=folder / f"{start:07d}.zarr"
    )
    return stop - start


def prepare():
    importlib.import_module("kerasfactory.explain")


def capture_all(client, folder):
    begun = time.perf_counter()
    blocks = [
        client.submit(capture_block, folder, start, start + block)
        for start in range(0, rows, block)
    ]
    captured = client.gather(blocks)
    hours = (time.perf_counter() - begun) / rows * 1e6 / 3600
    print(f"Blocks: {len(captured)}, rows: {sum(captured):,}")
    print(f"A million rows at this pace: at most {math.ceil(hours)} h")


# %% [markdown]
# ## One array again
#
# xarray opens all stores as one array. It reads nothing until you ask for a result, and then it reads piece by piece.
# So the mean has to fit into memory, but the scores need not. To see whether rows were lost, duplicated or swapped,
# this process captures 3,000 rows again, across the border of two blocks.


# %%
def one_array(folder):
    return xr.open_mfdataset(
        sorted(map(str, folder.glob("*.zarr"))),
        engine="zarr",
        group="attention",
        combine="nested",
        concat_dim="sample",
    )["scores"]


def checked(scores, model, table):
    print(dict(scores.sizes))
    print(f"Scores, uncompressed: {scores.nbytes / 1e6:.0f} MB,")
    print(f"    {scores.nbytes / len(scores) * 1e6 / 1e9:.1f} GB for a million rows")
    some = slice(block - 1500, block + 1500)
    again = explain.capture(model, table[some], batch_size=250, verbose=0)["attention"]
    apart = np.abs(scores[some].values - again.values).max()
    print(f"Largest difference from scores in memory: {apart:.5f}")
    sums = scores.sum("key").compute()
    print(f"Sums of the rows: {sums.min().item():.4f} to {sums.max().item():.4f}")


# %% [markdown]
# ## What a sample would have missed
#
# The temperature token reads other columns when the machine is hot. We take means over all rows, in bins of
# temperature, and the same means for the first 1,000 rows, as if one had looked at a sample only.

# %%
# The first and the last bin are open, so that each row is in one.
edges = np.r_[-np.inf, np.arange(-2.75, 3.5, 0.5), np.inf]
middles = np.arange(-3, 3.75, 0.5)


def by_temperature(sample, table):
    which = np.digitize(table[: len(sample), 0], edges) - 1
    means = [sample[which == number].mean("sample") for number in range(len(middles))]
    return xr.concat(means, "temperature"), np.bincount(which, minlength=len(middles))


def draw(everything, sampled, count_sampled):
    _, ax = plt.subplots(figsize=(4.9, 4.2), layout="constrained")
    colors = {"load": "#0072b2", "vibration": "#d55e00", "sensor 1": "gray"}
    dots = np.where(count_sampled, 28, 0)
    for name, color in colors.items():
        ax.plot(middles, everything.sel(key=name), color=color, label=name)
        ax.scatter(middles, sampled.sel(key=name), color=color, s=dots)
    ax.axvspan(2, 3.75, color="#d55e00", alpha=0.08, linewidth=0)
    ax.set_xlim(right=3.75)
    ax.text(1.9, 0.2, "in the shade, wear\ndepends on vibration", ha="right")
    ax.set_xlabel("temperature (standard deviations from its mean)")
    ax.set_ylabel("attention from temperature")
    ax.legend(title="to", loc="upper left")
    ax.set_title("lines: all 30,000 rows; dots: first 1,000")
    plt.show()


# %% [markdown]
# ## All together, behind a main guard
#
# Each process of the cluster starts as a new Python. If this page is run as a script, each of them imports the script
# first, and runs everything outside functions. Without the guard, they would train the model as well, and start
# clusters of their own. In a notebook, the guard is always true.
#
# Here the cluster is two processes on one machine. For several machines, a different line makes the cluster
# (`SSHCluster`, `SLURMCluster`, Kubernetes; see [Dask's pages](https://docs.dask.org/en/stable/deploying.html)). The
# rest stays as it is, if all machines see the same folder.

# %% tags=["cover"] alt="Attention from the temperature token, against temperature. The line to vibration is lowest on the left and rises steeply on the right, above the line to load, which falls there; sensor 1 stays low. Dots of a sample of 1000 rows follow the lines in the middle, scatter at both ends, and are missing in the hottest bin, which lies in a shaded area where wear depends on vibration."
if __name__ == "__main__":
    quiet = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster,
        Client(cluster) as client,
    ):
        # While this process trains the model, the others import what they need.
        ready = [
            client.submit(prepare, workers=[address], pure=False)
            for address in client.nthreads()
        ]
        table, wear = simulated()
        model = trained_model(table, wear)
        model.save_weights(Path(folder) / "wear.weights.h5")
        np.save(Path(folder) / "table.npy", table)

        client.gather(ready)
        capture_all(client, Path(folder))

        scores = one_array(Path(folder))
        checked(scores, model, table)
        from_temperature = scores.sel(query="temperature").mean("head").compute()
    print(f"Mean over heads, in memory: {from_temperature.nbytes / 1e6:.0f} MB")

    everything, count = by_temperature(from_temperature, table)
    sampled, count_sampled = by_temperature(from_temperature[:1000], table)
    print(f"Hottest bin: {count[-1]} of {count.sum():,} rows,")
    print(f"    {count_sampled[-1]} of the first {count_sampled.sum():,}")
    print(f"{'attention to':12}{'vibration':>11}{'load':>6}")
    for where, attention in [
        ("coldest bin", everything[0]),
        ("hottest bin", everything[-1]),
        ("largest", everything.max("temperature")),
    ]:
        vibration, load = (attention.sel(key=key).item() for key in names[2:0:-1])
        print(f"{where:12}{vibration:11.2f}{load:6.2f}")
    draw(everything, sampled, count_sampled)

# %% [markdown]
# The lines are means over all rows, and the dots are means over the sample. The hottest bin has 24 of all rows, but
# none of the first 1,000. So the sample shows that attention changes, but not how far.
#
# ## Where to be careful
#
# - A store belongs to one model, with its weights, and to one block of data. Another model raises an error, and so do
#   rows that have changed or come in another order.
# - Make blocks large, so that starting the model takes little of the time, but make many more blocks than workers, so
#   that no worker waits long.
# - If a *machine* and its disk are lost, whole blocks are done again. [After a killed process](after_a_kill.ipynb), only
#   the last few batches are. Dask gives the block of a killed worker to another one, which continues it.
# - If you only want statistics, do not store scores at all. Reduce each block in its worker, and return the small
#   result, as in [An audit of more rows than you can test](audit_many_rows.ipynb).
#
# ## What it says, and what it does not
#
# **It says** how the attention of the temperature token changes over all rows, including both ends of the range, and
# that the scores of 3,000 rows are those that one process captures in memory.
#
# **It does not say** what wear depends on. In the cold it depends on the load and nothing else, because that is how we
# simulated it. But the load gets less than a fifth of the attention in every bin.
#
# **Use your own data:** replace `names`, `build_model`, `rows` and what `simulated` and `trained_model` return.
# `capture_block`, `capture_all` and `one_array` stay as they are. `by_temperature` and `draw` are for this table.
