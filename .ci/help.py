"""`make help`: the targets of the Makefile, and its variables with their values now.

The Makefile's name is the argument; values are in the environment as VALUE_<name>. Lines ##@ head a
group of targets, #= and #: are variables of the benchmarks and others, #> are examples.
"""

import os
import re
import signal
import sys
from pathlib import Path

HEAD = "kvarena: which KV-cache policy keeps a language model's answers under the same memory?"


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # make help | head: nobody reads on
    targets: list[str] = []
    examples: list[str] = []
    variables: dict[str, list[str]] = {"=": [], ":": []}
    for line in Path(sys.argv[1]).read_text().splitlines():
        if line.startswith("##@ "):
            targets.append(f"\n{line[4:]}:")
        elif found := re.match(r"([a-z0-9-]+):.* ## (.*)", line):
            targets.append(f"  make {found[1]:<19} {found[2]}")
        elif found := re.match(r"#(=) (\w+) +\S+ +(.*)|#(:) (\w+) +(.*)", line):
            kind, name, text = filter(None, found.groups())
            value = os.environ.get(f"VALUE_{name}") or "-"
            variables[kind].append(f"  {name:<14} {value:<10} {text}")
        elif line.startswith("#> "):
            examples.append(f"  {line[3:]}")
    print(HEAD, "", "make TARGET [VARIABLE=value ...]", *targets, sep="\n")
    print("", "Examples:", *examples, "", sep="\n")
    print("Variables of the benchmarks (name, value now, meaning). Commas compare several values.")
    print("Where the value is -, the default holds, see: .venv/bin/kvarena --help")
    print(*variables["="], "", "Other variables:", *variables[":"], sep="\n")
    print("", "Each run prints the kvarena command behind it.", sep="\n")


if __name__ == "__main__":
    main()
