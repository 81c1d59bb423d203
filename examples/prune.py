# %% [markdown] level="advanced" data="picture"
# # Which heads can go?
#
# **A model has eight heads. Which of them does it need, can a cheap estimate tell, and what does it cost to remove the rest?**
#
# The four heads of the first layer are needed least, and a cheap estimate ranks all eight similarly, with a rank
# correlation of 0.9. Removing three heads lowers the accuracy from 0.95 to 0.82, and five more epochs raise it to 0.96.
#
# Importance is measured by leaving a head out. No heat map can replace that experiment. You need to know the [recipe
# for an existing model](existing_model.ipynb), which uses the same data, and [how to watch heads form](monitor.ipynb).

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from kerasfactory import explain

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Three parts of the data
#
# The data are 1,797 handwritten digits of 16 patches each. The model is trained on the first part, of 997. Heads are
# chosen on the second part, of 400, which the model has not seen. What the choice costs is measured on the third part,
# the other 400, which had no influence on it.

# %%
images, labels = load_digits(return_X_y=True)
patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4) / 16
x_train, x_rest, y_train, y_rest = train_test_split(
    patches, labels, train_size=997, random_state=0, stratify=labels
)
x_choose, x_test, y_choose, y_test = train_test_split(
    x_rest, y_rest, train_size=400, random_state=0, stratify=y_rest
)


class Position(keras.layers.Layer):
    def build(self, shape):
        self.embedding = self.add_weight(
            shape=shape[1:], initializer="uniform", name="embedding"
        )

    def call(self, x):
        return x + self.embedding


def transformer(heads):
    """One block for each number of heads."""
    inputs = keras.Input((16, 4))
    x = Position()(keras.layers.Dense(32)(inputs))
    for number, count in enumerate(heads):
        attention = keras.layers.MultiHeadAttention(
            count, key_dim=8, name=f"attention_{number}"
        )
        x = keras.layers.LayerNormalization()(x + attention(x, x))
    return keras.Model(
        inputs,
        keras.layers.Dense(10, activation="softmax")(
            keras.layers.GlobalAveragePooling1D()(x)
        ),
    )


model = transformer([4, 4])
model.compile(keras.optimizers.Adam(0.005), "sparse_categorical_crossentropy")
model.fit(x_train, y_train, batch_size=64, epochs=12, verbose=0)
accuracy = np.mean(np.argmax(model(x_test), axis=1) == y_test)
print(f"Accuracy on the third part: {accuracy:.2f}")

# %% [markdown]
# ## An estimate and the experiment
#
# [`explain.head_importance`](../api/explain.md) puts a mask on each head. `ablation` is how much the loss rises with
# the mask at 0. `gradient` is an estimate by Michel et al. 2019 ([*Are Sixteen Heads Really Better than
# One?*](https://arxiv.org/abs/1905.10650)): how fast the loss changes at a mask of 1. One backward pass gives it for
# all heads.

# %% tags=["cover"] alt="Scatter plot of eight heads: the gradient estimate across, the true rise of the loss up. The four heads of the second layer are far above the four of the first, which are at 0.1 or below; the estimates of the two layers overlap."
importance = explain.head_importance(
    model, x_choose, y_choose, batch_size=100, verbose=0
)
names = [
    (layer, head)
    for layer, dataset in importance.items()
    for head in dataset["head"].values.tolist()
]
gradient, ablation = (
    np.concatenate([dataset[name] for dataset in importance.values()])
    for name in ("gradient", "ablation")
)
fig, ax = plt.subplots(figsize=(4.9, 4), layout="constrained")
colors = ["#0072b2", "#d55e00"]
for layer, color, marker in zip(importance, colors, "os", strict=True):
    x, y = importance[layer]["gradient"], importance[layer]["ablation"]
    ax.scatter(x, y, color=color, marker=marker, label=layer)
for (_, head), x, y in zip(names, gradient, ablation, strict=True):
    ax.annotate(f" {head}", (x, y))
ax.axhline(0, color="gray", linewidth=0.8)
ax.set_xlabel("gradient: how fast the loss changes at mask 1")
ax.set_ylabel("ablation: rise of the loss at mask 0")
ax.legend()
plt.show()

loss_with_all = importance["attention_0"].attrs["loss_value"]
print("Most needed is a head of", names[ablation.argmax()][0])
print(f"Without it, the loss rises by {ablation.max():.2f},")
print(f"from {loss_with_all:.2f}")
print(f"Gradient: {gradient.min():.2f} to {gradient.max():.2f}")
print(f"Ablation: {ablation.min():.2f} to {ablation.max():.2f}")
ranks = np.argsort(np.argsort([gradient, ablation]))
print(f"Rank correlation of the two: {np.corrcoef(ranks)[0, 1]:.1f}")

# %% [markdown]
# The estimate ranks most heads right, but not all. In the picture, the ablations separate the two layers, but the
# estimates do not: head 0 of the first layer has a larger estimate than head 2 of the second. Nor does the estimate say
# how much is lost: a mask of 0 is far from the mask of 1 at which the gradient was taken.
#
# ## Check the ablation
#
# The output of a head goes through its own slice of the output kernel. A slice of zeros does the same as a mask of 0,
# so the loss must rise by the same amount:


# %%
def without(gone, x):
    """What the model predicts with the slices of some heads temporarily set to 0."""
    kernels = {
        layer: model.get_layer(layer)._output_dense.kernel for layer in importance
    }
    before = {
        layer: keras.ops.convert_to_numpy(kernel).copy()
        for layer, kernel in kernels.items()
    }
    for layer, kernel in kernels.items():
        heads = [head for of_layer, head in gone if of_layer == layer]
        kernel.assign(
            np.where(np.isin(np.arange(4), heads)[:, None, None], 0, before[layer])
        )
    outputs = np.asarray(model(x))
    for layer, kernel in kernels.items():
        kernel.assign(before[layer])
    return outputs


def loss(outputs, y):
    return float(np.mean(keras.losses.sparse_categorical_crossentropy(y, outputs)))


rises = [
    loss(without([name], x_choose), y_choose) - loss(without([], x_choose), y_choose)
    for name in names
]
print(
    f"Kernel and mask agree for {np.isclose(rises, ablation, atol=1e-4).sum()} of "
    f"{len(names)} heads"
)

# %% [markdown]
# ## What it costs
#
# We remove one head after another, in an order that comes from the second part of the data. The picture shows the
# accuracy on the third part.

# %% alt="Three curves of accuracy against the number of heads removed, from 0 to 8, beginning at 0.95. Most important first falls at once, to chance after four heads. The two that begin with the least important lie on each other and fall slowly, to 0.7 after four and to 0.3 after seven."
orders = {
    "least first, by ablation": np.argsort(ablation),
    "least first, by gradient": np.argsort(gradient),
    "most first, by ablation": np.argsort(-ablation),
}
curves = {}
fig, ax = plt.subplots(figsize=(4.9, 4.6), layout="constrained")
colors = ["#0072b2", "#d55e00", "#009e73"]
for (order, heads), color, marker in zip(orders.items(), colors, "osv", strict=True):
    curves[order] = [
        np.mean(
            without([names[head] for head in heads[:count]], x_test).argmax(axis=1)
            == y_test
        )
        for count in range(9)
    ]
    ax.plot(range(9), curves[order], color=color, marker=marker, label=order)
ax.axhline(
    np.bincount(y_test).max() / len(y_test),
    color="gray",
    linestyle=":",
    label="always the most frequent digit",
)
ax.set_xlabel("heads removed, of 8")
ax.set_ylabel("accuracy on the third part")
ax.set_ylim(0, 1)
fig.legend(loc="outside upper left")
plt.show()

print("Accuracy when heads are removed")
print("        least     least     most")
print("heads   first, by first, by first, by")
print("removed ablation  gradient  ablation")
for count, row in enumerate(zip(*curves.values(), strict=True)):
    print(f"{count:<7}", *(f"{value:<9.2f}" for value in row))
four = [names[head] for head in np.argsort(ablation)[:4]]
print("The four least important:")
print(*(f"{layer}/{head}" for layer, head in sorted(four)), sep="\n")
together = loss(without(four, x_choose), y_choose) - loss(
    without([], x_choose), y_choose
)
one_by_one = np.sort(ablation)[:4].sum()
print("Rise of the loss without these four")
print(f"one by one, added up  {one_by_one:.2f}")
print(f"all at once           {together:.2f}")

# %% [markdown]
# In the picture, the two curves that begin with the least important heads are nearly the same. The effects of removing
# heads one at a time do not add up to the effect of removing them together. Each head of the first layer alone costs
# little, because the other three are there. The four single rises of the loss add up to 0.24, and without all four it
# rises by 0.62.
#
# ## Prune
#
# A slice of zeros is still multiplied. To save that work, we build a smaller model from the slices of the heads that
# stay.


# %%
def prune(gone):
    """The model without some heads."""
    keep = {
        layer: [head for head in range(4) if (layer, head) not in gone]
        for layer in importance
    }
    smaller = transformer([len(heads) for heads in keep.values()])
    for layer, new in zip(model.layers, smaller.layers, strict=True):
        weights = layer.get_weights()
        if layer.name in keep:
            heads = keep[layer.name]
            # Those of query, key and value are (feature, head, size) and (head, size).
            *projections, kernel, bias = weights
            projections = [weight[..., heads, :] for weight in projections]
            weights = [*projections, kernel[heads], bias]
        new.set_weights(weights)
    return smaller


three = four[:3]
smaller = prune(three)
print(f"Parameters: {smaller.count_params()} instead of {model.count_params()}")
apart = np.abs(np.asarray(smaller(x_test)) - without(three, x_test)).max()
print(f"Largest difference of outputs: {apart:.5f}")

# %% [markdown]
# The heads that stay were trained together with those that are gone. After a few more epochs, they take over part of
# the work. (The model with all heads gets no such epochs, so longer training may be part of the gain.)

# %%
cut = np.mean(np.argmax(smaller(x_test), axis=1) == y_test)
smaller.compile(keras.optimizers.Adam(0.002), "sparse_categorical_crossentropy")
smaller.fit(x_train, y_train, batch_size=64, epochs=5, verbose=0)
retrained = np.mean(np.argmax(smaller(x_test), axis=1) == y_test)
print("Accuracy")
print(f"with all heads          {accuracy:.2f}")
print(f"without three           {cut:.2f}")
print(f"after five more epochs  {retrained:.2f}")

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** how much this model, as it is, loses on new data without a head. The smaller model confirms it, because
# its outputs are the same. In the picture, heads removed by the estimate cost about as much as heads removed by the
# experiment. This is one model of eight heads, so let the experiment decide.
#
# **It does not say** what a head is for, nor that the task needs it: after a few epochs, the other heads do much of its
# work. Single importances do not add up, either: heads that can go one by one may be needed together. And with 400
# digits, an accuracy near 0.95 is uncertain by about two points (95% interval). So a difference of that size, as for
# the first head here, may be due to chance.
#
# **Use your own data:** replace `model`, `x_choose`, `y_choose`, `x_test` and `y_test`. `explain.head_importance` stays
# as it is. `transformer`, `without` and `prune` rebuild this model: write the same for yours.
