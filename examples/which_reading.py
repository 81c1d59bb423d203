# %% [markdown] level="intermediate" data="table"
# # Which reading finds the planted truth?
#
# **Seven readings of what matters to a model disagree. Which of them names the columns that make the outcome?**
#
# Four of seven readings are right about every pair of columns in both models: attention × gradient, integrated
# gradients, permutation importance and the conditional effect. Attention, rollout and the value norm are wrong about
# some pairs: in the second model, attention has an AUC of 0.73.
#
# We made the data, so we know the answer. The columns are readings of a machine. Three of them make the outcome:
# `heat`, `load` and `speed`. Five others have nothing to do with it, and three of these, the counters, hold larger
# numbers. The [tables with thirty models](../learn/which-reading.md) have the same data under the name *loud nulls*.

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.inspection import permutation_importance

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

names = ["heat", "counter a", "load", "dial a"]
names += ["counter b", "speed", "dial b", "counter c"]
planted = np.array([name in ("heat", "load", "speed") for name in names])

rng = np.random.default_rng(0)
x = rng.normal(size=(700, 8)).astype("float32")
x[:, [1, 4, 7]] *= 5  # the counters
y = (x[:, 0] + 0.8 * x[:, 2] + 0.6 * x[:, 5] + 0.5 * rng.normal(size=700)).astype(
    "float32"
)
x_train, x_test, y_train, y_test = x[:500], x[500:], y[:500], y[500:]

# %% [markdown]
# ## Two models that are right
#
# Each model has two attention layers, and each layer has a residual connection. The two models differ only in their
# seed.


# %%
def train(seed):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((8,))
    tokens = FeatureTokenizer(16, feature_names=names)(inputs)
    for layer in ("first", "second"):
        attended = InterpretableMultiHeadAttention(
            d_model=16, n_head=2, dropout_rate=0.0, name=layer
        )(tokens)
        tokens = keras.layers.Add()([tokens, attended])
    hidden = keras.layers.Dense(32, "relu")(
        keras.layers.GlobalAveragePooling1D()(tokens)
    )
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden), name="machine")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x_train, y_train, batch_size=50, epochs=15, verbose=0)
    return model


models = [train(seed) for seed in range(2)]


def error(model, x, y):
    return np.mean((model.predict_on_batch(x)[:, 0] - y) ** 2)


for model in models:
    explained = 1 - error(model, x_test, y_test) / y_test.var()
    print(f"explains {explained:.2f} of the variance of new samples")

# %% [markdown]
# ## Seven readings
#
# Five come from `explain.attribute`. They give a number for each sample, and we take the mean absolute value. The other
# two need the labels: they make a column useless, and measure how much worse the model does. *Permutation importance*
# shuffles the column. The *conditional effect* in `explain.feature_claims` resamples it given the other columns.


# %%
def readings_of(model):
    result = {}
    for name, method in {
        "attention": "attention",
        "rollout": "rollout",
        "attention × gradient": "attention_gradient",
        "value norm": "value_norm",
        "integrated gradients": "integrated_gradients",
    }.items():
        attribution = explain.attribute(
            model, x_test, method=method, batch_size=200, verbose=0
        )
        result[name] = np.abs(attribution.values).mean(axis=0)
    shuffled = permutation_importance(
        model,
        x_test,
        y_test,
        scoring=lambda *case: -error(*case),
        n_repeats=5,
        random_state=0,
    )
    result["permutation importance"] = shuffled.importances_mean
    claims = explain.feature_claims(
        model, x_test, y_test, attribution, batch_size=1000, verbose=0
    )
    result["conditional effect"] = claims["effect"].values
    return result


readings = [readings_of(model) for model in models]

# %% [markdown]
# ## What they say
#
# Each row is a reading, and a dark cell is a column that the reading calls important. Attention is nearly the same for
# all columns.

# %% tags=["cover"] alt="Two heat maps, one below the other for two models, of seven readings by eight columns: three planted columns on the left of a line and five others on its right. The rows of attention and rollout are dark all over. Those of attention × gradient and the value norm are dark on the left and paler on the right, except one or two columns of the second model. Those of integrated gradients, permutation importance and the conditional effect are dark on the left and white or nearly white on the right."
order = np.argsort(~planted, kind="stable")
fig, axes = plt.subplots(2, 1, figsize=(4.9, 6), layout="constrained", sharex=True)
for number, (ax, result) in enumerate(zip(axes, readings, strict=True), start=1):
    table = np.array([values[order] / values.max() for values in result.values()])
    image = ax.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.axvline(2.5, color="#d55e00", linewidth=3)
    ax.set_xticks(
        range(8),
        [names[column] for column in order],
        rotation=60,
        ha="right",
        rotation_mode="anchor",
    )
    ax.set_yticks(range(len(table)), result)
    ax.set_title(f"model {number}: planted | others")
fig.colorbar(image, ax=axes, label="importance (largest = 1)")
plt.show()

# %% [markdown]
# ## The score
#
# We take all pairs of one planted column and one other column. The AUC is the share of pairs in which the planted
# column ranks higher. A random reading gets 0.5 on average.


# %%
def auc(importance):
    return (importance[planted][:, None] > importance[~planted]).mean()


aucs = {
    reading: [auc(result[reading]) for result in readings] for reading in readings[0]
}
print(f"{'AUC':24}model 1  model 2")
for reading, values in aucs.items():
    print(f"{reading:24}{values[0]:7.2f}{values[1]:9.2f}")

# %% alt="Seven rows of two dots, the AUC of each reading in two models. Attention, rollout and the value norm are at 1 in model 1, and between 0.7 and 0.9 in model 2. The other four are at 1 in both models."
fig, ax = plt.subplots(figsize=(4.9, 3.4), layout="constrained")
rows = np.arange(len(aucs))
for number, color in enumerate(["#0072b2", "#e69f00"]):
    values = [of_models[number] for of_models in aucs.values()]
    place = rows + 0.2 * number - 0.1
    ax.scatter(values, place, color=color, label=f"model {number + 1}")
ax.axvline(0.5, color="#999999", linestyle="--", label="random")
ax.set_yticks(rows, aucs)
ax.invert_yaxis()
ax.set_xlim(0.3, 1.03)
ax.set_xlabel("AUC of the planted columns")
fig.legend(loc="outside upper center", ncols=3)
plt.show()

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** that a model can be right about the outcome while its attention does not show what made it. Both models
# explain more than three quarters of the variance, and attention ranks the planted columns first in only one of them.
# One reason may be that a column can also bypass the attention through the residual connections. The readings that
# follow the output or the loss rank the planted columns first in both models: attention × gradient, integrated
# gradients, permutation importance and the conditional effect.
#
# **It does not say** that attention always misses the truth, nor that the other four always find it. [The
# tables](../learn/which-reading.md) have thirty models for each kind of data, with intervals. They show where attention
# does well, and where the best readings of this page make mistakes. And the columns here are independent. If columns
# depend on each other, shuffling one of them gives the model rows that never occur, and the conditional effect is the
# safer reading.
#
# **Use your own data:** replace `x`, `y` and `names`, and let `train(seed)` return your model. `readings_of(model)`
# stays as it is. `planted` and `auc` are for data whose answer is known.
