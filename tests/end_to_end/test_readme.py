"""The commands of the README run, in its order, where a reader would type them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from tests.launch import ROOT, forked, run

# A bash block with this comment on the line above it is run.
BLOCK = re.compile(r"^<!-- test -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_readmes_commands_run(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    blocks = BLOCK.findall(text)
    assert blocks and len(blocks) == text.count("<!-- test -->"), "every mark stands above a bash block"
    for name in ("preprocessing", "examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [shlex.split(line) for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    for number, (program, *words) in enumerate(commands):
        if program == "python" and number > 1:  # the first ones and torchrun start as a reader's would
            done = forked(*words[words[0] == "-m" :], cwd=tmp_path)
        else:
            done = run([str(Path(sys.executable).with_name(program)), *words], cwd=tmp_path)
        assert done.code == 0, f"{shlex.join([program, *words])}: {done.out[-2000:]}\n{done.err[-3000:]}"
    assert list(tmp_path.glob("runs/*/eval.json"))
