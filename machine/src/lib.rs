//! A whole machine around a VM: guest memory, image loading, vCPU threads and devices.
//!
//! [`Machine::build`] takes a [`MachineConfig`] through the steps of a creation (VM, memory,
//! slots, image, vCPUs, registers) and undoes what it did when a step fails. [`Machine::run`]
//! gives each vCPU a thread and turns exits into calls of an [`ExitHandler`], such as [`Devices`],
//! until the guest is done, a [`RunLimits`] is reached or a [`Stopper`] is used.
//! [`Machine::destroy`] gives everything back and reports it.
//!
//! It runs on any [`Host`](kvm_ops::Host): images where vCPUs execute machine code, on `/dev/kvm` and
//! as normal VMs on a software platform, and guest programs on a software platform
//! ([`Host::runs`](kvm_ops::Host::runs)).
//!
//! Devices of the embedder reach memory, interrupts and events by [`Inside`], from the handler of exits and from
//! threads of their own ([`Machine::run_while`]). The memory may be the embedder's
//! ([`MachineConfig::guest_ram`]).
//!
//! Firmware finds a small [`Q35`] around it ([`Machine::q35`]). A kernel that no firmware starts gets **no ACPI tables**: it
//! finds the other vCPUs by an MP table, if it is built with `CONFIG_X86_MPPARSE`, and starts one vCPU otherwise. There
//! are **no network devices**, and disks of a Q35 only.
//!
//! ```
//! use std::time::Duration;
//!
//! use kvm_ops::guest::Script;
//! use kvm_ops::sim::SimHost;
//! use kvm_ops::{Gpa, Vendor};
//! use kvm_ops_machine::{ConsoleSink, End, Machine, MachineConfig, RunLimits};
//!
//! let program = Script::new().print(0x3f8, "hello").write(Gpa::new(0x1000), b"x").halt();
//! let config = MachineConfig::new().memory(1 << 20).program(program);
//! let mut machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
//!
//! let console = ConsoleSink::capture();
//! let devices = machine.devices(console.clone());
//! let limits = RunLimits::none().deadline(Duration::from_secs(10));
//! let report = machine.run(&devices, limits)?;
//! assert_eq!(report.end, End::Halted);
//! assert_eq!(console.text(), "hello");
//! assert!(machine.destroy().is_clean());
//! # Ok::<(), kvm_ops_machine::MachineError>(())
//! ```

mod config;
mod console;
mod convert;
mod cpus;
mod devices;
mod error;
mod file;
mod handler;
mod image;
mod inside;
mod launch;
mod layout;
mod life;
mod load;
mod memory;
mod position;
#[cfg(feature = "tdx")]
mod quoting;
mod recognize;
mod report;
mod run;
mod start;
mod stop;
mod traps;
mod walk;

pub use config::{MachineConfig, Payload};
pub use console::ConsoleSink;
pub use cpus::Cpus;
pub use devices::{Devices, Q35};
#[cfg(feature = "virtio")]
pub use devices::{Disk, DiskCounts};
pub use error::MachineError;
pub use file::read_file;
pub use handler::{ExitContext, ExitHandler, Flow, Inside};
pub use image::{Image, ImageFormat};
pub use inside::Parts;
pub use launch::{LaunchPage, LaunchStep};
pub use life::Machine;
#[cfg(feature = "vm-memory")]
pub use memory::Written;
pub use memory::{DeviceMemory, GuestRam, MemoryRegion, SharedFrames};
pub use position::{CodeMode, Position};
#[cfg(feature = "tdx")]
pub use quoting::{NoQuote, QuoteService, Quoting, TD_REPORT_LEN};
pub use recognize::{FileKind, Recognition};
pub use report::{End, ExitCounts, RunReport, VcpuReport};
pub use run::RunLimits;
pub use stop::Stopper;
pub use traps::Trap;

#[cfg(test)]
mod samples;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
