"""The page in a headless Chromium: it opens from a file, asks for nothing, and does what it shows."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from recorded_runs import row, save
from traced import known_direct, known_graph

pytest.importorskip("scipy")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from rrm_engine.render.document import document  # noqa: E402
from rrm_engine.render.page import page  # noqa: E402
from rrm_engine.runs.arms import arms, read_runs  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]
HOSTILE = "</script><script>alert(1)</script><img src=http://localhost:9/x onerror=alert(2)>\u2028\u202e"
MANY = 150


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data of a page: three problems whose times are known and whose texts try to get out of their places."""
    run = tmp_path_factory.mktemp("page") / "run"
    graph, rows, lines = known_graph(), [], []
    for number, right in enumerate((True, False, True)):
        name = f"t{number}"
        for mode, events in (("direct", known_direct()), ("rrm", graph.events)):
            measured: dict[str, Any] = {"latency_s": events[-1].t - events[0].t, "answer": f"FINAL: 7{HOSTILE}"}
            if mode == "rrm":
                measured |= {"nodes": 3, "resumes": 1, "critical_path_tokens": 17, "total_tokens": 19}
            else:
                measured |= {"critical_path_tokens": 40, "total_tokens": 40}
            rows.append(row(name, mode, right=right or mode == "direct", **measured))
            lines += [{**event.as_json(), "job": f"{name}/{mode}/0", "session": 0} for event in events]
    for one in [*rows, *lines]:
        one |= {key: f"{one[key]}{HOSTILE}" for key in ("task", "system", "prompt", "appended", "text") if key in one}
    save(run, rows)
    (run / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return document(arms(read_runs([run])), 20_000)


@pytest.fixture(scope="module")
def address(found: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("out") / "page.html"
    path.write_text(page(found), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: "Browser") -> "Iterator[Page]":
    """A page of the browser that may neither complain nor ask for anything but the file."""
    tab = browser.new_page(viewport={"width": 1400, "height": 900})
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    tab.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    tab.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    yield tab
    tab.close()
    assert wrong == []


def test_it_opens_filters_and_finds(tab: "Page", address: str, found: dict[str, Any]) -> None:
    tab.goto(address)
    assert tab.locator("#main h1").inner_text() == "What these rows show"
    entries = tab.locator("#entries > li")
    assert entries.count() == len(found["entries"])
    label = found["entries"][0]["label"]
    tab.locator("#filters button", has_text=label).first.click()
    assert entries.count() == sum(label in (entry["label"], *entry["marks"]) for entry in found["entries"])
    tab.locator("#filters button", has_text=label).first.click()
    tab.keyboard.press("/")
    tab.keyboard.type(found["entries"][1]["id"])
    assert entries.count() == 1
    tab.locator("#search").fill("nothing holds this")
    assert entries.count() == 0 and tab.locator("#count").inner_text().startswith("0 of")


def test_a_problem_a_node_and_their_addresses(
    tab: "Page", browser: "Browser", address: str, found: dict[str, Any]
) -> None:
    job = found["entries"][1]["rrm"]
    tab.goto(address)
    tab.locator("#entries a").nth(1).click()
    assert tab.locator("#timeline .lane").count() == 1 + 3
    assert tab.locator("#timeline .path").count() == len(job["critical"]) + 1
    assert tab.locator("#timeline .arrow").count() == 2 + 2  # two starts, two conclusions
    child = job["nodes"][1]["path"]
    tab.locator(f'#timeline .lane[data-side=rrm][data-node="{child}"]').click()
    assert tab.locator("#node h1").inner_text() == child
    assert "#node=" in tab.url and tab.url.endswith(child)
    other = browser.new_page()
    other.goto(tab.url)
    assert other.locator("#node h1").inner_text() == child
    assert other.locator("#node .phase").count() == len(job["nodes"][1]["phases"])
    other.close()
    tab.locator("#node .close").click()
    assert tab.locator("#node").is_hidden() and "#job=" in tab.url
    tab.goto(address + "#node=there/is/none:root")
    assert tab.locator("#main h1").inner_text() == "What these rows show"


def test_time_is_scrubbed_and_replayed(tab: "Page", address: str, found: dict[str, Any]) -> None:
    tab.goto(address)
    tab.locator("#entries a").first.click()
    whole = tab.locator("#clock").inner_text()
    assert whole.endswith("in all") and tab.locator("#timeline .veil").is_hidden()
    box = tab.locator("#timeline .scrub").bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 5)
    tab.mouse.down()
    middle = tab.locator("#clock").inner_text()
    tab.mouse.move(box["x"] + box["width"] / 4, box["y"] + 5)
    tab.mouse.up()
    quarter = tab.locator("#clock").inner_text()
    seconds = [float(text.split()[0]) for text in (quarter, middle)]
    assert 0 < seconds[0] < seconds[1] and tab.locator("#timeline .veil").is_visible()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#clock").inner_text() != quarter
    tab.locator("#time").fill("0")
    tab.locator("#play").click()
    tab.wait_for_function("document.getElementById('clock').textContent.startsWith('0.00') === false")
    tab.locator("#play").click()
    stopped = tab.locator("#clock").inner_text()
    assert "at work" in stopped
    tab.wait_for_timeout(150)
    assert tab.locator("#clock").inner_text() == stopped


def test_the_keyboard(tab: "Page", address: str, found: dict[str, Any]) -> None:
    tab.goto(address)
    tab.keyboard.press("j")
    assert found["entries"][0]["id"] in tab.locator("#main h1").inner_text()
    tab.keyboard.press("n")
    assert tab.locator("#node h1").inner_text() == "root"
    tab.keyboard.press("g")
    assert tab.locator("#graph .gnode").count() == len(found["entries"][0]["rrm"]["nodes"])
    tab.keyboard.press("Escape")
    assert tab.locator("#node").is_hidden()
    tab.keyboard.press("?")
    assert tab.locator("dialog").is_visible()
    tab.keyboard.press("Escape")
    tab.keyboard.press("o")
    assert tab.locator("#main h1").inner_text() == "What these rows show"


def test_texts_stay_texts(tab: "Page", address: str, found: dict[str, Any]) -> None:
    tab.goto(address)
    scripts = tab.evaluate("document.scripts.length")
    for entry in found["entries"]:
        for node in entry["rrm"]["nodes"]:
            tab.goto(f"{address}#node={entry['rrm']['key']}:{node['path']}")
    assert tab.evaluate("document.scripts.length") == scripts == 3
    assert tab.evaluate("document.images.length") == 0
    assert "<img src=" in tab.locator("#main .task").inner_text()


def test_dark_light_and_print(tab: "Page", address: str) -> None:
    tab.emulate_media(color_scheme="dark")
    tab.goto(address)
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = tab.evaluate(ground)
    tab.locator("#theme").click()
    light = tab.evaluate(ground)
    assert (dark, light) == ("rgb(20, 23, 27)", "rgb(255, 255, 255)")
    tab.emulate_media(media="print")
    assert tab.locator("#list").is_hidden() and tab.locator("#main").is_visible()
    assert len(tab.pdf()) > 1000


def test_large_graphs_are_folded(tab: "Page", found: dict[str, Any], tmp_path: Path) -> None:
    data = copy.deepcopy(found)
    job = data["entries"][0]["rrm"]
    root = job["nodes"][0]
    for i in range(MANY):
        job["nodes"].append(
            {**copy.deepcopy(root), "path": f"root.m{i}", "parent": 0, "waits": [], "phases": root["phases"][:1]}
        )
    there = len(job["nodes"])
    (tmp_path / "page.html").write_text(page(data), encoding="utf-8")
    tab.goto((tmp_path / "page.html").as_uri())
    tab.keyboard.press("j")
    lanes = tab.locator("#timeline .lane[data-side=rrm]")
    assert lanes.count() < 100 < there
    tab.keyboard.press("g")
    nodes = tab.locator("#graph .gnode")
    hidden = there - nodes.count()
    assert hidden > 0
    tab.locator("#graph .gnode text", has_text=f"+{hidden}").click()
    assert nodes.count() == there
