//! A VM as the end that a guest leaves.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use kvm_ops::moves::{Claimed, mark_left};
use kvm_ops::{
    Error, Gfn, Host, Level, MemSlot, PAGE_SIZE, Result, SlotFlags, Step, Tech, VcpuId, VmPort,
};
use kvm_ops_sev_stream::{
    FrameContent, FrameSet, Layout, MigrateSource, PAGE, Packet, PlatformCerts, SessionStart,
    Shape, VcpuContent,
};

use super::mailbox::{Mailbox, PacketOf};
use super::transfer::{is_plain_owner, unfit};
use crate::SevVm;
use crate::context::GuestState;
use crate::shared::Shared;

/// Reads a vCPU's registers that the host may see, in a form that the other end's
/// [`RegisterWriter`](super::RegisterWriter) understands, of at most 4096 bytes. The guest is
/// stopped.
pub type RegisterReader<'a> = Box<dyn FnMut(VcpuId) -> Result<Vec<u8>> + Send + 'a>;

/// A VM that is being sent. Its vCPUs run on, on their own threads, until the last round.
///
/// The source finds written pages by taking them out of the nested page table: the next access
/// faults, is recorded, and brings the page back. So a read counts as a write, which costs pages that
/// are sent again but never misses one. The slots' dirty logs follow shared pages.
///
/// Dropped before the guest is given up, it cancels: the guest runs on.
pub struct Outgoing<'a, H: Host> {
    shared: &'a Arc<Shared<H>>,
    mailbox: Mailbox<'a, H>,
    registers: RegisterReader<'a>,
    sending: bool,
    stopped: bool,
    /// Slots whose dirty log was switched on for the journey, as they were.
    logged: Vec<MemSlot>,
    /// Keeps other sessions and moves away.
    _session: Claimed<'a>,
}

impl<H: Host> SevVm<H> {
    /// Makes the VM one that a [`Sender`](super::Sender) can send.
    ///
    /// `registers` is asked for each vCPU of a plain SEV guest; that of a SEV-ES guest travels
    /// encrypted and is not asked for.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for SNP: such a guest goes swapped out, by a [`SnpSender`](super::SnpSender);
    /// [`Error::WrongState`] for a VM that does not run yet; [`Error::Invalid`] for a mirror or a VM
    /// that has mirrors, whose writes could not be followed; [`Error::Busy`] while another session
    /// or move is under way; [`Error::NoMemory`].
    pub fn outgoing<'a>(&'a self, registers: RegisterReader<'a>) -> Result<Outgoing<'a, H>> {
        let shared = &self.shared;
        if shared.tech() == Tech::SevSnp {
            return kvm_ops::not_offered!("sending an SNP guest");
        }
        let session = shared.moving.claim().claim()?;
        shared.step().require(Step::Runnable)?;
        is_plain_owner(shared)?;
        Ok(Outgoing {
            shared,
            mailbox: Mailbox::of_vm(&shared.host, &shared.account)?,
            registers,
            sending: false,
            stopped: false,
            logged: Vec::new(),
            _session: session,
        })
    }
}

impl<H: Host> Outgoing<'_, H> {
    /// From now on every change is noted.
    fn follow(&mut self) -> Result<()> {
        let mut memory = self.shared.memory();
        *memory.dirty() = Some(FrameSet::new(&layout(memory.slots.iter())?));
        let sev = self.shared.sev()?;
        for (gfn, frame) in memory.frames() {
            sev.map_encrypted(gfn, frame.page.level(), None)?;
        }
        for slot in memory.slots.iter().filter(|slot| !slot.flags.log_dirty) {
            let flags = SlotFlags {
                log_dirty: true,
                ..slot.flags
            };
            // A port without dirty logs refuses.
            if self
                .shared
                .port
                .set_memory_slot(&MemSlot { flags, ..*slot })
                .is_ok()
            {
                self.logged.push(*slot);
            }
        }
        Ok(())
    }

    fn forget(&mut self) {
        *self.shared.memory().dirty() = None;
        for slot in self.logged.drain(..) {
            // On an error it goes on logging, which costs time only.
            let _ = self.shared.port.set_memory_slot(&slot);
        }
    }

    fn slots(&self) -> Vec<MemSlot> {
        self.shared.memory().slots.iter().copied().collect()
    }
}

pub(super) fn layout<'s>(slots: impl Iterator<Item = &'s MemSlot>) -> Result<Layout> {
    Layout::new(slots.map(|slot| (Gfn::containing(slot.gpa), slot.bytes() / PAGE_SIZE)))
}

impl<H: Host> MigrateSource for Outgoing<'_, H> {
    fn shape(&self) -> Result<Shape> {
        let context = self.shared.context();
        let policy = context.as_ref().map_or(0, |context| context.policy);
        drop(context);
        Ok(Shape {
            tech: self.shared.tech(),
            policy: policy as u32,
            vcpus: self.shared.all_cells().len() as u32,
            layout: layout(self.shared.memory().slots.iter())?,
        })
    }

    fn send_start(&mut self, target: &PlatformCerts) -> Result<SessionStart> {
        let start = self.mailbox.send_start(self.shared.handle()?, target)?;
        self.sending = true;
        self.shared.set_guest_state(GuestState::SendUpdate);
        if let Err(error) = self.follow() {
            self.send_cancel()?;
            return Err(error);
        }
        Ok(start)
    }

    fn frame(&mut self, gfn: Gfn, packet: &mut Packet) -> Result<FrameContent> {
        let handle = self.shared.handle()?;
        // Held, so that the page is not given back under the command.
        let memory = self.shared.memory();
        if let Some(page) = memory.page(gfn) {
            self.mailbox
                .send_update(handle, PacketOf::Memory, page, packet)?;
            return Ok(FrameContent::Private);
        }
        let Some(gpa) = gfn.base() else {
            return Ok(FrameContent::Absent);
        };
        match self.shared.sev()?.read_slot(gpa, &mut packet.data) {
            Ok(()) => Ok(FrameContent::Shared),
            Err(Error::NotFound(..)) => Ok(FrameContent::Absent),
            Err(error) => Err(error),
        }
    }

    fn vcpu(&mut self, vcpu: VcpuId, packet: &mut Packet) -> Result<VcpuContent> {
        let handle = self.shared.handle()?;
        let cells = self.shared.all_cells();
        let cell = cells.get(vcpu.0 as usize).ok_or(unfit(self.shared))?;
        if self.shared.is_es() {
            let state = cell.state();
            let vmsa = state.vmsa.as_ref().ok_or(unfit(self.shared))?;
            self.mailbox
                .send_update(handle, PacketOf::Vmsa, vmsa.page.pfn(), packet)?;
            return Ok(VcpuContent::Vmsa);
        }
        let registers = (self.registers)(cell.id)?;
        let Some(place) = packet.data.get_mut(..registers.len()) else {
            let len = registers.len() as u64;
            return Err(Error::Invalid(kvm_ops::Field::BufferLength, len));
        };
        place.copy_from_slice(&registers);
        Ok(VcpuContent::Clear(registers.len()))
    }

    fn take_dirty(&mut self, frames: &mut FrameSet) -> Result<bool> {
        {
            let mut memory = self.shared.memory();
            let Some(mut dirty) = memory.dirty().take() else {
                return Ok(false);
            };
            let mut out = Ok(());
            while let Some(gfn) = dirty.pop_first() {
                // Out of the table again, so that the next access is noted too. One that stays in it stays noted: its
                // next write would not be.
                if let Some((first, frame)) = memory.frame(gfn) {
                    let sev = self.shared.sev();
                    out = sev.and_then(|s| s.map_encrypted(first, frame.page.level(), None));
                    if out.is_err() {
                        dirty.insert(gfn);
                        break;
                    }
                }
                frames.insert(gfn);
            }
            *memory.dirty() = Some(dirty);
            out?;
        }
        let mut follows = true;
        for slot in self.slots() {
            let mut bitmap = vec![0; slot.dirty_words()];
            match self.shared.port.dirty_log(&slot, &mut bitmap) {
                Ok(()) => {}
                // A port may have no log, or another owner of it.
                Err(_) => {
                    follows = false;
                    continue;
                }
            }
            let first = Gfn::containing(slot.gpa).get();
            for (word, bits) in (0..).step_by(64).zip(bitmap) {
                for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
                    frames.insert(Gfn::new(first + word + bit));
                }
            }
        }
        Ok(follows)
    }

    fn stop(&mut self) -> Result<()> {
        self.shared.stop();
        self.stopped = true;
        Ok(())
    }

    fn go_on(&mut self) {
        self.stopped = false;
        self.shared.gate.open();
    }

    fn send_finish(&mut self) -> Result<()> {
        self.mailbox.send_finish(self.shared.handle()?)?;
        self.sending = false;
        self.stopped = false;
        self.shared.set_guest_state(GuestState::Sent);
        mark_left(&self.shared.life);
        self.forget();
        Ok(())
    }

    fn send_cancel(&mut self) -> Result<()> {
        self.mailbox.send_cancel(self.shared.handle()?)?;
        self.sending = false;
        self.shared.set_guest_state(GuestState::Running);
        self.forget();
        Ok(())
    }
}

impl<H: Host> Drop for Outgoing<'_, H> {
    fn drop(&mut self) {
        if self.sending && self.send_cancel().is_err() {
            // The guest runs in the firmware's sending state too.
            self.forget();
        }
        if self.stopped {
            self.go_on();
        }
    }
}

const _: () = assert!(PAGE as u64 == PAGE_SIZE && Level::Size4K.bytes() == PAGE_SIZE);
