"""The one atomic write."""

import os
import stat

import pytest

from layer_tying.files import write_text_whole, write_whole


def test_writes_what_is_asked_and_makes_folders(tmp_path):
    file = tmp_path / "a" / "b.txt"
    write_text_whole(file, "é\n")
    assert file.read_bytes() == "é\n".encode()
    write_whole(file, lambda out: out.write(b"again"))
    assert file.read_bytes() == b"again"
    assert list(file.parent.iterdir()) == [file]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    (tmp_path / "kept").write_text("old")

    def torn(file):
        file.write(b"half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "kept", torn)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_new_file_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "usual").write_text("")
    write_text_whole(tmp_path / "ours", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")]
    assert modes[0] == modes[1]
