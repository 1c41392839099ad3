//! The secure processor, the RMP and physical memory: typed commands, pages on the VM's account, and
//! errors that name the command.

use alloc::vec;
use alloc::vec::Vec;

use kvm_ops::{
    Error, Field, Gfn, Host, Hpa, Level, PAGE_SIZE, Page, PageAccount, PagePort, Pfn, PspPort,
    Result,
};
use zerocopy::little_endian::U64;

use crate::command::{self, Buffer, Command};
use crate::status::{Failure, Instruction, Operation, Status};
use crate::trace;

/// The most tries of an RMP instruction whose entry is in use, or has another size for the moment.
/// Linux tries RMPUPDATE without bound.
const RMP_TRIES: u32 = 16;
/// Codes of RMPUPDATE and PSMASH (APM vol. 3; Linux `asm/sev.h`).
const FAIL_INUSE: u32 = 3;
const FAIL_OVERLAP: u32 = 4;

/// The RMP state of a page of the VM, and with it the way back to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// The page is the host's. All pages without SNP.
    Host,
    /// Assigned: RMPUPDATE takes it back.
    Assigned,
    /// Immutable: SNP_PAGE_RECLAIM comes first.
    Immutable,
}

/// The operand of RMPUPDATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RmpEntry {
    Shared,
    Firmware,
    Guest {
        asid: u32,
        gpa: u64,
        immutable: bool,
    },
}

impl RmpEntry {
    /// Guest address, assigned, page size, immutable, reserved, ASID (Linux `struct rmp_state`).
    fn bytes(self, level: Level) -> [u8; 16] {
        let (gpa, assigned, immutable, asid) = match self {
            Self::Shared => (0, 0, 0, 0),
            Self::Firmware => (0, 1, 1, 0),
            Self::Guest {
                asid,
                gpa,
                immutable,
            } => (gpa, 1, u8::from(immutable), asid),
        };
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&u64::to_le_bytes(gpa));
        entry[8] = assigned;
        entry[9] = u8::from(level == Level::Size2M);
        entry[10] = immutable;
        entry[12..].copy_from_slice(&u32::to_le_bytes(asid));
        entry
    }
}

/// The ports below, with the account of the pages that are taken from them.
pub(crate) struct Sp<'a, H: Host> {
    pub(crate) psp: &'a H::Psp,
    pub(crate) pages: &'a H::Pages,
    pub(crate) account: &'a PageAccount,
}

impl<'a, H: Host> Sp<'a, H> {
    pub(crate) fn new(psp: &'a H::Psp, pages: &'a H::Pages, account: &'a PageAccount) -> Self {
        Self {
            psp,
            pages,
            account,
        }
    }

    /// `None` on a host without an AMD SP or pages.
    pub(crate) fn of(host: &'a H, account: &'a PageAccount) -> Option<Self> {
        Some(Self::new(host.psp()?, host.pages()?, account))
    }

    pub(crate) fn has_snp(&self) -> bool {
        self.psp.asid_pools().has_snp()
    }

    // --- Commands ---

    /// Issues a command. The firmware's answer is in the buffer after a failure too.
    pub(crate) fn run<B: Buffer>(&self, command: Command, buffer: &mut B) -> Result<()> {
        debug_assert!(B::COMMANDS.contains(&command));
        self.issue(command, buffer.as_mut_bytes())
    }

    #[allow(unsafe_code)]
    fn issue(&self, command: Command, buffer: &mut [u8]) -> Result<()> {
        // SAFETY: each page among the operands is one that the caller owns as a `Page` or that the VM's
        // tables own, and it is given to firmware by the RMP before and taken back after.
        let status = unsafe { self.psp.command(command as u32, buffer) }?;
        let status = Status(status);
        trace::command(command, buffer, status);
        if status == Status::SUCCESS {
            return Ok(());
        }
        Err(refused(Operation::Command(command), status.0))
    }

    /// WBINVD everywhere, then DF_FLUSH, so that released ASIDs may be bound again.
    pub(crate) fn flush(&self) -> Result<()> {
        self.psp.wbinvd_all();
        let command = match self.has_snp() {
            true => Command::SnpDfFlush,
            false => Command::DfFlush,
        };
        self.issue(command, &mut [])
    }

    // --- RMP ---

    fn retry(
        &self,
        instruction: Instruction,
        at: Hpa,
        transient: &[u32],
        once: impl Fn() -> Result<u32>,
    ) -> Result<()> {
        let once = || once().inspect(|code| trace::instruction(instruction, at.get(), *code));
        let mut code = once()?;
        for _ in 1..RMP_TRIES {
            if !transient.contains(&code) {
                break;
            }
            self.psp.relax();
            code = once()?;
        }
        if code == 0 {
            return Ok(());
        }
        Err(refused(Operation::Instruction(instruction), code))
    }

    /// RMPUPDATE. Nothing to do without SNP.
    #[allow(unsafe_code)]
    pub(crate) fn rmpupdate(&self, page: Pfn, level: Level, entry: RmpEntry) -> Result<()> {
        if !self.has_snp() {
            return Ok(());
        }
        let (at, entry) = (base(page)?, entry.bytes(level));
        let transient = [FAIL_INUSE, FAIL_OVERLAP];
        // SAFETY: the page is the caller's: a `Page` that it holds, or one of the VM's tables.
        self.retry(Instruction::RmpUpdate, at, &transient, || unsafe {
            self.psp.rmpupdate(at, &entry)
        })
    }

    /// PSMASH: from one 2 MiB entry to 512.
    #[allow(unsafe_code)]
    pub(crate) fn psmash(&self, page: Pfn) -> Result<()> {
        if !self.has_snp() {
            return Ok(());
        }
        let at = base(page)?;
        // SAFETY: the page is one of the VM's tables.
        self.retry(Instruction::Psmash, at, &[FAIL_INUSE], || unsafe {
            self.psp.psmash(at)
        })
    }

    /// Gives a page to a guest. It must be the host's: assigning it twice would take it from
    /// another guest unseen (Linux checks so too, and answers EEXIST).
    pub(crate) fn assign(&self, page: &Page, asid: u32, gfn: Gfn, immutable: bool) -> Result<()> {
        if !self.has_snp() {
            return Ok(());
        }
        let at = page.hpa();
        if self.psp.rmpread(at)?[8] != 0 {
            return Err(Error::Exists(Field::HostAddress, at.get()));
        }
        let gpa = gfn.base().ok_or(Error::Invalid(Field::Gfn, gfn.get()))?;
        let entry = RmpEntry::Guest {
            asid,
            gpa: gpa.get(),
            immutable,
        };
        self.rmpupdate(page.pfn(), page.level(), entry)
    }

    /// The size of the page that the RMP has there. `None` without SNP or an entry.
    pub(crate) fn rmp_level(&self, page: Pfn) -> Option<Level> {
        let entry = self.psp.rmpread(page.base()?).ok()?;
        Some(match entry[9] & 1 {
            0 => Level::Size4K,
            _ => Level::Size2M,
        })
    }

    /// SNP_PAGE_RECLAIM, which makes a page mutable.
    pub(crate) fn reclaim(&self, page: Pfn, level: Level) -> Result<()> {
        let is_large = u64::from(level == Level::Size2M);
        let mut buffer = command::SnpPageReclaim {
            paddr: U64::new(base(page)?.get() | is_large),
        };
        self.run(Command::SnpPageReclaim, &mut buffer)
    }

    /// Makes a page the host's again.
    pub(crate) fn take_back(&self, page: Pfn, level: Level, held: Held) -> Result<()> {
        if held == Held::Host || !self.has_snp() {
            return Ok(());
        }
        if held == Held::Immutable {
            self.reclaim(page, level)?;
        }
        self.rmpupdate(page, level, RmpEntry::Shared)
    }

    // --- Pages ---

    /// Takes a page from the host.
    pub(crate) fn alloc(&self, level: Level) -> Result<Page> {
        self.account.take(self.pages, level)
    }

    /// A page that is not at the start of 2 MiB: a VMSA there is taken for a large page in use
    /// (Linux `snp_alloc_vmsa_page`, AMD erratum 1415).
    pub(crate) fn alloc_vmsa(&self) -> Result<Page> {
        let page = self.alloc(Level::Size4K)?;
        if !page.pfn().is_aligned(Level::Size2M) {
            return Ok(page);
        }
        let other = self.alloc(Level::Size4K);
        self.free(page);
        match other {
            Ok(other) if other.pfn().is_aligned(Level::Size2M) => {
                self.free(other);
                Err(Error::NoMemory)
            }
            other => other,
        }
    }

    /// A page in Firmware state.
    pub(crate) fn firmware_page(&self, level: Level) -> Result<Page> {
        let page = self.alloc(level)?;
        match self.rmpupdate(page.pfn(), level, RmpEntry::Firmware) {
            Ok(()) => Ok(page),
            Err(error) => {
                self.free(page);
                Err(error)
            }
        }
    }

    /// A page in Firmware state, of which a command makes something. `buffer` has the page's address for the command.
    pub(crate) fn made_by<B: Buffer>(
        &self,
        command: Command,
        buffer: impl FnOnce(u64) -> B,
    ) -> Result<Page> {
        let page = self.firmware_page(Level::Size4K)?;
        match self.run(command, &mut buffer(page.hpa().get())) {
            Ok(()) => Ok(page),
            Err(error) => {
                // A command that failed leaves the page in Firmware state.
                let _ = self.release(page, Held::Immutable);
                Err(error)
            }
        }
    }

    /// Gives a page back that is the host's.
    pub(crate) fn free(&self, page: Page) {
        self.account.give_back(self.pages, page);
    }

    /// Lists a page as lost for good.
    pub(crate) fn leak(&self, page: Page, error: Error) {
        self.account.leak(page, operation(&error), error);
    }

    /// Takes a page back and frees it, or leaks it for good.
    ///
    /// # Errors
    /// Why it is leaked.
    pub(crate) fn release(&self, page: Page, held: Held) -> Result<()> {
        match self.take_back(page.pfn(), page.level(), held) {
            Ok(()) => {
                self.free(page);
                Ok(())
            }
            Err(error) => {
                self.leak(page, error);
                Err(error)
            }
        }
    }

    pub(crate) fn write(&self, page: &Page, data: &[u8]) -> Result<()> {
        self.pages.write(page.hpa(), data)
    }

    pub(crate) fn read(&self, page: &Page, data: &mut [u8]) -> Result<()> {
        self.pages.read(page.hpa(), data)
    }

    // --- Buffers in memory ---

    /// Lends a page that holds `data`, at most 2 MiB, to a command that reads it. 0 for no data.
    pub(crate) fn with_input<T>(
        &self,
        data: &[u8],
        body: impl FnOnce(u64) -> Result<T>,
    ) -> Result<T> {
        if data.is_empty() {
            return body(0);
        }
        // In one piece: more than a page of 4 KiB, as a certificate may be, takes a larger one.
        let level = match data.len() as u64 {
            0..=PAGE_SIZE => Level::Size4K,
            len if len <= Level::Size2M.bytes() => Level::Size2M,
            len => return Err(Error::Invalid(Field::BufferLength, len)),
        };
        let page = self.alloc(level)?;
        let done = self
            .write(&page, data)
            .and_then(|()| body(page.hpa().get()));
        self.free(page);
        done
    }

    /// Lends a page to a command that writes it, and returns the first `len` bytes of it with the
    /// result of `body`. With SNP the firmware writes only pages in Firmware state.
    pub(crate) fn with_output<T>(
        &self,
        len: usize,
        body: impl FnOnce(u64) -> Result<T>,
    ) -> Result<(T, Vec<u8>)> {
        if len as u64 > PAGE_SIZE {
            return Err(Error::Invalid(Field::BufferLength, len as u64));
        }
        let page = self.firmware_page(Level::Size4K)?;
        let done = body(page.hpa().get());
        // The host may read a page that it may not write.
        let mut data = vec![0; len];
        let read = self.read(&page, &mut data);
        // The command is done, even if the firmware keeps the page, which is listed then.
        let _ = self.release(page, Held::Immutable);
        let done = done?;
        read.map(|()| (done, data))
    }

    /// Lends a guest's page to a legacy command that writes it, and takes it back. Returns the RMP
    /// state of the page afterwards.
    pub(crate) fn in_place<T>(
        &self,
        page: &Page,
        body: impl FnOnce(u64) -> Result<T>,
    ) -> (Held, Result<T>) {
        self.lend(page.pfn(), body)
    }

    /// The same for the number of a page that the guest has, of 4 KiB.
    pub(crate) fn lend<T>(
        &self,
        pfn: Pfn,
        body: impl FnOnce(u64) -> Result<T>,
    ) -> (Held, Result<T>) {
        let at = match base(pfn) {
            Ok(at) => at.get(),
            Err(error) => return (Held::Host, Err(error)),
        };
        if let Err(error) = self.rmpupdate(pfn, Level::Size4K, RmpEntry::Firmware) {
            return (Held::Host, Err(error));
        }
        let done = body(at);
        match self.take_back(pfn, Level::Size4K, Held::Immutable) {
            Ok(()) => (Held::Host, done),
            Err(error) => (Held::Immutable, Err(error)),
        }
    }
}

/// The caller's error for a command or an instruction that failed, as an event too.
#[cold]
fn refused(operation: Operation, code: u32) -> Error {
    let failure = Failure { operation, code };
    tracing::debug!("{failure}");
    failure.into()
}

/// The operation that an error names.
pub(crate) fn operation(error: &Error) -> &'static str {
    match Failure::of(error) {
        Some(failure) => failure.operation.name(),
        None => "mailbox",
    }
}

/// The address of a page.
pub(crate) fn base(page: Pfn) -> Result<Hpa> {
    page.base()
        .ok_or(Error::Invalid(Field::HostAddress, page.get()))
}
