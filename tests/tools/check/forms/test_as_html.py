"""The page as a browser shows it: headless Chromium, spoken to over its DevTools pipe."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mdm.tools.check.forms.as_html import as_html
from mdm.tools.check.forms.history import Trend, own_point
from mdm.tools.check.report import Report

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
    "--hide-scrollbars",
)  # fmt: skip

# What has no size, and what sticks out of the page or is cut off, as a person would see it. Folded content is opened.
MEASURE = """(() => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const all = [...document.querySelectorAll("body *")], width = document.documentElement.clientWidth;
  const told = one => one.tagName + "." + one.getAttribute("class") + " " + one.textContent.slice(0, 40);
  const drawn = all.filter(one => one.matches("svg, img, svg *:not(title)"));
  return {
    wide: document.documentElement.scrollWidth > width ? ["the page"] : [],
    outside: all.filter(one => one.tagName != "title" && one.getBoundingClientRect().right > width + 1).map(told),
    cut: all.filter(one => one.matches("td, th, dd, dt, pre, p, h3, .card"))
      .filter(one => one.scrollWidth > one.clientWidth + 1).map(told),
    empty: drawn.filter(one => one.matches("svg, img") && !(one.getBoundingClientRect().width > 8)).map(told),
    broken: drawn.filter(one => one.tagName == "IMG" && !one.naturalWidth).map(told),
    small: drawn.filter(one => one.tagName == "IMG" && one.getBoundingClientRect().width < 128).map(told),
    escaped: drawn.filter(one => {  // out of its chart
      const chart = one.closest("svg").getBoundingClientRect(), own = one.getBoundingClientRect();
      return own.left < chart.left - 1 || own.right > chart.right + 1 || own.bottom > chart.bottom + 1;
    }).map(told),
  };
})()""".replace('one.closest("svg")', '(one.closest("svg") ?? one)')


class Browser:
    """Commands go out on descriptor 3 and answers and events come in on 4, as JSON with a zero byte behind each."""

    def __init__(self, chromium: str, folder: Path) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        script = f'exec "$@" 3<&{high[0]} 4>&{high[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", chromium, *FLAGS, f"--user-data-dir={folder}"], pass_fds=high,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.pipe_in, self.pipe_out = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self.buffer, self.count, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.pipe_out.write(json.dumps(message).encode() + b"\0")
        self.pipe_out.flush()
        while (answer := self.next()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.pipe_in.fileno(), 1 << 20)
            assert part, "chromium ended"
            self.buffer += part
        first, self.buffer = self.buffer.split(b"\0", 1)
        return dict(json.loads(first))

    def open(self, path: Path, width: int = 1200, scheme: str = "light") -> None:
        self.events.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.next())
        self.value("new Promise(done => setTimeout(done, 50))")  # events behind the load

    def value(self, script: str) -> Any:
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def said(self) -> list[str]:
        """Errors and warnings of the page and of the browser about it."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def asked(self) -> list[str]:
        """Addresses, but for the page's own and what it holds itself."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent if params["type"] != "Document"]
        return [url for url in urls if not url.startswith("data:")]

    def close(self) -> None:
        self.session = ""
        self("Browser.close")
        self.process.wait(20)
        self.pipe_in.close()
        self.pipe_out.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        assert os.environ.get("CI") != "true", "no chromium here: run tools/install-chromium"
        pytest.skip("no chromium here: run tools/install-chromium")
    made = Browser(chromium, tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


def page_of(report: Report, path: Path, history: Trend | None = None) -> Path:
    path.write_bytes(as_html(report, history).encode("utf-8", "replace"))
    return path


def trend_of(report: Report) -> Trend:
    return Trend([own_point(report)] * 5, skipped=2)


@pytest.mark.parametrize("name", ["sound", "failing", "empty"])
@pytest.mark.parametrize("width", [1200, 700])
def test_a_page_is_silent_self_contained_and_whole(
    name: str, width: int, browser: Browser, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    report = Report("none", "none", "reference") if name == "empty" else request.getfixturevalue(name)
    browser.open(page_of(report, tmp_path / "report.html", trend_of(report)), width)
    assert browser.said() == []
    assert browser.asked() == []
    faults = {fault: found for fault, found in browser.value(MEASURE).items() if found}
    assert faults == {}
    assert browser.value("document.querySelectorAll('svg').length") > (20 if report.findings else -1)


@pytest.mark.parametrize(
    ("body", "heard", "asked"),
    [
        ("<script>console.error('planted')</script>", "planted", False),
        ("<script>throw new Error('planted')</script>", "planted", False),
        ("<img src=http://127.0.0.1:9/planted.png>", "planted", True),
        ("<style>@import 'http://127.0.0.1:9/planted.css'</style>", "planted", True),
    ],
)
def test_the_browser_would_have_heard_an_error_and_a_request(
    body: str, heard: str, asked: bool, browser: Browser, tmp_path: Path
) -> None:
    page = tmp_path / "planted.html"
    page.write_text(f"<!DOCTYPE html><title>planted</title>{body}")
    browser.open(page)
    assert heard in "".join(browser.said())
    assert any(heard in url for url in browser.asked()) is asked


def test_the_measure_would_have_found_what_sticks_out_and_what_is_empty(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "planted.html"
    page.write_text(
        "<!DOCTYPE html><title>planted</title><p style='width:900px'>wide</p><img src='data:,no'>"
        "<svg viewBox='0 0 10 10' width=100 height=100><text x=9 y=5>long</text></svg>"
        "<table style='table-layout:fixed;width:50px'><tr><td>unbreakable-word</td></tr></table>"
    )
    browser.open(page, 700)
    found = browser.value(MEASURE)
    assert {fault for fault, where in found.items() if where} == set(found) - {"empty"}


def test_the_policy_stops_a_script_that_would_get_in(browser: Browser, sound: Report, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(as_html(sound).replace("</main>", "<script>document.title = 'taken'</script></main>"))
    browser.open(page)
    assert browser.value("document.title").startswith("PASS")
    assert "Content Security Policy" in "".join(browser.said())


def test_hostile_names_are_shown_as_text(browser: Browser, failing: Report, tmp_path: Path) -> None:
    browser.open(page_of(failing, tmp_path / "report.html"))
    assert '<script>alert("x")</script>' in browser.value("document.querySelector('main').innerText")
    assert browser.value("document.querySelectorAll('script, img:not([src^=data])').length") == 0


def test_light_and_dark_differ_and_verdicts_are_words(browser: Browser, failing: Report, tmp_path: Path) -> None:
    page = page_of(failing, tmp_path / "report.html")
    colours = []
    for scheme in ("light", "dark"):
        browser.open(page, scheme=scheme)
        colours.append(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colours)) == 2
    assert re.search(r"✗\s*FAIL", browser.value("document.querySelector('h1').innerText"))
    assert "exit code 1" in browser.value("document.querySelector('.banner').innerText")


def test_failures_come_first_and_long_levels_are_folded(browser: Browser, failing: Report, tmp_path: Path) -> None:
    browser.open(page_of(failing, tmp_path / "report.html"))
    heads = browser.value("[...document.querySelectorAll('h2')].map(one => one.innerText)")
    assert heads == [
        "What was compared", "What did not pass", "Levels", "Drift", "Error along the graph", "Pictures", "Texts",
        "Time taken",
    ]  # fmt: skip
    assert browser.value("document.querySelector('.card h3').innerText").startswith("✗denoiser first diverges")
    assert browser.value("document.querySelectorAll('.card').length") == 25
    assert browser.value("document.querySelectorAll('.findings tbody tr, .plain tbody tr').length") == len(
        failing.findings
    )
    # 61 findings of the level "blocks": 10 are seen, and the first is the one that failed.
    script = "[...document.querySelector('#blocks').parentNode.querySelectorAll('tbody')].map(one => one.rows.length)"
    assert browser.value(script) == [10, 51]
    assert "FAIL" in browser.value("document.querySelector('#blocks').parentNode.querySelector('tbody tr').innerText")


def test_print_opens_what_is_folded(browser: Browser, sound: Report, tmp_path: Path) -> None:
    browser.open(page_of(sound, tmp_path / "report.html"))
    height = "document.querySelector('details table').getBoundingClientRect().height"
    assert browser.value("document.querySelector('details').getBoundingClientRect().height") < 100
    browser("Emulation.setEmulatedMedia", media="print")
    assert browser.value(height) > 500
