"""The README's Python runs as it stands, and prints what it says."""

import contextlib
import io
import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_python_blocks_run_and_print_what_they_say():
  code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.S))
  assert "dpc.quantize" in code and "dpc.schedules" in code
  said = re.findall(r"^print\(.*\)  # (.+)$", code, re.M)
  assert len(said) == code.count("print(") == 3
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
  assert out.getvalue().splitlines() == said
