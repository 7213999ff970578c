"""Tries runs and sweeps under a real Slurm and a real Open MPI, on one machine.

    apt-get install slurm-wlm munge openmpi-bin
    python -m benchmarks.clusters

Needs root on Debian. It starts a cluster of one node on the loopback interface, with its own
configuration in a temporary folder, and leaves nothing behind. sbatch gets the files of
experiments/launch unchanged, with options of its own for so small a node. Everything runs on one
core, where a run of two tasks takes about a minute: long enough to reach a time limit. Prints what
was tried and what happened; the exit code is 1 if anything is not as expected.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.faults import ROOT, STUDY, Lost, expect, same
from metadyn.store import RunFolder
from metadyn.sweep import SweepFolder

RUN = [STUDY, "--outer.steps", "6000", "--outer.schedule", "constant"]
RUN += ["--outer.learning-rate", "0.001", "--outer.checkpoints", "12"]
SWEEP = [STUDY, "--outer.steps", "60000", "--outer.checkpoints", "60", "--outer.dispatch", "50"]
SWEEP += ["--outer.learning-rate", "1e-3", "3e-3", "--domain.sigma", "0.1", "0.3"]
PART = ["--cpus-per-task=1"]
TWO_TASKS = [*PART, "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]
TWO_RANKS = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", "metadyn", "run"]
STOPPED = "run the same command again"
CONFIGURATION = """
ClusterName=loopback
SlurmctldHost=localhost
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
MinJobAge=3600
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
"""


def wait(ready, what, seconds=300):
    """Returns the first true value of `ready()`, polled twice a second. Raises `Lost` if late."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := ready():
            return value
        time.sleep(0.5)
    raise Lost(f"{what}: not within {seconds} s")


def told(*command):
    """Runs a command and returns what it prints. Raises `Lost` if it fails."""
    completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    expect(completed.returncode == 0, f"{' '.join(command)}: {completed.stderr}")
    return completed.stdout.strip()


@contextlib.contextmanager
def slurm(folder):
    """Runs a Slurm of one node, with two CPUs and two GPUs, for a `with` block."""
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    devices = ("/dev/null", "/dev/zero")  # they stand in for GPUs
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={d}\n" for d in devices))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            daemons.append(subprocess.Popen(command, **quiet))
            wait((folder / "munge.socket").exists, "munge", 10)
        wait(lambda: "idle" in told("sinfo", "--noheader", "--format=%T"), "an idle node", 60)
        try:
            yield
        finally:
            told("scancel", "--user=root")
            wait(lambda: not told("squeue", "--noheader"), "the end of all jobs", 60)
    finally:
        for process in reversed(daemons):
            process.terminate()
            process.wait()


class Job:
    """A launch file that was submitted to sbatch."""

    def __init__(self, folder, file, options, arguments):
        command = ["sbatch", "--parsable", f"--output={folder}/%A-%a.out", *options]
        self.folder = folder
        self.id = told(*command, f"experiments/launch/{file}", *map(str, arguments))

    def said(self):
        """Returns what the job, or all parts of an array, printed."""
        return "".join(p.read_text() for p in sorted(self.folder.glob(f"{self.id}-*.out")))

    def records(self):
        """Returns Slurm's record of the job, or of each part of an array in order."""
        lines = told("scontrol", "--oneliner", "show", "job", self.id).splitlines()
        rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
        return sorted(rows, key=lambda record: int(record.get("ArrayTaskId", "0").split("-")[0]))

    def ended(self):
        """Returns whether no part of the job runs or waits. Releases a requeued part at once."""
        records = self.records()
        for record in records:
            if record["JobState"] == "PENDING" and record["Reason"] == "BeginTime":
                told("scontrol", "update", f"JobId={record['JobId']}", "StartTime=now")
        final_states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return all(record["JobState"] in final_states for record in records)

    def end(self, state="COMPLETED", code="0:0"):
        """Waits for the job's end, and returns its records. Raises `Lost` if any part ended
        otherwise.
        """
        wait(self.ended, f"the end of job {self.id}")
        records = self.records()
        outcomes = [(record["JobState"], record["ExitCode"]) for record in records]
        expect(outcomes == [(state, code)] * len(outcomes), f"{outcomes}: {self.said()[-2000:]}")
        return records


def process(**environment):
    """Finds the id of the metadyn process with these variables. Raises `Lost` if there is none."""
    variables = {f"{name}={value}".encode() for name, value in environment.items()}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program = (folder / "cmdline").read_bytes().split(b"\0")[1:2]
            present = set((folder / "environ").read_bytes().split(b"\0"))
            if variables <= present and program and program[0].endswith(b"/metadyn"):
                return int(folder.name)
    raise Lost(f"no process of {environment}")


def trains(out, until=3):
    """Waits for a run's first `until` checkpoints. Raises `Lost` if it has finished by then."""
    ready = lambda: (out / "config.json").exists() and len(RunFolder(out).outer_steps()) >= until
    wait(ready, f"checkpoints in {out}")
    expect(not (out / "summary.json").exists(), f"{out} was done too soon")


def submitted(out, *options):
    """Submits a run of two tasks to sbatch, with more options, and returns the job."""
    return Job(out.parent, "slurm.sh", [*TWO_TASKS, *options], [*RUN, "--out", out])


def two_tasks(folder):
    """A run of two tasks."""
    job = submitted(folder / "whole")
    job.end()
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    expect(summary["environment"]["processes"] == 2, summary["environment"])
    expect(job.said().count("passed") == 1, "not one process alone printed the verdict")
    return "srun joined two processes", "COMPLETED, 0"


def time_limit(folder):
    """The same with a time limit of a minute, told to stop some 15 s before."""
    out = folder / "late"
    job = submitted(out, "--time=1", "--signal=TERM@15")
    (record,) = job.end()
    expect(int(record["Restarts"]) >= 1 and STOPPED in job.said(), "it was not told to stop")
    same(folder / "whole", out)
    return f"saved, requeued × {record['Restarts']}; the same bits", "COMPLETED, 0"


def task_killed(folder):
    """Task 1 of two is killed."""
    out = folder / "bereft"
    job = submitted(out)
    trains(out)
    os.kill(process(SLURM_JOB_ID=job.id, SLURM_PROCID="1"), signal.SIGKILL)
    start = time.monotonic()
    requeued = lambda: job.records()[0]["Restarts"] == "1"
    wait(requeued, "the requeue", 90)
    delay = time.monotonic() - start
    job.end()
    same(folder / "whole", out)
    return f"srun ended the other; requeued after {delay:.0f} s; the same bits", "COMPLETED, 0"


def cancelled(folder):
    """`scancel` of a run of two tasks, then the same command."""
    out = folder / "cancelled"
    job = submitted(out)
    trains(out)
    told("scancel", job.id)
    (record,) = job.end("CANCELLED", "0:15")
    expect(record["Restarts"] == "0" and STOPPED in job.said(), job.said()[-2000:])
    time.sleep(10)
    job.end("CANCELLED", "0:15")
    submitted(out).end()
    same(folder / "whole", out)
    return (
        "saved, not requeued; the same command came to the same bits",
        "CANCELLED, then COMPLETED, 0",
    )


def array(folder):
    """A sweep in an array of four parts."""
    out = folder / "sweep"
    records = Job(folder, "slurm_array.sh", PART, [*SWEEP, "--out", out]).end()
    expect(len(records) == 4, f"{len(records)} parts")
    expect(list((out / "figures").glob("*.png")), "the last part drew no figures")
    return "the part that ended last drew the figures", "4 × COMPLETED, 0"


def parts_killed(folder):
    """The same: part 1 is killed, part 2 is requeued by `scontrol`."""
    out = folder / "disturbed"
    job = Job(folder, "slurm_array.sh", PART, [*SWEEP, "--out", out])
    trains(out / "settings" / "0")
    os.kill(process(SLURM_ARRAY_JOB_ID=job.id, SLURM_ARRAY_TASK_ID="1"), signal.SIGKILL)
    trains(out / "settings" / "1")
    told("scontrol", "requeue", f"{job.id}_2")
    restarts = [record["Restarts"] for record in job.end()]
    expect(restarts == ["1", "1", "0", "0"], f"restarts: {restarts}")
    for i in range(4):
        same(*(SweepFolder(sweep).setting(i) for sweep in (folder / "sweep", out)))
    return "each requeued once, the others undisturbed; the same bits", "4 × COMPLETED, 0"


def two_ranks(folder):
    """A run of two ranks under `mpirun`."""
    out = folder / "ranks"
    completed = subprocess.run([*TWO_RANKS, *RUN, "--out", out], capture_output=True, text=True)
    expect(completed.returncode == 0 and completed.stdout.count("passed") == 1, completed)
    same(folder / "whole", out)
    return "joined; the same bits as under Slurm", "0"


def rank_killed(folder):
    """Rank 1 of two is killed, then the same command."""
    out = folder / "rank"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen([*TWO_RANKS, *RUN, "--out", out], **pipes)
    try:
        trains(out)
        os.kill(process(OMPI_COMM_WORLD_RANK="1"), signal.SIGKILL)
        start = time.monotonic()
        output, _ = run.communicate(timeout=90)
        delay = time.monotonic() - start
    finally:
        run.terminate()
    expect(run.returncode >= 128, f"{run.returncode}: {output}")
    completed = subprocess.run([*TWO_RANKS, *RUN, "--out", out], capture_output=True, text=True)
    expect(completed.returncode == 0, completed)
    same(folder / "whole", out)
    return (
        f"mpirun ended the other after {delay:.0f} s; the same bits",
        f"{run.returncode}, then 0",
    )


def main():
    """Runs the cases and returns the exit code. Each prints a row, which its docstring labels."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    as_expected = True
    print("| | what happened | seconds | state, exit code |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder, slurm(Path(folder)):
        for case in CASES:
            start = time.monotonic()
            try:
                outcome, state = case(Path(folder))
            except Lost as error:
                outcome, state, as_expected = str(error), "NOT AS EXPECTED", False
            seconds = time.monotonic() - start
            label = " ".join(case.__doc__.split())
            print(f"| {label} | {outcome} | {seconds:.0f} | {state} |", flush=True)
    return 0 if as_expected else 1


CASES = [two_tasks, time_limit, task_killed, cancelled, array, parts_killed, two_ranks, rank_killed]

if __name__ == "__main__":
    sys.exit(main())
