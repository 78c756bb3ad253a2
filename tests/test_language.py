"""The language of the code: names of functions, docstrings and comments.

python -m pytest tests/test_language.py
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import CHECKOUT

PACKAGES = ("utils", "exporters")
FILES = sorted(
    [*CHECKOUT.glob("*.py"), *(each for p in PACKAGES for each in (CHECKOUT / p).rglob("*.py"))]
)
RELATIVE_START = re.compile(r"(What|Whoever|Where)\b")  # "Where ..." for a noun
VERBS = set(
    "abort accept add advance agree align allocate append apply ask attend average await "
    "activate broadcast build call cancel capture change check choose claim clean clear clip close "
    "collect combine compare compile complete compress compute conclude configure connect "
    "construct continue convert copy count create cut decode decompress defer delete derive "
    "describe detect disable discard divide draw drop embed enable encode ensure enter escape "
    "estimate evaluate exclude execute exit expand export extend extract fail fetch fill filter "
    "find finish fit fix flatten flush fold format free freeze gather generate get glob group "
    "guess handle has hash hide hold ignore import include index infer init initialize insert "
    "inspect install interpolate invert is iter iterate join keep kill launch limit link list "
    "load lock log make map mark mask match measure merge migrate move multiply normalize "
    "notify number observe offset open order orthogonalize override pack pad parse pass patch "
    "pause perform permute pick plan plot pluralize poll pop predict prefill prepare preserve "
    "print process profile prompt propose prune publish pull push put quantize query queue quiet "
    "quote raise read rebuild receive record redirect reduce refresh register release reload "
    "remove rename render reopen repeat replace reply report request require reset reshape resize "
    "resolve restart restore resume retry return reuse rewrite rotate round run sample sanitize "
    "save scale scan schedule score search select send serialize set settle shard share show sift "
    "shuffle shut sign skip slice smooth sort split spool stack start step stop store stream "
    "strip submit subscribe subtract suggest sum suppress swap sync synchronize take terminate "
    "test tie time tokenize trace track train transform translate transpose trim truncate try "
    "tune unescape unlock unpack unwrap update upgrade use validate verify visit wait walk warn "
    "watch work wrap write yield".split()
)
# Conversions and collectives are named as in Python and PyTorch: from_x, to_x, as_x, all_reduce_x.
VERBS |= {"from", "to", "as", "all"}
NAMES = {
    *("main", "forward", "backward", "dry_run", "training_step", "autocast", "learning_rate_at"),
    *("error", "astype", "isatty"),  # overrides methods of argparse, numpy and files
    *("after_step", "after_evaluation", "at_end"),  # the hooks of a callback
    "history",  # of a run's result, as Keras calls it
}


def name_of(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


for_each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def find_public_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield module-level functions and methods of module-level classes, but no properties."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from find_public_functions(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = " ".join(ast.unparse(each) for each in child.decorator_list)
            is_property = "property" in decorators or ".setter" in decorators
            if not child.name.startswith("_") and not is_property:
                yield child


@for_each_file
def test_the_name_of_every_public_function_starts_with_a_verb(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [
        f"{node.name} (line {node.lineno})"
        for node in find_public_functions(tree)
        if node.name not in NAMES and node.name.split("_")[0] not in VERBS
    ]
    assert not wrong


@for_each_file
def test_no_docstring_or_comment_starts_with_what_whoever_or_where(path):
    source = path.read_text(encoding="utf-8")
    wrong = [
        f"line {node.lineno}: {node.value.value.splitlines()[0]}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and RELATIVE_START.match(node.value.value.strip())
    ]
    wrong += [
        f"line {token.start[0]}: {token.string}"
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and RELATIVE_START.match(token.string.lstrip("#: "))
    ]
    assert not wrong
