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
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory.layers import InterpretableMultiHeadAttention

keras.utils.set_random_seed(1)


# %% [markdown]
# ## A function to reuse
#
# It takes scores as any layer or model of these recipes returns them and draws the first sample, always on the scale from
# 0 to 1, so that two pictures can be compared.


# %%
def visualize_attention(attention_scores, feature_names=None, head_idx=0):
    """Draw the attention scores of the first sample as a heat map.

    Args:
        attention_scores: Array of shape (sample, head, query, key).
        feature_names: One name per token, if queries and keys are the same tokens.
        head_idx: Which head to draw.
    """
    scores = np.asarray(attention_scores)[0, head_idx]
    size = 2.5 + 0.3 * max(scores.shape)
    fig, ax = plt.subplots(figsize=(size + 1, size))
    image = ax.imshow(scores, cmap="Blues", vmin=0, vmax=1)
    fig.colorbar(image, label="attention score")
    ax.set_title(f"Head {head_idx}")
    ax.set_xlabel("key (looked at)")
    ax.set_ylabel("query (looking)")
    if feature_names is not None:
        ax.set_xticks(range(len(feature_names)), feature_names, rotation=45, ha="right")
        ax.set_yticks(range(len(feature_names)), feature_names)
    plt.show()


# %% [markdown]
# Try it on the usual shortcut first, a table row squeezed into a single token:

# %% alt="A heat map of one dark square: one token that looks at itself."
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Keras warns that a softmax over one token is always 1
    layer = InterpretableMultiHeadAttention(d_model=64, n_head=8)
    layer(np.ones((32, 1, 64), dtype="float32"))
print("Scores (sample, head, query, key):", tuple(layer.attention_scores.shape))
visualize_attention(layer.attention_scores, feature_names=["the row"])

# %% [markdown]
# One square, always 1: a picture of the reshape, not of the data.
#
# ## A task whose answer is known

# %%
rng = np.random.default_rng(1)
days = [f"day {day}" for day in range(1, 13)]
readings = rng.normal(size=(4000, 12)).astype("float32")
marked = rng.integers(0, 12, size=4000)
inputs_data = np.stack([readings, np.eye(12, dtype="float32")[marked]], axis=-1)  # (sample, day, reading and mark)
target = readings[np.arange(4000), marked]

inputs = keras.Input(shape=(12, 2))
x = keras.layers.Dense(16)(inputs)
attention = InterpretableMultiHeadAttention(d_model=8, n_head=4)
x = attention(x)
x = keras.layers.GlobalAveragePooling1D()(x)
model = keras.Model(inputs, keras.layers.Dense(1)(x))
scores_model = keras.Model(inputs, attention.attention_scores)

model.compile(keras.optimizers.Adam(0.01), loss="mse")
model.fit(inputs_data[:3000], target[:3000], batch_size=64, epochs=10, verbose=0)
error = model.evaluate(inputs_data[3000:], target[3000:], verbose=0)
print(f"Mean squared error on 1000 new samples: {error:.2f} (always predicting the mean: {target[3000:].var():.2f})")

# %% [markdown]
# ## One sample, one head
#
# Each head gives some share of its attention to the marked day. The head with the largest share is the one to draw.

# %%
scores = scores_model.predict(inputs_data[3000:], verbose=0)
on_marked = scores[np.arange(1000), :, :, marked[3000:]].mean(axis=(0, 2))
for head, share in enumerate(on_marked):
    print(f"Head {head}: {share:.2f} of its attention is on the marked day (even: {1 / 12:.2f})")
best = int(on_marked.argmax())
print(
    f"In the sample below, {days[marked[3000]]} is marked; head {best} looks most at {days[scores[0, best].mean(axis=0).argmax()]}"
)

# %% tags=["cover"] alt="Heat map of one sample's attention: twelve days by twelve days, with one dark column at the marked day."
visualize_attention(scores, feature_names=days, head_idx=best)

# %% [markdown]
# ## All heads side by side
#
# One scale for all of them: with a scale each, a head that does nothing looks as busy as one that does the work.

# %% alt="Four heat maps side by side on one colour scale. Every head has a column at the marked day; it is darkest in head 1 and faintest in head 0."
fig, axes = plt.subplots(1, 4, figsize=(9, 2.8), layout="constrained", sharey=True)
for head, ax in enumerate(axes):
    image = ax.imshow(scores[0, head], cmap="Blues", vmin=0, vmax=1)
    ax.set_title(f"Head {head}")
    ax.set_xticks([0, 5, 11], ["day 1", "6", "12"])
    ax.set_yticks([0, 5, 11], ["day 1", "6", "12"])
    ax.set_xlabel("key")
axes[0].set_ylabel("query")
fig.colorbar(image, ax=axes, label="attention score")
plt.show()

# %% [markdown]
# ## The average hides it
#
# The usual next step is to average over samples. Here it destroys what there is to see, because each sample marks
# another day.

# %% alt="Heat map of the attention averaged over 1000 samples, on the same scale: pale everywhere."
mean_scores = scores.mean(axis=0, keepdims=True)
print(f"One sample's scores of head {best} range from {scores[0, best].min():.2f} to {scores[0, best].max():.2f}")
print(f"The average's range from {mean_scores[0, best].min():.2f} to {mean_scores[0, best].max():.2f}")
visualize_attention(mean_scores, feature_names=days, head_idx=best)

# %% [markdown]
# ## What the map says, and what it does not
#
# **It says** which day a head reads in this sample, and the mark confirms it: attention here is what the task asks for.
#
# **It does not say** that the head with the faintest column does the least: what a head adds to the output is score times value, and the map
# shows only the score. And a pale average does not mean that no sample has a strong pattern; look at single samples
# before you average.
