# %% [markdown] level="advanced"
# # More rows than fit into memory
#
# **The scores of a million rows do not fit into memory, and one process takes too long. What now?**
#
# Cut the rows into blocks, and let several processes capture them and write the scores to disk. Here two processes do
# it with 30,000 rows, at a pace of less than an hour for a million, and a killed process does not change the scores.
#
# The scores that we check agree to 1e-5 with scores captured in memory.
#
# The rows are simulated, and a Dask cluster distributes the blocks. The recipe needs `pip install ".[store]"
# "dask[distributed]"` in a clone of the repository. You need to know [`capture`](existing_model.ipynb).

# %% [markdown]
# ## A cluster
#
# Here the cluster is two processes on one machine. For several machines, another line makes the cluster (`SSHCluster`,
# `SLURMCluster`, Kubernetes; see [Dask's pages](https://docs.dask.org/en/stable/deploying.html)). The rest stays as it
# is, if all machines see the same folder. The cluster comes first, so that its processes start while this one imports
# what it needs.

# %%
import importlib
import logging
import os

from dask.distributed import Client, LocalCluster

# JAX starts quickly. Little work is best done by one thread, with code that is quickly
# compiled. Workers inherit this.
os.environ |= {
    "KERAS_BACKEND": "jax",
    "OMP_NUM_THREADS": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}

quiet = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
cluster = LocalCluster(n_workers=2, threads_per_worker=1, **quiet)
client = Client(cluster)


def process():
    importlib.import_module("kerasfactory.explain")
    return os.getpid()


starting = {
    address: client.submit(process, workers=[address], pure=False)
    for address in client.nthreads()
}

# %%
import json
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer

# Keras takes its seeds from here. keras.utils.set_random_seed would load TensorFlow.
random.seed(0)

# %% [markdown]
# ## A table and a model
#
# We simulate the wear of a machine. It depends on the load, except when the machine runs hot, which is rare. Then it
# depends on the vibration. Nine more sensors have nothing to do with it. Every column is a token, and the tokens attend
# to each other. The prediction is made from what the temperature token has read.

# %%
rows = 30_000
names = ["temperature", "load", "vibration", *(f"sensor {n}" for n in range(1, 10))]
rng = np.random.default_rng(0)
table = rng.normal(size=(rows, len(names))).astype("float32")
hot = 1 / (1 + np.exp(-8 * (table[:, 0] - 2)))
wear = ((1 - hot) * table[:, 1] + 2 * hot * table[:, 2]).astype("float32")


def build_model():
    inputs = keras.Input((len(names),))
    tokens = FeatureTokenizer(16, feature_names=names)(inputs)
    attended = keras.layers.MultiHeadAttention(
        num_heads=4, key_dim=8, name="attention"
    )(tokens, tokens)
    hidden = keras.layers.Dense(16, activation="relu")(attended[:, 0])
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


model = build_model()
model.compile(keras.optimizers.Adam(0.01), "mse")
model.fit(
    table[:10_000], wear[:10_000], batch_size=100, epochs=2, shuffle=False, verbose=0
)

unseen = slice(10_000, 20_000)
error = np.mean(
    (model.predict(table[unseen], batch_size=1000, verbose=0)[:, 0] - wear[unseen]) ** 2
)
print(f"Explained variance of unseen rows: {1 - error / wear[unseen].var():.2f}")

# %% [markdown]
# ## How much is it?
#
# Each row has 4 heads of 12 × 12 scores.

# %%
bytes_of_a_row = 4 * 4 * len(names) ** 2
print(f"A million rows: {bytes_of_a_row * 1e6 / 1e9:.1f} GB of scores, in one layer")

# %% [markdown]
# ## One block
#
# A worker needs the model, the table and the range of its rows. The model is its code and a file of weights;
# `keras.models.load_model` works as well. `np.load(..., mmap_mode="r")` reads only the rows of the block. With
# `store=`, the scores go to disk as they are captured, and **the same call made again continues** where the last one
# stopped.

# %%
folder = Path(tempfile.mkdtemp())
model.save_weights(folder / "wear.weights.h5")
np.save(folder / "table.npy", table)


def capture_block(folder, start, stop):
    model = build_model()
    model.load_weights(folder / "wear.weights.h5")
    x = np.load(folder / "table.npy", mmap_mode="r")[start:stop]
    explain.capture(
        model, x, batch_size=50, verbose=0, store=folder / f"{start:07d}.zarr"
    )
    return stop - start


# %% [markdown]
# ## All blocks, and an accident
#
# There are three blocks and two workers. As soon as the first block has something on disk, we kill its worker. Dask
# notices this and gives the block to the other worker, and `capture` continues from what is on disk. (Dask also starts
# a new worker. `workers=` keeps the blocks away from it, because it would have to import everything first.)

# %%
processes = client.gather(starting)
begun = time.perf_counter()
blocks = [
    client.submit(capture_block, folder, start, start + 10_000, workers=list(starting))
    for start in range(0, rows, 10_000)
]

record = folder / "0000000.zarr" / ".zattrs"
stored_batches = 0
while not stored_batches and blocks[0].status == "pending":
    time.sleep(0.005)
    if record.exists():
        stored_batches = (
            json.loads(record.read_text()).get("kerasfactory", {}).get("batches", 0)
        )
(at_work,) = (
    address for address, keys in client.processing().items() if blocks[0].key in keys
)
os.kill(processes[at_work], signal.SIGKILL)

captured = client.gather(blocks)
seconds = time.perf_counter() - begun
print(f"The killed worker left a part of its block: {0 < stored_batches < 200}")
print(f"Blocks: {len(captured)}, rows: {sum(captured):,}")
print(
    "At this pace, a million rows take less than an hour: "
    f"{seconds / rows * 1e6 < 3600}"
)

# %% [markdown]
# ## One array again
#
# xarray opens all stores as one array. It reads nothing until you ask for a result, and then it reads piece by piece.
# So the mean has to fit into memory, and the scores need not.

# %%
scores = xr.open_mfdataset(
    sorted(map(str, folder.glob("*.zarr"))),
    engine="zarr",
    group="attention",
    combine="nested",
    concat_dim="sample",
)["scores"]
from_temperature = scores.sel(query="temperature").mean("head").compute()

print(dict(scores.sizes))
print(
    f"On disk {scores.nbytes / 1e6:.0f} MB, in memory "
    f"{from_temperature.nbytes / 1e6:.0f} MB"
)

# %% [markdown]
# Are any scores lost, doubled or damaged? This process captures some rows of the killed block again, in memory:

# %%
some = slice(1_000, 4_000)
again = explain.capture(model, table[some], batch_size=250, verbose=0)["attention"]

apart = np.abs(scores[some].values - again.values).max()
print(f"Largest difference of a score: {apart:.5f}")
sums = scores.sum("key").compute()
print(f"Sums of the rows: {sums.min().item():.4f} to {sums.max().item():.4f}")

# %% [markdown]
# ## What a sample would have missed
#
# The temperature token reads other columns when it is hot. The lines are means over all rows, in bins of temperature.
# The dots are the same means for the first 1,000 rows, as if one had looked at a sample only.

# %%
edges = np.arange(-3.25, 4, 0.5)
middles = (edges[1:] + edges[:-1]) / 2


def by_temperature(sample):
    which = np.digitize(table[: len(sample), 0], edges) - 1
    means = [sample[which == number].mean("sample") for number in range(len(middles))]
    return xr.concat(means, "temperature"), np.bincount(
        which[which >= 0], minlength=len(middles)
    )[: len(middles)]


everything, count = by_temperature(from_temperature)
sampled, count_sampled = by_temperature(from_temperature[:1000])

print(f"Hottest bin: {count[-1]} of all rows, {count_sampled[-1]} of the first 1000")
print(
    "There temperature looks most at:",
    everything[-1].drop_sel(key="temperature").idxmax("key").item(),
)
largest = everything.sel(key="load").max().item()
print(f"Largest mean attention to load in any bin: {largest:.2f}")
for where, attention in {"coldest": everything[0], "hottest": everything[-1]}.items():
    vibration, load = (attention.sel(key=key).item() for key in ("vibration", "load"))
    print(f"{where} bin: vibration gets {vibration:.2f}, load {load:.2f}")

# %% tags=["cover"] alt="Attention from the temperature token, against temperature. The line to vibration is lowest on the left and rises steeply on the right, above the line to load, which falls there; sensor 1 stays low. Dots of a sample of 1000 rows follow the lines in the middle, scatter at both ends, and are missing in the hottest bin, which lies in a shaded area where wear depends on vibration."
fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
for name, color in {
    "load": "#0072b2",
    "vibration": "#d55e00",
    "sensor 1": "gray",
}.items():
    ax.plot(middles, everything.sel(key=name), color=color, label=name)
    ax.scatter(
        middles, sampled.sel(key=name), color=color, s=np.where(count_sampled, 28, 0)
    )
ax.axvspan(2, edges[-1], color="#d55e00", alpha=0.08, linewidth=0)
ax.text(2.05, ax.get_ylim()[0] + 0.002, "wear depends on\nvibration here", va="bottom")
ax.set_xlabel("temperature (standard deviations from its mean)")
ax.set_ylabel("attention from temperature")
ax.legend(title="to", loc="upper left")
plt.show()

# %%
client.close()
cluster.close()
shutil.rmtree(folder)

# %% [markdown]
# The hottest bin has 17 of all rows, and none of the first 1,000. So the sample cannot show how far the change goes,
# and these are the rows in which wear depends on the vibration.
#
# ## Where to be careful
#
# - In a script, put the lines that start the cluster, and all that follow, under `if __name__ == "__main__":`. A
#   notebook does not need that.
# - A store belongs to one model, with its weights, and to one block of data. Another model raises an error, and so do
#   rows that have changed or come in another order.
# - Each chunk has a checksum, so xarray raises an error for a chunk that has changed. It shows a lost chunk as NaN,
#   which a mean leaves out. Make the same call of `capture` again to find out: it raises an error if a file is lost.
# - If a *machine* and its disk are lost, whole blocks are done again. After a killed process, only the last few batches
#   are. Make blocks large, so that starting the model takes little of the time, but make many more blocks than workers,
#   so that no worker waits long.
# - If you only want statistics, do not store scores at all. Reduce each block in its worker, and return the small
#   result.
#
# **It says** how the attention of the temperature token changes over all rows, including both ends of the range, and
# that the killed process changed no scores among those that we compared.
#
# **It does not say** what wear depends on. In the cold it depends on the load and nothing else, because that is how we
# simulated it. Yet the load does not get a fifth of the attention in any bin.
#
# **Use your own data:** replace `table`, `names` and `build_model`, and the number of rows. `capture_block` and the
# cell with `client.submit` stay as they are, without the lines that kill a worker.
