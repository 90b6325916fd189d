"""The `optuna` command and `lightning-bln` on one study, from a shell script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_bln import StatFlags
from tests.cli_runs import QUIET, ROOT, run, user_folder

SCRIPT = r"""
set -euo pipefail
export OPTUNA_STORAGE=sqlite:///flags.db
model="--model my_model.LitModel --data my_model.Data $QUIET --ckpt_path best.ckpt --monitor val_loss"

optuna create-study --study-name flags --direction minimize >create.txt

# Ask for a setting, evaluate it, tell what it scored.
ask() { optuna ask --study-name flags --sampler RandomSampler --search-space "$(lightning-bln space)" -f json; }
code() { python -c 'import json, sys; print("".join("FT"[v] for v in json.load(sys.stdin)["params"].values()))'; }
number() { python -c 'import json, sys; print(json.load(sys.stdin)["number"])'; }
value() { python -c 'import json, sys; print(json.load(sys.stdin)["scores"][0]["metrics"]["val_loss"])'; }

ask >first.json
lightning-bln score $model --cells "$(code <first.json)" --json score.json
optuna tell --study-name flags --trial-number "$(number <first.json)" --values "$(value <score.json)"

# Asked, but not yet told: that one is left to whoever asked.
ask >second.json
lightning-bln tune $model --study_name flags >tune.txt
lightning-bln score $model --cells "$(code <second.json)" --json - >score.json
optuna tell --study-name flags --trial-number "$(number <second.json)" --values "$(value <score.json)"

# What is still missing, if the second was the first once more.
lightning-bln tune $model --study_name flags --json table.json >tune2.txt

optuna trials --study-name flags -f json >trials.json
optuna best-trial --study-name flags -f json >best.json
lightning-bln apply --ckpt_path best.ckpt --out chosen.ckpt --study_name flags
"""


@pytest.mark.slow
# LightningCLI's own use of jsonargparse.
@pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.*was deprecated in v4):DeprecationWarning")
def test_ask_and_tell_interleaved_with_tune_cover_all_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = user_folder(tmp_path)
    monkeypatch.chdir(folder)
    fit = run("fit", "--model=my_model.LitModel", "--data=my_model.Data", *QUIET, "--bln")
    assert fit.code == 0, fit.err
    (checkpoint,) = folder.glob("checkpoints/*.ckpt")
    checkpoint.rename(folder / "best.ckpt")

    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "QUIET": " ".join(QUIET),
    }
    done = subprocess.run(["bash", "-c", SCRIPT], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    trials = json.loads((folder / "trials.json").read_text())
    complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
    codes = ["".join("FT"[trial["params"][name]] for name in StatFlags.names()) for trial in complete]
    assert set(codes) == {flags.code for flags in StatFlags.all()}
    assert not [trial for trial in trials if trial["state"] in ("RUNNING", "FAIL")]
    # Only a sampler that asks for a setting twice makes a trial more.
    first, second = (json.loads((folder / f"{name}.json").read_text()) for name in ("first", "second"))
    assert len(codes) == (17 if first["params"] == second["params"] else 16)
    best = json.loads((folder / "best.json").read_text())
    code = "".join("FT"[best["params"][name]] for name in StatFlags.names())
    assert f"2 layers with {code}, the best of 'flags'" in done.stdout
    # The setting that was only asked for is named, with what to do about it.
    if first["params"] != second["params"]:
        assert f"is still RUNNING elsewhere as trial {second['number']}" in (folder / "tune.txt").read_text()
