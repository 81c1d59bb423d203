# %% [markdown] level="beginner"
# # Attention visualization
#
# **How do you draw attention scores so that a reader sees what one sample's heads look at, and what does an average hide?**
#
# The data are simulated, so the answer is known: of twelve daily readings one is marked, another one for each
# sample, and the target is the marked reading. A model that solves the task must look at the marked day.

# %%
import warnings

import keras
import numpy as np
from IPython.display import HTML

from kerasfactory import explain, plot
from kerasfactory.layers import InterpretableMultiHeadAttention

keras.utils.set_random_seed(1)

# %% [markdown]
# ## What not to draw
#
# The usual shortcut first: a table row squeezed into a single token. [`plot.heatmap`](../api/plot.md) takes scores with the names of
# their axes, as [`explain.capture`](../api/explain.md) returns them for any model, and draws one map.

# %% alt="A heat map of one dark square: one token that looks at itself."
with warnings.catch_warnings():
    # Keras warns that a softmax over one token is always 1.
    warnings.simplefilter("ignore")
    squeezed = keras.Sequential(
        [keras.Input((1, 64)), InterpretableMultiHeadAttention(64, 8, name="squeezed")]
    )
    one_token = explain.capture(
        squeezed, np.ones((32, 1, 64)), feature_names=["the row"], verbose=0
    )["squeezed"]
print("Scores:", dict(one_token.sizes))
ax = plot.heatmap(one_token)

# %% [markdown]
# One square, always 1: a picture of the reshape, not of the data.
#
# ## A task whose answer is known

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
x = InterpretableMultiHeadAttention(d_model=8, n_head=4, name="attention")(x)
x = keras.layers.GlobalAveragePooling1D()(x)
model = keras.Model(inputs, keras.layers.Dense(1)(x))

model.compile(keras.optimizers.Adam(0.01), loss="mse")
model.fit(inputs_data[:3000], target[:3000], batch_size=64, epochs=10, verbose=0)
error = model.evaluate(inputs_data[3000:], target[3000:], verbose=0)
print(
    f"Mean squared error on 1000 new samples: {error:.2f} (always predicting the mean: "
    f"{target[3000:].var():.2f})"
)

# %% [markdown]
# ## One sample, one head
#
# Each head gives some share of its attention to the marked day. The head with the largest share is the one to draw.

# %%
scores = explain.capture(model, inputs_data[3000:], feature_names=days, verbose=0)[
    "attention"
]
on_marked = scores.values[np.arange(1000), :, :, marked[3000:]].mean(axis=(0, 2))
for head, share in enumerate(on_marked):
    print(
        f"Head {head}: {share:.2f} of its attention is on the marked day (even: "
        f"{1 / 12:.2f})"
    )
best = int(on_marked.argmax())
most = scores.sel(sample=0, head=best).mean("query").idxmax().item()
print(
    f"In the sample below, {days[marked[3000]]} is marked; head {best} looks most at "
    f"{most}"
)

# %% tags=["cover"] alt="Heat map of one sample's attention: twelve days by twelve days, with one dark column at the marked day."
ax = plot.heatmap(scores.sel(sample=0, head=best), vmax=1)

# %% [markdown]
# Read it by rows: each row says how one day, the query, shares out 1 among all days, the keys. A dark column is a day that
# all others look at. `vmax=1` fixes the scale, so that this map can be compared with those below; without it, the
# scale ends at the largest score, and the color bar says where that is.
#
# ## All heads on one scale
#
# One scale for all of them: with a scale each, a head that does nothing looks as busy as one that does the work.

# %% alt="Four heat maps, two by two, on one color scale. Every head has a column at the marked day; it is darkest in head 1 and faintest in head 0."
figure = plot.heads(scores.sel(sample=0), vmax=1, columns=2)

# %% [markdown]
# ## The average hides it
#
# The usual next step is to average over samples. Here it destroys what there is to see, because each sample marks
# another day.

# %% alt="Heat map of the attention averaged over 1000 samples, on the same scale: pale everywhere."
one, average = scores.sel(sample=0, head=best), scores.sel(head=best).mean("sample")
print(
    f"One sample's scores of head {best} range from {one.min():.2f} to {one.max():.2f}"
)
print(f"The average's range from {average.min():.2f} to {average.max():.2f}")
ax = plot.heatmap(scores.sel(head=best), vmax=1)

# %% [markdown]
# ## Try it
#
# So look at single samples:

# %%
looked_at = scores.sel(head=best).mean("query").idxmax("key")
for sample in range(4):
    day = looked_at[sample].item()
    print(
        f"Sample {sample}: {days[marked[3000 + sample]]} is marked; head {best} looks "
        f"most at {day}"
    )

# %% [markdown]
# `plot.interactive` makes a map of all heads and the first samples, complete in one piece of HTML that needs no network.
# Move the sliders: the column follows the mark from sample to sample, and the heads differ in how strong it is. Point at a
# cell, or tab to the map and use the arrow keys, to read its score.

# %% tags=["interactive", "nbval-ignore-output"]
HTML(plot.interactive(scores, samples=4))

# %% [markdown]
# ## What the map says, and what it does not
#
# **It says** which day a head reads in this sample, and the mark confirms it: attention here is what the task asks for.
#
# **It does not say** that the head with the faintest column does the least: what a head adds to the output is score times value, and the map
# shows only the score. And a pale average does not mean that no sample has a strong pattern; look at single samples
# before you average.
