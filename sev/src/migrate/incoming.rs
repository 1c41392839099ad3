//! A VM as the end that takes a guest.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use kvm_ops::{Error, Field, Gfn, Host, PspPort, Result, Step, Tech, VcpuId};
use kvm_ops_sev_stream::{MigrateTarget, Packet, PlatformCerts, SessionStart, Shape, VcpuContent};

use super::group::Role;
use super::mailbox::{Mailbox, PacketOf};
use super::transfer::unfit;
use crate::SevVm;
use crate::cell::VmsaPage;
use crate::context::GuestState;
use crate::shared::Shared;
use kvm_ops::moves::Claimed;

/// Writes a vCPU's registers as the other end's [`RegisterReader`](super::RegisterReader) read
/// them. They come from the peer: nothing about them is checked yet.
pub type RegisterWriter<'a> = Box<dyn FnMut(VcpuId, &[u8]) -> Result<()> + Send + 'a>;

const ZEROS: [u8; 4096] = [0; 4096];
/// Policy bit: the guest needs SEV-ES.
const POLICY_ES: u32 = 1 << 2;

/// A VM that waits for a guest. It is initialised, has the guest's slots and vCPUs, and its own
/// launch has not begun.
///
/// Dropped before the guest is its own, it gives up what came.
pub struct Incoming<'a, H: Host> {
    shared: &'a Arc<Shared<H>>,
    mailbox: Mailbox<'a, H>,
    vendor: Vec<u8>,
    registers: RegisterWriter<'a>,
    receiving: bool,
    /// Keeps other sessions and moves away.
    _session: Claimed<'a>,
}

impl<H: Host> SevVm<H> {
    /// Makes the VM one that a [`Receiver`](super::Receiver) can fill. `vendor` are the vendor's
    /// certificates of this platform (ASK, then ARK), which firmware does not hold; `registers`
    /// takes the registers of a plain SEV guest's vCPUs.
    ///
    /// # Errors
    /// Unsupported for SNP; [`Error::WrongState`] for a VM that is not initialised, or whose launch
    /// has begun; [`Error::Invalid`] for a mirror; [`Error::Busy`] while another session
    /// or move is under way; [`Error::NoMemory`].
    pub fn incoming<'a>(
        &'a self,
        vendor: Vec<u8>,
        registers: RegisterWriter<'a>,
    ) -> Result<Incoming<'a, H>> {
        let shared = &self.shared;
        if shared.tech() == Tech::SevSnp {
            return kvm_ops::not_offered!("receiving an SNP guest");
        }
        let session = shared.moving.claim().claim()?;
        shared.step().require(Step::Initialized)?;
        if !matches!(shared.membership().role, Role::Owner) {
            return Err(unfit(shared));
        }
        if shared.context().as_ref().is_none_or(|c| c.guest.is_some()) {
            return Err(Error::WrongState(shared.step()));
        }
        Ok(Incoming {
            shared,
            mailbox: Mailbox::of_vm(&shared.host, &shared.account)?,
            vendor,
            registers,
            receiving: false,
            _session: session,
        })
    }
}

impl<H: Host> MigrateTarget for Incoming<'_, H> {
    fn certs(&mut self) -> Result<PlatformCerts> {
        let mut certs = self.mailbox.certs()?;
        certs.vendor.clone_from(&self.vendor);
        Ok(certs)
    }

    fn accept(&mut self, shape: &Shape) -> Result<()> {
        let shared = self.shared;
        let is_es = shape.policy & POLICY_ES != 0;
        if shape.tech != shared.tech() || is_es != shared.is_es() {
            return Err(Error::Invalid(Field::Policy, shape.policy.into()));
        }
        if shape.vcpus as usize != shared.all_cells().len() {
            return Err(Error::Invalid(Field::VcpuCount, shape.vcpus.into()));
        }
        let memory = shared.memory();
        for (first, pages) in shape.layout.ranges() {
            if !memory.has_slot(first, pages) {
                return Err(Error::Invalid(Field::Gfn, first.get()));
            }
        }
        Ok(())
    }

    fn receive_start(&mut self, start: &SessionStart) -> Result<()> {
        self.shared.receive_start(&self.mailbox, 0, start)?;
        self.receiving = true;
        Ok(())
    }

    fn receive_private(&mut self, gfn: Gfn, packet: &Packet) -> Result<()> {
        let handle = self.shared.handle()?;
        let parts = (&packet.header[..], &packet.data[..]);
        self.shared.receive_page(&self.mailbox, handle, gfn, parts)
    }

    fn receive_shared(&mut self, gfn: Gfn, page: Option<&[u8; 4096]>) -> Result<()> {
        self.receive_absent(gfn)?;
        let gpa = gfn.base().ok_or(Error::Invalid(Field::Gfn, gfn.get()))?;
        self.shared.sev()?.write_slot(gpa, page.unwrap_or(&ZEROS))
    }

    fn receive_absent(&mut self, gfn: Gfn) -> Result<()> {
        self.shared.zap(&mut self.shared.memory(), gfn, 1)
    }

    fn receive_vcpu(&mut self, vcpu: VcpuId, content: VcpuContent, packet: &Packet) -> Result<()> {
        let cells = self.shared.all_cells();
        let cell = cells.get(vcpu.0 as usize).ok_or(unfit(self.shared))?;
        let len = match content {
            VcpuContent::Clear(len) => len,
            VcpuContent::Vmsa => {
                let handle = self.shared.handle()?;
                let sp = self.shared.sp();
                let mut state = cell.state();
                // It may come twice, after a link that broke.
                let (page, is_new) = match state.vmsa.take() {
                    Some(vmsa) => (vmsa.page, false),
                    None => (sp.alloc_vmsa()?, true),
                };
                let of = PacketOf::Vmsa;
                let (held, done) = self.mailbox.receive_into(handle, of, &page, packet);
                if done.is_err() && is_new {
                    let _ = sp.release(page, held);
                } else {
                    state.vmsa = Some(VmsaPage { page, held });
                    cell.protect();
                }
                return done;
            }
        };
        let bytes = packet.data.get(..len);
        let bytes = bytes.ok_or(Error::Invalid(Field::BufferLength, len as u64))?;
        (self.registers)(cell.id, bytes)
    }

    fn receive_finish(&mut self) -> Result<()> {
        let cells = self.shared.all_cells();
        if self.shared.is_es() && !cells.iter().all(|cell| cell.is_protected()) {
            return Err(Error::Invalid(Field::VcpuCount, cells.len() as u64));
        }
        self.mailbox.receive_finish(self.shared.handle()?)?;
        self.shared.set_guest_state(GuestState::Running);
        Ok(())
    }

    fn own(&mut self) {
        self.receiving = false;
        // The step was checked when the VM began to wait.
        let _ = self.shared.life.advance(Step::Runnable);
    }

    fn abandon(&mut self) -> Result<()> {
        self.receiving = false;
        let shared = self.shared;
        if let Some(context) = shared.context().as_mut() {
            shared.unbind()?;
            shared.sp().decommission(context);
        }
        let sp = shared.sp();
        // No line with the key may be left when its pages go.
        sp.psp.wbinvd_all();
        shared.take_back_arrived()
    }
}

impl<H: Host> Drop for Incoming<'_, H> {
    fn drop(&mut self) {
        if self.receiving {
            // The VM's account lists a leak.
            let _ = self.abandon();
        }
    }
}
