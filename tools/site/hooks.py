"""What the site shows beyond docs/: the gallery, the changes, how to contribute, a live report.

MkDocs calls these functions (see ``hooks`` in mkdocs.yml). The pages of docs/ link to files of the
repository the way they lie there, so that the links work in a checkout; here they are made links to
the pages that show those files. Not here: running the examples (``tools/gallery.py`` did, before).
"""

import base64
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
RUNS = ROOT / "build" / "gallery"
FILES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "SECURITY.md": "security.md",
}
PICTURE = re.compile(r"!\[[^\]]*\]\(images/captures\.png\)")  # of a report: shown live instead
LIVE = "assets/captures.html"
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts a page for each example into the navigation."""
    pages = [f"gallery/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.py"))]
    for section in config.nav or ():
        if "Gallery" in section:
            section["Gallery"] = ["gallery/index.md", *pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made from files outside docs/."""
    for source, page in FILES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    names = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    cards = []
    for name in names:
        run = RUNS / name
        if not (run / f"{name}.ipynb").exists():
            raise PluginError(f"no run of examples/{name}.py: run tools/gallery.py first")
        notebook = json.loads((run / f"{name}.ipynb").read_text())
        for number, picture in enumerate(_pictures(notebook), 1):
            uri = f"gallery/{name}-{number}.png"
            files.append(File.generated(config, uri, content=picture))
        for source, uri in _beside(name):
            files.append(File.generated(config, uri, abs_src_path=str(source)))
        title, page = _page(name, notebook)
        files.append(File.generated(config, f"gallery/{name}.md", content=page))
        cards.append(_card(name, title, notebook))
    for job in sorted((ROOT / "examples" / "distributed").glob("*.py")):
        uri = f"gallery/distributed/{job.name}"
        files.append(File.generated(config, uri, abs_src_path=str(job)))
    index = GALLERY.replace("CARDS", "\n".join(cards))
    files.append(File.generated(config, "gallery/index.md", content=index))
    report = RUNS / "captures.html"
    files.append(File.generated(config, "assets/captures.html", abs_src_path=str(report)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turns links to files of the repository into links to the pages that show them."""
    folder = posixpath.dirname(page.file.src_uri)

    def relink(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, link[1]))
        if page.file.src_uri in FILES.values():
            target = posixpath.normpath(link[1])
        example = re.fullmatch(r"examples/(\w+)\.py", target)
        shown = f"gallery/{example[1]}.md" if example else FILES.get(target)
        if re.fullmatch(r"examples/\w+/\w+\.py", target):
            shown = target.replace("examples/", "gallery/")
        if shown is None and page.file.src_uri in FILES.values():
            shown = target.removeprefix("docs/")
        if shown is None:
            return link[0]
        return f"]({posixpath.relpath(shown, folder or '.')}{link[2] or ''})"

    live = f'<iframe class="report" title="A capture report" src="{LIVE}"></iframe>'
    return LINK.sub(relink, PICTURE.sub(live, markdown))


GALLERY = """# Gallery

Whole programs, run as notebooks when this site was built; each checks its own result. What they
print and draw is from that run. They are in the folder `examples` of the repository, as scripts in
cells, which editors and jupytext open as notebooks.

<div class="grid cards gallery" markdown>

CARDS

</div>

Two jobs outgrow one machine, and compare themselves with one process: hyperparameters over two
processes of four devices each, [in JAX](distributed/jax_job.py), and the same under `torchrun`,
[in PyTorch](distributed/torch_job.py). `make demo-distributed` runs both.
"""


def _beside(name: str) -> Iterator[tuple[Path, str]]:
    """(file, its place on the site) of what is shown or offered as it is."""
    yield ROOT / "examples" / f"{name}.py", f"gallery/{name}.py"
    yield RUNS / name / f"{name}.ipynb", f"gallery/{name}.ipynb"
    thumbnail = RUNS / name / "thumbnail.png"
    if thumbnail.exists():
        yield thumbnail, f"gallery/{name}-small.png"


def _pictures(notebook: dict[str, Any]) -> Iterator[bytes]:
    for output in _outputs(notebook):
        if "data" in output:
            yield base64.b64decode(output["data"]["image/png"])


def _outputs(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for cell in notebook["cells"]:
        yield from cell.get("outputs", ())


def _page(name: str, notebook: dict[str, Any]) -> tuple[str, str]:
    """(title, the page) of an example: its cells, with what they printed and drew."""
    about, *cells = notebook["cells"]
    title, _, rest = "".join(about["source"]).partition("\n")
    title = title.rstrip(".")
    rest = re.sub(r"^ {4}python .*$", "", rest, flags=re.MULTILINE).replace("``", "`")
    parts = [f"# {title}", rest, f"[Script]({name}.py) · [Notebook]({name}.ipynb)"]
    drawn = 0
    for cell in cells:
        source = "".join(cell["source"]).strip()
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "data" in output:
                drawn += 1
                parts.append(f"![Figure {drawn}]({name}-{drawn}.png)")
            else:
                printed = "".join(output["text"])
                parts.append(f"```{{.text .printed}}\n{printed}\n```")
    return title, "\n\n".join(parts) + "\n"


def _card(name: str, title: str, notebook: dict[str, Any]) -> str:
    if (RUNS / name / "thumbnail.png").exists():
        shown = f"    [![]({name}-small.png)]({name}.md)"
    else:
        printed = "".join("".join(o["text"]) + "\n" for o in _outputs(notebook) if "text" in o)
        lines = printed.strip().splitlines()[-4:]
        shown = "    ```text\n" + "".join(f"    {line[:60]}\n" for line in lines) + "    ```"
    return f"-   [{title}]({name}.md)\n\n{shown}\n"
