"""What a site says to programs: to search engines, to those that show a preview of a link, and to language models."""

import html
import io
import os
import posixpath
import re
import zipfile
from pathlib import Path

import reference

PUBLIC = bool(os.environ.get("SITE_URL"))  # else it is not known where the site will stand
_BRANCH = "main"


def head(page, config) -> str:
    """The tags of a preview, for the head of a page."""
    description = page.meta.get("description") or config.site_description
    image = page.meta.get("image") or "assets/quickstart.png"
    properties = {
        "og:site_name": config.site_name,
        "og:type": "website" if page.is_homepage else "article",
        "og:title": page.meta.get("title") or page.title,
        "og:description": description,
        "og:image": posixpath.join(config.site_url, image) if PUBLIC else posixpath.relpath(image, page.url or "."),
        **({"og:url": page.canonical_url} if PUBLIC else {}),
    }
    tags = [f'<meta property="{name}" content="{_attribute(text)}">' for name, text in properties.items()]
    return "\n".join([*tags, '<meta name="twitter:card" content="summary_large_image">'])


def _attribute(text: str) -> str:
    return html.escape(html.unescape(re.sub(r"<[^>]*>", "", text)))


def source(page: str) -> str:
    """The file that people edit to change a page."""
    for name in reference.NAMES.values():
        if name.page == page:
            return name.source
    if page == "recipes/index.md":
        return "tools/site_hooks.py"
    return re.sub(r"^recipes/(\w+)\.md$", r"examples/\1.py", page) if page.startswith("recipes/") else f"docs/{page}"


def invitation(page: str, source_url: str) -> str:
    """Links to change a page and to say what is wrong with it, if it is known where its source is."""
    if not source_url:
        return ""
    address = source_url.rstrip("/")
    edit = f"{address}/edit/{_BRANCH}/{source(page)}"
    report = f"{address}/issues/new?title={page.removesuffix('.md')}:+"
    return f'<p class="invitation"><a href="{edit}">Edit this page</a> <a href="{report}">Report a mistake</a></p>'


def colab(recipe: str, source_url: str) -> str:
    """A link that opens a recipe in Colab, and what to run there first, as Markdown."""
    host, _, repository = source_url.rstrip("/").partition("github.com/")
    if not host or not repository:
        return ""
    link = f"https://colab.research.google.com/github/{repository}/blob/{_BRANCH}/examples/{recipe}.ipynb"
    install = f'!pip install "kerasfactory[explain,plot] @ git+{source_url}"'
    return f'[Open in Colab]({link})\n</p>\n\n<p class="facts" markdown>\nIn Colab, first run `{install}`.'


def clone(source_url: str) -> str:
    """How to get a copy of the repository, as Markdown."""
    known = source_url.rstrip("/")
    commands = f"```sh\ngit clone {known or 'ADDRESS'} kerasfactory\ncd kerasfactory\n```"
    return commands if known else f"{commands}\n\n`ADDRESS` is the address that you have the repository from."


def bundle(files: list[Path]) -> bytes:
    """The files as one ZIP archive: of the same files always the same."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(files):
            entry = zipfile.ZipInfo(f"kerasfactory/{file.name}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, file.read_bytes())
    return buffer.getvalue()


def plain(markdown: str, page) -> str:
    """A page's Markdown for those who see no page: with its docstring, and links from the top of the site."""
    markdown = re.sub(r"^::: (\S+)\n(?: {4}.*\n)+", lambda match: _docstring(match[1]), markdown, flags=re.MULTILINE)
    markdown = re.sub(r"\[\]\(\)\{ #.*? \}\n*", "", markdown)
    markdown = re.sub(r"\[(`[^`\]]+`)\]\[[\w.]+\]", r"\1", markdown)
    markdown = re.sub(r"^!\[(.*?)\]\(.*?\)(\{.*?\})?", r"*Figure: \1*", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"<(svg|style|script|div class=\"kerasfactory).*?</\1.*?>", "", markdown, flags=re.DOTALL)
    folder = posixpath.dirname(page.file.src_uri)

    def link(match):
        path, anchor = match[1], match[2] or ""
        target = posixpath.normpath(posixpath.join(folder, path))
        return f"](/{re.sub(r'(^|/)index$', '', target.removesuffix('.md'))}/{anchor})"

    return re.sub(r"\]\((?!\w+:)([^)#\s]+\.md)(#[^)\s]*)?\)", link, markdown).strip()


def _docstring(path: str) -> str:
    (name,) = (name for name in reference.NAMES.values() if name.code.path == path)
    signature = f"\n\n```python\n{name.code.signature()}\n```" if name.code.is_function else ""
    return f"# {name.short}{signature}\n\n{name.code.docstring.value}\n"


def llms(pages: list, config) -> str:
    """The site in one page of links, as https://llmstxt.org describes it."""
    lines, section = [f"# {config.site_name}", "", f"> {config.site_description}"], None
    for page in pages:
        top = page.ancestors[-1].title if page.ancestors else "Start"
        if top != section:
            section = top
            lines += ["", f"## {section}", ""]
        address = page.canonical_url if PUBLIC else f"/{page.url}"
        description = html.unescape(page.meta.get("description", ""))
        lines.append(f"- [{html.unescape(page.meta.get('title') or page.title)}]({address}): {description}")
    return "\n".join(lines) + "\n"


def llms_full(texts: dict[str, str]) -> str:
    """All pages, one after the other, each with its address."""
    return "\n\n---\n\n".join(f"Address: /{url}\n\n{text}" for url, text in texts.items()) + "\n"
