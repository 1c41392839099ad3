//! What a fleet file says of a VM.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use kvm_ops::{Irqchip, Kind};
use kvm_ops_machine::ImageFormat;

use crate::args::HostChoice;
use crate::guests::Guest;

use super::expect::Expect;
use super::problem::At;

/// What a VM runs.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// A guest of this program, as machine code or as a guest program.
    BuiltIn(&'static Guest),
    /// An image, which needs a processor.
    Image {
        /// The file.
        path: At<PathBuf>,
        /// What it is; detected unless stated.
        format: Option<ImageFormat>,
        /// Its interrupt controllers; as the format wants them unless stated.
        irqchip: Option<Irqchip>,
        /// The kernel's command line.
        cmdline: Option<String>,
        /// The initial RAM disk.
        initrd: Option<At<PathBuf>>,
    },
}

/// One `[[vm]]` of a fleet file.
#[derive(Clone, Debug)]
pub(crate) struct VmSpec {
    /// Its name; with a count above 1, a number is added.
    pub(crate) name: At<String>,
    /// How many VMs like this.
    pub(crate) count: u32,
    /// Which kind of VM.
    pub(crate) kind: At<Kind>,
    /// Where it runs.
    pub(crate) host: HostChoice,
    /// How many vCPUs.
    pub(crate) vcpus: u32,
    /// Bytes of memory.
    pub(crate) memory: u64,
    /// What it runs.
    pub(crate) work: Work,
    /// How long it may take.
    pub(crate) timeout: Duration,
    /// What must come of it.
    pub(crate) expect: Expect,
    /// Whether it is left out where no host can hold it.
    pub(crate) optional: bool,
    /// Where it stands.
    pub(crate) span: Range<usize>,
}

impl VmSpec {
    /// The names of its VMs.
    pub(crate) fn names(&self) -> impl Iterator<Item = String> + '_ {
        copies(&self.name.value, self.count)
    }
}

/// The names of that many VMs of a name.
pub(super) fn copies(name: &str, count: u32) -> impl Iterator<Item = String> + '_ {
    (0..count).map(move |i| match count {
        1 => name.to_owned(),
        _ => format!("{name}-{i}"),
    })
}
