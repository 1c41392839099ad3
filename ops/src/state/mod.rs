//! Register state of a vCPU in the groups that KVM has, in neutral types: this crate needs no KVM
//! headers.

mod cpuid;
mod debug;
mod events;
mod mp_state;
mod msr;
mod regs;
mod segment;
mod sregs;
mod td_vcpu;
mod xsave;

pub use cpuid::CpuidEntry;
pub use debug::{DebugRegs, GuestDebug};
pub use events::{Delivery, Events, Exception, Interrupt, InterruptShadow, Nmi, Smi};
pub use mp_state::MpState;
pub use msr::{Msr, Xcrs};
pub use regs::{Regs, rflags};
pub use segment::{CodeSize, DescTable, Segment, SegmentName};
pub use sregs::{Sregs, cr0, cr4};
pub use td_vcpu::{TdApic, TdVcpuState};
pub use xsave::Xsave;
