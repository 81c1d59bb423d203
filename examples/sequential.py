# %% [markdown] level="beginner" data="table"
# # Attention in a Sequential model
#
# **Which measurements of a wine does a classifier look at, and can a plain `Sequential` model show it?**
#
# A wine classifier looks most at flavanoids and proline: they receive 0.17 and 0.14 of the attention, where a uniform
# share is 0.08. A Sequential model shows this if each measurement is a token. With the whole row in one token, every
# score is 1.
#
# The data are scikit-learn's wine set: 178 Italian wines, 13 chemical measurements each, three growers. You need to
# know `keras.Sequential`, and nothing about attention.

# %%
import warnings

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from kerasfactory import explain, plot
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

keras.utils.set_random_seed(0)

wine = load_wine()
names = [name.split("/")[0].replace("_", " ") for name in wine.feature_names]
x_train, x_test, y_train, y_test = train_test_split(
    wine.data, wine.target, test_size=0.3, random_state=0, stratify=wine.target
)
scaler = StandardScaler().fit(x_train)
x_train, x_test = scaler.transform(x_train), scaler.transform(x_test)
print(
    f"{len(x_train)} wines to train on, {len(x_test)} to test on, {len(names)} "
    "measurements"
)

# %% [markdown]
# ## One token: a model that trains, a map that is empty
#
# Attention works on a sequence of tokens. A common way to get a sequence from a table is to reshape the whole row into
# a sequence of length one. The model builds and trains, but Keras warns:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    one_token = keras.Sequential(
        [
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Reshape((1, 64)),
            InterpretableMultiHeadAttention(d_model=64, n_head=4),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    one_token.compile(optimizer="adam", loss="binary_crossentropy")
    one_token.fit(x_train, y_train == 0, epochs=5, verbose=0)
    one_token(x_test[:32])
    scores = np.asarray(one_token.layers[2].attention_scores)

sentence = str(caught[0].message).split(". ")[2]
print("Keras warns:", sentence.replace(", ", ",\n"))
print("Scores (wine, head, query, key):", scores.shape)
print(f"Scores: {scores.min():.3f} to {scores.max():.3f}")

# %% [markdown]
# The one token can only look at itself. So each of the 32 × 4 scores is 1, whatever the wine, before training and
# after. These scores say nothing.
#
# ## One token per measurement
#
# `FeatureTokenizer` gives each of the 13 columns a token of its own. Now a score says how much the token of one
# measurement takes from the token of another. With a single head there is one map.

# %%
model = keras.Sequential(
    [
        keras.Input(shape=(len(names),)),
        FeatureTokenizer(16, feature_names=names),
        InterpretableMultiHeadAttention(d_model=16, n_head=1, name="attention"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dense(3, activation="softmax"),
    ]
)
model.compile(
    keras.optimizers.Adam(0.01),
    loss="sparse_categorical_crossentropy",
    metrics=["accuracy"],
)
model.fit(x_train, y_train, epochs=60, verbose=0)

accuracy = model.evaluate(x_test, y_test, verbose=0)[1]
linear = LogisticRegression().fit(x_train, y_train).score(x_test, y_test)
print(
    f"Accuracy on {len(x_test)} wines: {accuracy:.2f} (logistic regression: "
    f"{linear:.2f})"
)

# %% [markdown]
# ## Read the scores
#
# In a `Sequential` model `attention_scores` is part of the model's graph. `keras.Model` makes it an output, and
# `predict` computes it for as many wines as you like.

# %%
scores_model = keras.Model(model.inputs, model.get_layer("attention").attention_scores)
scores = scores_model.predict(x_test, batch_size=64, verbose=0)
print("Scores (wine, head, query, key):", scores.shape)

received = scores.mean(axis=(0, 1, 2))
print(f"{'attention received':20}mean")
for column in np.argsort(-received)[:4]:
    print(f"{names[column]:20}{received[column]:.2f}")
print(f"{'uniform':20}{1 / len(names):.2f}")

# %% [markdown]
# [`explain.capture`](../api/explain.md) reads the same scores with their names, from any model, and
# [`plot.heatmap`](../api/plot.md) draws their mean. The line on the color bar marks the uniform share. Above it is the
# map of the model with one token. Each panel has its own scale.

# %% tags=["cover"] alt="Two heat maps, each with its own scale. At the top, one token for the whole row: a single dark square, with a score of 1. At the bottom, one token for each of 13 wine measurements: the columns of flavanoids and proline are the darkest."
named = explain.capture(model, x_test, feature_names=names, verbose=0)["attention"]

fig, (top, bottom) = plt.subplots(
    2, 1, figsize=(4.9, 5.6), layout="constrained", height_ratios=[1, 2]
)
top.imshow([[1]], cmap="Blues", vmin=0, vmax=1)
top.text(0, 0, "1", color="white", fontsize=40, ha="center", va="center")
top.set_xticks([0], ["the row"])
top.set_yticks([0], ["the row"])
top.set_title("one token for a wine")
plot.heatmap(named, ax=bottom)
bottom.set_title("one token per measurement")
plt.show()

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** that the measurements take much of their new content from the same few columns, above all from flavanoids
# and proline. A dark column is one that this model looks at.
#
# **It does not say** that the other measurements are useless, nor that another training run would agree. The [medical
# recipe](medical.ipynb) shows how to find out. Nor does it say that attention is needed: a logistic regression
# classifies all 54 held-out wines correctly, and this model is right about 0.98 of them.
#
# **Use your own data:** replace `wine.data`, `wine.target` and `names`, and the 3 in `Dense(3, ...)` with the number of
# your classes. The lines from `scores_model` on stay as they are.
