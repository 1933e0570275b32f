"""Pages of the templates, each one self-contained file."""

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, *, version: str = "", **values: Any) -> str:
    """The page of a template in templates/, which all extend page.html.

    With a `version` the page may ask its server for later ones. Values are escaped unless they are
    markup; one that the template reads and that is not there is an error.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(version=version, **values)
