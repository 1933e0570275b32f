"""MkDocs hooks: pages of the site whose text stands outside docs/."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_SETTINGS = """# Settings

Every setting of an experiment, as a flag `--config.<setting>=<value>`. The same table is printed by
`python -m experiments.config.settings`.

"""


def on_files(files, config):
    """Adds results/*.md, CONTRIBUTING.md, CHANGELOG.md, and the tables that are made from code."""
    from docs import mechanisms
    from experiments.config import settings

    for path in sorted((ROOT / "results").glob("*.md")):
        name = f"results/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        files.append(File.generated(config, name.lower(), abs_src_path=str(ROOT / name)))
    table = _SETTINGS + settings.table()
    files.append(File.generated(config, "reference/settings.md", content=table))
    files.append(File.generated(config, "mechanisms.md", content=mechanisms.page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links that leave docs/, as a repository's browser follows them, to these pages."""
    markdown = markdown.replace("](../results/", "](results/")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        markdown = markdown.replace(f"](../{name})", f"]({name.lower()})")
    return markdown
