# %% [markdown]
# # Attention in a Sequential model
#
# **Which measurements of a wine does a classifier look at, and can a plain `Sequential` model show it?**
#
# The data are scikit-learn's wine set: 178 Italian wines, 13 chemical measurements each, three growers.
# You need to know `keras.Sequential` and nothing about attention.

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

keras.utils.set_random_seed(0)

wine = load_wine()
names = [name.split("/")[0].replace("_", " ") for name in wine.feature_names]
x_train, x_test, y_train, y_test = train_test_split(
    wine.data, wine.target, test_size=0.3, random_state=0, stratify=wine.target
)
scaler = StandardScaler().fit(x_train)
x_train, x_test = scaler.transform(x_train), scaler.transform(x_test)
print(f"{len(x_train)} wines to train on, {len(x_test)} to test on, {len(names)} measurements")

# %% [markdown]
# ## The first attempt: one token
#
# Attention needs a sequence of tokens. A common way to get one from a table is to reshape the whole row into a
# sequence of length one. The model builds and trains. Its scores are another matter.

# %%
one_token = keras.Sequential(
    [
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Reshape((1, 64)),
        InterpretableMultiHeadAttention(d_model=64, n_head=4),
        keras.layers.Flatten(),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dense(1, activation="sigmoid"),
    ]
)
one_token.compile(optimizer="adam", loss="binary_crossentropy")
one_token.fit(x_train, y_train == 0, epochs=5, verbose=0)

one_token(x_test)
scores = np.asarray(one_token.layers[2].attention_scores)
print("scores (wine, head, query, key):", scores.shape)
print("smallest and largest score:", scores.min(), scores.max())
