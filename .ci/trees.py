#!/usr/bin/env python3
"""Holds `cargo tree` against tests/outside/crates.txt: .ci/trees.py CRATES.txt

Runs in a workspace that has kvm-ops and the other packages as members. A build may hold the crates
on its list and no other, on any target that is asked for.
"""

import subprocess
import sys
from itertools import combinations

TECHNOLOGIES = ["vmx", "tdx", "svm", "sev"]
TARGET = "x86_64-unknown-none"


def lists(path):
    sets = {}
    for line in open(path):
        name, colon, crates = line.partition(":")
        if colon and not line.startswith("#"):
            sets.setdefault(name, set()).update(crates.split())
    return sets


def tree(package, *features):
    command = ["cargo", "tree", "--quiet", "--package", package, "--edges", "normal", "--prefix", "none",
               "--format", "{lib}", "--target", TARGET, *features]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.removesuffix(" (*)") for line in lines if line}


def main():
    sets = lists(sys.argv[1])
    failures = []

    def check(what, found, allowed, own):
        failures.extend(f"{what}: {crate} is not on the list" for crate in sorted(found - allowed))
        if own not in found:
            failures.append(f"{what}: {own} is missing, so this is not its tree")

    checked = 0
    for size in range(1, len(TECHNOLOGIES) + 1):
        for chosen in combinations(TECHNOLOGIES, size):
            allowed = sets["kvm-ops"].union(*(sets[name] for name in chosen))
            found = tree("kvm-ops", "--no-default-features", "--features", ",".join(chosen))
            check(",".join(chosen), found, allowed, f"kvm_ops_{chosen[0]}")
            checked += 1
    for package in sorted(set(sets) - {"kvm-ops", *TECHNOLOGIES}):
        check(package, tree(package), sets[package], package.replace("-", "_"))
        checked += 1
    print("\n".join(failures) or f"{checked} trees hold the crates on their list and no other")
    sys.exit(bool(failures))


main()
