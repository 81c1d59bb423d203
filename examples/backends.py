# %% [markdown] level="advanced" data="table"
# # The same model on TensorFlow, JAX and PyTorch
#
# **You train on one backend and a colleague runs the model on another. Does it still look at the same things?**
#
# From the same file, the model looks at the same things: scores and predictions agree to 1e-5. When the model is
# trained again on each backend, from the same seed, the mean attention that a measurement receives differs by up to
# 0.02. The uniform share is 0.08.
#
# We train a model on TensorFlow and save it. JAX and PyTorch then read that file and report what the model attends to.
# You need to know the [recipe for an existing model](existing_model.ipynb).

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer

keras.utils.set_random_seed(0)

# %% [markdown]
# ## One file
#
# The data are wines from three growers, with 13 chemical measurements each. Every measurement is a token. The attention
# layer is Keras' own.

# %%
x, y = load_wine(return_X_y=True)
names = [name.replace("_", " ") for name in load_wine().feature_names]
names[names.index("od280/od315 of diluted wines")] = "od280/od315"
x_train, x_test, y_train, y_test = train_test_split(
    x, y, test_size=78, random_state=0, stratify=y
)
scaler = StandardScaler().fit(x_train)
x_train, x_test = (
    scaler.transform(table).astype("float32") for table in (x_train, x_test)
)

inputs = keras.Input((13,))
tokens = FeatureTokenizer(16, feature_names=names)(inputs)
attended = keras.layers.MultiHeadAttention(
    num_heads=2, key_dim=8, dropout=0.1, name="attention"
)(tokens, tokens)
mean = keras.layers.GlobalAveragePooling1D()(
    keras.layers.LayerNormalization()(tokens + attended)
)
model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(mean))
model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
model.fit(x_train, y_train, batch_size=25, epochs=15, shuffle=False, verbose=0)
predicted = model.predict(x_test, batch_size=78, verbose=0)
scores = explain.capture(model, x_test, batch_size=78, verbose=0)["attention"]

accuracy = np.mean(predicted.argmax(axis=1) == y_test)
print(f"Trained on: {keras.config.backend()}, test accuracy: {accuracy:.2f}")

# %% [markdown]
# ## Three backends
#
# A process keeps one backend for its whole life, because Keras reads `KERAS_BACKEND` when it is imported. So each of
# the other two backends gets a process of its own. Both run the program below, which does two things. It captures the
# scores of the model in the file. And it trains the same architecture again, from the same seed and on the same data.
#
# Captured scores are xarray arrays. They can be saved to a netCDF file, and read from it with all their names.

# %%
program = """
import random, sys
# TensorFlow is not needed here. Keras would load it to clone a model.
sys.modules["tensorflow"] = None
import keras, numpy as np, xarray as xr
from kerasfactory import explain

backend = keras.config.backend()
model = keras.models.load_model("wine.keras")
data = np.load("data.npz")
x_test, once = data["x_test"], {"batch_size": 78, "verbose": 0}
from_file = explain.capture(model, x_test, **once)["attention"]

# Keras takes its seeds from here. keras.utils.set_random_seed would load TensorFlow.
random.seed(0)
again = keras.models.clone_model(model)
again.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
train = {"batch_size": 25, "epochs": 15, "shuffle": False, "verbose": 0}
again.fit(data["x_train"], data["y_train"], **train)
trained_here = explain.capture(again, x_test, **once)["attention"]

predicted = ("sample", "grower"), model.predict(x_test, **once)
accuracy = np.mean(again.predict(x_test, **once).argmax(1) == data["y_test"])
result = {"from_file": from_file, "trained_here": trained_here}
result |= {"predicted": predicted, "accuracy": accuracy}
xr.Dataset(result).to_netcdf(f"{backend}.nc")
"""

# Little work for each: one thread is enough, and code that is quickly compiled.
quick = {"OMP_NUM_THREADS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder) / "wine.keras")
    np.savez(
        Path(folder) / "data.npz",
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=folder,
            env=os.environ | quick | {"KERAS_BACKEND": backend},
        )
        for backend in ("jax", "torch")
    ]
    assert all(child.wait() == 0 for child in children)
    jax, torch = (
        xr.load_dataset(Path(folder) / f"{backend}.nc") for backend in ("jax", "torch")
    )

# %%
for there in (jax, torch):
    print(there.from_file.attrs["backend"], dict(there.from_file.sizes))
    scores_apart = abs(there.from_file - scores).max().item()
    predictions_apart = abs(there.predicted - predicted).max().item()
    print(f"    largest difference of scores:      {scores_apart:.5f}")
    print(f"    largest difference of predictions: {predictions_apart:.5f}")

# %% [markdown]
# The file determines the model on each of the three backends, and so it determines the scores.
#
# ## One program, one seed, three models
#
# A seed does not determine a model. Each backend draws different random numbers from it, so training starts from
# different weights, and ends with a different model. How far apart are the three? We compare the attention that each
# measurement receives: the mean over wines, heads and queries. The uniform share is 1/13.


# %%
def received(scores):
    return scores.mean(["sample", "head", "query"])


trained = [received(scores), received(jax.trained_here), received(torch.trained_here)]
apart = max(abs(there - trained[0]).max().item() for there in trained[1:])

print("Attention received, mean over wines, heads and queries")
print(f"    largest difference: {apart:.2f}")
print(f"    uniform share:      {1 / 13:.2f}\n")
accuracies = [accuracy, jax.accuracy.item(), torch.accuracy.item()]
print("trained on  accuracy  most attended")
for backend, right, mean_received in zip(
    ["TensorFlow", "JAX", "PyTorch"], accuracies, trained, strict=True
):
    print(f"{backend:12}{right:<10.2f}{mean_received.idxmax().item()}")

# %% tags=["cover"] alt="Two dot plots of the attention that 13 measurements of wine receive. Top, one file on three backends: the three markers of each measurement lie on top of each other. Bottom, trained again on each backend: they lie apart."
fig, axes = plt.subplots(2, 1, figsize=(4.9, 7.4), layout="constrained", sharex=True)
order = trained[0].argsort().values
columns = {
    "one file, three backends": [
        received(scores),
        received(jax.from_file),
        received(torch.from_file),
    ],
    "one seed, trained on each": trained,
}
styles = [
    ("TensorFlow", "o", "#0072b2", 110),
    ("JAX", "s", "#e69f00", 45),
    ("PyTorch", "x", "black", 30),
]
for ax, (title, of_backends) in zip(axes, columns.items(), strict=True):
    for of_backend, (backend, marker, color, size) in zip(
        of_backends, styles, strict=True
    ):
        ax.scatter(
            of_backend[order],
            range(13),
            marker=marker,
            color=color,
            s=size,
            label=backend,
        )
    ax.axvline(1 / 13, color="gray", linewidth=1, linestyle=":")
    ax.set_title(title)
    ax.set_yticks(range(13), np.array(names)[order])
    ax.grid(axis="y", linewidth=0.4)
    ax.set_axisbelow(True)
axes[0].legend(loc="lower right")
axes[1].set_xlabel("attention received (dotted: uniform)")
plt.show()

# %% [markdown]
# ## Where to be careful
#
# - To check a change of backend, compare one *file* on each of them. To check a finding, compare several *training
#   runs*. What holds in only one of three runs is a property of that run.
# - The scores agree to 1e-5 in `float32`. In mixed precision, each backend rounds at different places, so expect the
#   scores to agree less closely.
# - `clone_model` gives an untrained model. To move a trained model, save it.
#
# ## What it says, and what it does not
#
# **It says** that the scores of a saved model are the same on three backends: no single score differs by more than
# 1e-5. Training again changes much more: the attention that a measurement receives, as a mean over wines, heads and
# queries, differs by up to 0.02.
#
# **It does not say** which of the three trained models is right: their accuracies on 78 wines are 1.00, 1.00 and 0.99.
#
# **Use your own data:** save your model in place of `wine.keras`, replace `x_test`, and name your attention layer in
# place of `"attention"`, in the program as well.
