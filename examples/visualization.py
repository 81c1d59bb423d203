# %% [markdown] level="beginner"
# # Attention visualization
#
# **How do you draw attention scores so that a reader sees what one sample's heads look at, and what does an average hide?**
#
# Draw single samples, with all heads on one scale. Here, three of eight heads then show that they give more than half of
# their attention to the day that decides. An average over samples hides this, because that day differs between samples.
#
# The data are simulated, so the answer is known: of twelve daily readings one is marked, another one for each
# sample, and the target is the marked reading. A model that solves the task must look at the marked day.

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
# Two attention layers of four heads each, with residual connections.

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
# Take it where you have an array and nothing but matplotlib. Take [`plot.heatmap`](../api/plot.md) for everything else:
# it knows the names that [`explain.capture`](../api/explain.md) gives to the scores of any model, says what was averaged, marks
# the uniform share on the color bar, and draws long sequences in bins.
#
# Read either by rows: each row says how one day, the query, shares out 1 among all days, the keys. A dark column is a day that
# all others look at.
#
# ## All heads on one scale
#
# [`plot.model`](../api/plot.md) draws all layers and heads on the same scale. With a scale each, a head that does nothing would look as busy as
# one that does the work.

# %% tags=["cover"] alt="Two rows, the layers, of four heat maps, the heads, of one sample on one scale. In the first layer head 0 has a pale column at the marked day and the others are uniform. In the second, heads 0, 1 and 3 have a dark column there, and head 2 is uniform."
scores = explain.capture(model, inputs_data[3000:], feature_names=days, verbose=0)
one = {name: layer.sel(sample=0) for name, layer in scores.items()}
figure = plot.model(one, vmax=1)
for name, layer in scores.items():
    on_marked = layer.values[np.arange(1000), :, :, marked[3000:]].mean(axis=(0, 2))
    focused = np.flatnonzero(on_marked > 0.5).tolist()
    print(f"{name} layer, heads with more than half of it on the marked day: {focused}")

# %% [markdown]
# ## The average hides it
#
# The usual next step is to average over samples. Here it destroys what there is to see, because each sample marks
# another day.

# %% alt="Heat map of the attention averaged over 1000 samples, on the same scale: pale everywhere."
head = scores["second"].sel(head=3)
average = head.mean("sample")
ax = plot.heatmap(head, vmax=1)
print(f"Largest score in the sample above: {head.sel(sample=0).max():.2f}")
print(f"Largest in the average: {average.max():.2f} (uniform: {1 / 12:.2f})")

# %% [markdown]
# ## Try it
#
# So look at single samples. `plot.interactive` makes a map of all layers, heads and the first samples, complete in one piece
# of HTML that needs no network. Click on a small map to enlarge it. Move the slider: the column follows the mark from
# sample to sample. Point at a cell, or tab to the map and use the arrow keys, to read its score.

# %%
looked_at = head.mean("query").idxmax("key")
for sample in range(4):
    day, truth = looked_at[sample].item(), days[marked[3000 + sample]]
    print(f"Sample {sample}: {truth} is marked; head 3 looks most at {day}")

# %% tags=["interactive", "nbval-ignore-output"]
plot.interactive(scores, samples=4)

# %% [markdown]
# ## What not to draw
#
# A table row squeezed into a single token has one score, which is always 1: a picture of the reshape, not of the data.

# %% alt="A heat map of one dark square: one token that looks at itself."
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a softmax over one token is always 1
    squeezed = InterpretableMultiHeadAttention(d_model=64, n_head=8)
    squeezed(np.ones((32, 1, 64)))
    print("Scores:", squeezed.attention_scores.shape)
visualize_attention(squeezed.attention_scores, ["the row"])

# %% [markdown]
# ## What the map says, and what it does not
#
# **It says** which day a head reads in this sample, and the mark confirms it: attention here is what the task asks for.
#
# **It does not say** that a head with a pale map does nothing: what a head adds to the output is score times value, and the
# map shows only the score. And a pale average does not mean that no sample has a strong pattern; look at single
# samples before you average.
#
# **Use your own data:** replace `inputs_data`, `days` and `model`; the lines from `explain.capture` on stay as they are.
