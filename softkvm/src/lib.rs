#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod arg;
mod file;
mod inject;
mod irq;
mod kernel;
mod machine;
mod process;
mod psp;
mod refusal;
mod sev;
mod stats;
mod system;
mod tape;
mod task;
mod task_event;
mod tdx;
mod vcpu;
mod vm;

pub use file::{File, FileKind};
pub use inject::{Faults, FaultsError};
pub use kernel::Kernel;
pub use process::{
    AddressSpace, Descriptor, EventFd, Fault, FileMemory, PinLimits, Process, RunArea, Watch,
};
pub use refusal::Refusal;
pub use tape::{Device, Mismatch, Player, RecordError};
pub use task::Task;
