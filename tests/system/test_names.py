"""One name for one thing, in the library and the experiments."""

import ast
import collections

from support import ROOT

TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8"))
    for folder in ("attention", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
VAGUE = {"asked", "found", "given", "kept", "seen", "told"}


def test_no_two_classes_share_a_name():
    places = collections.defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    assert not {name: of_name for name, of_name in places.items() if len(of_name) > 1}


def names(node):
    """The variables and arguments that a node binds."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    if isinstance(node, ast.arg):
        yield node.arg
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr


def test_a_name_says_what_a_value_is_and_not_how_it_came():
    vague = {
        f"{path}:{node.lineno} {name}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        for name in names(node)
        if name.lstrip("_") in VAGUE
    }
    assert not vague
