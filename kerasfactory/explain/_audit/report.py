"""What `audit` returns: its claims and features as tables, and the page of it."""

import dataclasses
import html
import os
from pathlib import Path
from typing import Any

import pandas as pd

from kerasfactory._text import as_html
from kerasfactory.explain._audit.page import page, verdict_counts

_NUMBERS = ["value", "lower", "upper", "p_value", "p_opposite", "p_adjusted"]


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Audit(os.PathLike[str]):
    """The result of `explain.audit`: a table of claims, a table of features, and a page.

    In a notebook, the last expression of a cell shows the page. An audit that was written to a file can be used as the
    path of its page, as in `open(report)` or `explain.verify(report, model, x)`.

    Attributes:
        record: The audit as a dictionary, as in the JSON file; its `checksum` is in the file alone.
        path: The page that was written, a `pathlib.Path`, or `None`.
        claims: A `pandas.DataFrame` with a row for each claim. The index, `id`, is `capture`, `attention-uniform`,
            `attention-permuted`, `attention-loss`, `ranking-comprehensiveness`, `ranking-sufficiency`, `randomization`,
            `seeds`, and `feature/NAME` for each. The columns are `claim` (a sentence), `feature` (missing unless
            the claim is about one), `verdict`, `statistic` (its name), `value`, `lower`, `upper` (its interval),
            `p_value`, `p_opposite`, `p_adjusted` and `reason`. Numbers that were not computed are NaN.
        features: A `pandas.DataFrame` with a row for each feature. The columns are `attribution` (the mean over the
            samples), `attribution_lower`, `attribution_upper`, `effect` (the increase of the loss without the feature),
            `effect_lower`, `effect_upper`, `p_value`, `p_adjusted` and `verdict`. Each group of features that are
            tested together has one row, without an attribution.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        inputs = keras.Input((4, 8))
        attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")
        attended = attention(inputs, inputs)
        outputs = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(attended))
        model = keras.Model(inputs, outputs, name="small")

        x = np.random.default_rng(0).normal(size=(60, 4, 8))
        report = explain.audit(model, x, verbose=0)
        print(report.claims.loc["capture", "verdict"], len(report.features), report.path)
        #> supported 4 None
        ```
    """

    record: dict[str, Any]
    path: Path | None = None

    @property
    def claims(self) -> pd.DataFrame:
        rows = []
        for claim in self.record["claims"]:
            value, (lower, upper) = claim["statistic"]["value"], claim["interval"] or (None, None)
            numbers = {"statistic": claim["statistic"]["name"], "value": value, "lower": lower, "upper": upper}
            rows.append({**claim, **numbers})
        columns = ["id", "claim", "feature", "verdict", "statistic", *_NUMBERS, "reason"]
        return pd.DataFrame(rows, columns=columns).set_index("id").astype(dict.fromkeys(_NUMBERS, "float64"))

    @property
    def features(self) -> pd.DataFrame:
        rows = []
        for found in self.record["attribution"]["features"]:
            lower, upper = found["interval"] or (None, None)
            rows.append({**found, "attribution_lower": lower, "attribution_upper": upper})
        attributions = pd.DataFrame(rows).set_index("feature").drop(columns="interval").astype("float64")
        effects = {"value": "effect", "lower": "effect_lower", "upper": "effect_upper"}
        claims = self.claims.dropna(subset="feature").set_index("feature").rename(columns=effects)
        tested = claims[[*effects.values(), "p_value", "p_adjusted", "verdict"]]
        order = [*attributions.index, *(name for name in tested.index if name not in attributions.index)]
        return attributions.join(tested, how="outer").loc[order]

    def __fspath__(self) -> str:
        if self.path is None:
            raise ValueError(
                "The audit was not written to a file, so it has no path. Write it with "
                '`explain.audit(..., path="audit.html")`. Received: path=None'
            )
        return os.fspath(self.path)

    def __repr__(self) -> str:
        written = "" if self.path is None else f", in {self.path.name}"
        return f"<Audit of {self.record['model']['name']}: {verdict_counts(self.record)}{written}>"

    def _repr_html_(self) -> str:
        title = as_html(f"Audit of {self.record['model']['name']}")
        # In one line, as Markdown needs it, and in a box in which nothing can run.
        source = html.escape(page(self.record)).replace("\n", "&#10;")
        style = "width: 100%; height: 32rem; border: 1px solid #999"
        return f'<div><iframe title="{title}" sandbox="" style="{style}" srcdoc="{source}"></iframe></div>'
