"""How tests compile programs whose rounding they do not look at."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import pytest

# Options of jax.jit: on CPUs a third of the time to compile, and slower
# programs. XLA fuses otherwise, so the last bits are not those of the defaults:
# what is said of bits is tested with the compiler as users have it.
FAST = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": False,
}
# The same as XLA_FLAGS of a process: a child, or all of `--compiler=fast`.
FLAGS = " ".join(f"--{name}={int(value)}" for name, value in FAST.items())


@contextlib.contextmanager
def fast() -> Iterator[None]:
  """Whatever calls `jax.jit` inside compiles in a hurry."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST))
    yield
