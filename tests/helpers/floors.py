"""The oldest versions that setup.py admits, as pip's requirements: `python -m tests.helpers.floors [EXTRA ...]`."""

import ast
import platform
import re
import sys
from pathlib import Path

SETUP = Path(__file__).parents[2] / "setup.py"


def floors(*extras):
    """`name==version` of everything that is always installed on this system, and of the extras."""
    (call,) = (
        node
        for node in ast.walk(ast.parse(SETUP.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    found = list(ast.literal_eval(arguments["install_requires"]))
    for extra in extras:
        found += ast.literal_eval(arguments["extras_require"])[extra]
    return [_floor(requirement) for requirement in found if _applies(requirement)]


def _applies(requirement):
    _, _, marker = requirement.partition(";")
    return not marker or f"'{platform.system()}'" in marker


def _floor(requirement):
    match = re.match(r"(?P<name>[\w-]+(\[\w+\])?)>=(?P<version>[\d.]+)", requirement)
    return f"{match['name']}=={match['version']}" if match else requirement.partition(";")[0].strip()


if __name__ == "__main__":
    print("\n".join(floors(*sys.argv[1:])))
