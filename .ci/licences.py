#!/usr/bin/env python3
"""Holds the licence of every dependency against deny.toml: cargo metadata | .ci/licences.py deny.toml

What cargo-deny would do, for a machine that does not have it. Only licences and sources; advisories
need cargo-deny and its database.
"""

import json
import re
import sys
import tomllib


def accepted(expression, allow):
    """An SPDX expression: AND binds stronger than OR, `/` is an old form of OR, WITH names one licence."""
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def either():
        value = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            value = both() or value
        return value

    def both():
        value = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            value = one() and value
        return value

    def one():
        token = tokens.pop(0)
        if token == "(":
            value = either()
            tokens.pop(0)
            return value
        if tokens and tokens[0] == "WITH":
            token = f"{token} {tokens.pop(0)} {tokens.pop(0)}"
        return token in allow

    return either()


def main():
    with open(sys.argv[1], "rb") as file:
        config = tomllib.load(file)
    allow = set(config["licenses"]["allow"])
    exceptions = {entry["crate"]: set(entry["allow"]) for entry in config["licenses"]["exceptions"]}
    packages = json.load(sys.stdin)["packages"]
    failures = []
    for package in packages:
        name = f"{package['name']} {package['version']}"
        licence, source = package["license"], package["source"]
        if not licence:
            failures.append(f"{name} names no licence")
        elif not accepted(licence, allow | exceptions.get(package["name"], set())):
            failures.append(f"{name}: {licence} is not allowed")
        if source and not source.startswith("registry+https://github.com/rust-lang/crates.io-index"):
            failures.append(f"{name} comes from {source}")
    print("\n".join(failures) or f"{len(packages)} packages under licences that deny.toml allows, from crates.io")
    sys.exit(bool(failures))


main()
