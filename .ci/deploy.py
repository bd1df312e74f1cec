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
# The name of a file and the block behind it; the command that makes another of one.
BLOCK = re.compile(r"^`([\w.-]+\.yaml)`:\n\n```yaml\n(.*?)^```$", re.M | re.S)
DERIVE = re.compile(r"^    \$ (sed .*\\\n.* > \S+\.yaml)$", re.M)
COMPOSE = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
KUBERNETES = ("kubernetes-validate", "--strict")


def holds(*command: str) -> bool:
    """Run a tool on a file; what it says is shown."""
    print("$", *command, flush=True)
    tool, *options = command
    return subprocess.run([str(TOOLS / tool), *options], cwd=CHECKOUT).returncode == 0


def parse(text: str) -> list[dict[str, object]]:
    """Parse documents, and those in the configurations of a Compose file."""
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        for inner in document.get("configs", {}).values():
            yaml.safe_load(inner["content"])
    return documents


def main() -> int:
    readme = (CHECKOUT / "README.md").read_text()
    good = [holds("hadolint", "Dockerfile")]
    with tempfile.TemporaryDirectory() as directory:
        for name, text in BLOCK.findall(readme):
            Path(directory, name).write_text(text)
        for command in DERIVE.findall(readme):
            subprocess.run(command, shell=True, cwd=directory, check=True)
        for path in sorted(Path(directory).iterdir()):
            documents = parse(path.read_text())
            kinds = [document.get("kind", "Compose") for document in documents]
            print(f"{path.name}: {', '.join(map(str, kinds))}")
            tool = COMPOSE if "Compose" in kinds else KUBERNETES
            good += [holds(*tool, str(path)), len(kinds) == len(set(kinds))]
    return 0 if all(good) and len(good) == 7 else 1


if __name__ == "__main__":
    sys.exit(main())
