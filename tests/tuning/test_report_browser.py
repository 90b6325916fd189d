"""The report as a browser shows it: offline, drawn, sortable, on a phone, in the dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import report_studies

from lightning_bln.tuning.report import write_report

pytestmark = [browser.needs_chromium, pytest.mark.slow]

HOSTILE = "</script><script>document.title = 'stolen'</script><img src=x onerror=\"document.title = 'stolen'\">"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser.chromium() as driver:
        browser.go_offline(driver)
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    studies = {
        "uniform": report_studies.uniform(folder),
        "per_layer": report_studies.per_layer(folder),
        "training": report_studies.training(folder),
        "told": report_studies.told(folder),
        "hostile": report_studies.per_layer(folder, name=HOSTILE, trials=10),
    }
    return {name: write_report(study, folder / f"{name}.html") for name, study in studies.items()}


def look_at(driver: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    browser.resize(driver, width, scheme=scheme)
    browser.console(driver)
    browser.requests(driver)
    driver.get(page.as_uri())


def count(driver: Any, plot: str, selector: str) -> int:
    return driver.execute_script("return document.querySelectorAll(arguments[0]).length", f"#{plot} {selector}")


def column(driver: Any, number: int) -> list[str]:
    return driver.execute_script(
        "return [...document.querySelectorAll('#scores tbody tr')].map((row) => row.cells[arguments[0]].textContent)",
        number,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["uniform", "per_layer", "training", "told", "hostile"])
def test_the_page_opens_offline_and_fits(driver: Any, pages: dict[str, Path], name: str, width: int, scheme: str):
    look_at(driver, pages[name], width, scheme)
    assert browser.console(driver) == []
    asked = browser.requests(driver)
    assert pages[name].as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    # Every place for a plot has one, and nothing is wider than the page.
    script = (
        "return [...document.querySelectorAll('.plot')].map((plot) => plot.querySelectorAll('svg.main-svg').length)"
    )
    drawn = driver.execute_script(script)
    assert len(drawn) >= 2
    assert min(drawn) > 0
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_request_would_have_been_seen(driver: Any, tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><title>x</title><script src='https://example.org/x.js'></script>")
    look_at(driver, page)
    assert "https://example.org/x.js" in browser.requests(driver)
    assert any("ERR_INTERNET_DISCONNECTED" in message for message in browser.console(driver))


def test_the_plots_of_a_uniform_study_are_drawn(driver: Any, pages: dict[str, Path]):
    look_at(driver, pages["uniform"])
    assert count(driver, "plot-settings", ".point") == 16
    assert count(driver, "plot-settings", ".errorbar path.xerror") == 16
    assert count(driver, "plot-effects", ".point") == count(driver, "plot-effects-best", ".point") == 4
    assert count(driver, "plot-heatmap", ".heatmap-label") == 16
    assert count(driver, "plot-convergence", ".point") == 17  # one of them failed
    assert count(driver, "plot-convergence", ".scatterlayer path.js-line") == 1
    assert count(driver, "plot-importance", ".bars .point") == 4


def test_the_plots_of_a_study_by_layer_are_drawn(driver: Any, pages: dict[str, Path]):
    look_at(driver, pages["per_layer"])
    scored = len(column(driver, 0))
    assert scored == 31
    assert count(driver, "plot-settings", ".point") == scored
    assert count(driver, "plot-heatmap", ".heatmap-label") == 4 * len(report_studies.LAYERS)
    assert count(driver, "plot-convergence", ".point") == 40
    labels = driver.execute_script(
        "return [...document.querySelectorAll('#plot-heatmap .ytick text')].map((text) => text.textContent)"
    )
    assert sorted(labels) == sorted(report_studies.LAYERS)


def test_sorting_by_click_and_by_keyboard(driver: Any, pages: dict[str, Path]):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    look_at(driver, pages["uniform"])
    headings = driver.find_elements(By.CSS_SELECTOR, "#scores thead th")
    names = [heading.text.split()[0] for heading in headings]
    assert names[:4] == ["rank", "setting", "loss", "accuracy"]
    assert headings[0].get_attribute("aria-sort") == "ascending"
    assert column(driver, 0) == [str(rank) for rank in range(1, 17)]

    headings[1].find_element(By.TAG_NAME, "button").click()
    assert column(driver, 1) == sorted(column(driver, 1))
    assert [heading.get_attribute("aria-sort") for heading in headings[:2]] == ["none", "ascending"]
    assert driver.find_element(By.ID, "sorted").get_attribute("textContent") == "Sorted by setting, ascending."

    # By keyboard: Tab to the next heading, then Enter and Space.
    driver.switch_to.active_element.send_keys(Keys.TAB)
    assert driver.switch_to.active_element.text.startswith("loss")
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    losses = [float(text) for text in column(driver, 2)]
    assert losses == sorted(losses)
    driver.switch_to.active_element.send_keys(Keys.SPACE)
    assert [float(text) for text in column(driver, 2)] == sorted(losses, reverse=True)
    assert headings[2].get_attribute("aria-sort") == "descending"
    assert column(driver, 0)[-1] == "1"

    # Numbers are sorted as numbers: trial 2 before trial 10.
    headings[-1].find_element(By.TAG_NAME, "button").click()
    assert column(driver, len(headings) - 1) == [str(number) for number in range(1, 17)]


def test_what_comes_from_the_study_stays_text(driver: Any, pages: dict[str, Path]):
    look_at(driver, pages["hostile"])
    assert driver.title == f"Inference flags: {HOSTILE}"
    assert driver.find_element("tag name", "h1").text == re.sub(r"\s+", " ", f"Inference flags: {HOSTILE}")
    assert driver.execute_script("return document.querySelectorAll('img').length") == 0
    assert driver.execute_script("return document.querySelectorAll('script').length") == 3
    errors = driver.execute_script(
        "return [...document.querySelectorAll('#unfinished td.error')].map((cell) => cell.textContent)"
    )
    assert "ValueError: <b>loss</b> is NaN" in errors


def test_plots_follow_the_colour_scheme(driver: Any, pages: dict[str, Path]):
    from selenium.webdriver.support.ui import WebDriverWait

    # The page stays open: a system may change its scheme at dusk.
    look_at(driver, pages["uniform"])
    script = """
        const plot = document.querySelector('#plot-settings .xtick text');
        return [getComputedStyle(document.body).backgroundColor, getComputedStyle(plot).fill];
    """
    light = ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
    dark = ["rgb(20, 23, 27)", "rgb(228, 232, 236)"]
    for scheme, colours in (("light", light), ("dark", dark), ("light", light)):
        browser.resize(driver, 1280, scheme=scheme)
        WebDriverWait(driver, 10).until(lambda driver, colours=colours: driver.execute_script(script) == colours)


def test_everything_has_a_name_for_those_who_cannot_see_it(driver: Any, pages: dict[str, Path]):
    look_at(driver, pages["per_layer"])
    script = """
        const all = (selector) => [...document.querySelectorAll(selector)];
        return {
            plots: all('.plot').filter((e) => e.getAttribute('role') !== 'img' || !e.ariaLabel).length,
            headings: all('h1').length,
            sections: all('section').filter((e) => !document.getElementById(e.getAttribute('aria-labelledby'))).length,
            columns: all('thead th').filter((e) => e.scope !== 'col').length,
            rows: all('tbody th').filter((e) => e.scope !== 'row').length,
            ids: all('[id]').length - new Set(all('[id]').map((e) => e.id)).size,
        };
    """
    found = driver.execute_script(script)
    assert found == {"plots": 0, "headings": 1, "sections": 0, "columns": 0, "rows": 0, "ids": 0}
