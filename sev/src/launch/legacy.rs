//! SEV and SEV-ES.

use kvm_ops::{Asid, Error, Field, Gfn, Host, Level, PAGE_SIZE, Page, Pfn, Result, Tech};
use zerocopy::little_endian::{U32, U64};

use super::Start;
use crate::cell::{Cell, VmsaPage};
use crate::command::{self, Command};
use crate::context::{Context, Guest, GuestState, GuestStatus};
use crate::memory::{Frame, Memory};
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
        let wants_es = start.policy & POLICY_ES != 0;
        if start.policy & !POLICY_BITS != 0 || wants_es != (self.tech() == Tech::SevEs) {
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

    /// ACTIVATE and bind; undone on failure, the guest included.
    pub(crate) fn activate(&self, context: &mut Context, handle: u32, asid: Asid) -> Result<()> {
        let sp = self.sp();
        let mut buffer = command::Activate {
            handle: U32::new(handle),
            asid: U32::new(asid.0),
        };
        if let Err(error) = sp.run(Command::Activate, &mut buffer) {
            sp.forget_guest(handle);
            return Err(error);
        }
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
    ) -> Result<Pfn> {
        let mut memory = self.memory();
        if let Some((first, _)) = memory.frame(gfn) {
            return Err(Error::Exists(Field::Gfn, first.get()));
        }
        let (page, held) = self.encrypt(context, contents)?;
        let pfn = page.pfn();
        self.map_filled(&mut memory, gfn, page, held, Ok(()))?;
        Ok(pfn)
    }

    /// LAUNCH_UPDATE_DATA of a page for memory that no slot shows yet.
    pub(crate) fn update_parked(
        &self,
        context: &mut Context,
        host: u64,
        contents: &[u8; 4096],
    ) -> Result<Pfn> {
        let mut memory = self.memory();
        if memory.is_parked(host) {
            return Err(Error::Exists(Field::HostAddress, host));
        }
        let (page, held) = self.encrypt(context, contents)?;
        let pfn = page.pfn();
        memory.park(host, Frame { page, held });
        Ok(pfn)
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

    /// LAUNCH_UPDATE_SECRET: a packet of the owner's into a guest page that is encrypted.
    pub(crate) fn secret(
        &self,
        context: &mut Context,
        header: &[u8],
        gfn: Gfn,
        offset: u64,
        data: &[u8],
    ) -> Result<()> {
        let len = data.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > PAGE_SIZE) {
            return Err(Error::Invalid(Field::Size, len));
        }
        let handle = context.handle().ok_or(Error::WrongState(self.step()))?;
        let mut memory = self.memory();
        // The command takes a page of 4 KiB.
        self.split(&mut memory, gfn)?;
        let frame = memory
            .frame_mut(gfn)
            .ok_or(Error::NotFound(Field::Gfn, gfn.get()))?;
        let sp = self.sp();
        let mut buffer = command::LaunchSecret {
            handle: U32::new(handle),
            hdr_len: U32::new(header.len() as u32),
            guest_len: U32::new(data.len() as u32),
            trans_len: U32::new(data.len() as u32),
            ..Default::default()
        };
        sp.with_input(header, |header| {
            buffer.hdr = U64::new(header);
            sp.with_input(data, |data| {
                buffer.trans = U64::new(data);
                let (held, done) = sp.in_place(&frame.page, |at| {
                    buffer.guest = U64::new(at + offset);
                    sp.run(Command::LaunchUpdateSecret, &mut buffer)
                });
                frame.held = held;
                done
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

    /// The address of a guest page in memory, for commands that take it.
    pub(crate) fn guest_address(&self, gfn: Gfn, offset: u64) -> Result<u64> {
        let page = self
            .page_of(gfn)
            .ok_or(Error::NotFound(Field::Gfn, gfn.get()))?;
        Ok(base(page)?.get() + offset)
    }
}
