# %% [markdown] level="advanced"
# # Long sequences: what 32,000 tokens look at
#
# **The matrix of scores would take gigabytes. What can you still know about it, and does a model that works at 256 tokens still
# look at the right one among 32,000?**
#
# Planted truth: in each sequence one token is marked, and the answer is the number it carries. So we know where
# attention should be. You need to know the [recipe for an existing model](existing_model.ipynb).

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory import explain

keras.utils.set_random_seed(0)

# %% [markdown]
# ## A needle in a haystack
#
# Each token is a number and a mark. One token in the sequence is marked; the last token asks for its number. The model is
# trained on sequences of 256 tokens.


# %%
def sequences(samples, length, seed):
    rng = np.random.default_rng(seed)
    numbers, marked = rng.normal(size=(samples, length)), rng.integers(0, length - 1, samples)
    marks = np.zeros((samples, length))
    marks[np.arange(samples), marked] = 1
    asks = np.broadcast_to(np.arange(length) == length - 1, (samples, length))
    x = np.stack([numbers, marks, asks], axis=-1).astype("float32")
    return x, numbers[np.arange(samples), marked], marked


inputs = keras.Input((None, 3))
tokens = keras.layers.Dense(16)(inputs)
found = keras.layers.MultiHeadAttention(num_heads=2, key_dim=16, name="attention")(tokens, tokens)
model = keras.Model(inputs, keras.layers.Dense(1)(found[:, -1]))
model.compile(keras.optimizers.Adam(0.01), "mse")

x, y, _ = sequences(1000, 256, seed=1)
history = model.fit(x, y, batch_size=25, epochs=3, verbose=0)

# %% [markdown]
# ## The matrix, without the matrix
#
# [`explain.summarize`](../api/explain.md) runs over the scores block by block and keeps what one would read off them: the top keys of each
# query, entropy, mean distance, the attention that each key receives, a small map, and the rows you ask for.
# Memory grows with the length, not with its square.

# %%
lengths = [256, 2048, 8192, 32_000]
summaries, errors, needles = {}, {}, {}
for length in lengths:
    x, y, marked = sequences(1, length, seed=length)
    summaries[length] = explain.summarize(model, x, map_size=64, rows=[length - 1], verbose=0)["attention"]
    needles[length] = int(marked[0])

longest = summaries[32_000]
print(f"The full matrix: {2 * 32_000**2 * 4 / 1e9:.1f} GB. The summary: {longest.nbytes / 1e6:.0f} MB")
print({name: longest[name].sizes for name in ("top_weight", "received", "map")})

# %% [markdown]
# ## Does it find the needle?
#
# Softmax shares out 1 among all keys. With 125 times as many tokens, a head that only *prefers* the needle loses it in the
# crowd; one that separates it clearly does not. The question goes to the row of the last token, which is exact:

# %%
for length in lengths:
    summary = summaries[length].isel(sample=0)
    weight = summary["row"].isel(row=0, key=needles[length])
    first = summary["top_key"].isel(query=-1, rank=0)
    entropy = summary["entropy"].isel(query=-1)
    print(f"{length} tokens")
    for head in range(2):
        print(
            f"    head {head}: weight of the needle {weight[head].item():.2f}, largest of all: "
            f"{first[head].item() == needles[length]}, entropy {entropy[head].item() / np.log(length):.2f} of its maximum"
        )

# %% [markdown]
# One head has specialised and finds the needle at every length. The other spreads its weight almost evenly. Yet the
# needle is the first of its keys as well: it prefers it, and the crowd drowns it. Top keys alone would have told a wrong
# story about that head; read them together with weight and entropy.
#
# ## The map
#
# 32,000 × 32,000 scores in 64 × 64 bins. Each cell is the weight that the queries of a bin give to the keys of a bin.

# %% tags=["cover"] alt="Left, a map of 32,000 by 32,000 scores in 64 by 64 bins for each of two heads: head 0 is an even gray, head 1 has a single dark vertical line where the needle is. Right, the weight of the needle by length: head 1 stays at 1, head 0 falls to 0."
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
for head, ax in enumerate(axes[:2]):
    image = ax.imshow(longest["map"].isel(sample=0, head=head), cmap="Blues", vmin=0, vmax=1, extent=(0, 32, 32, 0))
    ax.plot(needles[32_000] / 1000, -1, marker="v", color="#d55e00", clip_on=False)
    ax.set_title(f"head {head}", pad=12)
    ax.set_xlabel("key (thousands; triangle: needle)")
axes[0].set_ylabel("query (thousands)")
fig.colorbar(image, ax=axes[:2], label="weight", shrink=0.7)
for head, marker in enumerate("os"):
    weights = [summaries[n]["row"].isel(sample=0, row=0, head=head, key=needles[n]).item() for n in lengths]
    axes[2].semilogx(lengths, weights, marker=marker, label=f"head {head}")
axes[2].set_title("weight of the needle")
axes[2].set_xlabel("tokens")
axes[2].legend()
plt.show()

# %% [markdown]
# ## Is it exact?
#
# At 2,048 tokens the full matrix still fits. The summary says what the matrix says:

# %%
x, _, _ = sequences(1, 2048, seed=2048)
scores = explain.capture(model, x, verbose=0)["attention"]
summary = summaries[2048]
entropy = -(scores * np.log(scores.where(scores > 0, 1))).sum("key")
print("Entropy agrees:", np.allclose(summary["entropy"], entropy, atol=1e-4))
print("Attention received agrees:", np.allclose(summary["received"], scores.mean("query"), atol=1e-6))
print("The row agrees:", np.allclose(summary["row"].isel(row=0), scores.isel(query=-1), atol=1e-6))

# %% [markdown]
# ## Where to be careful
#
# - Time still grows with the square of the length: twice the tokens, four times the time. Memory does not
#   ([measured](../benchmarks.md)).
# - A bin of the map adds up 500 keys. A needle of weight 0.5 and 500 keys that have 0.001 each look the same
#   there; the top keys tell them apart.
# - `top_k=16` keys are kept for each query. When their weights add up to little, the query looks everywhere.
#
# **It says** where each of 32,000 queries looks most, how concentrated it is, and that the head which finds the planted needle
# among 256 tokens finds it among 32,000.
#
# **It does not say** that other models extrapolate like this one: the needle carries a mark, and the model has no positions to get
# wrong.
