# %% [markdown] level="intermediate" data="any"
# # Watch heads form during training
#
# **When does a head begin to do what it does in the end, and does the loss show it?**
#
# The two sharpest heads begin in epochs 3 and 5 and go on forming until the last, epoch 20. The loss does not show it:
# less than 2% of the variance is left from epoch 7 on. In the end, one head gives 0.9 of its weight to the first
# number, and the other gives 0.8 to the number before.
#
# The truth is planted: in each sequence of 12 numbers, every position has to answer with two of them, the one before it
# and the first one. So we know what heads have to find. You need to know `model.fit` and [what a head
# is](../learn/how-it-works.md).

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory import explain, plot

keras.utils.set_random_seed(0)

# %% [markdown]
# ## The task and the model
#
# A token is a number and its one-hot position. The attention layer has four heads, two more than the task needs.


# %%
def sequences(samples, seed):
    numbers = np.random.default_rng(seed).normal(size=(samples, 12)).astype("float32")
    positions = np.broadcast_to(np.eye(12, dtype="float32"), (samples, 12, 12))
    before, first = (
        np.roll(numbers, 1, axis=1),
        np.broadcast_to(numbers[:, :1], (samples, 12)),
    )
    return np.concatenate([numbers[..., None], positions], axis=-1), np.stack(
        [before, first], axis=-1
    )


x_train, y_train = sequences(1000, seed=1)
x_test, y_test = sequences(200, seed=2)

inputs = keras.Input((12, 13))
tokens = keras.layers.Dense(32)(inputs)
attended = keras.layers.MultiHeadAttention(num_heads=4, key_dim=16, name="attention")(
    tokens, tokens
)
model = keras.Model(inputs, keras.layers.Dense(2)(attended))
model.compile(keras.optimizers.Adam(0.003), "mse")

# %% [markdown]
# ## One callback
#
# [`explain.AttentionMonitor`](../api/explain.md) runs a few fixed samples through the model after each epoch, and keeps
# a few statistics of each head, not the scores. Epoch 0 is the untrained model. With `log_dir="logs"`, the same numbers
# go to TensorBoard.

# %%
monitor = explain.AttentionMonitor(x_test[:32])
fit = model.fit(
    x_train,
    y_train,
    batch_size=50,
    epochs=20,
    validation_data=(x_test, y_test),
    callbacks=[monitor],
    verbose=0,
)
history = monitor.history["attention"]
print(dict(history.sizes))

# %% [markdown]
# ## Four heads over 20 epochs
#
# - **Entropy**: 1 is uniform over all keys, and 0 is all on one key.
# - **Confidence**: the mean over queries of the largest weight.
# - **Distance**: how far a query looks, in positions. It is 1 for a query that looks at the number before, except at
#   the first position, for which the number before is the last, 11 away. It is 0 to 11 for queries that look at the
#   first number.

# %% tags=["cover"] alt="Three charts over 20 epochs with a line for each of four heads: entropy, confidence, distance. All start uniform. Head 3 leaves first: its entropy falls to 0.15 and its distance rises to 5.4. Head 2 follows, to a distance of about 2. Head 1 stops halfway. Head 0 leaves with head 3, but ends where it began."
figure = plot.training(monitor.history)
plt.show()

# %% [markdown]
# ## What each head became
#
# The statistics say that a head settled, but not on what. The planted truth shows this. For each head, we compute the
# share of its weight on the number before, and on the first number. A head *begins* in the first epoch with an entropy
# below 0.9.

# %%
scores = explain.capture(model, x_test[:32], verbose=0)["attention"].values
position = np.arange(12)
shares = {
    "before": scores[:, :, position, position - 1].mean(axis=(0, 2)),
    "first": scores[:, :, :, 0].mean(axis=(0, 2)),
}
print("head  entropy    begins  largest share")
for head in range(4):
    entropy = history["entropy"].sel(head=head).values  # one for each epoch
    begins = np.argmax(entropy < 0.9) or "never"
    most = max(shares, key=lambda name: shares[name][head])
    print(
        f"{head:<5} {entropy[0]:.1f} → {entropy[-1]:.1f}  {begins:<6}  "
        f"{shares[most][head]:.1f} {most}"
    )

# %% [markdown]
# Head 0 begins as early as head 3, but returns to nearly uniform attention.
#
# ## The loss settles before the heads do
#
# The model has solved the task before attention stops changing: the loss is nearly flat from epoch 7 on, and 29% of the
# fall of the entropy of heads 2 and 3 comes after that. The lower chart shows, for each head, the Jensen–Shannon
# distance to the head most like it: 0 if they are the same, and 1 if they share no key. At the beginning, all four
# heads are nearly the same. At the end, heads 0 and 1 are closest to each other, and share one line.

# %% alt="Two charts over 20 epochs. Top, the loss on new samples falls to nearly 0 by epoch 8 and stays there. Bottom, the distance of each head to the one most like it: that of head 3 goes on rising until the end, those of the others are flat or fall a little after epoch 8, and heads 0 and 1 share one line."
loss = np.array(fit.history["val_loss"]) / y_test.var()
others = (
    history["redundancy"]
    .where(history["head"] != history["head_other"])
    .min("head_other")
)
fig, (top, bottom) = plt.subplots(
    2, 1, figsize=(4.9, 5), layout="constrained", sharex=True
)
top.plot(range(1, 21), loss, color="black")
top.set_title("loss on new samples, share of the variance")
for head, drawn in enumerate(figure.axes[0].lines):  # each head as above
    style = {
        "color": drawn.get_color(),
        "marker": drawn.get_marker(),
        "markevery": 2,
        "markersize": 4,
    }
    bottom.plot(history["epoch"], others.sel(head=head), label=f"head {head}", **style)
bottom.set_title("distance to the most similar head")
bottom.set_xlabel("epoch")
bottom.set_xticks(range(0, 21, 4))
bottom.legend(ncols=2)
for ax in (top, bottom):
    ax.set_ylim(bottom=0)
plt.show()

solved = int(np.argmax(loss < 0.02)) + 1
settled = history["entropy"].sel(head=[2, 3]).mean("head")
late = (settled.sel(epoch=solved) - settled.sel(epoch=20)) / (
    settled.sel(epoch=0) - settled.sel(epoch=20)
)
falls = (settled.sel(epoch=slice(solved, 20)).diff("epoch") < 0).sum().item()
print(f"Loss below 2% of the variance: epoch {solved}")
print("Mean entropy of heads 2 and 3 after that")
print(f"epochs in which it falls   {falls} of {20 - solved}")
print(f"share of its whole fall    {late.item():.0%}")

# %% [markdown]
# ## What it says, and what it does not
#
# **It says** when a head leaves its uniform start, that two heads found the two numbers that the task asks for, and
# that attention changes while the loss hardly does. If you stop as soon as the loss is flat, attention is still
# changing. So a heat map depends on when you stopped.
#
# **It does not say** what a head looks at: a mean distance of 4 may be one pattern, or the average of two. Nor does it
# say that a head that formed is needed, or that a head that stayed uniform is not. That takes an experiment, which is
# the subject of [Which heads can go?](prune.ipynb). With another seed, other heads may take these roles.
#
# **Use your own data:** replace `model`, `x_train` and `y_train`, and give `AttentionMonitor` some of your samples. The
# history has your layers by name: replace `"attention"` in `monitor.history["attention"]`. `shares` is for data whose
# answer is known.
