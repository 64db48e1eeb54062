r"""Measures how alike a layer's gradients are, some steps apart.

  python -m experiments.adaptive.autocorrelation \
    --config=configs/cifar10_resnet8.py:dpc --workdir=runs/autocorrelation \
    --at=60,180,320

For gradients g_t of a layer's kernel in a window of steps,

    rho(lag) = mean over t of <g_t, g_(t+lag)> / mean over t of ||g_t||^2

is 0 for independent noise without a mean, and the share of the signal,
||E g||^2 / E||g||^2, for independent noise around one. Prints a table, and
writes `autocorrelation.json` and `autocorrelation.png`.
"""

import json
import pathlib
import shlex
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from dpc_jax.analysis import pictures, plots, report
from dpc_jax.training import build, checks, sharding
from dpc_jax.training import state as state_lib
from experiments import cli

_LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_AT = flags.DEFINE_list("at", ["100"], "First steps of the windows.")
_WINDOW = flags.DEFINE_integer(
  "window", 60, "Steps of a window.", lower_bound=max(_LAGS) + 1
)


class _Last(NamedTuple):
  """The gradient of the last step."""

  gradient: Any


def _keep_gradient() -> optax.GradientTransformation:
  """Passes updates through and keeps them."""
  return optax.GradientTransformation(
    lambda params: _Last(jax.tree.map(jnp.zeros_like, params)),
    lambda updates, state, params=None: (updates, _Last(updates)),
  )


def measure(
  parts: build.Parts, starts: list[int], window: int
) -> dict[int, dict[str, dict[int, float]]]:
  """{first step of a window: {layer: {lag: rho}}}; trains up to the last."""
  optimizer = optax.chain(_keep_gradient(), parts.optimizer)
  carry = jax.eval_shape(
    lambda: parts.task.initial_carry(parts.config.batch_size)
  )
  init = state_lib.make_init(
    parts.model, optimizer, parts.schedule, parts.feed.sample, carry
  )
  programs = build.compile_programs(
    parts._replace(optimizer=optimizer, init=init)
  )
  state = programs.init()
  kept: dict[int, list[dict[str, np.ndarray]]] = {start: [] for start in starts}
  batches = parts.feed.train(0, max(starts) + window)
  try:
    for step, rows in enumerate(batches):
      state, _ = programs.train_step(
        state, sharding.put_batch(rows, parts.mesh)
      )
      inside = [s for s in starts if s <= step < s + window]
      if inside:
        gradient = _kernels(state.opt_state[0].gradient, parts.costs)
        for start in inside:
          kept[start].append(gradient)
  finally:
    batches.close()
  return {start: _rho(gradients) for start, gradients in kept.items()}


def _kernels(tree: Any, costs: Any) -> dict[str, np.ndarray]:
  """{path: the kernel's gradient, flat}, in the network's order."""
  found = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *path, name = (key.key for key in keys)
    if name == "kernel":
      found["/".join(path)] = np.ravel(jax.device_get(leaf))
  return {path: found[path] for path in costs if path in found}


def _rho(
  gradients: list[dict[str, np.ndarray]],
) -> dict[str, dict[int, float]]:
  rho = {}
  for path in gradients[0]:
    rows = np.stack([g[path] for g in gradients]).astype(np.float64)
    products = rows @ rows.T
    power = np.trace(products) / len(rows)
    rho[path] = {
      lag: float(np.mean(np.diagonal(products, lag)) / power) for lag in _LAGS
    }
  return rho


def _draw(result: Any, path: pathlib.Path) -> None:
  """A panel for each window: a line for each layer, rho against the lag."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(3.4 * len(result) + 1.6, 3.4), layout="constrained")
  axes = figure.subplots(1, len(result), sharey=True, squeeze=False)[0]
  for axis, (start, layers) in zip(axes, result.items(), strict=True):
    for i, (layer, rho) in enumerate(layers.items()):
      axis.plot(
        list(rho),
        list(rho.values()),
        color=plots.COLORS[i % len(plots.COLORS)],
        linestyle="-" if i < len(plots.COLORS) else "--",
        label=layer,
      )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(_LAGS, list(map(str, _LAGS)), fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel(f"lag, steps (from step {start})")
    axis.spines[["top", "right"]].set_visible(False)
  axes[0].set_ylabel("autocorrelation of the gradient")
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside right upper", fontsize=7, frameon=False
  )
  pictures.save(figure, path)


def main() -> None:
  """Trains, measures, prints and writes."""
  cli.FLAGS.config.precision.bounds = None  # no run, which would find them
  parts = build.build(cli.FLAGS.config)
  try:
    starts = sorted({int(text) for text in _AT.value})
  except ValueError:
    raise checks.ConfigError(
      f"--at={','.join(_AT.value)}: use steps, such as 60,180"
    ) from None
  last = parts.config.steps - _WINDOW.value
  if not starts or starts[0] < 0 or starts[-1] > last:
    raise checks.ConfigError(
      f"--at={','.join(_AT.value)}: a window of {_WINDOW.value} steps must lie"
      f" in the run; use 0..{last}"
    )
  workdir = cli.make_workdir()
  result = measure(parts, starts, _WINDOW.value)
  for start, layers in result.items():
    table = [
      (path, *(f"{value:+.3f}" for value in rho.values()))
      for path, rho in layers.items()
    ]
    print(f"\nsteps {start} to {start + _WINDOW.value - 1}\n")
    print(report.text_table(table, ("layer", *(f"lag {n}" for n in _LAGS))))
  command = " ".join(
    [
      "python -m experiments.adaptive.autocorrelation",
      *map(shlex.quote, sys.argv[1:]),
    ]
  )
  (workdir / "autocorrelation.json").write_text(
    json.dumps({"command": command, "windows": result}, indent=2) + "\n"
  )
  _draw(result, workdir / "autocorrelation.png")
  print(f"\nwritten: {workdir / 'autocorrelation.json'} and .png")


if __name__ == "__main__":
  cli.define_config()
  sys.exit(cli.run(main, sys.argv))
