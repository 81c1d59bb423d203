# %% [markdown] level="advanced" data="table"
# # How often is a verdict wrong?
#
# **On models and data like yours, how often is “supported” wrong, and how often does the test find a feature that matters?**
#
# Train your model on labels whose truth is known, and count the verdicts. With three models of each kind, as here,
# the count says little: if none of three is wrong, the true share may still be 56%. The planted feature was found in
# 3 of 3.
#
# Take 20 models or more for an answer.
#
# No one knows the truth about your own data. `explain.calibrate` makes labels whose truth is known, trains your model
# with them many times, and counts the verdicts. Here it does so for the model of [the tumor recipe](medical.ipynb), on
# ten of its measurements.

# %%
import keras
import matplotlib.pyplot as plt
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

data = load_breast_cancer()
# The means; the other 20 are their errors and their extremes.
names = data.feature_names[:10].tolist()
x = StandardScaler().fit_transform(data.data[:, :10])
y = data.target

# %% [markdown]
# ## A function that trains the model
#
# `calibrate` calls `train(x, y)` for each model, with half of the tumors, and tests the model on the other half.
# Usually such a function builds, compiles and fits a model, and returns it. Here, compiling would take most of the
# time. So one model is compiled once and gets new weights each time, and a second model receives the trained weights
# and is returned.


# %%
def new_model():
    inputs = keras.Input(shape=(len(names),))
    tokens = FeatureTokenizer(16, feature_names=names)(inputs)
    question = keras.layers.Embedding(1, 16)(
        keras.ops.zeros_like(inputs[:, :1], dtype="int32")
    )
    attention = InterpretableMultiHeadAttention(d_model=16, n_head=1, name="attention")
    hidden = keras.layers.Dense(16, activation="relu")(
        keras.layers.Flatten()(attention(question, tokens))
    )
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(hidden))
    model.compile(keras.optimizers.Adam(0.02), loss="binary_crossentropy")
    model.optimizer.build(model.trainable_variables)
    return model


compiled, twin = new_model(), new_model()
fresh_optimizer = [variable.numpy() for variable in compiled.optimizer.variables]


def train(x, y):
    compiled.set_weights(new_model().get_weights())
    for variable, value in zip(
        compiled.optimizer.variables, fresh_optimizer, strict=True
    ):
        variable.assign(value)
    compiled.fit(x, y, batch_size=64, epochs=10, verbose=0)
    twin.set_weights(compiled.get_weights())
    return twin


# %% [markdown]
# ## Two arms
#
# In the arm *permuted*, the diagnoses are shuffled over the tumors. No measurement says anything about them, so each
# “supported” is wrong. In the arm *planted*, one measurement determines the diagnoses, a different one for each model.
# This measurement should be supported, and no other. There are as many benign and malignant tumors as before, and the
# measurements are the real ones, with all their correlations.
#
# Three models in each arm are far too few. They take seconds, and show how calibration works. For your own model, take
# 20 or more, and name a file as `store=`: a run that was stopped continues from that file.

# %%
calibration = explain.calibrate(train, x, y, n=3, batch_size=1024, verbose=0)
count = calibration["count"].to_series()
print("Wrong with permuted labels:", count["permuted: a feature supported"], "of 3")
print("Wrong beside a planted feature:", count["planted: another supported"], "of 3")
print("Found the planted feature:", count["planted: it is supported"], "of 3")
print(f"Skill with the true labels: {calibration.attrs['own_skill']:.1f}")
print(f"Skill of the planted feature: {calibration.attrs['strength']:.1f}")

# %% tags=["cover"] alt="Three outcomes as points with wide intervals, on a scale from 0 to 1. The two that are wrong, in which a feature that says nothing is supported, lie at 0, and their intervals reach beyond 0.5. The right one, in which the planted feature is supported, lies at 1, and its interval begins below 0.5."
labels = {
    "permuted: a feature supported": "permuted: some feature\nsupported (wrong)",
    "planted: another supported": "planted: another feature\nsupported (wrong)",
    "planted: it is supported": "planted: the planted feature\nsupported (right)",
}
colors = ["#d55e00", "#d55e00", "#0072b2"]
interval = calibration["interval"]
fig, ax = plt.subplots(figsize=(4.9, 2.8), layout="constrained")
for place, (outcome, color) in enumerate(zip(labels, colors, strict=True)):
    share = calibration["share"].sel(outcome=outcome).item()
    ax.plot(interval.sel(outcome=outcome), [place, place], color=color, linewidth=3)
    ax.plot(share, place, "o", color=color, markersize=9)
ax.set_yticks(range(len(labels)), labels.values())
ax.set_ylim(len(labels) - 0.5, -0.5)
ax.set_xlim(-0.04, 1.04)
ax.set_xlabel("share, with its Wilson interval")
plt.show()

# %% [markdown]
# The intervals show how little three models say. Even if none of them is wrong, the true share may be 56%.
# `calibration` also counts how often a feature is needed but not claimed, and how often the planted feature is refuted.

# %%
wrongly_supported = "permuted: a feature supported"
low, high = interval.sel(outcome=wrongly_supported).values
print(f"{count[wrongly_supported]} of 3: from {low:.0%} to {high:.0%}")

# %% [markdown]
# ## An easy case, and a harder one
#
# Here the planted measurement alone gives the same skill as all ten measurements give for the true diagnosis. That is
# the easy case. With `strength=0.1`, it explains a tenth of the entropy of the diagnoses, as one weak measurement among
# several might. Such a feature is harder to find, and the count says what “undetermined” is worth on your data.
#
# ## A summary for a report
#
# This summary in words can go into a report:

# %% tags=["nbval-ignore-output"]
print(calibration.attrs["summary"])

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** how often this test is wrong on models that this function trains on these measurements, with their
# correlations and this number of tumors.
#
# **It does not say** whether a verdict on the true labels is among the wrong ones. Nor does it show mistakes in the use
# of the true labels: tumors of one patient that are treated as independent (pass `groups=`), or a test on rows that
# your own model was trained on. And a planted measurement acts by itself. Measurements that matter only together may be
# harder to find.
#
# **Use your own data:** replace `x`, `y` and `names`, and let `train(x, y)` build, compile and fit your model, and
# return it. Then take `n=20` or more.
