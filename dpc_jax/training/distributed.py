"""Several processes, on several hosts, joined into one run before it starts.

JAX's runtime of many controllers: every process runs the same command, and
`jax.distributed.initialize` makes them find each other. Where it finds
something wrong, it ends the process with a stack trace, or crashes. The
processes therefore meet here first, at the coordinator's own port, where what
is wrong can be said in one line.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import re
import socket
import urllib.request
from collections.abc import Callable, Mapping

import jax

from dpc_jax.training import checks, rendezvous

MODES = ("auto", "on", "off")
# How long the processes wait for each other at the start, seconds.
JOIN_TIMEOUT_S = 300
# A process not heard of for so long is dead, and JAX ends the others. JAX's
# own default is 100.
HEARTBEAT_TIMEOUT_S = 60
# How long a process that ends waits for the others to end. JAX's own default
# is 300; ours meet when summary.json is written, seconds before they end.
SHUTDOWN_TIMEOUT_S = 60
# What jax.distributed reads itself, and the two beside it that it does not.
_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_COUNT = "JAX_NUM_PROCESSES"
_INDEX = "JAX_PROCESS_ID"
_PORT = "JAX_COORDINATOR_PORT"
# Ports of jobs under SLURM and Open MPI, by the job's number, as JAX's own.
_PORTS = 2**12
_FIRST_PORT = 2**16 - _PORTS
# JAX's errors of processes that were lost, or came again, as they joined.
_PASSING = re.compile(r"(DEADLINE_EXCEEDED|UNAVAILABLE|ABORTED)\b")
_METADATA = (
  "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
  "worker-network-endpoints"
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """How this process joins the others.

  Attributes:
    source: who says so, or what says where process 0 is: a flag, a variable.
    detection: JAX's own method that finds what is None below; None where
      nothing has to be found.
    coordinator: HOST:PORT of process 0, reachable from all.
    processes: how many.
    process: which one this is, 0..processes-1.
    local_devices: the GPUs of this host that are this process's, by index;
      None: all that it sees.
  """

  source: str
  detection: str | None = None
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  local_devices: tuple[int, ...] | None = None


def plan(
  environment: Mapping[str, str],
  *,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  mode: str = "auto",
  count_tpu_hosts: Callable[[], int] = lambda: 1,
  has_kubernetes: bool = False,
) -> Plan | None:
  """What the flags and the environment ask for; pure.

  The first of these that applies: the three flags, each of which may come
  from its variable instead (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
  JAX_PROCESS_ID); Open MPI; a step of SLURM; the hosts of a TPU slice; an
  indexed Kubernetes job. A group of one process is not one to join.

  Args:
    environment: os.environ, for instance.
    coordinator: the flag --coordinator.
    processes: the flag --processes.
    process: the flag --process.
    mode: "auto"; "on": a mistake if there is nothing to join; "off": never.
    count_tpu_hosts: the number of hosts of the TPU slice that this machine is
      part of, where no variable tells.
    has_kubernetes: whether the package is there that JAX asks the cluster by.

  Returns:
    None for a process by itself.

  Raises:
    ConfigError: flags that contradict each other, or are not all there;
      variables that make no sense.
  """
  flags = (coordinator, processes, process)
  if mode == "off":
    if any(flag is not None for flag in flags):
      raise checks.ConfigError(
        "--distributed=off: contradicts --coordinator, --processes and"
        " --process; leave them out"
      )
    return None
  found = (
    _explicit(environment, *flags)
    or _open_mpi(environment)
    or _slurm(environment)
    or _tpu(environment, count_tpu_hosts)
    or _kubernetes(environment, has_kubernetes)
  )
  if found is None and mode == "on":
    raise checks.ConfigError(
      "--distributed=on: nothing here tells of other processes; give"
      " --coordinator=HOST:PORT --processes=N --process=I"
    )
  return None if found is None or found.processes == 1 else found


def join(found: Plan, timeout_s: float = JOIN_TIMEOUT_S) -> None:
  """Joins the others; call it before anything asks JAX for devices.

  Raises:
    rendezvous.AbsentError: a ConfigError; the coordinator is not reached or
      processes are missing after `timeout_s`, or one is lost meanwhile:
      another time they may be there.
    ConfigError: the port is taken, two have the same index or another count.
      On TPU and Kubernetes, where JAX finds the addresses, it is JAX that ends
      a process which does not find the others in time.
  """
  if found.detection is None:
    rendezvous.meet(
      found.coordinator,
      found.processes,
      found.process,
      timeout_s,
      found.source,
    )
  devices = found.local_devices
  try:
    jax.distributed.initialize(
      found.coordinator,
      found.processes,
      found.process,
      local_device_ids=None if devices is None else list(devices),
      # JAX would add one GPU per process, even where a node has but one.
      cluster_detection_method=found.detection or "deactivate",
      initialization_timeout=max(1, round(timeout_s)),
      heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
      shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )
  except (RuntimeError, ValueError, OSError) as error:
    passes = isinstance(error, jax.errors.JaxRuntimeError) and _PASSING.match(
      str(error)
    )
    raise (rendezvous.AbsentError if passes else checks.ConfigError)(
      f"{found.source}: the processes did not find each other: {error}"
    ) from None


def name(found: Plan) -> str:
  """This process in words: "process 1 of 4", or its host's name.

  JAX knows the number for sure, but would set up the devices to tell, which
  waits for all processes.
  """
  if found.process is None:
    return f"host {socket.gethostname()}"
  return f"process {found.process} of {found.processes}"


def has_kubernetes() -> bool:
  """Whether the package `kubernetes` is installed (pip install jax[k8s])."""
  return importlib.util.find_spec("kubernetes") is not None


def count_tpu_hosts() -> int:
  """Hosts of the slice as Google Cloud's metadata server knows them.

  1 without TPU chips or libtpu, and where no such server answers in 2 s.
  """
  if not _has_tpu():
    return 1
  request = urllib.request.Request(
    _METADATA, headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=2) as answer:
      return len(answer.read().decode().split(","))
  except OSError:  # a URLError is one
    return 1


def _has_tpu() -> bool:
  dev = pathlib.Path("/dev")
  chips = [*dev.glob("accel*"), *dev.glob("vfio/[0-9]*")]
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _explicit(environment, coordinator, processes, process) -> Plan | None:
  """The flags, and the variables for those that are not given."""
  named = {
    f"--coordinator or {_ADDRESS}": coordinator or environment.get(_ADDRESS),
    f"--processes or {_COUNT}": _first(processes, environment, _COUNT),
    f"--process or {_INDEX}": _first(process, environment, _INDEX),
  }
  missing = [name for name, value in named.items() if value is None]
  if len(missing) == len(named):
    return None
  if missing:
    raise checks.ConfigError(
      f"{' and '.join(missing)} missing; several processes need all of"
      " --coordinator=HOST:PORT --processes=N --process=I"
    )
  # Whichever of the two it was is to blame.
  where = "--coordinator" if coordinator else _ADDRESS
  count = "--processes" if processes is not None else _COUNT
  index = "--process" if process is not None else _INDEX
  coordinator, processes, process = named.values()
  rendezvous.split(coordinator, where)
  if processes < 1:
    raise checks.ConfigError(f"{count}={processes}: must be at least 1")
  if not 0 <= process < processes:
    raise checks.ConfigError(
      f"{index}={process}: must be in 0..{processes - 1}, since there are"
      f" {processes} processes"
    )
  return Plan(where, None, coordinator, processes, process)


def _first(flag, environment, name) -> int | None:
  return flag if flag is not None else _number(environment, name)


def _number(environment, name) -> int | None:
  """The value of a variable; None if it is not set."""
  text = environment.get(name)
  if text is None:
    return None
  if not re.fullmatch(r"\d+", text.strip()):
    raise checks.ConfigError(f"{name}={text}: must be a whole number")
  return int(text)


def _open_mpi(environment) -> Plan | None:
  number = functools.partial(_number, environment)
  processes = number("OMPI_COMM_WORLD_SIZE")
  process = number("OMPI_COMM_WORLD_RANK")
  if processes is None or processes == 1 or process is None:
    return None
  # Of version 4. It is the host of mpirun, on which rank 0 runs by default.
  uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
  host = re.search(r"tcp://([^:,]+)|tcp6://\[([^,\]]+)", uri)
  if host is None:
    raise checks.ConfigError(
      "Open MPI does not say where process 0 runs; give --coordinator=HOST:PORT"
      f" --processes={processes} --process=$OMPI_COMM_WORLD_RANK"
    )
  job = int(re.match(r"\d*", uri)[0] or 0) // 2**12
  name = host[1] or f"[{host[2]}]"
  return Plan(
    "Open MPI",
    None,
    f"{name}:{_port(environment, job)}",
    processes,
    process,
    _own_gpu(
      environment,
      number("OMPI_COMM_WORLD_LOCAL_SIZE"),
      number("OMPI_COMM_WORLD_LOCAL_RANK"),
    ),
  )


def _slurm(environment) -> Plan | None:
  """A step of several tasks; the batch script itself is none."""
  number = functools.partial(_number, environment)
  nodes = environment.get("SLURM_STEP_NODELIST")
  # SLURM_NTASKS is the job's, in an interactive step of one task, too.
  processes = number("SLURM_STEP_NUM_TASKS")
  if processes is None:
    processes = number("SLURM_NTASKS")
  process, job = number("SLURM_PROCID"), number("SLURM_JOB_ID")
  if nodes is None or None in (processes, process, job) or processes == 1:
    return None
  # "node001", "node001,b2", "node[001-015],b2", "node[001,007-015]"
  first = re.match(r"([^,\[\]]+)(?:\[([^,\-\[\]]+)[^\[\]]*\])?(?=,|$)", nodes)
  if first is None:
    raise checks.ConfigError(
      f"SLURM_STEP_NODELIST={nodes}: not of the form node[1-4],other, so the"
      " first host is not known; give --coordinator=HOST:PORT"
      f" --processes={processes} --process=$SLURM_PROCID"
    )
  return Plan(
    "SLURM",
    None,
    f"{first[1]}{first[2] or ''}:{_port(environment, job)}",
    processes,
    process,
    _own_gpu(environment, _tasks_here(environment), number("SLURM_LOCALID")),
  )


def _tasks_here(environment) -> int | None:
  """Tasks of the step on this node; "4(x2),1" are 4, 4 and 1."""
  text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
  counts = []
  for part in text.split(","):
    match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
    if match is None:
      return None
    counts += [int(match[1])] * int(match[2] or 1)
  node = _number(environment, "SLURM_NODEID") or 0
  return counts[node] if node < len(counts) else None


def _own_gpu(environment, tasks, index) -> tuple[int, ...] | None:
  """The index-th GPU, where several processes of a host see all of them.

  A process that has its host to itself, or was given its GPU by the launcher,
  takes all that it sees.
  """
  if index is None or tasks == 1:
    return None
  visible = environment.get("CUDA_VISIBLE_DEVICES")
  if visible is not None and len(visible.split(",")) == 1:
    return None
  return (index,)


def _port(environment, job: int) -> int:
  given = _number(environment, _PORT)
  return job % _PORTS + _FIRST_PORT if given is None else given


def _tpu(environment, count_hosts) -> Plan | None:
  platforms = environment.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms:
    return None
  hosts = environment.get(
    "TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES")
  )
  if hosts is not None:
    slices = _number(environment, "MEGASCALE_NUM_SLICES") or 1
    several = len(hosts.split(",")) * slices > 1
    return Plan("TPU", "gketpu") if several else None
  # Set where the machine has no such server, or is no part of a slice.
  if "TPU_SKIP_MDS_QUERY" in environment:
    return None
  return Plan("TPU", "gcetpu") if count_hosts() > 1 else None


def _kubernetes(environment, has_package: bool) -> Plan | None:
  """An indexed job may as well be many runs: the package tells them apart."""
  if has_package and {
    "KUBERNETES_SERVICE_HOST",
    "JOB_COMPLETION_INDEX",
  } <= set(environment):
    return Plan("Kubernetes", "k8s")
  return None
