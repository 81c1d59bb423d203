# %% [markdown] level="intermediate" data="table"
# # Attention beside SHAP and integrated gradients
#
# **Four readings say which columns a prediction rests on. Do they agree, which of them pass a test, and what is each good for?**
#
# SHAP, integrated gradients and the value norm agree on the first two of ten columns, and pass a test: the first
# columns of SHAP move the prediction by 47 points, and random columns by 23. Attention, with 27 against 23, does not
# pass.
#
# In another training run, attention passes. SHAP also gives each column a sign and a unit. It needs about 600
# predictions for a patient, and attention needs one.
#
# The data are scikit-learn's diabetes set: 442 real patients, ten measurements, and the progression of the disease a
# year later, in points from 25 to 346. The recipe needs `pip install shap`.

# %%
import warnings

import keras
import matplotlib.pyplot as plt
import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # shap warns about a missing progress bar
    import shap

from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from kerasfactory import explain, plot
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

data = load_diabetes(scaled=False)
names = ["age", "sex", "bmi", "blood pressure", "cholesterol", "LDL", "HDL"]
names += ["cholesterol / HDL", "triglycerides", "glucose"]  # scikit-learn's s1 to s6
raw, raw_test, y_train, y_test = train_test_split(
    data.data,
    data.target,
    test_size=0.3,
    random_state=0,
)
scaler = StandardScaler().fit(raw)
x_train, x_test = (scaler.transform(x).astype("float32") for x in (raw, raw_test))

# %% [markdown]
# ## The model, trained twice
#
# The model has one token for each column, and one layer of attention without a residual connection. The output is in
# points.


# %%
def train(seed):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((10,))
    tokens = FeatureTokenizer(16, feature_names=names)(inputs)
    attention = InterpretableMultiHeadAttention(16, 2, dropout_rate=0.0)
    attended = keras.layers.Flatten()(attention(tokens))
    output = keras.layers.Dense(1)(keras.layers.Dense(16, "relu")(attended))
    points = keras.layers.Rescaling(y_train.std(), y_train.mean())(output)
    model = keras.Model(inputs, points, name="diabetes")
    model.compile(keras.optimizers.Adam(0.005), "mse", jit_compile=False)
    model.fit(x_train, y_train, batch_size=32, epochs=12, verbose=0)
    return model


def predict(x):
    return model.predict_on_batch(x)[:, 0]


model, other = [train(seed) for seed in (3, 4)]
r2 = 1 - np.mean((predict(x_test) - y_test) ** 2) / y_test.var()
linear = LinearRegression().fit(x_train, y_train).score(x_test, y_test)
print(f"R2 on {len(y_test)} other patients: {r2:.1f}, linear regression: {linear:.1f}")

# %% [markdown]
# ## Four readings, and what they cost
#
# Attention and the value norm come from one run of the model. Integrated gradients follow each prediction from tokens
# of 0 to the patient, in 32 steps that each need a forward and a backward pass. SHAP (Lundberg & Lee 2017, [*A Unified
# Approach to Interpreting Model Predictions*](https://arxiv.org/abs/1705.07874)) needs only predictions, of any model.
# It gives columns the values of 20 other patients, in many combinations. We count these predictions.

# %%
readings = {
    method: explain.attribute(model, x_test, method=method, verbose=0)
    for method in ("attention", "value_norm", "integrated_gradients")
}
asked = []


def counted(x):
    asked.append(len(x))
    return predict(x)


masker = shap.maskers.Independent(x_train[:20], max_samples=20)
explainer = shap.PermutationExplainer(counted, masker, seed=0)
shapley = explainer(x_test, max_evals=2 * len(names) + 1, silent=True)
readings["SHAP"] = readings["attention"].copy(data=shapley.values)
each = sum(asked) / len(x_test)
print(f"SHAP, predictions for a patient: about {round(each, -2):.0f}")

# %% [markdown]
# ## Sign, unit and sum
#
# SHAP and integrated gradients distribute the prediction over the columns, in points and with a sign. Both begin at a
# starting value. For SHAP this is the mean prediction for the 20 patients. For integrated gradients it is the
# prediction for tokens of 0, which belong to no patient. Attention sums to 1 for every prediction, so it cannot say
# that a column lowers the prediction.

# %%
start, predicted = shapley.base_values[0], predict(x_test)
missed = np.abs(start + shapley.values.sum(axis=1) - predicted).max()
from_zero = predicted - readings["integrated_gradients"].sum("feature").values
print(f"SHAP starts from {start:.0f} points")
print(f"    and misses predictions by at most {missed:.2f}")
print(f"integrated gradients start from {from_zero.mean():.0f} points")
print(f"attention sums to {readings['attention'].sum('feature').mean().item():.2f}")

signed = {
    "SHAP": readings["SHAP"],
    "integrated gradients": readings["integrated_gradients"],
}
correlation = np.corrcoef([values.values.ravel() for values in signed.values()])[0, 1]
print(f"correlation of SHAP and gradients: {correlation:.1f}")

# %% alt="Ten columns as rows, each with a dot for SHAP and a square for integrated gradients, on an axis of points. For this patient, bmi adds about 100 points by both, and blood pressure, triglycerides, HDL and LDL add about 15 to 30. Sex takes a few points away. Most dots and squares are close to each other."
patient = predicted.argmax()
ax = plot.features({name: values[patient] for name, values in signed.items()})
ax.set_xlabel(f"points, of the {predicted[patient]:.0f} predicted for one patient")
plt.show()

# %% [markdown]
# ## Do they agree, and which pass?
#
# [`explain.compare`](../api/explain.md) takes the columns that a reading ranks first, replaces their values with those
# of another patient, and measures how far the prediction moves. Then it does the same with the columns relabeled at
# random. The p-values are adjusted for four tests (Holm). SHAP and integrated gradients are ranked by absolute value,
# because a column that lowers a prediction counts as well.

# %%
methods = {
    "attention": readings["attention"],
    "value norm": readings["value_norm"],
    "integrated gradients": np.abs(readings["integrated_gradients"]),
    "SHAP": np.abs(readings["SHAP"]),
}
test = {"background": x_train, "verbose": 0}
for removal, new in [("mean", "the mean"), ("marginal", "another patient's value")]:
    result = explain.compare(model, x_test, methods=methods, removal=removal, **test)
    print(f"replaced with {new}")
    print(f"  {'points moved':22}first  random")
    for name in methods:
        of_method = result.sel(reading=name)
        moved = of_method["observed"].item(), of_method["null"].mean().item()
        print(f"  {name:22}{moved[0]:5.0f}{moved[1]:8.0f}")

# %% tags=["cover"] alt="How far the prediction moves, in points, if the first columns of a reading get another patient's values, beside random columns. Attention: 27 against 23. Value norm: 39, integrated gradients: 44, SHAP: 47, each against 23 to 25."
first = [result["observed"].sel(reading=name).item() for name in methods]
random = [result["null"].sel(reading=name).mean().item() for name in methods]
places = np.arange(len(methods))
fig, ax = plt.subplots(figsize=(4.9, 3.4), layout="constrained")
ax.barh(places - 0.2, first, 0.38, color="#0072b2", label="its first columns")
ax.barh(places + 0.2, random, 0.38, color="#bbbbbb", label="random columns")
ax.set_yticks(places, list(methods))
ax.set_xlabel("change of the prediction (points)")
fig.legend(loc="outside upper center", ncols=2)
ax.invert_yaxis()
plt.show()

# %% [markdown]
# `plot.compare` draws the result with its p-values, the ranks, and how much the readings overlap.

# %% alt="Three panels. Ranks: value norm, integrated gradients and SHAP put triglycerides first and bmi second; attention puts them fifth and third. Overlap of the first two columns: 1.00 among those three, and 0.00 between attention and any of them; by chance 0.21. Comprehensiveness: the dot of attention, p = 0.18, lies inside the gray band of random rankings, and those of the other three, p = 0.02, lie to the right of it, SHAP farthest."
plot.compare(result)
plt.show()
for name, p in zip(methods, result["p_adjusted"].values, strict=True):
    print(f"{name:21} p = {p:.2f}")
pair = result["p_adjusted_overlap"].sel(reading="SHAP", reading_other="value norm")
print("SHAP and value norm agree on the first two")
print(f"    p = {pair.item():.2f}")
shares = readings["attention"].mean("sample")
print(f"mean attention: from {shares.min().item():.3f} to {shares.max().item():.3f}")

# %% [markdown]
# It proves little that three readings name the same two columns: for two of them p = 0.15, and all three read the same
# model. The test is the evidence. But it favors SHAP, which replaces columns with the values of other patients, as the
# test does. If the mean replaces the columns, the order of the readings is the same.
#
# Attention is close to 1/10 for each column. Does attention fail in general, or only in this training run? We test the
# other run:

# %%
attribution = explain.attribute(other, x_test, verbose=0)
again = explain.faithfulness(other, x_test, attribution, **test)
print(f"the other training: attention p = {again['p_value'].item():.2f}")

# %% [markdown]
# ## What is each good for?
#
# | reading | sign and unit | needs | predictions for a patient |
# |---|---|---|---|
# | attention | none, shares of 1 | an attention layer | 1 |
# | value norm | no sign, length of a vector | an attention layer | 1 |
# | integrated gradients | points | the model's gradients | 32, forward and backward |
# | SHAP | points, exact sum | predictions, and other patients | about 600 |
#
# To explain one prediction in points, take SHAP. For a first look at many samples, the value norm needs a 600th of the
# predictions, and names the same columns here. Only attention shows which token looks at which, head by head. It did
# not rank the columns reliably here.
#
# ## What it says, and what it does not
#
# **It says** which readings name columns that this model uses, on 133 patients.
#
# **It does not say** what makes the disease worse. And replacing columns makes patients that do not exist: cholesterol,
# LDL and HDL depend on each other, and neither SHAP nor the test keeps them together. A verdict assumes that the
# predictions for such patients mean something.
#
# **Use your own data:** replace `x_train`, `x_test`, `names` and `model`. For a classifier, pass `target`, and give
# SHAP the logit of that class.
