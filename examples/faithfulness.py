# %% [markdown] level="advanced" data="table"
# # Is attention an explanation here?
#
# **Two models solve the same task, and both come with an attention map. Whose map says what the model uses, and how would you
# find out without knowing the answer?**
#
# In one model, attention passes: replacing the stations with most attention moves the output further than each of 100
# random maps does. In the other, the output depends on the attention, but its map beats only 20 of 100.
#
# The tests reach both verdicts without knowing the answer.
#
# The truth is planted: of eight stations one is marked in each sample, and the target is the reading of that station.
# So we know what a good model must use. The tests do not know it.

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory import explain, plot

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)

readings = rng.normal(size=(4300, 8))
marked = rng.integers(0, 8, size=4300)
# (sample, station, reading and mark)
x = np.stack([readings, np.eye(8)[marked]], axis=-1).astype("float32")
y = readings[np.arange(4300), marked]
x_test, y_test, marked_test = x[4000:], y[4000:], marked[4000:]

# %% [markdown]
# ## Two models, one attention layer each
#
# The first makes a token of each station, and attends to the tokens. In the second, a dense layer sees the whole row
# before there are tokens, as with a recurrent layer before attention. The rest of the two models is the same.


# %%
def attend(inputs, tokens):
    query = keras.layers.Dense(16)(
        keras.layers.GlobalAveragePooling1D(keepdims=True)(tokens)
    )
    attended = keras.layers.MultiHeadAttention(
        num_heads=1, key_dim=16, name="attention"
    )(query, tokens)
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))


inputs = keras.Input((8, 2))
mixed = keras.layers.Dense(8 * 16, activation="relu")(keras.layers.Flatten()(inputs))
models = {
    "a token for each station": attend(inputs, keras.layers.Dense(16)(inputs)),
    "mixed before attention": attend(inputs, keras.layers.Reshape((8, 16))(mixed)),
}
print("Explained variance of new samples")
for name, model in models.items():
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x[:4000], y[:4000], batch_size=100, epochs=12, verbose=0)
    share = model.evaluate(x_test, y_test, verbose=0) / y_test.var()
    print(f"    {name:26}{1 - share:.2f}")

# %% [markdown]
# ## The maps
#
# Both models explain nearly all of the variance: 1.00 and 0.99. What does their attention look at? Each row is one
# sample, and the ring is the marked station.

# %% alt="Two heat maps of attention, twelve samples by eight stations. Left, a token for each station: in each row the ringed cell is dark and all others are pale. Right, mixed before attention: all cells are nearly the same pale blue, and the rings are nowhere special."
attention = {
    name: explain.attribute(model, x_test, verbose=0) for name, model in models.items()
}
fig, axes = plt.subplots(1, 2, figsize=(4.9, 4.4), layout="constrained", sharey=True)
print("Samples with most attention on the marked station")
for ax, (name, scores) in zip(axes, attention.items(), strict=True):
    image = ax.imshow(scores[:12], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.scatter(
        marked_test[:12], range(12), s=90, facecolors="none", edgecolors="#d55e00"
    )
    ax.set_title(name, fontsize=10)
    ax.set_xlabel("station (looked at)")
    first = (scores.values.argmax(axis=1) == marked_test).mean()
    print(f"    {name:26}{first:.0%}")
axes[0].set_ylabel("sample")
fig.colorbar(image, ax=axes, label="attention", location="bottom", aspect=40)
plt.show()

# %% [markdown]
# From the map on the right, a reader would conclude: *this model weighs all stations alike.* That would be wrong,
# because the model predicts the reading of a single station. Without the planted truth no one would notice. Three tests
# do not need that truth.
#
# ## Test 1: Does attention matter at all?
#
# We run the model with scores that are not its own. *Uniform*: every station gets the same weight. *Permuted*: the
# weights are assigned at random. If the output stays the same, attention did not decide. *Adversarial* (Jain & Wallace
# 2019, [*Attention is not Explanation*](https://arxiv.org/abs/1902.10186)): we look for scores as far from the model's
# own as possible that keep the output within 2% of its spread.
#
# There are two questions. Does the output change? The answer is the `share` of rows that change by more than 2% of the
# spread, with a test that this share is above 2%. We also print the median change, in spreads. Does the model do worse?
# The answer is the increase of the loss, and it needs the labels.

# %%
controls = {
    name: explain.attention_controls(model, x_test, y_test, verbose=0)
    for name, model in models.items()
}
for name, result in controls.items():
    print(f"{name}\n    control   share  p       median change")
    for control in ("uniform", "permuted"):
        found = result.sel(control=control)
        share, change = found["share"].item(), found["median_change"].item()
        p = f"{found['p_value'].item():.2f}".replace("0.00", "< 0.01")
        print(f"    {control:10}{share:<7.0%}{p:8}{change:.1f}")
    p = f"{result['p_value_loss'].item():.2f}".replace("0.00", "< 0.01")
    print(f"    uniform: loss +{result['loss_increase'].item():.2f}, p {p}")
    far = (result["jsd"].sel(control="adversarial") > 0.3).mean().item()
    print(f"    adversarial (JSD > 0.3): found for {far:.0%}")

# %% alt="Two scatter plots, one for each model, of the change of the output against the distance of the scores from the model's own. Top, a token for each station: uniform and permuted scores are far away and move the output by up to three spreads. Bottom, mixed before attention: they are close and mostly move it little, by 1.4 spreads at most. In both, adversarial points lie at the bottom, many of them far to the right."
fig, axes = plt.subplots(
    2, 1, figsize=(4.9, 5.8), layout="constrained", sharex=True, sharey=True
)
for ax, (name, result) in zip(axes, controls.items(), strict=True):
    for control, marker, color in [
        ("uniform", "o", "#0072b2"),
        ("permuted", "^", "#009e73"),
        ("adversarial", "x", "#d55e00"),
    ]:
        chosen = result.sel(control=control)
        ax.scatter(
            chosen["jsd"],
            chosen["change"],
            s=16,
            marker=marker,
            color=color,
            alpha=0.6,
            label=control,
        )
    ax.set_title(name)
    ax.set_ylabel("change of output (spread = 1)")
axes[1].set_xlabel("distance from the model's own scores (JSD)")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# The outputs of both models depend on where they attend, and both do worse with uniform scores. The models differ in
# how much they change. With uniform scores, half of the outputs move by more than 0.6 of the spread in the first, and
# by more than 0.1 in the second.
#
# **The adversary does not tell them apart.** It finds other scores for 67% of the samples of the first model, and for
# 44% of those of the second. The reason is simple: a mixture of two stations that do not matter can give the same
# number as the station that does. If other scores *would have* given this output, that does not mean that the model did
# not use its own (Wiegreffe & Pinter 2019, [*Attention is not not Explanation*](https://arxiv.org/abs/1908.04626)). By
# the adversary alone, we would have thrown away the good map.
#
# ## Test 2: Does the map point at what the model uses?
#
# [`explain.faithfulness`](../api/explain.md) replaces the values of the most attended stations with those of
# another sample, and measures how far the output moves. This is the *comprehensiveness*. Removing any station moves the
# output somewhat. So the same is done with 100 maps that know nothing, which are the same map with its stations
# relabeled at random. Only a map that beats those counts as evidence.

# %%
results = {
    name: explain.faithfulness(model, x_test, attention[name], draws=100, verbose=0)
    for name, model in models.items()
}
for name, result in results.items():
    beaten = (result["null"] < result.attrs["observed"]).sum().item()
    print(f"{name}: p = {result['p_value'].item():.2f}")
    print(f"    beats {beaten} of 100 maps that know nothing")

# %% tags=["cover"] alt="Two histograms, one for each model: comprehensiveness of 100 maps that know nothing, and a vertical line for the model's own map. Top, a token for each station: the line is far to the right of the histogram. Bottom, mixed before attention: it is inside."
fig, axes = plt.subplots(
    2, 1, figsize=(4.9, 5.2), layout="constrained", sharex=True, sharey=True
)
for ax, (name, result) in zip(axes, results.items(), strict=True):
    ax.hist(result["null"], bins=15, color="#999999", label="maps that know nothing")
    ax.axvline(
        result.attrs["observed"],
        color="#d55e00",
        linewidth=3,
        label="the model's attention",
    )
    ax.set_title(name)
    ax.set_ylabel("maps")
axes[1].set_xlabel("comprehensiveness (AOPC)")
axes[0].yaxis.get_major_locator().set_params(integer=True)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# [`plot.faithfulness`](../api/plot.md) draws one such result. The upper part shows how far the output moves as more of
# the first-ranked stations are replaced, or all others. The lower part compares this with maps that know nothing.

# %% alt="Two pictures of the first model. Above, two curves with bands over the share of stations that are replaced. Below, a histogram of maps that know nothing, and a line for the model's own map, far to the right of it."
figure = plot.faithfulness(results["a token for each station"])

# %% [markdown]
# Can the second model be explained by stations at all? We give the test the planted truth, a map that is 1 at the
# marked station:

# %%
truth = np.eye(8)[marked_test]
print("The planted truth")
for name, model in models.items():
    result = explain.faithfulness(model, x_test, truth, draws=100, verbose=0)
    print(f"    {name}: p = {result['p_value'].item():.2f}")

# %% [markdown]
# It can. Both models use the marked station, and only the attention of the first one says so.
#
# ## Test 3: Another way to remove a station
#
# What replaces a removed station is a choice, and a result that depends on this choice is a weak one. In test 2 it was
# the value of another sample, which brings along the mark of that sample. Now it is the mean:

# %%
for name, model in models.items():
    result = explain.faithfulness(
        model, x_test, attention[name], removal="mean", draws=100, verbose=0
    )
    print(f"{name}: p = {result['p_value'].item():.2f}")

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** that attention is an explanation in the model with a token for each station. With other scores its output
# changes, and removing the stations that the scores point at moves the output. In the model that mixes first, attention
# is not shown to be one. Its output depends a little on its attention, but its map is not shown to be better than
# random maps. So it is not enough that the output changes without the attention. The tests reached both verdicts
# without the planted truth. The adversary found other scores for both models, which decides nothing.
#
# **It does not say** that a map that fails is of no use anywhere, nor that a map that passes is complete. The tests are
# about these samples, this way of removal and this output. If a feature has a copy, removing one of the two may move
# nothing, and a faithful map can fail. And "no better than chance" is not "wrong": with fewer samples or features, a
# good map may look no better than chance.
#
# **Use your own data:** replace the models in `models`, `x_test` and `y_test`. The calls of `explain.attribute`,
# `explain.attention_controls` and `explain.faithfulness` stay as they are. Leave out the lines with `marked_test`,
# which are for data whose answer is known.
