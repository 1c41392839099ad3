//! SEV and SEV-ES.

use alloc::vec::Vec;

use kvm_ops::{Asid, Error, Field, Gfn, Host, Hpa, Level, PAGE_SIZE, Page, PagePort, Result};
use zerocopy::little_endian::{U32, U64};

use super::Start;
use crate::cell::{Cell, VmsaPage};
use crate::command::{self, Command};
use crate::context::{Context, Guest, GuestState, GuestStatus};
use crate::memory::{Memory, Part};
use crate::shared::Shared;
use crate::sp::{Held, base};

/// Policy bit: the guest needs SEV-ES.
pub(crate) const POLICY_ES: u64 = 1 << 2;
/// The bits of a legacy policy.
const POLICY_BITS: u64 = u32::MAX as u64;

impl<H: Host> Shared<H> {
    /// LAUNCH_START, ACTIVATE, and the ASID into the VMCBs.
    pub(super) fn start_legacy(
        &self,
        context: &mut Context,
        asid: Asid,
        start: &Start,
    ) -> Result<()> {
        if start.policy & !POLICY_BITS != 0 {
            return Err(Error::Invalid(Field::Policy, start.policy));
        }
        let handle = self.launch_start(start)?;
        if let Err(error) = self.activate(context, handle, asid) {
            self.drop_soiled_asid(context);
            return Err(error);
        }
        context.guest = Some(Guest::Handle(handle));
        Ok(())
    }

    /// LAUNCH_START and ACTIVATE once more, as the kernel issues them for a VM whose launch was started. Firmware has the VM's
    /// ASID bound to its guest and refuses, so the second guest goes. Only one that shares the first one's key takes its place; the
    /// kernel forgets the first then, and here it ends.
    pub(crate) fn start_again(&self, context: &mut Context, start: &Start) -> Result<()> {
        let asid = self.asid()?;
        let handle = self.launch_start(start)?;
        self.give_asid(handle, asid)?;
        if let Some(Guest::Handle(first)) = context.guest.replace(Guest::Handle(handle)) {
            // A guest that firmware keeps is listed as leaked.
            let _ = self.sp().end_legacy(first);
        }
        context.policy = start.policy;
        context.state = GuestState::LaunchUpdate;
        context.measurement = None;
        Ok(())
    }

    /// Ends the guest of a LAUNCH_START or RECEIVE_START. The next start takes another ASID.
    pub(crate) fn undo_start(&self) -> Result<()> {
        let mut context = self.context();
        let is_new = |context: &&mut Context| {
            matches!(
                context.state,
                GuestState::LaunchUpdate | GuestState::ReceiveUpdate
            )
        };
        let new = context.as_mut().filter(is_new);
        let new = new.and_then(|context| Some((context.handle()?, context)));
        let (handle, context) = new.ok_or(Error::WrongState(self.step()))?;
        self.unbind()?;
        context.guest = None;
        context.state = GuestState::Uninit;
        let sp = self.sp();
        match sp.end_legacy(handle) {
            Ok(()) => self.drop_soiled_asid(context),
            Err(kept) => {
                if let Some(lease) = context.lease.take() {
                    sp.leak_asid(lease, kept);
                }
            }
        }
        Ok(())
    }

    fn launch_start(&self, start: &Start) -> Result<u32> {
        let sp = self.sp();
        let (cert, session) = match &start.session {
            Some((cert, session)) => (&cert[..], &session[..]),
            None => (&[][..], &[][..]),
        };
        let mut buffer = command::LaunchStart {
            handle: U32::new(start.share),
            policy: U32::new(start.policy as u32),
            dh_cert_len: U32::new(cert.len() as u32),
            session_len: U32::new(session.len() as u32),
            ..Default::default()
        };
        sp.with_input(cert, |cert| {
            buffer.dh_cert = U64::new(cert);
            sp.with_input(session, |session| {
                buffer.session = U64::new(session);
                sp.run(Command::LaunchStart, &mut buffer)
            })
        })?;
        Ok(buffer.handle.get())
    }

    /// Puts an ASID into the VMCBs.
    pub(crate) fn bind(&self, asid: Asid) -> Result<()> {
        self.sev()?.bind_asid(Some(asid), self.mask)?;
        self.set_bound(Some(asid));
        Ok(())
    }

    /// ACTIVATE. A guest whose ASID firmware refuses goes.
    fn give_asid(&self, handle: u32, asid: Asid) -> Result<()> {
        let mut buffer = command::Activate {
            handle: U32::new(handle),
            asid: U32::new(asid.0),
        };
        let sp = self.sp();
        sp.run(Command::Activate, &mut buffer)
            .inspect_err(|_| sp.forget_guest(handle))
    }

    /// ACTIVATE and bind; undone on failure, the guest included.
    pub(crate) fn activate(&self, context: &mut Context, handle: u32, asid: Asid) -> Result<()> {
        let sp = self.sp();
        self.give_asid(handle, asid)?;
        context.soiled = true;
        if let Err(error) = self.bind(asid) {
            match sp.deactivate(handle) {
                Ok(()) => sp.forget_guest(handle),
                Err(kept) => {
                    // Bound for good: neither number may be had by another guest.
                    context.soiled = false;
                    if let Some(lease) = context.lease.take() {
                        sp.leak_asid(lease, kept);
                    }
                    sp.leak_handle(handle, kept);
                }
            }
            return Err(error);
        }
        Ok(())
    }

    /// The buffer of a command on a range of memory.
    fn update(
        &self,
        context: &Context,
        command: Command,
        address: u64,
        len: usize,
    ) -> Result<command::Update> {
        let handle = context.handle().ok_or(Error::WrongState(self.step()))?;
        let mut buffer = command::Update {
            handle: U32::new(handle),
            address: U64::new(address),
            len: U32::new(len as u32),
            ..Default::default()
        };
        self.sp().run(command, &mut buffer)?;
        Ok(buffer)
    }

    /// LAUNCH_UPDATE_DATA of a new page with these contents.
    pub(crate) fn update_data(
        &self,
        context: &mut Context,
        gfn: Gfn,
        contents: &[u8; 4096],
    ) -> Result<()> {
        let mut memory = self.memory();
        if let Some((first, _)) = memory.frame(gfn) {
            return Err(Error::Exists(Field::Gfn, first.get()));
        }
        let (page, held) = self.encrypt(context, contents)?;
        self.map_filled(&mut memory, gfn, page, held, Ok(()))
    }

    /// LAUNCH_UPDATE_DATA of a part of the memory at a host address. `contents` are those of its page there, and have the
    /// part's ciphertext afterwards. Alignment and length are the firmware's to judge.
    pub(crate) fn update_part(
        &self,
        context: &Context,
        part: Part,
        contents: &mut [u8; 4096],
    ) -> Result<()> {
        let mut memory = self.memory();
        let (start, len) = (part.offset, part.len as usize);
        let mut bytes = contents[start as usize..][..len].to_vec();
        let pages = self.sp().pages;
        self.with_page_at(&mut memory, part.host, Some(contents), |memory| {
            let page = &memory.frame_at(part.host)?.page;
            let at = Hpa::new(page.hpa().get() + start);
            // What the guest's page has is another copy, which may be older.
            pages.write(at, &bytes)?;
            self.in_place_at(memory, part.host, |page| {
                self.update(context, Command::LaunchUpdateData, page + start, len)
            })?;
            pages.read(at, &mut bytes)
        })?;
        contents[start as usize..][..len].copy_from_slice(&bytes);
        Ok(())
    }

    /// A new page with these contents, encrypted.
    fn encrypt(&self, context: &Context, contents: &[u8; 4096]) -> Result<(Page, Held)> {
        let sp = self.sp();
        let page = sp.alloc(Level::Size4K)?;
        let (held, done) = match sp.write(&page, contents) {
            Ok(()) => sp.in_place(&page, |at| {
                self.update(context, Command::LaunchUpdateData, at, contents.len())
            }),
            Err(error) => (Held::Host, Err(error)),
        };
        match done {
            Ok(_) => Ok((page, held)),
            Err(error) => {
                // The first error is returned; the account lists a page that leaks.
                let _ = sp.release(page, held);
                Err(error)
            }
        }
    }

    /// Maps a page that a command filled, or gives it back if the command failed.
    pub(crate) fn map_filled(
        &self,
        memory: &mut Memory,
        gfn: Gfn,
        page: Page,
        held: Held,
        filled: Result<()>,
    ) -> Result<()> {
        let mapped = match filled {
            Ok(()) => self.map(memory, gfn, page),
            Err(error) => Err((error, Some(page))),
        };
        mapped.map_err(|(error, page)| {
            // The first error is returned; the account lists a page that leaks.
            if let Some(page) = page {
                let _ = self.sp().release(page, held);
            }
            error
        })
    }

    /// LAUNCH_UPDATE_VMSA of every vCPU that has not had it, in the order of their numbers. Stops
    /// at the first failure; those before it stay encrypted.
    pub(crate) fn update_vmsas(&self, context: &mut Context) -> Result<()> {
        for cell in self.all_cells() {
            if !cell.is_protected() {
                self.update_vmsa(context, &cell)?;
            }
        }
        Ok(())
    }

    fn update_vmsa(&self, context: &mut Context, cell: &Cell) -> Result<()> {
        let sp = self.sp();
        let mut state = cell.state();
        let contents = state.start.page(context.vmsa_features);
        let page = sp.alloc_vmsa()?;
        let (held, done) = match sp.write(&page, &contents[..]) {
            Ok(()) => sp.in_place(&page, |at| {
                self.update(context, Command::LaunchUpdateVmsa, at, contents.len())
            }),
            Err(error) => (Held::Host, Err(error)),
        };
        match done {
            Ok(_) => {
                state.vmsa = Some(VmsaPage { page, held });
                cell.protect();
                Ok(())
            }
            Err(error) => {
                let _ = sp.release(page, held);
                Err(error)
            }
        }
    }

    /// LAUNCH_MEASURE without room for the answer: firmware refuses, and tells its length where the guest's state allows one.
    pub(crate) fn measurement_len(&self, context: &Context) -> (u32, Result<()>) {
        let mut buffer = command::Update {
            handle: U32::new(context.handle().unwrap_or(0)),
            ..Default::default()
        };
        let done = self.sp().run(Command::LaunchMeasure, &mut buffer);
        (buffer.len.get(), done)
    }

    /// LAUNCH_MEASURE.
    pub(crate) fn measure(&self, context: &mut Context) -> Result<[u8; 48]> {
        let mut measurement = [0; 48];
        let (_, answer) = self.sp().with_output(measurement.len(), |at| {
            self.update(context, Command::LaunchMeasure, at, measurement.len())
        })?;
        measurement.copy_from_slice(&answer);
        context.measurement = Some(measurement);
        context.state = GuestState::LaunchSecret;
        Ok(measurement)
    }

    /// LAUNCH_UPDATE_SECRET: a packet of the owner's into the memory at a host address (address and length in bytes), whose
    /// pages follow each other. Lengths are the firmware's to judge.
    pub(crate) fn secret(
        &self,
        context: &Context,
        header: &[u8],
        (address, len): (u64, u32),
        data: &[u8],
    ) -> Result<()> {
        let handle = context.handle().ok_or(Error::WrongState(self.step()))?;
        let last = address.checked_add(u64::from(len).saturating_sub(1));
        let last = last.ok_or(Error::Invalid(Field::Size, len.into()))?;
        let offset = address % PAGE_SIZE;
        let hosts: Vec<u64> = (address - offset..=last)
            .step_by(PAGE_SIZE as usize)
            .collect();
        let mut memory = self.memory();
        let pages = self.contiguous_at(&mut memory, &hosts)?;
        let first = base(*pages.first().ok_or(Error::Invalid(Field::Size, 0))?)?;
        let sp = self.sp();
        let mut buffer = command::LaunchSecret {
            handle: U32::new(handle),
            hdr_len: U32::new(header.len() as u32),
            guest: U64::new(first.get() + offset),
            guest_len: U32::new(len),
            trans_len: U32::new(data.len() as u32),
            ..Default::default()
        };
        sp.with_input(header, |header| {
            buffer.hdr = U64::new(header);
            sp.with_input(data, |data| {
                buffer.trans = U64::new(data);
                self.in_places_at(&mut memory, &hosts, || {
                    sp.run(Command::LaunchUpdateSecret, &mut buffer)
                })
            })
        })
    }

    /// Everything from the VMSAs to LAUNCH_FINISH that was not done yet.
    pub(super) fn finish_legacy(&self, context: &mut Context) -> Result<()> {
        if context.state == GuestState::LaunchUpdate {
            if self.is_es() {
                self.update_vmsas(context)?;
            }
            self.measure(context)?;
        }
        if context.state != GuestState::LaunchSecret {
            return Err(Error::WrongState(self.step()));
        }
        self.launch_finish(context)
    }

    /// LAUNCH_FINISH.
    pub(crate) fn launch_finish(&self, context: &mut Context) -> Result<()> {
        let handle = context.handle().ok_or(Error::WrongState(self.step()))?;
        let mut buffer = command::Handle {
            handle: U32::new(handle),
        };
        self.sp().run(Command::LaunchFinish, &mut buffer)?;
        context.state = GuestState::Running;
        Ok(())
    }

    /// GUEST_STATUS.
    pub(crate) fn legacy_status(&self, handle: u32) -> Result<GuestStatus> {
        let mut buffer = command::GuestStatus {
            handle: U32::new(handle),
            ..Default::default()
        };
        self.sp().run(Command::GuestStatus, &mut buffer)?;
        Ok(GuestStatus {
            policy: buffer.policy.get().into(),
            asid: buffer.asid.get(),
            state: buffer.state,
        })
    }
}
