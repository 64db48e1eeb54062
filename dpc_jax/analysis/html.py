"""A Markdown report as one HTML file that needs nothing else."""

import base64
import html
import pathlib
import re
from typing import Any

# Of an inch of a picture, on a screen too narrow for all of it: what is drawn
# at 9 points stays legible, and the rest scrolls.
_LEAST_PIXELS_PER_INCH = 60
_PIXELS_PER_INCH = 96
# Characters of a cell that takes several lines.
_LONG = 48
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.25rem 3rem;
  background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 1px solid #ccc; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, Menlo, Consolas, monospace;
  background: #f2f2f2; padding: .1em .3em; border-radius: 3px; }
code span { display: inline-block; max-width: 100%;
  word-break: break-all; }
.table { overflow-x: auto; margin: .8rem 0; /* a shadow where more is hidden */
  background: linear-gradient(to left, #fff 1rem, transparent) right / 2rem 100%
  no-repeat local, linear-gradient(to left, #0003, transparent) right / .8rem
  100% no-repeat scroll; }
.table:focus-visible, .picture:focus-visible { outline: 2px solid #0072b2; }
/* collapsed borders would stay behind where the first column is sticky */
table { border-collapse: separate; border-spacing: 0; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd;
  text-align: left; vertical-align: top; white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom;
  white-space: normal; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
th:first-child, td:first-child { position: sticky; left: 0;
  background: #fff; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; max-width: none; }
.picture { overflow-x: auto; max-width: 100%; flex: 0 1 auto; }
img { display: block; width: 100%; height: auto; }
@media (max-width: 40rem) {
  body { padding: .75rem .75rem 2rem; }
  th, td { padding: .3rem .5rem; }
  table { font-size: .82rem; }
}
@page { margin: 14mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .table, .picture { overflow: visible; background: none; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .35rem; white-space: normal; }
  th:first-child, td:first-child { position: static; }
  img { min-width: 0 !important; }
  .picture:not(:only-child) { width: 47% !important; }
  .picture, tr { break-inside: avoid; }
  h1, h2, h3 { break-after: avoid; }
  code { background: none; padding: 0; }
}
"""
# Nothing is loaded and nothing runs, whatever stands in a report.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(markdown: str, folder: str | pathlib.Path) -> str:
  """Returns the report as one HTML file, its pictures inside.

  CommonMark with tables; raw HTML in it is text, and a link that could run a
  program stays text. A table scrolls in its own box where it is wider than the
  screen. A picture `![what](name.png)` becomes the SVG of that name if there is
  one, else the PNG.

  Args:
    markdown: the report; its first heading is the page's title.
    folder: where the pictures lie.

  Raises:
    ValueError: a picture that is no .png or .svg of `folder` itself.
    OSError: a picture that cannot be read.
  """
  import markdown_it

  parser = markdown_it.MarkdownIt("commonmark", {"html": False})
  parser.enable("table")
  for name, rule in (
    ("image", _image),
    ("code_inline", _code),
    ("paragraph_open", _open_paragraph),
    ("paragraph_close", _close_paragraph),
    ("table_open", _open_table),
    ("table_close", _close_table),
    ("th_open", _open_head),
    ("td_open", _open_cell),
  ):
    parser.add_render_rule(name, rule)
  env = {"folder": pathlib.Path(folder)}
  body = parser.render(markdown, env)
  heading = re.search(r"<h1>(.*?)</h1>", body, re.DOTALL)
  title = re.sub(r"<[^>]*>", "", heading[1]) if heading else "Report"
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    f"{body}</body>\n</html>\n"
  )


def _code(self: Any, tokens, i, options, env) -> str:
  # Whole words, or a line would end within the two hyphens of a flag.
  words = html.escape(tokens[i].content).split(" ")
  if len(words) > 1 or "-" in words[0]:
    words = [f"<span>{word}</span>" for word in words]
  return f"<code>{' '.join(words)}</code>"


def _image(self: Any, tokens, i, options, env) -> str:
  source = str(tokens[i].attrs["src"])
  path = pathlib.PurePosixPath(source)
  if path.name != source or path.suffix not in _TYPES:
    raise ValueError(
      f"picture {source!r}: must be a .png or .svg beside the report"
    )
  found = env["folder"] / path.with_suffix(".svg")
  if not found.exists():
    found = env["folder"] / path
  data = found.read_bytes()
  text = base64.b64encode(data).decode()
  what = html.escape(tokens[i].content)
  return (
    f'<span class="picture"{_region(f"Picture: {what}")}{_box(data)}>'
    f'<img alt="{what}"{_least(data)}'
    f' src="data:{_TYPES[found.suffix]};base64,{text}"></span>'
  )


def _inches(data: bytes) -> float | None:
  """Width of an SVG as matplotlib writes it, which is in points."""
  width = re.search(rb'<svg [^>]*?width="([0-9.]+)pt"', data[:2_000])
  return None if width is None else float(width[1]) / 72


def _box(data: bytes) -> str:
  inches = _inches(data)
  if inches is None:
    return ""
  return f' style="width:{round(inches * _PIXELS_PER_INCH)}px"'


def _least(data: bytes) -> str:
  inches = _inches(data)
  if inches is None:
    return ""
  return f' style="min-width:{round(inches * _LEAST_PIXELS_PER_INCH)}px"'


def _open_paragraph(self: Any, tokens, i, options, env) -> str:
  if tokens[i].hidden:
    return ""
  inline = tokens[i + 1].children or []
  is_pictures = any(token.type == "image" for token in inline)
  return '<div class="pictures">' if is_pictures else "<p>"


def _close_paragraph(self: Any, tokens, i, options, env) -> str:
  if tokens[i].hidden:
    return ""
  inline = tokens[i - 1].children or []
  is_pictures = any(token.type == "image" for token in inline)
  return "</div>\n" if is_pictures else "</p>\n"


def _region(label: str) -> str:
  """Attributes of a box that scrolls; `label` is escaped.

  In reach of the keyboard, or it could not be scrolled by it; and what the
  keyboard reaches has a name.
  """
  return f' role="region" aria-label="{label}" tabindex="0"'


def _open_table(self: Any, tokens, i, options, env) -> str:
  number = sum(token.type == "table_open" for token in tokens[: i + 1])
  label = f"Table {number}"
  headings = [j for j in range(i) if tokens[j].type == "heading_open"]
  if headings:
    parts = tokens[headings[-1] + 1].children or []
    label += f": {''.join(part.content for part in parts)}"
  return f'<div class="table"{_region(html.escape(label))}><table>\n'


def _open_head(self: Any, tokens, i, options, env) -> str:
  tokens[i].attrSet("scope", "col")
  return self.renderToken(tokens, i, options, env)


def _close_table(self: Any, tokens, i, options, env) -> str:
  return "</table></div>\n"


def _open_cell(self: Any, tokens, i, options, env) -> str:
  align = str(tokens[i].attrs.get("style", ""))
  is_long = len(tokens[i + 1].content) > _LONG
  return (
    "<td"
    + (' class="long"' if is_long else "")
    + (f' style="{html.escape(align)}"' if align else "")
    + ">"
  )
