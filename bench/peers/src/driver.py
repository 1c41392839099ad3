"""Computes a launch digest for each line of the standard input: mode, image, vCPUs, signature.

Answers with the nanoseconds of processor time that it took, the image's file read included, and the digest.
"""

import sys
import time

from sevsnpmeasure import guest
from sevsnpmeasure.sev_mode import SevMode

for line in sys.stdin:
    mode, image, vcpus, signature = line.split()
    start = time.thread_time_ns()
    digest = guest.calc_launch_digest(
        SevMode.from_str(mode), int(vcpus), int(signature), image, "", "", "", 1
    )
    print(time.thread_time_ns() - start, digest.hex(), flush=True)
