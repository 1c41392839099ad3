#!/usr/bin/env python3
"""The published libraries of a workspace: cargo metadata | .ci/libraries.py [--plain | --system | --features]

--plain: those of which all features can be built anywhere; --system: those that have a feature for a
library of the system; --features: the other features of the latter, as cargo's --features takes them.
"""

import json
import sys

SYSTEM = {"openssl"}


def is_library(package):
    kinds = {kind for target in package["targets"] for kind in target["kind"]}
    # What comes from a registry is a dependency.
    return package["source"] is None and package["publish"] != [] and bool(kinds & {"lib", "proc-macro"})


packages = [package for package in json.load(sys.stdin)["packages"] if is_library(package)]
system = [package for package in packages if SYSTEM & set(package["features"])]
what = sys.argv[1:]
if what == ["--features"]:
    print(",".join(f"{p['name']}/{name}" for p in system for name in p["features"] if name not in SYSTEM))
else:
    chosen = system if what == ["--system"] else packages
    print("\n".join(p["name"] for p in chosen if what != ["--plain"] or p not in system))
