//! SEV guests over the software AMD SP: the nested page table and the host's answers are the test's.

use kvm_ops_guest::sev::{
    GhcbMsrPort, HypercallPort, Pvalidate, PvalidatePort, RmpCode, Rmpadjust, RmpadjustPort,
    SevGuest, Validated,
};
use kvm_ops_guest::{GpaRange, PageSize as GuestSize, Privacy};
use soft_amd_sp::{
    AccessFault, Command, CommandBuffer, GuestPage, GuestRmpError, PageSize, Platform, RmpAdjust,
    RmpError, RmpUpdate, Status,
};
use std::collections::BTreeMap;

pub const LARGE: u64 = 2 << 20;
pub const ASID: u32 = 1;
/// An ASID of the range for plain SEV.
const SEV_ASID: u32 = 6;
const GCTX: u64 = 0x1000;
const TMR: u64 = 0x20_0000;
const LAUNCHED: u64 = 0x10_0000;
const SCRATCH: u64 = 0x40_0000;
/// Pages that hosts give out.
const POOL: u64 = 0x80_0000;

fn run(p: &Platform, command: Command, fields: &[(&str, u64)]) -> CommandBuffer {
    let mut buffer = CommandBuffer::new(command);
    for (name, value) in fields {
        buffer = buffer.with(name, *value);
    }
    let status = p.run(&mut buffer);
    assert_eq!(status.ok(), Ok(()), "{command}");
    buffer
}

/// The host's reaction to a page state change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageStateAnswer {
    /// Does it, and says so.
    Honest,
    /// Does it with 2 MiB pages where one is free.
    Large,
    /// Says so, and does nothing.
    Pretend,
    /// Refuses.
    Refuse,
    /// A response with this value.
    Raw(u64),
}

/// A machine with one guest, its nested page table and its host.
pub struct Machine {
    pub p: Platform,
    pub asid: u32,
    /// 4 KiB guest pages to host pages; a large page has its size at each of its pieces.
    npt: BTreeMap<u64, (u64, PageSize)>,
    next: u64,
    pub answer: PageStateAnswer,
    /// The host's answers to other requests, by code.
    pub msr: BTreeMap<u64, u64>,
    /// The host's answers to hypercalls.
    pub rax: u64,
    pub hypercalls: Vec<(u64, [u64; 4])>,
    pub requests: Vec<u64>,
    pub pvalidates: Vec<(Pvalidate, Validated)>,
}

/// Why a guest's access or PVALIDATE did not come back to it: the host did not enter it again.
#[derive(Debug, PartialEq, Eq)]
pub struct Stuck(pub AccessFault);

impl Machine {
    fn with(p: Platform, asid: u32) -> Self {
        Machine {
            p,
            asid,
            npt: BTreeMap::new(),
            next: POOL,
            answer: PageStateAnswer::Honest,
            msr: BTreeMap::new(),
            rax: 0,
            hypercalls: Vec::new(),
            requests: Vec::new(),
            pvalidates: Vec::new(),
        }
    }

    fn builder() -> soft_amd_sp::Builder {
        Platform::builder()
            .memory(64 << 20)
            .cores(2)
            .asids(SEV_ASID, 12)
            .seed(1)
    }

    /// An SNP guest that runs.
    pub fn snp() -> Self {
        let p = Self::builder().build().expect("a machine");
        p.enable_snp_all();
        assert_eq!(p.command(Command::SNP_INIT, &mut []), Status::SUCCESS);
        p.wbinvd_all();
        assert_eq!(p.command(Command::SNP_DF_FLUSH, &mut []), Status::SUCCESS);
        p.rmpupdate(GCTX, &RmpUpdate::firmware()).expect("free");
        let gctx = ("gctx_paddr", GCTX);
        run(&p, Command::SNP_GCTX_CREATE, &[gctx]);
        run(&p, Command::SNP_LAUNCH_START, &[gctx, ("policy", 0x3_0000)]);
        run(&p, Command::SNP_ACTIVATE, &[gctx, ("asid", ASID.into())]);
        run(&p, Command::SNP_LAUNCH_FINISH, &[gctx]);
        Self::with(p, ASID)
    }

    /// An SEV or SEV-ES guest that runs.
    pub fn legacy(es: bool) -> Self {
        const ES_POLICY: u64 = 1 << 2;
        let (policy, asid) = if es { (ES_POLICY, ASID) } else { (0, SEV_ASID) };
        let p = Self::builder().build().expect("a machine");
        let tmr = [("flags", 1), ("tmr_address", TMR), ("tmr_len", 1 << 20)];
        run(&p, Command::INIT, &tmr);
        p.wbinvd_all();
        assert_eq!(p.command(Command::DF_FLUSH, &mut []), Status::SUCCESS);
        let start = run(&p, Command::LAUNCH_START, &[("policy", policy)]);
        let handle = ("handle", start.get("handle").expect("a field"));
        run(&p, Command::ACTIVATE, &[handle, ("asid", asid.into())]);
        let page = [handle, ("address", LAUNCHED), ("len", 4096)];
        run(&p, Command::LAUNCH_UPDATE_DATA, &page);
        let out = [handle, ("address", SCRATCH), ("len", 48)];
        run(&p, Command::LAUNCH_MEASURE, &out);
        run(&p, Command::LAUNCH_FINISH, &[handle]);
        Self::with(p, asid)
    }

    /// A page that is free.
    pub fn page(&mut self, size: PageSize) -> u64 {
        let bytes = if size == PageSize::Size2M {
            LARGE
        } else {
            0x1000
        };
        let page = self.next.next_multiple_of(bytes);
        self.next = page + bytes;
        page
    }

    /// Points a guest page at a host page.
    pub fn map(&mut self, gpa: u64, spa: u64, size: PageSize) {
        let pieces = if size == PageSize::Size2M { 512 } else { 1 };
        for piece in 0..pieces {
            let offset = piece * 0x1000;
            self.npt.insert(gpa + offset, (spa + offset, size));
        }
    }

    /// The host address of a guest page.
    pub fn behind(&self, gpa: u64) -> u64 {
        self.npt[&(gpa & !0xFFF)].0 | gpa & 0xFFF
    }

    /// Gives a new page to an SNP guest, not validated.
    pub fn assign(&mut self, gpa: u64, size: PageSize) -> u64 {
        let spa = self.page(size);
        let update = RmpUpdate::guest(self.asid, gpa).size(size);
        self.p.rmpupdate(spa, &update).expect("a free page");
        self.map(gpa, spa, size);
        spa
    }

    /// Gives host memory at a guest page: all that a guest without SNP needs.
    pub fn back(&mut self, gpa: u64) -> u64 {
        let spa = self.page(PageSize::Size4K);
        self.map(gpa, spa, PageSize::Size4K);
        spa
    }

    /// Splits the large page around a guest page, as KVM does on a size mismatch.
    fn split(&mut self, gpa: u64) {
        let head = gpa & !(LARGE - 1);
        let spa = self.behind(head);
        self.p.psmash(spa).expect("a large page");
        for piece in 0..512 {
            let offset = piece * 0x1000;
            self.map(head + offset, spa + offset, PageSize::Size4K);
        }
    }

    fn guest_page(&self, gpa: u64) -> Option<GuestPage> {
        let (spa, mapping) = *self.npt.get(&(gpa & !0xFFF))?;
        Some(GuestPage::new(self.asid, gpa, spa | gpa & 0xFFF).mapping(mapping))
    }

    /// The guest's access; faults that an honest host can cure are cured.
    fn access(
        &mut self,
        gpa: u64,
        mut run: impl FnMut(&Platform, &GuestPage) -> Result<(), AccessFault>,
    ) -> Result<(), AccessFault> {
        let page = self
            .guest_page(gpa)
            .ok_or(AccessFault::NestedPage { gpa, error_code: 0 })?;
        match run(&self.p, &page) {
            Err(fault) if fault.is_size_mismatch() => {
                self.split(gpa);
                let page = self.guest_page(gpa).ok_or(fault)?;
                run(&self.p, &page)
            }
            result => result,
        }
    }

    pub fn read(&mut self, gpa: u64, len: usize) -> Result<Vec<u8>, AccessFault> {
        let mut data = vec![0; len];
        self.access(gpa, |p, page| p.guest_read(page, &mut data))?;
        Ok(data)
    }

    pub fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), AccessFault> {
        self.access(gpa, |p, page| p.guest_write(page, data))
    }

    pub fn read_shared(&mut self, gpa: u64, len: usize) -> Result<Vec<u8>, AccessFault> {
        let mut data = vec![0; len];
        self.access(gpa, |p, page| p.guest_read_shared(page, &mut data))?;
        Ok(data)
    }

    pub fn write_shared(&mut self, gpa: u64, data: &[u8]) -> Result<(), AccessFault> {
        self.access(gpa, |p, page| p.guest_write_shared(page, data))
    }

    pub fn host_read(&self, spa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.p.host_read(spa, &mut data).expect("ram");
        data
    }

    /// A kernel on this machine.
    pub fn kernel(&mut self) -> SevGuest<&mut Self> {
        SevGuest::new(self, true)
    }

    fn page_state(&mut self, request: u64) -> u64 {
        const DONE: u64 = 0x015;
        let gpa = request & 0x000F_FFFF_FFFF_F000;
        let to = match request >> 52 & 0xF {
            1 => Privacy::Private,
            2 => Privacy::Shared,
            other => panic!("page state {other}"),
        };
        match self.answer {
            PageStateAnswer::Honest => self.change(gpa, to),
            PageStateAnswer::Large => self.change_large(gpa, to),
            PageStateAnswer::Pretend => {}
            PageStateAnswer::Refuse => return 1 << 63 | DONE,
            PageStateAnswer::Raw(response) => return response,
        }
        DONE
    }

    fn change(&mut self, gpa: u64, to: Privacy) {
        let (spa, size) = match self.npt.get(&gpa) {
            Some(mapped) => *mapped,
            None => (self.back(gpa), PageSize::Size4K),
        };
        if size == PageSize::Size2M {
            self.split(gpa);
        }
        let update = match to {
            Privacy::Private => RmpUpdate::guest(self.asid, gpa),
            Privacy::Shared => RmpUpdate::shared(),
        };
        self.p.rmpupdate(spa, &update).expect("changed");
    }

    /// Makes the 2 MiB around a page private at once, whatever was asked.
    fn change_large(&mut self, gpa: u64, to: Privacy) {
        let head = gpa & !(LARGE - 1);
        match self.npt.get(&gpa) {
            None if to == Privacy::Private => {
                self.assign(head, PageSize::Size2M);
            }
            _ if to == Privacy::Shared => self.change(gpa, to),
            _ => {}
        }
    }
}

impl GhcbMsrPort for &mut Machine {
    fn exchange(&mut self, request: u64) -> u64 {
        self.requests.push(request);
        match request & 0xFFF {
            0x014 => self.page_state(request),
            // As KVM does with a code that it does not know.
            code => self.msr.get(&code).copied().unwrap_or(request),
        }
    }
}

impl HypercallPort for &mut Machine {
    fn hypercall(&mut self, nr: u64, args: [u64; 4]) -> u64 {
        self.hypercalls.push((nr, args));
        self.rax
    }
}

fn size_of(size: GuestSize) -> PageSize {
    match size {
        GuestSize::Size4K => PageSize::Size4K,
        GuestSize::Size2M => PageSize::Size2M,
        GuestSize::Size1G => panic!("no such operand"),
    }
}

impl PvalidatePort for &mut Machine {
    /// A fault goes to the host; one that it cannot or will not cure ends the run with [`Stuck`].
    fn pvalidate(&mut self, operation: Pvalidate) -> Validated {
        let size = size_of(operation.size);
        for _ in 0..2 {
            let page = self.guest_page(operation.gpa);
            let missing = AccessFault::NestedPage {
                gpa: operation.gpa,
                error_code: 0,
            };
            let result = match page {
                Some(page) => self.p.pvalidate(&page, size, operation.validate),
                None => Err(GuestRmpError::Fault(missing)),
            };
            let code = match result {
                Ok(changed) => {
                    let done = Validated {
                        code: RmpCode::SUCCESS,
                        unchanged: !changed,
                    };
                    self.pvalidates.push((operation, done));
                    return done;
                }
                Err(GuestRmpError::Code(code)) => code,
                Err(GuestRmpError::Fault(fault)) if fault.is_size_mismatch() => {
                    self.split(operation.gpa);
                    continue;
                }
                Err(GuestRmpError::Fault(fault)) => {
                    std::panic::resume_unwind(Box::new(Stuck(fault)))
                }
                Err(other) => panic!("{other}"),
            };
            let done = Validated {
                code: rmp_code(code),
                unchanged: false,
            };
            self.pvalidates.push((operation, done));
            return done;
        }
        panic!("a split page does not mismatch again");
    }
}

impl RmpadjustPort for &mut Machine {
    fn rmpadjust(&mut self, operation: Rmpadjust) -> RmpCode {
        let page = self.guest_page(operation.gpa).expect("mapped");
        let adjust = RmpAdjust {
            target_vmpl: operation.operand() as u8,
            permissions: (operation.operand() >> 8) as u8,
            vmsa: operation.operand() >> 16 & 1 != 0,
        };
        match self.p.rmpadjust(&page, size_of(operation.size), &adjust) {
            Ok(()) => RmpCode::SUCCESS,
            Err(GuestRmpError::Code(code)) => rmp_code(code),
            Err(GuestRmpError::Fault(fault)) => std::panic::resume_unwind(Box::new(Stuck(fault))),
            Err(other) => panic!("{other}"),
        }
    }
}

fn rmp_code(error: RmpError) -> RmpCode {
    RmpCode(error.code().expect("a code"))
}

/// Runs a guest's code; the error is the fault at which the host left it.
pub fn until_stuck<R>(run: impl FnOnce() -> R) -> Result<R, Stuck> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(result) => Ok(result),
        Err(cause) => match cause.downcast::<Stuck>() {
            Ok(stuck) => Err(*stuck),
            Err(other) => std::panic::resume_unwind(other),
        },
    }
}

pub fn range(start: u64, bytes: u64) -> GpaRange {
    GpaRange::new(start, bytes).expect("a range")
}
