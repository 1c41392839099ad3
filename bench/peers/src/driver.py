"""Computes a launch digest for each line of the standard input: mode, image, vCPUs, signature.

Answers with the nanoseconds that it took by the clock and of processor time, the image's file read
included, and the digest.
"""

import sys
import time

from sevsnpmeasure import guest
from sevsnpmeasure.sev_mode import SevMode

for line in sys.stdin:
    mode, image, vcpus, signature = line.split()
    start, cpu = time.perf_counter_ns(), time.process_time_ns()
    digest = guest.calc_launch_digest(
        SevMode.from_str(mode), int(vcpus), int(signature), image, "", "", "", 1
    )
    end, cpu_end = time.perf_counter_ns(), time.process_time_ns()
    print(end - start, cpu_end - cpu, digest.hex(), flush=True)
