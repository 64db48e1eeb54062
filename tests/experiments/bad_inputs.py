"""What people get wrong, and the line that each mistake ends in.

A row is `ARGUMENTS -> WORDS`: `a=1` stands for --config.a=1, {disk} for the
folder of `bad_disk`, {run} for a run in it, {new} for a folder that is not
there, {digits} for a recipe, and ` ... ` for what lies between words of the
line.
"""

import pathlib
from typing import Any, NamedTuple

from tests.experiments import bad_saved


class Group(NamedTuple):
  """Rows of one kind of mistake.

  Attributes:
    name: as the printed table has it.
    program: the module in `experiments`.
    recipe: the value of --config; empty: the program takes none.
    rows: the mistakes.
  """

  name: str
  program: str
  recipe: str
  rows: str


# Programs that read their flags by argparse.
PLAIN = (
  *("adaptive.curves", "bench.input", "embeddings", "export"),
  *("prepare_imagenet", "report"),
)

DIGITS = "configs/digits_resnet8.py:dpc"
VIT = "configs/digits_vit_tiny.py:dpc"
CIFAR10 = "configs/cifar10_resnet8.py:dpc"
MOBILENET = "configs/cifar10_mobilenet_v2.py:dpc,smoke"
IMAGENET = "configs/imagenet_resnet18.py:dpc,smoke"
PTB = "configs/ptb_lstm_tiny.py:dpc,smoke"
WIKITEXT = "configs/wikitext2_transformer.py:dpc,smoke"

_LENGTHS = """
steps=0 -> config.steps = 0: must be positive
steps=-5 -> config.steps = -5: must be positive
steps=99999999999999999999 epochs=1e300 -> epochs = 1e+300: must give at most
epochs=0 -> config.epochs = 0.0: must be positive
epochs=-0.0 -> config.epochs = -0.0: must be positive
epochs=nan -> config.epochs = nan: must be positive
epochs=inf -> config.epochs = inf: must be positive
epochs=1e-9 -> config.epochs = 1e-09: 1437 rows in batches of 64 give no step
batch_size=0 -> config.batch_size = 0: must be at least 1
batch_size=20 -> config.batch_size = 20: must be a multiple of the 8 devices
eval_batch_size=0 -> config.eval_batch_size = 0: must be at least 1
eval_every=0 -> config.eval_every = 0: must be at least 1
log_every=-1 -> config.log_every = -1: must be at least 1
steps_per_call=0 -> config.steps_per_call = 0: must be in 1..1024
remat=all -> config.remat = 'all': use one of norms, norms8, or leave it out
checkpoint_every=0 -> config.checkpoint_every = 0: must be at least 1
keep_checkpoints=0 -> config.keep_checkpoints = 0: must be at least 1
seed=-1 -> config.seed = -1: must be in 0..2^32-1
seed=4294967296 -> config.seed = 4294967296: must be in 0..2^32-1
matmul_precision=tf32 -> config.matmul_precision = 'tf32': use one of default
"""
_TYPES = """
steps=1.5 -> --config.steps=1.5: must be an integer
steps=many -> --config.steps=many: must be an integer
steps=nan -> --config.steps=nan: must be an integer
seed=1e3 -> --config.seed=1e3: must be an integer
batch_size=True -> --config.batch_size=True: must be an integer
model.width=1.5 -> --config.model.width=1.5: must be an integer
precision.b_max=8.0 -> --config.precision.b_max=8.0: must be an integer
precision.gradients=none -> --config.precision.gradients=none: must be an integ
epochs=two -> --config.epochs=two: must be a number
optimizer.learning_rate=fast -> --config.optimizer.learning_rate=fast: must be a
data.augment=maybe -> --config.data.augment=maybe: must be true or false
model.scan=5 -> --config.model.scan=5: must be true or false
--config.steps -> --config.steps: no value; write --config.steps=VALUE
"""
_DATA_FIELDS = """
data.name=svhn -> data.name='svhn' is unknown; choose one of cifar10, cifar100
data.name=cifr10 -> data.name='cifr10' is unknown; did you mean 'cifar10'?
data.name=WikiText-2 -> 'WikiText-2' is unknown; did you mean 'wikitext2'?
data.name=ptb -> config.model.name = 'resnet8': reads images, but ptb is text
data.holdout=-1 -> data.holdout=-1 is negative; 0 holds out none
data.holdout=1437 -> data.holdout=1437 leaves no training image; use at most
data.train_size=0 -> data.train_size=0: there are 1437 training images; use 1..
data.train_size=1438 -> data.train_size=1438: there are 1437 training images
data.image_size=0 -> config.data.image_size = 0: must be at least 1, or left out
data.image_size=32 -> config.data.image_size = 32: means nothing for digits; lea
data.workers=2 -> config.data.workers = 2: means nothing for digits; leave it
data.unroll=35 -> config.data.unroll = 35: means nothing for digits; leave it
"""
_TEXT_FIELDS = """
data.unroll=0 -> config.data.unroll = 0: must be at least 1, or left out
data.unroll=9999 -> config.data.unroll = 9999: ... have 776 tokens each; use 1..
batch_size=100000 -> batch_size=100000 is out of range for 6204 tokens; use 1..
eval_batch_size=99999 -> eval_batch_size ... 99999 ... use 1..
data.holdout=5 -> data.holdout=5: ptb brings its own validation split; use 0
data.train_size=5 -> data.train_size=5: text is read whole; leave it out
data.augment=True -> config.data.augment = True: means nothing for ptb; leave it
data.name=digits -> model.name = 'lstm_lm': reads text, but digits is images
"""
_MODEL = """
model.name=resnt8 -> model.name = 'resnt8' is unknown; did you mean 'resnet8'?
model.name=mobilenetv2 -> 'mobilenetv2' is unknown; did you mean 'mobilenet_v2'?
model.name=resnet9 -> model.name = 'resnet9' is unknown; ... or resnet<6n+2>
model.name=lstm_lm -> config.model.name = 'lstm_lm': reads text, but digits is
model.width=0 -> config.model.width = 0: must be at least 1
model.width=-4 -> config.model.width = -4: must be at least 1
model.widening=0 -> config.model.widening = 0: must be at least 1
model.heads=3 -> model 'resnet8': has no size 'heads'; leave it out
model.cutoffs=(5,3) -> config.model.cutoffs = (5, 3): must be increasing
model.dropout=1.0 -> config.model.dropout = 1.0: must be in [0, 1)
model.dropout=nan -> config.model.dropout = nan: must be in [0, 1)
model.width_multiplier=inf -> width_multiplier = inf: must be finite and positiv
model.width_multiplier=-0.0 -> width_multiplier = -0.0: must be finite and posit
"""
_TRANSFORMER = """
model.heads=0 -> config.model.heads = 0: must be at least 1
model.heads=5 -> config.model: heads = 5: must divide the width, which is 48
model.width=7 -> config.model: heads = 3: must divide the width, which is 7
model.patch_size=3 -> config.model: patch_size = 3: must divide the image, which
model.layers=0 -> config.model.layers = 0: must be at least 1
"""
_PRECISION = """
precision.method=dcp -> config.precision.method = 'dcp': use one of float, stati
precision.method=DPC -> config.precision.method = 'DPC': use one of float, stati
precision.method=static1 -> method = 'static1': the width must be in 2..16
precision.method=static17 -> method = 'static17': the width must be in 2..16
precision.method=static33 -> method = 'static33': the width must be in 2..16
precision.b_min=1 -> config.precision.b_min = 1: must be in 2..16
precision.b_max=17 -> config.precision.b_max = 17: must be in 2..16
precision.b_max=33 -> config.precision.b_max = 33: must be in 2..16
precision.b_min=9 -> config.precision: b_min=9 is above b_max=8; swap or equal
precision.weights=1 -> precision.weights = 1: must be in 2..16, or 32 for float
precision.weights=17 -> precision.weights = 17: must be in 2..16, or 32 for floa
precision.activations=33 -> precision.activations = 33: must be in 2..16, or 32
precision.gradients=1 -> precision.gradients = 1: must be in 2..16, or 32 for fl
precision.storage_bits=4 -> config.precision.storage_bits = 4: use 8, or
precision.backend=fp4 -> config.precision.backend = 'fp4': use one of simulated,
precision.backend=int8 -> config.precision.backend = 'int8': needs storage_bits
precision.input_gradient=half -> 'half': use one of exact, scaled
precision.input_gradient=scaled -> 'scaled': needs storage_bits = 8
precision.storage_bits=8 precision.b_max=9 -> a width of 9 (weights) does not fi
precision.storage_bits=8 precision.activations=32 -> a width of 32 (activations)
precision.storage_bits=8 precision.method=static16 -> a width of 16 (weights) do
precision.kind=afine -> config.precision.kind = 'afine': use one of affine, symm
precision.delta=2 -> config.precision: delta=2.0 is out of range; use a value in
precision.delta=nan -> config.precision: delta=nan is out of range; use a value
precision.center=medain -> center='medain' is unknown; use one of median, mean
precision.log_form=ln -> log_form='ln' is unknown; use one of base, product
precision.bounds=manual -> config.precision.bounds = 'manual': use auto, or
precision.bounds=auto precision.bounds_step=99999 -> bounds_step = 99999: must c
precision.tau_min=0 -> config.precision.tau_min = 0.0: must be in (0, 1]
precision.tau_max=inf -> config.precision.tau_max = inf: must be in (0, 1]
precision.tau_min=0.99999 -> tau_min = 0.99999: must not be above tau_max, 0.99
precision.method=cpt precision.cycles=0 -> cycles=0 is out of range; use an int
precision.method=random precision.seed=-1 -> precision: seed=-1 is out of range
precision=dpc -> --config.precision: a group; set its fields, as precision.
"""
_ADAPTIVE = """
precision.adaptive.memory=half -> adaptive.memory = 'half': use full or sketch
precision.adaptive.decay=1 -> config.precision.adaptive.decay = 1.0: must be in
precision.adaptive.average=nan -> adaptive.average = nan: must be in (0, 1)
precision.adaptive.warmup=0 -> adaptive: warmup = 0 must be an int, at least 1
precision.adaptive.patience=0 -> adaptive: patience = 0 must be an int, at least
precision.adaptive.threshold=-1 -> threshold = -1.0 must be finite and not negat
precision.adaptive.freeze=1.5 -> freeze = 1.5 must be in (0, 1], or None
precision.adaptive.signal=noise -> signal = 'noise': use one of noise_to_signal
precision.adaptive.budget=nan -> budget = nan must be in (0, 1], or 'start'
"""
_PFQ = """
precision.pfq.stages=1 -> config.precision.pfq.stages = 1: must be at least 2
precision.pfq.window=0 -> config.precision.pfq: window=0 is out of range; use an
precision.pfq.threshold=nan -> threshold=nan is out of range; use a value above
precision.pfq.decay=inf -> decay=inf is out of range; use a value in (0, 1]
"""
_OPTIMIZER = """
optimizer.name=adam -> config.optimizer.name = 'adam': use one of sgd, adamw
optimizer.schedule=linear -> schedule = 'linear': use one of constant, cosine
optimizer.learning_rate=-0.1 -> learning_rate = -0.1: must be finite and not neg
optimizer.learning_rate=nan -> learning_rate = nan: must be finite and not neg
optimizer.weight_decay=inf -> weight_decay = inf: must be finite and not negativ
optimizer.momentum=1 -> config.optimizer.momentum = 1.0: must be in [0, 1)
optimizer.warmup=-0.5 -> config.optimizer.warmup = -0.5: must be in [0, 1)
optimizer.clip=0 -> config.optimizer.clip = 0.0: must be positive, or left out
optimizer.boundaries=(0.9,0.1) -> boundaries = (0.9, 0.1): must be increasing fr
optimizer.boundaries=half -> boundaries = ('half',): must be increasing fraction
optimizer.schedule=steps optimizer.warmup=0.6 -> must come after the warm-up
"""
_MESH = """
mesh.data=0 -> config.mesh.data = 0: there are 8 devices; use 1..8
mesh.data=9 -> config.mesh.data = 9: there are 8 devices ... use 1..8
mesh.data=3 -> config.batch_size = 64: must be a multiple of the 3 devices
mesh.fsdp=0 -> config.mesh.fsdp = 0: there are 8 devices; use 1..8
mesh.fsdp=16 -> mesh.fsdp = 16 ... 8 devices are no multiple of 16; use
mesh.tensor=-1 -> config.mesh.tensor = -1: there are 8 devices; use 1..8
mesh.sharding=zero3 -> config.mesh.sharding = 'zero3': use one of replica
mesh.rules=abc -> config.mesh.rules = 'abc': a rule is (pattern
"""
_FLAGS = """
--epochs=2 -> --epochs: no such flag; did you mean --config.epochs?
--wrkdir=x -> --wrkdir: no such flag; did you mean --workdir?
--zzz -> --zzz: no such flag; see --help
stray -> unexpected argument 'stray'; flags start with --
step=2 -> --config.step: no field step; did you mean steps?
optimizer.lr=2 -> --config.optimizer.lr: no field optimizer.lr; configs/default
optimiser.name=sgd -> no field optimiser; did you mean optimizer?
--config..steps=3 -> --config..steps: no field without a name; configs/default
--workdir= -> --workdir is missing; see --help
--workdir -> --workdir: no value; write --workdir=VALUE
--workdir=gs://bucket/run -> --workdir=gs://bucket/run: must be a folder
--processes=2 -> --coordinator ... missing; several processes need all of
--processes=two -> --processes=two: must be an integer
--debug=maybe -> --debug=maybe: must be true or false
"""
_RECIPES = """
--config={disk}/digits.py -> digits.py; did you mean configs/digits_resnet8.py?
--config={disk}/nothing.py -> there is no file {disk}/nothing.py; configs/ has
--config={disk} -> --config={disk}: there is no file {disk}; configs/ has the
--config= -> --config=: names no file; configs/ has the recipes
--config=README.md -> --config=README.md: no Python file; configs/ has the recip
--config={disk}/syntax.py -> syntax.py: SyntaxError: ... (syntax.py, line 1)
--config={disk}/raises.py -> raises.py: KeyError: 'lr'
--config={disk}/asserts.py -> asserts.py: AssertionError: too large
--config={disk}/number.py -> number.py: get_config() must return a ConfigDict
--config={disk}/none.py -> none.py: get_config() must return a ConfigDict
--config={disk}/typo.py -> optimizer.learnig_rate is no field; did you mean opt
--config={disk}/bare.py -> bare.py: has no field ... ; start from configs
--config={disk}/empty.py -> has no attribute 'get_config'
--config={disk}/number.py:dpc -> takes 0 positional arguments but 1 was given
--config={digits}:dpc,smok -> 'dpc,smok': after the colon use METHOD or METHOD,s
--config={digits}: -> config.precision.method = '': use one of float
--config={digits}:dcp -> config.precision.method = 'dcp': use one of float
"""
_WORKDIRS = """
--workdir={disk}/file -> workdir = {disk}/file: File exists; use another workdir
--workdir={disk}/file/run -> {disk}/file/run: Not a directory; use another workd
--workdir=/proc/nothing/run -> workdir = /proc/nothing/run: ... use another work
--workdir={disk}/runs/other -> precision.seed ... 5, ... use another workdir
--workdir={disk}/runs/cut -> config.json is damaged; use another workdir
--workdir={disk}/runs/list -> config.json is damaged; use another workdir
--workdir={disk}/runs/bytes -> config.json is damaged; use another workdir
--workdir={disk}/runs/bare -> holds checkpoints, but config.json is missing; use
--workdir={disk}/runs/summary -> summary.json is damaged
"""
_IMAGE_FOLDERS = """
data.dir=/nowhere -> 'cifar10': /nowhere (data.dir) does not exist; correct it
data.dir={disk}/file -> {disk}/file (data.dir) is a file, not a folder; correct
data.dir={disk}/empty -> no prepared cifar10 in {disk}/empty (data.dir); prepare
data.dir={disk}/whole/cifar10 -> a part of it: use {disk}/whole, or prepare it
data.dir={disk}/whole/cifar10/3.0.2 -> a part of it: use {disk}/whole, or prep
data.dir=gs://bucket -> data.dir=gs://bucket is not a local folder; copy cifar10
data.dir={disk}/renamed -> {disk}/renamed/cifar10/3.0.2 holds 'cifar100'; remove
data.dir={disk}/json -> dataset_info.json is not JSON; remove
data.dir={disk}/truncated -> a file in {disk}/truncated/cifar10/3.0.2 is damaged
data.dir={disk}/label -> image 1 of tfds' split 'test' ... label is 10, none
data.dir={disk}/missing -> cifar10-test.array_record-00000-of-00001 is missing
data.dir={disk}/pixels -> image 1 of tfds' split 'test' cannot be decoded
data.dir={disk}/size -> image 0 ... (8x8 pixels instead of 32x32); prepare the d
data.dir={disk}/whole data.name=cifar100 -> no prepared cifar100 in {disk}/whole
"""
_TEXT_FOLDERS = """
data.dir=/nowhere -> 'ptb': /nowhere (data.dir) does not exist; correct it; put
data.dir={disk}/empty -> neither a prepared ptb nor text files in {disk}/empty
data.dir={disk}/short -> ptb.train.txt is not the train split of ptb
data.dir={disk}/utf8 -> ptb.train.txt is not UTF-8 text (invalid start byte)
data.dir={disk}/nul -> ptb.train.txt is not the train split of ptb
data.dir={disk}/nothing -> ptb.train.txt is empty; replace it by the one from
data.dir={disk}/some -> holds other files of it but neither ptb.valid.txt nor
data.dir={disk}/gzip -> ptb.train.txt.gz is damaged (Compressed file ended
"""
_COMPARE = """
--methods= -> --methods is empty: name at least one
--methods=dpc,dcp -> config.precision.method = 'dcp': use one of float
--methods=static99 -> method = 'static99': the width must be in 2..16
--seeds=0 -> --seeds=0: must be a positive integer
--workdir={disk}/file -> {disk}/file/
--seeds=two -> --seeds=two: must be an integer
--method=dpc -> --method: no such flag; did you mean --methods?
seed=4294967295 --seeds=2 -> config.seed = 4294967296: must be in 0..2^32-1
"""
_BOUNDS = """
--tau_min=2 -> --tau_min
--tau_min=0.99999 -> --tau_min
--widths=8,4 -> --widths
--widths=17 -> --widths ... 17
--widths=a -> --widths ... 'a'
--widths= -> --widths
--steps=0 -> --steps=0: the run has
--steps=2 --checkpoint={disk}/empty -> --steps=2: means nothing beside --checkpo
--checkpoint={disk}/empty -> holds no run; name the workdir of one, with config
--checkpoint={disk}/runs/other -> {disk}/runs/other
--workdir={disk}/file -> --workdir={disk}/file: File exists; use another
--tau_max=high -> --tau_max=high: must be a number
"""
_STEP_BENCH = """
--rounds=1 -> --rounds=1: must be an integer >= 2
--steps=0 -> --steps=0: must be a positive integer
batch_size=20 -> config.batch_size = 20: must be a multiple of the 8 devices
model.name=resnt8 -> model.name = 'resnt8' is unknown; did you mean 'resnet8'?
--workdir={disk}/file -> {disk}/file
"""
_INPUT_BENCH = """
--data_dir={disk}/empty -> no prepared imagenet2012 in {disk}/empty
--data_dir={disk}/empty --steps=0 -> --steps=0: must be at least 1
--steps=x -> --steps: invalid int value: 'x'; see --help
--data_dir={disk}/empty --what -> unrecognized arguments: --what; see --help
"""
_PREPARE = """
--images={disk} -> the following arguments are required: --labels, --data_dir
--images={disk} --labels={disk}/no.csv --data_dir={disk}/new -> --labels={disk}/
--images={disk} --labels={disk}/empty --data_dir={disk}/new -> there is no such
--images={disk} --labels={disk}/bytes.csv --data_dir={disk}/new -> bytes.csv
--images={disk} --labels={disk}/file --data_dir={disk}/new -> no column 'file'
--images={disk} --labels={disk}/dog.csv --data_dir={disk}/new -> 'dog' of file
--images={disk} --labels={disk}/gone.csv --data_dir={disk}/new -> gone.jpg is mi
--images={disk} --labels={disk}/row.csv --data_dir={disk}/new -> row.csv
--images={disk} --labels={disk}/file --data_dir={disk}/new --shards=0 -> --shard
--images={disk} --labels={disk}/file --data_dir={disk}/file -> {disk}/file
"""
_AUTOCORRELATION = """
--at=x -> --at=x: use steps, such as 60,180
--at=999999 -> --at=999999: a window of ... must lie in the run; use 0..
--workdir={disk}/file -> --workdir={disk}/file: File exists; use another
"""
_CURVES = """
{disk}/empty -> {disk}/empty: not a finished adaptive run
{disk}/runs/summary -> {disk}/runs/summary: not a finished adaptive run
--run={disk}/empty -> the following arguments are required: RUN; see --help
"""

GROUPS = (
  Group("length, batch, seed, intervals", "train", DIGITS, _LENGTHS),
  Group("wrong types", "train", DIGITS, _TYPES),
  Group("data.*", "train", DIGITS, _DATA_FIELDS),
  Group("data.* of text", "train", PTB, _TEXT_FIELDS),
  Group("model.*", "train", DIGITS, _MODEL),
  Group("model.* of a transformer", "train", VIT, _TRANSFORMER),
  Group("precision.*", "train", DIGITS, _PRECISION),
  Group(
    "precision.adaptive.*",
    "train",
    "configs/digits_resnet8.py:adaptive",
    _ADAPTIVE,
  ),
  Group("precision.pfq.*", "train", "configs/digits_resnet8.py:pfq", _PFQ),
  Group("optimizer.*", "train", DIGITS, _OPTIMIZER),
  Group("mesh.*", "train", DIGITS, _MESH),
  Group("flags and field names", "train", DIGITS, _FLAGS),
  Group("recipes", "train", "", _RECIPES),
  Group("workdirs", "train", DIGITS, _WORKDIRS),
  Group("folders of images", "train", CIFAR10, _IMAGE_FOLDERS),
  Group("folders of text", "train", "configs/ptb_lstm.py:dpc", _TEXT_FOLDERS),
  Group("compare", "compare", DIGITS, _COMPARE),
  Group("bounds", "bounds", DIGITS, _BOUNDS),
  Group("bench.step", "bench.step", DIGITS, _STEP_BENCH),
  Group("bench.input", "bench.input", "", _INPUT_BENCH),
  Group("adaptive", "adaptive.autocorrelation", DIGITS, _AUTOCORRELATION),
  Group("adaptive", "adaptive.curves", "", _CURVES),
  Group("prepare_imagenet", "prepare_imagenet", "", _PREPARE),
  Group("report", "report", "", bad_saved.REPORT),
  Group("embeddings", "embeddings", "", bad_saved.EMBEDDINGS),
  Group("export", "export", "", bad_saved.EXPORT),
)


def rows() -> list[tuple[Group, tuple[str, ...], str]]:
  """(group, arguments, words of the line) of every mistake."""
  return [
    (group, tuple(arguments.split()), words)
    for group in GROUPS
    for arguments, words in (
      line.split(" -> ") for line in group.rows.strip().splitlines()
    )
  ]


def argv(
  group: Group, arguments: tuple[str, ...], workdir: pathlib.Path, disk: Any
) -> list[str]:
  """The command line of a row."""
  places = {
    "{disk}": str(disk),
    "{digits}": DIGITS.split(":")[0],
    "{run}": str(disk / "saved" / "run"),
    "{new}": str(workdir),
  }
  line = [f"--config={group.recipe}"] if group.recipe else []
  line.append(f"--workdir={workdir}")
  for argument in arguments:
    for name, place in places.items():
      argument = argument.replace(name, place)
    is_flag = argument.startswith("--") or "=" not in argument
    line.append(argument if is_flag else f"--config.{argument}")
  if group.program in PLAIN:
    line.remove(f"--workdir={workdir}")
  return [f"experiments/{group.program}.py", *line]
