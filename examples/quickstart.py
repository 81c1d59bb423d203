# %% [markdown] level="first steps" data="table"
# # Quick start
#
# **How do I get attention scores out of a Keras layer, and what do they look like for a table?**
#
# Call the layer, then read its attention scores: one number for each sample, head, query and key. For wines that it has
# not seen, the model below looks most at proline, with 2.5 times the uniform share, then at alcohol and flavanoids.
#
# To run this page in a clone of the repository: `pip install ".[tensorflow,explain,plot]"`.

# %% [markdown]
# ## Call the layer, read the scores
#
# `d_model` is the size of each head. The output has the width of the query. If you leave out key and value, the layer
# takes the query for both.

# %%
import keras
from kerasfactory.layers import InterpretableMultiHeadAttention

query = keras.random.normal((32, 10, 64))
key = keras.random.normal((32, 10, 64))
value = keras.random.normal((32, 10, 64))

attention = InterpretableMultiHeadAttention(d_model=64, n_head=8, dropout_rate=0.1)
output = attention(query, key, value)

print("Output:", output.shape)
print("Scores (batch, head, query, key):", attention.attention_scores.shape)
print(
    "Each query's scores add up to",
    keras.ops.convert_to_numpy(attention.attention_scores).sum(-1).mean().round(3),
)

# %% [markdown]
# ## A table: one token per column
#
# Attention compares tokens. `FeatureTokenizer` makes one token of each column, so that a score is about two columns.
# The table has 178 wines with 13 measurements each. The model learns from 133 of them which of three growers made a
# wine. The map is the mean over the other 45.

# %% tags=["program"]
import keras
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

keras.utils.set_random_seed(0)
wine = load_wine()
x, x_new, y, _ = train_test_split(wine.data, wine.target, random_state=0)
scaler = StandardScaler().fit(x)
x, x_new = scaler.transform(x), scaler.transform(x_new)
tokens = FeatureTokenizer(16, feature_names=wine.feature_names)
attention = InterpretableMultiHeadAttention(d_model=16, n_head=1, name="attention")
pool, decide = keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3, "softmax")
model = keras.Sequential([tokens, attention, pool, decide])
model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
model.fit(x, y, epochs=60, verbose=0)
model(x_new)
print(attention.attention_scores.shape)  # (wine, head, query, key)

# %% [markdown]
# `fit` and `predict` run compiled, and the tensors inside them cannot be read afterward. The call `model(...)` is not
# compiled, so its scores can be read. [`explain.capture`](../api/explain.md) reads the scores of any model and names
# their axes, and [`plot.heatmap`](../api/plot.md) draws their mean over the wines. The line on the color bar marks the
# uniform share, which is 1/13.

# %% tags=["cover"] alt="Heat map of attention between the 13 measurements of a wine. The column of proline is the darkest, and those of alcohol and flavanoids are darker than most."
from kerasfactory import explain, plot

scores = explain.capture(model, x_new, verbose=0)
ax = plot.heatmap(scores)


def looked_at_most(scores):
    received = scores.mean(["sample", "head", "query"])  # rows sum to 1
    first = received.sortby(-received)[:3]
    shares = (len(received) * first).values  # in units of the uniform share
    return ", ".join(
        f"{name} {share:.1f}"
        for name, share in zip(first.key.values, shares, strict=True)
    )


print(f"{len(x_new)} wines, in units of the uniform share:")
print("seed 0:", looked_at_most(*scores.values()))

# %% [markdown]
# ## Another training run
#
# A map belongs to one trained model. Here is the same model, trained from two other seeds:

# %%
for seed in (1, 2):
    keras.utils.set_random_seed(seed)
    again = keras.models.clone_model(model)
    again.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    again.fit(x, y, epochs=60, verbose=0)
    scores = explain.capture(again, x_new, verbose=0)
    print(f"seed {seed}:", looked_at_most(*scores.values()))

# %% [markdown]
# Proline comes first in all three, with 2.1 to 2.5 times the uniform share, and alcohol comes second. What comes third
# depends on the seed.
#
# ## What it says, and what it does not
#
# **It says** which columns the tokens, including a column's own, take their content from, in one trained model,
# averaged over 45 wines that it was not trained on.
#
# **It does not say** why, nor which columns the outcome depends on. The [recipe on seeds](seeds.ipynb) tests whether
# training runs agree more than by chance, and the [recipe on faithfulness](faithfulness.ipynb) tests whether the output
# depends on what is ranked first.
#
# **Use your own data:** replace `wine.data`, `wine.target` and `wine.feature_names` by your columns, your labels and
# your names, and the 3 in `Dense(3, "softmax")` by the number of your classes.
