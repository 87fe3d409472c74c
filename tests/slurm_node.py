"""A SLURM cluster of one node in a temporary folder: the real programs, on free ports, without accounting.

Debian and Ubuntu: `apt-get install slurm-wlm munge`.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
PARTITION = "tiny"

# A requeued job waits for cred_expire seconds; a signalled one is killed after KillWait.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
KillWait=20
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName={partition} Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def absent() -> list[str]:
    """The programs that are not installed; those of an administrator may lie outside the PATH."""
    return [name for name in PROGRAMS if not _program(name)]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def slurm_node(folder: Path, patience: float = 60.0):
    """Within the block a node is idle; yields the environment variables that lead to it."""
    folder = folder.resolve()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    controller, port = _free_ports(2)
    user, host = subprocess.check_output(["id", "-un"], text=True).strip(), socket.gethostname().split(".")[0]
    facts = dict(controller=controller, port=port, user=user, host=host, cores=os.cpu_count())
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, partition=PARTITION, **facts))
    env = {"SLURM_CONF": str(config)}
    munge = dict(key_file=key, socket=f"{folder}/munge.socket", pid_file=f"{folder}/munged.pid")
    munge |= dict(log_file=f"{folder}/munged.log", seed_file=f"{folder}/munged.seed", num_threads=2)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in munge.items()]
    commands = [
        ("munged", "--foreground", "--force", *flags),
        ("slurmctld", "-D", "-i"),
        ("slurmd", "-D", "-N", host),
    ]
    started: list[subprocess.Popen] = []
    try:
        for name, *arguments in commands:
            with open(folder / f"{name}.out", "w") as out:
                started.append(
                    subprocess.Popen(
                        [_program(name), *arguments],
                        env=os.environ | env,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a Ctrl-C stops the tests first
                    )
                )
            if name == "munged":
                _wait_for(lambda: Path(munge["socket"]).exists(), started, folder, patience)

        def idle() -> bool:
            asked = ["sinfo", "-h", "-o", "%T"]
            found = subprocess.run(asked, env=os.environ | env, capture_output=True, text=True)
            return found.stdout.strip() == "idle"

        _wait_for(idle, started, folder, patience)
        yield env
    finally:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", "--user", user], env=os.environ | env, timeout=20, capture_output=True)
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _wait_for(ready, started: list[subprocess.Popen], folder: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while not ready():
        ended = [process.args[0] for process in started if process.poll() is not None]
        if ended or time.monotonic() > end:
            logs = [path.read_text(errors="replace")[-2000:] for path in folder.glob("*.out")]
            raise RuntimeError("\n".join([f"SLURM did not start; ended: {ended}", *logs]))
        time.sleep(0.1)


if __name__ == "__main__":  # a node to try things on, until it is stopped
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with slurm_node(Path(sys.argv[1])) as variables:
        print(*(f"export {name}={value}" for name, value in variables.items()), sep="\n", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(1e9)
