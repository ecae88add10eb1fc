"""Writes what ptxas says about each kernel into csrc/<family>/README.md; fails on a warning or a register spill.

    python .ci/kernel_resources.py BUILD_LOG

The log is that of a full build with `-Xptxas -v`. The table goes between the two markers below.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

BEGIN, END = "<!-- kernel resources: begin -->", "<!-- kernel resources: end -->"
SOURCE = re.compile(r"^\[\d+/\d+\] .*nvcc .* -c \S*/(csrc/(\w+)/\w+\.cu) ")
KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
FUNCTION = re.compile(r"Function properties for (\w+)")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
WARNING = re.compile(r"(ptxas|nvlink|nvcc) *warning|: warning[ #:]|warning #\d+")


def demangle(names):
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(names, map(short, plain), strict=True))


def short(signature):
    """`void fastnuggets::cuda::f<float, 3>(float*, int)` is `f<float, 3>`."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", signature.removeprefix("void ")).replace(" >", ">")
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def parse(log):
    """(family, kernel, architecture) -> registers, static shared memory and stack in bytes; and what is wrong."""
    table, faults = {}, [line for line in log.splitlines() if WARNING.search(line)]
    family = key = function = None
    for line in log.splitlines():
        if match := SOURCE.search(line):
            family = match[2]
        elif match := KERNEL.search(line):
            key = (family, match[1], match[2])
        elif match := FUNCTION.search(line):
            function = match[1]
        elif match := FRAME.search(line):
            if function == key[1]:
                table[key] = {"stack": int(match[1])}
            if spilled := int(match[2]) + int(match[3]):
                faults.append(f"{function} on {key[2]} spills {spilled} bytes")
        elif match := USED.search(line):
            shared = SHARED.search(line)
            table[key] |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    return table, faults


def render(rows):
    """One row a kernel, one column an architecture."""
    names = demangle(sorted({kernel for kernel, _ in rows}))
    archs = sorted({arch for _, arch in rows}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    lines = [
        "| kernel | " + " | ".join(archs) + " |",
        "| --- |" + " ---: |" * len(archs),
    ]
    for kernel, name in sorted(names.items(), key=lambda item: item[1]):
        cells = [rows[kernel, arch] for arch in archs]
        lines.append(
            f"| `{name}` | " + " | ".join(f"{c['registers']} / {c['shared']} / {c['stack']}" for c in cells) + " |"
        )
    return "\n".join(lines)


def write(readme, table, compiler):
    text = readme.read_text() if readme.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{readme}: expected the lines {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    caption = f"Registers a thread / static shared memory a block / stack a thread (bytes), {compiler}; no spills."
    readme.write_text(f"{before}{BEGIN}\n{caption}\n\n{table}\n{END}{after}")


def nvcc_version(log):
    nvcc = re.search(r"^\[\d+/\d+\] (\S*nvcc) ", log, re.MULTILINE)[1]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"V([\d.]+)", version)[1]


def main():
    log = Path(sys.argv[1]).read_text()
    table, faults = parse(log)
    if not table:
        sys.exit("no kernel in the log: was this a full build with -Xptxas -v?")
    if faults:
        sys.exit("\n".join(faults))
    families = defaultdict(dict)
    for (family, kernel, arch), row in table.items():
        families[family][kernel, arch] = row
    for family, rows in families.items():
        write(Path("csrc", family, "README.md"), render(rows), nvcc_version(log))


if __name__ == "__main__":
    main()
