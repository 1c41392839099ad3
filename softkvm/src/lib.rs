#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod arg;
mod file;
mod kernel;
mod machine;
mod process;
mod refusal;
mod sev;
mod system;
mod task;
mod tdx;
mod vcpu;
mod vm;

pub use file::{File, FileKind};
pub use kernel::Kernel;
pub use process::{AddressSpace, Descriptor, Fault, FileMemory, Process, RunArea};
pub use refusal::Refusal;
pub use task::Task;
