"""Listings: what is shown is what the file says, and a region that is gone is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmla.lab import source
from flashmla.reference import paged_kv

TEXT = """\
before();
// region: outer
  first();
  // region: inner
    second();
  // endregion: inner
  third();
// endregion: outer
// region: open
never closed
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel.cu"
    path.write_text(TEXT)
    return path


def test_a_region_is_shown_without_its_anchors_and_those_within(kernel: Path):
    shown = source.show(kernel, "outer")
    assert shown.text == "first();\n  second();\nthird();"
    assert (shown.first_line, shown.last_line) == (3, 7)
    assert shown.language == "cpp"


def test_an_inner_region_is_shown_at_the_margin(kernel: Path):
    assert source.show(kernel, "inner").text == "second();"


def test_the_listing_names_file_lines_and_region(kernel: Path):
    text = source.show(kernel, "inner")._repr_markdown_()
    assert text == "`kernel.cu`, lines 5–5, region `inner`\n\n```cpp\nsecond();\n```"


def test_a_missing_region_is_an_error_that_names_those_there_are(kernel: Path):
    with pytest.raises(LookupError, match=r"no region 'combine'.*: outer, inner, open"):
        source.show(kernel, "combine")


def test_a_region_that_is_never_closed_is_an_error(kernel: Path):
    with pytest.raises(LookupError, match="'open' is opened and never closed"):
        source.show(kernel, "open")


def test_a_missing_file_is_an_error_that_says_where_was_looked():
    with pytest.raises(FileNotFoundError, match=r"no source file csrc/none\.cu under any of"):
        source.show("csrc/none.cu")


def test_kernel_sources_are_found_and_labelled_as_in_a_checkout():
    shown = source.show("csrc/sm90/combine.cu", "combine")
    assert shown.path == "csrc/sm90/combine.cu" and "exp2f" in shown.text
    assert "region:" not in shown.text


def test_an_installed_wheel_finds_its_kernel_sources(tmp_path: Path, monkeypatch):
    package = tmp_path / "site-packages" / "flashmla"
    (package / "csrc" / "sm90").mkdir(parents=True)
    (package / "csrc" / "sm90" / "x.cu").write_text(TEXT)
    monkeypatch.setattr(source, "_PACKAGE", package)
    shown = source.show("csrc/sm90/x.cu", "inner")
    assert (shown.path, shown.text) == ("csrc/sm90/x.cu", "second();")


def test_an_object_is_shown_whole_with_its_place():
    shown = source.show(paged_kv.gather)
    assert shown.path == "flashmla/reference/paged_kv.py"
    assert shown.text.startswith("def gather(") and shown.text.endswith("astype(np.float64)")
    lines = Path(paged_kv.__file__).read_text().splitlines()
    assert lines[shown.first_line - 1].startswith("def gather(")


def test_what_hides_in_fn_is_unwrapped():
    class Kernel:
        fn = staticmethod(paged_kv.gather)

    assert source.show(Kernel()).text == source.show(paged_kv.gather).text


def test_regions_are_listed_in_order(kernel: Path):
    assert source.regions(kernel) == ["outer", "inner", "open"]
