//! The software platform for TDs, with more room than the default one.

use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use soft_tdx_module::{PlatformBuilder, Range, Tdmr};

const GIB: u64 = 1 << 30;

/// Memory that the program's TDs share, with their tables and control pages. This system gives what they use of it.
const TDX_MEMORY: u64 = 8 * GIB;

/// A machine with room for a fleet of TDs; `threads` for vCPUs that execute at the same time.
pub(crate) fn intel(threads: bool) -> SimHost {
    let mut tdx = tdx(TDX_MEMORY);
    if threads {
        tdx = tdx.processors(processors());
    }
    SimHost::builder(Vendor::Intel)
        .parallel(threads)
        .tdx(tdx)
        .build_lazy()
}

/// Logical processors of TDs, in two packages: as many as this system has, as vCPUs without one wait. Each by its package.
fn processors() -> impl Iterator<Item = usize> {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    (0..all.max(4)).map(|n| n % 2)
}

/// The same with an AMD SP.
pub(crate) fn amd(threads: bool) -> SimHost {
    SimHost::builder(Vendor::Amd).parallel(threads).build_lazy()
}

/// A TDX module with so much memory for TDs, in whole GiB.
pub(crate) fn tdx(memory: u64) -> PlatformBuilder {
    let pamt = GIB + memory;
    SimHost::default_tdx()
        .memory(pamt + 2 * GIB)
        .cmrs([Range::new(GIB, memory + 2 * GIB)])
        .tdmrs([Tdmr::with_pamt_at(Range::new(GIB, memory), pamt)])
}
