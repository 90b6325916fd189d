"""optuna-dashboard, as it is installed, on the storage that `tune_flags` writes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln import BatchLayerNorm, update_statistics
from lightning_bln.tuning import tune_flags

DASHBOARD = Path(sys.executable).with_name("optuna-dashboard")
NAME = "flags of a small network"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DASHBOARD.exists(), reason="needs optuna-dashboard: pip install optuna-dashboard"),
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4), nn.Linear(4, 2))
    data = DataLoader(TensorDataset(torch.randn(64, 3), torch.randint(2, (64,))), batch_size=16)
    update_statistics(model, data)
    url = f"sqlite:///{tmp_path_factory.mktemp('dashboard') / 'study.db'}"
    tune_flags(model, data, nn.CrossEntropyLoss(), storage=url, study_name=NAME, progress=False)
    return url


@pytest.fixture(scope="module")
def server(storage: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(DASHBOARD), storage, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, f"{' '.join(command)} ended with {process.returncode}"
            try:
                get(f"{address}/api/meta")
                break
            except OSError:
                assert time.monotonic() < deadline, "optuna-dashboard does not answer"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return json.load(answer)


def test_the_dashboard_lists_the_study_and_its_trials(server: str):
    (study,) = get(f"{server}/api/studies")["study_summaries"]
    assert study["study_name"] == NAME
    assert study["directions"] == ["minimize"]
    trials = get(f"{server}/api/studies/{study['study_id']}?after=0")["trials"]
    assert [trial["state"] for trial in trials] == ["Complete"] * 16
    settings = {tuple(parameter["param_external_value"] for parameter in trial["params"]) for trial in trials}
    assert len(settings) == 16
    assert {value for setting in settings for value in setting} == {"True", "False"}


@browser.needs_chromium
def test_the_dashboard_shows_the_study_in_a_browser(server: str):
    from selenium.webdriver.support.ui import WebDriverWait

    with browser.chromium() as driver:
        browser.resize(driver, 1280)
        wait = WebDriverWait(driver, 60)
        driver.get(server)
        wait.until(lambda driver: NAME in driver.find_element("tag name", "body").text)
        driver.get(f"{server}/dashboard/studies/1")
        # The page asks for its parts one by one.
        for part in ("Best Trial", NAME, "batch_moving_mean"):
            wait.until(lambda driver, part=part: part in driver.find_element("tag name", "body").text, part)
        assert [message for message in browser.console(driver) if "SEVERE" in message] == []
