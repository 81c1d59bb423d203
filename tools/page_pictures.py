"""Draw the pictures of the pages in docs/start, each by the program on its page: `python tools/page_pictures.py`."""

import io
import os
import re

from notebooks import ENVIRONMENT, ROOT, in_few_colors

DOTS_PER_INCH = 130  # as in the notebooks


def draw(page: str) -> None:
    """Run the first program of a page, whose `ax` is the picture."""
    import matplotlib.pyplot as plt  # not before the environment is set

    text = (ROOT / "docs" / "start" / f"{page}.md").read_text()
    variables: dict = {}
    exec(re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1], variables)
    drawn = io.BytesIO()
    variables["ax"].figure.savefig(drawn, dpi=DOTS_PER_INCH, bbox_inches="tight")
    (ROOT / "docs" / "assets" / f"{page}.png").write_bytes(in_few_colors(drawn.getvalue()))
    plt.close("all")


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT | {"MPLBACKEND": "agg"})
    for page in ("your-model", "your-table"):
        draw(page)
