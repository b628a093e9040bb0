"""What became of the jobs of one command, in whichever process each ran, and its exit code."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.harness.files import replacing

if TYPE_CHECKING:
    from kvarena.harness.cells.plan import Plan
    from kvarena.harness.cells.run_cell import Outcome


@dataclass(frozen=True, kw_only=True)
class Failure:
    """code: 2 for bad input, 75 if another process writes the cell, 1 for anything else.

    text: what to print; its last line says it all.
    """

    code: int
    text: str


@dataclass
class JobOutcomes:
    """Jobs of this process add to it; jobs of other processes hand theirs over by a file.

    Not by what a launcher returns: of a launcher whose job was killed nothing comes back at all.
    """

    outcomes: "list[Outcome]" = field(default_factory=list)
    plans: "list[Plan]" = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    code_when_stopped: int = 0
    allow_partial: bool = False
    results_dir: Path = Path("results")

    @property
    def exit_code(self) -> int:
        """Bad input alone is 2 (75 if only locks were in the way), any failure makes it 1."""
        codes = {failure.code for failure in self.failures}
        if self.code_when_stopped:
            return self.code_when_stopped
        if 1 in codes or any(outcome.num_failed for outcome in self.outcomes):
            return 1
        return 2 if 2 in codes else max(codes, default=0)

    def fail(self, failure: Failure) -> None:
        """Told at once: a sweep goes on, and tells its exit code at its end."""
        self.failures.append(failure)
        print(failure.text, file=sys.stderr, flush=True)

    def hand_over(self, folder: Path, job: int) -> None:
        """Leave everything to the command's own process."""
        with replacing(folder / f"job-{job}.json") as path:
            path.write_text(json.dumps(asdict(self), default=_as_json))

    def collect(self, folder: Path) -> None:
        """Take in what jobs in other processes have left, and sum up their failures."""
        paths = sorted(folder.glob("job-*.json"))
        failures = []
        for path in paths:
            job = _read(path)
            path.unlink()
            self.outcomes += job.outcomes
            self.plans += job.plans
            failures += job.failures
            self.allow_partial, self.results_dir = job.allow_partial, job.results_dir
        if failures:
            # The whole text stands where the job ran: on this screen, or in the scheduler's logs.
            print(f"{len(failures)} of {len(paths)} jobs failed:", file=sys.stderr)
            lines = [failure.text.splitlines()[-1] for failure in failures]
            print("\n".join(f"  {line}" for line in dict.fromkeys(lines)), file=sys.stderr)
        self.failures += failures

    def show(self) -> None:
        """Tables and pictures of the cells of this command, or its plan."""
        # Imported here: torch takes seconds, and a typo should not wait for it.
        if self.plans:
            from kvarena.harness.command.plan_table import print_plans

            print_plans(self.plans)
        elif self.outcomes:
            from kvarena.harness.report.after_run import report

            wanted: dict[Path, frozenset[str]] = {}  # shards are jobs of their own in one cell
            for outcome in self.outcomes:
                if outcome.sample_ids:
                    before = wanted.get(outcome.path, frozenset())
                    wanted[outcome.path] = before | outcome.sample_ids
            written = report(wanted, self.results_dir, allow_partial=self.allow_partial)
            print("\nWritten:")
            for path in written:
                print(f"  {path}")


def _as_json(value: Any) -> Any:  # Any: what dataclasses of this command hold
    if isinstance(value, Path):
        return str(value)
    assert isinstance(value, frozenset), f"{type(value)} is in no outcome or plan"
    return sorted(value)


def _read(path: Path) -> JobOutcomes:
    # Imported here: torch takes seconds, and a typo should not wait for it.
    from kvarena.harness.cells.plan import Plan
    from kvarena.harness.cells.run_cell import Outcome

    parts = json.loads(path.read_text())
    outcomes = [
        Outcome(**{**part, "path": Path(part["path"]), "sample_ids": frozenset(part["sample_ids"])})
        for part in parts["outcomes"]
    ]
    plans = [Plan(**{**part, "path": Path(part["path"])}) for part in parts["plans"]]
    return JobOutcomes(
        outcomes=outcomes,
        plans=plans,
        failures=[Failure(**part) for part in parts["failures"]],
        allow_partial=parts["allow_partial"],
        results_dir=Path(parts["results_dir"]),
    )
