"""A real Slurm cluster on this machine, for tests: three nodes, each in namespaces of its own, with two fake GPUs.

    with Cluster() as cluster:
        job = cluster.submit("--wrap", "hostname")
        cluster.wait_for(job, "COMPLETED")
        cluster.switch_off("node2")

What is missing is installed by apt. It needs root on Linux, and the rights to make namespaces and a bridge. A second
run on the machine waits for the first one; what a killed one left is cleared away. Nodes share `cluster.folder`
and all of this machine's disk but /tmp, of which they see what `visible` names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("/var/tmp/sdg-test-slurm")
BRIDGE, NET = "sdgtest0", "10.77.0"
ADDRESS = f"{NET}.1"  # of this machine, as the nodes see it
NODES = {"node1": f"{NET}.11", "node2": f"{NET}.12", "node3": f"{NET}.13"}
PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "shellcheck", "iproute2"]
GPUS = 2  # of a node
MAX_ARRAY_SIZE = 1001

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/pid/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/{task}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=900
MaxArraySize={array}
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
MinJobAge=3600
KillWait=5
EnforcePartLimits=ALL
JobRequeue=1
PropagateResourceLimitsExcept=ALL
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node[1-3] NodeAddr={net}.[11-13] CPUs=8 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 OverSubscribe=NO GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""

# Runs as the first process of a node: all others of it end with this one.
INIT = r"""
set -eu
name=$1 folder=$2 slurmd=$3; shift 3
hostname "$name"
mount --make-rprivate /
mkdir -p "$folder/tmp-$name"
mount --rbind /tmp "$folder/tmp-$name"
mount -t tmpfs tmpfs /tmp
chmod 1777 /tmp
for path; do  # what lies in this machine's /tmp and is needed there
    mkdir -p "$path"
    mount --rbind "$folder/tmp-$name/${path#/tmp/}" "$path"
done
mount -t tmpfs tmpfs /dev/shm
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/run-$name" /run
"$slurmd" -D -N "$name" -f "$folder/slurm.conf" &
wait
"""


class Unavailable(Exception):
    """There can be no cluster here; the message says why."""


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], object] = lambda: "") -> None:
    """Return as soon as the condition holds; fail, with what `what` says, if it does not within some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"gave up waiting: {what()}"
        time.sleep(0.1)


def install() -> None:
    """Install Slurm if it is not there; its services are not started."""
    if sys.platform != "linux" or os.geteuid():
        raise Unavailable("root on Linux is needed")
    found = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if all(shutil.which(name, path=found) for name in ("slurmctld", "slurmd", "sbatch", "munged", "shellcheck", "ip")):
        return
    if not shutil.which("apt-get"):
        raise Unavailable("Slurm is not installed, and there is no apt-get")
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", *command], check=True, capture_output=True, text=True, env=environment)
    except subprocess.CalledProcessError as problem:
        raise Unavailable(f"Slurm cannot be installed: {problem.stderr.strip()[-300:]}") from problem
    finally:
        if ours:
            policy.unlink()


def call(*command: object, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command; its error says what it said."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]
    assert not check or done.returncode == 0, f"{shlex.join(words)}: {done.stdout}{done.stderr}"
    return done  # type: ignore[no-any-return]


def die_with_us(*command: object) -> list[str]:
    """A command that is killed when this process ends, however it does."""
    return ["setpriv", "--pdeathsig", "KILL", *map(str, command)]


@dataclasses.dataclass(frozen=True)
class Job:
    """What Slurm says of a job, or of one task of an array."""

    id: str
    fields: dict[str, str]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])

    @property
    def node(self) -> str:
        return self.fields.get("BatchHost", "")


class Cluster:
    """Starts on entering, stops on leaving."""

    def __init__(self, visible: Iterable[Path] = ()) -> None:
        self.folder = FOLDER
        self.shared = FOLDER / "shared"  # for the tests' files
        self.visible = [str(path) for path in visible if Path("/tmp") in path.parents]
        self.limits_memory = False  # cgroups kill what exceeds --mem
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = filelock.FileLock(FOLDER.with_suffix(".lock"))

    # -- life

    def __enter__(self) -> Cluster:
        install()
        self._lock.acquire(timeout=1800)
        self._clear()
        try:
            self._configure()
            self._connect()
        except (AssertionError, OSError) as problem:
            self._clear()
            self._lock.release()
            raise Unavailable(f"no cluster can be made here: {problem}") from problem
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._nodes):
            self._kill(name)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._clear()
        self._lock.release()

    def _clear(self) -> None:
        """Remove what this session, or an earlier one, has made. Its processes have ended with it."""
        for name in NODES:
            call("ip", "netns", "delete", f"sdgtest-{name}", check=False)
        call("ip", "link", "delete", BRIDGE, check=False)
        shutil.rmtree(FOLDER, ignore_errors=True)

    def _configure(self) -> None:
        for name in ("state", "pid", "log", "munge", "shared", *(f"run-{node}" for node in NODES)):
            (FOLDER / name).mkdir(parents=True)
        (FOLDER / "munge").chmod(0o755)
        writable = os.access("/sys/fs/cgroup/freezer", os.W_OK)
        self.limits_memory = writable and os.access("/sys/fs/cgroup/memory", os.W_OK)
        (FOLDER / "slurm.conf").write_text(
            SLURM_CONF.format(
                host=os.uname().nodename,
                address=ADDRESS,
                folder=FOLDER,
                net=NET,
                gpus=GPUS,
                proctrack="cgroup" if writable else "linuxproc",
                task="cgroup" if self.limits_memory else "none",
                array=MAX_ARRAY_SIZE,
            )
        )
        devices = []
        for number in range(GPUS):
            call("mknod", "-m", "666", FOLDER / f"fakegpu{number}", "c", 1, 3)
            devices.append(str(FOLDER / f"fakegpu{number}"))
        (FOLDER / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=node[1-3] Name=gpu File={FOLDER}/fakegpu[0-{GPUS - 1}]\n"
        )
        (FOLDER / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainDevices=no\n"
            f"ConstrainRAMSpace={'yes' if self.limits_memory else 'no'}\n"
        )
        names = [f"{address} {name}" for name, address in NODES.items()]
        (FOLDER / "hosts").write_text(
            "\n".join(["127.0.0.1 localhost", f"{ADDRESS} {os.uname().nodename}", *names]) + "\n"
        )
        (FOLDER / "init.sh").write_text(INIT)
        key = FOLDER / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

    def _connect(self) -> None:
        """A bridge in this machine's network, and a cable from it into each node's."""
        call("ip", "link", "add", BRIDGE, "type", "bridge")
        call("ip", "address", "add", f"{ADDRESS}/24", "dev", BRIDGE)
        call("ip", "link", "set", BRIDGE, "up")
        for name, address in NODES.items():
            space, cable = f"sdgtest-{name}", f"sdgt-{name}"
            call("ip", "netns", "add", space)
            call("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            call("ip", "link", "set", cable, "master", BRIDGE, "up")
            for words in ("link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up"):
                call("ip", "-n", space, *words.split())
            call("ip", "-n", space, "route", "add", "default", "via", ADDRESS)

    def _start(self) -> None:
        munge = FOLDER / "munge"
        files = [f"--{name}-file={munge}/munge.{name}" for name in ("key", "pid", "seed", "log")]
        self._daemon("munged", "--foreground", "--force", f"--socket={munge}/munge.sock", *files)
        wait_for((munge / "munge.sock").exists, 30, lambda: self.log("munged"))
        self._daemon("slurmctld", "-D", "-c", "-f", FOLDER / "slurm.conf")
        for name in NODES:
            self.switch_on(name)
        wait_for(self._all_idle, 60, lambda: self.slurm("sinfo", "-N", "-l") + self.log("slurmctld"))

    def _daemon(self, program: str, *arguments: object) -> None:
        command = die_with_us(f"/usr/sbin/{program}", *arguments)
        with open(FOLDER / "log" / f"{program}.out", "ab") as log:
            self._daemons.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment())
            )

    def log(self, daemon: str) -> str:
        """The end of a daemon's log."""
        files = (FOLDER / "log").glob(f"{daemon}*")
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in files)

    def _all_idle(self) -> bool:
        states = self.slurm("sinfo", "--noheader", "-N", "-p", "batch", "-o", "%T").split()
        return states == ["idle"] * len(NODES)

    @contextlib.contextmanager
    def limit_arrays(self, tasks: int) -> Iterator[None]:
        """Lower MaxArraySize for a while, as it is on clusters with small limits."""
        path, name = FOLDER / "slurm.conf", "MaxArraySize"
        whole = path.read_text()
        path.write_text(whole.replace(f"{name}={MAX_ARRAY_SIZE}", f"{name}={tasks}"))
        try:
            self.slurm("scontrol", "reconfigure")
            yield
        finally:
            path.write_text(whole)
            self.slurm("scontrol", "reconfigure")

    # -- nodes

    def switch_on(self, name: str) -> None:
        """Start a node."""
        space = f"--net=/run/netns/sdgtest-{name}"
        namespaces = ["--fork", "--pid", "--kill-child", "--mount-proc", "--uts", "--mount", "--ipc"]
        init = ["bash", FOLDER / "init.sh", name, FOLDER, "/usr/sbin/slurmd", *self.visible]
        command = die_with_us("nsenter", space, "unshare", *namespaces, *init)
        with open(FOLDER / "log" / f"node-{name}.out", "ab") as log:
            self._nodes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment()
            )

    def lose(self, name: str) -> None:
        """Take the power from a node; Slurm notices in half a minute."""
        self._kill(name)

    def switch_off(self, name: str) -> None:
        """Take the power from a node, and have Slurm know it."""
        self._kill(name)
        self.slurm("scontrol", "update", f"node={name}", "state=down", "reason=off")

    @contextlib.contextmanager
    def frozen(self, name: str, lost: bool) -> Iterator[None]:
        """Stop the processes on a node for a while; with Slurm's own if Slurm is to take the node for lost."""
        pids = list(self._inside(name) if lost else self.processes(name))
        self._signal(pids, signal.SIGSTOP)
        try:
            if lost:
                self.slurm("scontrol", "update", f"node={name}", "state=down", "reason=frozen")
            yield
        finally:
            self._signal(pids, signal.SIGCONT)

    def _signal(self, pids: Iterable[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def restore(self) -> None:
        """Have all nodes up and idle."""
        for name in NODES:
            if name not in self._nodes:
                self.switch_on(name)
        for name in NODES:
            state = self.slurm("sinfo", "--noheader", "-n", name, "-p", "batch", "-o", "%T").strip()
            if state.startswith(("down", "drain")):
                self.slurm("scontrol", "update", f"node={name}", "state=resume", check=False)
        wait_for(self._all_idle, 60, lambda: self.slurm("sinfo", "-N", "-l") + self.slurm("squeue"))

    def _kill(self, name: str) -> None:
        node = self._nodes.pop(name)
        node.kill()  # unshare: its child goes with it, and with that all processes of the node
        node.wait()
        wait_for(lambda: not list(self._inside(name)), 10)

    def _inside(self, name: str) -> Iterator[int]:
        """Processes in a node's network."""
        inode = os.stat(f"/run/netns/sdgtest-{name}").st_ino
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and os.stat(f"/proc/{entry}/ns/net").st_ino == inode:
                    yield int(entry)

    def processes(self, name: str | None = None) -> dict[int, str]:
        """Command lines of what runs on a node, or on all nodes, Slurm's own aside; zombies have none."""
        found = {}
        for node in [name] if name else self._nodes:
            for pid in self._inside(node):
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                    line = " ".join(words).strip()
                    if line and not re.match(
                        r"(/usr/sbin/slurmd|slurmstepd|nsenter|setpriv|unshare|bash \S+/init\.sh)", line
                    ):
                        found[pid] = line
        return found

    # -- Slurm

    def environment(self, **more: str) -> dict[str, str]:
        """Variables for Slurm's commands."""
        unwanted = ("SLURM_", "SBATCH_", "SDG_", "OPENAI_", "HF_", "PYTHON", "AWS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
        path = f"{kept['PATH']}:/usr/sbin:/sbin"
        return {**kept, "PATH": path, "SLURM_CONF": str(FOLDER / "slurm.conf"), **more}

    def slurm(self, *command: object, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        return call("timeout", 50, *command, env=self.environment(), check=check).stdout

    def submit(self, *arguments: object, cwd: Path | None = None, **env: str) -> str:
        """Call sbatch; the number of the job."""
        environment = self.environment(**env)
        done = call("timeout", 50, "sbatch", "--parsable", *arguments, env=environment, cwd=cwd or self.shared)
        return done.stdout.strip()

    def jobs(self, job: str) -> list[Job]:
        """A job, or the tasks of an array that have begun and the rest of it."""
        text = self.slurm("scontrol", "show", "job", "--oneliner", job)
        jobs = []
        for line in text.splitlines():
            if line.startswith("JobId="):
                fields = dict(re.findall(r"(\w+)=(\S*)", line))
                task = fields.get("ArrayTaskId")
                jobs.append(Job(f"{fields['ArrayJobId']}_{task}" if task else fields["JobId"], fields))
        return jobs

    def job(self, job: str) -> Job:
        """The one job of this number."""
        (found,) = self.jobs(job)
        return found

    def task(self, job: str, number: int) -> Job:
        """One task of an array."""
        (found,) = [found for found in self.jobs(job) if found.id == f"{job}_{number}"]
        return found

    def states(self, job: str) -> list[str]:
        return sorted(found.state for found in self.jobs(job))

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> None:
        """Wait until a job, or all tasks of an array, are in one of some states."""
        wait_for(lambda: set(self.states(job)) <= set(states), seconds, lambda: self.slurm("squeue") + self.told(job))

    def told(self, job: str) -> str:
        """The logs of a job."""
        logs = sorted({found.fields["StdOut"] for found in self.jobs(job) if "StdOut" in found.fields})
        return "\n".join(f"== {path}\n{Path(path).read_text()[-3000:]}" for path in logs if Path(path).exists())
