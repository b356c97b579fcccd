"""What the heads of an exported classifier compute, in words, as transformers has no such class."""

from __future__ import annotations

from collections.abc import Sequence

from dpnlu.nlu.classifier import Architecture
from dpnlu.nlu.encoder_states import intent_scale
from dpnlu.nlu.models import TEXT_SCALE

_HEADS = """## This export

`AutoModel` and `AutoTokenizer` of transformers load the trained encoder from this folder. They have
no class for the heads, whose weights are in `heads.safetensors` and whose labels, in the order of
their outputs, in `heads.json`. "Standardised" is: over its width to mean 0 and variance 1 (ε = 1e-5
added).

- The intent head is one linear layer. It reads the means of the states of all sub-words, special
  ones included, in {text}, each mean
  standardised, one behind the other.
{words}{slots}
`AutoModelForSequenceClassification` and `AutoModelForTokenClassification` would put new, untrained
heads of another form on the encoder.
"""
_TWO_LAYERS = "the last layer and in `hidden_states[len(hidden_states) // 2]`"
_LAYERS = "`hidden_states[round(share * (len(hidden_states) - 1))]` for each share of {shares}"
_WORD_MEANS = """\
- Behind them it reads the means over the words, each standardised: of each word the mean of the
  states of its sub-words, standardised, in
  {layers}.
  All that it reads is times {scale:.6g}.
"""
_FIRST_SUB_WORD = """\
- The slot head is one linear layer. It reads, for each word, the last layer's state of the word's
  first sub-word, standardised likewise.
"""
_SEVERAL_LAYERS = """\
- The slot head is one linear layer. It reads, for each word, the means of the states of the word's
  sub-words in {layers},
  each mean standardised, one behind the other.
"""
_NEIGHBOURS = """\
- Its outputs are {pieces} pieces of as many numbers as there are tags: what a word says of the tag
  of the word {neighbours} behind it, and so on, to that of the word {neighbours} before it. The
  logits of a word are the sum of what it and its neighbours say of it.
"""
_TEXT = """\
- To the logits of every word the text head is added, a linear layer that reads the means over the
  sub-words that the intent head reads, times {scale:g}.
"""
_CHAIN = """\
- The tags of a text are the sequence with the greatest sum of logits in which `I-x` follows `B-x`
  or `I-x` alone (Viterbi).
"""
_REDACTED = """
It was trained on texts with 0 for every digit: replace the digits of what it is to read likewise.
"""


def heads_in_words(architecture: Architecture) -> str:
    """What is to be computed of the encoder's states, for the README.md of an export.

    Args:
        architecture: of a classifier with an encoder.
    """
    of_text, of_words = architecture.text_layers, architecture.word_layers
    text = _TWO_LAYERS if of_text is None else _layers(of_text)
    slots = _FIRST_SUB_WORD
    if of_words is not None:
        slots = _SEVERAL_LAYERS.format(layers=_layers(of_words))
    if (reach := architecture.neighbours) > 0:
        slots += _NEIGHBOURS.format(pieces=2 * reach + 1, neighbours=reach)
    if architecture.reads_text:
        slots += _TEXT.format(scale=TEXT_SCALE)
    if architecture.slot_loss == "chain":
        slots += _CHAIN
    means = ""
    if architecture.reads_word_means and of_words is not None:
        alone = 2 if of_text is None else len(of_text)
        scale = intent_scale(text_layers=alone, mean_layers=len(of_words))
        means = _WORD_MEANS.format(layers=_layers(of_words), scale=scale)
    heads = _HEADS.format(text=text, words=means, slots=slots)
    return heads + (_REDACTED if architecture.redact_digits else "")


def _layers(shares: Sequence[float]) -> str:
    return _LAYERS.format(shares=", ".join(f"{share:.3g}" for share in shares))
