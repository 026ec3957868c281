"""Stands for ``layer-tying train`` where a test is about processes: starts at once, trains nothing.

It keeps to what the scheduler of child processes relies on: the flags, the files of a run folder,
exit codes, and a last line that says why. Runs of more than 1,000 steps wait for Ctrl-C.
"""

import signal
import sys
from pathlib import Path

from layer_tying.runs.config import TrainConfig


def main(config: TrainConfig) -> int:
    needed = [Path(config.data.dataset)]
    if config.tying.source:
        needed.append(Path(config.tying.source) / "summary.json")
    for file in needed:
        if not file.exists():
            print(f"layer-tying: {file}: no such file")
            return 2
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    if (config.optimization.max_steps or 0) > 1000:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        (config.folder / "started").touch()
        signal.sigwait([signal.SIGINT])
        if signal.sigtimedwait([signal.SIGINT], 0.5):
            print("layer-tying: told twice")
            return 1
        print("layer-tying: stopped; go on with the same command and --resume")
        return 130
    (config.folder / "summary.json").write_text("{}", encoding="utf-8")
    print("trained")
    return 0


if __name__ == "__main__":
    file = Path(sys.argv[sys.argv.index("--config") + 1])
    sys.exit(main(TrainConfig.from_json(file.read_text(encoding="utf-8"))))
