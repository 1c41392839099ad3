//! The software platform for TDs, with more room than the default one.

use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use soft_tdx_module::{Platform, PlatformBuilder, Range, Tdmr};

const GIB: u64 = 1 << 30;

/// Memory that the program's TDs share, with their tables and control pages. This system gives what they use of it.
const TDX_MEMORY: u64 = 8 * GIB;

/// Operations of a guest between two looks at whether it has to stop, as many as on the default platform.
const STEPS_PER_ENTRY: u32 = 1 << 14;

/// A machine with room for a fleet of TDs.
pub(crate) fn intel() -> SimHost {
    SimHost::builder(Vendor::Intel)
        .tdx(tdx(TDX_MEMORY).guest_steps_per_entry(STEPS_PER_ENTRY))
        .build()
        .unwrap_or_else(|error| {
            tracing::error!(%error, "the platform has the default size");
            SimHost::new(Vendor::Intel)
        })
}

/// A TDX module with so much memory for TDs, in whole GiB.
pub(crate) fn tdx(memory: u64) -> PlatformBuilder {
    let pamt = GIB + memory;
    Platform::builder()
        .memory(pamt + 2 * GIB)
        .cmrs([Range::new(GIB, memory + 2 * GIB)])
        .tdmrs([Tdmr::with_pamt_at(Range::new(GIB, memory), pamt)])
}
