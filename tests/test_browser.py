"""The site, and audits, as readers meet them: at a desk or on a phone, in the light or in the dark, without a mouse."""

import os
import re
import shutil
from pathlib import Path

import keras
import nbformat
import numpy as np
import pytest
import xarray as xr
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from kerasfactory import explain, plot
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

EXAMPLES = Path(__file__).parents[1] / "examples"
DEVICES = {
    "desktop 1280": {"viewport": {"width": 1280, "height": 900}},
    "phone 390": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}
SCHEMES = {"light": "default", "dark": "slate"}  # the system's name of a color scheme: the theme's
# Chromium calls home unless told not to; it runs as root in containers, where its sandbox does not.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if not path:
        reason = "no chromium, chromium-browser or google-chrome here (on Debian: apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser, site_url):
    """Opens a page for a visitor who was never here before."""
    contexts = []

    def open_page(device="desktop 1280", scheme="light", **options):
        options |= DEVICES[device] | {"color_scheme": scheme, "reduced_motion": "reduce", "base_url": site_url}
        context = browser.new_context(**options)
        contexts.append(context)
        return context.new_page()

    yield open_page
    for context in contexts:
        context.close()


def listen(page, site_url):
    """A list that fills with whatever goes wrong between the page, its console and the network."""
    heard = []

    def failed(request):
        # To leave a page is to abort what it is still loading.
        if request.failure != "net::ERR_ABORTED":
            heard.append(f"no answer from {request.url}: {request.failure}")

    def requested(request):
        if not request.url.startswith((site_url, "data:", "blob:")):
            heard.append(f"request to another host: {request.url}")

    def said(message):
        if message.type in ("error", "warning"):
            heard.append(f"console {message.type}: {message.text}")

    def answered(response):
        if response.status >= 400:
            heard.append(f"answer {response.status} from {response.url}")

    page.on("console", said)
    page.on("pageerror", lambda error: heard.append(f"script error: {error}"))
    page.on("request", requested)
    page.on("requestfailed", failed)
    page.on("response", answered)
    return heard


def accessibility_problems(page):
    # The theme lets scrolling code have the focus once it was measured, in the first frame.
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    for violation in Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]:
        for node in violation["nodes"]:
            yield f"axe {violation['id']} at {node['target']}: {node['html'][:200]}"


# On a phone, code may scroll, and a table that was printed; a source file, which is folded, may anywhere.
SCROLLING = """() => [...document.querySelectorAll("article pre > code")].filter(code =>
    code.clientWidth > 0 && code.scrollWidth > code.clientWidth && !code.closest(".mkdocstrings-source") &&
    (innerWidth > 1200 || code.closest(".output:not(.aligned)"))
).map(code => code.innerText.slice(0, 80))"""


def layout_problems(page):
    width, limit = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    if width > limit:
        yield f"scrolls sideways: {width} > {limit} pixels"
    if (headings := page.locator("h1").count()) != 1:
        yield f"{headings} first-level headings"
    for code in page.evaluate(SCROLLING):
        yield f"code scrolls sideways: {code}"
    for image in page.locator("img").all():
        # No alternative is one: for a picture that says nothing, and is therefore kept from screen readers.
        if not image.get_attribute("alt") and not image.evaluate("image => image.closest('[aria-hidden=true]')"):
            yield f"no alternative text: {image.get_attribute('src')}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_page_is_sound(site, site_url, new_page, device, scheme):
    addresses = sorted(str(path.relative_to(site)).removesuffix("index.html") for path in site.rglob("*.html"))
    assert {"", "404.html", "recipes/", "api/layers/", "api/explain/capture/"} < set(addresses)
    page = new_page(device, scheme)
    heard = listen(page, site_url)
    problems = []
    for address in addresses:
        heard.clear()
        page.goto(address)
        found = [*layout_problems(page), *heard, *accessibility_problems(page)]
        if page.locator("body").get_attribute("data-md-color-scheme") != SCHEMES[scheme]:
            found.append("does not follow the system's color scheme")
        problems += [f"/{address} ({device}, {scheme}): {problem}" for problem in found]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("device", DEVICES)
def test_search_finds_a_page(site_url, new_page, device, scheme):
    page = new_page(device, scheme)
    heard = listen(page, site_url)
    page.goto("")
    page.locator(".md-search__input" if "desktop" in device else "label.md-header__button[for=__search]").click()
    page.locator(".md-search__input").press_sequentially("financial")
    result = page.locator(".md-search-result__link[href*='/recipes/finance/']").first
    expect(result).to_be_visible()
    assert not list(accessibility_problems(page))
    result.click()
    expect(page).to_have_url(re.compile("/recipes/finance/"))
    expect(page.locator("h1")).to_contain_text("Financial risk")
    assert not heard


# What people type, and the page that must be among the first three results.
QUESTIONS = {
    # installing and starting
    "how to install": "start/install/",
    "pip install kerasfactory": "start/install/",
    "choose backend jax": "start/install/",
    "quick start": "start/your-model/",
    "attention heatmap of my own model": "start/your-model/",
    "attention map for pandas": "start/your-table/",
    "dataframe with missing values": "recipes/raw_table/",
    "which function should I use": "start/which-function/",
    # symptoms
    "scores None after fit": "help/errors/",
    "nan in attention": "help/errors/",
    "mask lost": "help/errors/",
    "attention looks at padding": "help/errors/",
    "Cannot convert a symbolic tf.Tensor to a numpy array": "help/errors/",
    "object has no attribute attention_scores": "help/errors/",
    "flash attention return_attention_scores": "help/errors/",
    "`level` must be a number between 0 and 0.5": "help/errors/",
    "out of memory": "help/memory/",
    "gpu": "help/memory/",
    "all scores are 1": "help/faq/",
    "heads all look the same": "help/errors/",
    # what people want to do
    "which columns matter": "start/your-table/",
    "feature importance": "start/which-function/",
    "permutation importance": "recipes/which_reading/",
    "bert attention keras hub": "learn/keras-hub/",
    "llama gemma gpt2 attention": "learn/keras-hub/",
    "vision transformer saliency": "recipes/vision_transformer/",
    "time series forecast which time steps": "recipes/which_hours/",
    "sentiment which words": "recipes/which_words/",
    "shap vs attention": "recipes/beside_shap/",
    "is attention explanation": "concepts/reading-attention/",
    "prune heads": "recipes/prune/",
    "tensorboard callback": "recipes/monitor/",
    "EU AI Act": "about/regulated/",
    "bertviz captum comparison": "about/compared/",
    "interactive plot": "api/plot/interactive/",
    "explain.capture": "api/explain/capture/",
    "causal mask use_causal_mask": "api/layers/InterpretableMultiHeadAttention/",
    "is the map to be believed": "concepts/reading-attention/",
    "what does the verdict assume": "concepts/reading-attention/",
    "words of a misclassified text": "recipes/which_words/",
    "methods section of a paper": "about/cite/",
    "my own attention layer": "recipes/own_attention/",
    # misspelled
    "attension visualisation": "recipes/visualization/",
    "intergrated gradients": "api/explain/attribute/",
    "explainabilty report for auditor": "recipes/audit/",
}
ASK = """async question => {
    const config = JSON.parse(document.getElementById("__config").textContent)
    const answers = message => new Promise(done => {
        window.searching.onmessage = ({ data }) => done(data.data)
        window.searching.postMessage(message)
    })
    if (!window.searching) {
        window.searching = new Worker(new URL(config.search, location))
        const index = await (await fetch("search/search_index.json")).json()
        await answers({ type: 0, data: { ...index, options: {} } })
    }
    const { items } = await answers({ type: 2, data: question })
    return items.map(([{ location }]) => location.replace(/#.*/, ""))
}"""


@pytest.fixture(scope="module")
def ask(browser, site_url):
    """Asks the search as the theme does: the places of the pages that it finds, the best first."""
    with browser.new_context(base_url=site_url) as context:
        page = context.new_page()
        page.goto("")
        yield lambda question: page.evaluate(ASK, question)


@pytest.mark.parametrize("question", QUESTIONS)
def test_search_answers_what_people_ask(ask, question):
    found = ask(question)[:3]
    assert QUESTIONS[question] in found


def test_search_is_loaded_with_the_first_question(site, new_page):
    page = new_page()
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto("", wait_until="networkidle")
    assert not [url for url in requested if url.endswith("search/documents.json")]
    page.locator(".md-search__input").click()
    page.locator(".md-search__input").press_sequentially("atention rolout")  # misspelled
    expect(page.locator(".md-search-result__link[href*='rollout/']").first).to_be_visible()
    assert len([url for url in requested if url.endswith("search/documents.json")]) == 1


def test_pages_run_no_script_and_load_no_picture_but_their_own(site, new_page):
    page = new_page()
    for address in ("", "404.html", "recipes/audit/", "recipes/visualization/"):
        page.goto(address)
        blocked = []
        page.on("console", lambda message, blocked=blocked: blocked.append(message.text))
        page.evaluate(
            """() => {
                window.ran = []
                const add = (name, attributes) => {
                    const element = Object.assign(document.createElement(name), attributes)
                    return new Promise(done => {
                        element.onload = () => done(window.ran.push(name))
                        element.onerror = done
                        document.body.append(element)
                        setTimeout(done, 500)
                    })
                }
                const other = location.origin.replace("127.0.0.1", "localhost") + "/assets/"
                const text = document.createElement("div")
                text.innerHTML = '<b onclick="window.ran.push(1)">b</b>'
                document.body.append(text)
                text.firstChild.click()
                return Promise.all([
                    add("script", {textContent: "window.ran.push('inline')"}),
                    add("script", {src: other + "site.js"}),
                    add("img", {src: other + "logo.svg"}),
                ])
            }"""
        )
        assert page.evaluate("window.ran") == []
        assert len([text for text in blocked if "Content Security Policy" in text]) == 4, blocked


def test_copy_buttons_copy_exactly_the_code(new_page):
    notebook = nbformat.read(EXAMPLES / "finance.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    page = new_page(permissions=["clipboard-read", "clipboard-write"])
    page.goto("recipes/finance/")
    for summary in page.locator("summary").all():
        summary.click()
    buttons = page.get_by_title("Copy to clipboard").all()
    copied = []
    for button in buttons:
        page.evaluate("navigator.clipboard.writeText('')")
        button.click()
        page.wait_for_function("navigator.clipboard.readText()")
        copied.append(page.evaluate("navigator.clipboard.readText()"))
    # The first is the whole recipe, folded; what a cell prints is not for copying.
    assert copied == ["\n\n".join(cells), *cells]


COVERED = """() => {
    const lies = (box, element) => {
        const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT)
        for (let text; text = walker.nextNode();) {
            const range = document.createRange()
            range.selectNodeContents(text)
            for (const other of text.data.trim() ? range.getClientRects() : [])
                if (other.right > box.left + 1 && other.left < box.right - 1 &&
                    other.bottom > box.top + 1 && other.top < box.bottom - 1) return true
        }
    }
    return [...document.querySelectorAll("pre > .md-code__nav")].filter(nav => {
        const box = nav.getBoundingClientRect(), before = nav.closest(".highlight").previousElementSibling
        return box.width && [nav.parentElement.querySelector("code"), before].some(other => other && lies(box, other))
    }).map(nav => nav.parentElement.innerText.slice(0, 80))
}"""


@pytest.mark.parametrize("device", DEVICES)
def test_copy_buttons_cover_no_text(new_page, device):
    page = new_page(device)
    for address in (
        "start/your-model/",
        "start/install/",
        "recipes/prune/",
        "api/explain/head_statistics/",
    ):
        page.goto(address)
        page.locator(".md-code__nav").first.wait_for(state="attached")
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert page.evaluate(COVERED) == [], address


CUT = """() => [...document.querySelectorAll("article *")].filter(element =>
    element.clientWidth > 0 && element.scrollWidth > element.clientWidth + 4 &&
    getComputedStyle(element).display !== "inline" &&
    !element.closest("svg, math, .word, iframe") && !element.querySelector(".thumbnail")
).map(element => `${element.tagName}: ${element.innerText.slice(0, 60)}`)"""


def test_on_paper_nothing_is_cut_and_nothing_is_there_twice(site, new_page):
    page = new_page()
    page.set_viewport_size({"width": 718, "height": 1000})  # between the margins of A4
    page.emulate_media(media="print")
    for path in sorted(site.rglob("index.html")):
        address = str(path.parent.relative_to(site))
        page.goto(f"{address}/".replace("./", ""))
        page.evaluate("dispatchEvent(new Event('beforeprint'))")  # on which the theme unfolds what is folded
        assert page.evaluate(CUT) == [], address
        assert not page.locator("summary", has_text="All the code").is_visible(), address
        assert not page.locator(".mkdocstrings-source pre").first.is_visible(), address


@pytest.mark.parametrize("device", DEVICES)
def test_interactive_map_can_be_used_without_a_mouse_and_with_one(site_url, new_page, device):
    page = new_page(device)
    heard = listen(page, site_url)
    page.goto("recipes/visualization/")
    interactive = page.locator(".kerasfactory-map")
    layers, samples, heads = (interactive.locator(f"input[name={name}]") for name in ("layer", "sample", "head"))
    cells, status = interactive.get_by_role("application"), interactive.get_by_role("status")

    layers.focus()
    page.keyboard.press("ArrowRight")
    expect(layers).to_have_attribute("aria-valuetext", "second")
    heads.focus()
    page.keyboard.press("ArrowRight")
    expect(heads).to_have_attribute("aria-valuetext", "1")
    for _ in ("the small maps", "the large one"):
        page.keyboard.press("Tab")
    expect(cells).to_be_focused()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    expect(status).to_have_text(re.compile(r"^query day 2, key day 3: 0\.[5-9]\d\d$"))  # the marked day
    before = status.text_content()
    samples.focus()
    page.keyboard.press("ArrowRight")
    expect(status).to_have_text(re.compile(r"^query day 2, key day 3: 0\.[0-4]\d\d$"))  # in the next sample it is not

    page.keyboard.press("ArrowLeft")
    expect(status).to_have_text(before)
    interactive.locator("rect").nth(12 * 4 + 7).hover()
    expect(status).to_have_text(re.compile(r"^query day 5, key day 8: 0\.\d\d\d$"))
    assert not heard


@pytest.fixture
def show(browser, request):
    """Opens a page with nothing in it but a piece of HTML."""

    def open_page(fragment, scheme="light", **device):
        context = browser.new_context(color_scheme=scheme, **device)
        request.addfinalizer(context.close)
        page = context.new_page()
        head = '<!doctype html><html lang="en"><meta name="color-scheme" content="light dark"><title>Piece</title>'
        page.set_content(f"{head}<main><h1>Piece</h1>{fragment}</main>")
        return page

    return open_page


def scores_of_layers():
    rng, dims = np.random.default_rng(0), ["sample", "head", "query", "key"]
    words = (("sample", "key"), [["not", "bad", "at", "all"], ["too", "long", "", ""]])
    sizes = {"first": 1, "second": 3}
    scores = {name: rng.dirichlet(np.ones(4), (2, heads, 4)) for name, heads in sizes.items()}
    return {name: xr.DataArray(values, {"key_token": words}, dims) for name, values in scores.items()}


@pytest.mark.backend_independent
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_pieces_of_html_are_sound(show, device, scheme):
    scores = scores_of_layers()
    pieces = [
        plot.interactive(scores),
        plot.text(scores["second"]),
        plot.text(scores["second"].mean(["head", "query"]) - 0.2),
    ]
    page = show("".join(pieces), scheme, **DEVICES[device])
    problems = [*accessibility_problems(page), *layout_problems(page)]
    assert not problems, "\n".join(problems)


@pytest.mark.backend_independent
def test_a_click_on_a_small_map_chooses_its_layer_and_head(show):
    scores = scores_of_layers()
    page = show(plot.interactive(scores))
    layer, head = (page.locator(f"input[name={name}]") for name in ("layer", "head"))
    expect(head).to_be_hidden()  # the first layer has one
    page.get_by_title("second, head 2").click()
    expect(layer).to_have_attribute("aria-valuetext", "second")
    expect(head).to_have_attribute("aria-valuetext", "2")
    expect(page.locator("canvas.chosen")).to_have_attribute("title", "second, head 2")
    page.locator("rect").nth(4 * 1 + 3).hover()
    expect(page.get_by_role("status")).to_have_text(f"query 1, key 3: {float(scores['second'][0, 2, 1, 3]):.3f}")
    layer.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("canvas.chosen")).to_have_attribute("title", "first, head 0")


@pytest.mark.backend_independent
def test_the_slider_of_a_text_shows_another_head(show):
    scores = scores_of_layers()["second"]
    page = show(plot.text(scores, top_k=1))
    words = page.locator(".sentence").first.locator(".word")
    background = "word => getComputedStyle(word).backgroundColor"
    before = words.first.evaluate(background)
    page.get_by_label("head").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.get_by_label("head")).to_have_attribute("aria-valuetext", "2")
    shares = scores[0, 2].mean("query").values
    assert [float(word.get_attribute("title")) for word in words.all()] == pytest.approx(shares, rel=0.06)
    assert words.first.evaluate(background) != before
    largest = int(shares.argmax())
    for number, word in enumerate(words.all()):
        assert (word.locator("small").bounding_box()["width"] > 2) == (number == largest)
    page.get_by_label("all numbers").check()
    assert min(number.bounding_box()["width"] for number in page.locator("small").all()) > 2


def test_color_scheme_can_be_switched_and_stays(new_page):
    page = new_page(scheme="light")
    page.goto("")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_title("Switch to dark colors").click()
    expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "slate")
    assert page.evaluate(background) != light
    page.goto("recipes/")
    expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "slate")
    page.get_by_title("Switch to light colors").click()
    page.reload()
    expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "default")


def test_recipes_can_be_downloaded(new_page):
    page = new_page()
    for source in sorted(EXAMPLES.glob("*.ipynb")):
        page.goto(f"recipes/{source.stem}/")
        for suffix in (".ipynb", ".py"):
            with page.expect_download() as download:
                page.locator(f"a[download$='{suffix}']").click()
            assert download.value.suggested_filename == source.stem + suffix
            assert download.value.path().read_bytes() == source.with_suffix(suffix).read_bytes()


def test_keyboard_leads_to_content_menu_and_search(new_page):
    page = new_page("phone 390")
    page.goto("recipes/finance/")
    page.keyboard.press("Tab")
    expect(page.locator(".md-skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#financial-risk$"))

    page.goto("recipes/")
    page.locator("label[title=Menu]").focus()
    page.keyboard.press("Enter")
    menu = page.locator(".md-sidebar--primary")
    expect(menu.get_by_role("link", name="All recipes").first).to_be_in_viewport()

    page.goto("")
    page.locator("label[title=Search]").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".md-search__input")).to_be_focused()


@pytest.fixture(scope="module")
def audits(tmp_path_factory):
    """Two audits, of a table with labels, and of what cannot be tested."""
    keras.utils.set_random_seed(0)
    names = ["decides", "a long name that must find its place on a telephone", *(f"noise {n}" for n in range(10))]
    inputs = keras.Input((len(names),))
    attended = InterpretableMultiHeadAttention(4, 1, name="attention")(FeatureTokenizer(4, feature_names=names)(inputs))
    outputs = keras.layers.Dense(1, activation="sigmoid")(keras.layers.Flatten()(attended))
    model = keras.Model(inputs, outputs, name="the_name_of_a_model_is_one_word_and_does_not_break")
    model.compile("adam", "binary_crossentropy")
    x = np.random.default_rng(0).normal(size=(80, len(names)))
    folder = tmp_path_factory.mktemp("audits")
    return [
        explain.audit(model, x, x[:, 0] > 0, folder / "tested.html", verbose=0).path,
        explain.audit(model, x[:5], path=folder / "untested.html", verbose=0).path,
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("device", DEVICES)
def test_an_audit_opens_without_a_network(audits, browser, device, scheme):
    options = DEVICES[device] | {"color_scheme": scheme, "reduced_motion": "reduce", "offline": True}
    with browser.new_context(**options) as context:
        page = context.new_page()
        for audit in audits:
            requested, said = [], []
            page.on("request", lambda request, requested=requested: requested.append(request.url))
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.goto(audit.as_uri())
            assert not [*layout_problems(page), *accessibility_problems(page)]
            assert requested == [audit.as_uri()]
            assert not said
            red, *_ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
            assert (red > 200) == (scheme == "light")
            expect(page.get_by_text("undetermined", exact=True).first).to_be_visible()
