"""The fault harness for as long as asked: `python tests/faults/soak.py --seconds 600`.

Rounds of: real processes killed at random moments; forks killed between two file operations;
damaged saves; disks that are too small; the whole corpus of malformed inputs, as functions and a
share of it as processes. Every outcome is compared with an uninterrupted run. Prints counts; ends
with code 1 at the first failure, with the seed that repeats its round.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import fault_inputs
import fault_inputs_more
import torch
from fault_commands import COMMANDS, ROOT, Command, differing, results
from fault_corpus import Case, judge, listing, problem, restore
from fault_kills import OUTPUT, Changes, Forked, preload, spawn, survive_kills, uninterrupted
from fault_saves import finish, recover_damaged, survive_small_disk

torch.set_num_threads(1)
GROUPS = (
    fault_inputs.train_cases,
    fault_inputs.hugging_face_cases,
    fault_inputs.evaluation_cases,
    fault_inputs.target_cases,
    fault_inputs_more.validate_cases,
    fault_inputs_more.distill_cases,
    fault_inputs_more.synthetic_cases,
    fault_inputs_more.prepare_cases,
)
# Commands that save as they go; the others keep finished cells or start again.
SAVING = ("train.py", "krr_st.target", "krr_st.kd_teacher", "main.py DM", "main.py DC")
SLOW = ("krr_st.tables",)  # a minute a run: killed as a process now and then
SHARE, PROCESSES = 0.05, 2  # malformed inputs of a round; of them given to real processes


@dataclass
class Whole:
    """What an uninterrupted run of a command gives, and how long it takes."""

    results: dict
    changes: int
    seconds: float


class Soak:
    """The counts, and the folder that everything happens in.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.counts, self.whole = folder, Counter(), {}
        self.refused: set[tuple[str, ...]] = set()
        (folder / "good").mkdir()
        fault_inputs.write_template(folder / "good")
        shutil.copytree(folder / "good", folder / "work", symlinks=True)

    def of(self, command: Command) -> Whole:
        """The uninterrupted run, made once."""
        if command.name not in self.whole:
            place = Path(tempfile.mkdtemp(dir=self.folder))
            self.whole[command.name] = Whole(*uninterrupted(command, place))
            shutil.rmtree(place)
        return self.whole[command.name]

    def round(self, rng: random.Random) -> None:
        """A little of everything.

        Raises:
            AssertionError: something was lost.
        """
        names = [n for n in COMMANDS if n not in SLOW] + list(SLOW) * (rng.random() < 1 / 8)
        self.kill_processes(COMMANDS[rng.choice(names)], rng)
        for name in rng.sample([n for n in COMMANDS if n not in SLOW], 6):
            self.kill_forks(COMMANDS[name], rng)
        for name in rng.sample(SAVING, 2):
            command, whole = COMMANDS[name], self.of(COMMANDS[name])
            with tempfile.TemporaryDirectory(dir=self.folder) as place:
                recover_damaged(command, Path(place), whole.changes, whole.results, rng)
            self.counts["saves damaged and recovered"] += 1
            self.counts[f"kills survived: {name}"] += 1
        name = rng.choice(SAVING)
        command, whole = COMMANDS[name], self.of(COMMANDS[name])
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            survive_small_disk(command, Path(place), whole.changes, whole.results, rng)
        self.counts["full disks survived"] += 1
        self.counts[f"kills survived: {name}"] += 1
        self.refuse(rng)

    def kill_processes(self, command: Command, rng: random.Random) -> None:
        """Real processes, killed at random moments until the run is through."""
        whole = self.of(command)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            folder = Path(place)
            command.prepare(folder)
            hit = survive_kills(
                lambda: spawn(command, folder), folder / OUTPUT, rng.randint(2, 5), rng, 3 + whole.seconds / 2
            )
            self.compare(command, folder)
        self.counts[f"kills survived: {command.name}"] += hit
        self.counts["of them real processes"] += hit

    def kill_forks(self, command: Command, rng: random.Random) -> None:
        """Forks, killed before a file operation, up to four times in a row."""
        whole = self.of(command)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            folder = Path(place)
            command.prepare(folder)
            for _ in range(4):
                code = Forked(command, folder, Changes(rng.randint(1, whole.changes))).wait()
                assert code in (-9, 0), f"{command.name}: {(folder / OUTPUT).read_text()[-1500:]}"
                if code == 0:
                    break
                self.counts[f"kills survived: {command.name}"] += 1
            finish(command, folder, whole.results, "killed before file operations")
            self.compare(command, folder)

    def compare(self, command: Command, folder: Path) -> None:
        """Count what is lost, and what killed processes left lying about."""
        lost = differing(self.of(command).results, results(command, folder))
        assert not lost, f"{command.name}: {lost} differ"
        left = [p for p in folder.rglob(".*") if p.is_file() and p.name != OUTPUT]
        self.counts["bytes of temporary files left"] += sum(p.stat().st_size for p in left)

    def refuse(self, rng: random.Random) -> None:
        """The whole corpus in this process at first, then a share; a few in their own processes."""
        cases = [case for group in GROUPS for case in group()]
        if self.refused:
            cases = rng.sample(cases, int(SHARE * len(cases)))
        for case in cases:
            wrong = problem(case, self.folder / "good", self.folder / "work")
            assert wrong is None, f"{case}: {wrong}"
            self.refused.add(case.identity)
        self.counts["malformed inputs refused"] += len(cases)
        for case in rng.sample(cases, PROCESSES):
            wrong = self.as_process(case)
            assert wrong is None, f"as a process, {case}: {wrong}"
            self.counts["malformed inputs refused by processes"] += 1

    def as_process(self, case: Case) -> str | None:
        """Like `problem`, as a user would start it."""
        good, work = self.folder / "good", self.folder / "work"
        try:
            expected = list(case.words)
            if case.path is not None:
                (path,) = work.glob(case.path)
                before = Path.cwd()
                os.chdir(work)  # links and payloads are relative
                case.damage(path.relative_to(work))
                os.chdir(before)
                expected = expected or [path.name]
            files = listing(work)
            line = Command(str(case), case.script, case.flags, (), lambda folder: None).line
            done = subprocess.run(
                [word.replace("␣", " ") for word in line],
                cwd=work,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            now = listing(work)
            changed = [name for name in {*files, *now} if files.get(name) != now.get(name)]
            lines = [text for text in done.stderr.splitlines() if text.strip()]
            return judge(done.returncode, lines, expected, changed)
        finally:
            restore(good, work)

    def report(self) -> str:
        """The counts, one a line."""
        kills = sum(n for name, n in self.counts.items() if name.startswith("kills survived"))
        lines = [f"{name}: {count}" for name, count in sorted(self.counts.items())]
        lines += [
            f"distinct malformed inputs: {len(self.refused)}",
            f"kills survived in all: {kills}",
            "bytes of results lost: 0",
        ]
        return "\n".join(lines)


def main() -> int:
    """Run rounds until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="no round begins after these")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; then it counts on")
    flags = parser.parse_args()
    end = time.monotonic() + flags.seconds
    for command in COMMANDS.values():
        preload(command)
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        soak, seed = Soak(Path(folder)), flags.seed
        while time.monotonic() < end:
            try:
                soak.round(random.Random(seed))
            except AssertionError as error:
                print(f"{soak.report()}\n\nFAILED: {error}\nrepeat it with --seed {seed}")
                return 1
            seed += 1
            kills = sum(n for k, n in soak.counts.items() if k.startswith("kills survived"))
            print(f"round {seed - flags.seed}: {kills} kills survived so far", flush=True)
        print(f"{soak.report()}\nrounds: {seed - flags.seed}, seeds {flags.seed} to {seed - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
