//! Records of whole runs: what a program asks of the kernel and gets, as text, and players that serve programs from them.

mod canon;
mod compare;
mod fields;
mod format;
mod memory;
mod order;
mod parse;
mod places;
mod play;
mod record;
mod serve;
mod traced;
mod turns;

pub use format::{Device, RecordError};
pub(crate) use play::Played;
pub use play::{Mismatch, Player};
pub(crate) use record::Recorder;

use format::{Machine, Vendor};

/// A recorder for a machine of a vendor, which answers CPUID leaf 0x8000001f so.
pub(crate) fn recorder(
    vendor: kvm_ops::Vendor,
    encryption: [u32; 4],
    out: Box<dyn std::io::Write + Send>,
) -> std::io::Result<Recorder> {
    let vendor = match vendor {
        kvm_ops::Vendor::Intel => Vendor::Intel,
        _ => Vendor::Amd,
    };
    Recorder::new(Machine { vendor, encryption }, out)
}
