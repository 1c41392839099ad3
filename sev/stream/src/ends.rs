//! The two ends of a migration: what the protocol asks of a guest's source and of its target.

use kvm_ops::{Gfn, Result, Tech, VcpuId};

use crate::layout::{FrameSet, Layout};
use crate::packet::{Packet, PlatformCerts, SessionStart};

/// What a target must know before it takes a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// SEV or SEV-ES.
    pub tech: Tech,
    /// The firmware policy.
    pub policy: u32,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// Where it has memory.
    pub layout: Layout,
}

/// What a frame holds, with the packet filled accordingly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameContent {
    /// Private memory: the packet holds it under the transport key.
    Private,
    /// Shared memory: the packet's data is the page, its header is not used.
    Shared,
    /// Nothing.
    Absent,
}

/// What the state of a vCPU travels as, with the packet filled accordingly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuContent {
    /// Registers that the host may see: that many bytes of the packet's data.
    Clear(usize),
    /// A VMSA under the transport key.
    Vmsa,
}

/// The end that a guest leaves.
///
/// The calls come in the order of the protocol, from one thread. Errors of
/// [`frame`](Self::frame) and later ones leave the session as it was.
pub trait MigrateSource {
    /// What the target must know.
    ///
    /// # Errors
    /// Where the guest cannot be sent at all.
    fn shape(&self) -> Result<Shape>;

    /// Begins to send (SEND_START). The guest runs on.
    ///
    /// # Errors
    /// What firmware answers; nothing changed.
    fn send_start(&mut self, target: &PlatformCerts) -> Result<SessionStart>;

    /// Packs a frame (SEND_UPDATE_DATA where it is private).
    ///
    /// # Errors
    /// What firmware answers.
    fn frame(&mut self, gfn: Gfn, packet: &mut Packet) -> Result<FrameContent>;

    /// Packs the state of a vCPU (SEND_UPDATE_VMSA for SEV-ES). The guest is stopped.
    ///
    /// # Errors
    /// What firmware answers.
    fn vcpu(&mut self, vcpu: VcpuId, packet: &mut Packet) -> Result<VcpuContent>;

    /// Adds the frames that changed since the last call, or since [`send_start`](Self::send_start):
    /// written, made private or shared, gone. `false` where the source cannot tell; the guest is
    /// stopped before the first page then.
    ///
    /// # Errors
    /// What the platform answers.
    fn take_dirty(&mut self, frames: &mut FrameSet) -> Result<bool>;

    /// Stops the guest. When it returns, no vCPU writes memory any more.
    ///
    /// # Errors
    /// Where that cannot be done; the guest runs on.
    fn stop(&mut self) -> Result<()>;

    /// Lets a stopped guest run on.
    fn go_on(&mut self);

    /// Gives the guest up for good (SEND_FINISH).
    ///
    /// # Errors
    /// What firmware answers; the guest is still the source's.
    fn send_finish(&mut self) -> Result<()>;

    /// Ends sending; the guest stays (SEND_CANCEL).
    ///
    /// # Errors
    /// What firmware answers.
    fn send_cancel(&mut self) -> Result<()>;
}

/// The end that takes a guest.
pub trait MigrateTarget {
    /// What a sender must know of this platform (PDH_CERT_EXPORT), the vendor's certificates
    /// included.
    ///
    /// # Errors
    /// What firmware answers.
    fn certs(&mut self) -> Result<PlatformCerts>;

    /// Whether a guest of this shape fits.
    ///
    /// # Errors
    /// Why it does not.
    fn accept(&mut self, shape: &Shape) -> Result<()>;

    /// Creates the guest's context and binds it to an ASID (RECEIVE_START, ACTIVATE).
    ///
    /// # Errors
    /// What firmware answers; nothing is left behind.
    fn receive_start(&mut self, start: &SessionStart) -> Result<()>;

    /// Puts a private page into place (RECEIVE_UPDATE_DATA).
    ///
    /// # Errors
    /// What firmware answers; the frame is as it was, or holds nothing.
    fn receive_private(&mut self, gfn: Gfn, packet: &Packet) -> Result<()>;

    /// Puts a shared page into place; `None` is a page of zeros.
    ///
    /// # Errors
    /// What the VM answers.
    fn receive_shared(&mut self, gfn: Gfn, page: Option<&[u8; 4096]>) -> Result<()>;

    /// A frame that holds nothing any more.
    ///
    /// # Errors
    /// What the VM answers.
    fn receive_absent(&mut self, gfn: Gfn) -> Result<()>;

    /// The state of a vCPU (RECEIVE_UPDATE_VMSA for SEV-ES).
    ///
    /// # Errors
    /// What firmware answers.
    fn receive_vcpu(&mut self, vcpu: VcpuId, content: VcpuContent, packet: &Packet) -> Result<()>;

    /// Everything is there (RECEIVE_FINISH). The guest may not run yet.
    ///
    /// # Errors
    /// What firmware answers; receiving goes on.
    fn receive_finish(&mut self) -> Result<()>;

    /// The guest is this end's now and may run. Never refused: nothing that can fail is left to do.
    fn own(&mut self);

    /// Gives up what was received (DEACTIVATE, DECOMMISSION), so that another guest can come.
    ///
    /// # Errors
    /// What firmware answers; what it keeps is leaked and on the VM's account.
    fn abandon(&mut self) -> Result<()>;
}
