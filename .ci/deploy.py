#!/usr/bin/env python3
"""Check the Dockerfile, and what the README has for Compose and Kubernetes.

    .venv/bin/python .ci/deploy.py    in two seconds, with the tools of `make lint`

The units in the README are checked by peers.py, for which systemd has to be there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml  # type: ignore[import-untyped]

CHECKOUT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent
# The name of the file, and the block behind it.
BLOCK = re.compile(r"^`([\w.-]+\.yaml)`:\n\n```yaml\n(.*?)^```$", re.M | re.S)
COMPOSE = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
KUBERNETES = ("kubernetes-validate", "--strict")


def holds(*command: str) -> bool:
    """Run a tool on a file; what it says is shown."""
    print("$", *command, flush=True)
    tool, *options = command
    return subprocess.run([str(TOOLS / tool), *options], cwd=CHECKOUT).returncode == 0


def parse(text: str) -> list[object]:
    """Parse documents, and those in the configurations of a Compose file."""
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        for inner in document.get("configs", {}).values():
            yaml.safe_load(inner["content"])
    return documents


def main() -> int:
    blocks = BLOCK.findall((CHECKOUT / "README.md").read_text())
    good = [len(blocks) >= 3, holds("hadolint", "Dockerfile")]
    with tempfile.TemporaryDirectory() as directory:
        for name, text in blocks:
            print(f"{name}: {len(parse(text))} documents")
            path = Path(directory, name)
            path.write_text(text)
            tool = COMPOSE if name == "compose.yaml" else KUBERNETES
            good.append(holds(*tool, str(path)))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
