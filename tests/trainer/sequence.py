"""Several calls of `trainer.pretrain` one after another in the processes of one launch:
a launch costs more than a tiny run. `deepspeed --module tests.trainer.sequence FILE`,
where FILE holds a JSON list of argument lists.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import ROOT, deepspeed_command, launch_environment
from tests.trainer.tiny import LAUNCH_LIMIT_S, TINY


def launch_all(
    ranks: int,
    calls: Sequence[Sequence[str]],
    file: Path,
    *,
    tiny: Sequence[str] = TINY,
) -> str:
    """Launch `ranks` ranks that make all `calls`, each after `tiny`; what they print.
    Every call must succeed.
    """
    file.write_text(json.dumps([[*tiny, *words] for words in calls]))
    command = deepspeed_command(ranks, file)
    command[command.index("trainer.pretrain")] = "tests.trainer.sequence"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * LAUNCH_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def main() -> None:
    """Make the calls in a file."""
    from trainer.pretrain import main as pretrain

    (file,) = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    for words in json.loads(Path(file).read_text()):
        assert pretrain(words) == 0, words


if __name__ == "__main__":
    main()
