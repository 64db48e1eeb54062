"""Every field of a config, with its default. A recipe changes some of them.

A field whose default is "none" is a placeholder: it can be set on the command
line, `--config.epochs=2`, and left out it means what its comment says.

The argument of a recipe, after the colon, is a method, or METHOD,smoke: the
same model and loop on tiny shapes and made-up data, in seconds, to see that
all of it works on a machine. To compile fast it scans equal blocks where the
model can, and it decodes in threads. A smoke run's figures mean nothing.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  """The fields; `argument` is a method, or METHOD,smoke."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # of initial values, order, augmentation, dropout, rounding
  config.steps = 1_000  # the length of the run
  config.epochs = config_dict.placeholder(float)  # if set, overrules steps
  config.batch_size = 128  # of all devices together
  # Images: rounded up to a multiple of the devices. Text: the rows that an
  # evaluation cuts its split into, each read from an empty context.
  config.eval_batch_size = 500
  config.eval_every = 1_000  # steps; the last step is always evaluated
  config.log_every = 100  # steps
  config.checkpoint_every = 1_000  # steps; the last step is always saved
  config.keep_checkpoints = 2  # the newest ones
  # With a validation split, the best one by it, too; the test set chooses none.
  config.keep_best = True
  # Steps that one call of the devices takes at most, in a loop that is compiled
  # into it: the same batches, widths and noise, rounded as on another mesh. For
  # small models on accelerators: on a CPU convolutions in a loop are slower.
  config.steps_per_call = 1
  # A step whose loss or gradient is not finite is skipped; the run stops when,
  # at a log, a save or an evaluation, so many in a row lie behind it. None: it
  # stops after any.
  config.max_skipped = 10
  # What the backward pass computes anew to save memory, best with
  # precision.storage_bits=8. norms: normalizations from their inputs, exact.
  # norms8: from their inputs as 8-bit codes, approximate. None: nothing.
  config.remat = config_dict.placeholder(str)
  # Precision of float32 products: "default" (TF32 on recent GPUs), "high",
  # "highest"; none leaves JAX's own setting.
  config.matmul_precision = config_dict.placeholder(str)
  config.data = _data()
  config.model = _model()
  config.precision = _precision(_parse(argument)[0])
  config.optimizer = _optimizer()
  config.mesh = _mesh()
  return config


def finish(
  config: ml_collections.ConfigDict, argument: str, **sizes: Any
) -> ml_collections.ConfigDict:
  """The recipe itself, or its smoke variant where `argument` asks for it.

  Args:
    config: of the full recipe.
    argument: of `get_config`.
    **sizes: fields of `model` in the smoke variant.
  """
  if not _parse(argument)[1]:
    return config
  config.steps = 4
  config.epochs = None
  config.batch_size = 8
  config.eval_batch_size = 32
  config.eval_every = 4
  config.log_every = 1
  config.checkpoint_every = 2
  config.precision.bounds_step = 2
  config.data.fake = True
  config.data.workers = None
  if config.data.holdout:
    config.data.holdout = 16
  if config.data.image_size is not None:
    config.data.image_size = 32
  if config.data.unroll is not None:
    config.data.unroll = 16
  config.model.update(sizes)
  return config


def _parse(argument: str) -> tuple[str, bool]:
  """(method, whether the smoke variant is asked for)."""
  method, _, variant = argument.partition(",")
  if variant not in ("", "smoke"):
    raise ValueError(
      f"{argument!r}: after the colon use METHOD or METHOD,smoke"
    )
  return method, variant == "smoke"


def _mesh() -> ml_collections.ConfigDict:
  """How the run is spread over devices; another start may choose otherwise."""
  mesh = ml_collections.ConfigDict()
  # Devices per axis. The batch is split over data and fsdp, parameters over
  # fsdp and tensor. A None, which data has by default, is the rest.
  mesh.data = config_dict.placeholder(int)
  mesh.fsdp = 1
  mesh.tensor = 1
  # replicated, fsdp, fsdp+tensor (transformers); none: what uses all axes. See
  # dpc_jax/training/partition.py.
  mesh.sharding = config_dict.placeholder(str)
  # Before it, rules ((pattern, (axis or None, ...)), ...) over the paths of
  # parameters: (("classifier/kernel", (None, "fsdp")),).
  mesh.rules = config_dict.placeholder(tuple)
  return mesh


def _data() -> ml_collections.ConfigDict:
  data = ml_collections.ConfigDict()
  # digits, cifar10, cifar100, imagenet2012, ptb, wikitext2, wikitext103
  data.name = "digits"
  data.dir = config_dict.placeholder(str)  # none: TFDS_DATA_DIR
  # Training images held out for every choice ("validation"); the test set is
  # for reporting. Text comes with a validation split of its own: 0.
  data.holdout = 0
  # Of the others, how many are trained on, classes in proportion; none: all.
  data.train_size = config_dict.placeholder(int)
  # Images in memory: random crop and flip on the device; none: as the data
  # set's recipe says. ImageNet's crops are taken while decoding.
  data.augment = config_dict.placeholder(bool)
  # Images in memory: copy the training split to every device, once, so that a
  # step sends row numbers only; it changes no batch. None: on accelerators, up
  # to 1 GiB.
  data.on_device = config_dict.placeholder(bool)
  # Height and width of ImageNet's crops; none: 224.
  data.image_size = config_dict.placeholder(int)
  # Processes that decode ImageNet's training images; none: threads of this
  # process. It changes no pixel, and a run may go on with another number.
  data.workers = config_dict.placeholder(int)
  # Text: tokens of a row that a step sees; it must be set there.
  data.unroll = config_dict.placeholder(int)
  data.fake = False  # made-up data of the set's form: needs no files
  return data


def _model() -> ml_collections.ConfigDict:
  """The name and what overrules the model's own sizes; not all fit each."""
  model = ml_collections.ConfigDict()
  model.name = "resnet8"  # see dpc_jax.models.names()
  model.width = config_dict.placeholder(int)
  model.widening = config_dict.placeholder(int)  # wide_resnet38
  model.width_multiplier = config_dict.placeholder(float)  # mobilenet_v2
  model.layers = config_dict.placeholder(int)  # lstm_lm, transformers
  model.heads = config_dict.placeholder(int)  # transformers
  model.mlp_width = config_dict.placeholder(int)  # transformers
  model.patch_size = config_dict.placeholder(int)  # vit
  # transformer_lm: sizes of the vocabulary's first bands, as (20000, 60000).
  model.cutoffs = config_dict.placeholder(tuple)
  model.dropout = config_dict.placeholder(float)
  model.attention_dropout = config_dict.placeholder(float)  # transformer_lm
  model.activation_dropout = config_dict.placeholder(float)  # transformer_lm
  model.tail_dropout = config_dict.placeholder(float)  # transformer_lm
  model.tied = config_dict.placeholder(bool)  # lstm_lm: softmax = embedding
  # Equal blocks in one compiled loop: compiles faster, slower on a CPU.
  model.scan = config_dict.placeholder(bool)
  # Models that leave their first and last layers in float: quantize these too.
  model.quantize_all = config_dict.placeholder(bool)
  return model


def _precision(method: str) -> ml_collections.ConfigDict:
  precision = ml_collections.ConfigDict()
  # float: the plain model. static<b>, such as static8: b-bit weights and
  # activations in every quantized layer (the model says which; classifiers and
  # embeddings stay in float). dpc: Eq. 1 between b_min and b_max;
  # dpc_log_midpoint: with that center. adaptive: starts as dpc and moves bits
  # by gradient noise; adaptive_reversed: the other way. cpt: all widths cycle
  # between b_min and b_max; dpc_cpt: between b_min and the layer's B_k. pfq:
  # the next width when the loss plateaus. Controls that cost what dpc costs:
  # uniform (uniform_log_midpoint), reversed, random.
  precision.method = method
  precision.b_min = 3
  precision.b_max = 8  # also the width that savings are relative to
  # "auto": b_min and b_max of the run are those of dpc.precision_bounds at
  # `bounds_step`; before it all widths are b_max. None: as given above.
  # float and static<b> have no bounds.
  precision.bounds = config_dict.placeholder(str)
  precision.bounds_step = 100  # steps; 0: of the initial weights
  precision.tau_min = 0.95  # mean cosine similarity that b_min must reach
  precision.tau_max = 0.9999  # and b_max
  precision.delta = 1.0  # strength of Eq. 1, in [-1, 1]
  precision.center = "median"  # mean, geometric_mean, log_midpoint
  precision.log_form = "base"  # product
  # Widths that overrule the method in every layer; 32 leaves float.
  precision.weights = config_dict.placeholder(int)
  precision.activations = config_dict.placeholder(int)
  precision.gradients = 8
  precision.kind = "affine"  # grids of all operands: affine or symmetric
  # What the backward pass keeps: none is float, 8 is 8-bit integer codes.
  precision.storage_bits = config_dict.placeholder(int)
  # What multiplies: simulated (float products of quantized values), int8 or
  # bf16_codes (products of codes), auto; all but the first need storage_bits 8.
  precision.backend = "simulated"
  # Of each layer: exact, or scaled: by the weights' codes, which an integer
  # backend needs for it; symmetric grids only (see dpc_jax.Quantization).
  precision.input_gradient = "exact"
  # Range of activations and gradients in training: of the batch, or delayed,
  # of the step before: over data and fsdp no wait in every layer.
  precision.ranges = "batch"
  precision.seed = 0  # of the method random, on top of the run's seed
  precision.cycles = 32  # of cpt and dpc_cpt, over the run
  precision.adaptive = _adaptive()
  precision.pfq = pfq = ml_collections.ConfigDict()  # FracTrain's rule
  pfq.stages = 4  # widths from b_min to b_max, evenly spaced
  pfq.window = 5  # epochs that the loss is compared over
  # Fall of the loss over the window, relative to its first epochs' mean, below
  # which the next stage begins; times `decay` after each.
  pfq.threshold = 0.05
  pfq.decay = 0.3
  return precision


def _adaptive() -> ml_collections.ConfigDict:
  """The rule of the methods adaptive and adaptive_reversed."""
  adaptive = ml_collections.ConfigDict()
  adaptive.warmup = 2  # epochs before the reference is taken
  adaptive.patience = 2  # epochs in a row before a layer moves
  adaptive.threshold = 0.25  # half of the dead band, nats
  # Fraction of the run after which nothing moves; 1: never.
  adaptive.freeze = 0.75
  adaptive.rebase = True  # a move sets the layer's reference anew
  adaptive.signal = "noise_to_signal"  # variance
  # No step costs more than one of dpc: the least noisy layers give way.
  adaptive.keep_cost = True
  # Or another limit, relative to b_max everywhere, which overrules keep_cost.
  adaptive.budget = config_dict.placeholder(float)
  adaptive.memory = "full"  # of the mean gradient: full, sketch
  # Of the mean gradient's moving average. A long one finds no signal: see
  # experiments/adaptive/README.md.
  adaptive.decay = 0.5
  # Of the average over the moments that it finds; none: 1 - 2/steps_per_epoch,
  # which looks back on half an epoch.
  adaptive.average = config_dict.placeholder(float)
  return adaptive


def _optimizer() -> ml_collections.ConfigDict:
  optimizer = ml_collections.ConfigDict()
  optimizer.name = "sgd"  # sgd (with momentum), adamw
  optimizer.learning_rate = 0.1  # the peak
  # Of every parameter; sgd adds it to the gradient, adamw decouples it.
  optimizer.weight_decay = 1e-4
  optimizer.momentum = 0.9  # of sgd
  optimizer.nesterov = False  # of sgd
  # Largest norm of the whole gradient, in float; none does not clip.
  optimizer.clip = config_dict.placeholder(float)
  optimizer.schedule = "cosine"  # constant, cosine (to 0), steps
  optimizer.warmup = 0.0  # fraction of the run, linear from 0
  # schedule "steps": times 0.1 at these fractions of the run.
  optimizer.boundaries = (0.5, 0.75)
  return optimizer
