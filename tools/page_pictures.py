"""Draw the pictures of the pages in docs/start, each by the program on its page: `python tools/page_pictures.py`."""

import io
import os
import re

from notebooks import DOTS_PER_INCH, ENVIRONMENT, ROOT, in_few_colors

WIDEST = 5.4  # inches, with their labels: on a phone of 390 pixels text of 10 points then has 9 pixels


def draw(page: str) -> None:
    """Run the first program of a page, whose `ax` is the picture."""
    import matplotlib.pyplot as plt  # not before the environment is set

    text = (ROOT / "docs" / "start" / f"{page}.md").read_text()
    variables: dict = {}
    exec(re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1], variables)
    figure, drawn = variables["ax"].figure, io.BytesIO()
    too_wide = figure.get_tightbbox().width - WIDEST
    if too_wide > 0:
        axes = variables["ax"].get_position()  # the labels stay as they are, and the axes lose the width
        variables["ax"].set_position([axes.x0, axes.y0, axes.width - too_wide / figure.get_figwidth(), axes.height])
    figure.savefig(drawn, dpi=DOTS_PER_INCH, bbox_inches="tight")
    (ROOT / "docs" / "assets" / f"{page}.png").write_bytes(in_few_colors(drawn.getvalue()))
    plt.close("all")


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT | {"MPLBACKEND": "agg"})
    for page in ("your-model", "your-table"):
        draw(page)
