"""Keras layers that show what they attend to, and a cookbook that checks what they show."""

__version__ = "0.2.0"
