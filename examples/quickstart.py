# %% [markdown] level="first steps"
# # Quick start
#
# **How do I get attention scores out of a Keras layer, and what do they look like for a table?**
#
# Call the layer, then read its attention scores: one number for each sample, head, query and key. In a table of 178
# wines, the model below looks most at proline, flavanoids and alcohol.
#
# To run this page in a clone of the repository: `pip install ".[tensorflow,explain,plot]"`.

# %%
import keras

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Call the layer, read the scores
#
# `d_model` is the size of each head. The output has the width of the query. If you leave out key and value, the layer
# takes the query for both.

# %%
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
# The table has 178 wines with 13 measurements each. The model learns which of three growers made a wine.

# %% tags=["program"]
import keras
from sklearn.datasets import load_wine
from sklearn.preprocessing import scale
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

wine = load_wine()
tokens = FeatureTokenizer(16, feature_names=wine.feature_names)
attention = InterpretableMultiHeadAttention(d_model=16, n_head=1)
pool, decide = keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3, "softmax")
model = keras.Sequential([tokens, attention, pool, decide])
model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
model.fit(scale(wine.data), wine.target, epochs=60, verbose=0)
model(scale(wine.data))
print(attention.attention_scores.shape)  # (wine, head, query, key)

# %% [markdown]
# `fit` and `predict` run compiled, and the tensors inside them cannot be read afterward. The call `model(...)` is not
# compiled, so its scores can be read. [`explain.capture`](../api/explain.md) reads the scores of any model and names
# their axes, and [`plot.heatmap`](../api/plot.md) draws their mean over the wines. The line on the color bar marks the
# uniform share, which is 1/13.

# %% tags=["cover"] alt="Heat map of attention between the 13 measurements of a wine. The columns of proline and flavanoids are darker than most."
from kerasfactory import explain, plot

scores = explain.capture(model, scale(wine.data), verbose=0)
ax = plot.heatmap(scores)

(scores,) = scores.values()
received = scores.mean(["sample", "head", "query"])
print("Looked at most:", ", ".join(received.sortby(-received).key.values[:3]))

# %% [markdown]
# ## What the map says, and what it does not
#
# **It says** which columns the tokens of the other columns take their content from, in this trained model, averaged
# over the wines that it was trained on.
#
# **It does not say** why, nor that another training run would give the same map. The [Sequential
# recipe](sequential.ipynb) draws such a map for wines that the model has not seen. The [medical recipe](medical.ipynb)
# measures how far such a ranking can be trusted.
#
# **Use your own data:** replace `wine.data`, `wine.target` and `wine.feature_names` by your columns, your labels and
# your names, and the 3 in `Dense(3, "softmax")` by the number of your classes.
