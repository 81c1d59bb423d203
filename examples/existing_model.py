# %% [markdown] level="beginner" data="picture"
# # Get attention out of a model you already have
#
# **The model is trained and saved, and its code throws the attention scores away. How do you see what it looks at?**
#
# One line reads the scores of each attention layer, with named axes, and leaves predictions and weights as they were. A
# model of handwritten digits gives 0.7 of its attention to three of 16 patches. An untrained copy gives 0.3 to its
# three.
#
# The model is plain Keras: two transformer blocks that read scikit-learn's digits. It uses nothing from this package.

# %%
import tempfile
from pathlib import Path

import keras
import numpy as np
import xarray as xr
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from kerasfactory import explain, plot

keras.utils.set_random_seed(0)

# %% [markdown]
# ## A model as people write it
#
# We use 1,780 of scikit-learn's 1,797 handwritten digits, of 8 × 8 pixels each. A digit is cut into 16 patches of 2 × 2
# pixels, which are the tokens. `self.attention(x, x)` returns an output and no scores.

# %%
images, labels = load_digits(return_X_y=True)
patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4) / 16
x_train, x_test, y_train, y_test = train_test_split(
    patches, labels, train_size=1280, test_size=500, random_state=0, stratify=labels
)


@keras.saving.register_keras_serializable()
class Position(keras.layers.Layer):
    def build(self, shape):
        self.embedding = self.add_weight(
            shape=shape[1:], initializer="uniform", name="embedding"
        )

    def call(self, x):
        return x + self.embedding


@keras.saving.register_keras_serializable()
class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(
            num_heads=2, key_dim=16, name="attention"
        )
        self.dense = keras.layers.Dense(32, activation="relu")
        self.norm = keras.layers.LayerNormalization()

    def build(self, shape):
        self.attention.build(shape, shape)
        self.dense.build(shape)
        self.norm.build(shape)

    def call(self, x):
        x = x + self.attention(x, x)
        return self.norm(x + self.dense(x))


inputs = keras.Input((16, 4))
tokens = Position()(keras.layers.Dense(32)(inputs))
encoder = keras.Model(
    inputs, Block(name="block_2")(Block(name="block_1")(tokens)), name="encoder"
)
mean = keras.layers.GlobalAveragePooling1D()(encoder(inputs))
model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(mean))

model.compile(
    keras.optimizers.Adam(0.005), "sparse_categorical_crossentropy", jit_compile=False
)
history = model.fit(x_train, y_train, batch_size=64, epochs=15, verbose=0)


# %% [markdown]
# We save the model and load it, because a file is what you would get from a colleague.

# %%
with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder) / "digits.keras")
    model = keras.models.load_model(Path(folder) / "digits.keras")

predicted = model.predict(x_test, verbose=0)
weights = model.get_weights()
accuracy = np.mean(predicted.argmax(axis=1) == y_test)
print(f"Test accuracy: {accuracy:.2f}")

# %% [markdown]
# ## One line
#
# `capture` finds the attention layers, even inside other layers and models, and runs the model over the data. It
# returns one labeled array for each layer. Both layers here are called `attention`, so their paths tell them apart.

# %%
# A1 is the patch at the top left.
names = [f"{row}{column}" for row in "ABCD" for column in "1234"]
scores = explain.capture(model, x_test, feature_names=names, verbose=0)

for layer, of_layer in scores.items():
    print(layer, dict(of_layer.sizes))

# %% [markdown]
# The arrays are from xarray. Their axes have names, so you need not count them.

# %%
second = scores["encoder/block_2/attention"]
a_zero = second.isel(sample=int(np.flatnonzero(y_test == 0)[0]))
sums = second.sum("key")
print(f"Sums of the rows: {sums.min():.4f} to {sums.max():.4f}")
print(
    "One digit, head 0, patch A1 looks most at:",
    a_zero.sel(head=0, query="A1").idxmax("key").item(),
)
print(
    "Samples, heads and queries averaged:",
    dict(second.mean(["sample", "head", "query"]).sizes),
)

# %% [markdown]
# ## Are these the model's own scores?
#
# Three checks say so. The model predicts what it predicted before. Its weights are the same. And the captured scores,
# multiplied by the values, give the real output of the layer.

# %%
errors = explain.recomposition_error(model, x_test, verbose=0)

moved = np.abs(model.predict(x_test, verbose=0) - predicted).max()
print(f"Largest change of a prediction: {moved:.5f}")
pairs = zip(model.get_weights(), weights, strict=True)
changed = max(np.abs(now - before).max() for now, before in pairs)
print(f"Largest change of a weight: {changed:.5f}")
for layer, error in errors.items():
    print(f"{layer}: recomposition error {error:.5f}")

# %% [markdown]
# ## Two ways that fail
#
# People try two ways first: they read an attribute of the layer, or they build a model up to the layer:

# %%
block = model.get_layer("encoder").get_layer("block_2")
ways = {
    "block.attention.attention_scores": lambda: block.attention.attention_scores,
    "keras.Model(model.inputs, block.attention.output)": lambda: keras.Model(
        model.inputs, block.attention.output
    ),
}
for way, attempt in ways.items():
    try:
        attempt()
        print(f"{way}: works")
    except Exception as error:
        print(f"{way}: {type(error).__name__}")

# %% [markdown]
# Keras' layer has no such attribute. It also has no output in a graph, because it is called inside `Block`. The page
# [Scores from any model](../learn/any-model.md) lists further ways, and where they fail.
#
# ## What does it look at?
#
# The picture shows the attention that each patch receives in the second block, as the mean over heads, queries and the
# samples of a digit. Below it is the same for a copy of the model with new random weights, which has learned nothing.

# %%
keras.utils.set_random_seed(1)
untrained = keras.models.clone_model(model)
untrained_scores = explain.capture(untrained, x_test, feature_names=names, verbose=0)


def received_by_digit(scores):
    received = scores["encoder/block_2/attention"].mean(["head", "query"])
    return received.assign_coords(sample=y_test).groupby("sample").mean()


received = {
    "trained": received_by_digit(scores),
    "untrained": received_by_digit(untrained_scores),
}
ink = np.stack([x_test[y_test == digit].mean(axis=(0, 2)) for digit in range(10)])

for who, attention in received.items():
    correlation = np.mean(
        [
            np.corrcoef(attention.sel(sample=digit), ink[digit])[0, 1]
            for digit in range(10)
        ]
    )
    top_three = np.sort(attention)[:, -3:].sum(axis=1).mean()
    print(
        f"{who}: the three most attended patches get {top_three:.1f} "
        f"(uniform: {3 / 16:.1f})"
    )
    print(f"    correlation of attention with ink: {correlation:.1f}")

# %% tags=["cover"] alt="Twenty small pictures of mean digits with the attention of 4 by 4 patches laid over them in blue. In the ten of the trained model a few patches are dark blue, different ones for each digit. In the ten of the untrained model all patches are pale."
mean_images = [images[labels == n].mean(axis=0).reshape(8, 8) for n in range(10)]
both = xr.concat(received.values(), "sample").rename(key="feature")
both = both.assign_coords(sample=[f"{who} {n}" for who in received for n in range(10)])
figure = plot.image(
    both,
    -np.array(mean_images * 2),  # ink is dark
    feature_mask=explain.patches(8, 8, 2),
    samples=20,
    columns=5,
)

# %% [markdown]
# The trained model gives 0.7 of its attention to three patches, which differ between digits. The untrained one gives
# its three 0.3. Yet its map follows the ink *more* closely: the correlation is 0.7, and 0.4 in the trained model. A map
# that looks like the input is no evidence that a model has learned anything. Before you show a map, put the same map of
# an untrained copy beside it (Adebayo et al. 2018, [*Sanity Checks for Saliency
# Maps*](https://arxiv.org/abs/1810.03292)).
#
# ## Is the model worth explaining?
#
# We compare it with a logistic regression on the same pixels:

# %%
pixels = x_train.reshape(len(x_train), -1), x_test.reshape(len(x_test), -1)
yardstick = (
    LogisticRegression(max_iter=2000).fit(pixels[0], y_train).score(pixels[1], y_test)
)
print(f"Accuracy: {accuracy:.2f}, logistic regression {yardstick:.2f}")

# %% [markdown]
# Two small blocks, trained for seconds, do not beat it: 0.95 of the digits are right, and 0.97 with the logistic
# regression. Explain the better model, unless you are asked about this one.
#
# ## Where to be careful
#
# - The tokens of the second block are no longer patches, because the first block has mixed them. "Looks at B3" means
#   the token at B3.
# - `feature_names` go onto every axis of that length. Name them in the order in which your model makes its tokens.
#
# ## What it says, and what it does not
#
# **It says** which tokens the second block of this model reads for each digit, and that these are the model's own
# scores, which capturing did not change.
#
# **It does not say** that a prediction depends on the patches that stand out, nor that another training run would find
# the same ones. [Is attention an explanation here?](faithfulness.ipynb) and [Would another training show the same
# map?](seeds.ipynb) test both.
#
# **Use your own data:** replace the path in `keras.models.load_model` with that of your file, `x_test` with some of
# your samples, and `names` with the names of your tokens, or leave `feature_names` out. The line with `explain.capture`
# stays as it is.
