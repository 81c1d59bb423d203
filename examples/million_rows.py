# %% [markdown] level="advanced"
# # Explain a million rows
#
# **The scores of a million rows do not fit into memory, and one process takes too long. What now?**
#
# The rows are cut into blocks, a Dask cluster captures them side by side, and every process writes what it captures to
# disk. This notebook does it with 30,000 simulated rows, so that it runs in seconds, and kills a process on the way.
# It needs `pip install ".[store]" "dask[distributed]"` in a clone of the repository, and that you know
# [`capture`](existing_model.ipynb).

# %% [markdown]
# ## A cluster
#
# On this machine: two processes. On several machines, another line makes it (`SSHCluster`, `SLURMCluster`, Kubernetes;
# see [Dask's pages](https://docs.dask.org/en/stable/deploying.html)), and what follows stays as it is, provided that all of
# them see the same folder. It comes first, so that its processes start while this one imports what it needs.

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
# A machine's wear, simulated. It depends on the load, except where the machine runs hot, which is rare: there it depends
# on the vibration. Nine more sensors measure nothing of interest. Every column is a token, they attend to each other,
# and the prediction is made of what temperature's token has read.

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
print(
    "Explained variance of unseen rows above 0.9: "
    f"{1 - error / wear[unseen].var() > 0.9}"
)

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
# A worker needs the model, the table and the rows that are its own. The model is its code and a file of weights
# (`keras.models.load_model` does as well). `np.load(..., mmap_mode="r")` reads no other rows. With `store=`, what is
# captured goes to disk as it comes, and **the same call made again continues** where the last one stopped.

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
# Three blocks for two workers. As soon as the first block has something on disk, its worker is killed, the hard
# way. Dask notices, and gives the block to the other one (`workers=` keeps it from the newcomer, which would have to
# import everything first); `capture` finds what is there and goes on from it.

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
# xarray opens all stores as one array. Nothing is read until a result is asked for, and then piece by piece: what fits
# into memory is the mean, not the scores.

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
# Is anything lost, doubled or damaged? This process captures some rows of the killed block again, in memory:

# %%
some = slice(1_000, 4_000)
again = explain.capture(model, table[some], batch_size=250, verbose=0)["attention"]

print("The same scores to 1e-5:", np.allclose(scores[some], again, atol=1e-5))
print("Every row sums to 1:", bool((abs(scores.sum("key") - 1) < 1e-5).all().compute()))

# %% [markdown]
# ## What a sample would have missed
#
# Temperature's token reads other things as it gets hotter. The lines are means over all rows in bins of temperature;
# the dots are the same from the first 1000 rows, which is how many one usually looks at.

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
print(
    "Load gets a fifth of the attention anywhere: "
    f"{bool(everything.sel(key='load').max() > 0.2)}"
)
for where, attention in {"coldest": everything[0], "hottest": everything[-1]}.items():
    more = attention.sel(key="vibration") > 2 * attention.sel(key="load")
    print(
        f"In the {where} bin, vibration gets more than twice what load gets: "
        f"{more.item()}"
    )

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
# The sample shows the direction, and not how far it goes: of the hottest rows it holds none, and of the next ones a
# handful. These are the rows that wear out in another way.
#
# ## Where to be careful
#
# - In a script, put what starts the cluster under `if __name__ == "__main__":`. A notebook needs no such line.
# - A store belongs to one model, with its weights, and one block of data. Another model is refused, and so are rows that
#   have changed or come in another order.
# - xarray raises an error for a chunk that has changed, because each holds a checksum. A chunk that is lost it shows as NaN,
#   which a mean leaves out. The same call of `capture` made again finds it: it raises an error if a file is lost.
# - Blocks are what is done again if a *machine* is lost; after a killed process no more than the last few batches are.
#   Make them large, so that starting the model does not count, and still many more than workers, so that none waits long.
# - If statistics are all that you want, do not store scores at all: reduce each block in its worker, and return the small
#   result.
#
# **It says** how attention from temperature changes over all rows, ends of the range included, and that a killed
# process has changed nothing.
#
# **It does not say** what wear depends on. When it is cold that is load and nothing else, for so we have simulated it, and
# load does not get a fifth of the attention.
