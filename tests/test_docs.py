"""Every Python block of the README and the documentation runs, page by page, as a reader would."""

import os
import re
import runpy
import traceback
import warnings
from pathlib import Path

import pytest
from many_processes import on_separate_ranks, rank_environment

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ON_TWO_PROCESSES = ROOT / "docs" / "howto-many-devices.md"
WITH_CODE = [
    page
    for page in PAGES
    if page != ON_TWO_PROCESSES and BLOCK.search(page.read_text(encoding="utf-8"))
]


def run_blocks(page: Path, folder: Path, processes: int = 1) -> None:
    code = "\n\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))
    (folder / "page.py").write_text(code, encoding="utf-8")
    unset = rank_environment(0, 1, 0) if processes == 1 else ()
    for went_wrong in on_separate_ranks(processes, run_script, folder, [*unset]):
        assert went_wrong is None, went_wrong  # the whole traceback, which pytest would cut


def run_script(folder: Path, unset: list[str]) -> str | None:
    """Run a page's code in this process, a fork that has nothing but libraries; what went wrong."""
    os.chdir(folder)
    for name in unset:
        del os.environ[name]
    warnings.simplefilter("ignore")
    try:
        runpy.run_path("page.py", run_name="__main__")
    except BaseException:
        return traceback.format_exc()
    return None


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path):
    run_blocks(page, tmp_path)


def test_the_blocks_on_many_devices_run_on_two_processes(tmp_path):
    run_blocks(ON_TWO_PROCESSES, tmp_path, processes=2)


def test_every_link_between_pages_leads_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
