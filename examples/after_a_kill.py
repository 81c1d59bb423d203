# %% [markdown] level="advanced" data="any"
# # After a kill: continue where it stopped
#
# **A capture of many rows is killed in the middle. What survives, what is captured again, and how do you know that
# nothing is missing?**
#
# What was written to disk survives, and the same call made again continues from there. Here a process is killed after
# 15,000 of 20,000 rows. Of these, 13,300 are on disk, and 1,700 are captured again.
#
# Nothing is missing: around the break, the scores agree to 1e-5 with scores captured in memory. If a file is lost, the
# next call says so.
#
# The recipe needs `pip install ".[store]"` in a clone of the repository. You need to know
# [`capture`](existing_model.ipynb).

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer

keras.utils.set_random_seed(0)

# %% [markdown]
# ## A model, a table and a folder
#
# What the model attends to does not matter here, so it is not trained. The model and the table are saved to disk,
# because another process has to read them.

# %%
rows, columns = 20_000, 12
table = np.random.default_rng(0).normal(size=(rows, columns)).astype("float32")

inputs = keras.Input((columns,))
tokens = FeatureTokenizer(16)(inputs)
attention = keras.layers.MultiHeadAttention(num_heads=4, key_dim=8, name="attention")
x = keras.layers.Flatten()(attention(tokens, tokens))
model = keras.Model(inputs, keras.layers.Dense(1)(x))

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
model.save(folder / "model.keras")
np.save(folder / "table.npy", table)

# %% [markdown]
# ## The accident
#
# The program below captures the table in batches of 100 rows, with `store=`. It runs in a process of its own. When
# `capture` asks for row 15,000, the operating system kills that process, as it does when memory runs out: no error is
# raised, and nothing is cleaned up. (`SIGKILL` is a signal of Linux and macOS.)

# %%
program = """
import os, signal
import keras, numpy as np
from kerasfactory import explain

model = keras.models.load_model("model.keras")
table = np.load("table.npy")


def batches():
    for start in range(0, len(table), 100):
        if start == 15_000:
            os.kill(os.getpid(), signal.SIGKILL)
        yield table[start : start + 100]


explain.capture(model, batches(), store="scores.zarr", verbose=0)
"""
killed = subprocess.run([sys.executable, "-c", program], cwd=folder)

store = folder / "scores.zarr"
record = json.loads((store / ".zattrs").read_text())["kerasfactory"]
stored = record["samples"]
print("Exit status:", killed.returncode)
print(f"Rows on disk: {stored:,} of {rows:,}")
print(f"Captured, but lost: {15_000 - stored:,}")

# %% [markdown]
# `capture` writes about 4 MB at a time: first the scores, and then the record that says how many samples are valid. So
# a kill costs at most what was captured since the last record. The rest is valid, whatever the process was doing.
#
# ## The same call again
#
# Here the call is made in this process, with the table itself and with batches of another size. `capture` reads the
# stored rows of the table again, to make sure that they are the same. It runs the model on the first batch of them, to
# make sure that it is the same model, and then on the rows that are missing. We compare the times at which the files
# were written before and after.


# %%
def written():
    """When each file of scores was written, in the order of their rows."""
    files = (store / "attention" / "scores").glob("[0-9]*")
    return {file: file.stat().st_mtime_ns for file in sorted(files)}


before = written()
scores = explain.capture(model, table, batch_size=250, store=store, verbose=0)
scores = scores["attention"]

after = written()
kept = sum(after[file] == before[file] for file in before)
print(f"Files of scores: {len(before)} after the kill, {len(after)} in the end")
print(f"    as the killed process left them: {kept}")
print(f"Rows: {scores.sizes['sample']:,}")

# %% [markdown]
# ## Is anything missing?
#
# We capture 2,000 rows around the break again, in memory, and look for gaps. A gap would be NaN, or a row of scores
# that does not add up to 1.

# %%
around = slice(stored - 1000, stored + 1000)
again = explain.capture(model, table[around], verbose=0)["attention"]
apart = np.abs(scores[around].values - again.values).max()
print(f"Largest difference of a score around the break: {apart:.5f}")

sums = scores.sum("key").compute()
print(f"Sums of the rows: {sums.min().item():.4f} to {sums.max().item():.4f}")
print("Scores that are NaN:", int(scores.isnull().sum()))

# %% tags=["cover"] alt="Three bars over the rows of the table, from 0 to 20,000. The killed process captured rows up to 15,000. Of these, the rows up to 13,300 were on disk, and the rest was lost. The second call captured the rows from 13,300 to the end."
fig, ax = plt.subplots(figsize=(4.9, 2.6), layout="constrained")
bars = {
    "captured before the kill": (0, 15_000, "#bbbbbb"),
    "survived on disk": (0, stored, "#9ecae1"),
    "second call": (stored, rows - stored, "#fdae6b"),
}
for place, (label, (start, length, color)) in enumerate(bars.items()):
    ax.barh(place, length, left=start, color=color, height=0.6)
    ax.text(start + 250, place, f"{label}: {length:,}", va="center")
ax.axvline(15_000, color="black", linestyle="--", linewidth=1, zorder=0)
ax.text(15_200, 0, "the kill", va="center")
ax.set_xlabel("row of the table")
ax.set_xlim(0, rows)
ax.set_xticks(range(0, rows + 1, 5000))
ax.xaxis.set_major_formatter("{x:,.0f}")
ax.set_yticks([])
ax.invert_yaxis()
plt.show()

# %% [markdown]
# ## If a file is lost
#
# `capture` knows which files it has written. We delete one of them, and make the same call once more:

# %%
next(iter(after)).unlink()
try:
    explain.capture(model, table, batch_size=250, store=store, verbose=0)
except ValueError as error:
    print("...", str(error).partition("scores.zarr/")[2])

# %%
temporary.cleanup()

# %% [markdown]
# ## Where to be careful
#
# - Each file of scores ends in a checksum, so a changed file raises an error when it is read. A lost file does not: if
#   you open the store with xarray alone, its scores are NaN, and a mean skips them. So make the same call of `capture`
#   again before you rely on a store that has been copied or moved.
# - The call has to be the same. Other weights, other rows, the same rows in another order or another `layers` raise an
#   error that says what differs. Only the size of the batches may change.
# - If the result for a batch depends on the batches before it, as with random numbers, nothing can be continued: the
#   call starts over.
# - `capture` and `summarize` take `store=`. `attribute`, `faithfulness` and `audit` start over after a kill.
# - For many processes, give each one its own rows and its own store: [More rows than fit into
#   memory](million_rows.ipynb).
#
# ## What it says, and what it does not
#
# **It says** that this store, after this kill, holds all 20,000 rows, and that the 2,000 rows around the break are
# those of a capture without a kill.
#
# **It does not say** what a crash of the whole machine leaves. The operating system may then lose what it had not yet
# written to the disk. Nor does it say that no one has changed scores on purpose: a checksum can be computed again.
#
# **Use your own data:** replace `table` and `model`, and in the program the lines that load them. Leave out the two
# lines of the program that kill it. The call of `explain.capture` with `store=store` stays as it is.
