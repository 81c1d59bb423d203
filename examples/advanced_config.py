# %% [markdown] level="intermediate" data="table"
# # Advanced configuration
#
# **What do the layer's options change, and do sixteen heads find five relevant features among fifty?**
#
# Sixteen heads together find all five: averaged over the heads, the five features that receive most attention are the
# five that decide. A single head finds four or five of them.
#
# The options change the shape of the output and of the scores, and the number of weights. A table below shows how.
#
# The data are simulated, so the answer is known: of fifty features five decide, one for each class. Read the
# [functional recipe](functional.ipynb) first.

# %%
import warnings

import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Configure the layer
#
# `d_model` is the size of **each head**, so 16 heads of 128 make projections of 2048 numbers. The output has the width
# of the query, here 128. The layer passes on every argument that `keras.layers.MultiHeadAttention` accepts.

# %%
attention = InterpretableMultiHeadAttention(
    d_model=128,
    n_head=16,
    dropout_rate=0.2,
    kernel_initializer="he_normal",
    use_bias=False,
    name="advanced_interpretable_attention",
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Keras warns about the softmax over one token
    inputs = keras.Input(shape=(50,))
    x = keras.layers.Dense(128, activation="relu")(inputs)
    x = keras.layers.Reshape((1, 128))(x)
    x = attention(x, x, x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(64, activation="relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(5, activation="softmax")(x))
    scores = keras.Model(inputs, attention.attention_scores).predict(
        np.ones((32, 50)), verbose=0
    )

print(
    "Query projection (width, heads, head size):",
    attention.mha.query_dense.kernel.shape,
)
print(
    "Weights of the attention layer:",
    f"{attention.count_params():,}",
    "in",
    len(attention.weights),
    "arrays, no biases",
)
print("Scores (row, head, query, key):", scores.shape)
print(f"from {scores.min():.3f} to {scores.max():.3f}")

# %% [markdown]
# All scores are 1 here, because there is only one token: the [Sequential recipe](sequential.ipynb) shows this in full.
#
# ## What each option changes
#
# Each entry builds the layer with one option changed, and calls it on 2 sequences of 6 tokens of width 8. The grids have
# 6 × 4 tokens.

# %%
tokens = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
grid = np.random.default_rng(0).normal(size=(2, 6, 4, 8)).astype("float32")
cases = [
    ("defaults", {}, tokens),
    ("value_dim=3", {"value_dim": 3}, tokens),
    ("use_bias=False", {"use_bias": False}, tokens),
    ("output_shape=5", {"output_shape": 5}, tokens),
    ("attention_axes=1 on a grid", {"attention_axes": 1}, grid),
    ("both axes of a grid", {"attention_axes": (1, 2)}, grid),
]
print(f"option\n  {'output':13}{'scores':18}weights")
for label, options, values in cases:
    layer = InterpretableMultiHeadAttention(d_model=4, n_head=3, **options)
    output = layer(values)
    shapes = f"{tuple(output.shape)!s:13}{tuple(layer.attention_scores.shape)!s:18}"
    print(f"{label}\n  {shapes}{layer.count_params():7}")

# %% [markdown]
# A misspelled option raises an error that suggests the option you probably meant:

# %%
try:
    InterpretableMultiHeadAttention(d_model=64, n_head=8, use_bais=False)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Sixteen heads, fifty features, five that matter
#
# Now each feature is a token. The heads have a size of 8 instead of 128, because a token of one feature holds little
# information. The truth is planted: the class is the signal with the largest value, after noise was added. The other 45
# features decide nothing.

# %%
signals = [3, 11, 24, 36, 47]
rng = np.random.default_rng(0)
data = rng.normal(size=(2000, 50)).astype("float32")
labels = (2 * data[:, signals] + rng.gumbel(size=(2000, 5))).argmax(axis=1)

inputs = keras.Input(shape=(50,))
x = FeatureTokenizer(16)(inputs)
attention = InterpretableMultiHeadAttention(
    d_model=8,
    n_head=16,
    dropout_rate=0.2,
    kernel_initializer="he_normal",
    use_bias=False,
)
x = attention(x)
x = keras.layers.Dense(32, activation="relu")(x)
x = keras.layers.GlobalAveragePooling1D()(x)
model = keras.Model(inputs, keras.layers.Dense(5, activation="softmax")(x))
scores_model = keras.Model(inputs, attention.attention_scores)

model.compile(
    keras.optimizers.Adam(0.01),
    loss="sparse_categorical_crossentropy",
    metrics=["accuracy"],
)
model.fit(data[:1500], labels[:1500], batch_size=64, epochs=5, verbose=0)

accuracy = model.evaluate(data[1500:], labels[1500:], verbose=0)[1]
best = (data[1500:, signals].argmax(axis=1) == labels[1500:]).mean()
print(
    f"Accuracy on 500 new rows: {accuracy:.2f} (knowing the rule: {best:.2f}, "
    "guessing: 0.20)"
)

# %%
scores = scores_model.predict(data[1500:], verbose=0)
received = scores.mean(axis=(0, 2))  # (head, feature)
ranking = np.argsort(-received.mean(axis=0))
print("Scores (row, head, query, key):", scores.shape)
print("Receive most:   ", sorted(ranking[:5].tolist()))
print("Planted signals:", signals)
found = [len(set(np.argsort(-head)[:5]) & set(signals)) for head in received]
print(
    f"Signals among a single head's first five: {min(found)} in the worst head, "
    f"{max(found)} in the best"
)

# %% tags=["cover"] alt="Heat map with 16 heads as rows and 50 features as columns. The five planted signals stand out as dark columns in some heads."
fig, ax = plt.subplots(figsize=(4.9, 4.2), layout="constrained")
image = ax.imshow(
    received, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest"
)
ax.set_xticks(
    signals, [f"signal {number}" for number in signals], rotation=45, ha="right"
)
ax.set_yticks(range(16), range(16))
ax.set_xlabel("feature (the five planted signals are named)")
ax.set_ylabel("head")
fig.colorbar(image, label="mean attention received")
plt.show()

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** that the heads together look most at the five features that decide.
#
# **It does not say** that any single head can be trusted. The worst head misses one of the five signals, and in the
# picture some heads show a signal hardly darker than the noise. Nor does it say where the signals end and the noise
# begins. Here we know that five features decide. On your data you do not.
#
# **Use your own data:** replace `data` and `labels`, the 50 in `shape=(50,)` with the number of your columns, and the
# 5 in `Dense(5, ...)` with the number of your classes. Without a known answer, leave out `signals`, `best` and `found`.
