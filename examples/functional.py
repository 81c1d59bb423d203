# %% [markdown] level="beginner" data="table"
# # Attention in a functional model
#
# **What does a model look at when it predicts how a patient's diabetes will progress, and are the scores still there
# after saving and loading?**
#
# The model looks a little more at triglycerides, with 0.13 of the attention, and at BMI, with 0.12, where a uniform
# share is 0.10. After saving and loading, it makes the same predictions, and its scores can be read through the
# layer's name.
#
# The data are scikit-learn's diabetes set: 442 patients, ten measurements, and the progression of the disease one year
# later. You need to know Keras' functional API.

# %%
import tempfile
import warnings
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

keras.utils.set_random_seed(0)

# %% [markdown]
# ## The pattern
#
# This is the smallest functional model with attention. It puts 20 features into one token. The scores have the shape
# (32, 8, 1, 1), and all of them are 1: one token can only look at itself. The [Sequential recipe](sequential.ipynb)
# shows this in full.

# %% tags=["folded"] summary="The smallest functional model, with one token"
with warnings.catch_warnings():
    # Keras warns that a softmax over one token is always 1; that is the point here.
    warnings.simplefilter("ignore")
    inputs = keras.Input(shape=(20,))
    x = keras.layers.Dense(64, activation="relu")(inputs)
    x = keras.layers.Reshape((1, 64))(x)
    attention = InterpretableMultiHeadAttention(d_model=64, n_head=8)
    x = attention(x, x, x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(32, activation="relu")(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    model = keras.Model(inputs, outputs)

    scores = keras.Model(inputs, attention.attention_scores).predict(
        np.ones((32, 20)), verbose=0
    )
print("Scores (row, head, query, key):", scores.shape)
print(f"Scores: {scores.min():.3f} to {scores.max():.3f}")

# %% [markdown]
# `attention.attention_scores` is a tensor of the graph, so `keras.Model` can make a second model that returns it.
#
# ## One token per measurement, one query for the patient
#
# Now each measurement is a token. The query is a single learned vector, the same for all patients: an `Embedding` with
# one entry. It asks: *which of these measurements do I need?* The answer is one row of ten scores for each patient.

# %%
names = ["age", "sex", "BMI", "blood pressure", "cholesterol"]
names += ["LDL", "HDL", "chol/HDL", "triglycerides", "glucose"]
data, target = load_diabetes(return_X_y=True)
data = data / data.std(axis=0)
x_train, x_test, y_train, y_test = train_test_split(
    data, target, test_size=0.3, random_state=0
)
center, scale = y_train.mean(), y_train.std()

inputs = keras.Input(shape=(len(names),), name="patient")
tokens = FeatureTokenizer(16, feature_names=names)(inputs)
question = keras.layers.Embedding(1, 16, name="question")(
    keras.ops.zeros_like(inputs[:, :1], dtype="int32")
)
summary = InterpretableMultiHeadAttention(d_model=16, n_head=1, name="attention")(
    question, tokens
)
hidden = keras.layers.Dense(32, activation="relu")(keras.layers.Flatten()(summary))
model = keras.Model(inputs, keras.layers.Dense(1)(hidden))

model.compile(keras.optimizers.Adam(0.01), loss="mse")
model.fit(x_train, (y_train - center) / scale, epochs=25, verbose=0)

predicted = model.predict(x_test, batch_size=256, verbose=0)[:, 0] * scale + center
ridge = Ridge().fit(x_train, y_train).score(x_test, y_test)
print(
    f"R² on {len(x_test)} patients: {r2_score(y_test, predicted):.2f} (ridge "
    f"regression: {ridge:.2f})"
)

# %% [markdown]
# ## Save, load, read
#
# The layers are registered with Keras, so `load_model` needs no `custom_objects`. The feature names are saved in the
# file.

# %%
with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder) / "diabetes.keras")
    loaded = keras.models.load_model(Path(folder) / "diabetes.keras")

attention = loaded.get_layer("attention")
names = loaded.get_layer("feature_tokenizer").feature_names
scores_model = keras.Model(loaded.inputs, [loaded.output, attention.attention_scores])
reloaded, scores = scores_model.predict(x_test, batch_size=256, verbose=0)

print("Scores (patient, head, query, key):", scores.shape)
moved = np.abs(reloaded[:, 0] * scale + center - predicted).max()
print(f"Largest change of a prediction: {moved:.3f} points")
print(f"{'attention received':20}mean  largest")
for column in np.argsort(-scores.mean(axis=(0, 1, 2)))[:3]:
    column_scores = scores[..., column]
    print(f"{names[column]:20}{column_scores.mean():.2f}{column_scores.max():9.1f}")
print(f"{'uniform':20}{1 / len(names):.2f}")

# %% tags=["cover"] alt="Heat map with 40 patients as rows, ordered by predicted progression, and ten measurements as columns. The column of triglycerides is a little darker throughout; the column of age has a few dark cells. Most other cells are of similar shade."
order = np.argsort(predicted)[:: len(predicted) // 39][:40]
fig, ax = plt.subplots(figsize=(4.9, 4.8), layout="constrained")
image = ax.imshow(
    scores[order, 0, 0], cmap="Blues", vmin=0, aspect="auto", interpolation="nearest"
)
ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
ax.set_yticks(
    [0, len(order) - 1], [f"{predicted[order[0]]:.0f}", f"{predicted[order[-1]]:.0f}"]
)
ax.set_ylabel("40 test patients by predicted progression")
fig.colorbar(image, label="attention score")
plt.show()

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** where the summary of each patient comes from, and that this depends on the patient. On average,
# triglycerides receive a little more than the uniform share. Age receives about the uniform share on average, but up to
# 0.3 in single patients: these are the few dark cells in its column.
#
# **It does not say** in which direction a measurement moves the prediction. A high score only says that the value of
# this measurement entered the summary. The scores are also close to uniform, and nothing here tests whether such small
# differences mean anything. [Would another training show the same map?](seeds.ipynb) tests it. The [finance
# recipe](finance.ipynb) shows how far a map can be trusted when the truth is known.
#
# **Use your own data:** replace `data`, `target` and `names`. The model predicts a number. For classes, end it with
# `Dense(number_of_classes, activation="softmax")`, train it on the labels with `"sparse_categorical_crossentropy"`, and
# leave out `center` and `scale`.
