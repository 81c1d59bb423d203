# %% [markdown] level="intermediate" data="picture"
# # Where does a vision transformer look?
#
# **You lay the attention of a vision transformer over its pictures. Are the patches that stand out the ones that
# decide?**
#
# The patches that rollout ranks first matter: if they get the pixels of another picture, the logit of the digit falls
# by 3.1; if random patches do, it falls by 1.7. The value norm, with 2.4, is not shown to be better than chance.
#
# But the mean rollout, one map for all pictures, does as well as the rollout of each picture: the logit falls by 3.2.
# So this overlay says where digits differ, and not what is special about one picture.
#
# The data are scikit-learn's digits, 1,797 real pictures of 8 × 8 pixels.

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from keras import layers, ops
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from kerasfactory import explain, plot

keras.utils.set_random_seed(1)
keras.config.set_dtype_policy("float64")  # rounding would train another model elsewhere
digits = load_digits()
pictures = digits.images[..., None] / 16
x_train, x_test, y_train, y_test = train_test_split(
    pictures, digits.target, test_size=450, random_state=0, stratify=digits.target
)

# %% [markdown]
# ## The model
#
# Patches of 2 × 2 pixels become 16 tokens. A class token comes first, and the model reads its answer from that token
# (Dosovitskiy et al. 2021, [*An Image Is Worth 16x16 Words*](https://arxiv.org/abs/2010.11929)). All layers are plain
# Keras.


# %%
class ClassTokenAndPositions(layers.Layer):
    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="normal")
        size = (1, shape[1] + 1, shape[-1])
        self.positions = self.add_weight(shape=size, initializer="normal")

    def call(self, patches):
        token = ops.repeat(self.token, ops.shape(patches)[0], axis=0)
        return ops.concatenate([token, patches], axis=1) + self.positions

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] + 1, shape[2])


inputs = keras.Input((8, 8, 1))
tokens = layers.Reshape((16, 16))(layers.Conv2D(16, 2, strides=2)(inputs))
tokens = ClassTokenAndPositions()(tokens)
for block in ("first", "second"):
    normal = layers.LayerNormalization()(tokens)
    tokens = tokens + layers.MultiHeadAttention(2, 8, name=block)(normal, normal)
    hidden = layers.Dense(32, "relu")(layers.LayerNormalization()(tokens))
    tokens = tokens + layers.Dense(16)(hidden)
outputs = layers.Dense(10)(layers.LayerNormalization()(tokens)[:, 0])  # the class token
model = keras.Model(inputs, outputs, name="digits")
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(0.002), loss, jit_compile=False)
model.fit(x_train, y_train, batch_size=64, epochs=20, verbose=0)

predicted = model.predict(x_test, verbose=0).argmax(axis=1)
print(f"accuracy on {len(y_test)} test pictures: {np.mean(predicted == y_test):.2f}")

# %% [markdown]
# ## Lay two readings over the pictures
#
# `explain.patches` numbers the patches as the model does. The class token is named twice: as `query`, because the
# answer is read from it, and in `special_tokens`, because it is not part of the picture. *Rollout* multiplies the
# attention of both layers. *Value norm* is the length of what a patch adds to the class token, as the mean of the two
# layers. Their units differ, so the pictures show the share of each patch.

# %% tags=["cover"] alt="Three digits, 0, 3 and 6, dark on white, as pictures of 8 by 8 pixels, each twice, with patches of 2 by 2 shaded blue: left by rollout, right by value norm. Rollout shades many patches faintly, on the digit and beside it. Value norm puts most on one or two patches, as at the left edge, where there is hardly any ink."
mask = explain.patches(8, 8, 2)  # (height, width)
of_class = {
    "query": "[CLS]",
    "feature_names": ["[CLS]", *(f"row {n // 4}, col {n % 4}" for n in range(16))],
    "special_tokens": ["[CLS]"],
    "verbose": 0,
}
readings = {}
for name in ("rollout", "value_norm"):
    attribution = explain.attribute(model, x_test, method=name, **of_class)
    readings[name] = attribution[:, 1:]  # without the class token
drawn = np.repeat([np.flatnonzero(y_test == digit)[0] for digit in (0, 3, 6)], 2)
shares = []
for n, name in zip(drawn, [*readings] * 3, strict=True):
    share = readings[name][[n]] / readings[name][n].sum()
    title = f"{y_test[n]}: {name.replace('_', ' ')}"
    shares.append(share.assign_coords(sample=[title]))
shares = xr.concat(shares, "sample").rename("share of each patch")
plot.image(shares, -x_test[drawn], feature_mask=mask, columns=2)  # ink is dark
plt.show()

# %% [markdown]
# ## Do these patches decide?
#
# If a patch matters, the logit of the predicted digit falls when its pixels are replaced.
# [`explain.compare`](../api/explain.md) replaces the patches that each reading ranks first with those of another
# picture (`removal="marginal"`) or with their mean (`"mean"`). The numbers are means over three shares: 0.1, 0.2 and
# 0.5 of the patches are replaced. For comparison it does the same with the patches of each map relabeled at random:
# this is how far the logit falls by chance. We add three readings:
#
# - *one for all*: the mean rollout over all pictures, the same map for each of them;
# - *brightness*: how much ink is in a patch. It uses the picture, and not the model;
# - *one by one*: how far the logit falls if this patch alone is replaced by its mean over the training pictures. It
#   needs 17 predictions for a picture.


# %%
def brightness(model, x):
    means = [x[:, mask == patch].mean(axis=(1, 2)) for patch in range(16)]
    return np.stack(means, axis=1)


def one_by_one(model, x):
    mean = x_train.mean(axis=0)
    changed = [np.where((mask == patch)[..., None], mean, x) for patch in range(16)]
    logits = np.stack([model.predict_on_batch(each) for each in [x, *changed]])
    of_predicted = logits[:, np.arange(len(x)), logits[0].argmax(axis=1)]
    return (of_predicted[0] - of_predicted[1:]).T


tested = x_test[:100]
methods = {
    "rollout": "rollout",
    "value norm": "value_norm",
    "one for all": np.tile(readings["rollout"].mean("sample"), (len(tested), 1)),
    "brightness": brightness,
    "one by one": one_by_one,
}
how = {"feature_mask": mask, "background": x_train, "batch_size": 1000} | of_class
for removal, draws in [("mean", 10), ("marginal", 120)]:
    how |= {"removal": removal, "draws": draws}
    result = explain.compare(model, tested, methods=methods, **how)
    print(f"{removal + ': the logit falls by':32}by chance")
    for name in methods:
        of_method = result.sel(reading=name)
        fall, chance = of_method["observed"].item(), of_method["null"].mean().item()
        print(f"    {name:12}{fall:13.1f}{chance:12.1f}")

# %% alt="Three panels. Ranks: rollout and its mean over all pictures put the same four of 16 patches first, value norm three of them, brightness one. Overlap of the first four: 1.00 between rollout and one for all, 0.75 with value norm, 0.25 with brightness; by chance 0.26. Comprehensiveness: the dots of rollout, one for all and one by one, p = 0.04, lie to the right of the gray bands of maps that know nothing, one by one farthest; those of value norm and brightness, p above 0.1, lie inside."
plot.compare(result, top_k=8)
plt.show()
for name, p in zip(methods, result["p_adjusted"].values, strict=True):
    print(f"{name:11} p = {p:.2f}")
falls = result["comprehensiveness"].mean("fraction")
print("one reading minus another, ± 2 standard errors")
for one, other in [
    ("rollout", "one for all"),
    ("one by one", "rollout"),
    ("one by one", "one for all"),
]:
    more = falls.sel(reading=one) - falls.sel(reading=other)
    margin = 2 * more.std(ddof=1).item() / len(tested) ** 0.5
    print(f"{f'{one} − {other}':24}{more.mean().item():5.1f} ± {margin:.1f}")

# %% [markdown]
# Rollout beats chance, and so does its mean over all pictures. The difference between the two is 0.0 ± 0.3: what
# rollout says about a single picture does not help in this test. *One by one* is better by 1.1 ± 0.3 than either of
# them, because it measures what the model does. These differences are paired over all 100 pictures, with three
# replacements for each. The test in the table uses one replacement, so its numbers differ a little.
#
# With `"mean"`, *one by one* replaces patches as the test does, which favors it. With the pixels of another picture it
# does not. In both tests, the same three readings make the logit fall farthest. With the pixels of another picture,
# brightness and value norm are not shown to be better than chance.
#
# ## What it says, and what it does not
#
# **It says** which overlay points at patches that this model uses: rollout, with p = 0.04 after adjustment for five
# tests. A map made by replacing one patch at a time is better, but it costs 17 predictions for a picture.
#
# **It does not say** that the value norm always fails, or that rollout never tells pictures apart. This is one training
# run, tested on 100 pictures, and another seed can give another answer. Train [more than once](seeds.ipynb). A verdict
# also assumes that the output of the model for an altered picture, which no hand has written, means something.
#
# **Use your own data:** replace `pictures` and `digits.target`, the size in `explain.patches(8, 8, 2)`, and `model`. If
# your model has no class token, leave out `query` and `special_tokens`, and name the patches only.
