"""Every Python block of the README and the documentation runs, page by page, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from many_processes import free_port
from small_runs import PATIENCE

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ON_TWO_PROCESSES = ROOT / "docs" / "howto-many-devices.md"
WITH_CODE = [
    page
    for page in PAGES
    if page != ON_TWO_PROCESSES and BLOCK.search(page.read_text(encoding="utf-8"))
]


def run_blocks(page: Path, folder: Path, *launcher: str) -> None:
    script = folder / "page.py"
    code = "\n\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(script)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path):
    run_blocks(page, tmp_path)


def test_the_blocks_on_many_devices_run_on_two_processes(tmp_path):
    port = f"--master-port={free_port()}"
    run_blocks(
        ON_TWO_PROCESSES, tmp_path, "-m", "torch.distributed.run", "--nproc-per-node=2", port
    )


def test_every_link_between_pages_leads_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
