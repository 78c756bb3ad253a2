"""inspect_model.py: what is said of one model, of two, and of all.

python -m pytest tests/test_inspect_model.py
"""

import json
import re
from pathlib import Path

import pytest
from helpers import save_bundle

import inspect_model
from bundle import Ancestor
from start import plan_run
from train import train
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


def test_with_no_model_named_all_are_listed_the_lowest_val_loss_first(models, show):
    lines = show().splitlines()
    assert lines[0].split() == "model val loss step parameters size saved text".split()
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


def test_where_there_is_nothing_yet_it_says_how_to_begin(show):
    assert "No models yet: train one with" in show()


def test_one_model_is_described_in_full(models, show):
    text = show("--model-name", "dante")
    for words in (
        "checkpoints/dante",
        "gpt2: 1 layer, 2 heads, 8 channels, context 4, vocabulary 3",
        "token_embedding 24, position_embedding 32, attention 256, mlp 512, norms 24",
        'char: 3 characters: "abc"',
        "step 7 of 880, val loss 1.5000, best 1.5000 at step 7; with optimizer state",
        "run r, begun at step 0",
        "learning_rate 0.003",
    ):
        assert words in text, words
    assert text.splitlines()[-3:] == [
        "lineage       dante, step 7",
        "              └── mother, step 3: weights aaaaaaaaaaaa…, text bbbbbbbbbbbb…",
        "                  └── grandmother, step 9: weights aaaaaaaaaaaa…, text unknown…",
    ]


@pytest.mark.parametrize("reference", ["dante", "checkpoints/dante", "./checkpoints/dante/"])
def test_a_model_may_be_named_without_a_flag(models, show, reference):
    assert show(reference) == show("--model-name", "dante")


def test_a_run_is_its_best_model_or_else_its_newest(models, show):
    assert "step 4 of" in show("--run", "20260101_000000")
    assert "step 9 of" in show("--run", "runs/20260102_000000")


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


def test_two_models_are_shown_side_by_side_by_what_differs(models, show):
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
    with pytest.raises(UserError, match=r"virgil/model\.safetensors: "):
        inspect_model.main(["virgil"])
    Path("checkpoints/virgil/config.json").write_text("{", encoding="utf-8")
    assert inspect_model.main([]) == 0
    shown = capsys.readouterr()
    assert "warning: checkpoints/virgil/config.json: not the file" in shown.err
    assert "checkpoints/dante" in shown.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nobody"], "nobody: no such model"),
        (
            ["--model-name", "nobody"],
            "nobody: no such named model; there are: dante, virgil",
        ),
        (["--run", "20260103_000000"], "this run has saved no model yet"),
        (["--model-name"], "--model-name needs a value"),
        ([""], "MODEL needs a value"),
        (["--modle-name", "x"], "unknown flag --modle-name; did you mean --model-name?"),
        (["."], "not a Folio model: training_state.json is not there"),
    ],
)
def test_a_users_mistake_is_one_clear_line(models, flags, words):
    with pytest.raises(UserError) as caught:
        inspect_model.main(flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_is_there_from_step_0_on(tiny, quiet, show):
    loaded, start = plan_run(tiny(model_name="dante").model_dump(exclude_unset=True))
    train(loaded.config, loaded=loaded, start=start, output=quiet)
    assert "step 6 of 6, val loss" in show("dante")
