//! The secure processor, the RMP and physical memory, as the rest of the back end uses them: typed
//! commands, pages that are counted, and errors that name the command.

use alloc::vec;
use alloc::vec::Vec;

use kvm_ops::{Error, Field, Gfn, Host, Hpa, Level, PAGE_SIZE, PagePort, Pfn, PspPort, Result};
use zerocopy::little_endian::U64;

use crate::books::Books;
use crate::command::{self, Buffer, Command};
use crate::status::{Failure, Instruction, Operation, Status};

/// How often an RMP instruction is tried that found its entry in use, or of another size for the
/// moment. Linux tries RMPUPDATE without bound.
const RMP_TRIES: u32 = 16;
/// Codes of RMPUPDATE and PSMASH (APM vol. 3; Linux `asm/sev.h`).
const FAIL_INUSE: u32 = 3;
const FAIL_OVERLAP: u32 = 4;

/// What the RMP says of a page of ours, and so what must be done before the host may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// It is the host's: nothing to be done. All pages without SNP.
    Host,
    /// It is assigned: RMPUPDATE takes it back.
    Assigned,
    /// It is immutable: SNP_PAGE_RECLAIM comes first.
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

/// Everything below, with the account of what was taken from it.
pub(crate) struct Sp<'a, H: Host> {
    pub(crate) psp: &'a H::Psp,
    pages: &'a H::Pages,
    pub(crate) books: &'a Books,
}

impl<'a, H: Host> Sp<'a, H> {
    pub(crate) fn new(psp: &'a H::Psp, pages: &'a H::Pages, books: &'a Books) -> Self {
        Self { psp, pages, books }
    }

    /// `None` on a host without an AMD SP or pages.
    pub(crate) fn of(host: &'a H, books: &'a Books) -> Option<Self> {
        Some(Self::new(host.psp()?, host.pages()?, books))
    }

    pub(crate) fn has_snp(&self) -> bool {
        self.psp.asid_pools().has_snp()
    }

    // --- Commands ---

    /// Issues a command. What the firmware wrote into the buffer is there after a failure too.
    pub(crate) fn run<B: Buffer>(&self, command: Command, buffer: &mut B) -> Result<()> {
        debug_assert!(B::COMMANDS.contains(&command));
        self.issue(command, buffer.as_mut_bytes())
    }

    fn issue(&self, command: Command, buffer: &mut [u8]) -> Result<()> {
        match Status(self.psp.command(command as u32, buffer)?) {
            Status::SUCCESS => Ok(()),
            Status(code) => Err(Failure {
                operation: Operation::Command(command),
                code,
            }
            .into()),
        }
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
        transient: &[u32],
        mut once: impl FnMut() -> Result<u32>,
    ) -> Result<()> {
        let mut code = once()?;
        for _ in 1..RMP_TRIES {
            if !transient.contains(&code) {
                break;
            }
            self.psp.relax();
            code = once()?;
        }
        match code {
            0 => Ok(()),
            code => Err(Failure {
                operation: Operation::Instruction(instruction),
                code,
            }
            .into()),
        }
    }

    /// RMPUPDATE. Nothing to do without SNP.
    pub(crate) fn rmpupdate(&self, page: Pfn, level: Level, entry: RmpEntry) -> Result<()> {
        if !self.has_snp() {
            return Ok(());
        }
        let (at, entry) = (base(page)?, entry.bytes(level));
        let transient = [FAIL_INUSE, FAIL_OVERLAP];
        self.retry(Instruction::RmpUpdate, &transient, || {
            self.psp.rmpupdate(at, &entry)
        })
    }

    /// PSMASH: from one 2 MiB entry to 512.
    pub(crate) fn psmash(&self, page: Pfn) -> Result<()> {
        if !self.has_snp() {
            return Ok(());
        }
        let at = base(page)?;
        self.retry(Instruction::Psmash, &[FAIL_INUSE], || self.psp.psmash(at))
    }

    /// Gives a page to a guest. It must be the host's: assigning it twice would take it from
    /// another guest unseen (Linux checks so too, and answers EEXIST).
    pub(crate) fn assign(
        &self,
        page: Pfn,
        level: Level,
        asid: u32,
        gfn: Gfn,
        immutable: bool,
    ) -> Result<()> {
        if !self.has_snp() {
            return Ok(());
        }
        let at = base(page)?;
        if self.psp.rmpread(at)?[8] != 0 {
            return Err(Error::Exists(Field::HostAddress, at.get()));
        }
        let gpa = gfn.base().ok_or(Error::Invalid(Field::Gfn, gfn.get()))?;
        let entry = RmpEntry::Guest {
            asid,
            gpa: gpa.get(),
            immutable,
        };
        self.rmpupdate(page, level, entry)
    }

    /// The size of the page that the RMP has there. `None` without SNP or an entry.
    pub(crate) fn rmp_level(&self, page: Pfn) -> Option<Level> {
        let entry = self.psp.rmpread(page.base()?).ok()?;
        Some(match entry[9] & 1 {
            0 => Level::Size4K,
            _ => Level::Size2M,
        })
    }

    /// SNP_PAGE_RECLAIM of every 4 KiB page: what was immutable is so no more.
    fn reclaim(&self, page: Pfn) -> Result<()> {
        let mut buffer = command::SnpPageReclaim {
            paddr: U64::new(base(page)?.get()),
        };
        self.run(Command::SnpPageReclaim, &mut buffer)
    }

    /// Makes a page the host's again.
    pub(crate) fn take_back(&self, page: Pfn, level: Level, held: Held) -> Result<()> {
        if held == Held::Host || !self.has_snp() {
            return Ok(());
        }
        if held == Held::Immutable {
            self.reclaim(page)?;
        }
        self.rmpupdate(page, level, RmpEntry::Shared)
    }

    // --- Pages ---

    /// Takes a page from the host.
    pub(crate) fn alloc(&self, level: Level) -> Result<Pfn> {
        let page = self.pages.alloc(level)?;
        self.books.allocated(level);
        Ok(page)
    }

    /// A page that is not at the start of 2 MiB: a VMSA there is taken for a large page in use
    /// (Linux `snp_alloc_vmsa_page`, AMD erratum 1415).
    pub(crate) fn alloc_vmsa(&self) -> Result<Pfn> {
        let page = self.alloc(Level::Size4K)?;
        if !page.is_aligned(Level::Size2M) {
            return Ok(page);
        }
        let other = self.alloc(Level::Size4K);
        self.free(page, Level::Size4K);
        match other {
            Ok(other) if other.is_aligned(Level::Size2M) => {
                self.free(other, Level::Size4K);
                Err(Error::NoMemory)
            }
            other => other,
        }
    }

    /// Gives a page back that is the host's.
    pub(crate) fn free(&self, page: Pfn, level: Level) {
        self.pages.free(page, level);
        self.books.freed(level);
    }

    /// Takes a page back and frees it, or leaks it for good.
    ///
    /// # Errors
    /// Why it is leaked.
    pub(crate) fn release(&self, page: Pfn, level: Level, held: Held) -> Result<()> {
        match self.take_back(page, level, held) {
            Ok(()) => {
                self.free(page, level);
                Ok(())
            }
            Err(error) => {
                self.books.leak_page(page, level, error);
                Err(error)
            }
        }
    }

    pub(crate) fn write(&self, page: Pfn, data: &[u8]) -> Result<()> {
        self.pages.write(base(page)?, data)
    }

    pub(crate) fn read(&self, page: Pfn, data: &mut [u8]) -> Result<()> {
        self.pages.read(base(page)?, data)
    }

    // --- Buffers in memory ---

    /// Lends a page that holds `data` to a command that reads it. 0 for no data.
    pub(crate) fn with_input<T>(
        &self,
        data: &[u8],
        body: impl FnOnce(u64) -> Result<T>,
    ) -> Result<T> {
        if data.is_empty() {
            return body(0);
        }
        if data.len() as u64 > PAGE_SIZE {
            return Err(Error::Invalid(Field::BufferLength, data.len() as u64));
        }
        let page = self.alloc(Level::Size4K)?;
        let done = base(page)
            .and_then(|at| self.pages.write(at, data).map(|()| at.get()))
            .and_then(body);
        self.free(page, Level::Size4K);
        done
    }

    /// Lends a page to a command that writes it, and answers the first `len` bytes of it with what
    /// `body` answered. With SNP the firmware writes only pages in Firmware state.
    pub(crate) fn with_output<T>(
        &self,
        len: usize,
        body: impl FnOnce(u64) -> Result<T>,
    ) -> Result<(T, Vec<u8>)> {
        if len as u64 > PAGE_SIZE {
            return Err(Error::Invalid(Field::BufferLength, len as u64));
        }
        let page = self.alloc(Level::Size4K)?;
        if let Err(error) = self.rmpupdate(page, Level::Size4K, RmpEntry::Firmware) {
            self.free(page, Level::Size4K);
            return Err(error);
        }
        let done = base(page).and_then(|at| body(at.get()));
        // The host may read what it may not write.
        let mut data = vec![0; len];
        let read = self.read(page, &mut data);
        // A page that the firmware keeps is leaked and listed; what the command did is done.
        let _ = self.release(page, Level::Size4K, Held::Immutable);
        let done = done?;
        read.map(|()| (done, data))
    }

    /// Lends a guest's page to a legacy command that writes it, and takes it back. Answers in which
    /// hands the page is afterwards.
    pub(crate) fn in_place<T>(
        &self,
        page: Pfn,
        body: impl FnOnce(u64) -> Result<T>,
    ) -> (Held, Result<T>) {
        if let Err(error) = self.rmpupdate(page, Level::Size4K, RmpEntry::Firmware) {
            return (Held::Host, Err(error));
        }
        let done = base(page).and_then(|at| body(at.get()));
        match self.take_back(page, Level::Size4K, Held::Immutable) {
            Ok(()) => (Held::Host, done),
            Err(error) => (Held::Immutable, Err(error)),
        }
    }
}

/// The address of a page.
pub(crate) fn base(page: Pfn) -> Result<Hpa> {
    page.base()
        .ok_or(Error::Invalid(Field::HostAddress, page.get()))
}
