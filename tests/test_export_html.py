"""HTML: the page has the same weights and vocabulary, and no other file, path or request.

python -m pytest tests/test_export_html.py
python -m pytest -m slow tests/test_export_html.py
"""

import base64
import errno
import hashlib
import json
import re
import sys
import webbrowser
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import wasmtime
from helpers import CHECKOUT, LINES, assert_equal, save_random_model
from safetensors.torch import load, load_file, save
from test_export import SHAPE, TEXT, VARIANTS, fail, for_each_variant, read_all

import export
import import_model
import inspect_model
import report
from bundle import list_checkpoints, read_bundle
from exporters import card, html, ngrams, page_data
from exporters.source import load_source
from model import LanguageModel
from tokenizer import CharTokenizer, GPT2Tokenizer, create_tokenizer
from trainer import Trainer, train
from utils.errors import UserError
from utils.output import run_command

FAMILY = "👨‍👩‍👧"  # three emoji and two zero-width joiners


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    """Generate short samples for the cards."""
    monkeypatch.setattr(card, "SAMPLE_TOKENS", 30)


@pytest.fixture
def save_model(tmp_path):
    """Return a function that saves a random model as a bundle; keywords are settings."""

    def save_model(tokenizer=None, name: str = "model", **settings) -> Path:
        tokenizer = tokenizer or CharTokenizer(sorted(set(TEXT)))
        save_random_model(tmp_path / name, tokenizer, **{**SHAPE, **settings})
        return tmp_path / name

    return save_model


@pytest.fixture
def trained(tiny, quiet, tmp_path) -> Path:
    """The directory of a run on a text in a directory of a user's name, with six checkpoints."""
    text = tmp_path / "home" / "alighieri" / "comedy.txt"
    text.parent.mkdir(parents=True)
    text.write_text(LINES * 30, encoding="utf-8")
    config = tiny(data=str(text), run_tag="comedy", max_iters=6, eval_interval=2, keep_every=1)
    return train(config, output=quiet).run_dir


class Page(HTMLParser):
    """The elements of a page that load or hold something."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.blocks: dict[str, str] = {}
        self.styles: list[str] = []
        self.scripts: list[str] = []
        self.open = self.content = ""
        self.feed(self.text)
        self.data = json.loads(self.blocks["folio-page"])

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open, self.content = tag, ""

    def handle_data(self, data):
        self.content += data

    def handle_endtag(self, tag):
        if tag != self.open:
            return
        attributes, self.open = self.tags[-1][1], ""
        if tag == "style":
            self.styles.append(self.content)
        elif tag == "script" and attributes.get("type"):
            self.blocks[attributes["id"]] = self.content
        elif tag == "script":
            self.scripts.append(self.content)

    def get_model(self, number: int = 0) -> dict:
        return self.data["models"][number]

    def load(self, checkpoint: dict) -> dict[str, torch.Tensor]:
        content = base64.b64decode(self.blocks[checkpoint["weights"]], validate=True)
        assert len(content) == checkpoint["bytes"]
        return load(content)


def run_export(*words: object, out: str = "out") -> Page:
    """Export to a directory, and return its page."""
    assert run_command(export.main, [*map(str, words), "--format=html", f"--out={out}"]) == 0
    (page,) = Path(out).glob("*.html")
    return Page(page)


# The file ----------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file_and_no_request(trained):
    page = run_export(trained)
    for _, attributes in page.tags:
        for name in {"src", "href", "srcset", "action"} & attributes.keys():
            assert attributes[name].startswith(("data:", "#"))
    assert "url(" not in "".join(page.styles) and "@import" not in "".join(page.styles)
    for script in page.scripts:
        assert not re.search(r"^\s*(import|export)\b", script, re.MULTILINE)
    assert sorted(path.name for path in page.path.parent.iterdir()) == sorted(
        ["README.md", "export.json", "loss.svg", page.path.name]
    )


def test_the_policy_has_the_hashes_of_the_texts_and_allows_nothing_else(trained):
    page = run_export(trained)
    (policy,) = (each["content"] for _, each in page.tags if "http-equiv" in each)
    rules = {words[0]: words[1:] for words in map(str.split, policy.split(";"))}

    def hash_text(text: str) -> str:
        digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
        return f"'sha256-{digest}'"

    assert rules["default-src"] == ["'none'"]
    assert rules["style-src"] == list(map(hash_text, page.styles))
    assert rules["script-src"] == [*map(hash_text, page.scripts), "'wasm-unsafe-eval'"]
    assert len(page.scripts) == 2
    assert rules["worker-src"] == ["blob:"]
    assert rules["img-src"] == ["data:"]
    assert rules["base-uri"] == rules["form-action"] == ["'none'"]


def test_no_file_has_a_path_of_the_machine_or_the_name_of_a_user(trained, tmp_path):
    page = run_export(trained, "--checkpoints=3")
    content = read_all(page.path.parent)
    for secret in (str(tmp_path), "alighieri", str(CHECKOUT), str(Path.home()), sys.prefix):
        assert secret.encode() not in content
    assert "comedy.txt" in page.text
    (tmp_path / "home" / "alighieri" / "comedy.txt").write_bytes(b"\xff")  # not UTF-8
    content = read_all(run_export(trained, out="again").path.parent)
    assert b"alighieri" not in content and b"comedy.txt" in content


def test_the_weights_come_last_and_the_page_is_the_same_each_time(trained):
    page = run_export(trained, "--checkpoints=3")
    names = list(page.blocks)
    assert names[:2] == ["folio-page", "folio-kernels"]
    assert names[2:] == [f"folio-weights-0-{k}" for k in range(3)]
    again = run_export(trained, "--checkpoints=3", out="again")
    assert again.path.read_bytes() == page.path.read_bytes()


def test_markup_in_a_vocabulary_or_a_setting_is_no_markup_in_the_page(save_model):
    tokenizer = CharTokenizer(sorted(set("</script><!--&\u2028\u2029a")))
    page = run_export(save_model(tokenizer, n_embd=8, data="</script><script>alert(1)</script>"))
    block = page.blocks["folio-page"]
    assert block.isascii() and not set("<>&") & set(block)
    assert page.get_model()["tokenizer"]["chars"] == tokenizer.chars
    assert "alert(1)" not in "".join(page.scripts)


def test_the_page_without_data_has_at_most_150_000_bytes():
    assert len(html.render_page("", []).encode()) <= 150_000


def test_the_page_has_the_text_of_the_model_s_functions(save_model):
    source = run_export(save_model(n_embd=8)).data["source"]
    lines = (CHECKOUT / "model.py").read_text(encoding="utf-8").splitlines()
    for name in ("RMSNorm", "NormedRotary", "GatedMLP", "LanguageModel.forward", "get_init_std"):
        part = source[name]
        assert part["text"].splitlines() == lines[part["start"] - 1 : part["end"]]
        assert name.split(".")[-1] in part["text"].splitlines()[0]


def test_the_kernels_are_the_assembled_text():
    page = CHECKOUT / "page"
    text = (page / "kernels.wat").read_text(encoding="utf-8")
    assert (page / "kernels.wasm").read_bytes() == wasmtime.wat2wasm(text)


# The scripts -------------------------------------------------------------------------------------

TEMPLATE = """<p>{{ csp }}</p><style>{{ style }}</style>
<script>{{ engine }}</script><script>{{ app }}</script>{{ data }}{{ title }}"""
MODULES = {
    "index.html.jinja": TEMPLATE,
    "style.css": "p > a { color: red }",
    "worker.js": 'import { a } from "./a.js";\nexport class Worker {}\n',
    "a.js": 'import { b } from "./b.js";\nexport const a = b;\nconst { own } = a;\n',
    "b.js": "export async function b() {}\n",
    "main.js": 'import { b } from "./b.js";\nimport {\n  v,\n} from "./views/v.js";\nv(b);\n',
    "views/v.js": 'import { a } from "../a.js";\nexport function v() { return a && "<p>"; }\n',
}


@pytest.fixture
def write_modules(tmp_path, monkeypatch):
    """Return a function that writes modules in place of the page's; keywords change them."""
    directory = tmp_path / "page"
    monkeypatch.setattr(html, "PAGE", directory)

    def write_modules(**changes: str) -> None:
        for name, text in {**MODULES, **changes}.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")

    return write_modules


def test_modules_are_joined_once_in_the_order_of_their_imports(write_modules):
    write_modules()
    engine, app = re.findall("<script>(.*?)</script>", html.render_page("t", []), re.DOTALL)
    assert engine.split("\n\n") == [
        "async function b() {}",
        "const a = b;\nconst { own } = a;",
        "class Worker {}\n",
    ]
    assert app.split("\n\n") == ['function v() { return a && "<p>"; }', "v(b);\n"]


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"views/v.js": "export function v() {}\nconst own = 1;\n"}, "own"),
        ({"b.js": "export default function b() {}\n"}, "export default"),
        ({"b.js": 'export { b } from "./c.js";\n'}, "export {"),
        ({"main.js": 'import * as b from "./b.js";\n'}, "import *"),
        ({"main.js": 'import { a as c } from "./a.js";\n'}, "a as c"),
        ({"b.js": 'import { a } from "./a.js";\nexport function b() {}\n'}, "circle"),
        ({"b.js": 'export const b = "</ScRipt>";\n'}, "</ScRipt"),
        ({"style.css": "/* </style> */"}, "</style"),
    ],
)
def test_a_module_that_cannot_be_joined_is_named(write_modules, changes, fact):
    write_modules(**changes)
    with pytest.raises(RuntimeError, match=re.escape(fact)):
        html.render_page("t", [])


# Weights -----------------------------------------------------------------------------------------


@for_each_variant
@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp32"])
def test_the_weights_come_back_bit_for_bit(save_model, variant, dtype):
    bundle = save_model(**VARIANTS[variant])
    page = run_export(bundle, f"--dtype={dtype}")
    source = load_source(bundle)
    (checkpoint,) = page.get_model()["checkpoints"]
    found = page.load(checkpoint)
    assert_equal(found, html.create_tensors(source, dtype))
    assert html.read_tensors(page.path.parent)[0] == page.get_model()["dtype"] == dtype
    restored = html.restore_weights(found)
    before = load_file(bundle / "model.safetensors")
    assert restored.keys() == before.keys()
    for name, tensor in before.items():
        assert restored[name].dtype == torch.float32
        is_matrix = dtype == "int8" and name.startswith("blocks.") and tensor.dim() == 2
        assert is_matrix == (found[name].dtype == torch.int8) == (f"{name}.scale" in found)
        if is_matrix:
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127
            assert torch.all((restored[name] - tensor).abs() <= 0.5001 * scale)
        elif dtype == "fp32":
            assert torch.equal(restored[name], tensor)
        else:
            assert torch.equal(restored[name], tensor.half().float())


@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp32"])
def test_a_model_of_the_restored_weights_differs_by_less_than_verify_allows(save_model, dtype):
    from exporters.verify import MAX_DIFFERENCES

    source = load_source(save_model())
    restored = html.restore_weights(html.create_tensors(source, dtype))
    model = LanguageModel(source.config, source.bundle.vocab_size).eval()
    model.load_safetensors(save(restored))
    ids = torch.randint(0, len(TEXT), (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = source.model(ids)[0], model(ids)[0]
    assert (ours - theirs).abs().max() <= 0.7 * MAX_DIFFERENCES[dtype] * ours.std()


def test_a_weight_that_overflows_in_half_precision_is_an_error(tmp_path, capsys):
    save_random_model(tmp_path / "model", CharTokenizer(sorted(set(TEXT))), std=1e6, **SHAPE)
    for dtype in ("fp16", "int8"):
        fail(export.main, tmp_path / "model", "--format=html", f"--dtype={dtype}", "--out=out")
        assert "fp32" in capsys.readouterr().err
    assert not Path("out").exists()


def test_inspect_model_finds_one_changed_weight(save_model, capsys):
    bundle = save_model()
    page = run_export(bundle).path
    verify = [str(bundle), f"--verify={page.parent}"]
    assert run_command(inspect_model.main, verify) == 0
    content = page.read_bytes()
    middle = content.index(b"folio-weights-0-0") + 100_000
    changed = b"A" if content[middle : middle + 1] != b"A" else b"B"
    page.write_bytes(content[:middle] + changed + content[middle + 1 :])
    capsys.readouterr()
    assert run_command(inspect_model.main, verify) == 1
    printed = capsys.readouterr().out
    assert f"{page.name} was changed" in printed and "differs" in printed
    (page.parent / "export.json").unlink()
    fail(inspect_model.main, bundle, f"--verify={page}", status=1)
    page.write_bytes(content)
    assert run_command(inspect_model.main, [str(bundle), f"--verify={page}"]) == 0
    for cut in (100, content.index(b'"folio-page"') + 500, middle):
        page.write_bytes(content[:cut])
        fail(inspect_model.main, bundle, f"--verify={page}")


# The model's data --------------------------------------------------------------------------------


@for_each_variant
def test_the_page_has_the_shape_of_the_model(save_model, variant):
    bundle = save_model(**VARIANTS[variant])
    model, source = run_export(bundle).get_model(), load_source(bundle)
    names = "architecture block_size activation bias tie_weights rope_theta ngram_rows"
    for name in names.split():
        assert model["config"][name] == getattr(source.config, name)
    assert model["config"]["hidden"] == source.weights["blocks.0.mlp.expand.weight"].size(0)
    assert model["num_tokens"] == len(model["tokenizer"]["chars"]) == len(TEXT)
    assert (model["curve"], model["overfitting"], model["memorization"]) == (None, None, None)
    assert model["memorization_reason"]


def decode_bpe(tokenizer: dict, text: str) -> list[int]:
    """Return the ids of a word by merging pairs in the order of their ranks."""
    tokens = tokenizer["tokens"]
    ids = {token: number for number, token in enumerate(tokens)}
    ranks = {tuple(pair): rank for rank, pair in enumerate(tokenizer["merges"])}
    word = [ids[char] for char in text]
    while len(word) > 1:
        rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(word)))
        if rank == len(ranks):
            break
        word[i : i + 2] = [ids[tokens[word[i]] + tokens[word[i + 1]]]]
    return word


def test_a_bpe_has_its_tokens_and_its_merges_as_ids(save_model):
    ours = create_tokenizer(LINES * 3 + FAMILY * 3, "bpe", 300)
    model = run_export(save_model(ours, n_embd=8)).get_model()
    assert model["tokenizer"]["kind"] == "bpe" and model["tokenizer"]["unit"] == "token"
    assert len(model["tokenizer"]["tokens"]) == model["num_tokens"] == 300
    for word in ("question", "the", "outrageous", "xyzzy"):
        assert decode_bpe(model["tokenizer"], word) == ours.encode(word).tolist()


def test_gpt2s_vocabulary_has_no_rows_of_padding(gpt2_vocabulary, save_model):
    ours = GPT2Tokenizer()
    bundle = save_model(ours, n_embd=8, n_layer=1)
    page = run_export(bundle)
    model = page.get_model()
    assert len(model["tokenizer"]["tokens"]) == model["num_tokens"] == 50_257
    assert len(model["tokenizer"]["merges"]) == 50_000
    for word in ("question", "outrageous", "ĠShakespeare"):
        text = word.replace("Ġ", " ")
        assert decode_bpe(model["tokenizer"], word) == ours.encode(text).tolist()
    tensors = page.load(model["checkpoints"][0])
    assert len(tensors["token_embedding.weight"]) == len(tensors["head.weight"]) == 50_257
    assert run_command(inspect_model.main, [str(bundle), f"--verify={page.path}"]) == 0


def test_the_page_has_the_run_s_curve_and_the_facts_of_the_card(trained):
    page = run_export(trained)
    model, state = page.get_model(), read_bundle(trained / "artifacts" / "export").state
    assert model["run_id"] == trained.name
    assert dict(map(tuple, model["curve"]["val"]))[state.step] == state.val_loss
    assert len(model["curve"]["train"]) == len(model["curve"]["val"]) >= 3
    facts = dict(map(tuple, model["card"]["facts"]))
    assert facts["Text"].startswith("comedy.txt") and facts["Seed"] == "1337"
    text = (page.path.parent / "README.md").read_text(encoding="utf-8")
    assert facts["SHA-256 of the text"] in text and page.path.name in text
    assert model["card"]["sample"].strip() in text


def test_a_long_curve_is_thinned_to_its_ends_and_200_points():
    class Run:
        def get_points(self, tag):
            return [(step, step / 7) for step in range(10_001)]

    points = page_data.list_points(Run(), "tag")
    assert (len(points), points[0][0], points[-1][0]) == (200, 0, 10_000)


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "steps"),
    [(1, [6]), (2, [0, 6]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (7, [0, 1, 2, 3, 4, 5, 6])],
)
def test_checkpoints_are_the_best_the_first_and_others_at_equal_distances(trained, count, steps):
    page = run_export(trained, "--last", f"--checkpoints={count}")
    model = page.get_model()
    assert [each["step"] for each in model["checkpoints"]] == steps
    assert model["shown"] == len(steps) - 1
    evaluated = dict(map(tuple, model["curve"]["val"]))
    for checkpoint in model["checkpoints"]:
        step, tensors = checkpoint["step"], page.load(checkpoint)
        assert checkpoint["val_loss"] == evaluated.get(step)
        assert (checkpoint["kind"] == "initial") == (step == 0)
        if step:
            bundle = trained / "artifacts" / "checkpoints" / f"step_{step:08}"
            assert_equal(tensors, html.create_tensors(load_source(bundle), "fp16"))


def test_the_exported_step_is_shown_and_each_says_what_it_is(trained):
    bundle = trained / "artifacts" / "checkpoints" / "step_00000003"
    model = run_export(bundle, "--checkpoints=3").get_model()
    found = [(each["step"], each["kind"]) for each in model["checkpoints"]]
    assert found == [(0, "initial"), (3, "checkpoint"), (6, "best")]
    assert model["shown"] == 1


def test_a_model_of_another_program_is_one_checkpoint_without_a_run(save_model, tmp_path):
    words = [str(save_model()), "--format=hf", f"--out={tmp_path / 'hf'}"]
    assert run_command(export.main, words) == 0
    words = [str(tmp_path / "hf"), f"--out={tmp_path / 'imported'}"]
    assert run_command(import_model.main, words) == 0
    model = run_export(tmp_path / "imported", "--checkpoints=5").get_model()
    assert len(model["checkpoints"]) == 1
    assert model["run_id"] is model["curve"] is None


def test_step_0_is_the_initialization_of_the_run(trained, tiny, quiet, monkeypatch):
    initial = []

    def keep(trainer, *_):
        initial.append({name: t.clone() for name, t in trainer.model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run_loop", keep)
    data = json.loads((trained / "meta" / "full_config.json").read_bytes())["config"]["data"]
    with pytest.raises(KeyboardInterrupt):
        train(tiny(data=data, max_iters=6, eval_interval=2, keep_every=1), output=quiet)
    page = run_export(trained, "--checkpoints=2", "--dtype=fp32")
    assert_equal(page.load(page.get_model()["checkpoints"][0]), initial[0])


def test_a_model_that_did_not_train_from_scratch_has_no_step_0(trained, tiny, quiet, capsys):
    fine = train(
        tiny(init_from=str(trained), max_iters=2, eval_interval=1, keep_every=1), output=quiet
    ).run_dir
    model = run_export(fine, "--checkpoints=9").get_model()
    assert [each["step"] for each in model["checkpoints"]] == [1, 2]
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "--keep-every" in each]
    assert "2 of 9" in line


def test_a_damaged_checkpoint_or_one_of_another_shape_is_left_out(trained, tiny, quiet):
    other = train(tiny(n_embd=32, max_iters=6, keep_every=1), output=quiet).run_dir
    bundles, others = list_checkpoints(trained), list_checkpoints(other)
    (bundles[0] / "config.json").write_text("{}", encoding="utf-8")
    for path in bundles[1].iterdir():
        path.write_bytes((others[1] / path.name).read_bytes())
    model = run_export(trained, "--last", "--checkpoints=9").get_model()
    assert [each["step"] for each in model["checkpoints"]] == [0, 3, 4, 5, 6]


def test_a_second_model_is_in_the_page_with_its_own_vocabulary(trained, save_model):
    other = save_model(CharTokenizer(list("abc")), "other", n_embd=8)
    page = run_export(trained, f"--with={other}", "--checkpoints=2")
    one, two = page.data["models"]
    assert (one["name"], two["name"]) == (trained.name, "other")
    assert (len(one["checkpoints"]), len(two["checkpoints"])) == (2, 1)
    assert_equal(page.load(two["checkpoints"][0]), html.create_tensors(load_source(other), "fp16"))
    again = run_export(other, f"--with={other}", out="again")
    assert [model["name"] for model in again.data["models"]] == ["other", "other-2"]
    fail(export.main, trained, "--format=html", "--with=nowhere", "--out=third")
    assert not Path("third").exists()


# Memorization ------------------------------------------------------------------------------------


def list_units(text: str) -> list[int]:
    content = text.encode("utf-16-le", "surrogatepass")
    return [content[i] + 256 * content[i + 1] for i in range(0, len(content), 2)]


def hash_plainly(units: list[int]) -> int:
    """Return the hash of a stretch, in integers of Python."""
    mask, found = 2**32 - 1, 0
    for unit in units:
        found = (found * 0x01000193 + unit) & mask
    found ^= found >> 16
    found = (found * 0x85EBCA6B) & mask
    found ^= found >> 13
    found = (found * 0xC2B2AE35) & mask
    return found ^ (found >> 16)


def read_hashes(memorization: dict) -> list[int]:
    """Return the hashes of a page."""
    hashes, number, shift, previous = [], 0, 0, 0
    for byte in base64.b64decode(memorization["hashes"], validate=True):
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            previous += number
            hashes.append(previous)
            number = shift = 0
    assert shift == 0
    return hashes


def make_text(size: int) -> str:
    """Return a text without repetitions, with characters of one and two code units."""
    codes = np.random.default_rng(size).integers(97, 123, size)
    return "".join(map(chr, codes)).replace("q", "👩").replace("z", "\ud800")


def test_the_hashes_are_those_of_plain_python():
    text = make_text(3000)
    found, units = ngrams.create_memorization(text), list_units(text)
    assert (found["length"], found["stride"], found["guaranteed_length"]) == (16, 1, 16)
    assert found["characters"] == len(units) > len(text)
    expected = {hash_plainly(units[p : p + 16]) for p in range(len(units) - 15)}
    assert read_hashes(found) == sorted(expected) and found["count"] == len(expected)


@pytest.mark.parametrize("budget", [100, 400, 4000])
def test_hashes_keep_the_budget_and_a_stretch_of_the_sure_length_is_always_found(
    monkeypatch, budget
):
    monkeypatch.setattr(ngrams, "MAX_BYTES", budget)
    text = make_text(5000)
    found, units = ngrams.create_memorization(text), list_units(text)
    array = np.array(units, dtype=np.uint16)
    assert len(base64.b64decode(found["hashes"])) <= budget
    assert len(ngrams.compress(ngrams.hash_stretches(array, found["stride"] - 1))) > budget
    hashes, surely = set(read_hashes(found)), found["guaranteed_length"]
    assert surely == 16 + found["stride"] - 1
    for start in range(0, len(units) - surely + 1):
        stretch = units[start : start + surely]
        starts = range(0, surely - 15)
        assert any(hash_plainly(stretch[p : p + 16]) in hashes for p in starts), start


@pytest.mark.parametrize("size", [16, 17, 31, 32])
def test_the_shortest_texts_have_hashes(size):
    text = "abcdefghijklmnopqrstuvwxyz0123456789"[:size]
    assert ngrams.create_memorization(text)["count"] == size - 15


@pytest.mark.parametrize("number", [0, 1, 127, 128, 16383, 16384, 2**21, 2**28, 2**32 - 1])
def test_a_difference_of_any_size_is_compressed(number):
    hashes = np.array(sorted({number, 2**32 - 1}), dtype=np.uint32)
    content = base64.b64encode(ngrams.compress(hashes))
    assert read_hashes({"hashes": content}) == hashes.tolist()


def test_the_hashes_of_a_page_are_those_of_the_training_text(trained):
    model = run_export(trained).get_model()
    found = model["memorization"]
    text = load_source(trained / "artifacts" / "export").tokenizer.decode(
        card.read_training_tokens(load_source(trained / "artifacts" / "export"))
    )
    assert found == ngrams.create_memorization(text) and model["memorization_reason"] == ""
    assert hash_plainly(list_units("To be, or not to be"[:16])) in read_hashes(found)


def test_without_hashes_the_page_says_why(trained, tmp_path):
    model = run_export(trained, "--no-memorization").get_model()
    assert model["memorization"] is None and "--no-memorization" in model["memorization_reason"]
    (tmp_path / "home" / "alighieri" / "comedy.txt").unlink()
    model = run_export(trained, out="again").get_model()
    assert model["memorization"] is None and "no such file" in model["memorization_reason"]


def test_a_text_that_cannot_be_read_is_named_without_its_path(trained, monkeypatch):
    def fail(paths, size):
        raise UserError(f"{paths[0]}: incomplete or damaged .gz file")

    monkeypatch.setattr(card, "has_bytes", fail)
    reason = run_export(trained).get_model()["memorization_reason"]
    assert reason and "alighieri" not in reason


@pytest.mark.slow
def test_a_text_of_50_million_characters_keeps_the_budget():
    units = np.random.default_rng(0).integers(97, 123, 50_000_000).astype(np.uint8)
    found = ngrams.create_memorization(units.tobytes().decode("ascii"))
    size = len(base64.b64decode(found["hashes"]))
    assert 0.98 * ngrams.MAX_BYTES <= size <= ngrams.MAX_BYTES
    assert 250 <= found["stride"] <= 400


# The command -------------------------------------------------------------------------------------


def test_the_default_is_fp16_and_other_dtypes_are_in_the_name_of_the_directory(save_model):
    bundle = save_model(n_embd=8)
    for words in ([], ["--dtype=fp16", "--overwrite"], ["--dtype=int8"], ["--dtype=fp32"]):
        assert run_command(export.main, [str(bundle), "--format=html", *words]) == 0
    names = sorted(path.name for path in Path("exports").iterdir())
    assert names == ["model-html", "model-html-fp32", "model-html-int8"]


@pytest.mark.parametrize(
    "words", [["--checkpoints=2"], ["--with=model"], ["--no-memorization"], ["--force"], ["--open"]]
)
def test_a_flag_of_pages_is_an_error_with_another_format(save_model, words, capsys):
    fail(export.main, save_model(n_embd=8), "--format=hf", "--out=out", *words)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words[0].split("=")[0].removeprefix("--no-") in line and "html" in line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--checkpoints=0"], "--checkpoints"),
        (["--dtype=bf16"], "fp16, int8, fp32"),
        (["--dtype=q8_0"], "fp16, int8, fp32"),
        (["--with"], "--with"),
    ],
)
def test_a_wrong_setting_is_one_line_and_nothing_is_written(save_model, words, fact, capsys):
    fail(export.main, save_model(n_embd=8), "--format=html", "--out=out", *words)
    assert fact in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("out").exists()


def test_a_large_page_needs_force_and_a_huge_one_is_refused(save_model, monkeypatch, capsys):
    bundle = save_model()
    monkeypatch.setattr(html, "LARGE_PAGE", 100_000)
    fail(export.main, bundle, "--format=html", "--out=out")
    error = capsys.readouterr().err
    assert "--force" in error and "KB" in error
    assert not Path("out").exists()
    run_export(bundle, "--force")
    monkeypatch.setattr(html, "MAX_PAGE", 200_000)
    fail(export.main, bundle, "--format=html", "--out=again", "--force")
    error = capsys.readouterr().err
    assert "--force" not in error and "int8" in error
    assert not Path("again").exists()


def test_a_model_that_a_browser_cannot_hold_is_refused(save_model, monkeypatch, capsys):
    bundle = save_model()
    limit = html.count_numbers(load_source(bundle))
    monkeypatch.setattr(html, "MAX_NUMBERS", limit)
    run_export(bundle)
    monkeypatch.setattr(html, "MAX_NUMBERS", limit - 1)
    fail(export.main, bundle, "--format=html", "--out=again", "--force")
    assert "memory" in capsys.readouterr().err
    assert not Path("again").exists()


def test_open_opens_the_page_and_names_it_if_there_is_no_browser(save_model, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) is None)
    page = run_export(save_model(n_embd=8), "--open").path
    assert opened == [page.resolve().as_uri()]
    assert page.name not in capsys.readouterr().err
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    page = run_export(save_model(n_embd=8), "--open", out="again").path
    assert str(page) in capsys.readouterr().err.splitlines()[-1]


def test_verify_without_chromium_is_an_error_before_any_work(save_model, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_chromium", lambda: None)
    fail(export.main, save_model(n_embd=8), "--format=html", "--out=out", "--verify")
    assert "FOLIO_CHROMIUM" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_failure_leaves_the_older_page(save_model, monkeypatch, capsys):
    bundle = save_model(n_embd=8)
    page = run_export(bundle).path
    before = read_all(page.parent)
    words = [str(bundle), "--format=html", "--out=out"]
    fail(export.main, *words)
    assert "--overwrite" in capsys.readouterr().err

    def fill_disk(path, data):
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def interrupt(path, data):
        raise KeyboardInterrupt

    for strike, status in ((fill_disk, 1), (interrupt, 130)):
        monkeypatch.setattr(html, "write_durable", strike)
        fail(export.main, *words, "--overwrite", status=status)
        assert read_all(page.parent) == before
        assert [path.name for path in Path.cwd().iterdir()] == ["out"]


# The report --------------------------------------------------------------------------------------


def find_links(path: Path) -> list[Path]:
    text = path.read_text(encoding="utf-8")
    return [(path.parent / link).resolve() for link in re.findall(r'href="([^"]+)"', text)]


def test_the_report_of_a_run_links_to_its_pages(trained):
    path = trained / "report.html"
    assert find_links(path) == []
    assert run_command(export.main, [str(trained), "--format=hf"]) == 0
    assert find_links(path) == []
    elsewhere = run_export(trained, out="a b").path.resolve()
    assert [str(link).replace("%20", " ") for link in find_links(path)] == [str(elsewhere)]
    assert run_command(export.main, [str(trained), "--format=html"]) == 0
    page = Path("exports", f"{trained.name}-html", f"{trained.name}.html").resolve()
    assert find_links(path) == [page]
    path.unlink()
    assert run_command(report.main, [str(trained)]) == 0
    assert find_links(path) == [page]


def test_no_report_is_made_for_a_run_without_one(trained):
    (trained / "report.html").unlink()
    run_export(trained)
    assert not (trained / "report.html").exists()
