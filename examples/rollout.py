# %% [markdown] level="intermediate" data="time series"
# # Attention across several layers: rollout
#
# **When a model has several attention layers, which layer's map shows what the answer depends on?**
#
# If the answer depends on a day that is out of reach of each layer, no single map shows it: both have a weight of 0
# there. Rollout, which multiplies the maps, gives that day some weight in 470 of 470 such samples, but nearly always
# more to another day.
#
# The truth is planted: in each sample one day is marked, and the answer is the reading of that day. A layer looks at
# most four days away. So a reading from further back needs both layers: the first carries it part of the way, and the
# second carries it the rest.

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory import explain
from kerasfactory.layers import InterpretableMultiHeadAttention

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Two layers, each with a short reach
#
# There are nine days, and the model answers from the last one. `sliding_window=5` lets a day look at itself and at four
# days on either side.

# %%
DAYS = 9
rng = np.random.default_rng(0)


def samples(number):
    readings, marked = rng.normal(size=(number, DAYS)), rng.integers(0, DAYS, number)
    # (sample, day, reading and mark)
    x = np.stack([readings, np.eye(DAYS)[marked]], axis=-1).astype("float32")
    return x, readings[np.arange(number), marked], marked


inputs = keras.Input((DAYS, 2))
x = keras.layers.Dense(16)(inputs)
for name in ("first", "second"):
    attention = InterpretableMultiHeadAttention(
        d_model=16, n_head=2, dropout_rate=0.0, sliding_window=5, name=name
    )
    x = x + attention(x)  # a residual connection: what a day knew stays
model = keras.Model(inputs, keras.layers.Dense(1)(x[:, -1]))
model.compile(keras.optimizers.Adam(0.01), "mse")

x_train, y_train, _ = samples(4000)
model.fit(x_train, y_train, batch_size=64, epochs=8, verbose=0)
x_test, y_test, marked = samples(1000)
error = model.evaluate(x_test, y_test, batch_size=250, verbose=0)
print(
    f"Mean squared error: {error:.2f} (always predicting the mean: {y_test.var():.1f})"
)

far = marked < DAYS - 5  # out of reach of the last day's own look
print(
    f"The marked day is out of reach of the last day in {far.sum()} of {len(far)} "
    "samples"
)

# %% [markdown]
# The model solves the task for near and far days. So it must carry the far readings through the days in between.
#
# ## Layer by layer
#
# [`explain.capture`](../api/explain.md) returns the maps of both layers, and [`explain.rollout`](../api/explain.md)
# multiplies them. It assumes that half of each day comes through the layer, and that half bypasses the layer through
# the residual connection. With the mean \(\bar A_l\) over the heads of layer \(l\),
#
# $$
# \tilde A = \tfrac{1}{2}(\bar A_2 + I) \cdot \tfrac{1}{2}(\bar A_1 + I)
# $$
#
# (Abnar and Zuidema 2020, [*Quantifying Attention Flow in Transformers*](https://arxiv.org/abs/2005.00928)).

# %%
days = [f"day {day}" for day in range(1, DAYS + 1)]
scores = explain.capture(model, x_test, feature_names=days, batch_size=250, verbose=0)
rolled = explain.rollout(scores)
sums = rolled.sum("key")
print("Rollout:", dict(rolled.sizes))
print(f"Sums of the rows: {sums.min():.4f} to {sums.max():.4f}")

# %% tags=["cover"] alt="Three maps, one below the other, of one sample in which day 2 is marked, from the days that look to the days looked at. In the maps of the first and the second layer everything more than four days from the diagonal is white, so the framed cell, day 9 looking at day 2, is empty. In the rollout, at the bottom, it is filled, faintly."
sample = int(np.flatnonzero(marked == 1)[0])
maps = {
    name: array.sel(sample=sample).mean("head") for name, array in scores.items()
} | {"rollout": rolled.sel(sample=sample)}
fig, axes = plt.subplots(3, 1, figsize=(4.9, 8), layout="constrained", sharex=True)
for (name, values), ax in zip(maps.items(), axes, strict=True):
    image = ax.imshow(values, cmap="Blues", vmin=0, vmax=1)
    ax.add_patch(
        plt.Rectangle(
            (0.5, DAYS - 1.5), 1, 1, fill=False, edgecolor="#d55e00", linewidth=2
        )
    )
    ax.set_title(name if name == "rollout" else f"{name} layer")
    ax.set_ylabel("query (looking)")
    ax.set_xticks(range(DAYS), range(1, DAYS + 1))
    ax.set_yticks(range(DAYS), range(1, DAYS + 1))
ax.set_xlabel("key (looked at)")
fig.colorbar(image, ax=axes, label="weight", shrink=0.6)
plt.show()
print("Weight of day 2 for day 9:")
for name, values in maps.items():
    print(f"{name:8}{values[-1, 1].item():.1f}")

# %% [markdown]
# The frame marks the cell in question: what day 9, the day that answers, takes from day 2, the marked day. Both layers
# have exactly 0 there, because they cannot look that far. The rollout has 0.2: day 6 looks at day 2 in the first layer,
# and day 9 looks at day 6 in the second.
#
# ## Over all samples
#
# [`explain.attribute`](../api/explain.md) gives one number for each feature. `query=-1` takes the row of the last day,
# from which the model answers. Does the marked day have the largest number in most samples? And does a far day have
# more than 0?

# %%
attributions = {
    "last layer": scores["second"].mean("head").isel(query=-1),
    "mean of layers": explain.attribute(
        model, x_test, query=-1, batch_size=250, verbose=0
    ),
    "value norms": explain.attribute(
        model, x_test, method="value_norm", query=-1, batch_size=250, verbose=0
    ),
    "rollout": explain.attribute(
        model, x_test, method="rollout", query=-1, batch_size=250, verbose=0
    ),  # rolled's last row
}


def report(attributions):
    print("The marked day is    largest     above 0")
    print("                  near   far         far")
    for name, values in attributions.items():
        largest = values.argmax(axis=1) == marked
        above = (values[far, marked[far]] > 0).sum()
        near_share, far_share = largest[~far].mean(), largest[far].mean()
        print(f"{name:16}{near_share:6.0%}{far_share:6.0%}{above:5} of {far.sum()}")


report({name: attribution.values for name, attribution in attributions.items()})

# %% [markdown]
# If the marked day is near, each of the four gives it the largest number in most samples. If it is far, only the
# rollout gives it any weight. But in nearly all of these samples, the rollout gives more to another day. To which?
#
# ## What rollout gives to every sample
#
# Rollout has a shape of its own, whatever the sample. The last day gets at least a quarter through the two residual
# connections, and days within reach get more than days that need two steps. The mean over all samples shows that shape.
# We subtract it, and what is left is about this sample.

# %% alt="Two bar charts over the nine days, of the same sample, in which day 2 is marked. At the top, the rollout of this sample beside the mean of all samples. The mean is highest at day 9, lower at days 5 to 8, and close to 0 at days 1 to 4; this sample has far more than that at day 2, but still most at day 9. At the bottom, the difference: day 2 stands out, day 6 is next, all others are below 0."
rollout = attributions["rollout"].values
usual = rollout.mean(axis=0)
against_usual = rollout - usual
fig, axes = plt.subplots(2, 1, figsize=(4.9, 5), layout="constrained")
axes[0].bar(np.arange(DAYS) - 0.2, rollout[sample], 0.4, label="this sample")
axes[0].bar(np.arange(DAYS) + 0.2, usual, 0.4, label="mean of all samples", color="0.7")
axes[0].set_ylabel("rollout")
axes[0].legend()
axes[1].bar(
    np.arange(DAYS),
    against_usual[sample],
    color=["#d55e00" if day == 1 else "C0" for day in range(DAYS)],
)
axes[1].axhline(0, color="0.5", linewidth=0.8)
axes[1].set_ylabel("difference")
for ax in axes:
    ax.set_xticks(range(DAYS), range(1, DAYS + 1))
    ax.set_xlabel("day")
plt.show()
most_often = np.bincount(rollout[far].argmax(axis=1)).argmax()
print(f"Far: the rollout is mostly largest at {days[most_often]}\n")
report({"rollout": rollout, "minus its mean": against_usual})

# %% [markdown]
# In this sample, the rollout gives most to day 9, the last, and so it does in most samples whose marked day is far. After
# the mean is subtracted, the marked day has the largest number in most samples, near or far.
#
# ## A second opinion
#
# The truth is planted, so we can test the answer without any map. We change the marked reading, and then another one,
# and measure how far the answer moves. In your own data no day is marked, so remove what a map puts first, and measure
# the same: [reading attention honestly](../concepts/reading-attention.md) says how.

# %%
answers = model.predict(x_test, batch_size=250, verbose=0)[:, 0]
other = (marked + rng.integers(1, DAYS, len(marked))) % DAYS
print("The answer for far days changes by")
for name, changed in [("the marked day", marked), ("another day", other)]:
    x_changed = x_test.copy()
    x_changed[np.arange(len(marked)), changed, 0] += 1
    change = np.abs(model.predict(x_changed, batch_size=250, verbose=0)[:, 0] - answers)
    print(f"{change[far].mean():.1f} after 1 more on {name}")

# %% [markdown]
# ## Where to be careful
#
# - It is an assumption that half goes through the layer and half bypasses it. A layer that replaces its input and a
#   layer that adds hardly anything are treated alike.
# - Rollout ignores the values. A day may receive attention and contribute nothing.
# - The layers must follow each other, over the same positions. Rollout does not apply across cross-attention or
#   pooling.
#
# ## What it says, and what it does not
#
# **It says** from which days information can have reached the answer. The day that decides gets weight in the rollout,
# although the map of each single layer has 0 there. Against the mean of all samples, it stands out most in most
# samples.
#
# **It does not say** how much the answer depends on a day. By size alone, some other day got more in nearly all samples
# whose marked day is far.
#
# **Use your own data:** replace `model` with a model of several attention layers over the same positions, `x_test` with
# your samples, `days` with the names of your positions, and `query=-1` with the position from which your model answers.
# `marked` is for data whose answer is known.
