"""inspect_model.py: the sections of one model, the comparison of several, the table of all.

python -m pytest tests/test_inspect_model.py
"""

import json
import re
from pathlib import Path

import pytest
from helpers import save_bundle, save_random_model

import inspect_model
from bundle import Ancestor
from config import ConfigLoader
from resume import plan_run
from tokenizer import create_tokenizer
from trainer import train
from utils.errors import UserError


@pytest.fixture
def models():
    """Two named models, one of them with ancestors, and three runs: two with a model."""
    mother = Ancestor(
        name="mother", step=3, weights_sha256="a" * 64, data_sha256="b" * 64, run_id="r"
    )
    grandmother = mother.model_copy(update={"name": "grandmother", "step": 9, "data_sha256": None})
    save_bundle(Path("checkpoints/dante"), step=7, lineage=[mother, grandmother])
    save_bundle(Path("checkpoints/virgil"), step=8, val_loss=None, best_val_loss=None)
    save_bundle(Path("runs/20260101_000000/artifacts/export"), step=4, val_loss=1.25)
    save_bundle(Path("runs/20260102_000000/artifacts/checkpoints/step_00000009"), step=9)
    Path("runs/20260103_000000/artifacts").mkdir(parents=True)


@pytest.fixture
def show(capsys):
    def run(*flags: str) -> str:
        assert inspect_model.main(list(flags)) == 0
        return capsys.readouterr().out

    return run


def test_all_models_are_listed_by_validation_loss(models, show):
    lines = show().splitlines()
    assert lines[0].split() == "model val loss step parameters size saved data".split()
    assert [line.split()[0] for line in lines[1:]] == [
        "runs/20260101_000000",
        "checkpoints/dante",
        "runs/20260102_000000",
        "checkpoints/virgil",
        "runs/20260103_000000",
    ]
    assert [line.split()[1] for line in lines[1:]] == ["1.2500", "1.5000", "1.5000", "–", "–"]
    assert re.search(r"\b4\s+(\d+)\s+[\d.]+ KB\s+\d+ seconds? ago", lines[1])
    assert "no model yet" in lines[5]


def test_without_models_the_command_that_trains_one_is_printed(show):
    assert "train.py" in show()


def read_sections(text: str) -> dict[str, dict[str, str]]:
    """Read `=== TITLE ===` and `key: value` lines; indented keys keep their indentation."""
    sections: dict[str, dict[str, str]] = {}
    for line in filter(None, text.splitlines()):
        if title := re.fullmatch("=== (.+) ===", line):
            rows = sections.setdefault(title[1], {})
        else:
            key, _, value = line.partition(":")
            assert key not in rows
            rows[key] = value.strip()
    return sections


def test_one_model_is_printed_as_sections_of_one_fact_a_line(models, show):
    info = json.loads(show("--model-name", "dante", "--json"))
    sections = read_sections(show("--model-name", "dante"))
    model, state = sections["MODEL"], sections["TRAINING STATE"]
    assert model["Path"] == "checkpoints/dante"
    assert model["Parameters"] == "848"
    parts = ("token_embedding", "position_embedding", "attention", "mlp", "norms")
    assert [model[f"  {part}"] for part in parts] == ["24", "32", "256", "512", "24"]
    config = {name: json.dumps(value).strip('"') for name, value in info["config"].items()}
    assert sections["MODEL CONFIG"] == config
    assert sections["TOKENIZER"]["token_kind"] == "char"
    assert sections["TOKENIZER"]["chars"] == "abc"
    assert state["Last recorded training step"] == "7"
    assert state["Validation loss"] == state["Best validation loss"] == "1.5000"
    assert sections["FILES"] == info["training_state"]["files"]


def test_n_gram_embeddings_are_a_part_of_the_parameters():
    settings = {"architecture": "speedrun", "n_embd": 8, "n_head": 2, "n_layer": 1}
    model = save_random_model(Path("model"), create_tokenizer("abc"), ngram_rows=50, **settings)
    counts = inspect_model.get_model_info("model")["parameters"]
    assert counts["ngram_embedding"] == 50 * 8
    assert counts["total"] == model.count_parameters()
    assert counts["total"] == sum(n for part, n in counts.items() if part != "total")


def test_every_entry_of_the_training_configuration_is_an_indented_line(models, show):
    info = json.loads(show("dante", "--json"))
    lines = show("dante").splitlines()
    first = lines.index("Training configuration:") + 1
    entries = info["training_state"]["training_config"]
    shown = [line.split(":")[0] for line in lines[first : first + len(entries)]]
    assert shown == [f"  {name}" for name in entries]
    for line in ("  max_iters: 1250", "  start_step: 0", "  learning_rate: 0.003", "  data: null"):
        assert line in lines


def test_the_lineage_is_listed_from_parent_to_oldest_ancestor(models, show):
    lineage = read_sections(show("dante"))["LINEAGE"]
    assert list(lineage) == ["mother", "grandmother"]
    for fact in ("step 3", "a" * 64, "b" * 64):
        assert fact in lineage["mother"]
    for fact in ("step 9", "unknown"):
        assert fact in lineage["grandmother"]
    assert "none" in read_sections(show("virgil"))["LINEAGE"]["Parent"]


@pytest.mark.parametrize("reference", ["dante", "checkpoints/dante", "./checkpoints/dante/"])
def test_a_model_may_be_named_without_a_flag(models, show, reference):
    assert show(reference) == show("--model-name", "dante")


def test_a_run_is_its_best_model_or_else_its_newest(models, show):
    assert "Last recorded training step: 4\n" in show("--run", "20260101_000000")
    assert "Last recorded training step: 9\n" in show("--run", "runs/20260102_000000")


def test_json_is_the_dict_of_get_model_info(models, show):
    info = json.loads(show("--model-name", "dante", "--json"))
    assert info["training_state"]["training_config"]["learning_rate"] == 0.003
    assert info["training_state"]["lineage"][1]["name"] == "grandmother"
    assert info["parameters"]["total"] == 848
    assert [m["training_state"]["step"] for m in json.loads(show("dante", "virgil", "--json"))] == [
        7,
        8,
    ]
    assert len(json.loads(show("--json"))) == 4


def test_a_comparison_shows_the_differences_side_by_side(models, show):
    lines = show("dante", "--run", "20260101_000000", "--model-name", "virgil").splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["step"] == ["8", "4", "7"]
    assert rows["val_loss"] == ["–", "1.25", "1.5"]
    assert "n_embd" not in rows
    assert "mother at 3 < grandmother at 9" in "\n".join(lines)
    assert show("dante", "dante").splitlines()[-1] == "no difference"


def test_a_damaged_model_is_named_and_the_others_are_still_listed(models, show, capsys):
    weights = Path("checkpoints/virgil/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"virgil/model\.safetensors"):
        inspect_model.main(["virgil"])
    Path("checkpoints/virgil/config.json").write_text("{", encoding="utf-8")
    assert inspect_model.main([]) == 0
    shown = capsys.readouterr()
    assert "checkpoints/virgil/config.json" in shown.err
    assert "checkpoints/dante" in shown.out


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["nobody"], ["nobody"]),
        (["--model-name", "nobody"], ["nobody", "dante", "virgil"]),
        (["--run", "20260103_000000"], ["20260103_000000"]),
        (["--model-name"], ["--model-name"]),
        ([""], ["MODEL"]),
        (["--modle-name", "x"], ["--modle-name", "--model-name"]),
        (["."], ["training_state.json"]),
    ],
)
def test_a_users_mistake_is_one_line_with_the_facts(models, flags, facts):
    with pytest.raises(UserError) as caught:
        inspect_model.main(flags)
    for fact in facts:
        assert fact in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trained_named_model_can_be_inspected(tiny, quiet, show):
    loaded, plan = plan_run(ConfigLoader(tiny(model_name="dante").model_dump(exclude_unset=True)))
    train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    assert "Last recorded training step: 6\n" in show("dante")
