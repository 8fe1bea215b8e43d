"""The site of the documentation: it builds without a warning, links lead somewhere, nothing comes from another host.

If a Chromium is installed, it shows the pages: wide and on a phone, light and dark, and searches them.
"""

import functools
import http.server
import json
import os
import re
import select
import shutil
import subprocess
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

for needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[2]
HOME = "http://site/"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDE, PHONE = (1280, 900), (390, 844)
SHOWN = ["", "guides/retrofit/", "reference/retrofit/", "concepts/memory/", "concepts/compressors/", "benchmarks/"]
MEASURE = """
({
  width: document.documentElement.scrollWidth,
  colors: [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector("p")).color],
  maths: [...document.querySelectorAll("math")].map(u => u.getBoundingClientRect()).map(r => [r.width, r.height]),
  broken: [...document.images].filter(u => !u.complete || !u.naturalWidth).map(u => u.src),
  clipped: [...document.querySelectorAll(".figure svg text")].filter(
    u => u.getBBox().x + u.getBBox().width > u.ownerSVGElement.viewBox.baseVal.width).map(u => u.textContent),
})
"""


class Page(HTMLParser):
    """The ids of a page, what it links to, and what a browser loads to show it."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("prev", "next", "canonical"):
            self.loads.append(given["href"])
        elif given.get("src"):
            self.loads.append(given["src"])


@pytest.fixture(scope="session")
def pages(site):
    """Every page by its path on the site."""
    return {address(path.relative_to(site)): Page(path.read_text()) for path in site.rglob("*.html")}


def address(path):
    return re.sub(r"(^|/)index\.html$", r"\1", path.as_posix())


def test_every_internal_link_leads_somewhere(site, pages):
    wrong = []
    for name, page in pages.items():
        for target in page.links + page.loads:
            url = urlsplit(urljoin(HOME + name, target))
            if url.netloc != "site":
                continue
            path = unquote(url.path).lstrip("/")
            file = site / path / "index.html" if path.endswith("/") or not path else site / path
            found = pages.get(address(file.relative_to(site)))
            if not file.is_file() or (url.fragment and found and unquote(url.fragment) not in found.ids):
                wrong.append(f"{name or 'home'}: {target}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_nothing_is_loaded_from_another_host(site, pages):
    elsewhere = [u for page in pages.values() for u in page.loads if urlsplit(urljoin(HOME, u)).netloc != "site"]
    sheets = "".join(path.read_text() for path in site.rglob("*.css"))
    elsewhere += re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*\)|@import[^;]*", sheets)
    assert not elsewhere


def test_the_search_index_has_the_pages(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    locations = {entry["location"] for entry in entries}
    for page in (*SHOWN, "guides/training/", "guides/troubleshooting/", "reference/adapters/"):
        assert page in locations, page
    for name in ("retrofit.retrofit", "GatedDeltaNet", "HippocampalCache", "cost.cost_report"):
        assert any(location.endswith(f"#ahn_layers.{name}") for location in locations), name


class Browser:
    """A headless Chromium, driven through a pair of pipes (the DevTools protocol)."""

    def __init__(self, profile):
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self.number, self.pending, self.requests, self.session, self.context = 0, b"", [], None, None
        self.call("Browser.getVersion")

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        found = self.receive(lambda got: got.get("id") == self.number)
        assert "error" not in found, found
        return found["result"]

    def receive(self, wanted, seconds=60):
        """The first message that is wanted; requests to the network are noted in passing."""
        end = time.monotonic() + seconds
        while True:
            while b"\0" not in self.pending:
                if not select.select([self.read], [], [], max(0, end - time.monotonic()))[0]:
                    raise TimeoutError("Chromium does not answer")
                part = os.read(self.read, 1 << 16)
                if not part:
                    raise ConnectionError("Chromium has gone")
                self.pending += part
            raw, self.pending = self.pending.split(b"\0", 1)
            got = json.loads(raw)
            if got.get("method") == "Network.requestWillBeSent":
                self.requests.append(got["params"]["request"]["url"])
            if wanted(got):
                return got

    def evaluate(self, script):
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def open(self, url, size=WIDE, scheme="light"):
        """A page in a profile of its own: the site stores the choice of light and dark."""
        self.session = None
        if self.context:
            self.call("Target.disposeBrowserContext", browserContextId=self.context)
        self.context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network"):
            self.call(f"{domain}.enable")
        width, height = size
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.call("Emulation.setDeviceMetricsOverride", **phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)
        self.receive(lambda got: got.get("method") == "Page.loadEventFired")
        palette = {"light": "default", "dark": "slate"}[scheme]
        self.until(f"document.body.dataset.mdColorScheme == '{palette}'")

    def until(self, script, seconds=30):
        end = time.monotonic() + seconds
        while not (found := self.evaluate(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.1)
        return found

    def close(self):
        os.close(self.write)  # Chromium ends when its pipe does
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.read)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    try:
        found = Browser(tmp_path_factory.mktemp("profile"))
    except (OSError, TimeoutError) as error:
        pytest.skip(f"{CHROMIUM} does not run here: {error}")
    yield found
    found.close()


@pytest.fixture(scope="session")
def address_of_site(site):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def brightness(color):
    red, green, blue = map(float, re.findall(r"[\d.]+", color)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_a_browser_shows_the_pages(browser, address_of_site, pages, size, scheme):
    for page in SHOWN if scheme == "dark" else sorted(set(pages) - {"404.html"}):
        browser.open(address_of_site + page, size, scheme)
        found = browser.evaluate(MEASURE)
        assert found["width"] <= size[0], f"{page}: wider than the screen"
        ground, text = map(brightness, found["colors"])
        assert abs(ground - text) > 100 and (ground < text) == (scheme == "dark"), page
        assert not found["broken"] and not found["clipped"], page
        assert all(width > 3 and height > 3 for width, height in found["maths"]), page
        assert found["maths"] or page != "concepts/compressors/"
    assert all(url.startswith((address_of_site, "data:", "blob:")) for url in browser.requests)


@needs_chromium
def test_the_benchmarks_fit_a_screen(browser, address_of_site):
    browser.open(address_of_site + "benchmarks/", WIDE)
    end = browser.evaluate("document.querySelector('article').lastElementChild.getBoundingClientRect().bottom")
    assert 0 < end <= WIDE[1]


@needs_chromium
def test_a_phone_keeps_the_first_column_of_a_wide_table(browser, address_of_site):
    browser.open(address_of_site + "comparison/", PHONE)
    measure = """
    (() => {
      const row = document.querySelector("article tbody tr"), cell = row.firstElementChild, last = row.lastElementChild;
      for (let u = cell; u; u = u.parentElement) if (u.scrollWidth > u.clientWidth) u.scrollLeft = 200;
      return [cell, last].map(u => u.getBoundingClientRect().left);
    })()
    """
    before = browser.evaluate(measure.replace("200", "0"))
    after = browser.evaluate(measure)
    assert 0 <= after[0] <= before[0] and after[1] == before[1] - 200


@needs_chromium
def test_a_browser_finds_a_word(browser, address_of_site):
    for query, found in (("GatedDeltaNet", "GatedDeltaNet"), ("quantizing", "Quantization")):  # the second by its stem
        browser.open(address_of_site + f"?q={query}")
        text = browser.until(
            "[...document.querySelectorAll('.md-search-result__item')].map(u => u.innerText).join('\\n')"
        )
        assert found in text
