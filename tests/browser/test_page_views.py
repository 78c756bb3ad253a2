"""The views of a model's page: each shows what the model computes.

python -m pytest -m browser tests/browser/test_page_views.py
"""

import re
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from helpers import CHECKOUT, LINES, save_random_model
from model_page import (
    VIEWS,
    compute_log_probs,
    export_page,
    get_bars,
    open_view,
    read_data,
    round_model,
    settle,
)

from engine import SamplingParams
from exporters.source import load_source
from generate import generate_tokens
from tokenizer import CharTokenizer, create_tokenizer

pytestmark = pytest.mark.browser
TEXT = "To be, or not to be"


@pytest.fixture
def model(trained):
    """The trained model with the rounded weights of its page."""
    return round_model(trained / "artifacts" / "export")


@pytest.fixture
def ids(trained) -> list[int]:
    """The ids of TEXT."""
    return load_source(trained / "artifacts" / "export").tokenizer.encode(TEXT).tolist()


@pytest.fixture
def open_text(trained_page, open_page):
    """Open a view of the trained model's page, with TEXT and further parts of a link."""

    def open_it(view: str, link: str = "", path: Path = trained_page, **options):
        address = f"{path.as_uri()}#view=next&text={TEXT}&count=40&{link}"
        page = open_page(address.replace(" ", "%20"), **options)
        open_view(page, view)
        assert page.locator("nav a[aria-current]").count() == 1
        return page

    return open_it


def find_numbers(text: str) -> list[float]:
    return [float(each.replace(",", "")) for each in re.findall(r"-?[\d,]*\d(?:\.\d+)?", text)]


@torch.no_grad()
def test_next_has_a_bar_for_each_token_and_the_shares_sum_to_1(open_text, model, ids):
    page = open_text("next", "temperature=1")
    expected = model(ids)[0][0, -1].softmax(dim=-1)
    bars = get_bars(page)
    assert len(bars) == model.num_tokens
    assert bars == pytest.approx(sorted((100 * expected).tolist(), reverse=True), abs=0.06)
    assert sum(bars) == pytest.approx(100, abs=0.05 * len(bars))
    page.get_by_label("Top-k").fill("3")
    settle(page)
    assert page.locator(".bar:not(.cut)").count() == 3
    assert sum(get_bars(page)[:3]) == pytest.approx(100, abs=0.2)
    page.locator(".bar").first.click()
    settle(page)
    best = load_char(page, int(expected.argmax()))
    assert page.locator("#text").input_value() == TEXT + best


def load_char(page, token: int) -> str:
    return page.evaluate("(id) => app.model.tokenizer.decode([id])", token)


def test_step_run_stop_and_undo_change_the_text(open_text):
    page = open_text("next", "count=5000")
    text = page.locator("#text")
    for name, length in (("Step", 1), ("Step", 2), ("Undo", 1)):
        page.get_by_role("button", name=name).click()
        settle(page)
        assert len(text.input_value()) == len(TEXT) + length
    page.get_by_role("button", name="Run").click()
    page.get_by_role("button", name="Stop").click()
    page.locator("button:enabled", has_text="Run").wait_for()
    settle(page)
    assert len(TEXT) + 1 <= len(text.input_value()) < len(TEXT) + 5001
    assert page.get_by_role("alert").is_hidden()


def test_surprise_shows_the_bits_of_each_token_and_their_means(open_text, model, ids):
    page = open_text("surprise")
    bits = -compute_log_probs(model, ids)
    labels = [piece.get_attribute("aria-label") for piece in page.locator(".piece").all()]
    shown = [float(re.search(r"([\d.]+) bits", label)[1]) for label in labels[1:]]
    assert shown == pytest.approx(bits.tolist(), abs=0.006)
    numbers = find_numbers(page.locator("main [role=status]").inner_text())
    mean = bits.mean().item()  # of a character, and of a byte: the same in ASCII
    assert numbers[:3] == pytest.approx([mean, len(bits), mean], abs=6e-4)
    assert page.locator("main svg.chart").is_visible()
    page.locator(".piece").nth(4).hover()
    assert f"{bits[3]:.2f} bits" in page.locator(".detail").inner_text()


def test_training_shows_another_text_at_each_checkpoint(open_text):
    page = open_text("training")
    slider, samples, labels = page.get_by_role("slider", name="Checkpoint"), [], []
    for index in range(3):
        slider.fill(str(index))
        settle(page)
        samples.append(page.locator(".sample").inner_text())
        labels.append(page.locator(".big").inner_text())
    assert len(set(samples)) == len(set(labels)) == 3
    assert "step 0" in labels[0]
    assert "step 120" in labels[2]
    assert all(sample.startswith(TEXT) for sample in samples)
    assert page.locator("svg.chart .line").count() == 2
    assert page.locator("svg.chart .line").first.evaluate("(each) => each.getTotalLength()") > 99


def test_a_step_s_loss_is_that_of_its_evaluation(open_text, trained_page):
    page = open_text("training", "checkpoint=2")
    last = read_data(trained_page)["models"][0]["checkpoints"][2]
    for loss in (last["train_loss"], last["val_loss"]):
        assert f"{loss:.3f}" in page.locator("main").inner_text()


@torch.no_grad()
def compute_attention(model, ids: list[int]) -> torch.Tensor:
    """Compute the attention weights `(L, H, T, T)` from the queries and keys of each layer."""
    T, maps = len(ids), []

    def attend(layer, arguments):
        x, H = arguments[0], layer.n_head
        qkv = layer.qkv(x).view(1, T, 3, H, -1).permute(2, 0, 3, 1, 4)
        q, k = layer.queries_and_keys(qkv[:2], slice(0, T))
        scores = (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5)[0]  # (H, T, T)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        maps.append(scores.masked_fill(future, -torch.inf).softmax(dim=-1))

    hooks = [block.attention.register_forward_pre_hook(attend) for block in model.blocks]
    model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


def test_attention_shows_the_weights_of_each_head(open_text, model, ids):
    page = open_text("attention")
    expected = compute_attention(model, ids)
    found = page.evaluate("(ids) => app.call('attend', { ids }).then((all) => [...all])", ids)
    assert np.abs(np.array(found) - expected.flatten().numpy()).max() < 1e-5
    for layer, head in ((0, 0), (1, 1)):
        page.get_by_role("button", name=f"Layer {layer + 1}, head {head + 1}").click()
        settle(page)
        weights = expected[layer, head, -1].sort(descending=True)
        detail = page.locator(".detail").inner_text()
        for weight, position in zip(weights.values[:3], weights.indices[:3], strict=True):
            assert f"position {position + 1}) {100 * weight:.1f} %" in detail


@torch.no_grad()
def test_a_head_that_is_switched_off_changes_the_loss_as_in_pytorch(open_text, model, ids):
    page = open_text("attention")
    status = page.locator("main [role=status]")
    whole = -compute_log_probs(model, ids).mean().item()
    assert find_numbers(status.inner_text())[0] == pytest.approx(whole, abs=6e-4)
    page.get_by_role("group", name="Layer 2").get_by_role("checkbox").first.uncheck()
    settle(page)
    D = model.token_embedding.weight.size(1) // model.blocks[1].attention.n_head
    model.blocks[1].attention.projection.weight[:, :D] = 0
    without = -compute_log_probs(model, ids).mean().item()
    assert abs(without - whole) > 0.001
    shown = find_numbers(status.inner_text())
    assert [shown[0], shown[2]] == pytest.approx([whole, without], abs=6e-4)
    page.get_by_role("button", name="Switch all on").click()
    settle(page)
    assert len(find_numbers(status.inner_text())) == 1


@torch.no_grad()
def test_the_last_row_of_layers_has_the_likeliest_tokens(open_text, model, ids):
    page = open_text("lens")
    rows = page.locator(".lens tbody tr")
    assert rows.count() == len(model.blocks) + 1
    expected = model(ids)[0][0].argmax(dim=-1).tolist()
    labels = page.evaluate("(ids) => ids.map((id) => app.model.tokenizer.label(id))", expected)
    assert rows.last.locator("button").all_inner_texts() == labels
    assert rows.first.locator("button").all_inner_texts() != labels


@pytest.fixture
def other(trained, tmp_path) -> Path:
    """A random model with another vocabulary than the trained one's: it lacks W."""
    tokenizer = CharTokenizer(sorted({*LINES, "é"} - {"W"}))
    shape = {"architecture": "gpt2", "n_embd": 12, "n_head": 3, "n_layer": 1, "block_size": 24}
    save_random_model(tmp_path / "other", tokenizer, **shape)
    return tmp_path / "other"


def check_comparison(page, other: Path) -> None:
    """Assert that the second column has the text of the second model."""
    samples = page.locator(".columns .sample")
    assert samples.count() == 2
    model, tokenizer = round_model(other), load_source(other).tokenizer
    prompt = tokenizer.encode(TEXT, drop=True)
    params = SamplingParams(temperature=0.8)
    text = tokenizer.decode(generate_tokens(model, prompt, 40, params, seeds=[1337])[0].tolist())
    assert samples.nth(1).inner_text() == text.replace("\n", "↵\n")
    facts = page.locator(".columns > div").nth(1).inner_text()
    bits = -compute_log_probs(model, prompt.tolist()).mean().item()
    assert f"{bits:.3f} bits per byte" in facts
    page.locator("#text").fill("Woe to be")
    settle(page)
    assert re.search(r"vocabulary.*\bW", page.locator(".columns > div").nth(1).inner_text())
    assert "vocabulary" not in page.locator(".columns > div").nth(0).inner_text()
    assert page.get_by_role("alert").is_hidden()


def test_a_page_that_is_chosen_is_compared(open_text, other):
    page = open_text("compare")
    page.locator("input[type=file]").set_input_files(export_page(other, Path("out")))
    settle(page)
    check_comparison(page, other)


def test_a_page_that_is_dropped_is_compared(open_text, other):
    page = open_text("compare")
    file = page.evaluate_handle(
        """(text) => {
            const data = new DataTransfer();
            data.items.add(new File([text], "other.html", { type: "text/html" }));
            return data;
        }""",
        export_page(other, Path("out")).read_text(encoding="utf-8"),
    )
    page.locator(".drop").dispatch_event("drop", {"dataTransfer": file})
    settle(page)
    check_comparison(page, other)


def test_a_model_that_is_packed_into_the_page_is_compared(open_text, trained, other):
    packed = export_page(trained, Path("packed"), f"--with={other}")
    check_comparison(open_text("compare", path=packed), other)


SHAPES = {
    "modern": {"architecture": "modern", "tie_weights": False},
    "gpt2": {"architecture": "gpt2", "tie_weights": True, "bias": True},
    "speedrun": {"architecture": "speedrun", "ngram_rows": 500},
}


@pytest.mark.parametrize("architecture", SHAPES)
def test_the_parameters_of_the_parts_sum_to_the_model_s(open_text, architecture):
    shape = {**SHAPES[architecture], "n_embd": 16, "n_head": 2, "n_layer": 3, "block_size": 8}
    model = save_random_model(Path("model"), create_tokenizer(LINES), **shape)
    page = open_text("machine", path=export_page(Path("model"), Path("out")))

    def count(boxes) -> int:
        texts = [box.inner_text() for box in boxes.locator("> p.quiet").all()]
        found = [re.search(r"([\d,]+) parameter", text) for text in texts]
        return sum(int(match[1].replace(",", "")) for match in found if match)

    each, others = count(page.locator(".block .box")), count(page.locator(".machine > .box"))
    assert others + 3 * each == model.count_parameters()
    lines = (CHECKOUT / "model.py").read_text(encoding="utf-8").splitlines()
    parts = page.locator(".box details")
    assert parts.count() >= 6
    for part in parts.all():
        part.locator("summary").click()
        name, start, end = re.search(
            r"(\S+)\s+model.py, lines (\d+) to (\d+)", part.locator("summary").inner_text()
        ).groups()
        code = lines[int(start) - 1 : int(end)]
        assert part.locator("pre").inner_text() == "\n".join(code)
        assert re.search(rf"(class|def) {name.split('.')[-1]}\b", code[0])


def test_memory_underlines_what_stands_in_the_training_text(open_text):
    page = open_text("memorization")
    field, marks = page.locator("#text"), page.locator("main mark")
    copied = LINES[20:90].strip()
    for text, expected in {copied: [copied], f"question Zebra {copied}": [copied]}.items():
        field.fill(text)
        settle(page)
        found = [mark.replace("↵", "") for mark in marks.all_inner_texts()]
        assert len(found) == len(expected)
        assert expected[0] in found[0]
    field.fill("arms of the whether end, sea is not or be slings take")
    settle(page)
    assert marks.count() == 0
    page.locator("main button").click()
    settle(page)
    page.locator("main button:enabled").wait_for()
    assert len(field.input_value()) == 53 + 40


def test_a_page_without_memorization_says_so(open_text, trained):
    page = open_text("memorization", path=export_page(trained, Path("out"), "--no-memorization"))
    assert "--no-memorization" in page.locator("main").inner_text()
    assert page.locator("main mark").count() == 0


def test_the_card_has_the_facts_of_the_model(open_text, trained_page):
    page = open_text("card")
    card = read_data(trained_page)["models"][0]["card"]
    shown = page.locator("main").inner_text()
    for name, value in [*card["facts"], *card["settings"]]:
        assert page.get_by_role("row", name=name).first.is_visible()
        assert value in shown
    assert page.locator("pre").first.inner_text() == card["sample"]
    assert str(trained_page.parent.parent) not in page.content()


# ----------------------------------------------------------------------------------------------
# The keyboard, and the address


def press_until(page, key: str, selector: str) -> None:
    """Press a key until an element that matches has the focus."""
    for _ in range(60):
        if page.evaluate("(each) => document.activeElement.matches(each)", selector):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{selector}: not reached by {key}")


def test_each_view_opens_by_the_keyboard(open_text):
    page = open_text("card")
    for index, name in enumerate(VIEWS):
        press_until(page, "Shift+Tab", "nav li:first-child a")
        press_until(page, "Tab", f"nav li:nth-child({index + 1}) a")
        page.keyboard.press("Enter")
        settle(page)
        assert page.evaluate("app.state.get('view')") == name
        assert page.locator("main h2").is_visible()


def test_arrow_keys_move_in_the_text_of_surprise(open_text):
    page = open_text("surprise")
    press_until(page, "Tab", ".piece")
    for key, position in (
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowLeft", 2),
        ("End", len(TEXT)),
        ("Home", 1),
    ):
        page.keyboard.press(key)
        assert page.evaluate("Number(document.activeElement.dataset.stop)") == position - 1
        assert f"position {position}" in page.locator(".detail").inner_text()


def test_step_and_run_work_by_the_keyboard_and_keep_the_focus(open_text):
    page = open_text("next")
    text = page.locator("#text")
    press_until(page, "Tab", "main button")
    page.keyboard.press("Enter")
    settle(page)
    assert len(text.input_value()) == len(TEXT) + 1
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.locator("button:enabled", has_text="Run").wait_for()
    settle(page)
    assert len(text.input_value()) == len(TEXT) + 41
    assert page.evaluate("document.activeElement.textContent") == "Run"


LINK = "view=surprise&text=To+be%2C%0A+or%3F&seed=2147483653&temperature=1.25&top_k=7&min_p=0.05"


def test_a_link_restores_the_page(trained_page, open_page):
    page = open_page(f"{trained_page.as_uri()}#{LINK}")
    settle(page)
    assert page.locator("nav a[aria-current]").inner_text().endswith("Surprise")
    values = {"Text": "To be,\n or?", "Seed": "2147483653", "Temperature": "1.25", "Top-k": "7"}
    for name, value in values.items():
        assert page.get_by_label(name, exact=name == "Text").input_value() == value


LINKS = re.findall(r"`#(view=\S+)`", (CHECKOUT / "docs" / "teaching.md").read_text("utf-8"))


def test_each_exercise_of_the_lesson_opens_its_view_and_text(trained_page, open_page):
    assert len(LINKS) == 10
    for link in LINKS:
        page = open_page(f"{trained_page.as_uri()}#{link}")
        settle(page)
        expected = dict(parse_qsl(link))
        values = page.evaluate("app.state.values")
        assert {name: str(values[name]) for name in expected} == expected
        assert page.locator("textarea").input_value() == expected["text"]
        assert page.errors == page.warnings == []


def test_the_address_follows_the_settings_and_is_a_link_to_them(open_text, open_page):
    page = open_text("next")
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("Top-k").fill("5")
    page.wait_for_url(re.compile(r"#(?=.*temperature=1\.5)(?=.*top_k=5)"))
    again = open_page(page.url)
    settle(again)
    assert get_bars(again) == get_bars(page)
    page.goto(page.url.replace("temperature=1.5", "temperature=0.5"))
    settle(page)
    assert page.get_by_label("Temperature").input_value() == "0.5"


JUNK = (
    "temperature=1e99&top_k=-5&top_p=0&min_p=7&seed=-1&count=1e12",
    "temperature=NaN&top_k=Infinity&seed=x&count=&at=1e300&from=1e300&checkpoint=99",
    "view=nonsense",
    "view=__proto__",
    "view=toString",
    "__proto__=x&constructor=y&unknown=z&toString=1",
    "view=attention&layer=99&head=99&off=7.7,x,__proto__&at=99999",
    "view=attention&layer=-1&head=-1&at=-7&checkpoint=-5&from=-3",
    "view=surprise&at=-9&from=0.5&seed=0.5&top_k=1.5",
    "%E0%A4%A&text=%FF%00&view=next",
)


@pytest.mark.parametrize("junk", JUNK)
def test_junk_in_the_address_is_ignored(trained_page, open_page, junk):
    page = open_page(f"{trained_page.as_uri()}#{junk}")
    settle(page)
    assert page.locator("nav a[aria-current]").count() == 1
    assert page.locator("main h2").is_visible()
    assert page.get_by_role("alert").is_hidden()
    values = page.evaluate("app.state.values")
    limits = {"temperature": 2, "top_p": 1, "min_p": 0.99, "seed": 2**32 - 1, "count": 5000}
    assert all(0 <= values[name] <= limit for name, limit in limits.items())
    assert isinstance(values["seed"], int)
    assert isinstance(values["top_k"], int)
    assert page.errors == page.warnings == []
