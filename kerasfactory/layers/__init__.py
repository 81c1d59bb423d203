"""Keras layers. They need keras and numpy, and run on whichever backend Keras runs on."""

from kerasfactory.layers.FeatureTokenizer import FeatureTokenizer
from kerasfactory.layers.InterpretableMultiHeadAttention import InterpretableMultiHeadAttention

__all__ = ["FeatureTokenizer", "InterpretableMultiHeadAttention"]
