# %% [markdown] level="advanced" data="table"
# # An audit of more rows than you can test
#
# **How do I audit a model on more rows than I can test, or than fit into memory?**
#
# Test a part of them. Of 80,000 rows that the model has not seen, `explain.audit(..., max_samples=8_000)` tests 8,000,
# which it draws at random. Here that is enough: all three columns that decide are supported, the weakest one as well.
# With 500 rows, the interval of the weakest one is more than three times as wide, and it is undetermined.
#
# The mean attributions and the skill are those of all 80,000 rows, whatever `max_samples` is. So `max_samples` saves
# time, but not memory: the audit still holds numbers for every row. If these do not fit, draw rows from the file
# yourself, and audit only those. For the mean attribution of all rows, let processes add up blocks of rows, and return
# nothing but sums. The sums of all unseen rows agree with the audit to 1e-5.
#
# The rows are simulated, so we know what the audit ought to find. The recipe needs `pip install "dask[distributed]"`.
# You need to know [an audit file](audit.ipynb). For the scores of many rows, see [More rows than fit into
# memory](million_rows.ipynb).

# %%
import logging
import os
import random
import sys
import tempfile
from pathlib import Path

# JAX starts quickly. Little work is best done by one thread, with code that is quickly
# compiled. The processes that are started below inherit this.
os.environ |= {
    "KERAS_BACKEND": "jax",
    "OMP_NUM_THREADS": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
# Keras would load TensorFlow, where it is installed, to describe a model as JSON.
sys.modules["tensorflow"] = None

import keras
import matplotlib.pyplot as plt
import numpy as np
from dask.distributed import Client, LocalCluster

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer

# %% [markdown]
# ## Planted truth, in a file
#
# We simulate how late parcels arrive. The delay depends on the distance, half as much on the traffic, and little on the
# rain. Nine more columns have nothing to do with it. The rest of the delay is noise, as large as the effect of the
# distance.
#
# `np.load(..., mmap_mode="r")` opens the file without reading it. Rows are read when they are asked for.

# %%
rows, trained, block = 100_000, 20_000, 20_000
planted = {"distance": 1.0, "traffic": 0.5, "rain": 0.14}
names = [*planted, *(f"column {n}" for n in range(4, 13))]


def save_table(folder):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, len(names))).astype("float32")
    delay = x[:, : len(planted)] @ list(planted.values()) + rng.normal(size=rows)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", delay.astype("float32"))


def table(folder):
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xy"]


# %% [markdown]
# ## A model
#
# Every column is a token, and one learned query attends to them. The model is trained on the first 20,000 rows. The
# other 80,000 are new to it.


# %%
def build_model():
    inputs = keras.Input((len(names),))
    tokens = FeatureTokenizer(8, feature_names=names)(inputs)
    zero = keras.ops.zeros_like(inputs[:, :1], dtype="int32")
    question = keras.layers.Embedding(1, 8)(zero)
    attention = keras.layers.MultiHeadAttention(1, 8, name="attention")
    found = keras.layers.Flatten()(attention(question, tokens))
    return keras.Model(inputs, keras.layers.Dense(1)(found), name="delay")


def trained_model(folder):
    # Keras takes its seeds from here. keras.utils.set_random_seed loads TensorFlow.
    random.seed(0)
    model = build_model()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = table(folder)
    once = {"batch_size": 100, "epochs": 3, "shuffle": False, "verbose": 0}
    model.fit(x[:trained], y[:trained], **once)
    return model


# %% [markdown]
# ## What a worker does
#
# A worker gets several blocks of rows, and builds the model once for all of them. `explain.attribute` makes one number
# for each row and column, which is as much as the table. The worker adds them up, and returns only the sums.


# %%
def sums_of(folder, starts):
    model, (x, _) = build_model(), table(folder)
    model.load_weights(folder / "delay.weights.h5")
    sums = {}
    for start in starts:
        attribution = explain.attribute(model, x[start : start + block], verbose=0)
        sums[start] = attribution.astype("float64").sum("sample")
    return sums


# %% [markdown]
# ## All together, behind a main guard
#
# Here two processes share the work, because the machine has two cores. One is the only worker of a Dask cluster, and
# adds up the attributions. The main process makes the two audits meanwhile. With more `workers`, each gets a share of
# the blocks. Each worker is a new Python process, which imports this file if it is run as a script. So everything that
# starts processes is [behind the guard](million_rows.ipynb).
#
# Each audit gets all 80,000 unseen rows, straight from the file, and tests 500 or 8,000 of them.

# %%
unseen = slice(trained, None)
sizes, workers = [500, 8_000], 1

if __name__ == "__main__":
    quiet = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    with (
        tempfile.TemporaryDirectory() as temporary,
        LocalCluster(n_workers=workers, threads_per_worker=1, **quiet) as cluster,
        Client(cluster) as client,
    ):
        folder = Path(temporary)
        save_table(folder)
        model = trained_model(folder)
        model.save_weights(folder / "delay.weights.h5")

        starts = range(0, rows, block)
        shares = [starts[number::workers] for number in range(workers)]
        adding_up = client.map(sums_of, [folder] * workers, shares)

        x, y = table(folder)
        audits = {
            size: explain.audit(
                model, x[unseen], y[unseen], max_samples=size, verbose=0
            )
            for size in sizes
        }
        sums = {}
        for of_share in client.gather(adding_up):
            sums |= of_share
        del x, y  # Windows deletes no file that is open
    audit = audits[8_000]
    print(f"Rows: {rows:,} in {len(sums)} blocks, {rows - trained:,} of them unseen")
    print(f"A block of the table: {block * len(names) * 4:,} bytes")
    print(f"What a worker returns for it: {sums[0].nbytes} bytes")

# %% [markdown]
# ## The mean attribution of all rows
#
# The sums divided by the number of rows are the means of all rows. The audit has its own means, of the unseen rows. The
# sums of the four blocks that the model has not seen should give the same.

# %%
if __name__ == "__main__":
    of_all = sum(sums.values()) / rows
    new = [of_block for start, of_block in sums.items() if start >= trained]
    of_unseen = sum(new) / (rows - trained)
    print("Mean attribution of all rows")
    for name in planted:
        print(f"    {name:22}{of_all.sel(feature=name).item():.3f}")
    print(f"    largest of the others {of_all[len(planted) :].max().item():.3f}")
    print(f"    mean of the columns   {of_all.mean().item():.3f}\n")

    apart = np.abs(of_unseen.values - audit.features["attribution"].values).max()
    print("Unseen rows, largest difference")
    print(f"    from the audit        {apart:.5f}")

# %% [markdown]
# ## The audit beside the planted truth

# %%
if __name__ == "__main__":
    data, skill = audit.record["data"], audit.record["skill"]["skill"]
    print(f"Rows: {data['shape'][0]:,}, tested: {data['tested']:,}, skill: {skill:.2f}")
    whole = audit.claims[audit.claims["feature"].isna()]
    for verdict, count in whole["verdict"].value_counts().items():
        print(f"Claims about the whole map: {count} {verdict}")
    print("\ncolumn    planted  verdict")
    for name, weight in planted.items():
        print(f"{name:10}{weight:<9.2f}{audit.features.loc[name, 'verdict']}")
    others = audit.features.loc[names[len(planted) :], "verdict"].value_counts()
    for verdict, count in others.items():
        print(f"{count} others  {0:<9.2f}{verdict}")

# %% [markdown]
# The claim about other seeds is undetermined, because there is one model only. Nothing is claimed about the other nine
# columns: their attribution is below the mean.
#
# ## What more rows buy
#
# With sixteen times as many rows, an interval is between a quarter and a third as wide. What decides is whether it is
# narrow enough for the effect. The distance is supported with 500 rows. The rain needs more.

# %%
if __name__ == "__main__":
    print("column     rows  effect  width  verdict")
    for name in planted:
        for size in sizes:
            found = audits[size].features.loc[name]
            width = found["effect_upper"] - found["effect_lower"]
            print(
                f"{name:9}{size:6,}{found['effect']:8.2f}{width:7.3f}  "
                f"{found['verdict']}"
            )
    skills = {f"{audits[size].record['skill']['skill']:.2f}" for size in sizes}
    print("Skill, for any number of rows tested:", *sorted(skills))

# %% tags=["cover"] alt="Two panels with two bars each, the intervals of the rise of the loss without a column, for 500 and 8,000 rows. On top is rain, planted 0.14: with 500 rows the bar reaches below zero and is undetermined; with 8,000 rows it is shorter, lies above zero and is supported. Below is column 8, planted 0: both bars lie around zero, the second is shorter, and both are undetermined."
if __name__ == "__main__":
    _, axes = plt.subplots(
        2, 1, figsize=(4.9, 4), sharex=True, sharey=True, layout="constrained"
    )
    colors = {"supported": "#0072b2", "undetermined": "gray"}
    shown = {"rain": "rain: planted 0.14", "column 8": "column 8: planted 0"}
    for ax, (name, title) in zip(axes, shown.items(), strict=True):
        for place, size in enumerate(sizes):
            found = audits[size].features.loc[name]
            low, high = found["effect_lower"], found["effect_upper"]
            style = {"color": colors[found["verdict"]]}
            ax.plot([low, high], [place, place], linewidth=5, **style)
            ax.plot(
                found["effect"], place, "|", markersize=20, markeredgewidth=2.5, **style
            )
            ax.text(high + 0.003, place, found["verdict"], va="center", **style)
        ax.axvline(0, color="black", linewidth=1, linestyle="--", zorder=0)
        ax.set_title(title)
    axes[1].set_xlabel("rise of the loss without it")
    axes[0].set_yticks(range(len(sizes)), [f"{size:,} rows" for size in sizes])
    axes[0].set_ylim(1.5, -0.5)
    axes[0].set_xlim(-0.008, 0.079)
    plt.show()

# %% [markdown]
# The ticks are the effects, and the bars are their intervals. With 500 rows the interval of the rain reaches below
# zero. With 8,000 it does not. Column 8, which decides nothing, stays at zero, and its interval shrinks as well.
#
# ## Where to be careful
#
# - **Memory.** `max_samples` limits what is tested, and not what is held. The audit reads the whole file, and keeps
#   several numbers for each row and column, [about 7 times the size of a table of 12
#   columns](../help/memory.md#what-each-function-holds-in-memory). If that is too much, draw row numbers, sort them,
#   and audit only these rows: `explain.audit(model, x[drawn], y[drawn])`. Then its attributions and its skill are those
#   of the drawn rows, and the workers' sums say what the means of all rows are.
# - **Order.** `max_samples` draws runs of 100 rows, so that the audit can still notice neighbors that depend on each
#   other. If rows belong together, such as those of one patient, give `groups=`. Then whole groups are drawn.
# - **Rare rows.** A test on 8,000 of 80,000 rows sees one in ten. [A regime of 24 rows](million_rows.ipynb) would
#   hardly be in it.
# - **Choose `max_samples` before you look.** Whoever tries several sizes, and reports the one with the nicest verdict,
#   tests more often than the file says. We tried two to show what they buy.
#
# ## What it says, and what it does not
#
# **It says** that the model needs the three columns that decide, which 8,000 rows are enough to show. It says that 500
# rows are too few for the rain, and that the audit's mean attributions are those of all 80,000 unseen rows.
#
# **It does not say** how many rows your data need. That depends on the size of the effects and on the noise. Nor does
# it say that the other nine columns are useless: *undetermined* means that nothing is claimed about them. And more rows
# do not repair a model that was trained on some of them.
#
# **Use your own data:** replace `save_table` with your files, let `table` open them, and replace `names`, `planted`,
# `build_model` and `trained_model`. `rows`, `trained` and `block` say how many rows there are, how many of them the
# model has seen, and how many a worker takes at once. `sums_of` and the calls of `explain.audit` stay as they are.
