# %% [markdown] level="advanced" data="table"
# # Would another training show the same map?
#
# **A map comes from one training run. How much of it was learned, and how much would recur in a run from another
# seed?**
#
# Most of the map recurs: the two features that each seed ranks first overlap by 0.67 on average, where chance would
# give 0.25. But which of two near-copies a model looks at depends on the seed.
#
# Two checks answer the question, and neither needs labels. They are about maps, not about truth: a map that passes may
# still be wrong, but a map that fails should not be shown. The credit applications below are simulated, so we know the
# right answer.

# %%
import textwrap

import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

# %% [markdown]
# ## Planted truth
#
# For an `employee`, the `income` decides whether a loan is repaid. For everyone else, the `turnover` of the business
# decides. `receipts` is `turnover` as another system stored it: the same numbers with a little noise. A model can read
# either. The other four columns are noise.

# %%
rng = np.random.default_rng(0)
names = ["employee", "income", "turnover", "receipts"]
names += ["age", "requests", "tenure", "region"]
x = rng.normal(size=(3200, 8)).astype("float32")
x[:, 0] = np.sign(x[:, 0])
x[:, 3] = x[:, 2] + 0.02 * x[:, 3]
y = (
    np.where(x[:, 0] > 0, x[:, 1], x[:, 2]) + 0.2 * rng.logistic(size=3200) > 0
).astype("float32")
x_train, x_test, y_train, y_test = x[:3000], x[3000:], y[:3000], y[3000:]


def train(seed):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((8,))
    tokens = FeatureTokenizer(8, feature_names=names)(inputs)
    attended = InterpretableMultiHeadAttention(
        8, n_head=1, dropout_rate=0.0, name="attention"
    )(tokens[:, :1], tokens)
    outputs = keras.layers.Dense(1, activation="sigmoid")(
        keras.layers.Flatten()(attended)
    )
    model = keras.Model(inputs, outputs, name="credit")
    model.compile(
        keras.optimizers.Adam(0.03), "binary_crossentropy", metrics=["accuracy"]
    )
    model.fit(x_train, y_train, batch_size=200, epochs=8, verbose=0)
    return model


models = [train(seed) for seed in range(4)]
accuracies = [model.evaluate(x_test, y_test, verbose=0)[1] for model in models]
print(
    f"Accuracy on 200 new applications, over four seeds: {min(accuracies):.1f} to "
    f"{max(accuracies):.1f}"
)

# %% [markdown]
# These are four models from the same data and the same code. To one decimal, their accuracy is the same.
#
# ## Check 1: does the map depend on the learned weights?
#
# This check shuffles the weights of the attention layer and makes the map again. What stays was not learned by these
# weights: it comes from the data, or from the architecture (Adebayo et al. 2018, [*Sanity Checks for Saliency
# Maps*](https://arxiv.org/abs/1810.03292)). `kept` is 1 if all of the map stays, and 0 if the two maps have no more in
# common than by chance. A small p supports that at most half of the map is kept. For comparison, we test a "map" that
# uses the data alone: the size of each number.

# %%
attention = explain.parameter_randomization(models[0], x_test, verbose=0)
size = explain.parameter_randomization(
    models[0], x_test, method=lambda model, x: np.abs(x), verbose=0
)
print(f"{'after a shuffle':20}  kept      p")
for name, result in {"attention": attention, "size of the numbers": size}.items():
    kept, p = result["median_kept"].item(), result["p_value"].item()
    print(f"{name:20}{kept:6.2f}{p:7.3f}")

# %% [markdown]
# Attention passes. This alone says little: the map of a model that was *never trained* depends on its weights, too. The
# check is made to catch maps that are not about the model at all, and it catches the second one.
#
# ## Check 2: do the seeds agree?
#
# Each marker is one model's mean attention to one feature.

# %% tags=["cover"] alt="Mean attention to eight features, one marker for each of four seeds. At income all four are high. At turnover and receipts the seeds differ: the more a model attends to one, the less to the other, up to nothing at all. At the other five features all markers are near zero."
shares = [explain.attribute(model, x_test, verbose=0) for model in models]
plt.figure(figsize=(4.9, 4), layout="constrained")
for seed, share in enumerate(shares):
    plt.scatter(
        names,
        share.mean("sample"),
        s=60,
        alpha=0.8,
        marker="os^D"[seed],
        label=f"seed {seed}",
    )
plt.ylabel("mean attention")
plt.xticks(rotation=30, ha="right")
plt.legend()
plt.show()

# %%
agreement = explain.seed_agreement(shares)
spread = agreement["spread"].to_series().sort_values(ascending=False)
print("The seeds differ most on:", ", ".join(sorted(spread.index[:2])))
print(
    f"Overlap of the first {agreement.attrs['top_k']} features: "
    f"{agreement['overlap'].item():.2f}"
)
print(
    f"By chance: {agreement.attrs['chance']:.2f}, p-value "
    f"{agreement['p_value'].item():.3f}"
)

# %% [markdown]
# The seeds agree better than chance: 0.67 instead of 0.25. But one sentence is not safe to say: "the model looks at
# `turnover`". The seed decides which of the two copies a model looks at. All four models look at the pair.

# %%
pair = [
    float(share.sel(feature=["turnover", "receipts"]).sum("feature").mean())
    for share in shares
]
one = [float(share.sel(feature="turnover").mean()) for share in shares]
print("Mean attention over the seeds:")
print(f"turnover alone: {min(one):.2f} to {max(one):.2f}")
print(f"turnover and receipts together: {min(pair):.2f} to {max(pair):.2f}")

# %% [markdown]
# ## Both in an audit
#
# An [audit](audit.ipynb) always makes the first check, and makes the second if you give it the other models.

# %%
report = explain.audit(
    models[0], x_test, y_test, models=models[1:], batch_size=4096, verbose=0
)
for claim in report.claims.loc[["randomization", "seeds"]].itertuples():
    text = f"{claim.verdict}: {claim.claim}"
    print(textwrap.fill(text, 40, subsequent_indent="    "))

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** that the map depends on the model's weights, that models from other seeds rank the same features first
# more often than by chance, and that the seed decides between two copies of a feature.
#
# **It does not say** that the map is right: models may agree on a shortcut, and an untrained one passes the first
# check. Test that with [`explain.faithfulness`](faithfulness.ipynb). Four seeds are few: they show that a map can
# change, but not how often. And with few features, agreement is hard to tell from chance: two models that each put one
# of three features first agree in a third of all cases without having learned anything.
#
# **Use your own data:** replace `x`, `y` and `names`, and let `train(seed)` return your model, trained with that seed.
# The checks stay as they are. Replace `turnover` and `receipts` with features that you suspect to be copies.
