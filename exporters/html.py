"""HTML: one page that runs the model in a browser, without a network and without another file.

The page is page/index.html.jinja with page/style.css, two scripts made of the ES modules of page/,
and blocks of data, which come last, so that a file that was cut off has lost weights only:

    folio-page           JSON: see page_data.py
    folio-kernels        page/kernels.wasm in base64
    folio-weights-M-K    the safetensors file of checkpoint K of model M, in base64
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from safetensors.torch import load, save
from torch import Tensor

from exporters.card import Card
from exporters.page_data import (
    describe_model,
    get_hidden_width,
    list_definitions,
    load_checkpoint,
    select_checkpoints,
)
from exporters.source import ExportSource
from utils.errors import UserError
from utils.files import find_only_file, read_regular, write_durable
from utils.output import format_bytes
from utils.quantization import quantize_rows

if TYPE_CHECKING:
    from exporters.browser import BrowserModel

PAGE = Path(__file__).resolve().parent.parent / "page"
ENGINE, APP = "worker.js", "main.js"
LARGE_PAGE = 100_000_000  # bytes of base64; more only with --force
MAX_PAGE = 500_000_000  # bytes of base64: V8's strings have at most 537 million characters
MAX_NUMBERS = 2**29  # of a model in memory, as in page/data.js: 2 GB
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.float16}  # of vectors
BINARY, JSON = "application/octet-stream", "application/json"
CLOSING = re.compile(r"</script|</style|<!--", re.IGNORECASE)  # would end an element
NAMES = r"\{\s*(?:[\w$]+\s*,\s*)*(?:[\w$]+\s*)?\}"
IMPORT = re.compile(rf'^import\s*{NAMES}\s*from\s*"(?P<path>\.\.?/[^"]+)";\n?', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?function\b|class\b|const\b)", re.MULTILINE)
DEFINITION = re.compile(
    r"^(?:async )?(?:function\*?|class|const|let|var) +([\w$]+|[\[{][^=]*)", re.MULTILINE
)


class DataBlock(NamedTuple):
    """An element `script` with data: its id, its media type and its text."""

    id: str
    type: str
    text: str


def check(source: ExportSource, dtype: str) -> None:
    """Raise `UserError` if a weight is too large for the dtype, or the model for a browser."""
    source.check_range(DTYPES[dtype], wider="fp32")
    if (numbers := count_numbers(source)) > MAX_NUMBERS:
        raise UserError(
            f"the model needs {format_bytes(4 * numbers)} of memory, and the page has "
            f"{format_bytes(4 * MAX_NUMBERS)}: choose a smaller model"
        )


def count_numbers(source: ExportSource) -> int:
    """Return how many numbers the page keeps in memory, as `countNumbers` of page/model.js does.

    Besides the parameters and the KV cache: a row of each matrix, and per token of the context the
    residual stream, queries, keys, values and so on, and the MLP's two vectors.
    """
    T, C, L = source.config.block_size, source.config.n_embd, source.config.n_layer
    F, V = get_hidden_width(source), source.model.vocab_size
    rows, cache, buffers = L * (4 * C + F), 2 * L * T * C, T * (7 * C + 2 * F)
    return source.model.count_parameters() + rows + cache + buffers + T + V


def write(
    source: ExportSource,
    directory: Path,
    dtype: str,
    name: str,
    *,
    cards: Sequence[Card],
    checkpoints: int,
    memorization: bool,
    force: bool,
    on_progress: Callable[[str], None],
) -> None:
    """Write the page into an empty directory. The same bytes each time.

    `cards` are those of the exported model, with up to `checkpoints` steps of its run, and of
    further models. `on_progress` is called with a line if the run has kept fewer.

    Raises `UserError` if the page would be too large.
    """
    counts = [checkpoints, *(1 for _ in cards[1:])]
    chosen = [
        select_checkpoints(card.source, card.run, count)
        for card, count in zip(cards, counts, strict=True)
    ]
    if len(chosen[0]) < checkpoints:
        on_progress(
            f"{name}: {len(chosen[0])} of {checkpoints} checkpoints are there: train.py "
            "--keep-every N keeps more of a run"
        )
    sizes = [count_bytes(create_tensors(card.source, dtype)) for card in cards]
    check_size(sum(size * len(own) for size, own in zip(sizes, chosen, strict=True)), force)
    models, blocks = [], []
    for number, (card, own) in enumerate(zip(cards, chosen, strict=True)):
        entries = []
        for index, checkpoint in enumerate(own):
            content = save(create_tensors(load_checkpoint(card.source, checkpoint), dtype))
            blocks.append(DataBlock(f"folio-weights-{number}-{index}", BINARY, to_base64(content)))
            entries.append(
                {
                    "step": checkpoint.step,
                    "kind": checkpoint.kind,
                    "train_loss": checkpoint.train_loss,
                    "val_loss": checkpoint.val_loss,
                    "weights": blocks[-1].id,
                    "bytes": len(content),
                }
            )
        # Only the first model's text is hashed: the page looks for copies by that model alone.
        hashes = memorization and number == 0
        models.append(describe_model(card, dtype, entries, memorization=hashes))
    data = {"format_version": 1, "models": models, "source": list_definitions()}
    blocks = [
        DataBlock("folio-page", JSON, to_json(data)),
        DataBlock("folio-kernels", BINARY, to_base64((PAGE / "kernels.wasm").read_bytes())),
        *blocks,
    ]
    write_durable(directory / f"{name}.html", render_page(name, blocks).encode("utf-8"))


def check_size(weights: int, force: bool) -> None:
    """Raise `UserError` if a page with so many bytes of weights is too large."""
    size = 4 * weights // 3  # in base64
    remedy = "choose --dtype int8, fewer --checkpoints or a smaller model"
    if size > MAX_PAGE:
        raise UserError(
            f"the page would have {format_bytes(size)}, and browsers hold no text of more than "
            f"{format_bytes(MAX_PAGE)}: {remedy}"
        )
    if size > LARGE_PAGE and not force:
        raise UserError(f"the page would have {format_bytes(size)}: {remedy}, or add --force")


# ----------------------------------------------------------------------------------------------
# The page


def render_page(title: str, blocks: Sequence[DataBlock]) -> str:
    """Return the page with its blocks of data."""
    engine = list_modules(ENGINE)
    app = [path for path in list_modules(APP) if path not in engine]
    check_names([*engine, *app])
    texts = {
        "style": (PAGE / "style.css").read_text(encoding="utf-8"),
        "engine": "\n".join(map(read_script, engine)),
        "app": "\n".join(map(read_script, app)),
    }
    for name, text in [*texts.items(), *((block.id, block.text) for block in blocks)]:
        if found := CLOSING.search(text):
            raise RuntimeError(f"{name} has {found[0]}, which ends an element of HTML")
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("index.html.jinja").render(
        title=title,
        csp=create_policy(**texts),
        data=[block._replace(text=Markup(block.text)) for block in blocks],
        **{name: Markup(text) for name, text in texts.items()},
    )


def create_policy(style: str, engine: str, app: str) -> str:
    """Return the Content Security Policy that allows these texts and no request at all."""
    hashes = {
        text: f"'sha256-{to_base64(hashlib.sha256(text.encode('utf-8')).digest())}'"
        for text in (style, engine, app)
    }
    return (
        f"default-src 'none'; script-src {hashes[engine]} {hashes[app]} 'wasm-unsafe-eval'; "
        f"worker-src blob:; style-src {hashes[style]}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def list_modules(entry: str) -> list[Path]:
    """Return the modules that an ES module imports, depth first, and itself last."""
    found: dict[Path, None] = {}

    def visit(path: Path, importing: tuple[Path, ...]) -> None:
        if path in importing:
            raise RuntimeError(f"{path}: modules import each other in a circle")
        for match in IMPORT.finditer(path.read_text(encoding="utf-8")):
            visit((path.parent / match["path"]).resolve(), (*importing, path))
        found[path] = None

    visit(PAGE / entry, ())
    return list(found)


def read_script(path: Path) -> str:
    """Return an ES module as a part of a script, without its imports and the word `export`."""
    text = EXPORT.sub("", IMPORT.sub("", path.read_text(encoding="utf-8")))
    if found := re.search(r"^(import|export)\b.*", text, re.MULTILINE):
        raise RuntimeError(f"{path}: {found[0]}: such an import or export is not supported")
    return text


def check_names(modules: Sequence[Path]) -> None:
    """Raise RuntimeError if two modules, which share a scope in the page, define the same name."""
    places: dict[str, Path] = {}
    for path in modules:
        for definition in DEFINITION.findall(read_script(path)):
            for name in re.findall(r"[\w$]+", definition):
                if places.setdefault(name, path) != path:
                    raise RuntimeError(f"{path} and {places[name]} both define {name}")


def to_base64(content: bytes) -> str:
    """Return bytes in base64, on one line."""
    return base64.b64encode(content).decode("ascii")


def to_json(data: Mapping[str, Any]) -> str:
    """Return JSON in ASCII without a character that means something in HTML."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


# ----------------------------------------------------------------------------------------------
# Tensors


def create_tensors(source: ExportSource, dtype: str) -> dict[str, Tensor]:
    """Return the tensors of a page by Folio's names, without the rows of padding ids.

    int8: the blocks' matrices, each with the scales of its rows as `NAME.scale`, float32; all else
    is float16.
    """
    matrices = source.model.get_block_matrices() if dtype == "int8" else {}
    tensors = {}
    for name, tensor in source.weights.items():
        if name in matrices:
            rounded, scale = quantize_rows(tensor.numpy())
            tensors[name] = torch.from_numpy(rounded)
            tensors[f"{name}.scale"] = torch.from_numpy(scale)
        else:
            has_vocab = name in ("token_embedding.weight", "head.weight")  # (V, C)
            rows = tensor[: source.tokenizer.num_tokens] if has_vocab else tensor
            tensors[name] = rows.to(DTYPES[dtype])
    return tensors


def restore_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the float32 weights with which the page computes, from those of `create_tensors`."""
    return {
        name: tensor * tensors[f"{name}.scale"][:, None]
        if tensor.dtype == torch.int8
        else tensor.float()
        for name, tensor in tensors.items()
        if not name.endswith(".scale")
    }


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of tensors in a file."""
    return sum(tensor.nbytes for tensor in tensors.values())


def read_tensors(place: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the dtype and the tensors of the model that was exported to a page.

    `place` is the page, or a directory with it. Raises OSError, ValueError or SafetensorError if
    it is none that an export could be.
    """
    page = read_regular(find_file(place))
    try:
        model = json.loads(find_block(page, "folio-page"))["models"][0]
        block = model["checkpoints"][model["shown"]]["weights"]
        dtype = next(dtype for dtype in DTYPES if dtype == model["dtype"])
    except (LookupError, TypeError, StopIteration) as error:
        raise ValueError(f"not a page of an export: {error!r}") from None
    return dtype, load(base64.b64decode(find_block(page, block), validate=True))


def find_block(page: bytes, name: str) -> bytes:
    """Return the text of a block of data. Raises ValueError if it is not there, or cut off."""
    _, opening, rest = page.partition(f'id="{name}">'.encode())
    text, closing, _ = rest.partition(b"</script>")
    if not opening or not closing:
        raise ValueError(f"{name} is missing or cut off")
    return text


def find_file(place: Path) -> Path:
    """Return a page itself, or the only one of a directory. Raises OSError if there is none."""
    return find_only_file(place, "*.html")


def open_export(directory: Path) -> "BrowserModel":
    """Open the page in Chromium. Raises ImportError if playwright is not installed."""
    from exporters.browser import BrowserModel  # late: its library is optional

    return BrowserModel(find_file(directory))
