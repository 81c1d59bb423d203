# %% [markdown] level="beginner" data="time series"
# # Attention visualization
#
# **How do you draw attention scores so that a reader sees what one sample's heads look at, and what does an average hide?**
#
# Draw single samples, with all heads on one scale. Here, three of eight heads give more than half of their attention to
# the day that decides. An average over samples hides it, because that day differs between samples: the largest score of
# a head falls from 0.96 to 0.10.
#
# The data are simulated, so the answer is known. Each sample has twelve daily readings. One of them is marked, and the
# target is the marked reading. The marked day differs between samples. A model that solves the task must look at the
# marked day.

# %%
import warnings

import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory import explain, plot
from kerasfactory.layers import InterpretableMultiHeadAttention

keras.utils.set_random_seed(0)

# %% [markdown]
# ## A task whose answer is known
#
# The model has two attention layers of four heads each, with residual connections.

# %%
rng = np.random.default_rng(1)
days = [f"day {day}" for day in range(1, 13)]
readings = rng.normal(size=(4000, 12)).astype("float32")
marked = rng.integers(0, 12, size=4000)
# (sample, day, reading and mark)
inputs_data = np.stack([readings, np.eye(12, dtype="float32")[marked]], axis=-1)
target = readings[np.arange(4000), marked]

inputs = keras.Input(shape=(12, 2))
x = keras.layers.Dense(16)(inputs)
for name in ("first", "second"):
    x = x + InterpretableMultiHeadAttention(d_model=8, n_head=4, name=name)(x)
x = keras.layers.GlobalAveragePooling1D()(x)
model = keras.Model(inputs, keras.layers.Dense(1)(x))

model.compile(keras.optimizers.Adam(0.01), loss="mse")
model.fit(inputs_data[:3000], target[:3000], batch_size=64, epochs=10, verbose=0)
error = model.evaluate(inputs_data[3000:], target[3000:], verbose=0)
print(
    f"Mean squared error on 1000 new samples: {error:.2f} "
    f"(always predicting the mean: {target[3000:].var():.2f})"
)

# %% [markdown]
# ## A function of your own
#
# The layer returns an array (sample, head, query, key). A few lines of matplotlib draw one head of its first sample:


# %% alt="Heat map of twelve days by twelve days, with one dark column at the marked day."
def visualize_attention(attention_scores, feature_names=None, head_idx=0):
    """Draw what each query looks at, in one head of the first sample."""
    scores = keras.ops.convert_to_numpy(attention_scores)[0, head_idx]
    plt.figure(figsize=(4.9, 4), layout="constrained")
    plt.imshow(scores, cmap="Blues", vmin=0)
    plt.colorbar(label="attention score")
    plt.title(f"Head {head_idx}")
    plt.xlabel("key (looked at)")
    plt.ylabel("query (looking)")
    if feature_names is not None:
        plt.xticks(range(len(feature_names)), feature_names, rotation=90)
        plt.yticks(range(len(feature_names)), feature_names)
    plt.show()


model(inputs_data[3000:3001])
visualize_attention(model.get_layer("second").attention_scores, days, head_idx=3)
print(f"In this sample, {days[marked[3000]]} is marked")

# %% [markdown]
# This function needs an array and matplotlib, and nothing else. [`plot.heatmap`](../api/plot.md) does more: it draws
# the names that [`explain.capture`](../api/explain.md) gives to the scores of any model, says what was averaged, marks
# the uniform share on the color bar, and draws long sequences in bins.
#
# Read either map by rows. A row shows how one day, the query, distributes its attention over all days, the keys. Each
# row sums to 1. A dark column is a day that all others look at.
#
# ## All heads on one scale
#
# [`plot.model`](../api/plot.md) draws all layers and heads on the same scale. If each head had a scale of its own, a
# nearly uniform head would look as busy as one that finds the marked day.

# %% tags=["cover"] alt="Two rows, the layers, of four heat maps, the heads, of one sample on one scale. In the first layer head 0 has a pale column at the marked day and the others are uniform. In the second, heads 0, 1 and 3 have a dark column there, and head 2 is uniform."
scores = explain.capture(model, inputs_data[3000:], feature_names=days, verbose=0)
one = {name: layer.sel(sample=0) for name, layer in scores.items()}
figure = plot.model(one, vmax=1)
print("Heads with more than half of their\nattention on the marked day, by layer:")
for name, layer in scores.items():
    on_marked = layer.values[np.arange(1000), :, :, marked[3000:]].mean(axis=(0, 2))
    focused = np.flatnonzero(on_marked > 0.5).tolist()
    print(f"{name:8}{focused}")

# %% [markdown]
# ## The average hides it
#
# The usual next step is to average over samples. Here the average destroys the pattern, because the marked day differs
# between samples.

# %% alt="Heat map of the attention averaged over 1000 samples, on the same scale: pale everywhere."
head = scores["second"].sel(head=3)
average = head.mean("sample")
ax = plot.heatmap(head, vmax=1)
print(f"Largest score in the sample above: {head.sel(sample=0).max():.2f}")
print(f"Largest in the average: {average.max():.2f} (uniform: {1 / 12:.2f})")

# %% [markdown]
# ## All heads in numbers
#
# [`explain.head_statistics`](../api/explain.md) says the same about all samples. *Entropy* is 0 if a head looks at a
# single day, and 1 if it looks at all days alike. [`plot.head_statistics`](../api/plot.md) draws it, with the largest
# score of a row, the distance from query to key, and how far the heads are from each other.

# %% alt="For each of the two layers: points for entropy, confidence and distance of its four heads, and a matrix of the distances between heads. In the first layer, all heads have an entropy of 0.85 or more. In the second, heads 0, 1 and 3 have 0.26 to 0.50, and head 2 has 0.99 and is far from the others."
statistics = explain.head_statistics(scores)
figure = plot.head_statistics(statistics)
print("Entropy of heads 0 to 3, by layer:")
for name, of_layer in statistics.items():
    print(f"{name:7}", *(f"{value:.2f}" for value in of_layer["entropy"].values))

# %% [markdown]
# ## Try it
#
# Look at single samples. `plot.interactive` makes a map of all layers and heads for the first samples. It is one piece
# of HTML that needs no network. Choose the second layer and head 3, and move the slider *sample*: the column follows the
# mark. To choose a layer and a head, move their sliders or click on a small map. Point at a cell, or tab to the map and
# use the arrow keys, to read its score.

# %%
looked_at = head.mean("query").idxmax("key")
print("sample  marked  head 3 looks most at")
for sample in range(4):
    day, truth = looked_at[sample].item(), days[marked[3000 + sample]]
    print(f"{sample:6}  {truth:8}{day}")

# %% tags=["interactive", "nbval-ignore-output"]
plot.interactive(scores, samples=4)

# %% [markdown]
# ## What not to draw
#
# If a table row is put into a single token, there is one score, which is always 1. Its picture is one dark square, which
# shows the reshape, not the data. The [Sequential recipe](sequential.ipynb) shows where that comes from.

# %% tags=["folded"] summary="The picture of one token" alt="A heat map of one dark square: one token that looks at itself."
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a softmax over one token is always 1
    squeezed = InterpretableMultiHeadAttention(d_model=64, n_head=8)
    squeezed(np.ones((32, 1, 64)))
    print("Scores:", squeezed.attention_scores.shape)
visualize_attention(squeezed.attention_scores, ["the row"])

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** which day a head reads in this sample. Here we know that this is right: in the first four samples, head 3
# looks most at the marked day.
#
# **It does not say** that a head with a pale map does nothing. What a head adds to the output is the score times the
# value, and the map shows only the score. Nor does a pale average say that no sample has a strong pattern.
#
# **Use your own data:** replace `inputs_data`, `days` and `model`. The lines from `explain.capture` on stay as they
# are. Leave out those with `marked`, which are for data whose answer is known.
