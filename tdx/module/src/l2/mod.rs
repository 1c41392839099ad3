//! L2 VMs: the virtual machines a partitioned TD runs inside itself.
//!
//! Each L2 VM has a separate Secure-EPT tree beside the TD's (L1's). A page of L1 that an L2 VM may use has an
//! *alias*: the entry of the same GPA and level in that VM's tree. Tables come from the host, aliases and their
//! attributes from L1. All changes to an alias happen with the lock of L1's entry held, so the trees need no
//! further locks.

pub(crate) mod alias;
mod attr;
pub(crate) mod exit_info;
pub(crate) mod guest_state;
pub(crate) mod preemption;
mod sept;
pub(crate) mod table;
pub(crate) mod translate;
mod view;
pub(crate) mod vmcs;

pub(crate) use attr::{Attributes, Packed};
pub use sept::L2SeptState;
pub(crate) use sept::{L2Content, L2Walked, free_tree, walk};
pub use view::L2SeptView;

/// The VM, L1 or L2, that runs when the host enters a vCPU that left the TD from an L2 VM (L2_EXIT_HOST_ROUTING).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Routing {
    /// The VM.
    None = 0,
    /// L1, as if the VM had exited to it.
    Asynchronous = 1,
    /// L1, after TDG.VP.VMCALL of the VM has completed.
    Vmcall = 2,
}

/// L2 VMs a TD can have.
pub(crate) const MAX_VMS: usize = 3;
/// A page operand that names no page.
pub(crate) const NO_PAGE: u64 = u64::MAX;
/// In a page operand: ignored on input, "not used" on output.
pub(crate) const PAGE_UNUSED: u64 = 1 << 63;
