# %% [markdown] level="intermediate" data="table"
# # Medical diagnosis
#
# **Which measurements does a breast cancer classifier look at, and would another training run name the same ones?**
#
# The classifier looks most at radius error, worst concave points and worst area, and another training run ranks the 30
# measurements similarly, with a rank correlation of 0.9. A logistic regression does so as well, with 0.7.
#
# Whether the model *needs* what it looks at is [another question](needed.ipynb).
#
# The data are scikit-learn's breast cancer set: 569 tumors, 30 named measurements, benign or malignant. A simulated
# diagnosis with five classes comes first. It shows the order of work: build, train, then read.

# %%
import itertools
import warnings

import keras
import numpy as np
from scipy.stats import spearmanr
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from kerasfactory import explain, plot
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Five diagnoses, simulated
#
# There are 32 patients, 20 features and five possible diagnoses. Each diagnosis has two features, and the diagnosis
# whose features have the largest sum is the right one. Integer labels go with `sparse_categorical_crossentropy`. The
# scores are read after training, from the model that was trained. All 20 features go into one token, so the mean score
# of each of the eight heads is 1. That is a number, but not a finding: the [Sequential recipe](sequential.ipynb) shows
# why.

# %% tags=["folded"] summary="Five diagnoses: build, train, then read"
patients = np.random.default_rng(0).normal(size=(32, 20))
diagnoses = patients[:, :10].reshape(32, 5, 2).sum(axis=2).argmax(axis=1)

with warnings.catch_warnings():
    # Keras warns that a softmax over one token is always 1.
    warnings.simplefilter("ignore")
    inputs = keras.Input(shape=(20,))
    x = keras.layers.Dense(64, activation="relu")(inputs)
    x = keras.layers.Reshape((1, 64))(x)
    attention = InterpretableMultiHeadAttention(d_model=64, n_head=8)
    x = attention(x, x, x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(32, activation="relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(5, activation="softmax")(x))
    # Compiling would take longer than training.
    model.compile(
        optimizer="adam", loss="sparse_categorical_crossentropy", run_eagerly=True
    )
    model.fit(patients, diagnoses, epochs=5, verbose=0)
    model(patients)
    scores = np.asarray(attention.attention_scores)

print("Scores (patient, head, query, key):")
print("   ", scores.shape)
print("Mean score of each head:")
print("   ", scores.mean(axis=(0, 2, 3)).round(3))

# %% [markdown]
# ## Real tumors, one token per measurement
#
# A learned query, the same for every tumor, looks at 30 tokens. This gives one row of 30 scores for each tumor. The
# model is trained twice, with two seeds, because a ranking that depends on the seed says nothing about the data.

# %%
data = load_breast_cancer()
names = data.feature_names.tolist()
x_train, x_test, y_train, y_test = train_test_split(
    data.data, data.target, test_size=0.25, random_state=0, stratify=data.target
)
scaler = StandardScaler().fit(x_train)
x_train, x_test = scaler.transform(x_train), scaler.transform(x_test)


def trained_model(seed):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input(shape=(len(names),))
    tokens = FeatureTokenizer(16, feature_names=names)(inputs)
    question = keras.layers.Embedding(1, 16)(
        keras.ops.zeros_like(inputs[:, :1], dtype="int32")
    )
    attention = InterpretableMultiHeadAttention(d_model=16, n_head=1, name="attention")
    x = keras.layers.Flatten()(attention(question, tokens))
    x = keras.layers.Dense(16, activation="relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(x))
    model.compile(keras.optimizers.Adam(0.02), loss="binary_crossentropy")
    model.fit(x_train, y_train, batch_size=64, epochs=15, verbose=0)
    return model


models = [trained_model(seed) for seed in (0, 1)]
linear = LogisticRegression().fit(x_train, y_train)

print(f"{'143 new tumors':20}{'AUC':>5}{'accuracy':>10}")
for label, probability in [
    ("attention, seed 0", np.asarray(models[0](x_test))[:, 0]),
    ("attention, seed 1", np.asarray(models[1](x_test))[:, 0]),
    ("logistic regression", linear.predict_proba(x_test)[:, 1]),
]:
    accuracy = ((probability > 0.5) == y_test).mean()
    print(f"{label:20}{roc_auc_score(y_test, probability):5.2f}{accuracy:10.2f}")

# %% [markdown]
# On 143 tumors that no model has seen, the models with attention have an AUC of 0.99 and 0.98, and a logistic
# regression has 1.00. Attention does not predict better here. The question is what it shows.
#
# ## The ranking, and how far to trust it

# %%
received = {
    f"seed {seed}": explain.attribute(model, x_test, feature_names=names, verbose=0)
    for seed, model in enumerate(models)
}
first, second = (shares.mean("sample").values for shares in received.values())
weight = np.abs(linear.coef_[0])
print("Most attention received, mean of the two runs:")
for column in np.argsort(-(first + second))[:3]:
    print(f"  {names[column]}")
print("Rank correlation")
print(f"  between the two runs: {spearmanr(first, second).statistic:.1f}")
print(f"  with logistic weights: {spearmanr(first + second, weight).statistic:.1f}")

# %% tags=["cover"] alt="Dots with intervals, one per training run, of the attention that the first 8 of 30 tumor measurements receive. The first three are radius error, worst concave points and worst area. All dots but one are to the right of a dashed line, the uniform share."
ax = plot.features(received, top_k=8)
ax.axvline(1 / len(names), color="gray", linestyle="--", label="uniform")
legend = ax.legend(loc="lower right", fontsize=9)

# %% [markdown]
# The dashed line is the uniform share, 1/30. The rank correlations are about the whole order. A reader looks at the top
# of the list, so we compare that, too:

# %%
rankings = {"seed 0": first, "seed 1": second, "logistic regression": weight}
first_ten = {label: set(np.argsort(-values)[:10]) for label, values in rankings.items()}
print("In common, of the first 10")
for label, other in itertools.combinations(rankings, 2):
    common = len(first_ten[label] & first_ten[other])
    print(f"  {label}, {other}: {common}")

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** which measurements the model looks at most: three of size and shape come first. Another seed finds a
# similar order, with a rank correlation of 0.9. A logistic regression, which is another kind of model, ranks them
# similarly, with 0.7.
#
# **It does not say** that the model needs any one of these measurements to be right, or that it diagnoses better
# because of its attention. Many of the 30 are strongly correlated, and a model can use one in place of another. [Does
# the model need what it looks at?](needed.ipynb) tests this model. Nor does the ranking say that a measurement causes
# anything. That the rankings agree proves little, since all come from the same correlated data.
#
# **Use your own data:** replace `data.data`, `data.target` and `names`. For more than two classes, end the model with
# `Dense(number_of_classes, activation="softmax")` and train it with `"sparse_categorical_crossentropy"`, and leave out
# what is for two classes: the loop that prints AUC and accuracy, and what uses `linear` and `weight`. The other lines
# from `received` on stay as they are.
