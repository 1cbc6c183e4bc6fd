"""A real SLURM on this machine while a context is open: munge, a controller, two nodes, nothing outside a folder."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

from tests.helpers.ports import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NODES = ("n1", "n2")
PATIENCE = 180  # seconds, on a machine that has other things to do

# Two nodes that are this machine, and a partition of eight GPU nodes that exist on paper, for `sbatch --test-only`.
# cred_expire: a requeued job waits that long. The timeouts are as short as SLURM allows, so that a node fails quickly.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=-1
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=60
InactiveLimit=0
JobRequeue=1
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=64000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=64000 State=UNKNOWN
NodeName=g[1-8] CPUs=128 RealMemory=1000000 Gres=gpu:8 State=CLOUD
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=g[1-8] MaxTime=INFINITE State=UP
"""


def missing():
    """Why no SLURM can be started here; None where it can."""
    absent = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=SEARCH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starting SLURM's daemons needs root"


class Cluster:
    """Daemons of a cluster whose files are all in `folder`; see `running_cluster`."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH}
        self._daemons = {}

    def start(self):
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        ports = [free_port() for _ in range(3)]
        host = socket.gethostname().split(".")[0]
        (self.folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=self.folder, ports=ports))
        (self.folder / "gres.conf").write_text("NodeName=g[1-8] Name=gpu Count=8\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self._wait(lambda: self.states() == dict.fromkeys(NODES, "idle"), "nodes")

    def start_node(self, node):
        self._start("slurmd", "-D", "-N", node, name=node)

    def fail_node(self, node):
        """The node is gone at once: its daemon and everything that runs on it."""
        victims = [psutil.Process(self._daemons[node].pid)]
        ours = {"SLURM_CONF": self.environment["SLURM_CONF"], "SLURMD_NODENAME": node}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if ours.items() <= process.environ().items() and process.pid != os.getpid():
                    parent = process.parent()  # slurmstepd, which has another environment
                    victims += [process, *([parent] if parent and parent.name() == "slurmstepd" else [])]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        self._daemons[node].wait()

    def states(self):
        """State of each node, as `idle`, `alloc`, `down*`."""
        shown = self.call("sinfo", "--noheader", "--Node", "--partition=cpu", "--format=%N %t", check=False)
        return dict(line.split() for line in shown.splitlines() if line)

    def call(self, *command, check=True, timeout=60, **options):
        """Standard output of a command that sees this cluster."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout, **options)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number):
        """Fields of `scontrol show job`."""
        words = self.call("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number, *states, patience=PATIENCE):
        """Until the job is in one of `states`; returns its fields. Fails at once where it ended otherwise."""
        deadline = time.monotonic() + patience
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']}, not {states}: {job}\n{self.logs()}"
            time.sleep(0.2)
        return job

    def logs(self):
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def stop(self):
        if "slurmctld" in self._daemons:
            self.call("scancel", "--user=root", check=False)
            self.call("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            # The steps go before the daemons that watch them.
            with contextlib.suppress(AssertionError):
                self._wait(lambda: not self.call("squeue", "--noheader", check=False).strip(), "jobs to end", 20)
        for daemon in reversed(self._daemons.values()):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    daemon.kill()

    def _start(self, program, *arguments, name=None):
        path = shutil.which(program, path=SEARCH)
        with open(self.folder / f"{name or program}.out.log", "ab") as log:
            self._daemons[name or program] = subprocess.Popen(
                [path, *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, condition, what, patience=60):
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{self.logs()}"
            time.sleep(0.1)


@contextlib.contextmanager
def running_cluster(folder):
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
