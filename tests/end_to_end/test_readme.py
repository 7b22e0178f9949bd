"""The commands of the README run, in its order, where a reader would type them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from tests.launch import ENVIRONMENT, ROOT, run

# A bash block with this comment on the line above it is run.
BLOCK = re.compile(r"^<!-- test -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_readmes_commands_run(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    blocks = BLOCK.findall(text)
    assert blocks and len(blocks) == text.count("<!-- test -->"), "every mark stands above a bash block"
    for name in ("preprocessing", "examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        script = Path(sys.executable).with_name(name)
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{script}" "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{ENVIRONMENT['PATH']}"
    script = "\n".join(["set -e", f"export PATH='{path}'", *blocks])
    done = run(["bash", "-c", script], cwd=tmp_path)
    assert done.code == 0, f"{done.out[-2000:]}\n{done.err[-3000:]}"
    assert list(tmp_path.glob("runs/*/eval.json"))
