"""A capture report as HTML: the table with bars and badges, and the source with its captured names.

Every string is escaped, since names and sources can contain anything. There are no scripts and no
external resources. Class names start with ``fvr-``, so that the styles do not affect the notebook.
Not here: the contents of the report.
"""

import importlib
from bisect import bisect_right
from collections.abc import Iterator
from html import escape
from itertools import chain
from pathlib import Path

from freevars.report._data import CapturedValue, ReportData
from freevars.report._source import Read, ReadSite, Source
from freevars.report._strings import clean, size

__all__ = ["fragment", "page"]

_MOST_LISTED = 6  # captured values named in the tooltip of one place of the source
_COLUMNS = ("Captured value", "Type", "Size", "Kind", "Derivative", "Hoisted", "Reads")

# Pygments' token types, by the start of their name, and the class that colours them here.
_TOKENS = (
    ("Token.Keyword", "k"),
    ("Token.Operator.Word", "k"),
    ("Token.Literal.String", "s"),
    ("Token.Literal.Number", "n"),
    ("Token.Comment", "c"),
    ("Token.Name.Function", "f"),
    ("Token.Name.Class", "f"),
    ("Token.Name.Decorator", "d"),
    ("Token.Name.Builtin", "b"),
)


def page(report: ReportData) -> str:
    """A whole HTML document, which a browser is told to run and load nothing for."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(report.fun)}: captured values</title>\n"
        f"<style>{_style('page.css')}</style></head>\n"
        f"<body>{fragment(report)}</body></html>\n"
    )


def fragment(report: ReportData) -> str:
    """The report as one ``div``, for a notebook."""
    where = f'<span class="fvr-where">{_text(str(report.where))}</span>' if report.where else ""
    style = _style("style.css")
    parts = [
        f'<div class="freevars-report"><style>{style}</style>',
        f'<div class="fvr-head"><span class="fvr-fun">{_text(report.fun)}</span>{where}</div>',
        f'<div class="fvr-totals">{_totals(report)}</div>',
        *(f'<div class="fvr-warning">{_text(warning)}</div>' for warning in report.warnings),
    ]
    if report.values:
        parts.append(_table(report))
    if report.source is not None:
        parts.append(_source(report, report.source))
    parts.append("</div>")
    return "\n".join(parts)


def _style(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    return escape(clean(text), quote=True)


def _totals(report: ReportData) -> str:
    facts = [
        (str(report.count), "captured value" if report.count == 1 else "captured values"),
        (size(report.nbytes), "in all"),
        (str(sum(value.hoisted for value in report.values)), "hoisted"),
        (str(sum(value.differentiable for value in report.values)), "differentiable"),
        (str(sum(value.concrete for value in report.values)), "concrete"),
    ]
    facts += [(report.device, "")] if report.device else []
    return "".join(f"<span><b>{_text(much)}</b> {_text(what)}</span>" for much, what in facts)


def _table(report: ReportData) -> str:
    most = max(value.nbytes for value in report.values)
    head = "".join(f"<th>{_text(title)}</th>" for title in _COLUMNS)
    rows = "\n".join(_row(value, most, show_device=not report.device) for value in report.values)
    return (
        f'<div class="fvr-scroll"><table class="fvr-table"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(value: CapturedValue, most: int, *, show_device: bool) -> str:
    aliases = "".join(
        f'<div class="fvr-also">also <code>{_text(name)}</code></div>' for name in value.names[1:]
    )
    path = f'<div class="fvr-path">{_text(value.paths[0])}</div>' if value.paths else ""
    on = value.device if show_device else ""
    device = f'<div class="fvr-also">{_text(on)}</div>' if on else ""
    share = 100 * value.nbytes / most if most else 0
    bar = f'<span class="fvr-bar"><i style="width:{share:.1f}%"></i></span>'
    traced = [_badge(by, "traced") for by in value.traced_by] or [_badge("concrete", "concrete")]
    flows = _badge("flows", "flows") if value.differentiable else '<span class="fvr-no">none</span>'
    policy = f' <span class="fvr-no">{_text(value.policy)}</span>' if value.policy else ""
    reason = policy if " " in value.policy else ""  # in words, for one that is kept
    hoisted = f"yes{policy}" if value.hoisted else f'<span class="fvr-no">no</span>{reason}'
    cells = (
        f'<code class="fvr-name">{_text(value.name)}</code>{aliases}{path}{_sites(value)}',
        f"<code>{_text(value.type_text)}</code>{device}",
        f"{_text(size(value.nbytes))}{bar}",
        f'<span class="fvr-badges">{_badge(value.kind, value.kind)}{"".join(traced)}</span>',
        flows,
        hoisted,
        str(value.reads),
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _badge(text: str, kind: str) -> str:
    return f'<span class="fvr-badge fvr-{_text(kind)}">{_text(text)}</span>'


def _sites(value: CapturedValue) -> str:
    if not value.sites:
        return ""
    others = len(value.sites) - 1
    more = f" and on {others} more line{'s' * (others > 1)}" if others else ""
    lines = "".join(f"<li>{_site(site)}</li>" for site in value.sites)
    first = _text(str(value.sites[0]))
    return f"<details><summary>read at {first}{more}</summary><ul>{lines}</ul></details>"


def _site(site: ReadSite) -> str:
    return f'<span class="fvr-where">{_text(str(site))}</span> <code>{_text(site.text)}</code>'


# The source: syntax in colour, and captured names marked where they are read.

_Token = tuple[int, int, str]  # start, end, class


def _source(report: ReportData, source: Source) -> str:
    tokens = _tokens(source.text)
    marks = _marks(report, source)
    reading = {s.line for value in report.values for s in value.sites if s.file == source.file}
    html = []
    start = 0
    for row, text in enumerate(source.text.split("\n")):
        number = source.line + row
        seen = " fvr-reads" if number in reading else ""
        line = _line(source.text, start, len(text), tokens, marks.get(row, []))
        html.append(f'<span class="fvr-line{seen}"><i>{number}</i>{line}\n</span>')
        start += len(text) + 1
    return f'<pre class="fvr-source">{"".join(html)}</pre>'


def _line(
    text: str, start: int, length: int, tokens: list[_Token], marks: list[tuple[Read, str, str]]
) -> str:
    html = []
    position = 0
    for read, style, title in marks:
        html.append(_coloured(text, start + position, start + read.start, tokens))
        inner = _coloured(text, start + read.start, start + read.end, tokens)
        html.append(f'<mark class="{style}" title="{_text(title)}">{inner}</mark>')
        position = read.end
    html.append(_coloured(text, start + position, start + length, tokens))
    return "".join(html)


def _coloured(text: str, start: int, end: int, tokens: list[_Token]) -> str:
    html = []
    first = max(bisect_right(tokens, start, key=lambda token: token[0]) - 1, 0)
    for begin, finish, style in tokens[first:]:
        if begin >= end:
            break
        part = "\t".join(map(_text, text[max(begin, start) : min(finish, end)].split("\t")))
        if part:
            html.append(f'<span class="fvr-{style}">{part}</span>' if style else part)
    return "".join(html)


def _tokens(text: str) -> list[_Token]:
    """The whole text cut into tokens; one plain piece where Pygments is not installed."""
    try:
        # By name: Pygments is an extra, and this file may import the standard library only.
        lexers = importlib.import_module("pygments.lexers")
    except ImportError:
        return [(0, len(text), "")]
    lexer = lexers.PythonLexer(stripnl=False, ensurenl=False)
    tokens = []
    for start, kind, part in lexer.get_tokens_unprocessed(text):
        style = next((style for prefix, style in _TOKENS if str(kind).startswith(prefix)), "")
        tokens.append((start, start + len(part), style))
    return tokens


def _marks(report: ReportData, source: Source) -> dict[int, list[tuple[Read, str, str]]]:
    """Row by row, the expressions that are a captured value or lead to one: style and tooltip."""
    leading: dict[str, list[CapturedValue]] = {}
    for value in report.values:
        for name in dict.fromkeys(chain.from_iterable(map(_prefixes, value.names))):
            leading.setdefault(name.removeprefix(f"{report.fun}."), []).append(value)
    longest: dict[tuple[int, int], Read] = {}
    for read in source.reads:
        if read.text in leading or f"<default {read.text}>" in leading:
            before = longest.get((read.row, read.start))
            if before is None or read.end > before.end:
                longest[read.row, read.start] = read
    rows: dict[int, list[tuple[Read, str, str]]] = {}
    for (row, _), read in sorted(longest.items()):
        values = leading.get(read.text) or leading[f"<default {read.text}>"]
        style = "fvr-concrete" if all(value.concrete for value in values) else "fvr-traced"
        listed = [f"{value.name}: {value.type_text}" for value in values[:_MOST_LISTED]]
        more = [f"and {len(values) - _MOST_LISTED} more"] if len(values) > _MOST_LISTED else []
        rows.setdefault(row, []).append((read, style, "; ".join(listed + more)))
    return rows


def _prefixes(name: str) -> Iterator[str]:
    """``a``, ``a.b`` and ``a.b[0]`` for ``a.b[0]``."""
    for index, character in enumerate(name):
        if character in ".[" and index:
            yield name[:index]
    yield name
