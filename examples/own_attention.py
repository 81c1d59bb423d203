# %% [markdown] level="intermediate" data="any"
# # Attention that is not Keras' own
#
# **A layer of your own, or from a paper, returns no scores. How do you read its attention without changing it?**
#
# One line reads the scores of three such layers and leaves the layers as they are. In at least 97% of the cases, the
# event with most attention is the one that decides, in each of the three layers.
#
# The truth is planted: a case has eight events, A to H, each with an urgency and an amount. The answer is the amount of
# the most urgent event. So we know which event decides.

# %%
import warnings

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops

from kerasfactory import explain, plot

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Three ways to attend
#
# The first layer is written by hand, as in the code of many papers: a product, a softmax, a product. The others are
# `keras.layers.Attention` and `AdditiveAttention`. The scores of the latter are not products of queries and keys
# (Bahdanau et al. 2015, [*Neural Machine Translation by Jointly Learning to Align and
# Translate*](https://arxiv.org/abs/1409.0473)). The way they are called here, none of the three returns its scores.


# %%
class WrittenAttention(layers.Layer):
    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.query, self.key, self.value = (layers.Dense(width) for _ in range(3))

    def call(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return ops.softmax(q @ ops.transpose(k, (0, 2, 1))) @ v


def of_keras(attention):
    # Query, value, key.
    return lambda x: attention(
        [layers.Dense(16)(x), layers.Dense(16)(x), layers.Dense(16)(x)]
    )


def model_with(attend):
    events = keras.Input((8, 2))
    attended = attend(layers.Dense(16, activation="relu")(events))
    return keras.Model(
        events, layers.Dense(1)(layers.GlobalAveragePooling1D()(attended))
    )


models = {
    "by hand": model_with(WrittenAttention(16, name="written")),
    "Attention": model_with(of_keras(layers.Attention(name="product"))),
    "AdditiveAttention": model_with(
        of_keras(layers.AdditiveAttention(name="additive"))
    ),
}

# %% [markdown]
# ## Does each model solve the task?

# %%
rng = np.random.default_rng(0)


def cases(number):
    urgency, amount = rng.random((number, 8)), rng.normal(size=(number, 8))
    most_urgent = urgency.argmax(axis=1)
    # (case, event, urgency and amount)
    x = np.stack([urgency, amount], axis=-1).astype("float32")
    return x, amount[np.arange(number), most_urgent], most_urgent


x_train, y_train, _ = cases(4000)
x_test, y_test, most_urgent = cases(1000)
for name, model in models.items():
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    model.fit(x_train, y_train, batch_size=64, epochs=6, verbose=0)
    error = np.mean((model(x_test)[:, 0] - y_test) ** 2)
    print(f"{name:18}squared error {error:.1f}")
print(f"{'always the mean':18}squared error {y_test.var():.1f}")

# %% [markdown]
# Yes: the squared errors are at most 0.1, and that of a constant is 1.0.
#
# ## Read them
#
# [`explain.capture`](../api/explain.md) runs the model and finds each softmax whose result is multiplied by values, in
# whatever layer. It adds nothing to the layer or to the model. In a layer without heads, the axis `head` has length 1.

# %%
names = list("ABCDEFGH")
scores = {}
for name, model in models.items():
    ((layer, scores[name]),) = explain.capture(
        model, x_test, feature_names=names, batch_size=250, verbose=0
    ).items()
    print(f"{layer} ({scores[name].attrs['class']})", dict(scores[name].sizes))

# %% [markdown]
# The picture shows a hard case, in which the two most urgent events are close. In all three maps, most of the weight is
# on the more urgent of the two, from whichever event it is read.

# %% tags=["cover"] alt="Three heat maps of one case, one below the other, for the layer written by hand, Attention and AdditiveAttention, from events that look to events looked at. Each has one dark column at event C, the most urgent. At event G, the next one, there is a faint column, which shows most in AdditiveAttention."
# The lead of the most urgent event over the next one.
lead = np.diff(np.sort(x_test[:, :, 0]))[:, -1]
case = int(np.abs(lead - 0.03).argmin())
fig, axes = plt.subplots(3, 1, figsize=(4.9, 8.4), layout="constrained")
for ax, (name, of_layer) in zip(axes, scores.items(), strict=True):
    plot.heatmap(of_layer.sel(sample=case), ax=ax, vmax=1)
    ax.set_title(name)
plt.show()
# The most urgent event, and the next one.
first, second = x_test[case, :, 0].argsort()[:-3:-1]
table = {"urgency": x_test[case, :, 0]}
for name, of_layer in scores.items():
    table[f"{name}, weight"] = of_layer.sel(sample=case, head=0).mean("query").values
print(f"{'event':25}{names[first]:>6}{names[second]:>6}")
for name, row in table.items():
    print(f"{name:25}{row[first]:6.2f}{row[second]:6.2f}")

# %% [markdown]
# ## Are these the scores that the model used?
#
# Two numbers answer this. `prediction_difference` compares the outputs with and without `capture`.
# [`explain.recomposition_error`](../api/explain.md) multiplies the values by the scores, and compares the result with
# what the layer really computed. Both numbers are relative to the largest entry, and 0 is perfect.

# %%
print(f"{'':18}{'outputs':>8}{'recomposition':>14}")
print(f"{'layer':18}{'differ':>8}{'error':>14}")
for name, model in models.items():
    (error,) = explain.recomposition_error(
        model, x_test, batch_size=250, verbose=0
    ).values()
    difference = scores[name].attrs["prediction_difference"]
    print(f"{name:18}{difference:8.5f}{error:14.5f}")

# %% [markdown]
# ## What do they say?
#
# [`explain.attribute`](../api/explain.md) gives each event one number. In what share of the cases does the most urgent
# event have the largest (*right*)? And does the answer depend on the event with the largest number? We add 1 to the
# amount of that event (*named*), or to the amount of another one (*other*), and measure how far the answer moves.

# %%
cases_there = np.arange(len(x_test))


def moved_by(model, event):
    x = x_test.copy()
    x[cases_there, event, 1] += 1
    return np.abs(model(x) - model(x_test)).mean()


print(f"{'layer':18}{'right':>6}{'named':>7}{'other':>7}")
for name, model in models.items():
    attribution = explain.attribute(model, x_test, batch_size=250, verbose=0)
    named = attribution.argmax("feature").values
    other = (named + rng.integers(1, 8, len(named))) % 8
    print(
        f"{name:18}{np.mean(named == most_urgent):6.2f}"
        f"{moved_by(model, named):7.1f}{moved_by(model, other):7.1f}"
    )

# %% [markdown]
# ## What cannot be read, and how you notice
#
# Linear attention has no softmax over keys. It sums over all keys and values first, so there is no weight of a key for
# a query (Katharopoulos et al. 2020, [*Transformers are RNNs*](https://arxiv.org/abs/2006.16236)). If a model has such
# a layer beside another one, the other one is read, and a warning names what is missing.


# %%
class LinearAttention(WrittenAttention):
    def call(self, x):
        q, k, v = ops.elu(self.query(x)) + 1, ops.elu(self.key(x)) + 1, self.value(x)
        return (
            q @ (ops.transpose(k, (0, 2, 1)) @ v) / (q @ ops.sum(k, axis=1)[:, :, None])
        )


linear, written = (
    LinearAttention(16, name="linear"),
    WrittenAttention(16, name="written"),
)
both = model_with(lambda x: written(linear(x)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print("Read:", *explain.capture(both, x_test, batch_size=250, verbose=0))
print(caught[0].message)

# %% [markdown]
# If you ask for that layer, the warning becomes an error:

# %%
try:
    explain.capture(both, x_test, layers="linear", verbose=0)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Axes that only the layer knows
#
# The layer below attends within windows of four events, and puts the windows side by side into the batch. Its scores
# can be read, but they belong to 2,000 windows instead of 1,000 cases. Only the layer knows how many windows a case
# has. Pass [`explain.register_attention`](../api/explain.md) a function that says so.


# %%
class InWindows(WrittenAttention):
    def call(self, x):
        windows = ops.reshape(x, (-1, 4, x.shape[-1]))
        return ops.reshape(super().call(windows), (-1, *x.shape[1:]))


def by_window(layer, scores, x):
    return ops.reshape(scores, (-1, x.shape[1] // 4, *scores.shape[1:]))


windowed = model_with(InWindows(16, name="windowed"))
for adapter in (None, by_window):
    explain.register_attention(InWindows, adapter)
    captured = explain.capture(windowed, x_test, batch_size=250, verbose=0)
    print(dict(captured["windowed"].sizes))

# %% [markdown]
# In the same way, a layer whose weights are inside a kernel of its own can be read: the function computes them again.
# [Scores from any model](../learn/any-model.md) lists what else cannot be read, and why.
#
# ## What it says, and what it does not
#
# **It says** which event each of the three layers reads, by the scores that the layers really used.
#
# **It does not say** that a layer that cannot be read does nothing. Read the warnings before the maps.
#
# **Use your own data:** replace the models in `models` by your own, `x_test` by some of your samples, and `names` by
# the names of your tokens. The cells with `explain.capture` and `explain.recomposition_error` stay as they are.
# `most_urgent` is for data whose answer is known.
