# %% [markdown] level="beginner" data="table"
# # A DataFrame with categories and missing values
#
# **Your table has texts, numbers and gaps. How does it become a model, and which columns does that model need?**
#
# To tell the species of a penguin, the model needs the length of the bill: without it, the loss rises by more than 1,
# from less than 0.1. No claim about another column is supported.
#
# Scikit-learn's `ColumnTransformer` encodes the table, and `FeatureTokenizer` makes a token of each column. The recipe
# needs `pip install bokeh-sampledata`, which has the data.

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np
from bokeh_sampledata.penguins import data
from sklearn.compose import make_column_transformer
from sklearn.dummy import DummyClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from kerasfactory import explain, plot
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

# %% [markdown]
# ## The table
#
# The table has 344 penguins of three species, measured on three islands of Antarctica (Gorman, Williams & Fraser 2014,
# [*Ecological Sexual Dimorphism and Environmental Variability*](https://doi.org/10.1371/journal.pone.0090081)). Half of
# them are held out. Two penguins have no measurements at all, and this split puts one of them into each half.

# %%
table, (y, species) = data.drop(columns="species"), data["species"].factorize()
halves = train_test_split(table, y, test_size=0.5, stratify=y, random_state=1)
train, test, y_train, y_test = halves
print(table.dtypes.to_frame("type").assign(missing=table.isna().sum()))
print(dict(zip(species, np.bincount(y).tolist(), strict=True)))

# %% [markdown]
# ## From the table to numbers
#
# Measurements are put on one scale. Then their gaps are filled with 0, the mean, and a new column has a 1 where a gap
# was. This column is added after the scaling, because scaling would turn the 1 of a rare gap into a large number.
# Categories become codes. A gap, or a category that training did not have, gets the code 9.

# %%
numbers, categories, other = list(table.columns[1:5]), ["island", "sex"], 9
filled = make_pipeline(StandardScaler(), SimpleImputer(add_indicator=True))
codes = OrdinalEncoder(
    handle_unknown="use_encoded_value",
    unknown_value=other,
    encoded_missing_value=other,
)
parts = (filled, numbers), (codes, categories)
encoder = make_column_transformer(*parts, verbose_feature_names_out=False)
encoder.set_output(transform="pandas")
x_train, x_test = encoder.fit_transform(train), encoder.transform(test)
# 3: nothing measured; 8: only sex missing.
two = (x_test.loc[[3, 8]].rename_axis("penguin").round(1) + 0).T
print(two.rename(index=lambda name: name.replace("missingindicator_", "gap of ")))

# %% [markdown]
# ## The model
#
# `cardinalities` says which columns are codes, and how many codes there are. Three models are trained from different
# seeds, to see what depends on chance. We compare them with a logistic regression, and with a forecast that knows only
# how frequent each species is.


# %%
def trained(seed):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((x_train.shape[1],))
    levels = dict.fromkeys(categories, other + 1)
    tokens = FeatureTokenizer(8, list(x_train.columns), cardinalities=levels)(inputs)
    attended = InterpretableMultiHeadAttention(8, 2, name="attention")(tokens)
    flat = keras.layers.Flatten()(attended)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(flat))
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=False)
    model.fit(x_train, y_train, epochs=15, verbose=0)
    return model


models = [trained(seed) for seed in range(3)]
columns = (filled, numbers), (OneHotEncoder(handle_unknown="ignore"), categories)
linear = make_pipeline(make_column_transformer(*columns), LogisticRegression())
baselines = {
    "frequencies": DummyClassifier(strategy="prior").fit(train, y_train),
    "logistic regression": linear.fit(train, y_train),
}


def compare(test):
    chances = {name: model.predict_proba(test) for name, model in baselines.items()}
    x = encoder.transform(test).to_numpy()
    for number, model in enumerate(models, start=1):
        chances[f"attention {number}"] = model(x).numpy()
    print(f"{'172 new penguins':20}{'loss':>6}{'wrong':>6}{'missed':>8}")
    for name, chance in chances.items():
        loss = -np.log(chance[np.arange(len(y_test)), y_test]).mean()
        wrong = chance.argmax(axis=1) != y_test
        print(f"{name:20}{loss:6.2f}{wrong.sum():6}{wrong[y_test == 1].sum():8}")


compare(test)

# %% [markdown]
# The logistic regression makes one mistake, and the models with attention make two or three. So this table does not
# need attention. We go on because the same lines serve a table that does. Chinstraps are the rarest species, a fifth of
# the rows, and *missed* counts those that a model classifies wrongly. If a model misses a rare class, give `fit` a
# `class_weight`.
#
# ## Which columns does the model need?
#
# A measurement and the column of its gaps belong together, and `feature_mask` makes one feature of them.
# [`explain.feature_claims`](../api/explain.md) resamples the values of a feature given all others, and measures how
# much the loss rises. It also says whether attention ranks the feature high. The figure is about the first model. The
# table below it is about all three: the largest rise, and how many of them support the claim.

# %%
mask = x_test.columns.str.removeprefix("missingindicator_").factorize()[0]
print(mask)


def claims_of(model, mask):
    attention = explain.attribute(model, x_test, verbose=0)
    settings = {"feature_mask": mask, "draws": 20, "verbose": 0}
    claims = explain.feature_claims(model, x_test, y_test, attention, **settings)
    # Name the measurement, without the column of its gaps.
    names = [name.partition(" + ")[0] for name in claims["feature"].values]
    return claims.assign_coords(feature=names)


claims = [claims_of(model, mask) for model in models]

# %% tags=["cover"] alt="How much the loss of the first model rises without each of six features, with intervals and verdicts. Bill length, supported, lies at 1.1, far from zero. Island, sex, flipper length, bill depth and body mass, all undetermined, lie at zero."
ax = plot.features(claims[0])
ax.set_xlabel("rise of the loss without it")
ax.figure.set_size_inches(4.9, 3.1)
plt.show()
print(f"{'':18}{'rise':>6}{'supported':>11}")
for name in claims[0]["feature"].values:
    of = [found.sel(feature=name) for found in claims]
    rise = max(found["effect"].item() for found in of)
    supported = sum(found["verdict"].item() == "supported" for found in of)
    print(f"{name:18}{rise:6.2f}{f'{supported}/3':>11}")

uniform = np.bincount(mask) / len(mask)  # a feature of two columns has two shares
ratios = [found["attribution"].values / uniform for found in claims]
print(f"Attention, × uniform: {np.min(ratios):.1f} to {np.max(ratios):.1f}")

# %% [markdown]
# All three models need the bill length. Their attention barely shows it: it is above the mean in all three, as
# *supported* requires, but every feature receives between 0.9 and 1.2 times the uniform share.
#
# *Undetermined* does not mean useless. A Gentoo has long flippers, a shallow bill and a large mass, so each of these
# can stand in for the others. As one feature, the three are needed by the first model. *Needed, not claimed* means that
# the model does worse without them, although attention does not rank them above the mean:

# %%
measured = x_test.columns.str.removeprefix("missingindicator_")
body = measured.isin(["bill_depth_mm", "flipper_length_mm", "body_mass_g"])
together = measured.where(~body, "body").factorize()[0]
found = claims_of(models[0], together).isel(feature=1)
print(together)
print(f"rise {found['effect'].item():.2f}, p-value {found['p_adjusted'].item():.2f}")
print(found["verdict"].item())

# %% [markdown]
# ## A new island
#
# What if the same penguins came from an island that training did not have? The encoder gives it the code 9. No island
# was missing in training, so the token of that code was never trained. It still has its random initial values.

# %%
compare(test.assign(island="Cormorant"))

# %% [markdown]
# There is no error and no warning. Most penguins are still classified correctly, but each model makes two or three more
# mistakes. Count the 9s in new data before you trust the predictions.
#
# ## What it says, and what it does not
#
# **It says** that three models need the bill length to tell these species, beyond what the other columns say. That
# assumes that the rows are new to the models and independent of each other, and that values drawn for a feature could
# have come with the other values of its row.
#
# **It does not say** what makes a penguin a Gentoo, or that another kind of model would need the same columns. With 172
# rows, a small effect can go unnoticed.
#
# **Use your own data:** replace `table` and `y`, and write the names of your columns into `numbers` and `categories`.
# Choose `other` so that no column has more categories than that. For two classes, train with `"binary_crossentropy"`
# and end the model with `Dense(1, activation="sigmoid")`. For a number, end it with `Dense(1)` and use `"mse"`. [Your
# data](../learn/your-data.md#tables) shows one-hot codes and pandas' own missing values, too.
