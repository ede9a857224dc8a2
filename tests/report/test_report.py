"""Reports: text within its columns, plain data, and HTML that a browser shows and never runs."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from freevars._names.search import name_values
from freevars.report import (
    CapturedValue,
    CaptureReport,
    ReadSite,
    Source,
    captured_by,
    describe,
    read_site,
    source_of,
)
from freevars.report._strings import clean, fit, size

EVIL = (
    "</code><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)


class Array:
    """Stands for an array."""


def example() -> CaptureReport:
    params = {"dense": {"kernel": Array(), "bias": Array()}}
    data = Array()
    lam = Array()

    def objective(x: Any, lam: Any = lam) -> Any:
        h = x @ params["dense"]["kernel"] + params["dense"]["bias"]
        return ((h - data) ** 2).sum() * lam  # type: ignore[operator]

    values = [params["dense"]["kernel"], params["dense"]["bias"], data, lam]
    source = source_of(objective)
    assert source is not None
    facts: list[dict[str, Any]] = [
        {"shape": (30, 64), "nbytes": 7680, "traced_by": ("grad", "vmap", "jit"), "reads": 2},
        {"shape": (64,), "nbytes": 256, "traced_by": ("grad",), "reads": 1},
        {"shape": (4096, 512), "nbytes": 8 << 20, "reads": 1},
        {"nbytes": 4, "traced_by": ("jit",), "reads": 1},
    ]
    captured = [
        CapturedValue(
            names=tuple(name.name for name in names),
            paths=tuple(name.path for name in names),
            dtype="float32",
            device="cpu:0",
            differentiable="traced_by" in fact,
            hoisted="traced_by" in fact,
            policy="traced" if "traced_by" in fact else "",
            sites=(read_site(source.file, source.line + (1 if index < 2 else 2)),),
            captured_by=captured_by(objective),
            **fact,
        )
        for index, (names, fact) in enumerate(
            zip(name_values(objective, values), facts, strict=True)
        )
    ]
    made = ReadSite("/home/me/model.py", 7, "h = x @ w")
    derived = CapturedValue(
        made_at=made, dtype="float32", kind="derived", traced_by=("grad",), hoisted=True
    )
    return CaptureReport(
        fun="objective",
        where=read_site(source.file, source.line),
        source=source,
        values=(*captured, derived),
    )


def test_text() -> None:
    report = example()
    lines = str(report).split("\n")
    file = Path(__file__).name
    assert report.where is not None
    assert " ".join(lines[:2]).startswith(
        f"objective ({file}:{report.where.line}) captures 5 values, 8.0 MiB: 4 hoisted, "
        "3 differentiable, 1 concrete"
    )
    text = "\n".join(lines)
    assert re.search(
        r"params\['dense'\]\['kernel'\] +float32\[30,64\] +7.5 KiB +leaf, grad vmap jit +yes "
        r"+traced +2\n",
        text,
    )
    assert re.search(r"value made at model.py:7 +float32\[\] +0 B +derived, grad", text)
    assert "    path  objective.__closure__['params']['dense']['bias']" in lines
    assert f"    read  {file}:{report.where.line + 2}  return ((h - data)" in text
    assert re.search(
        r"warning: 1 concrete capture holds 8.0 MiB .* data \(8.0 MiB\)", " ".join(lines)
    )


@pytest.mark.parametrize(
    "name",
    [
        "w",
        "params" + "['encoder']" * 30,
        "参数['权重']" * 20,
        "é\u0301" * 90,
        "line\nbreak\x1b[31m\u202e" * 20,
        EVIL,
    ],
)
def test_text_fits_100_columns_whatever_the_names(name: str) -> None:
    site = ReadSite("/tmp/" + "f" * 150 + ".py", 10**6, "x" * 300)
    value = CapturedValue(
        names=(name, name + "2"),
        paths=(name * 2, name * 3),
        shape=tuple(range(1000, 1020)),
        dtype="float32",
        nbytes=10**15,
        device="sharding " * 20,
        traced_by=("grad", "vmap", "jit", "scan", "remat"),
        policy="declared constant",
        hoisted=True,
        reads=10**9,
        sites=(site,) * 5,
    )
    other = dataclasses.replace(value, device="cpu:0")
    text = str(CaptureReport(fun=name, where=site, values=(value, other)))
    assert max(len(line) for line in text.split("\n")) <= 100
    assert all(character.isprintable() for line in text.split("\n") for character in line)
    assert "on 2 more lines" in text


def test_long_reports_say_what_they_leave_out() -> None:
    values = tuple(CapturedValue(names=(f"w[{i}]",), nbytes=i) for i in range(1000))
    report = CaptureReport(fun="f", values=values)
    lines = str(report).split("\n")
    assert lines[-1] == "… and 960 more; see largest_first(), values, to_dict() or save()"
    assert report.largest_first().values[0].name == "w[999]"
    assert report.values[0].name == "w[0]"
    assert (report.count, report.nbytes) == (1000, 499500)


def test_nothing_captured() -> None:
    report = CaptureReport(fun="f")
    assert str(report) == "f captures nothing"
    assert "table" not in Page(report._repr_html_()).tags


def test_names_of_values_without_a_name() -> None:
    site = ReadSite("/home/me/model.py", 41, "y = x")
    assert CapturedValue(made_at=site).name == "value made at model.py:41"
    assert CapturedValue(sites=(site,)).name == "value read at model.py:41"
    assert CapturedValue().name == "value of unknown origin"


def test_a_warning_needs_large_constants() -> None:
    large = CapturedValue(names=("data",), nbytes=1 << 20)
    traced = dataclasses.replace(large, traced_by=("jit",))
    hoisted = dataclasses.replace(large, hoisted=True)
    small = dataclasses.replace(large, nbytes=(1 << 20) - 1)
    for value in (traced, hoisted, small):
        assert CaptureReport(fun="f", values=(value,)).warnings == ()
    assert CaptureReport(fun="f", values=(large,), bakes_in=False).warnings == ()
    (warning,) = CaptureReport(fun="f", values=(small, large)).warnings
    assert "2 concrete captures hold 2.0 MiB" in warning
    assert "the largest is data (1.0 MiB)" in warning


def test_describe() -> None:
    value = CapturedValue(
        names=("params['w']",),
        shape=(3,),
        dtype="float32",
        captured_by="objective at model.py:41",
        sites=(ReadSite("/home/me/model.py", 44, 'x @ params["w"]'),),
    )
    assert describe(value) == (
        "params['w'] (float32[3], captured by objective at model.py:41, first read at model.py:44: "
        "'x @ params[\"w\"]')"
    )
    assert describe(CapturedValue(names=("w",), dtype="int32")) == "w (int32[])"
    assert "\n" not in describe(CapturedValue(names=("a\nb",)))


def test_a_value_that_is_kept_says_why() -> None:
    value = CapturedValue(names=("w",), paths=("f.__closure__['w']",), policy="held by a rule")
    report = CaptureReport(fun="f", values=(value, dataclasses.replace(value, policy="traced")))
    assert str(report).count("kept") == 1
    assert "    kept  held by a rule" in str(report)
    assert report._repr_html_().count("held by a rule") == 1
    assert describe(value).startswith("w ([] at f.__closure__['w']")


def test_plain_data() -> None:
    data = json.loads(json.dumps(example().to_dict()))
    assert data["fun"] == "objective"
    assert data["count"] == 5
    assert data["nbytes"] == sum(value["nbytes"] for value in data["values"])
    first = data["values"][0]
    assert first["name"] == first["names"][0] == "params['dense']['kernel']"
    assert first["traced_by"] == ["grad", "vmap", "jit"]
    assert first["sites"][0]["text"].startswith("h = x @")
    assert not first["concrete"]
    assert data["values"][-1]["made_at"] == {
        "file": "/home/me/model.py",
        "line": 7,
        "text": "h = x @ w",
    }
    assert data["source"]["text"].startswith("def objective(")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (8 << 20, "8.0 MiB"),
        (3 << 60, "3072.0 PiB"),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_fit_and_clean() -> None:
    assert fit("abcdef", 6) == "abcdef"
    assert fit("abcdefg", 6) == "abcde…"
    assert fit("params['encoder']['w']", 12, keep_end=True) == "para…']['w']"
    assert fit("参数参数参数", 5, keep_end=True) == "参数…参数"
    assert clean("a\tb\u202e\ud800") == "a\\tb\\u202e\\ud800"


# HTML


class Page(HTMLParser):
    """The elements and visible text of a page, and the text of each mark."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.marks: list[str] = []
        self.lines: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "mark":
            self.marks.append("")
        if tag == "pre":
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "mark" in self.open:
            self.marks[-1] += data
        if "pre" in self.open and "i" not in self.open:
            self.lines[-1] += data


def evil_report() -> CaptureReport:
    site = ReadSite(f"/tmp/{EVIL}.py", 3, EVIL)
    value = CapturedValue(
        names=(EVIL, f"also {EVIL}"),
        paths=(EVIL,),
        dtype=EVIL,
        nbytes=2 << 20,
        device=EVIL,
        traced_by=(),
        policy=EVIL,
        sites=(site, site),
        made_at=site,
    )
    traced = dataclasses.replace(value, traced_by=(EVIL,), device="", hoisted=True)
    source = Source(site.file, 1, f"def f(x):\n\treturn {EVIL!r}\n# {EVIL}")
    return CaptureReport(fun=EVIL, where=site, source=source, values=(value, traced))


def saved(report: CaptureReport, tmp_path: Path) -> str:
    path = tmp_path / "closure.html"
    report.save(path)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("report", [example(), evil_report()], ids=["example", "evil"])
def test_html_is_well_formed_and_holds_nothing_that_runs_or_loads(
    report: CaptureReport, tmp_path: Path
) -> None:
    for html in (report._repr_html_(), saved(report, tmp_path)):
        page = Page(html)
        assert not page.open
        assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
        assert not {name for name in page.attributes if name.startswith("on")}
        assert not {"src", "href"} & page.attributes
        assert "url(" not in html
        assert "@import" not in html


def test_html_marks_captured_names_where_they_are_read() -> None:
    report = example()
    page = Page(report._repr_html_())
    assert page.marks == [
        'params["dense"]["kernel"]',
        'params["dense"]["bias"]',
        "data",
        "lam",
    ]
    assert report.source is not None
    assert page.lines[0] == report.source.text + "\n"
    assert 'title="params[&#x27;dense&#x27;][&#x27;kernel&#x27;]: float32[30,64]"' in (
        report._repr_html_()
    )


def test_a_container_that_leads_to_captured_values_is_marked() -> None:
    params = {"a": Array(), "b": Array()}

    def objective(x: Any) -> Any:
        return [x @ params[name] for name in params]

    values = tuple(CapturedValue(names=(f"params['{key}']",)) for key in params)
    report = CaptureReport(fun="objective", source=source_of(objective), values=values)
    assert Page(report._repr_html_()).marks == ["params", "params"]


def test_html_without_pygments(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    coloured = example()._repr_html_()
    assert 'class="fvr-k"' in coloured
    monkeypatch.setattr(importlib, "import_module", missing)
    page = Page(example()._repr_html_())
    assert page.marks == Page(coloured).marks
    assert page.lines == Page(coloured).lines
    assert 'class="fvr-k"' not in example()._repr_html_()


def test_a_notebook_keeps_its_own_looks() -> None:
    style = re.search(r"<style>(.*?)</style>", example()._repr_html_(), re.DOTALL)
    assert style is not None
    rules = re.sub(r"/\*.*?\*/", "", style[1], flags=re.DOTALL)
    selectors = [s for rule in re.findall(r"([^{}]+)\{", rules) for s in rule.split(",")]
    assert len(selectors) > 40
    assert all(".freevars-report" in selector for selector in selectors)


def test_a_thousand_values_are_reported(tmp_path: Path) -> None:
    tree = {f"layer{i}": [Array() for _ in range(10)] for i in range(100)}

    def objective(x: Any) -> Any:
        return [x @ w for layer in tree.values() for w in layer]

    leaves = [w for layer in tree.values() for w in layer]
    named = name_values(objective, leaves)
    values = tuple(
        CapturedValue(names=tuple(n.name for n in names), paths=tuple(n.path for n in names))
        for names in named
    )
    report = CaptureReport(fun="objective", source=source_of(objective), values=values)
    text, html = str(report), saved(report, tmp_path)
    report.to_dict()
    assert "tree['layer0'][0]" in text
    assert "tree[&#x27;layer99&#x27;][9]" in html


# A real browser

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the path (on Debian: apt-get install chromium)"
)


def browse(page: Path, *flags: str) -> str:
    """The page as the browser has it once it is loaded."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={page.parent / 'profile'}",
        *flags,
        page.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, check=True, timeout=120)
    return shown.stdout.decode()


@browser
def test_browser_shows_the_report(tmp_path: Path) -> None:
    saved(example(), tmp_path)
    dom = browse(tmp_path / "closure.html", "--dump-dom")
    page = Page(dom)
    assert page.marks == [
        'params["dense"]["kernel"]',
        'params["dense"]["bias"]',
        "data",
        "lam",
    ]
    assert "<title>objective: captured values</title>" in dom
    assert "8.0 MiB" in dom


# The canary below proves that the checks can fail: with the same payload unescaped, it does run.
CANARY = f"<!DOCTYPE html><title>quiet</title><body>{EVIL}</body>"


@browser
@pytest.mark.slow
def test_browser_runs_nothing(tmp_path: Path) -> None:
    page = tmp_path / "closure.html"
    page.write_text(CANARY)
    assert "<title>owned</title>" in browse(page, "--dump-dom")
    html = saved(evil_report(), tmp_path)
    # Without the policy too: the escaping alone must hold, as it has to in a notebook.
    for text in (html, re.sub(r"<meta http-equiv[^>]*>", "", html)):
        page.write_text(text)
        dom = browse(page, "--dump-dom")
        assert "<title>owned</title>" not in dom
        assert "captured values</title>" in dom
        assert not {"script", "img"} & set(Page(dom).tags)


@browser
@pytest.mark.parametrize(("scheme", "background"), [(1, "light"), (0, "dark")])
@pytest.mark.slow
def test_browser_paints_light_and_dark(tmp_path: Path, scheme: int, background: str) -> None:
    saved(example(), tmp_path)
    picture = tmp_path / "closure.png"
    browse(
        tmp_path / "closure.html",
        f"--screenshot={picture}",
        "--window-size=1180,900",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    pixels = pytest.importorskip("matplotlib.image").imread(picture)[..., :3]
    assert pixels.std() > 0.01, "a blank page"
    edge = float(pixels[5:15, 5:15].mean())
    middle = float(pixels[300, ::].mean())
    assert (
        (edge > 0.8 and middle > 0.8) if background == "light" else (edge < 0.2 and middle < 0.35)
    )
