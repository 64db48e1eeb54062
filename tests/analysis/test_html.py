"""The page shows the report, holds its pictures, and runs nothing."""

import base64
import re
from html import parser as html_parser

import pytest

from dpc_jax.analysis import cells, html, report

SVG = (
  b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"'
  b' width="720pt" height="72pt"></svg>'
)
NASTY = [
  "<script>alert(1)</script>",
  "a | b || c",
  "`x` ``y`` `",
  "*bold* _em_ __x__ a_b_c [text](http://x.y) ![p](q.png)",
  "&amp; &lt; \"quoted\" 'single'",
  "C:\\new\\*.txt \\",
  "# no heading",
  "[Errno 28] No space left: '/a_b/<c>'",
  "~~gone~~ https://x.y/?a=b&c=d",
]


class Text(html_parser.HTMLParser):
  """Collects tags, attributes and text, and checks that tags are closed."""

  EMPTY = ("meta", "img", "br", "hr")

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.open, self.tags, self.text = [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.EMPTY:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append((tuple(self.open), data))


def parse(page):
  parser = Text()
  parser.feed(page)
  assert parser.open == []
  return parser


def inside(page, tag):
  """All text of the elements of a name, one string for each run of it."""
  return ["".join(found) for found in _groups(parse(page), tag)]


def _groups(parser, tag):
  group = []
  for path, data in parser.text:
    if tag in path:
      group.append(data)
    elif group:
      yield group
      group = []
  if group:
    yield group


@pytest.mark.parametrize("text", NASTY)
def test_any_text_comes_out_as_it_went_in(tmp_path, text):
  page = html.page(f"# {cells.plain(text)}\n\n{cells.code(text)}\n", tmp_path)
  assert inside(page, "h1") == [text]
  assert inside(page, "title") == [text]
  assert inside(page, "code") == [text]
  tags = {tag for tag, _ in parse(page).tags}
  assert not tags & {"script", "a", "em", "strong", "img"}


@pytest.mark.parametrize("text", NASTY)
def test_any_text_fits_a_cell(tmp_path, text):
  table = [(cells.code(text), cells.plain(text))]
  markdown = report.markdown_table(table, ("a", "b"))
  page = html.page(f"# T\n\n{markdown}\n", tmp_path)
  assert inside(page, "code") == [text]
  assert inside(page, "td")[-1].endswith(text)
  assert [tag for tag, _ in parse(page).tags].count("td") == 2


@pytest.mark.parametrize(
  "raw",
  [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "text <b onclick='x'>b</b>",
  ],
)
def test_raw_html_is_text_and_no_link_runs(tmp_path, raw):
  parser = parse(html.page(f"# T\n\n{raw}\n", tmp_path))
  assert {tag for tag, _ in parser.tags} <= {
    *("html", "head", "meta", "title", "style", "body", "h1", "p"),
  }
  assert any("alert" in text or "onclick" in text for _, text in parser.text)


def test_pictures_are_inside_and_nothing_is_loaded(tmp_path):
  (tmp_path / "a.svg").write_bytes(SVG)
  (tmp_path / "a.png").write_bytes(b"png")
  (tmp_path / "b.png").write_bytes(b"another")
  page = html.page('# T\n\n![one "1"](a.png)\n![two](b.png)\n', tmp_path)
  parser = parse(page)
  first, second = (attrs for tag, attrs in parser.tags if tag == "img")
  assert first["src"] == (
    f"data:image/svg+xml;base64,{base64.b64encode(SVG).decode()}"
  )
  assert (first["alt"], second["alt"]) == ('one "1"', "two")
  assert second["src"].startswith("data:image/png;base64,")
  # Ten inches: legible on a telephone, and no larger than it was drawn.
  assert first["style"] == "min-width:600px"
  boxes = [attrs for tag, attrs in parser.tags if tag == "span"]
  assert boxes[0]["style"] == "width:960px"
  assert [(box["role"], box["aria-label"]) for box in boxes] == [
    ("region", 'Picture: one "1"'),
    ("region", "Picture: two"),
  ]
  assert all(box["tabindex"] == "0" for box in boxes)
  policy = next(a for t, a in parser.tags if "http-equiv" in a)["content"]
  assert policy.startswith("default-src 'none'")
  assert not re.search(r"https?://|url\(|@import|src=\"(?!data:)", page)
  assert not any(k.startswith("on") for _, a in parser.tags for k in a)


@pytest.mark.parametrize("source", ["../a.png", "/a.png", "x/a.png", "a.txt"])
def test_only_pictures_beside_the_report_are_taken(tmp_path, source):
  (tmp_path / "x").mkdir()
  with pytest.raises(ValueError, match="beside the report"):
    html.page(f"![secret]({source})", tmp_path / "x")


def test_a_table_has_its_own_box_that_the_keyboard_reaches(tmp_path):
  markdown = report.markdown_table([("a", "1"), ("b", "2" * 60)], ("n", "m"))
  text = f"{markdown}\n\n## A `b` & \\<c\\>\n\n{markdown}\n\nx\n\n{markdown}\n"
  parser = parse(html.page(text, tmp_path))
  boxes = [
    parser.tags[i - 1]
    for i, (tag, _) in enumerate(parser.tags)
    if tag == "table"
  ]
  names = ["Table 1", "Table 2: A b & <c>", "Table 3: A b & <c>"]
  assert boxes == [
    (
      "div",
      {"class": "table", "role": "region", "aria-label": x, "tabindex": "0"},
    )
    for x in names
  ]
  assert [a for tag, a in parser.tags if tag == "th"][:2] == [
    {"scope": "col"},
    {"style": "text-align:right", "scope": "col"},
  ]
  _, short, _, long = [a for tag, a in parser.tags if tag == "td"][:4]
  assert short == {"style": "text-align:right"}
  assert long == {"class": "long", "style": "text-align:right"}


def test_figures_are_flush_right_and_words_flush_left(tmp_path):
  table = [("a", "0.5", "better"), ("b", "-1", "worse")]
  markdown = report.markdown_table(table, ("n", "value", "verdict"))
  page = html.page(markdown, tmp_path)
  tags = [(t, a) for t, a in parse(page).tags if t in ("th", "td")]
  styles = [attrs.get("style") for _, attrs in tags]
  assert styles == [None, "text-align:right", None] * 3
  # A browser would center the heads.
  assert re.search(r"\nth, td {[^}]*text-align: left", page)


def test_lines_of_rows_move_with_a_first_column_that_is_sticky(tmp_path):
  page = html.page("no heading", tmp_path)
  assert re.search(r"td:first-child {[^}]*position: sticky", page)
  # A collapsed border is the table's, and stays behind.
  assert re.search(r"\ntable {[^}]*border-collapse: separate", page)


def test_a_long_command_breaks_between_its_flags(tmp_path):
  page = html.page("`a.py --one=1 --two=2`, `word`, `--flag`", tmp_path)
  assert "<code><span>a.py</span> <span>--one=1</span> <span>" in page
  assert "<code>word</code>" in page
  assert "<code><span>--flag</span></code>" in page


def test_it_says_how_it_is_read(tmp_path):
  parser = parse(html.page("no heading", tmp_path))
  assert ("html", {"lang": "en"}) in parser.tags
  names = {a.get("name") or a.get("charset") for t, a in parser.tags}
  assert {"viewport", "utf-8"} <= names
  assert inside(html.page("no heading", tmp_path), "title") == ["Report"]
