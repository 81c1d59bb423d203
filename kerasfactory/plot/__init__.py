"""Pictures of what `kerasfactory.explain` returns. Needs matplotlib, which nothing else of the package imports."""

from kerasfactory.plot._compare import compare
from kerasfactory.plot._curves import faithfulness, training
from kerasfactory.plot._interactive import interactive
from kerasfactory.plot._matrix import heads, heatmap, model
from kerasfactory.plot._pictures import image
from kerasfactory.plot._ranking import features, head_statistics
from kerasfactory.plot._sentences import text

__all__ = [
    "compare",
    "faithfulness",
    "features",
    "head_statistics",
    "heads",
    "heatmap",
    "image",
    "interactive",
    "model",
    "text",
    "training",
]
