"""The built site in a real browser, at two widths, light and dark: what a reader would complain of.

`make site` builds it and runs this. A page of this test's own loads the pages of the site one after
the other in a frame, measures them, and posts what it finds to the server that it came from.
"""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

SITE = Path(__file__).parent.parent / "build" / "site"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no site: run make site"),
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on the path (on Debian: apt-get install chromium)"
    ),
]
WIDTHS = (1280, 390)
SCHEMES = ("default", "slate")  # Material's names of light and dark
DASH = "\N{EN DASH}"  # between the name of a parameter and what it is
SEARCHED = {"conserved": "conserved", "hypergradient": "hypergradient", "leak": "leak"}

HARNESS = """<!DOCTYPE html><title>harness</title><body style="margin:0"><script>
const PAGES = %s, WIDTHS = %s, SCHEMES = %s, SEARCHED = %s;
const sleep = ms => new Promise(done => setTimeout(done, ms));

async function open(path, width, scheme) {
  localStorage.clear();
  localStorage.setItem("/.__palette", JSON.stringify(
    {index: SCHEMES.indexOf(scheme), color: {scheme, primary: "custom", accent: "custom"}}));
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.src = path;
  document.body.replaceChildren(frame);
  await new Promise(done => frame.onload = done);
  const page = frame.contentDocument;
  page.body.setAttribute("data-md-color-scheme", scheme);
  await sleep(30);
  return page;
}

const visible = e => e.getClientRects().length > 0;

function brightness(color) {  // 0 to 1, by the relative luminance of WCAG 2
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function background(view, e) {
  for (; e; e = e.parentElement) {
    const color = view.getComputedStyle(e).backgroundColor;
    const parts = color.match(/[\\d.]+/g).map(Number);
    if (parts.length < 4 || parts[3] > 0.9) return color;
  }
  return "rgb(255, 255, 255)";
}

function contrast(view, e) {
  const [a, b] = [view.getComputedStyle(e).color, background(view, e)].map(brightness);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}

function measure(page) {
  const view = page.defaultView, root = page.documentElement, width = root.clientWidth;
  const article = page.querySelector("article");
  const told = e => e.tagName + ": " + (e.textContent || "").trim().slice(0, 60);
  // What reaches out of the page, unless something around it scrolls or clips it.
  const clipped = e => {
    for (let p = e.parentElement; p && p !== page.body; p = p.parentElement)
      if (view.getComputedStyle(p).overflowX !== "visible") return true;
    return false;
  };
  const blocks = [...article.querySelectorAll("h1, h2, h3, h4, p, li, pre, table, img, iframe")];
  const wide = blocks.filter(visible).filter(e => !clipped(e))
    .filter(e => e.getBoundingClientRect().right > width + 1).map(told);
  const stuck = [...article.querySelectorAll("pre > code")].filter(visible)
    .filter(e => e.scrollWidth > e.clientWidth + 1)
    .filter(e => !["auto", "scroll"].includes(view.getComputedStyle(e).overflowX)).map(told);
  // Blocks that follow one another in the flow of a page do not lie on each other.
  const flow = [...article.children].filter(visible)
    .filter(e => view.getComputedStyle(e).position === "static"
                 && view.getComputedStyle(e).float === "none");
  const over = flow.slice(1).filter((e, i) =>
    e.getBoundingClientRect().top < flow[i].getBoundingClientRect().bottom - 1).map(told);
  const faint = blocks.filter(visible)
    .filter(e => ["P", "LI", "PRE", "H1", "H2"].includes(e.tagName))
    .filter(e => e.textContent.trim() && contrast(view, e) < 4.5).map(told);
  return {
    overflow: root.scrollWidth - width, wide, stuck, over, faint,
    dark: brightness(background(view, article)) < 0.2,
    broken: [...article.querySelectorAll("img")].filter(e => e.complete && !e.naturalWidth)
      .map(e => e.src),
  };
}

async function search(words) {
  const page = await open("/index.html", WIDTHS[0], SCHEMES[0]);
  const input = page.querySelector("input.md-search__input");
  for (let tries = 0; tries < 300; tries++) {
    input.focus();
    input.value = words;
    input.dispatchEvent(new page.defaultView.KeyboardEvent("keyup", {key: "a", bubbles: true}));
    input.dispatchEvent(new page.defaultView.Event("input", {bubbles: true}));
    await sleep(100);
    const found = [...page.querySelectorAll(".md-search-result__item")].map(e => e.textContent);
    if (found.length) return found;
  }
  return [];
}

const post = what => fetch("/_found", {method: "POST", body: JSON.stringify(what)});
(async () => {
  try {
    for (const path of PAGES) for (const width of WIDTHS) for (const scheme of SCHEMES)
      await post({path, width, scheme, ...measure(await open(path, width, scheme))});
    for (const words of SEARCHED) await post({words, found: await search(words)});
    await post({done: true});
  } catch (error) {
    await post({done: true, error: String(error.stack)});
  }
})();
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site and the harness, and takes what the harness finds."""

    found: Queue[Any]

    def do_GET(self) -> None:
        if self.path != "/_harness":
            super().do_GET()
            return
        pages = sorted(f"/{p.relative_to(SITE)}" for p in SITE.glob("**/*.html"))
        pages = [p for p in pages if p not in ("/404.html", "/assets/captures.html")]
        filled = [json.dumps(v) for v in (pages, WIDTHS, SCHEMES, list(SEARCHED))]
        body = (HARNESS % tuple(filled)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.found.put(json.loads(body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What the browser found: a record for each page, width and scheme, and for each search."""
    assert CHROMIUM is not None
    queue: Queue[Any] = Queue()
    handler = type("Found", (Handler,), {"found": queue})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(SITE))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        CHROMIUM,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--window-size=1400,1000", "--no-proxy-server"),
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        "--remote-debugging-port=0",  # it stays, until it is ended
        f"http://127.0.0.1:{server.server_port}/_harness",
    ]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records: list[dict[str, Any]] = []
    try:
        while not (record := queue.get(timeout=120)).get("done"):
            records.append(record)
        assert "error" not in record, record["error"]
        yield records
    finally:
        browser.terminate()
        browser.wait(timeout=30)
        server.shutdown()
        server.server_close()


def complaints(found: list[dict[str, Any]], about: str) -> list[str]:
    return [
        f"{r['path']} at {r['width']}, {r['scheme']}: {r[about]}"
        for r in found
        if "path" in r and r[about]
    ]


def test_every_page_is_measured_in_every_way(found: list[dict[str, Any]]) -> None:
    pages = {r["path"] for r in found if "path" in r}
    assert {"/index.html", "/tutorial.html", "/gallery/index.html"} <= pages
    assert len([r for r in found if "path" in r]) == len(pages) * len(WIDTHS) * len(SCHEMES)
    assert all(r["dark"] == (r["scheme"] == "slate") for r in found if "path" in r)


@pytest.mark.parametrize(
    "about",
    [
        "wide",  # reaches out of the page
        "stuck",  # code that is wider than its block and does not scroll
        "over",  # lies on what comes before it
        "faint",  # text of a contrast below 4.5, as WCAG 2 asks
        "broken",  # pictures that do not load
    ],
)
def test_no_page_has(found: list[dict[str, Any]], about: str) -> None:
    assert complaints(found, about) == []


def test_no_page_scrolls_sideways(found: list[dict[str, Any]]) -> None:
    assert [c for c in complaints(found, "overflow") if not c.endswith((": 0", ": 1"))] == []


def test_every_parameter_on_the_reference_pages_has_a_description() -> None:
    items = [
        (page.name, item)
        for page in SITE.glob("reference/*.html")
        for item in re.findall(r'<li class="doc-section-item.*?</li>', page.read_text(), re.DOTALL)
    ]
    assert len(items) > 100
    described = [(name, re.sub(r"<[^>]+>", "", item).partition(DASH)) for name, item in items]
    assert [(name, told[0]) for name, told in described if not told[2].strip()] == []


def test_search_finds(found: list[dict[str, Any]]) -> None:
    results = {r["words"]: r["found"] for r in found if "words" in r}
    for words, expected in SEARCHED.items():
        assert any(expected in text.lower() for text in results[words]), (words, results[words][:3])
