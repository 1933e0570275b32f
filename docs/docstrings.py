"""Griffe extension: a docstring's entry for several names, 'query, key: ...', is one for each."""

import re

import griffe

_SEVERAL = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+)(?P<text>:.*(?:\n(?P=indent) +.*)*)", re.MULTILINE
)


def one_each(docstring: str) -> str:
    """The same with an entry for each name."""
    return _SEVERAL.sub(
        lambda m: "\n".join(f"{m['indent']}{name}{m['text']}" for name in m["names"].split(", ")),
        docstring,
    )


class OneEach(griffe.Extension):
    """Acts before a docstring is parsed, so that each name gets its type and default."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = one_each(obj.docstring.value)
