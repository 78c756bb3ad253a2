"""A model's page with bad input, a damaged file, or a browser that lacks a part.

python -m pytest -m browser tests/browser/test_page_faults.py
"""

import time
from pathlib import Path

import pytest
from helpers import LINES
from model_page import (
    VIEWS,
    assert_works,
    compute_logits,
    generate,
    open_view,
    read_data,
    settle,
    write_data,
)

from exporters.html import find_block

pytestmark = pytest.mark.browser
SECONDS = 5  # in which a view with the longest text must answer


def test_unknown_characters_are_named_and_left_out(trained_page, open_page):
    page = open_page(f"{trained_page.as_uri()}#text=To+be&temperature=1")
    settle(page)
    bars = page.locator(".bars").inner_text()
    page.locator("#text").fill("T漢o b\u200b😀e")
    settle(page)
    notes = page.locator("#notes").inner_text()
    assert all(name in notes for name in ("漢", "U+200B", "😀"))
    assert page.locator(".bars").inner_text() == bars
    for name in VIEWS:
        open_view(page, name)
        assert page.get_by_role("alert").is_hidden()
    assert page.errors == page.warnings == []


def test_an_empty_text_is_continued_from_the_default_prompt(trained_page, open_page):
    page = open_page(f"{trained_page.as_uri()}#text=%0A&temperature=1&count=20")
    settle(page)
    bars = page.locator(".bars").inner_text()
    page.locator("#text").fill("")
    settle(page)
    assert page.locator(".bars").inner_text() == bars
    for name in VIEWS:
        open_view(page, name)
        assert page.get_by_role("alert").is_hidden()
    assert page.errors == page.warnings == []


@pytest.mark.parametrize("unit", ["words", "one word", "unknown"])
def test_a_pasted_megabyte_hangs_no_view(trained_page, open_page, unit):
    page = open_page(f"{trained_page.as_uri()}#count=20")
    settle(page)
    text = {"words": LINES, "one word": "a", "unknown": "漢字"}[unit]
    page.locator("#text").evaluate(
        """(field, text) => {
            field.focus();
            field.value = text;
            field.dispatchEvent(new Event("input", { bubbles: true }));
        }""",
        text * (1_000_000 // len(text)),
    )
    slow = {}
    for name in VIEWS:
        start = time.monotonic()
        open_view(page, name)
        slow[name] = time.monotonic() - start
        assert page.get_by_role("alert").is_hidden()
    assert not {name: seconds for name, seconds in slow.items() if seconds > SECONDS}
    assert page.locator("#notes").inner_text() != ""
    assert page.errors == page.warnings == []


# ----------------------------------------------------------------------------------------------
# Damaged files


def cut(content: bytes, place: str) -> bytes:
    """Cut a page at a named place."""
    start = {
        name: content.index(f'id="{name}">'.encode())
        for name in ("folio-page", "folio-kernels", "folio-weights-0-0", "folio-weights-0-2")
    }
    last = content.rindex(b"</script>")
    return content[
        : {
            "before the weights' last character": last - 1,
            "in the weights": start["folio-weights-0-2"] + 1000,
            "in the weights of another step": start["folio-weights-0-0"] + 1000,
            "before the weights": start["folio-weights-0-0"] - 20,
            "before the kernels": start["folio-kernels"] - 30,
            "in the kernels": start["folio-kernels"] + 100,
            "in the JSON": start["folio-page"] + 100,
            "in the JSON's last character": start["folio-kernels"] - 60,
            "before the data": start["folio-page"] - 40,
            "in the program": start["folio-page"] // 2,
        }[place]
    ]


@pytest.mark.parametrize(
    "place",
    [
        "before the weights' last character",
        "in the weights",
        "in the weights of another step",
        "before the weights",
        "before the kernels",
        "in the kernels",
        "in the JSON",
        "in the JSON's last character",
        "before the data",
        "in the program",
    ],
)
def test_a_page_that_was_cut_off_says_so(trained_page, open_page, place):
    Path("cut.html").write_bytes(cut(trained_page.read_bytes(), place))
    page = open_page(Path("cut.html").resolve().as_uri())
    assert page.locator("body").inner_text().count("incomplete") == 1
    assert page.locator("nav").count() == 0
    assert page.errors == []


def test_weights_that_were_changed_are_one_message(trained_page, open_page):
    content = trained_page.read_bytes()
    weights = find_block(content, "folio-weights-0-2")
    for name, bad in {"base64": b"!" * len(weights), "header": b"A" * len(weights)}.items():
        Path(f"{name}.html").write_bytes(content.replace(weights, bad))
        page = open_page(Path(f"{name}.html").resolve().as_uri())
        settle(page)
        alerts = [each for each in page.get_by_role("alert").all() if each.is_visible()]
        assert len(alerts) == 1
        assert page.errors == []


# ----------------------------------------------------------------------------------------------
# Browsers that lack a part

LACKS = {
    "no workers": "delete window.Worker",
    "workers that throw": "window.Worker = class { constructor() { throw new Error('no') } }",
    "workers that fail": """window.Worker = class {
        constructor() { setTimeout(() => this.onerror({})) }
        postMessage() {}
        terminate() {}
    }""",
    "no WebAssembly": "delete window.Worker; delete window.WebAssembly",
    "no Uint8Array.fromBase64": "delete window.Worker; delete Uint8Array.fromBase64",
}


@pytest.mark.parametrize("name", LACKS)
def test_a_browser_without_a_part_generates_the_same_text(trained_page, open_page, name):
    texts = []
    for script in ("", LACKS[name]):
        page = open_page(f"{trained_page.as_uri()}#count=60&text=To+be", script=script)
        settle(page)
        assert page.evaluate("app.client.worker !== null") == (script == "")
        page.get_by_role("button", name="Run").click()
        page.locator("button:enabled", has_text="Run").wait_for()
        settle(page)
        texts.append((page.locator("#text").input_value(), generate(page, [5, 6], 80, seed=3)))
        assert page.get_by_role("alert").is_hidden()
        assert page.errors == page.warnings == []
    assert texts[0] == texts[1]
    assert len(texts[0][0]) == 65


# ----------------------------------------------------------------------------------------------
# Forged pages in Compare


def forge(page: Path, name: str) -> bytes:
    """Return a page whose data is not what an export writes."""
    data = read_data(page)
    (model,) = data["models"]
    config, checkpoints, shown = model["config"], model["checkpoints"], model["shown"]
    if name in ("nothing", "a text", "a page"):
        return {"nothing": b"", "a text": b"To be", "a page": b"<p>To be</p>"}[name]
    if name == "NaN":
        config["block_size"] = "NAN"
        return write_data(page, str(data).replace("'", '"').replace('"NAN"', "NaN"))
    if name.startswith("no "):
        place = next(each for each in (data, model, config) if name[3:] in each)
        del place[name[3:]]
        return write_data(page, data)
    changes = {
        "format_version 2": (data, {"format_version": 2}),
        "models an object": (data, {"models": {}}),
        "models empty": (data, {"models": []}),
        "models null": (data, {"models": [None]}),
        "a billion tokens": (model, {"num_tokens": 1_000_000_000}),
        "a billion layers": (config, {"n_layer": 1_000_000_000}),
        "many layers": (config, {"n_layer": 16_000_000}),
        "negative": (config, {"n_embd": -32}),
        "a fraction": (config, {"block_size": 31.5}),
        "a text for a number": (config, {"hidden": "96"}),
        "heads that do not divide": (config, {"n_head": 5}),
        "other shape": (config, {"n_layer": 3}),
        "other width": (config, {"hidden": 64}),
        "unknown architecture": (config, {"architecture": "rnn"}),
        "unknown activation": (config, {"activation": "nonsense"}),
        "n-grams of modern": (config, {"ngram_rows": 100}),
        "speedrun without rows": (config, {"architecture": "speedrun"}),
        "speedrun of other weights": (config, {"architecture": "speedrun", "ngram_rows": 100}),
        "rows of more than all memory": (config, {"architecture": "speedrun", "ngram_rows": 2**24}),
        "a fraction of a row": (config, {"architecture": "speedrun", "ngram_rows": 1.5}),
        "activation constructor": (config, {"activation": "constructor"}),
        "rope_theta a text": (config, {"rope_theta": "x"}),
        "more tokens than weights": (model, {"num_tokens": model["num_tokens"] + 1}),
        "chars that are objects": (model["tokenizer"], {"chars": [{}] * model["num_tokens"]}),
        "chars that are null": (model["tokenizer"], {"chars": [None] * model["num_tokens"]}),
        "tokens that are numbers": (
            model["tokenizer"],
            {"kind": "bpe", "chars": None, "tokens": [1] * model["num_tokens"], "merges": [[9, 9]]},
        ),
        "checkpoints null": (model, {"checkpoints": [None]}),
        "shown constructor": (model, {"shown": "length"}),
        "weights elsewhere": (checkpoints[shown], {"weights": "folio-page"}),
        "weights nowhere": (checkpoints[shown], {"weights": "page"}),
        "weights of bytes 0": (checkpoints[shown], {"weights": "nothing", "bytes": 0}),
        "bytes NaN": (checkpoints[shown], {"bytes": "x"}),
        "default_prompt null": (model, {"default_prompt": None}),
    }
    place, change = changes[name]
    place.update(change)
    return write_data(page, data)


FORGED = (
    *("nothing", "a text", "a page", "NaN", "no models", "no config", "no num_tokens"),
    *("no tokenizer", "no checkpoints", "no shown", "no activation", "no architecture"),
    *("no rope_theta", "no default_prompt", "format_version 2"),
    *("models an object", "models empty", "models null", "a billion tokens", "a billion layers"),
    *("many layers", "negative", "a fraction", "a text for a number", "heads that do not divide"),
    *("other shape", "other width", "unknown architecture", "unknown activation"),
    *("n-grams of modern", "speedrun without rows", "speedrun of other weights"),
    *("rows of more than all memory", "a fraction of a row"),
    *("activation constructor", "rope_theta a text", "more tokens than weights"),
    *("chars that are objects", "chars that are null", "tokens that are numbers"),
    *("checkpoints null", "shown constructor", "weights elsewhere", "weights nowhere"),
    *("weights of bytes 0", "bytes NaN", "default_prompt null"),
)


def choose_page(page, content: bytes) -> None:
    """Choose a page in Compare, and wait until it is compared or refused."""
    file = {"name": "a.html", "mimeType": "text/html", "buffer": content}
    page.locator("input[type=file]").set_input_files(file)
    settle(page)


def count_messages(page, before: str) -> int:
    """Count the messages on display: of Compare, other than `before`, and of the page."""
    status = page.locator("main [role=status]").inner_text()
    return len({status} - {before, ""}) + page.get_by_role("alert").is_visible()


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_page_is_one_message_and_no_text(plain_page, open_page, name):
    page = open_page(f"{plain_page.as_uri()}#count=20&view=compare&text=To+be")
    settle(page)
    before = page.locator("main [role=status]").inner_text()
    logits = compute_logits(page, [1, 2, 3])
    start = time.monotonic()
    choose_page(page, forge(plain_page, name))
    assert time.monotonic() - start < SECONDS
    assert count_messages(page, before) == 1
    assert page.locator(".columns .sample:not(:empty)").count() <= 1
    assert (compute_logits(page, [1, 2, 3]) == logits).all()
    assert page.errors == []


@pytest.mark.parametrize("name", ["nothing", "other shape", "unknown activation"])
def test_a_page_works_after_a_forged_one(plain_page, open_page, name):
    page = open_page(f"{plain_page.as_uri()}#count=20&view=compare&text=To+be")
    settle(page)
    choose_page(page, forge(plain_page, name))
    assert_works(page)
    open_view(page, "compare")
    choose_page(page, plain_page.read_bytes())
    samples = page.locator(".columns .sample").all_inner_texts()
    assert len(samples) == 2
    assert samples[0] == samples[1]  # the same model
    assert page.get_by_role("alert").is_hidden()


def test_scripts_and_markup_of_another_page_never_run(trained_page, open_page):
    data = read_data(trained_page)
    markup = "<img src=x onerror='window.hasRun = true'><script>window.hasRun = true</script>"
    (model,) = data["models"]
    model["name"] = model["card"]["sample"] = model["tokenizer"]["unit"] = markup
    model["tokenizer"]["chars"][3] = markup
    model["parameters"] = markup
    page = open_page(f"{trained_page.as_uri()}#count=20&view=compare")
    settle(page)
    content = write_data(trained_page, data) + markup.encode()
    file = {"name": "a.html", "mimeType": "text/html", "buffer": content}
    page.locator("input[type=file]").set_input_files(file)
    settle(page)
    assert not page.evaluate("window.hasRun")
    assert page.locator("main img, main script").count() == 0
    # Chromium 156 logs what the policy blocks, in a document that is only parsed, too.
    others = [each for each in page.warnings if "Content Security Policy" not in each]
    assert page.errors == others == []
