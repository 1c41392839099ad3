//! An SNP guest goes to another host over a byte stream.
//!
//! ```text
//!  source                                         target
//!    | Hello: session, vCPUs, memory ------------->|   fits? else Refuse
//!    |<----------------- Ready: state, challenge |
//!    | depart: the guest is stopped                |
//!    | Image ..., ImageEnd, Page ... ------------->|   into the store
//!    | Prepare ----------------------------------->|   all came? arrive
//!    |<-------------------------------- Prepared |   everything is there; the guest may not run
//!    | hand_off: the guest never runs here again   |
//!    | Commit ------------------------------------>|   resume: the guest runs
//!    |<------------------------------------ Done |
//! ```
//!
//! The two migration agents have judged each other before, over a channel of their own, and agreed on the key of the
//! frames: so nobody between the hosts can say Commit in the source's name. The pages are firmware's, who checks each by the
//! context. The context is sealed by one agent for the other, inside of the image.
//!
//! `hand_off` is the only point of no return, and Commit is sent after it alone. A target without it never runs the guest.

mod frames;
mod receiver;
mod sender;

pub use receiver::SnpReceiver;
pub use sender::SnpSender;

use alloc::vec::Vec;

use kvm_ops::{Host, PAGE_SIZE, Result};
use kvm_ops_wire::Layout;

use super::outgoing::layout;
use crate::SevVm;

/// The most bytes of the image in one record.
const PART: usize = 1 << 20;
/// Pages between two calls of the watcher.
const PAGES_BETWEEN_REPORTS: u64 = 64;

type SessionId = [u8; 16];

/// Number of vCPUs and memory, as both ends must have them.
fn shape<H: Host>(vm: &SevVm<H>) -> Result<(u32, Layout)> {
    let vcpus = vm.shared.all_cells().len() as u32;
    Ok((vcpus, layout(vm.shared.memory().slots.iter())?))
}

/// The most bytes of an image: the slots of a guest that had each frame out four times, and four pages for the rest.
fn image_limit(vcpus: u32, memory: &Layout) -> u64 {
    const SLOT: u64 = 9;
    let slots = 4 * (memory.frames() + u64::from(vcpus));
    slots * SLOT + 4 * PAGE_SIZE
}

/// The payload of Hello behind session and link: vCPUs (4), memory.
fn encode_shape(vcpus: u32, memory: &Layout) -> Vec<u8> {
    let mut out = Vec::from(vcpus.to_le_bytes());
    memory.encode(&mut out);
    out
}
