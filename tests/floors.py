"""Print the lowest versions that pyproject.toml allows, as a constraints file for pip.

    pip install --no-deps --editable . && python tests/floors.py > floors.txt

`make floors` installs exactly these and runs the fast tests with them.
"""

import re
import sys
from importlib.metadata import requires


def floors(requirements: list[str]) -> list[str]:
    """Turn each ``name>=version`` into ``name==version``; tools without a floor are left out."""
    lowest = {}
    for requirement in requirements:
        if match := re.match(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)", requirement):
            name, version = match.groups()
            if lowest.setdefault(name, version) != version:
                raise ValueError(f"{name} has two floors: {lowest[name]} and {version}")
    return [f"{name}=={version}" for name, version in sorted(lowest.items())]


if __name__ == "__main__":
    sys.stdout.write("\n".join(floors(requires("mtpf") or [])) + "\n")
