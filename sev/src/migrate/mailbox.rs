//! The SEND and RECEIVE commands of the AMD SP, through the ports of a host.
//!
//! As in Linux `svm/sev.c`, a packet lies in one guest page, and the guest's address carries the
//! C-bit.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use kvm_ops::{
    Error, Field, Host, Level, OpName, PAGE_SIZE, Page, PageAccount, PagePort, Pfn, PspPort, Result,
};
use kvm_ops_sev_stream::{MAX_BLOB, PAGE, Packet, PlatformCerts, SessionStart};
use zerocopy::little_endian::{U32, U64};

use crate::command::{self, Buffer, Command};
use crate::sp::{Held, RmpEntry, Sp, base};
use crate::status::{Failure, Operation, Status};

/// The contents of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketOf {
    /// A page of memory (`*_UPDATE_DATA`).
    Memory,
    /// The register state of an SEV-ES vCPU (`*_UPDATE_VMSA`).
    Vmsa,
}

static AN_SP: OpName = OpName("an AMD SP");

// Places in the mailbox's memory. Firmware reads `IN` and writes `OUT`.
const IN: [u64; 3] = [0, 0x8000, 0x1_0000];
const OUT: [u64; 2] = [0x10_0000, 0x10_8000];
/// The pages that firmware writes, from `OUT[0]` on.
const OUT_PAGES: u64 = 12;

/// A range in a page of the guest, which carries the C-bit in commands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) page: Pfn,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

impl Place {
    pub(crate) fn whole(page: Pfn) -> Self {
        Self {
            page,
            offset: 0,
            len: PAGE as u32,
        }
    }
}

/// The account that lists the mailbox's memory.
#[derive(Debug)]
enum Ledger<'a> {
    Own(Box<PageAccount>),
    Vm(&'a PageAccount),
}

/// The commands of a migration, with memory for their operands and answers.
///
/// That memory is one 2 MiB page, because a certificate chain is longer than 4 KiB and must not be
/// scattered. With SNP initialised firmware writes only pages in Firmware state, so the part that
/// it writes is in that state as long as the mailbox lives. It goes back when the value is dropped.
#[derive(Debug)]
pub struct Mailbox<'a, H: Host> {
    host: &'a H,
    ledger: Ledger<'a>,
    /// Taken by the drop.
    area: Option<Page>,
    /// The number of pages that are in Firmware state.
    lent: u64,
}

impl<'a, H: Host> Mailbox<'a, H> {
    /// Takes the memory.
    ///
    /// # Errors
    /// [`Error::HostLacks`] without an AMD SP or memory for it, [`Error::NoMemory`] if none is left.
    pub fn new(host: &'a H) -> Result<Self> {
        Self::with(host, Ledger::Own(Box::default()))
    }

    pub(crate) fn of_vm(host: &'a H, account: &'a PageAccount) -> Result<Self> {
        Self::with(host, Ledger::Vm(account))
    }

    fn with(host: &'a H, ledger: Ledger<'a>) -> Result<Self> {
        if host.psp().is_none() || host.pages().is_none() {
            return Err(Error::HostLacks(&AN_SP));
        }
        let mut mailbox = Self {
            host,
            ledger,
            area: None,
            lent: 0,
        };
        mailbox.area = Some(mailbox.sp()?.alloc(Level::Size2M)?);
        for page in 0..OUT_PAGES {
            // A failure gives back what was lent before it, by the drop.
            let page = mailbox.out_page(page)?;
            mailbox
                .sp()?
                .rmpupdate(page, Level::Size4K, RmpEntry::Firmware)?;
            mailbox.lent += 1;
        }
        Ok(mailbox)
    }

    fn sp(&self) -> Result<Sp<'_, H>> {
        let account: &PageAccount = match &self.ledger {
            Ledger::Own(account) => account,
            Ledger::Vm(account) => account,
        };
        Sp::of(self.host, account).ok_or(Error::HostLacks(&AN_SP))
    }

    fn out_page(&self, index: u64) -> Result<Pfn> {
        self.page(OUT[0] + index * PAGE_SIZE)
    }

    fn page(&self, offset: u64) -> Result<Pfn> {
        let first = self.area.as_ref().map(Page::pfn);
        let page = first.and_then(|first| first.checked_add(offset / PAGE_SIZE));
        page.ok_or(Error::Invalid(Field::HostAddress, offset))
    }

    fn at(&self, offset: u64) -> Result<u64> {
        Ok(base(self.page(offset)?)?.get())
    }

    fn put(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.sp()?.pages.write(base(self.page(offset)?)?, data)
    }

    fn get(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.sp()?.pages.read(base(self.page(offset)?)?, data)
    }

    fn command<B: Buffer>(&self, command: Command, buffer: &mut B) -> Result<()> {
        self.sp()?.run(command, buffer)
    }

    /// A command whose lengths are 0 asks for them: INVALID_LEN, and the lengths are written.
    fn query<B: Buffer>(&self, command: Command, buffer: &mut B) -> Result<()> {
        match self.command(command, buffer) {
            Err(error) if error == failure(command, Status::INVALID_LEN) => Ok(()),
            Err(error) => Err(error),
            // Done without a place for the answer: an unknown firmware.
            Ok(()) => Err(failure(command, Status::SUCCESS)),
        }
    }

    fn of_handle(&self, command: Command, handle: u32) -> Result<()> {
        let handle = U32::new(handle);
        self.command(command, &mut command::Handle { handle })
    }

    /// Puts a blob where firmware reads it: address and length.
    fn input(&self, place: u64, blob: &[u8]) -> Result<(U64, U32)> {
        if blob.len() > MAX_BLOB {
            return Err(Error::Invalid(Field::BufferLength, blob.len() as u64));
        }
        self.put(place, blob)?;
        Ok((self.address(place)?, U32::new(blob.len() as u32)))
    }

    fn address(&self, place: u64) -> Result<U64> {
        self.at(place).map(U64::new)
    }

    /// PDH_CERT_EXPORT: the certificates of this platform. The firmware does not hold the vendor's,
    /// which stay empty.
    pub fn certs(&self) -> Result<PlatformCerts> {
        let command = Command::PdhCertExport;
        let mut buffer = command::PdhCertExport::default();
        self.query(command, &mut buffer)?;
        let (pdh, chain) = (
            buffer.pdh_len.get() as usize,
            buffer.chain_len.get() as usize,
        );
        if pdh > MAX_BLOB || chain > MAX_BLOB {
            return Err(failure(command, Status::INVALID_LEN));
        }
        buffer.pdh = self.address(OUT[0])?;
        buffer.chain = self.address(OUT[1])?;
        self.command(command, &mut buffer)?;
        let mut certs = PlatformCerts {
            pdh: vec![0; pdh],
            chain: vec![0; chain],
            vendor: Vec::new(),
        };
        self.get(OUT[0], &mut certs.pdh)?;
        self.get(OUT[1], &mut certs.chain)?;
        Ok(certs)
    }

    /// SEND_START towards the platform of `target`.
    ///
    /// # Errors
    /// POLICY_FAILURE where the guest may not go there, INVALID_CERTIFICATE or BAD_SIGNATURE for a
    /// platform that is not what it claims; [`Error::Invalid`] for certificates longer than 16 KiB.
    pub fn send_start(&self, handle: u32, target: &PlatformCerts) -> Result<SessionStart> {
        let command = Command::SendStart;
        // Before the state changes, so that a failure leaves nothing to undo.
        let pdh = self.certs()?.pdh;
        let mut buffer = self.send_buffer(handle, [&target.pdh, &target.chain, &target.vendor])?;
        self.query(command, &mut buffer)?;
        let len = buffer.session_len.get() as usize;
        if len == 0 || len > MAX_BLOB {
            return Err(failure(command, Status::INVALID_LEN));
        }
        buffer.policy = U32::new(0);
        buffer.session = self.address(OUT[0])?;
        self.command(command, &mut buffer)?;
        let mut session = vec![0; len];
        if let Err(error) = self.get(OUT[0], &mut session) {
            // A session that cannot be read is of no use.
            self.send_cancel(handle)?;
            return Err(error);
        }
        Ok(SessionStart {
            policy: buffer.policy.get(),
            pdh,
            session,
        })
    }

    /// The buffer of SEND_START with the target's certificate, its chain, and the vendor's.
    fn send_buffer(&self, handle: u32, certs: [&[u8]; 3]) -> Result<command::SendStart> {
        let mut buffer = command::SendStart {
            handle: U32::new(handle),
            ..Default::default()
        };
        (buffer.pdh, buffer.pdh_len) = self.input(IN[0], certs[0])?;
        (buffer.plat_certs, buffer.plat_certs_len) = self.input(IN[1], certs[1])?;
        (buffer.amd_certs, buffer.amd_certs_len) = self.input(IN[2], certs[2])?;
        Ok(buffer)
    }

    /// SEND_START with as much room for the session as the caller has, and the buffer afterwards: it
    /// tells the policy and the session's length also where firmware refused.
    pub(crate) fn start_sending(
        &self,
        handle: u32,
        certs: [&[u8]; 3],
        session: &mut [u8],
    ) -> Result<(command::SendStart, Result<()>)> {
        let mut buffer = self.send_buffer(handle, certs)?;
        buffer.session = self.address(OUT[0])?;
        buffer.session_len = U32::new(session.len() as u32);
        let done = self.command(Command::SendStart, &mut buffer);
        if done.is_ok() {
            self.get_told(OUT[0], buffer.session_len, session)?;
        }
        Ok((buffer, done))
    }

    /// SEND_UPDATE_DATA or SEND_UPDATE_VMSA of one page of the guest.
    ///
    /// # Errors
    /// The firmware's. The state is unchanged, and the page may be sent again.
    pub fn send_update(
        &self,
        handle: u32,
        of: PacketOf,
        page: Pfn,
        packet: &mut Packet,
    ) -> Result<()> {
        let Packet { header, data } = packet;
        self.send_range(handle, of, Place::whole(page), (header, data))
    }

    /// The same of a part of a page, into a header and a packet of any length.
    pub(crate) fn send_range(
        &self,
        handle: u32,
        of: PacketOf,
        place: Place,
        (header, data): (&mut [u8], &mut [u8]),
    ) -> Result<()> {
        let command = match of {
            PacketOf::Memory => Command::SendUpdateData,
            PacketOf::Vmsa => Command::SendUpdateVmsa,
        };
        let told = self.update(command, handle, place, (header.len(), data.len()), OUT)?;
        self.get_told(OUT[0], told.hdr_len, header)?;
        self.get_told(OUT[1], told.trans_len, data)
    }

    /// As much of an answer as firmware said.
    fn get_told(&self, place: u64, told: U32, answer: &mut [u8]) -> Result<()> {
        let len = answer.len().min(told.get() as usize);
        self.get(place, &mut answer[..len])
    }

    /// SEND_UPDATE_DATA without room for an answer, and the buffer that tells how much is needed.
    pub(crate) fn packet_lengths(&self, handle: u32) -> (command::TransportPacket, Result<()>) {
        let mut buffer = command::TransportPacket {
            handle: U32::new(handle),
            ..Default::default()
        };
        let done = self.command(Command::SendUpdateData, &mut buffer);
        (buffer, done)
    }

    /// A page of the mailbox with these contents, for [`send_range`](Self::send_range).
    pub(crate) fn copy_of(&self, contents: &[u8; PAGE]) -> Result<Pfn> {
        self.put(IN[0], contents)?;
        self.page(IN[0])
    }

    /// The guest's address carries the C-bit, as KVM has it. Returns the buffer.
    fn update(
        &self,
        command: Command,
        handle: u32,
        place: Place,
        (header, data): (usize, usize),
        places: [u64; 2],
    ) -> Result<command::TransportPacket> {
        let guest = (base(place.page)?.get() + place.offset) | 1 << self.sp()?.psp.c_bit();
        let mut buffer = command::TransportPacket {
            handle: U32::new(handle),
            hdr: self.address(places[0])?,
            hdr_len: U32::new(header as u32),
            guest: U64::new(guest),
            guest_len: U32::new(place.len),
            trans: self.address(places[1])?,
            trans_len: U32::new(data as u32),
            ..Default::default()
        };
        self.command(command, &mut buffer)?;
        Ok(buffer)
    }

    /// SEND_FINISH: from now on the firmware does not let the guest run here.
    ///
    /// # Errors
    /// The firmware's. Sending goes on.
    pub fn send_finish(&self, handle: u32) -> Result<()> {
        self.of_handle(Command::SendFinish, handle)
    }

    /// SEND_CANCEL: the guest runs on.
    pub fn send_cancel(&self, handle: u32) -> Result<()> {
        self.of_handle(Command::SendCancel, handle)
    }

    /// RECEIVE_START. Returns the new guest's handle. It has no ASID yet.
    ///
    /// # Errors
    /// BAD_MEASUREMENT for a session that was not made for this platform or policy;
    /// [`Error::Invalid`] for blobs longer than 16 KiB.
    pub fn receive_start(&self, start: &SessionStart) -> Result<u32> {
        self.receive_sharing(0, start)
    }

    /// The same for a guest that shares the key of the one that a handle names, unless it is 0.
    pub(crate) fn receive_sharing(&self, share: u32, start: &SessionStart) -> Result<u32> {
        let mut buffer = command::ReceiveStart {
            handle: U32::new(share),
            policy: U32::new(start.policy),
            ..Default::default()
        };
        (buffer.pdh, buffer.pdh_len) = self.input(IN[0], &start.pdh)?;
        (buffer.session, buffer.session_len) = self.input(IN[1], &start.session)?;
        self.command(Command::ReceiveStart, &mut buffer)?;
        Ok(buffer.handle.get())
    }

    /// RECEIVE_UPDATE_DATA or RECEIVE_UPDATE_VMSA into one page of the guest.
    ///
    /// # Errors
    /// BAD_MEASUREMENT for a packet that is not of this session or was changed on the way: the
    /// page is as it was. Otherwise the firmware's. A page that firmware does not give back after
    /// the command must not be used again: its error names SNP_PAGE_RECLAIM or RMPUPDATE.
    pub fn receive_update(
        &self,
        handle: u32,
        of: PacketOf,
        page: &Page,
        packet: &Packet,
    ) -> Result<()> {
        self.receive_into(handle, of, page, packet).1
    }

    /// As [`receive_update`](Self::receive_update), with the RMP state of the page afterwards.
    pub(crate) fn receive_into(
        &self,
        handle: u32,
        of: PacketOf,
        page: &Page,
        packet: &Packet,
    ) -> (Held, Result<()>) {
        let range = (0, PAGE as u32);
        self.receive_range(handle, of, (page, range), (&packet.header, &packet.data))
    }

    /// The same into a part of a page (offset and length), from a header and a packet of any length.
    pub(crate) fn receive_range(
        &self,
        handle: u32,
        of: PacketOf,
        (page, (offset, len)): (&Page, (u64, u32)),
        (header, data): (&[u8], &[u8]),
    ) -> (Held, Result<()>) {
        let command = match of {
            PacketOf::Memory => Command::ReceiveUpdateData,
            PacketOf::Vmsa => Command::ReceiveUpdateVmsa,
        };
        let place = Place {
            page: page.pfn(),
            offset,
            len,
        };
        let lengths = (header.len(), data.len());
        let ready = self
            .input(IN[0], header)
            .and_then(|_| self.input(IN[1], data))
            .and_then(|_| self.sp());
        match ready {
            Err(error) => (Held::Host, Err(error)),
            Ok(sp) => sp.in_place(page, |_| {
                let from = [IN[0], IN[1]];
                self.update(command, handle, place, lengths, from).map(drop)
            }),
        }
    }

    /// RECEIVE_FINISH: the guest could run here.
    pub fn receive_finish(&self, handle: u32) -> Result<()> {
        self.of_handle(Command::ReceiveFinish, handle)
    }
}

impl<H: Host> Drop for Mailbox<'_, H> {
    fn drop(&mut self) {
        let pages = (0..self.lent).map(|page| self.out_page(page));
        let pages: Result<Vec<Pfn>> = pages.collect();
        let (Some(area), Ok(sp)) = (self.area.take(), self.sp()) else {
            return;
        };
        let back = pages.and_then(|mut pages| {
            pages
                .drain(..)
                .try_for_each(|page| sp.take_back(page, Level::Size4K, Held::Immutable))
        });
        match back {
            Ok(()) => sp.free(area),
            Err(error) => {
                tracing::warn!(page = %area.hpa(), %error, "the memory of a mailbox is leaked");
                sp.leak(area, error);
            }
        }
    }
}

fn failure(command: Command, status: Status) -> Error {
    Failure {
        operation: Operation::Command(command),
        code: status.0,
    }
    .into()
}

// The certificates are the largest of what lies in one place, and the places are apart enough.
const _: () = {
    assert!(MAX_BLOB as u64 <= IN[1] - IN[0] && PAGE as u64 == PAGE_SIZE);
    assert!(OUT[1] + MAX_BLOB as u64 <= OUT[0] + OUT_PAGES * PAGE_SIZE);
};
