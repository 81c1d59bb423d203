# %% [markdown] level="intermediate" data="text"
# # What a language model from KerasHub attends to
#
# **A model from KerasHub chooses a word. Which words does it read to choose it, and is the right one among them?**
#
# A tiny Llama and a tiny BERT read the right word: in the first layer, it gets 1.0 and 0.9 of the attention. The
# predicted verb depends on it: another noun in its place changes the verb in 100% of 500 sentences.
#
# The truth is planted: "the ship behind the bell near the bird" is followed by *sails*, the verb of the first noun. So
# we know which word a model must read. The same lines read a model with real weights, and the last section shows how to
# load one. The recipe needs `pip install keras-hub`.

# %%
import warnings

import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory import explain, plot

with warnings.catch_warnings():
    # A progress bar that KerasHub brings along warns where it has no widgets.
    warnings.simplefilter("ignore")
    import keras_hub

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Sentences whose verb is known
#
# Each sentence has three nouns, and each noun has a verb of its own. Two more words, at random places, vary the
# position of the first noun.

# %%
VERBS = {
    "clock": "ticks",
    "lamp": "shines",
    "dog": "barks",
    "bird": "sings",
    "ship": "sails",
    "bell": "rings",
}
words = ["<pad>", "<s>", "<mask>", "the", *VERBS, *VERBS.values()]
words += ["near", "behind", "beside", "old", "small", "red", "today", "here", "now"]
number_of = {word: number for number, word in enumerate(words)}
nouns = [number_of[noun] for noun in VERBS]
rng = np.random.default_rng(0)


def one_of(*choice):
    return [rng.choice(choice)]


def sentence():
    adverb, *adjectives = rng.permutation([1, 1, 0, 0]).tolist()
    chosen = rng.permutation(list(VERBS))[:3]
    text = ["<s>", *adverb * one_of("today", "here", "now")]
    for place, noun in enumerate(chosen):
        text += one_of("near", "behind", "beside") if place else []
        text += ["the", *adjectives[place] * one_of("old", "small", "red"), noun]
    return [number_of[word] for word in [*text, VERBS[chosen[0]]]]


x_train, x_test = (
    np.array([sentence() for _ in range(number)]) for number in (4000, 500)
)
# (sentence, first to third noun)
noun_at = np.nonzero(np.isin(x_test, nouns))[1].reshape(-1, 3)
for sample in range(2):
    print(" ".join(words[word] for word in x_test[sample]))
print("Positions of the first noun:", np.unique(noun_at[:, 0]))

# %% [markdown]
# ## Two models
#
# Both are classes of KerasHub in a tiny size: Llama with two layers and BERT with one. Each layer has two heads. Llama
# reads from left to right and predicts the word after the last one. BERT sees the whole sentence, with a mask in place
# of the verb. A dense layer on top of each chooses the word at the last position.

# %%
size = {"vocabulary_size": len(words), "hidden_dim": 32, "intermediate_dim": 64}
llama = keras_hub.models.LlamaBackbone(
    **size,
    num_layers=2,
    num_query_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
bert = keras_hub.models.BertBackbone(
    **size, num_layers=1, num_heads=2, max_sequence_length=12, dropout=0.0
)


def choosing_at_the_end(backbone, output):
    return keras.Model(backbone.input, keras.layers.Dense(len(words))(output[:, -1]))


def for_llama(x):
    return {"token_ids": x[:, :-1], "padding_mask": np.ones_like(x[:, :-1])}


def for_bert(x):
    masked = np.concatenate(
        [x[:, :-1], np.full((len(x), 1), number_of["<mask>"])], axis=1
    )
    return {
        "token_ids": masked,
        "padding_mask": np.ones_like(x),
        "segment_ids": np.zeros_like(x),
    }


models = {
    "Llama": (choosing_at_the_end(llama, llama.output), for_llama),
    "BERT": (choosing_at_the_end(bert, bert.output["sequence_output"]), for_bert),
}
for model, inputs in models.values():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.005), loss, jit_compile=False)
    model.fit(inputs(x_train), x_train[:, -1], batch_size=64, verbose=0)


def verbs(name, x):
    model, inputs = models[name]
    return np.argmax(model(inputs(x)), axis=-1)


print("Right verb, of 500 new sentences")
for name in models:
    print(f"{name}: {np.mean(verbs(name, x_test) == x_test[:, -1]):.0%}")

# %% [markdown]
# ## One line for each
#
# Llama's attention is a layer of KerasHub, and BERT's is one of Keras. [`explain.capture`](../api/explain.md) reads
# both. Each layer is named by its path through the model. The end of a path is enough to choose a layer.

# %%
scores = {
    name: explain.capture(model, inputs(x_test), batch_size=250, verbose=0)
    for name, (model, inputs) in models.items()
}
for layers in scores.values():
    for layer, of_layer in layers.items():
        print(layer)
        print(f"  {of_layer.attrs['class']}", tuple(of_layer.sizes.values()))

chosen = explain.capture(
    models["Llama"][0],
    for_llama(x_test[:1]),
    layers="transformer_layer_1/self_attention",
    verbose=0,
)
print("Chosen by the end of its path:", *chosen, sep="\n")

# %% [markdown]
# ## How much goes to the word that decides?
#
# The words of a sentence become the names of its queries and keys. They differ from sentence to sentence, so they are
# assigned to the scores of one. A word may occur twice, as *the* does.

# %% tags=["cover"] alt="Two heat maps of one sentence, words that look against words looked at: Llama at the top, BERT below. In both, the bottom row, from which the verb is predicted, is dark at the word ship, the first noun."
text = [words[word] for word in x_test[0]]
tokens = {"Llama": text[:-1], "BERT": [*text[:-1], "<mask>"]}
fig, axes = plt.subplots(2, 1, figsize=(4.9, 7.6), layout="constrained")
for ax, (name, layers) in zip(axes, scores.items(), strict=True):
    first_layer = next(iter(layers.values())).isel(sample=0)
    plot.heatmap(
        first_layer.assign_coords(query=tokens[name], key=tokens[name]), ax=ax, vmax=1
    )
    ax.set_title(f"{name}, first layer")
plt.show()

# %% [markdown]
# Each row says what one word reads. On the color bar, a line marks the uniform weight. Llama's first word sees one word
# and its last sees eleven, so its uniform weight is a range.
#
# The last row matters most, because the verb is predicted from there. The table has its weights for the first noun, the
# word after that noun, the third noun and `<s>`, as the mean over heads and all 500 sentences. Uniform weights would be
# 0.1 for each of the 11 or 12 words.

# %%
print(f"{'model, layer':14}{'first':>6}{'after':>6}{'third':>6}{'<s>':>5}")
for name, layers in scores.items():
    for number, of_layer in zip(("first", "second"), layers.values(), strict=False):
        row = of_layer.isel(query=-1).mean("head").values  # (sentence, word)
        first, _, third = np.take_along_axis(row, noun_at, axis=1).mean(axis=0)
        after = np.take_along_axis(row, noun_at[:, :1] + 1, axis=1).mean()
        print(
            f"{f'{name}, {number}':14}{first:6.1f}{after:6.1f}{third:6.1f}"
            f"{row[:, 0].mean():5.1f}"
        )

# %% [markdown]
# In both models, the first layer reads the first noun and hardly anything else. After that layer, the last position
# knows the noun, so Llama's second layer need not look for it again. It gives the first noun 0.5.
#
# Large models that were trained for a long time give much of their attention to the first token, whatever it is. This
# is called an attention sink (Xiao et al. 2023, [*Efficient Streaming Language Models with Attention
# Sinks*](https://arxiv.org/abs/2309.17453)). The last row of these two models has none: on average, it gives `<s>` 0.0.
# In your own model, look at the first token before the others, and leave it out when you compare the other words.
#
# ## Two checks
#
# Are these the scores that the model used? [`explain.recomposition_error`](../api/explain.md) multiplies the values by
# the scores, and compares the result with the real outputs of the layers, relative to the largest entry. 0 is perfect.
# And does the verb depend on the word that gets the attention? We replace each of the three nouns by another noun, one
# at a time, and count the sentences in which the predicted verb changes.

# %%
for name, (model, inputs) in models.items():
    errors = explain.recomposition_error(
        model, inputs(x_test), batch_size=250, verbose=0
    )
    print(f"{name}: recomposition error {max(errors.values()):.5f}")

other_noun = np.array([rng.choice(np.setdiff1d(nouns, row)) for row in x_test])
print("Another noun changes the verb:")
for name in models:
    for place, at in zip(("first", "second", "third"), noun_at.T, strict=True):
        x = x_test.copy()
        x[np.arange(len(x)), at] = other_noun
        changed = np.mean(verbs(name, x) != verbs(name, x_test))
        print(f"{name}, {place} noun: {changed:.0%}")

# %% [markdown]
# ## A model with real weights
#
# Weights and vocabulary are downloaded, and our tests use no network. So these lines are not executed here. The
# preprocessor adds the special tokens and knows the words:
#
# ```python
# preprocess = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
#     "bert_base_en_uncased", sequence_length=12
# )
# bert = keras_hub.models.BertBackbone.from_preset("bert_base_en_uncased")
#
# x = preprocess(["the keys near the old cabinet are lost"])
# tokens = [preprocess.tokenizer.id_to_token(int(word)) for word in x["token_ids"][0]]
# scores = explain.capture(bert, x, layers="transformer_layer_0/self_attention_layer")
# ```
#
# The result has the 12 heads of that layer. Without `layers=`, it has all 12 layers.
#
# ## What it says, and what it does not
#
# **It says** which words each layer of these models reads, and that the scores are those that the models used. The
# second check says that the verb depends on the word that gets the attention.
#
# **It does not say** that a word with a low weight does not count, or that a word with a high weight does. In Llama's
# second layer, half of the weight goes to other words, but only the first of the three nouns changes the verb. Nor does
# it say what models with real weights attend to. No truth is planted in those, so test what you see, as above.
#
# **Use your own data:** load a preset as in the last cell, and replace the sentence in `preprocess([...])` by your own.
# The line with `explain.capture` stays as it is.
