# %% [markdown] level="intermediate" data="table"
# # Does the model need what it looks at?
#
# **A model looks most at some columns. Would it do worse without them, and what if other columns say much the same?**
#
# No measurement is shown to be needed: 0 of 30. Other columns may say much the same. Shuffling a measurement raises the
# loss by up to 0.8. If it is resampled given the others, so that the rows stay possible, the largest rise is 0.0.
#
# The output does depend on the measurements that attention ranks first, as a set. So "the model looks at it" does not
# mean "the model needs it".
#
# The model is that of [the tumor recipe](medical.ipynb): 569 tumors, 30 named measurements, benign or malignant. You
# need to know that recipe.

# %%
import textwrap

import keras
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr
from sklearn.datasets import load_breast_cancer
from sklearn.inspection import permutation_importance
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

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


model, from_another_seed = trained_model(0), trained_model(1)

# %% [markdown]
# ## An audit
#
# [An audit](audit.ipynb) tests what the attention map suggests, on the 143 tumors that the model has not seen. Of the
# claims that it supports, one in twenty may be wrong. First, the claims about the map as a whole, and the skill of the
# model. Skill is 1 minus the ratio of the model's loss to that of the best constant.

# %%
report = explain.audit(model, x_test, y_test, models=[from_another_seed], verbose=0)
for claim in report.claims[report.claims["feature"].isna()].itertuples():
    text = f"{claim.verdict}: {claim.claim}"
    print(textwrap.fill(text, 40, subsequent_indent="  "))
skill = report.record["skill"]
low, high = skill["skill_interval"]
print(f"Skill of the model: {skill['skill']:.2f} ({low:.2f} to {high:.2f})")

# %% [markdown]
# ## One by one, and together
#
# Then the audit resamples each measurement given the others, so that the tumors stay possible, and checks whether the
# model does worse. It notices measurements that nearly determine each other, such as radius, perimeter and area, and
# tests them together as well.

# %%
single, together = report.features.loc[names], report.features.drop(index=names)
print("Shown to be needed")
for label, tested in {"measurements": single, "groups of them": together}.items():
    needed = tested["verdict"].isin(["supported", "needed, not claimed"])
    print(f"{label:14} {needed.sum()} of {len(tested)}")
print(textwrap.fill("The group: " + ", ".join(together.index), 40))

# %% [markdown]
# Nor do these 143 tumors show that the model needs the group of 14: the other 16 may say much the same.
#
# ## Why shuffling makes measurements look needed
#
# Permutation importance asks the same model: how much worse does it get when a column is shuffled? Shuffling breaks the
# link to the other columns. It makes tumors that cannot exist, such as one with a small radius and a large area, and
# the model was never trained on those.


# %%
def score(model, x, y):
    return -log_loss(y, np.asarray(model(x))[:, 0].astype("float64"))


shuffled = permutation_importance(
    model, x_test, y_test, scoring=score, n_repeats=1, random_state=0
).importances_mean
attention, resampled = single["attribution"].values, single["effect"].values

print("Largest rise of the loss")
print(f"shuffled   {shuffled.max():.1f} ({names[shuffled.argmax()]})")
print(f"resampled  {resampled.max():.1f}")
print("Attention and permutation importance")
print(f"rank correlation              {spearmanr(attention, shuffled).statistic:.1f}")
first_ten = [set(np.argsort(-values)[:10]) for values in (attention, shuffled)]
print(f"in common, of the first ten   {len(first_ten[0] & first_ten[1])}")

# %% tags=["cover"] alt="How much the loss rises without each of the ten measurements that receive most attention, twice. If it is shuffled, radius error raises the loss by 0.84, worst concave points by 0.19, mean concave points by 0.16 and the others by less than 0.1. If it is resampled given the others, all ten lie at zero."
order = np.argsort(-attention)[:10]
places = np.arange(len(order))
fig, ax = plt.subplots(figsize=(4.9, 4), layout="constrained")
ax.hlines(places, resampled[order], shuffled[order], color="lightgray", linewidth=4)
for label, rises, color in [
    ("shuffled", shuffled, "#d55e00"),
    ("resampled given the others", resampled, "#0072b2"),
]:
    ax.scatter(rises[order], places, s=60, color=color, label=label, zorder=3)
ax.set_yticks(places, [names[column] for column in order])
ax.invert_yaxis()
ax.set_xlabel("rise of the loss without the measurement")
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# The two rankings agree, with a rank correlation of 0.8, and share 8 of their first ten. That is no evidence that the
# model needs these measurements: both rankings come from the same correlated columns.
#
# ## What it says, and what it does not
#
# **It says** that the output depends on the measurements that attention ranks first, taken together, more than on random
# ones. With the same weight for every measurement, the output changes. But the model is not shown to do worse. That the
# output depends on attention is one claim. That the model needs attention to be right is another.
#
# **It does not say** that the measurements are useless. *Undetermined* means that 143 tumors do not tell, for a single
# measurement as for the group. Nor does it say that a measurement causes anything. How often such verdicts are wrong on
# these data is counted in [the calibration recipe](calibrate.ipynb).
#
# **Use your own data:** replace `data.data`, `data.target` and `names`, and let `trained_model` return your model. The
# rows of `x_test` must be new to it. The calls of `explain.audit` and `permutation_importance` stay as they are. For
# more than two classes, leave out `[:, 0]` in `score`.
