# %% [markdown] level="intermediate" data="text"
# # An encoder–decoder: which input word makes this output word?
#
# **A model translates. For each word that it writes, which input word does it read, and does the output depend on that
# word?**
#
# The model reads the word that it translates: the share of cases in which the largest weight is on the right English
# word is 1.0 to one decimal, and uniform weights would give 0.2. Digits and tens depend on that word. *und* and the end
# do not, although the map shows dark cells for them as well.
#
# The truth is planted: English numbers become German ones, which say the last digit before the tens. "two hundred forty
# seven" is "zwei hundert sieben und vierzig". So we know which word each German word translates, and translating word
# by word from left to right does not work.

# %%
import keras
import numpy as np
from keras import layers

from kerasfactory import explain, plot

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Numbers in two languages
#
# We use all numbers below 10,000 whose last two digits are 20 or more. For each German word we note the position of the
# English word that it translates. Two German words translate none: *und* (and), and the end of the number.

# %%
ONES = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EINER = ["", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
TENS = ["", "", "twenty", "thirty", "forty", "fifty"]
TENS += ["sixty", "seventy", "eighty", "ninety"]
ZEHNER = ["", "", "zwanzig", "dreißig", "vierzig", "fünfzig"]
ZEHNER += ["sechzig", "siebzig", "achtzig", "neunzig"]
ENGLISH = ["", *ONES[1:], *TENS[2:], "hundred", "thousand"]  # "" is padding
GERMAN = ["", *EINER[1:], *ZEHNER[2:], "hundert", "tausend", "und", "<start>", "<end>"]


def in_both(number):
    """English words, German words, and where each of these comes from, or -1."""
    thousands, hundreds, tens, ones = (
        number // place % 10 for place in (1000, 100, 10, 1)
    )
    english, german, source = [], [], []
    for digit, unit, of_german in [
        (thousands, "thousand", "tausend"),
        (hundreds, "hundred", "hundert"),
    ]:
        if digit:
            source += [len(english), len(english) + 1]
            english += [ONES[digit], unit]
            german += [EINER[digit], of_german]
    place_of_tens = len(english)
    english += [TENS[tens]]
    if ones:
        source += [len(english), -1]
        english += [ONES[ones]]
        german += [EINER[ones], "und"]
    return english, [*german, ZEHNER[tens], "<end>"], [*source, place_of_tens, -1]


def padded(rows, length, fill):
    return np.array([[*row, *[fill] * (length - len(row))] for row in rows])


numbers = np.random.default_rng(0).permutation(
    [number for number in range(10_000) if number % 100 >= 20]
)
english, german, source = zip(*map(in_both, numbers), strict=True)
source = padded(source, 8, -1)
read = padded([[ENGLISH.index(word) for word in row] for row in english], 6, 0)
written = padded([[GERMAN.index(word) for word in row] for row in german], 8, 0)
before = np.concatenate(
    [np.full((len(numbers), 1), GERMAN.index("<start>")), written[:, :-1]], axis=1
)
train, test = slice(4000), slice(4000, 4500)
print(f"{len(numbers)} numbers: 4000 for training, 500 for the test")

# %% [markdown]
# ## An encoder and a decoder
#
# The model has plain Keras layers. The decoder gets the words that have been written so far, and reads the encoder's
# output by cross-attention. We pass the padding mask to each layer ourselves, because Keras' own mask gets lost at the
# first residual connection.

# %%
WIDTH, HEADS = 32, 2


class Words(layers.Layer):
    """A vector for each word, plus one for its position."""

    def __init__(self, words, length, **kwargs):
        super().__init__(**kwargs)
        self.words, self.positions = (
            layers.Embedding(words, WIDTH),
            layers.Embedding(length, WIDTH),
        )

    def call(self, x):
        return self.words(x) + self.positions(keras.ops.arange(x.shape[1]))


def attention(name):
    return layers.MultiHeadAttention(HEADS, key_dim=WIDTH // HEADS, name=name)


of_english, of_german = (
    keras.Input((6,), dtype="int32"),
    keras.Input((8,), dtype="int32"),
)
is_word = keras.ops.not_equal(of_english, 0)
x = Words(len(ENGLISH), 6)(of_english)
encoded = layers.LayerNormalization()(
    x + attention("encoder")(x, x, value_mask=is_word)
)
y = Words(len(GERMAN), 8)(of_german)
y = layers.LayerNormalization()(y + attention("decoder")(y, y, use_causal_mask=True))
y = layers.LayerNormalization()(y + attention("cross")(y, encoded, value_mask=is_word))
y = layers.LayerNormalization()(
    y + layers.Dense(WIDTH)(layers.Dense(2 * WIDTH, activation="relu")(y))
)
model = keras.Model([of_english, of_german], layers.Dense(len(GERMAN))(y))

loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
model.compile(keras.optimizers.Adam(0.005), loss, jit_compile=False)
model.fit(
    [read[train], before[train]], written[train], batch_size=64, epochs=4, verbose=0
)


source, read, before, written = source[test], read[test], before[test], written[test]


def next_words(read, before):
    return np.argmax(model([read, before]), axis=-1)


# The model writes by itself: each word that it chooses goes in again before the next.
own = np.zeros_like(before)
own[:, 0] = GERMAN.index("<start>")
for step in range(8):
    chosen = next_words(read, own)
    own[:, step + 1 : step + 2] = chosen[:, step : step + 1]
right = ((chosen == written) | (written == 0)).all(axis=1)
print(f"Translated without an error: {right.mean():.0%} of the test")

# %% [markdown]
# ## The scores, with two sets of names
#
# [`explain.capture`](../api/explain.md) gives the `feature_names` to every axis that has as many entries. Here queries
# and keys have different names, which change from number to number, so we assign them to the scores of one number. A
# query is named after the word that the model *writes* there, not after the word before, which is its input.

# %%
scores = explain.capture(
    model, [read, before], layers="cross", batch_size=250, verbose=0
)["cross"]
print(dict(scores.sizes), "| masks:", scores.attrs["masks"])

# %% tags=["cover"] alt="Two heat maps, one for each head, from the German words written to the English words read. Both have dark cells where the words mean the same: drei reads three, the last word, and achtzig reads eighty, the word before. Und and the end read hundred or thousand."
# A number of six English words.
one = int(np.flatnonzero((source >= 0).sum(axis=1) == 6)[0])
german_words, english_words = ([*words[4000 + one]] for words in (german, english))
of_one = scores.isel(sample=one, query=slice(len(german_words)))
figure = plot.heads(of_one.assign_coords(query=german_words, key=english_words), vmax=1)
figure.set_size_inches(4.9, 3.4)

# %% [markdown]
# In the last three words the order is reversed: the map shows that the model looks ahead to the last digit, and then
# back to the tens.
#
# ## How often is the largest weight on the right word?
#
# The first column is the share of the German words that translate an English one and have their largest weight on it.
# The second is the mean weight of the right word.

# %%
translates = source >= 0
in_view = (read > 0).sum(axis=1, keepdims=True)
print(f"{'scores':16}{'largest':>8}{'weight':>8}")
of_heads = {
    "head 0": scores.sel(head=0),
    "head 1": scores.sel(head=1),
    "mean of heads": scores.mean("head"),
}
for name, weights in of_heads.items():
    is_right = weights.values.argmax(axis=-1) == source
    of_right = np.take_along_axis(
        weights.values, np.maximum(source, 0)[..., None], axis=-1
    )[..., 0]
    print(
        f"{name:16}{is_right[translates].mean():8.1f}{of_right[translates].mean():8.1f}"
    )
by_chance = (1 / in_view).repeat(8, axis=1)[translates].mean()
print(f"{'uniform':16}{by_chance:8.1f}{by_chance:8.1f}")

# %% [markdown]
# ## Does the output depend on the word that is read?
#
# For each German word, we take the English word that has the largest weight and put another of its kind in its place:
# another digit for a digit, *thousand* for *hundred*. How often does the model then write a different German word
# there? For comparison, we also replace another word of the number, chosen at random.

# %%
# The number of another word, for each word.
OTHER = np.array([0, *range(2, 10), 1, *range(11, 18), 10, 19, 18])
rows, now = np.arange(len(read)), next_words(read, before)
most_read = scores.mean("head").values.argmax(axis=-1)
at_random = (
    most_read + np.random.default_rng(1).integers(1, in_view.clip(2), most_read.shape)
) % in_view


def changes(position):
    """Whether each German word changes when the English word at its position does."""
    changed = np.zeros(now.shape, bool)
    for step in range(8):
        x = read.copy()
        x[rows, position[:, step]] = OTHER[x[rows, position[:, step]]]
        changed[:, step] = (next_words(x, before) != now)[:, step]
    return changed


if_read, if_other = changes(most_read), changes(at_random)
print(f"{'replaced:':10}{'most read word':>15}{'another':>9}")
kinds = {"digits": EINER[1:], "tens": ZEHNER[2:]} | {
    word: [word] for word in ("tausend", "hundert", "und", "<end>")
}
for kind, members in kinds.items():
    chosen = np.isin(written, [GERMAN.index(word) for word in members]) & (in_view > 1)
    print(f"{kind:10}{if_read[chosen].mean():15.1f}{if_other[chosen].mean():9.1f}")

# %% [markdown]
# Digits, tens and *tausend* depend on the word that is read, and not on another one: here the map is right. *und* and
# the end depend on neither, because the words written so far determine the end, and in most numbers *und* as well.
# Their weights must still sum to 1, and in the picture they go to *hundred* and *thousand*. *hundert* is in between: it
# changes in 0.4 of the cases only, so the model can often do without the word that it reads.
#
# ## What it says, and what it does not
#
# **It says** which input word each head reads for each output word, and for which kinds of words the output depends
# on the word that is read.
#
# **It does not say** that a dark cell is a translation: the end has a dark cell too, at *thousand* in head 0. Nor is a
# key an input word. The encoder has mixed the words, so a weight belongs to a position. For digits and tens, the
# replacement showed that a position still stands for its word.
#
# **Use your own data:** replace `read`, `before` and `written` by the word ids of your pairs, `"cross"` by the name of
# your cross-attention layer, and `german_words` and `english_words` by the words of the sample that you draw. `source`
# is for data whose answer is known.
