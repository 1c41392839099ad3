//! The two ends of a migration, as the protocol reaches them: the guest's source and its target.
//!
//! Errors are those of the VM, its platform, or the firmware. An error leaves an end as it was, unless
//! the method says otherwise.

use kvm_ops::{Gfn, Result, Tech, VcpuId};

use crate::packet::{PAGE, Packet, PlatformCerts, SessionStart};
use kvm_ops_wire::{FrameSet, Layout};

/// The facts on which a target accepts or refuses a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// SEV or SEV-ES.
    pub tech: Tech,
    /// The firmware policy.
    pub policy: u32,
    /// The number of vCPUs.
    pub vcpus: u32,
    /// The guest's memory.
    pub layout: Layout,
}

/// The contents of a frame, with the packet filled accordingly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameContent {
    /// Private memory: the packet holds it under the transport key.
    Private,
    /// Shared memory: the packet's data is the page, its header is not used.
    Shared,
    /// Nothing.
    Absent,
}

/// The form of a vCPU's state, with the packet filled accordingly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuContent {
    /// Registers that the host may see: that many bytes of the packet's data.
    Clear(usize),
    /// A VMSA under the transport key.
    Vmsa,
}

/// The end that a guest leaves.
///
/// The calls come in the order of the protocol, from one thread. A failed [`frame`](Self::frame) or
/// later call leaves the session as it was.
#[allow(clippy::missing_errors_doc)] // The module says it once.
pub trait MigrateSource {
    /// The shape of the guest. An error means that it cannot be sent at all.
    fn shape(&self) -> Result<Shape>;

    /// Begins to send (SEND_START). The guest runs on.
    fn send_start(&mut self, target: &PlatformCerts) -> Result<SessionStart>;

    /// Packs a frame (SEND_UPDATE_DATA if it is private).
    fn frame(&mut self, gfn: Gfn, packet: &mut Packet) -> Result<FrameContent>;

    /// Packs the state of a vCPU (SEND_UPDATE_VMSA for SEV-ES). The guest is stopped.
    fn vcpu(&mut self, vcpu: VcpuId, packet: &mut Packet) -> Result<VcpuContent>;

    /// Adds the frames that changed since the last call, or since [`send_start`](Self::send_start):
    /// written, made private or shared, gone. Returns `false` for a source that does not know; the
    /// guest is then stopped before the first page.
    fn take_dirty(&mut self, frames: &mut FrameSet) -> Result<bool>;

    /// Stops the guest. After the call no vCPU writes memory. On an error the guest runs on.
    fn stop(&mut self) -> Result<()>;

    /// Lets a stopped guest run on.
    fn go_on(&mut self);

    /// Gives the guest up for good (SEND_FINISH). On an error it is still the source's.
    fn send_finish(&mut self) -> Result<()>;

    /// Ends sending; the guest stays (SEND_CANCEL).
    fn send_cancel(&mut self) -> Result<()>;
}

/// The end that takes a guest.
#[allow(clippy::missing_errors_doc)] // The module says it once.
pub trait MigrateTarget {
    /// The certificates of this platform (PDH_CERT_EXPORT), with the vendor's.
    fn certs(&mut self) -> Result<PlatformCerts>;

    /// Succeeds if a guest of this shape fits.
    fn accept(&mut self, shape: &Shape) -> Result<()>;

    /// Creates the guest's context and binds it to an ASID (RECEIVE_START, ACTIVATE).
    fn receive_start(&mut self, start: &SessionStart) -> Result<()>;

    /// Puts a private page into place (RECEIVE_UPDATE_DATA). On an error the frame is as it was, or
    /// empty.
    fn receive_private(&mut self, gfn: Gfn, packet: &Packet) -> Result<()>;

    /// Puts a shared page into place; `None` is a page of zeros.
    fn receive_shared(&mut self, gfn: Gfn, page: Option<&[u8; PAGE]>) -> Result<()>;

    /// Empties a frame.
    fn receive_absent(&mut self, gfn: Gfn) -> Result<()>;

    /// Takes the state of a vCPU (RECEIVE_UPDATE_VMSA for SEV-ES).
    fn receive_vcpu(&mut self, vcpu: VcpuId, content: VcpuContent, packet: &Packet) -> Result<()>;

    /// Ends receiving (RECEIVE_FINISH). The guest is complete, and may not run yet.
    fn receive_finish(&mut self) -> Result<()>;

    /// Makes the guest this end's, which may run it. It cannot fail.
    fn own(&mut self);

    /// Gives up everything received (DEACTIVATE, DECOMMISSION), so that another guest can come.
    /// Things that firmware keeps are leaked, and listed on the VM's account.
    fn abandon(&mut self) -> Result<()>;
}
