# %% [markdown] level="advanced" data="any"
# # Long sequences: what 32,000 tokens look at
#
# **The matrix of scores would take gigabytes. What can you still know about it, and does a model that works at 64
# tokens still look at the right token among 32,000?**
#
# A summary of 5 MB instead of a matrix of 4.1 GB keeps the top keys, the entropy and a small map. The right token is
# first among 32,000, but its weight falls from 0.92 at 64 tokens to 0.02, so it counts for only 0.02 in the answer.
#
# The truth is planted: in each sequence one token is marked, and the answer is the number that it carries. So we know
# where attention should be. You need to know the [recipe for an existing model](existing_model.ipynb).

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory import explain, plot

keras.utils.set_random_seed(0)

# %% [markdown]
# ## A needle in a haystack
#
# Each token is a number and a mark. One token in the sequence is marked: the needle. The last token asks for its
# number. The model is trained on sequences of 64 tokens.


# %%
def sequences(samples, length, seed):
    rng = np.random.default_rng(seed)
    numbers, marked = (
        rng.normal(size=(samples, length)),
        rng.integers(0, length - 1, samples),
    )
    marks = np.zeros((samples, length))
    marks[np.arange(samples), marked] = 1
    asks = np.broadcast_to(np.arange(length) == length - 1, (samples, length))
    x = np.stack([numbers, marks, asks], axis=-1).astype("float32")
    return x, numbers[np.arange(samples), marked], marked


inputs = keras.Input((None, 3))
tokens = keras.layers.Dense(16)(inputs)
found = keras.layers.MultiHeadAttention(num_heads=1, key_dim=16, name="attention")(
    tokens, tokens
)
model = keras.Model(inputs, keras.layers.Dense(1)(found[:, -1]))
model.compile(keras.optimizers.Adam(0.01), "mse")

x, y, _ = sequences(2000, 64, seed=1)
model.fit(x, y, batch_size=50, epochs=5, verbose=0)
x, y, _ = sequences(200, 64, seed=2)
left = model.evaluate(x, y, verbose=0) / y.var()
print(f"Share of the variance of new samples that is left: {left:.2f}")

# %% [markdown]
# ## The matrix, without the matrix
#
# [`explain.summarize`](../api/explain.md) computes the scores block by block, and keeps what one would read from them:
# the top keys of each query, the entropy, the mean distance, the attention that each key receives, a small map, and the
# rows that you ask for. Memory grows with the length, not with its square.

# %%
lengths = [64, 512, 4096, 32_000]
summaries, needles = {}, {}
for length in lengths:
    x, y, marked = sequences(1, length, seed=length)
    summaries[length] = explain.summarize(
        model, x, map_size=64, rows=[length - 1], verbose=0
    )["attention"]
    needles[length] = int(marked[0])

longest = summaries[32_000]
print(f"The full matrix: {32_000**2 * 4 / 1e9:.1f} GB")
print(f"The summary: {longest.nbytes / 1e6:.0f} MB")
for name in ("top_weight", "received", "map"):
    print(name, dict(longest[name].sizes))

# %% [markdown]
# ## Does it find the needle?
#
# Softmax distributes a weight of 1 over all keys. With 500 times as many tokens, a head that prefers the needle may
# give most of its weight to all the others. The row of the last token is exact, and shows it:

# %%
weights = []
print("tokens  needle  first key  needle's weight")
for length in lengths:
    of_question = summaries[length].isel(sample=0, head=0, query=-1)
    first = of_question["top_key"].isel(rank=0).item()
    weights.append(of_question["row"].isel(row=0, key=needles[length]).item())
    print(f"{length:6}{needles[length]:8}{first:11}{weights[-1]:17.2f}")

# %% tags=["cover"] alt="Top, the weights that the last of 32,000 tokens gives to all keys, on a logarithmic scale: a flat band of all other keys, one ringed point, the needle, several hundred times above it, and a dot a little above the band at its right end. Bottom, the weight of the needle by length: it falls from near 1 at 64 tokens to near 0 at 32,000."
row = longest["row"].isel(sample=0, head=0, row=0).values
fig, (top, bottom) = plt.subplots(2, 1, figsize=(4.9, 6), layout="constrained")
top.semilogy(np.arange(32_000) / 1000, row, ".", markersize=2, color="#0072b2")
top.scatter(
    needles[32_000] / 1000,
    row[needles[32_000]],
    s=90,
    facecolors="none",
    edgecolors="#d55e00",
    linewidths=2,
)
top.set_title("what the last of 32,000 tokens looks at")
top.set_xlabel("key (thousands; ring: needle)")
top.set_ylabel("weight")
top.yaxis.set_major_formatter("{x:g}")
bottom.semilogx(lengths, weights, marker="o", color="#d55e00")
bottom.set_xticks(lengths, lengths)
bottom.set_ylim(0, 1)
bottom.set_title("weight of the needle")
bottom.set_xlabel("tokens")
plt.show()

# %% [markdown]
# The needle stands out at every length: it is first among 32,000 keys. (The dot at the right end is the last token
# itself.) But 0.98 of the weight has gone to thousands of other tokens, each of which gets next to nothing. The model
# answers with the weighted mean over all tokens, in which the needle counts for 0.02. **The top keys alone are
# misleading.** Read them together with the weight and the entropy. The reason is arithmetic: for the needle to keep its
# weight, its logit must exceed the others by more than the logarithm of their number. Trained on 64 tokens, the model
# only had to learn a margin for 64.
#
# ## The map
#
# The map shows 32,000 × 32,000 scores in 64 × 64 bins. Each cell is the mean weight that the queries of one bin give to
# the keys of one bin together. It shows what one row cannot: how the other 31,999 queries look.

# %% alt="A map of 32,000 by 32,000 scores in 64 by 64 bins: a uniform field, without a line at the needle."
ax = plot.heatmap(longest, vmax=0.1)
ax.figure.set_size_inches(4.9, 4.2)
plt.show()
bins = longest["map"].isel(sample=0, head=0, query_bin=slice(0, -1))
print(f"Largest weight of a bin of keys: {bins.max().item():.3f}")
print(f"Uniform weight of a bin of keys: {1 / 64:.3f}")
others = longest.isel(sample=0, head=0, rank=0, query=slice(0, -1))
first_there = (others["top_key"] == needles[32_000]).sum().item()
print(f"Queries other than the last: {others.sizes['query']:,}")
print(f"    needle is the first key: {first_there:,}")
print(f"    largest weight on it:    {others['top_weight'].max().item():.4f}")

# %% [markdown]
# In the map, the other queries look uniform. But all of them put the needle first, too, with a weight of at most
# 0.0004. In a bin of 500 keys, that is too little to see. The top keys show it.
#
# ## Is it exact?
#
# At 512 tokens the full matrix fits into memory. The summary agrees with it:

# %%
x, _, _ = sequences(1, 512, seed=512)
scores = explain.capture(model, x, verbose=0)["attention"]
summary = summaries[512]
entropy = -(scores * np.log(scores.where(scores > 0, 1))).sum("key")
row = summary["row"].isel(row=0)
for name, ours, exact in [
    ("entropy", summary["entropy"], entropy),
    ("attention received", summary["received"], scores.mean("query")),
    ("row", row, scores.isel(query=-1)),
]:
    apart = np.abs(ours.values - exact.values).max()
    print(f"Largest difference of {name}: {apart:.4f}")

# %% [markdown]
# ## Where to be careful
#
# - Time still grows with the square of the length: twice as many tokens take about four times as long. Memory does not
#   ([measured](../benchmarks.md)).
# - A bin of the map adds up 500 keys. One key with a weight of 0.5 and 500 keys with 0.001 each look the same there.
#   The top keys tell them apart.
# - The summary keeps `top_k=16` keys for each query. If their weights add up to little, the query looks at many keys.
#
# ## What it says, and what it does not
#
# **It says** where each of 32,000 queries looks most, and how concentrated its attention is. The head that finds the
# planted needle among 64 tokens also puts it first among 32,000, but with a weight of 0.02.
#
# **It does not say** that every model does this. Here the needle carries a mark, and the model has no positions that it
# could get wrong. A model that was trained longer, or on longer sequences, may keep the weight.
#
# **Use your own data:** replace `model` and `x`, and name in `rows` the queries whose full row you want to see.
# `explain.summarize` stays as it is. `needles` is for data whose answer is known.
