"""What a trained model attends to. Needs xarray: every result is an array that carries its names."""

from kerasfactory.explain._attribution import attribute, rollout
from kerasfactory.explain._audit.audit import audit, verify
from kerasfactory.explain._audit.report import Audit
from kerasfactory.explain._calibrate import calibrate
from kerasfactory.explain._capture import capture, recomposition_error
from kerasfactory.explain._claims import feature_claims
from kerasfactory.explain._compare import compare
from kerasfactory.explain._controls import attention_controls
from kerasfactory.explain._faithfulness import faithfulness
from kerasfactory.explain._heads import head_importance, head_statistics
from kerasfactory.explain._monitor import AttentionMonitor
from kerasfactory.explain._patches import patches
from kerasfactory.explain._register import register_attention
from kerasfactory.explain._sanity import parameter_randomization, seed_agreement
from kerasfactory.explain._summary import summarize
from kerasfactory.explain._texts import by_token, merge

__all__ = [
    "AttentionMonitor",
    "Audit",
    "attention_controls",
    "attribute",
    "audit",
    "by_token",
    "calibrate",
    "capture",
    "compare",
    "faithfulness",
    "feature_claims",
    "head_importance",
    "head_statistics",
    "merge",
    "parameter_randomization",
    "patches",
    "recomposition_error",
    "register_attention",
    "rollout",
    "seed_agreement",
    "summarize",
    "verify",
]
