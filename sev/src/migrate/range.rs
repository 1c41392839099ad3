//! A guest that comes from another host, and the parts of its memory that travel: what the ends of a stream and
//! the commands of a VMM have in common.

use kvm_ops::{Error, Field, Gfn, Host, Level, PAGE_SIZE, Result};
use kvm_ops_sev_stream::SessionStart;

use super::mailbox::{Mailbox, PacketOf, Place};
use crate::context::{Guest, GuestState};
use crate::memory::Part;
use crate::shared::Shared;

impl<H: Host> Shared<H> {
    /// RECEIVE_START and ACTIVATE. Returns the handle.
    pub(crate) fn receive_start(
        &self,
        mailbox: &Mailbox<'_, H>,
        share: u32,
        start: &SessionStart,
    ) -> Result<u32> {
        let mut context = self.context();
        let context = context.as_mut().ok_or(Error::WrongState(self.step()))?;
        if context.guest.is_some() {
            return Err(Error::WrongState(self.step()));
        }
        let asid = self.leased(context)?;
        let handle = mailbox.receive_sharing(share, start)?;
        if let Err(error) = self.activate(context, handle, asid) {
            self.drop_soiled_asid(context);
            return Err(error);
        }
        context.guest = Some(Guest::Handle(handle));
        context.state = GuestState::ReceiveUpdate;
        context.policy = start.policy.into();
        Ok(handle)
    }

    /// Packs a part of the memory at a host address: of its private page, or else of what lies in the slot, which firmware
    /// takes for encrypted as well.
    pub(crate) fn send_part(
        &self,
        mailbox: &Mailbox<'_, H>,
        handle: u32,
        part: Part,
        parts: (&mut [u8], &mut [u8]),
    ) -> Result<()> {
        // Held, so that the page is not given back under the command.
        let mut memory = self.memory();
        let page = match memory.gpa_of(part.host).map(Gfn::containing) {
            Some(gfn) => match memory.page(gfn) {
                Some(page) => page,
                None => mailbox.copy_of(&self.slot_contents(gfn)?)?,
            },
            None => {
                let frame = memory.frame_at(part.host);
                frame.map_err(|_| Error::NoMemory)?.page.pfn()
            }
        };
        let (offset, len) = (part.offset, part.len as u32);
        let place = Place { page, offset, len };
        mailbox.send_range(handle, PacketOf::Memory, place, parts)
    }

    /// Unpacks into a part of the memory at a host address.
    pub(crate) fn receive_part(
        &self,
        mailbox: &Mailbox<'_, H>,
        handle: u32,
        part: Part,
        parts: (&[u8], &[u8]),
    ) -> Result<()> {
        let mut memory = self.memory();
        self.with_page_at(&mut memory, part.host, None, |memory| {
            let frame = memory.frame_at(part.host)?;
            let place = (&frame.page, (part.offset, part.len as u32));
            let (held, done) = mailbox.receive_range(handle, PacketOf::Memory, place, parts);
            frame.held = held;
            done
        })
    }

    /// Unpacks a page into the frame's, or into a new one that becomes the frame's.
    pub(crate) fn receive_page(
        &self,
        mailbox: &Mailbox<'_, H>,
        handle: u32,
        gfn: Gfn,
        parts: (&[u8], &[u8]),
    ) -> Result<()> {
        let (of, whole) = (PacketOf::Memory, (0, PAGE_SIZE as u32));
        let mut memory = self.memory();
        if memory.frame(gfn).is_some() {
            self.split(&mut memory, gfn)?;
        }
        if let Some(frame) = memory.frame_mut(gfn) {
            let (held, done) = mailbox.receive_range(handle, of, (&frame.page, whole), parts);
            frame.held = held;
            return done;
        }
        let page = self.sp().alloc(Level::Size4K)?;
        let (held, done) = mailbox.receive_range(handle, of, (&page, whole), parts);
        self.map_filled(&mut memory, gfn, page, held, done)
    }

    fn slot_contents(&self, gfn: Gfn) -> Result<[u8; PAGE_SIZE as usize]> {
        let gpa = gfn.base().ok_or(Error::Invalid(Field::Gfn, gfn.get()))?;
        let mut contents = [0; PAGE_SIZE as usize];
        self.sev()?.read_slot(gpa, &mut contents)?;
        Ok(contents)
    }
}
