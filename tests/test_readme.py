"""The README's Python runs as it stands, and prints what it says."""

import ast
import contextlib
import io
import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.mark.as_users
def test_python_blocks_run_and_print_what_they_say():
  code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.S))
  assert "dpc.quantize" in code and "dpc.schedules" in code
  said = re.findall(r"^print\(.*\)  # (.+)$", code, re.M)
  assert len(said) == code.count("print(") == 4
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
  assert out.getvalue().splitlines() == said


def test_commands_of_one_line_of_python_parse():
  code = re.findall(r'python -c "(.*?)"', README.read_text(), re.S)
  assert len(code) == 2
  for one in code:
    ast.parse(re.sub(r"^    ", "", one, flags=re.M))
