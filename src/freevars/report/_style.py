"""The looks of a capture report, light and dark.

Colours are explicit in both, so the report reads well whatever surrounds it. A notebook that says
which theme it has (JupyterLab, VS Code, Sphinx themes) is believed before the browser's preference.
"""

__all__ = ["PAGE_STYLE", "STYLE"]

_LIGHT = """
--bg:#ffffff;--fg:#1f2328;--dim:#59636e;--line:#d9dee4;--head:#f6f8fa;--hover:#f3f6f9;
--bar:#3b82c4;--rail:#e6ebf0;--warn-bg:#fff6dd;--warn-fg:#6b4a00;--warn-line:#e3b341;
--leaf-bg:#e3efff;--leaf-fg:#0b4a9e;--derived-bg:#f0e7ff;--derived-fg:#5b2aa6;
--traced-bg:#dff5e3;--traced-fg:#14622a;--concrete-bg:#ffe9d5;--concrete-fg:#8a3b00;
--mark-traced:#c9f0d2;--mark-concrete:#ffdcbc;
--k:#a3206f;--s:#0a5a33;--n:#0b57a8;--c:#6a737d;--f:#5b2aa6;--d:#8a5a00;--b:#0b6a78;
color-scheme:light;
"""

_DARK = """
--bg:#15181d;--fg:#e3e8ee;--dim:#98a3b0;--line:#323a44;--head:#1d2229;--hover:#1c2128;
--bar:#5aa2e6;--rail:#2a313a;--warn-bg:#33290f;--warn-fg:#f2d48a;--warn-line:#8a6a1c;
--leaf-bg:#17314f;--leaf-fg:#a9cffa;--derived-bg:#33254d;--derived-fg:#d3bdfb;
--traced-bg:#163621;--traced-fg:#9be0ae;--concrete-bg:#46290f;--concrete-fg:#fcc595;
--mark-traced:#1f5232;--mark-concrete:#643b14;
--k:#f08cc8;--s:#8fd6a8;--n:#8ec2fb;--c:#8b95a1;--f:#c9adfb;--d:#e3c27a;--b:#7fd3e0;
color-scheme:dark;
"""

_DARK_AROUND = (
    '[data-jp-theme-light="false"]',
    '[data-theme="dark"]',
    ".vscode-dark",
    ".vscode-high-contrast:not(.vscode-high-contrast-light)",
)
_LIGHT_AROUND = ('[data-jp-theme-light="true"]', '[data-theme="light"]', ".vscode-light")


def _within(around: tuple[str, ...]) -> str:
    return ",".join(f"{selector} .freevars-report" for selector in around)


_THEMES = f"""
.freevars-report{{{_LIGHT}}}
@media (prefers-color-scheme:dark){{.freevars-report{{{_DARK}}}}}
{_within(_LIGHT_AROUND)}{{{_LIGHT}}}
{_within(_DARK_AROUND)}{{{_DARK}}}
"""

_LAYOUT = """
.freevars-report{background:var(--bg);color:var(--fg);border:1px solid var(--line);
border-radius:8px;padding:14px 16px;max-width:1120px;box-sizing:border-box;text-align:left;
font:13px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.freevars-report code,.freevars-report .fvr-source,.freevars-report .fvr-path,
.freevars-report .fvr-fun,.freevars-report .fvr-where{
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
background:none;color:inherit;border:0;padding:0}
.freevars-report code{font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere}
.freevars-report .fvr-head{display:flex;align-items:baseline;gap:10px;flex-wrap:wrap}
.freevars-report .fvr-fun{font-size:16px;font-weight:600;overflow-wrap:anywhere}
.freevars-report .fvr-where{color:var(--dim);font-size:12px}
.freevars-report .fvr-totals{display:flex;flex-wrap:wrap;gap:4px 18px;margin:6px 0 10px;
color:var(--dim)}
.freevars-report .fvr-totals b{color:var(--fg);font-weight:600}
.freevars-report .fvr-warning{background:var(--warn-bg);color:var(--warn-fg);
border-left:3px solid var(--warn-line);border-radius:4px;padding:7px 11px;margin:0 0 10px}
.freevars-report .fvr-scroll{max-height:560px;overflow:auto;border:1px solid var(--line);
border-radius:6px}
.freevars-report .fvr-table{border-collapse:separate;border-spacing:0;width:100%;margin:0;
border:0;font-size:13px;color:var(--fg);table-layout:auto}
.freevars-report .fvr-table thead tr th{position:sticky;top:0;background:var(--head);
color:var(--dim);font-weight:600;font-size:12px;text-align:left;padding:6px 10px;border:0;
border-bottom:1px solid var(--line);white-space:nowrap}
.freevars-report .fvr-table tbody tr td{text-align:left;vertical-align:top;padding:7px 10px;
border:0;border-bottom:1px solid var(--line);background:var(--bg);color:var(--fg);
white-space:normal;max-width:none}
.freevars-report .fvr-table tbody tr:last-child td{border-bottom:0}
.freevars-report .fvr-table tbody tr:hover td{background:var(--hover)}
.freevars-report .fvr-table tbody tr td:first-child{min-width:240px}
.freevars-report .fvr-table tbody tr td:nth-child(3){white-space:nowrap;min-width:84px}
.freevars-report .fvr-table tbody tr td:nth-child(6){white-space:nowrap}
.freevars-report .fvr-table tbody tr td:nth-child(2) code{overflow-wrap:normal}
.freevars-report .fvr-name{font-weight:600;font-size:13px}
.freevars-report .fvr-also,.freevars-report .fvr-path{color:var(--dim);font-size:11px;
overflow-wrap:anywhere}
.freevars-report .fvr-also code{font-size:11px}
.freevars-report .fvr-no{color:var(--dim)}
.freevars-report .fvr-bar{display:block;height:5px;margin-top:4px;border-radius:3px;
background:var(--rail);overflow:hidden}
.freevars-report .fvr-bar i{display:block;height:100%;min-width:2px;border-radius:3px;
background:var(--bar)}
.freevars-report .fvr-badges{display:flex;flex-wrap:wrap;gap:4px}
.freevars-report .fvr-badge{display:inline-block;border-radius:10px;padding:0 8px;font-size:11px;
line-height:18px;font-weight:600;white-space:nowrap}
.freevars-report .fvr-leaf{background:var(--leaf-bg);color:var(--leaf-fg)}
.freevars-report .fvr-derived{background:var(--derived-bg);color:var(--derived-fg)}
.freevars-report .fvr-traced,.freevars-report .fvr-flows{background:var(--traced-bg);
color:var(--traced-fg)}
.freevars-report .fvr-concrete{background:var(--concrete-bg);color:var(--concrete-fg)}
.freevars-report details summary{cursor:pointer;color:var(--dim);font-size:11px}
.freevars-report details ul{list-style:none;margin:4px 0 0;padding:0}
.freevars-report details li{margin:2px 0;padding:0}
.freevars-report .fvr-source{margin:12px 0 0;padding:8px 0;border:1px solid var(--line);
border-radius:6px;background:var(--bg);color:var(--fg);overflow:auto;font-size:12.5px;
line-height:1.6;max-height:640px;white-space:pre}
.freevars-report .fvr-line{display:block;padding-right:14px;border-left:3px solid transparent;
min-width:max-content}
.freevars-report .fvr-line i{display:inline-block;width:44px;margin-right:14px;text-align:right;
color:var(--dim);font-style:normal;user-select:none}
.freevars-report .fvr-reads{border-left-color:var(--bar);background:var(--hover)}
.freevars-report .fvr-source mark{color:inherit;border-radius:3px;padding:1px 2px;margin:0 -2px;
cursor:help}
.freevars-report .fvr-source mark.fvr-traced{background:var(--mark-traced)}
.freevars-report .fvr-source mark.fvr-concrete{background:var(--mark-concrete)}
.freevars-report .fvr-k{color:var(--k)}
.freevars-report .fvr-s{color:var(--s)}
.freevars-report .fvr-n{color:var(--n)}
.freevars-report .fvr-c{color:var(--c)}
.freevars-report .fvr-f{color:var(--f)}
.freevars-report .fvr-d{color:var(--d)}
.freevars-report .fvr-b{color:var(--b)}
"""

STYLE = _THEMES + _LAYOUT

PAGE_STYLE = """
body{margin:0;padding:24px;background:#eef1f4}
.freevars-report{margin:0 auto}
@media (prefers-color-scheme:dark){body{background:#0c0e11}}
"""
