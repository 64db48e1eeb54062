"""Who joins whom: as a table, and as two real processes."""

import io
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import jax
import pytest

from dpc_jax.training import checks, distributed
from tests import compiling
from tests.training import processes, tiny

DEADLINE_S = 200
FLAGS = {"coordinator": "10.0.0.2:8476", "processes": 4, "process": 3}
SLURM = {
  "SLURM_JOB_ID": "4099",
  "SLURM_STEP_NODELIST": "node[007-009,012],b1",
  "SLURM_STEP_NUM_TASKS": "8",
  "SLURM_STEP_TASKS_PER_NODE": "2(x3),1(x2)",
  "SLURM_NTASKS": "8",
  "SLURM_PROCID": "3",
  "SLURM_NODEID": "1",
  "SLURM_LOCALID": "1",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "2",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
JAX = {
  "JAX_COORDINATOR_ADDRESS": "head:1234",
  "JAX_NUM_PROCESSES": "2",
  "JAX_PROCESS_ID": "0",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
POD = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
GKE = distributed.Plan("TPU", "gketpu")


def plan(environment, **arguments):
  return distributed.plan(environment, **arguments)


def of_slurm(coordinator, devices, count=8, index=3):
  return distributed.Plan("SLURM", None, coordinator, count, index, devices)


ALONE = {
  "a laptop": {},
  "a notebook in Kubernetes": KUBERNETES,
  "a TPU of one host": {"TPU_WORKER_HOSTNAMES": "localhost"},
  "a TPU not used": POD | {"JAX_PLATFORMS": "cpu"},
  "a batch script": {
    k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")
  },
  "one task": SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
  "mpirun of one": OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
  "a group of one": JAX | {"JAX_NUM_PROCESSES": "1"},
}
TOGETHER = {
  "variables": (
    JAX,
    distributed.Plan("JAX_COORDINATOR_ADDRESS", None, "head:1234", 2, 0),
  ),
  "variables within SLURM": (
    JAX | SLURM,
    distributed.Plan("JAX_COORDINATOR_ADDRESS", None, "head:1234", 2, 0),
  ),
  "SLURM": (SLURM, of_slurm("node007:61443", (1,))),
  "SLURM gave the GPU": (
    SLURM | {"CUDA_VISIBLE_DEVICES": "5"},
    of_slurm("node007:61443", None),
  ),
  "SLURM, a task per node": (
    SLURM | {"SLURM_NODEID": "4", "SLURM_PROCID": "7", "SLURM_LOCALID": "0"},
    of_slurm("node007:61443", None, index=7),
  ),
  "SLURM, a port": (
    SLURM | {"JAX_COORDINATOR_PORT": "99", "SLURM_STEP_NODELIST": "n1,n2"},
    of_slurm("n1:99", (1,)),
  ),
  "Open MPI": (
    OPEN_MPI,
    distributed.Plan("Open MPI", None, "10.96.0.1:62624", 4, 2, (0,)),
  ),
  "a TPU pod in Kubernetes": (POD | KUBERNETES, GKE),
  "slices": (
    {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
    GKE,
  ),
}


@pytest.mark.parametrize("name", ALONE)
def test_alone(name):
  assert plan(ALONE[name]) is None
  # One that was told so is what was asked for.
  if name == "a group of one":
    assert plan(ALONE[name], mode="on") is None
    return
  with pytest.raises(checks.ConfigError, match="--distributed=on: nothing"):
    plan(ALONE[name], mode="on")


@pytest.mark.parametrize("name", TOGETHER)
def test_together(name):
  environment, wanted = TOGETHER[name]
  assert plan(environment) == wanted
  assert plan(environment, mode="on") == wanted
  assert plan(environment, mode="off") is None
  # Flags come before all that the environment says.
  assert plan(environment, **FLAGS) == distributed.Plan(
    "--coordinator", None, "10.0.0.2:8476", 4, 3
  )


def test_flags_and_variables_may_be_mixed():
  found = plan(JAX, process=1)
  assert found == distributed.Plan(
    "JAX_COORDINATOR_ADDRESS", None, "head:1234", 2, 1
  )
  assert distributed.name(found) == "process 1 of 2"


def test_what_must_be_asked():
  """The metadata server and the cluster, and nobody else first."""
  asked = []

  def hosts(count):
    return lambda: asked.append(count) or count

  assert plan({}, count_tpu_hosts=hosts(1)) is None
  found = plan({}, count_tpu_hosts=hosts(64))
  assert found == distributed.Plan("TPU", "gcetpu")
  assert distributed.name(found) == f"host {socket.gethostname()}"
  assert asked == [1, 64]
  for environment in (
    {"TPU_SKIP_MDS_QUERY": "1"},
    {"JAX_PLATFORMS": "cuda"},
    ALONE["a TPU of one host"],
    SLURM,
  ):
    plan(environment, count_tpu_hosts=hosts(2))
  assert asked == [1, 64]
  job = KUBERNETES | {"JOB_COMPLETION_INDEX": "1"}
  assert plan(job) is None
  found = plan(job, has_kubernetes=True)
  assert found == distributed.Plan("Kubernetes", "k8s")
  assert plan(KUBERNETES, has_kubernetes=True) is None
  assert not distributed.has_kubernetes()


def test_the_metadata_server_counts_hosts(monkeypatch):
  assert distributed.count_tpu_hosts() == 1
  answers = [b"a:0:10.0.0.2,b:1:10.0.0.3", b"a", urllib.error.URLError("no")]

  def urlopen(request, timeout):
    assert request.full_url.endswith("worker-network-endpoints")
    assert timeout == 2
    answer = answers.pop(0)
    if isinstance(answer, bytes):
      return io.BytesIO(answer)
    raise answer

  monkeypatch.setattr(urllib.request, "urlopen", urlopen)
  assert distributed.count_tpu_hosts() == 1
  assert len(answers) == 3
  monkeypatch.setattr(distributed, "_has_tpu", lambda: True)
  assert [distributed.count_tpu_hosts() for _ in range(3)] == [2, 1, 1]


MISTAKES = [
  ({}, {"processes": 2}, "--coordinator or JAX_COORDINATOR_ADDRESS and"),
  ({}, {"coordinator": "a:1", "processes": 2}, "JAX_PROCESS_ID missing; sev"),
  ({}, FLAGS | {"process": 4}, r"--process=4: must be in 0\.\.3, since"),
  ({}, FLAGS | {"process": -1}, r"--process=-1: must be in 0\.\.3"),
  ({}, FLAGS | {"processes": 0}, "--processes=0: must be at least 1"),
  *(
    ({}, FLAGS | {"coordinator": text}, "must be HOST:PORT, such as")
    for text in ("head", "head:", ":1", "a:0", "a:65536", "::1:5", "http://a:1")
  ),
  ({}, FLAGS | {"mode": "off"}, "--distributed=off: contradicts"),
  ({}, {"mode": "on"}, "--distributed=on: nothing here tells of other"),
  # The variable is named, if it was one.
  (JAX | {"JAX_PROCESS_ID": "one"}, {}, "JAX_PROCESS_ID=one: must be a whole"),
  (JAX | {"JAX_PROCESS_ID": "2"}, {}, r"^JAX_PROCESS_ID=2: must be in 0\.\.1"),
  (JAX | {"JAX_NUM_PROCESSES": "0"}, {}, "^JAX_NUM_PROCESSES=0: must be at"),
  (JAX | {"JAX_COORDINATOR_ADDRESS": "a"}, {}, "^JAX_COORDINATOR_ADDRESS=a: "),
  (JAX, {"process": 2}, r"^--process=2: must be in 0\.\.1"),
  *(
    (
      SLURM | {"SLURM_STEP_NODELIST": nodes},
      {},
      r"^SLURM_STEP_NODELIST=.*give --coordinator=HOST:PORT --processes=8 --pr",
    )
    for nodes in ("rack[1-2]n[01-04]", "n[1-2]-ib,m", "[1-2]", "n[1-2")
  ),
  (
    OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""},
    {},
    "Open MPI does not say where process 0 runs; give --coordinator=HOST:PORT"
    " --processes=4",
  ),
]


@pytest.mark.parametrize(("environment", "arguments", "message"), MISTAKES)
def test_mistakes(environment, arguments, message):
  with pytest.raises(checks.ConfigError, match=message) as caught:
    plan(environment, **arguments)
  assert "\n" not in str(caught.value)


def test_one_line_where_jax_refuses(monkeypatch):
  given = {}

  def refuse(*arguments, **options):
    given.update(options, arguments=arguments)
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", refuse)
  with pytest.raises(checks.ConfigError, match="TPU: the processes did not fi"):
    distributed.join(distributed.Plan("TPU", "gcetpu"), 7.2)
  assert given == {
    "arguments": (None, None, None),
    "local_device_ids": None,
    "cluster_detection_method": "gcetpu",
    "initialization_timeout": 7,
    "heartbeat_timeout_seconds": 60,
    "shutdown_timeout_seconds": 60,
  }


@pytest.mark.parametrize(
  ("error", "passes"),
  [
    ("DEADLINE_EXCEEDED: Deadline Exceeded", True),
    ("UNAVAILABLE: failed to connect to all addresses", True),
    ("ABORTED: 1 unexpectedly tried to connect with a different", True),
    ("INVALID_ARGUMENT: was UNAVAILABLE", False),
    (ValueError("ABORTED"), False),
  ],
)
def test_what_jax_finds_may_pass(error, passes, monkeypatch):
  if isinstance(error, str):
    error = jax.errors.JaxRuntimeError(error)

  def refuse(*arguments, **options):
    raise error

  monkeypatch.setattr(jax.distributed, "initialize", refuse)
  with pytest.raises(checks.ConfigError, match="did not find") as caught:
    distributed.join(distributed.Plan("TPU", "gcetpu"))
  assert isinstance(caught.value, checks.TransientError) == passes


def start(environment, *flags, recipe="configs/digits_resnet8.py:dpc,smoke"):
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "experiments.train", f"--config={recipe}"),
      "--config.model.width=2",
      *flags,
    ],
    cwd=processes.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": compiling.FLAGS,
      **environment,
    },
  )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
  """An environment without TensorFlow, whose import takes seconds."""
  folder = tmp_path_factory.mktemp("stub")
  (folder / "tensorflow.py").write_text("raise ImportError('none')\n")
  return {"PYTHONPATH": str(folder)}


def finish(started):
  """(code, lines, errors) of each; gloo's own note is not ours."""
  ends = []
  try:
    for process in started:
      out, err = process.communicate(timeout=DEADLINE_S)
      lines = [x for x in out.splitlines() if not x.startswith("[Gloo]")]
      ends.append((process.returncode, lines, err))
  finally:
    for process in started:
      process.kill()
      process.wait()
  return ends


@pytest.fixture
def address():
  return f"127.0.0.1:{processes.free_port()}"


def test_two_processes_train_by_flags(quick, tmp_path, address):
  """Only the first prints and writes."""
  flags = (f"--coordinator={address}", "--processes=2")
  (code, said, error), other = finish(
    [
      start(quick, f"--workdir={tmp_path}", *flags, f"--process={i}")
      for i in range(2)
    ]
  )
  assert (code, error) == (0, "")
  assert other == (0, [], "")
  assert any("compiling for 2 x cpu" in line for line in said)
  assert sum("step 4/4" in line for line in said) == 1
  lines = tiny.read_lines(tmp_path / "metrics.jsonl")
  assert [x["step"] for x in lines] == [1, 2, 3, 4, 4]
  assert (tmp_path / "summary.json").is_file()


def test_two_tasks_of_slurm_find_a_mistake(quick, tmp_path):
  """They join, and then each says what is wrong, and who it is."""
  port = processes.free_port()
  environment = quick | {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_TASKS": "2",
    "JAX_COORDINATOR_PORT": str(port),
  }
  ends = finish(
    [
      start(
        environment | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        f"--workdir={tmp_path / 'run'}",
        "--config.mesh.data=3",
      )
      for i in range(2)
    ]
  )
  for i, (code, said, error) in enumerate(ends):
    assert (code, said) == (2, [])
    assert error.startswith(f"error: process {i} of 2: "), error
    assert "there are 2 devices" in error
    assert error.count("\n") == 1
