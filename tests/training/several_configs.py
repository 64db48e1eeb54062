"""One process of several: python -m tests.training.several_configs ...

Arguments: address of the coordinator, processes, index of this one, folder.
Leaves what it was told in `told-INDEX.json`.
"""

import json
import pathlib
import sys

import jax

from dpc_jax.training import agreement, checks, workdir
from tests.training import tiny

# What the two processes are started with.
DIFFERENCES = {
  "seed": (0, 1),
  "checkpoint_every": (500, 4),
  "mesh.fsdp": (2, None),
}
# And that may differ.
OWN = {"data.dir": ("/a", "/b"), "data.workers": (1, 2)}


def refusal(config, folder) -> list[str] | None:
  """Whether to try again, and what is wrong with the folder or the config."""
  try:
    with workdir.held(config, folder):
      return None
  except checks.ConfigError as error:
    is_passing = isinstance(error, checks.TransientError)
    return ["later" if is_passing else "never", str(error)]


def main() -> None:
  """Joins the others, and asks."""
  address, count, index, folder = sys.argv[1:]
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(address, int(count), int(index))
  folder = pathlib.Path(folder)
  is_first = index == "0"

  def own(fields):
    return {name: values[int(index)] for name, values in fields.items()}

  config = tiny.make_config(**own(OWN))
  told = {
    # Only the first one's count.
    "texts": [
      agreement.from_first(lambda t=text: t if is_first else "mine")
      for text in (None, "", "ä" * 3000)
    ],
    **{
      name: refusal(
        tiny.make_config(**own({name: DIFFERENCES[name]})), folder / name
      )
      for name in DIFFERENCES
    },
    "all": refusal(tiny.make_config(**own(DIFFERENCES)), folder / "all"),
    "first": refusal(config, folder / "run"),
    "other": refusal(tiny.make_config(steps=7), folder / "run"),
  }
  with workdir.held(config, folder / "run"):
    told["busy"] = refusal(config, folder / "run")
  if is_first:
    (folder / "run" / "summary.json").write_text('{"steps": 3}')
  with workdir.held(config, folder / "run") as done:
    told["done"] = done
  if told["first"] is not None:
    raise ValueError(told["first"])
  (folder / f"told-{index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
  main()
