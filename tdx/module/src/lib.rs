#![doc = include_str!("../README.md")]

mod arena;
mod builder;
mod call;
mod config;
mod dump;
mod faults;
mod guest;
mod kot;
mod l2;
mod leaf;
mod lock;
mod measure;
mod memory;
mod meta;
mod migrate;
mod native;
mod observe;
mod op_state;
mod pamt;
mod platform;
mod regs;
pub mod report;
mod sept;
mod servtd;
mod status;
mod td;
mod tdinfo;
mod vcpu;
mod virt;

#[cfg(feature = "conform")]
pub mod conform;

pub use builder::{BuildError, CallError, PlatformBuilder};
pub use config::{
    CpuidConfig, MAX_RESERVED_AREAS, NativeCpuid, PlatformConfig, Range, TDMR_INFO_SIZE, Tdmr,
};
pub use dump::{HkidView, LockTarget, MigrationView, PageView, SeptView, TdView, VcpuView};
pub use faults::{Fault, KeyEngineFault, pending};
pub use guest::{
    GuestEvent, GuestFlow, GuestOp, GuestPage, GuestProgram, Outcome, ProcessorState, Script,
    SegmentState, VirtualApic, VmExit,
};
pub use kot::HkidState;
pub use l2::{L2SeptState, L2SeptView};
pub use leaf::{GuestLeaf, HostLeaf};
pub use lock::LockMode;
pub use measure::Digest384;
pub use memory::{GuestFrame, GuestTurn, MemoryError};
pub use observe::{Counts, TraceEntry, TraceEvent};
pub use op_state::OpState;
pub use pamt::{PageSize, PageType};
pub use platform::{Flow, LpError, Platform, SysState};
pub use regs::{REGISTER_NAMES, Regs};
pub use sept::SeptState;
pub use status::{Code, Operand, Status};
pub use td::Lifecycle;
pub use vcpu::{Event, EventType, VcpuState};
pub use virt::answer::{CpuidAnswer, MsrAnswer};
pub use virt::msr::MsrAccess;
