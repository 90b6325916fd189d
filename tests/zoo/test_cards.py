"""Cards and README's table say what the weights' metadata says."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

import zoo
from tests.cli_runs import ROOT
from tests.zoo.example_weights import metadata
from zoo import cards
from zoo._weights import Weights

pytestmark = [
    # LightningCLI's own use of jsonargparse.
    pytest.mark.filterwarnings(
        r"ignore:\s*(By default only one Jsonargparse|.*was deprecated in v4):DeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden by:UserWarning"),
]


def weights(name: str, **changes: Any) -> Weights:
    arch, _, tag = name.partition(".")
    return Weights(name, arch, tag, Path(f"{name}.safetensors"), metadata(name, **changes))


def measured(accuracy: float) -> dict[str, float]:
    return {"test_accuracy": accuracy, "test_loss": 0.25, "val_accuracy": 0.5, "val_loss": 1.5}


def test_cards_and_table_in_the_repository_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert cards.main(["--check"]) == 0, capsys.readouterr().err


def test_every_card_and_recipe_is_of_weights_that_are_there() -> None:
    names = zoo.list_models(pretrained=True)
    assert {path.stem for path in cards.CARDS.glob("*.md")} == set(names)
    for name in names:
        data = zoo.get_weights(name).metadata
        assert data["recipe"] == f"zoo/recipes/{name}.yaml"
        assert (ROOT / data["recipe"]).is_file()


def test_a_card() -> None:
    search = {"chosen": "TTFF", "tied": ["TTTF", "TTFF"], "losses": {"TTFF": 0.3, "TFFF": 0.1, "TTTF": 0.2}}
    one = weights("gru_bln.imdb", metrics=measured(0.87654), flags="TTFF", flag_search=search)
    other = weights("gru_ln.imdb", metrics=measured(0.5), flags=None)
    stranger = weights("gru_recurrent_bln.imdb", metrics=measured(0.25), flags="TTFF")
    text = cards.card(one, [one, other, stranger])
    assert text.startswith("# gru_bln.imdb\n")
    assert "**87.65 % test accuracy** (loss 0.2500; validation 50.00 %, 1.5000)" in text
    assert "TTFF at inference. " in text
    assert "it is the default, one of 2 that cannot be told apart from the best of these, TTTF. All 16:" in text
    assert text.index("| TFFF | 0.1000 |") < text.index("| TTFF | 0.3000 |")
    assert "| gru_ln.imdb | Layer Normalization | 50.00 % | 0.2500 |" in text
    assert "gru_recurrent" not in text
    assert "flags" not in cards.card(other, [other])


def test_what_weights_began_with_and_learned_from() -> None:
    origin = {"start": "cnn_bln.digits", "teachers": ["cnn_bn.digits", "cnn_ln.digits"]}
    text = cards.card(weights("cnn_bln.digits", metrics=measured(1), **origin), [])
    assert "- It began with the weights [cnn_bln.digits](cnn_bln.digits.md)." in text
    twin = cards.card(weights("cnn_ln.digits", metrics=measured(1), start="cnn_bn.digits"), [])
    assert (
        "- It began with the weights [cnn_bn.digits](cnn_bn.digits.md), of the same network with other norms." in twin
    )
    assert "the outputs of [cnn_bn.digits](cnn_bn.digits.md) and [cnn_ln.digits](cnn_ln.digits.md) (know" in text
    text = cards.card(weights("cnn_bln.digits", metrics=measured(1), **origin, mirror_teachers=True), [])
    assert "(cnn_ln.digits.md), averaged over each image and its mirror image (knowledge distillation)." in text


def test_flags_that_are_better_by_more_than_chance() -> None:
    search = {"chosen": "TTTT", "tied": ["TTTT"], "losses": {"TTFF": 0.3, "TTTT": 0.2}}
    text = cards.card(weights("cnn_bln.digits", metrics=measured(1), flags="TTTT", flag_search=search), [])
    assert "TTTT at inference. " in text
    assert "it is the best of these. All 16:" in text


def test_the_table_has_a_row_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    text = cards.table([weights("cnn_bln.digits", metrics=measured(0.99), flags="TTFF", data="digits", epochs=3)])
    row = text.splitlines()[-1]
    assert row.startswith("| [cnn_bln.digits](zoo/cards/cnn_bln.digits.md) | digits | ")
    assert row.endswith("| TTFF | 3 | 99.00 % |")


def test_stale_cards_are_found_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "CARDS", tmp_path / "cards")
    monkeypatch.setattr(cards, "README", tmp_path / "README.md")
    cards.README.write_text(f"before\n{cards.START}\nold\n{cards.END}\nafter\n")
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "gone.x.md").write_text("of weights that are gone")
    assert cards.main(["--check"]) == 1
    assert cards.main([]) == 0
    assert cards.main(["--check"]) == 0
    assert not (tmp_path / "cards" / "gone.x.md").exists()
    readme = cards.README.read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    cards.README.write_text("no place")
    with pytest.raises(ValueError, match="must have a place for the table"):
        cards.main([])


@pytest.mark.parametrize("name", [n for n in zoo.list_models(pretrained=True) if n.endswith(".digits")])
def test_the_commands_on_a_card_give_its_accuracy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_bln.cli import lit

    text = (cards.CARDS / f"{name}.md").read_text()
    (command,) = [part for part in text.split("`") if part.startswith("lightning-bln test")]
    monkeypatch.chdir(ROOT)
    quiet = ("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
    _, subcommand, *arguments = shlex.split(command)
    ran = lit.BLNCLI(subcommand, [*arguments, *quiet])
    expected = zoo.get_weights(name).metadata["metrics"]
    assert float(ran.trainer.callback_metrics["test_accuracy"]) == pytest.approx(expected["test_accuracy"], abs=1e-6)
    assert float(ran.trainer.callback_metrics["test_loss"]) == pytest.approx(expected["test_loss"], rel=1e-5)
