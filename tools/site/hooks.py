"""What the site shows beyond docs/: the gallery, the changes, how to contribute, a live report.

MkDocs calls these functions (see ``hooks`` in mkdocs.yml). The pages of docs/ link to files of the
repository the way they lie there, so that the links work in a checkout; here they are made links to
the pages that show those files. Not here: running the examples (``tools/gallery.py`` did, before).
"""

import ast
import posixpath
import re
from pathlib import Path

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
        if not (run / "output.txt").exists():
            raise PluginError(f"no run of examples/{name}.py: run tools/gallery.py first")
        pictures = sorted(run.glob("*.png"))
        for picture in pictures:
            files.append(
                File.generated(config, f"gallery/{picture.name}", abs_src_path=str(picture))
            )
        title, page = _example(name, pictures)
        files.append(File.generated(config, f"gallery/{name}.md", content=page))
        cards.append(_card(name, title, pictures))
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
        if shown is None and page.file.src_uri in FILES.values():
            shown = target.removeprefix("docs/")
        if shown is None:
            return link[0]
        return f"]({posixpath.relpath(shown, folder or '.')}{link[2] or ''})"

    live = f'<iframe class="report" title="A capture report" src="{LIVE}"></iframe>'
    return LINK.sub(relink, PICTURE.sub(live, markdown))


GALLERY = """# Gallery

Whole programs, run when this site was built; each checks its own result. What they print and draw
is theirs, from that run. They are in the folder `examples` of the repository.

<div class="grid cards gallery" markdown>

CARDS

</div>
"""


def _example(name: str, pictures: list[Path]) -> tuple[str, str]:
    """(title, the page) of an example: what it says of itself, what it printed, its source."""
    source = (ROOT / "examples" / f"{name}.py").read_text()
    about = ast.get_docstring(ast.parse(source)) or ""
    title, _, rest = about.partition("\n")
    title = title.rstrip(".")
    code = source.split('"""', 2)[2].lstrip()
    rest = re.sub(r"^ {4}python .*$", "", rest, flags=re.MULTILINE).replace("``", "`")
    output = (RUNS / name / "output.txt").read_text().strip()
    shown = "\n".join(f"![What it draws]({picture.name})" for picture in pictures)
    page = (
        f"# {title}\n{rest}\n\n## What it prints\n\n```text\n{output}\n```\n\n{shown}\n\n"
        f'## The program\n\n```python title="examples/{name}.py"\n{code}```\n'
    )
    return title, page


def _card(name: str, title: str, pictures: list[Path]) -> str:
    if pictures:
        shown = f"    [![]({pictures[0].name})]({name}.md)"
    else:
        lines = (RUNS / name / "output.txt").read_text().strip().splitlines()[-4:]
        shown = "    ```text\n" + "".join(f"    {line[:60]}\n" for line in lines) + "    ```"
    return f"-   [{title}]({name}.md)\n\n{shown}\n"
