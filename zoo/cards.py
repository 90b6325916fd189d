"""Cards of the trained weights, and the table of them in README.md, from the weights' own metadata.

python -m zoo.cards            write zoo/cards/*.md and the table
python -m zoo.cards --check    exit 1 if any of them says something else than the metadata
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo._registry import list_models
from zoo._weights import Weights, get_weights

CARDS = Path(__file__).parent / "cards"
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- zoo:start -->", "<!-- zoo:end -->"

_NORMS = {
    "bln": "Batch Layer Normalization",
    "bn": "Batch Normalization",
    "ln": "Layer Normalization",
    "gn": "Group Normalization",
}
_SOURCES = {
    "resnet20": "He, Zhang, Ren, Sun, [Deep Residual Learning for Image Recognition]"
    "(https://arxiv.org/abs/1512.03385), section 4.2",
    "cifarnet": "the network of Jordan, [94% on CIFAR-10 in 3.29 Seconds on a Single GPU]"
    "(https://arxiv.org/abs/2404.00498), section 3.1, with a first layer that is learned",
    "cnn": "three convolutions, for demonstrations",
    "gru": "a GRU with a norm after each layer, as in the [paper](https://arxiv.org/abs/2209.08898)",
    "gru_recurrent": "norms inside the gates, after Cooijmans et al., [Recurrent Batch Normalization]"
    "(https://arxiv.org/abs/1603.09025)",
    "paper_cnn": "the CNN of the [paper](https://arxiv.org/abs/2209.08898), as in its authors' code",
    "paper_lstm": "the LSTM of the [paper](https://arxiv.org/abs/2209.08898), as in its authors' code",
}
_ROOTS = {"cifar10": " --data.root FOLDER", "imdb": " --data.root FOLDER/aclImdb", "digits": ""}
_LIMITS = {
    "cifar10": "Trained and tested on 32x32 images of ten classes. Images of another size must be resized to 32x32 "
    "first.",
    "imdb": "Trained and tested on English film reviews of one site until 2011; of a longer review only the last words "
    "are read.",
    "digits": "A demonstration on 1797 images of 8x8 pixels.",
}
_JPEG = " The images are JPEG copies of quality 75, which costs some accuracy against the original files."


def card(weights: Weights, all_weights: Sequence[Weights]) -> str:
    """The Markdown card of one weights file.

    Args:
        weights: Whose card.
        all_weights: All of them, among which the twins are found.
    """
    data, name, tag = weights.metadata, weights.name, weights.tag
    family, _ = split(weights.arch)
    if family not in _SOURCES or dataset(tag) not in _ROOTS:
        raise ValueError(
            f"A card must say where an architecture comes from and what its data are, got {name!r}; add {family!r} to "
            f"_SOURCES, or {dataset(tag)!r} to _ROOTS and _LIMITS, in zoo/cards.py."
        )
    root = _ROOTS[dataset(tag)]
    metrics = data["metrics"]
    lines = [
        f"# {name}",
        "",
        f"{data['parameters']:,} parameters, {_norm(weights)}, trained on {data['data']}: "
        f"**{percent(metrics['test_accuracy'])} % test accuracy** (loss {metrics['test_loss']:.4f}; validation "
        f"{percent(metrics['val_accuracy'])} %, {metrics['val_loss']:.4f}); one seed, {data['epochs']} epochs.",
        "",
        f"Architecture: {_SOURCES[family]}.",
        "",
        "```python",
        "import zoo",
        "",
        f'model = zoo.create_model("{weights.arch}", weights="{tag}").eval()',
        f'transform = zoo.get_weights("{name}").transforms()',
        "```",
        "",
        "## Training",
        "",
        f"- Recipe: [{data['recipe']}](../../{data['recipe']}), seed {data['seed']}, {data['epochs']} epochs, torch "
        f"{data['torch']}, {data['date']}, commit {data['commit'][:12]}.",
        *_origin(data),
        f"- Classes, in the order of the outputs: {', '.join(data['classes'])}.",
        f"- In a checkout, again: `lightning-bln fit --config {data['recipe']}{root} --ckpt_path last`",
        f"- The test accuracy: `lightning-bln test --config {data['recipe']}{root} --model.weights {tag} --bln false`",
        f"- Stored as {data['dtype']}; the accuracy is that of the stored numbers, in batches of "
        f"{data['test_batch_size']}.",
        *_flags(data),
        *_twins(weights, all_weights),
        "",
        "## Limits",
        "",
        _LIMITS[dataset(tag)] + (_JPEG if "JPEG" in data["data"] else ""),
        "",
    ]
    return "\n".join(lines)


def _norm(weights: Weights) -> str:
    """The norm, and over what its statistics were taken if that is not the default."""
    statistics = weights.metadata["arguments"].get("statistics")
    return _NORMS[split(weights.arch)[1]] + (f" ({statistics.replace('_', ' ')})" if statistics else "")


def _origin(data: dict[str, Any]) -> list[str]:
    """The weights that the training began with, and those that it learned from."""
    lines = []
    if start := data.get("start"):
        twin = "" if start.partition(".")[0] == data["arch"] else ", of the same network with other norms"
        lines.append(f"- It began with the weights [{start}]({start}.md){twin}.")
    if teachers := data.get("teachers"):
        links = " and ".join(f"[{name}]({name}.md)" for name in teachers)
        views = ", averaged over each image and its mirror image" if data.get("mirror_teachers") else ""
        lines.append(f"- Beside the labels it learned the outputs of {links}{views} (knowledge distillation).")
    return lines


def _flags(data: dict[str, Any]) -> list[str]:
    if data["flags"] is None:
        return []
    lines = ["", "## Statistics flags", "", f"{_flag_text(data['flags'])} at inference."]
    if search := data.get("flag_search"):
        tied = search["tied"]
        reason = "the best of these"
        if search["chosen"] != tied[0]:
            reason = f"the default, one of {len(tied)} that cannot be told apart from the best of these, {tied[0]}"
        lines[-1] = (
            f"{search['chosen']} at inference. The four settings whose output for a sample does not depend on the "
            f"other samples of its batch, TT and any, were searched on validation data: it is {reason}. All 16:"
        )
        rows = sorted(search["losses"].items(), key=lambda item: item[1])
        lines += ["", "| flags | validation loss |", "|---|--:|"]
        lines += [f"| {code} | {loss:.4f} |" for code, loss in rows]
    return lines


def _flag_text(flags: str | dict[str, str]) -> str:
    return flags if isinstance(flags, str) else ", ".join(f"{layer} {code}" for layer, code in flags.items())


def _twins(weights: Weights, all_weights: Sequence[Weights]) -> list[str]:
    family = split(weights.arch)[0]
    twins = [
        other for other in all_weights if (split(other.arch)[0], training(other.tag)) == (family, training(weights.tag))
    ]
    if len(twins) < 2:
        return []
    lines = ["", "## Beside its twins", "", "The same recipe, seed and number of epochs.", ""]
    lines += ["| weights | norm | test accuracy | test loss |", "|---|---|--:|--:|"]
    for twin in twins:
        metrics = twin.metadata["metrics"]
        lines.append(
            f"| {twin.name} | {_norm(twin)} | {percent(metrics['test_accuracy'])} % | {metrics['test_loss']:.4f} |"
        )
    return lines


def table(all_weights: Sequence[Weights]) -> str:
    """README's table: a row for each weights file."""
    lines = [
        "| weights | data | parameters | flags | epochs | test accuracy |",
        "|---|---|--:|---|--:|--:|",
    ]
    for weights in all_weights:
        data = weights.metadata
        flags = "" if data["flags"] is None else _flag_text(data["flags"])
        lines.append(
            f"| [{weights.name}](zoo/cards/{weights.name}.md) | {data['data']} | {data['parameters']:,} | {flags} | "
            f"{data['epochs']} | {percent(data['metrics']['test_accuracy'])} % |"
        )
    return "\n".join(lines)


def split(arch: str) -> tuple[str, str]:
    """Family and norm of a model's name."""
    family, _, norm = arch.rpartition("_")
    return family, norm


def dataset(tag: str) -> str:
    """The data set of a tag, such as "cifar10" of "cifar10_per_channel"."""
    return tag.partition("_")[0]


def training(tag: str) -> str:
    """The tag without what it says of a norm's statistics: weights of one such tag were trained alike."""
    return tag.removesuffix("_per_position")


def percent(share: float) -> str:
    """In percent, with two places."""
    return f"{100 * share:.2f}"


def files(readme: str) -> dict[Path, str]:
    """What all cards and README.md are to say.

    Args:
        readme: What README.md says now.

    Raises:
        ValueError: If README.md has no place for the table.
    """
    all_weights = [get_weights(name) for name in list_models(pretrained=True)]
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md must have a place for the table, {START} ... {END}, and has none.")
    written = {CARDS / f"{weights.name}.md": card(weights, all_weights) for weights in all_weights}
    return written | {README: f"{before}{START}\n{table(all_weights)}\n{END}{after}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or look whether they are as they would be written.

    Returns:
        1 if a file is not as it should be, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m zoo.cards", description="Cards of the zoo's weights.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    wanted = files(README.read_text(encoding="utf-8"))
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    stale += sorted(set(CARDS.glob("*.md")) - set(wanted))
    for path in stale:
        if check:
            sys.stderr.write(f"{path} is not what its weights say; run make zoo-table\n")
        elif path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8", newline="\n")
        else:
            path.unlink()  # of weights that are gone
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
