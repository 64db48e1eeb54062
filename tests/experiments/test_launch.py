"""The launchers, with stand-ins for gcloud, srun and scontrol.

Nothing here was run on a TPU or a cluster: what is looked at is the command
that every host gets, that it parses, and what the scripts make of its end.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from absl import flags

from configs import imagenet_resnet50
from experiments import cli

ROOT = pathlib.Path(__file__).parent.parent.parent
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = ("tpu_vm.sh", "slurm.sbatch", "attempt.sh")
RECIPE = "configs/imagenet_resnet50.py:dpc"
DEADLINE_S = 20


@pytest.fixture
def known(monkeypatch):
  """Parses flags of experiments.train: {name: value}."""

  def parse(arguments):
    values = flags.FlagValues()
    monkeypatch.setattr(cli, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    cli.define_config()
    cli.define_distributed()
    assert values(["train", *arguments]) == ["train"]
    return values.flag_values_dict()

  return parse


# ml_collections reads a recipe by a way that Python will drop one day.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--workdir=gs://b/r"], "--workdir=gs://b/r: must be a folder, not an"),
    (["--workdir=x", "--processes=2"], "JAX_PROCESS_ID missing; several"),
    (["--workdir=x", "--processes=two"], "--processes=two"),
    (["--workdir=x", "--distributed=on"], "nothing here tells of other"),
    (["--workdir=x", "--distributed=yes"], "<auto|on|off>"),
    (["--workdir=x", "--join_timeout=0"], "--join_timeout=0"),
  ],
)
def test_a_mistake_is_one_line(arguments, message, monkeypatch, capsys):
  arguments = ["train", f"--config={RECIPE}", *arguments]
  monkeypatch.setattr(cli, "FLAGS", flags.FlagValues())
  monkeypatch.setattr(sys, "argv", arguments)
  monkeypatch.delitem(sys.modules, "config_config", raising=False)
  cli.define_config()
  cli.define_distributed()
  assert cli.run(lambda: pytest.fail("it ran"), arguments) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("error: ") and err.count("\n") == 1
  assert message in err


@pytest.fixture
def home(tmp_path):
  """A home with a folder of programs that go first."""
  (tmp_path / "bin").mkdir()
  return tmp_path


def program(home, name, text):
  path = home / "bin" / name
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(0o755)
  return path


def start(home, script, *arguments, **variables):
  return subprocess.Popen(
    ["bash", str(LAUNCH / script), *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={
      "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
      "HOME": str(home),
      "SAID": str(home / "said"),
      **variables,
    },
  )


def run(home, script, *arguments, **variables):
  """(code, out, err)."""
  process = start(home, script, *arguments, **variables)
  out, err = process.communicate(timeout=DEADLINE_S)
  return process.returncode, out, err


def said(home):
  """What the stand-ins were told, a list of words for each call."""
  return [shlex.split(x) for x in (home / "said").read_text().splitlines()]


HOST = (
  'for x; do [[ "$x" != --command=* ]] || (cd; bash -c "${x#*=}") || exit; done'
)
# Until a trap or a signal ends it, however late that comes.
WAIT = "while :; do sleep 0.02; done"
TELL = 'printf \'%q \' "$(basename "$0")" "$@" >> $SAID; echo >> $SAID'


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell(name):
  subprocess.run(["bash", "-n", LAUNCH / name], check=True)
  if shutil.which("shellcheck"):
    subprocess.run(["shellcheck", LAUNCH / name], check=True)


# TPU VMs.


def tpu(home, *arguments, **variables):
  given = {"TPU_NAME": "pod", "ZONE": "us-west4-a", **variables}
  return run(home, "tpu_vm.sh", *arguments, **given)


@pytest.mark.parametrize(
  ("arguments", "variables", "message"),
  [
    ([], {}, "name what to do: install, train, status, log, stop"),
    (["fly"], {}, "fly: use install, train, status, log or stop"),
    (["train"], {"TPU_NAME": ""}, "TPU_NAME is not set"),
    (["train"], {"ZONE": ""}, "ZONE is not set"),
    (["train"], {}, "WORKDIR is not set"),
    (["train"], {"WORKDIR": "gs://b/r"}, "must be a folder that every host"),
  ],
)
def test_tpu_mistakes(arguments, variables, message, home):
  program(home, "gcloud", TELL)
  code, out, err = tpu(home, *arguments, **variables)
  assert (code, out) == (2, "")
  assert err.startswith("error: ") and message in err
  assert not (home / "said").exists()


def test_tpu_install(home):
  program(home, "gcloud", TELL)
  assert tpu(home, "install", PROJECT="mine") == (0, "", "")
  copy, install = said(home)
  where = ["--zone=us-west4-a", "--project=mine"]
  assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
  assert copy[6:] == ["pod:", "--worker=all", *where]
  assert install[4:7] == ["ssh", "pod", "--worker=all"]
  assert install[8:] == where
  assert "pip install --quiet '.[train,tpu]'" in install[7]
  code, out, err = tpu(home, "install", DRY_RUN="1")
  assert (code, err) == (0, "")
  assert shlex.split(out.splitlines()[1])[7] == install[7]
  assert len(said(home)) == 2


def test_tpu_train_for_real(home, known):
  """A stand-in runs on this machine what every host would run."""
  program(home, "gcloud", HOST)
  program(home, "python", f"{TELL}; echo at step 7; {WAIT}")
  (home / "dpc_jax" / ".venv" / "bin").mkdir(parents=True)
  python = home / "dpc_jax" / ".venv" / "bin" / "python"
  python.symlink_to(home / "bin" / "python")
  given = (f"--config={RECIPE}", "--config.data.dir=/a b")
  code, _, err = tpu(home, "train", *given, WORKDIR="/mnt/runs/a")
  assert (code, err) == (0, "")
  try:
    wait_for((home / "said").exists)
    (command,) = said(home)
    assert command[:3] == ["python", "-m", "experiments.train"]
    values = known(command[3:])
    assert values["workdir"] == "/mnt/runs/a"
    assert values["distributed"] == "on"
    assert values["config"].data.dir == "/a b"
    code, _, err = tpu(home, "train", *given, WORKDIR="/mnt/runs/a")
    assert (code, err) == (1, "a run is under way here\n")
    assert tpu(home, "status")[1] == "it runs\nat step 7\n"
  finally:
    assert tpu(home, "stop")[0] == 0
  wait_for(lambda: tpu(home, "status")[1] == "no run\nat step 7\n")
  assert tpu(home, "stop")[0] == 0


def test_tpu_number_of_another(home):
  """After the host was started again: neither in the way, nor stopped."""
  program(home, "gcloud", HOST)
  (home / "dpc_jax").mkdir()
  (home / "dpc_jax" / "train.log").write_text("at step 7\n")
  with subprocess.Popen(["sleep", "60"]) as other:
    (home / "dpc_jax" / "train.pid").write_text(f"{other.pid}\n")
    try:
      assert tpu(home, "status") == (0, "no run\nat step 7\n", "")
      assert tpu(home, "stop") == (0, "", "")
      assert other.poll() is None
    finally:
      other.kill()


def wait_for(condition):
  deadline = time.monotonic() + DEADLINE_S
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


# SLURM.

JOB = {"SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "16", "CONFIG": RECIPE}


def test_slurm_command(home, known):
  program(home, "srun", f"{TELL}; touch $WORKDIR/summary.json")
  program(home, "scontrol", TELL)
  given = JOB | {"WORKDIR": str(home)}
  assert run(home, "slurm.sbatch", "--config.seed=3", **given) == (0, "", "")
  (command,) = said(home)
  assert command[:5] == [
    *("srun", "--kill-on-bad-exit=1", ".venv/bin/python", "-m"),
    "experiments.train",
  ]
  values = known(command[5:])
  assert values["workdir"] == str(home)
  assert values["config"].seed == 3
  assert values["config"].model.name == "resnet50_imagenet"


@pytest.mark.parametrize("code", [1, 2, 3])
def test_slurm_failure(code, home):
  program(home, "srun", f"exit {code}")
  program(home, "scontrol", TELL)
  given = JOB | {"WORKDIR": str(home)}
  assert run(home, "slurm.sbatch", **given) == (code, "", "")
  assert not (home / "said").exists()
  assert run(home, "slurm.sbatch", **JOB)[0] == 2


def test_slurm_goes_back_to_the_queue(home):
  """SIGTERM to the batch script alone, as --signal=B:TERM does."""
  program(
    home,
    "srun",
    f"trap 'sleep 0.2; echo saved at step 7; exit 0' TERM; {TELL};"
    " while :; do sleep 0.02; done",
  )
  program(home, "scontrol", TELL)
  process = start(home, "slurm.sbatch", **JOB, WORKDIR=str(home))
  wait_for((home / "said").exists)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=DEADLINE_S)
  assert (process.returncode, err) == (0, "")
  assert out == "saved at step 7\nsaved; back to the queue\n"
  assert said(home)[1:] == [["scontrol", "requeue", "12"]]


def test_slurm_does_not_take_it_back(home):
  """An exit code of 0 would mark the job as completed."""
  program(home, "srun", "exit 0")
  program(home, "scontrol", f"{TELL}; exit 1")
  code, _, _ = run(home, "slurm.sbatch", **JOB, WORKDIR=str(home))
  assert code == 75
  assert said(home) == [["scontrol", "requeue", "12"]]


def test_slurm_header():
  text = (LAUNCH / "slurm.sbatch").read_text()
  header = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
  assert {"--signal=B:TERM@90", "--requeue", "--ntasks-per-node=1"} <= {*header}
  # sbatch stops reading them at the first command.
  assert text.index("set -u") > text.rindex("#SBATCH")


# Kubernetes.


@pytest.fixture(scope="module")
def jobset():
  return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_jobset_numbers_and_names_agree(jobset):
  (hosts,) = jobset["spec"]["replicatedJobs"]
  job = hosts["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  env = {x["name"]: x for x in container["env"]}
  assert set(env) == {
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
  }
  count = job["completions"]
  assert job["parallelism"] == count == int(env["JAX_NUM_PROCESSES"]["value"])
  network = jobset["spec"]["network"]
  (port,) = (x["containerPort"] for x in container["ports"])
  host = f"{jobset['metadata']['name']}-{hosts['name']}-0-0"
  assert env["JAX_COORDINATOR_ADDRESS"]["value"] == (
    f"{host}.{network['subdomain']}:{port}"
  )
  assert network["enableDNSHostnames"]
  assert env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == (
    "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  )
  assert job["completionMode"] == "Indexed"
  assert {m["name"] for m in container["volumeMounts"]} == {
    v["name"] for v in pod["volumes"]
  }


def test_jobset_restarts(jobset):
  (hosts,) = jobset["spec"]["replicatedJobs"]
  job = hosts["template"]["spec"]
  pod = job["template"]["spec"]
  # Kubernetes refuses a podFailurePolicy with any other.
  assert pod["restartPolicy"] == "Never"
  assert pod["terminationGracePeriodSeconds"] >= 60
  assert job["backoffLimit"] == 0
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
  assert rule["onExitCodes"]["values"] == [1, 2]
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_jobset_command(jobset, known):
  (hosts,) = jobset["spec"]["replicatedJobs"]
  (container,) = hosts["template"]["spec"]["template"]["spec"]["containers"]
  assert container["command"] == ["bash", "experiments/launch/attempt.sh"]
  workdir, *command = container["args"]
  assert command[:3] == ["python", "-m", "experiments.train"]
  values = known([x.replace("RECIPE", RECIPE) for x in command[3:]])
  assert values["workdir"] == workdir
  # Longer than a node and an image take.
  assert values["join_timeout"] == 1800
  volume, _ = workdir.rsplit("/", 1)
  assert volume in {m["mountPath"] for m in container["volumeMounts"]}
  assert values["config"].to_dict() == (
    imagenet_resnet50.get_config("dpc").to_dict()
  )


@pytest.mark.parametrize(
  ("command", "finished", "wanted"),
  [
    ("exit 0", True, 0),
    ("exit 0", False, 75),
    ("exit 2", False, 2),
    ("exit 1", True, 1),
    ("exit 3", False, 3),
    (f"trap 'exit 0' TERM; kill -TERM $PPID; {WAIT}", False, 75),
    (f"trap 'exit 2' TERM; kill -TERM $PPID; {WAIT}", False, 2),
    # Before the program hears it.
    ("kill -TERM $PPID; exec sleep 15", False, 75),
    ("kill -TERM $$", False, 143),
  ],
)
def test_attempt(command, finished, wanted, home):
  if finished:
    (home / "summary.json").touch()
  arguments = (str(home), "bash", "-c", command)
  assert run(home, "attempt.sh", *arguments) == (wanted, "", "")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("WORKDIR",)])
def test_attempt_without_a_command_is_none_to_try_again(arguments, home):
  code, out, err = run(home, "attempt.sh", *arguments)
  assert (code, out) == (2, "")
  assert err.startswith("usage: attempt.sh WORKDIR COMMAND")


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch", "jobset.yaml"])
def test_every_placeholder_is_explained(name):
  text = (LAUNCH / name).read_text()
  comments = "\n".join(x for x in text.splitlines() if x.startswith("#"))
  rest = "\n".join(x for x in text.splitlines() if not x.startswith("#"))
  if name == "jobset.yaml":
    used = {"IMAGE", "CLAIM", "RECIPE", "RUN"}
  else:
    used = set(re.findall(r"\$\{([A-Z_]+):-", rest)) - {"SLURM_CPUS_PER_TASK"}
  readme = (LAUNCH / "README.md").read_text()
  for word in used:
    assert re.search(rf"\b{word}\b", rest), word
    assert re.search(rf"^#   ? ?{word}\b|^# {word}\b", comments, re.M), word
    assert f"`{word}" in readme, word
