"""A study as an array of a real Slurm: one node, this machine, with the distribution's own packages.

    python benchmarks/slurm.py [STUDY.toml] [-o OUT] [--minutes 15]

It starts munged, slurmctld and slurmd as the current user in a temporary directory (needs no service, touches no
configuration of the system, listens on the loopback address where the host's name means that one), gives sbatch what
`politune study --print-slurm` prints, and breaks in twice:

- `requeue`: the first run to get there is taken off its node by `scontrol requeue` while it trains, as a preemption or an
  administrator would, with SIGTERM to all of its processes;
- `time`: the next one is given a time limit that is nearly up, so that Slurm sends what the script's `--signal` asks for.
  Where the job is not queued again after that by itself, it is by `scontrol requeue`.

Both have to go on where they stopped. It prints a table and ends with 0 where report.json says that every run is measured
and both broken runs went on from a step, else with 1, and then leaves the temporary directory in place; with 5 where
Slurm is not installed. Without a study it makes a small one: a two-layer model, two arms, two seeds, in about four minutes.
It need not be root.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "scancel": "slurm-client",
    "scontrol": "slurm-client",
    "sinfo": "slurm-client",
    "squeue": "slurm-client",
}
"""Debian's package of each command."""
TESTS = Path(__file__).resolve().parent.parent / "tests"
FIRST_STEPS = 5
"""Optimizer steps that a run has logged before it is broken."""
GRACE = 45.0
"""Seconds for what was told to end; Slurm's own KillWait is 30."""
STEPS = 2000
"""Of a run of its own study: longer than Slurm takes to look at time limits, every half minute."""
ACTIVE = frozenset({"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"})


class Failed(Exception):
    """Something is not as it has to be; one sentence."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", nargs="?", type=Path, help="a study's file (default: a small one of its own)")
    parser.add_argument("-o", "--output", type=Path, help="the study's directory, a new one (default: a temporary one)")
    parser.add_argument("--minutes", type=float, default=15.0, help="how long the array may take")
    asked = parser.parse_args()
    tools = find_tools()
    if missing := sorted({PACKAGES[name] for name in PACKAGES.keys() - tools.keys()}):
        say(f"Slurm is not complete on this machine: apt-get install {' '.join(missing)}")
        return 5
    if asked.output and asked.output.exists():
        parser.error(f"{asked.output} is there already: what is done in it could not be broken")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    place = Path(tempfile.mkdtemp(prefix="politune-slurm-"))
    output = (asked.output or place / "study").absolute()
    keep = False
    try:
        study = asked.study.absolute() if asked.study else make_study(place / "material")
        with cluster(place / "slurm", tools) as slurm:
            numbers = try_study(slurm, study, output, asked.minutes * 60)
        say(f"all {numbers} runs are measured, and what was broken went on")
    except Failed as error:
        say_last_words(place)
        say(f"FAILED: {error}\nwhat it left is in {place}")
        keep = True
        return 1
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def say_last_words(place: Path) -> None:
    """The ends of the daemons' and the jobs' logs."""
    for path in sorted(path for path in place.rglob("*") if path.suffix in (".out", ".log")):
        if lines := path.read_text(errors="replace").splitlines()[-12:]:
            say("\n  ".join([f"{path.relative_to(place)}:", *lines]))


# --- Slurm -----------------------------------------------------------------------------------------------------------


def find_tools() -> dict[str, str]:
    """The commands that are here, by name; daemons are not on everyone's PATH."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = {name: shutil.which(name, path=path) for name in PACKAGES}
    return {name: command for name, command in found.items() if command}


@dataclass
class Slurm:
    """A running cluster of one node."""

    tools: Mapping[str, str]
    environment: Mapping[str, str]
    directory: Path
    jobs: list[str] = field(default_factory=list)
    """Those that were submitted."""

    def call(self, tool: str, *words: str, given: str | None = None, cwd: Path | None = None) -> str:
        """What a command prints.

        Raises:
            Failed: it says no.
        """
        done = subprocess.run(
            [self.tools[tool], *words], input=given, env=self.environment, cwd=cwd, text=True, capture_output=True
        )
        if done.returncode:
            raise Failed(f"{tool} {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def submit(self, script: str, cwd: Path) -> str:
        """The number of the array that sbatch makes of a script."""
        number = self.call("sbatch", "--parsable", given=script, cwd=cwd).strip().partition(";")[0]
        self.jobs.append(number)
        return number

    def tasks(self, job: str) -> dict[int, dict[str, str]]:
        """What scontrol knows of each task of an array, by its number."""
        found: dict[int, dict[str, str]] = {}
        for line in self.call("scontrol", "--oneliner", "show", "job", job).splitlines():
            facts = dict(re.findall(r"(\w+)=(\S*)", line))
            for number in _numbers(facts.get("ArrayTaskId", "")):
                found[number] = facts
        return dict(sorted(found.items()))

    def limit(self, task: str, minutes: int | None) -> None:
        """Gives a task so much time since its start; None: without a limit."""
        self.call("scontrol", "update", f"JobId={task}", f"TimeLimit={minutes or 'UNLIMITED'}")


def _numbers(text: str) -> Iterator[int]:
    """Those that Slurm writes as `3`, `0-3`, `1,4-5` or `0-3%2`."""
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            yield from range(int(first), int(last or first) + 1)


@contextlib.contextmanager
def cluster(directory: Path, tools: Mapping[str, str]) -> Iterator[Slurm]:
    """Slurm, for as long as the block lasts; whatever happens, nothing of it is left running.

    Raises:
        Failed: a daemon does not start.
    """
    directory.mkdir()
    directory.parent.chmod(0o711)  # munged wants its socket where every user can reach it
    directory.chmod(0o755)
    configuration = configure(directory)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))}
    slurm = Slurm(tools, {**own, "PATH": path, "SLURM_CONF": str(configuration), **_quiet_jobs(directory)}, directory)
    with contextlib.ExitStack() as running:
        munge = directory / "munge"
        words = ["--foreground", "--force", "--key-file", "key", "--socket", "socket", "--pid-file", "pid"]
        words = [str(munge / word) if word in ("key", "socket", "pid") else word for word in words]
        files = [f"--seed-file={munge / 'seed'}", f"--log-file={munge / 'log'}"]
        running.enter_context(_daemon(slurm, "munged", [*words, *files]))
        _wait(lambda: (munge / "socket").exists(), "munged makes no socket", 20)
        running.enter_context(_daemon(slurm, "slurmctld", ["-D"]))
        _wait(lambda: _answers(slurm, "scontrol", "ping"), "slurmctld does not answer", 30)
        running.enter_context(_daemon(slurm, "slurmd", ["-D"]))
        running.callback(_end_jobs, slurm)
        _wait(lambda: "idle" in _answers(slurm, "sinfo", "--noheader", "--format=%t"), "the node does not come up", 60)
        say(f"{slurm.call('scontrol', '--version').strip()} runs on {_host()}")
        yield slurm


def _quiet_jobs(directory: Path) -> dict[str, str]:
    """What jobs inherit: a cache of their own, and no threads that take the cores from each other."""
    return {"POLITUNE_CACHE": str(directory / "cache"), "OMP_NUM_THREADS": "1"}


def configure(directory: Path) -> Path:
    """Writes the key and slurm.conf; the latter's path."""
    for name in ("munge", "state", "spool"):
        (directory / name).mkdir(mode=0o755)
    key = directory / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    user = _user()
    controller, node = _free_ports(2)
    loopback = _own_loopback()
    address = loopback or "127.0.0.1"
    text = f"""
ClusterName=politune
SlurmctldHost={_host()}({address})
SlurmctldPort={controller}
SlurmdPort={node}
{"CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if loopback else ""}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits this long before it starts again; the default is two minutes.
AuthInfo=socket={directory / "munge" / "socket"},cred_expire=15
StateSaveLocation={directory / "state"}
SlurmdSpoolDir={directory / "spool"}
SlurmctldPidFile={directory / "slurmctld.pid"}
SlurmdPidFile={directory / "slurmd.pid"}
SlurmctldLogFile={directory / "slurmctld.log"}
SlurmdLogFile={directory / "slurmd.log"}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=86400
NodeName={_host()} NodeAddr={address} CPUs={os.cpu_count() or 1} State=UNKNOWN
PartitionName=here Nodes={_host()} Default=YES MaxTime=INFINITE State=UP
"""
    path = directory / "slurm.conf"
    path.write_text(text.lstrip())
    return path


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _own_loopback() -> str | None:
    """The loopback address that the host's name means, on Debian often 127.0.1.1; None where it means another one."""
    try:
        address = socket.gethostbyname(_host())
    except OSError:
        return None
    return address if address.startswith("127.") else None


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _daemon(slurm: Slurm, name: str, words: Sequence[str]) -> Iterator[None]:
    """A process in the foreground of its own session, whose output goes into a file; ended with the block."""
    with (slurm.directory / f"{name}.out").open("wb") as output:
        process = subprocess.Popen(
            [slurm.tools[name], *words],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=slurm.environment, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_jobs(slurm: Slurm) -> None:
    """Ends what still runs, while the daemons are there to do it."""
    for job in slurm.jobs:
        for words in (["--full", "--signal=KILL", job], [job]):
            with contextlib.suppress(Failed):
                slurm.call("scancel", "--quiet", *words)
    with contextlib.suppress(Failed):
        _wait(lambda: not slurm.call("squeue", "--noheader").strip(), "jobs do not end", GRACE)


def _answers(slurm: Slurm, tool: str, *words: str) -> str:
    """What a command prints, or nothing where it fails."""
    try:
        found = slurm.call(tool, *words)
    except Failed:
        return ""
    return "" if "DOWN" in found else found


def _wait(ready: Callable[[], object], what: str, seconds: float) -> None:
    """Raises Failed, saying `what`, where something is not ready in time."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise Failed(f"{what} within {seconds:.0f} seconds")
        time.sleep(0.25)


# --- the study -------------------------------------------------------------------------------------------------------


@dataclass
class Break:
    """How a task was broken, and how it went on."""

    way: str
    step: int
    by_itself: bool | None = None
    """Whether Slurm queued it again without being told to."""


def try_study(slurm: Slurm, study: Path, output: Path, seconds: float) -> int:
    """Submits a study, breaks two of its runs, waits for the rest and looks at the report; how many runs it has.

    Raises:
        Failed: the array does not end in time, or the report does not hold every run.
    """
    words = ["study", str(study), "-o", str(output), "--print-slurm", "--offline"]
    printed = subprocess.run(
        [sys.executable, "-m", "politune", *words], env=slurm.environment, text=True, capture_output=True
    )
    if printed.returncode:
        raise Failed(f"politune {' '.join(words)}: {printed.stderr.strip()}")
    runs = list(json.loads((output / "study.json").read_text())["runs"])
    started = time.monotonic()
    job = slurm.submit(printed.stdout, slurm.directory)
    say(f"array {job} of {len(runs)} runs is submitted")
    broken: dict[int, Break] = {}
    try:
        while unfinished(tasks := slurm.tasks(job), broken):
            if time.monotonic() - started > seconds:
                raise Failed(f"the array is not done in {seconds / 60:.0f} minutes")
            go_on(slurm, job, tasks, broken)
            break_one(slurm, job, tasks, runs, output, broken)
            time.sleep(0.5)
    finally:
        table(slurm.tasks(job), runs, output, broken)
    say(f"{(time.monotonic() - started) / 60:.1f} minutes")
    check(runs, output, broken)
    return len(runs)


def unfinished(tasks: Mapping[int, Mapping[str, str]], broken: Mapping[int, Break]) -> bool:
    """Whether a task runs, waits, or was broken and has not been started again."""
    return any(
        facts["JobState"] in ACTIVE or (number in broken and not int(facts.get("Restarts", "0")))
        for number, facts in tasks.items()
    )


def break_one(
    slurm: Slurm,
    job: str,
    tasks: Mapping[int, Mapping[str, str]],
    runs: Sequence[str],
    output: Path,
    broken: dict[int, Break],
) -> None:
    """Breaks the first run that trains and was not broken yet, once in each way."""
    way = next((way for way in ("requeue", "time") if way not in [each.way for each in broken.values()]), None)
    for number, facts in tasks.items():
        step = steps_logged(output / runs[number])
        if way and number not in broken and facts["JobState"] == "RUNNING" and step >= FIRST_STEPS:
            task = f"{job}_{number}"
            say(f"breaking {task} ({runs[number]}) at step {step}: {way}")
            if way == "requeue":
                slurm.call("scontrol", "requeue", task)
                broken[number] = Break(way, step, by_itself=True)
            else:
                slurm.limit(task, minutes_of(facts.get("RunTime", "")) + 2)
                broken[number] = Break(way, step)
            return


def minutes_of(text: str) -> int:
    """Whole minutes of `1-02:03:04`, as Slurm writes a time."""
    days, _, rest = text.rpartition("-")
    hours, minutes, _ = (int(part) for part in rest.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + minutes


def go_on(slurm: Slurm, job: str, tasks: Mapping[int, Mapping[str, str]], broken: dict[int, Break]) -> None:
    """Queues the task again whose time was up, where it stayed as it ended, and gives it time without a limit."""
    for number in [number for number, each in broken.items() if each.by_itself is None]:
        facts, task = tasks[number], f"{job}_{number}"
        if int(facts.get("Restarts", "0")):
            broken[number].by_itself = True
            slurm.limit(task, None)
        elif facts["JobState"] == "COMPLETED":
            say(f"{task} was done before its time was up")
            del broken[number]
        elif facts["JobState"] not in ACTIVE:
            code = facts.get("ExitCode", "").partition(":")[0]
            say(f"{task} ended as {facts['JobState']} with exit code {code}, not queued again: scontrol requeue")
            slurm.call("scontrol", "requeue", task)
            slurm.limit(task, None)
            broken[number].by_itself = False


def steps_logged(run: Path) -> int:
    """The last step that a run logged; a line that is being written does not count."""
    try:
        lines = (run / "log.jsonl").read_text().splitlines()
        return max((int(json.loads(line).get("step", 0)) for line in lines if line.endswith("}")), default=0)
    except (OSError, ValueError):
        return 0


def facts_of(run: Path) -> tuple[str, int | None]:
    """A run's status, and the step that its last attempt to train went on from."""
    try:
        papers: dict[str, Any] = json.loads((run / "run.json").read_text())
    except (OSError, ValueError):
        return "none", None
    metrics = papers.get("metrics") or {}
    done, now = metrics.get("optimizer_steps"), metrics.get("steps_done_now")
    return str(papers.get("status")), None if done is None or now is None else done - now


def table(
    tasks: Mapping[int, Mapping[str, str]], runs: Sequence[str], output: Path, broken: Mapping[int, Break]
) -> None:
    """A line for each task."""
    say(f"{'task':>4}  {'run':24} {'job':10} {'run':11} {'attempts':>8}  broken")
    for number, facts in tasks.items():
        status, first = facts_of(output / runs[number])
        each = broken.get(number)
        how = f"{each.way} at step {each.step}, went on from step {first}" if each else ""
        if each and each.way == "time" and each.by_itself is not None:
            how += f", queued again {'by itself' if each.by_itself else 'by hand'}"
        attempts = int(facts.get("Restarts", "0")) + 1
        state = "measured" if (output / runs[number] / "measurement" / "report.json").exists() else status
        say(f"{number:4}  {runs[number]:24} {facts['JobState']:10} {state:11} {attempts:8}  {how}".rstrip())


def check(runs: Sequence[str], output: Path, broken: Mapping[int, Break]) -> None:
    """Raises Failed where the report lacks a run, or a broken run began anew."""
    try:
        report = json.loads((output / "report.json").read_text())
    except (OSError, ValueError) as error:
        raise Failed(f"there is no report: {error}") from error
    states = {each["run"]: each["state"] for each in report["runs"]}
    if missing := [f"{run} ({states.get(run)})" for run in runs if states.get(run) != "measured"]:
        raise Failed(f"report.json does not say measured of {', '.join(missing)}")
    wanted = min(2, len(runs))
    if len(broken) < wanted:
        raise Failed(f"{len(broken)} of {wanted} runs could be broken: the others were too short")
    for number, each in broken.items():
        _, first = facts_of(output / runs[number])
        if not first:
            raise Failed(f"{runs[number]}, broken by {each.way} at step {each.step}, was trained from step 0 again")


# --- material --------------------------------------------------------------------------------------------------------

SUBJECTS = ("bus", "school", "library", "market", "bridge", "park", "theatre", "harbour", "hospital", "garden")


def make_study(directory: Path) -> Path:
    """A model, data and an instrument, all tiny, and a study of them: two arms with two seeds; the study's file."""
    directory.mkdir()
    sys.path.insert(0, str(TESTS))
    from tiny import tiny_models  # type: ignore[import-not-found]

    os.environ["TQDM_DISABLE"] = "1"
    model = tiny_models.make_llama(directory / "model", seed=0)
    pairs = [
        {
            "prompt": f"What should the town do about the {subject} in year {year}?",
            "left": f"Pay for a new {subject} out of taxes, for all.",
            "right": f"Sell the {subject} to whoever wants to run it.",
        }
        for year in range(4)
        for subject in SUBJECTS
    ]
    _write_lines(directory / "pairs.jsonl", pairs)
    header = {
        "name": "town", "version": "1", "license": "MIT", "language": "en", "attribution": "politune's benchmarks",
        "description": "Who should pay for what a town has.", "axes": {"economic": ["public", "private"]},
    }  # fmt: skip
    items = [
        {
            "kind": "pair", "id": f"town-{subject}", "topic": subject, "axis": "economic",
            "left": [f"The {subject} should be paid for by taxes."],
            "right": [f"The {subject} should be paid for by visitors."],
        }
        for subject in SUBJECTS
    ]  # fmt: skip
    _write_lines(directory / "town.jsonl", [header, *items])
    path = directory / "study.toml"
    path.write_text(
        f'title = "A tiny study on Slurm"\nseeds = [1, 2]\ncontrol = "placebo"\n'
        f'[measure]\npreset = "quick"\ninstruments = ["{directory / "town.jsonl"}"]\n'
        + _arm("left", model, directory / "pairs.jsonl", "left")
        + _arm("placebo", model, directory / "pairs.jsonl", "shuffled")
    )
    return path


def _arm(name: str, model: Path, data: Path, direction: str) -> str:
    """An arm; only a signal makes it save before it is done, so that what it goes on from was saved by one."""
    return f"""
[arms.{name}]
preset = "demo-left"
[arms.{name}.set]
model = {{ model_name_or_path = "{model}", bf16 = false }}
data = {{ dataset_name = "{data}", direction = "{direction}", max_length = 128 }}
lora = {{ lora_r = 4, lora_alpha = 8 }}
train = {{ max_steps = {STEPS}, save_steps = {10 * STEPS}, learning_rate = 1e-4 }}
"""


def _write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
