//! A TD whose guest is straight-line code on a separate thread, and whose host is the test.

use kvm_ops_guest::tdx::{Regs, TdGuest, TdcallPort, VmcallStatus};
use soft_tdx_module::{
    Event, GuestOp, HostLeaf as L, Outcome, Platform, Regs as ModuleRegs, Script, SeptState, Status,
};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

pub const SHARED: u64 = 1 << 47;
pub const LARGE: u64 = 2 << 20;
const HKID: u64 = 33;
const PARAMS: u64 = 0x10_0000;

/// Operands RCX and RDX.
pub fn regs(rcx: u64, rdx: u64) -> ModuleRegs {
    ModuleRegs {
        rcx,
        rdx,
        ..ModuleRegs::default()
    }
}

/// The host's side: a machine with one TD of one vCPU.
pub struct Host {
    pub p: Arc<Platform>,
    pub tdr: u64,
    tdvpr: u64,
    next: u64,
}

impl Host {
    /// A TD that can run, without any private page.
    pub fn new(attributes: u64) -> Self {
        let p = Platform::builder().seed(1).build().expect("a machine");
        p.bring_up().expect("bring-up");
        let mut host = Host {
            p: Arc::new(p),
            tdr: 0,
            tdvpr: 0,
            next: 0x4000_0000,
        };
        host.tdr = host.page(0);
        host.ok(L::MngCreate, regs(host.tdr, HKID));
        for lp_of_package in [0, 2] {
            host.p
                .call(lp_of_package, L::MngKeyConfig, regs(host.tdr, 0))
                .expect("key");
        }
        for _ in 0..6 {
            let page = host.page(0);
            host.ok(L::MngAddcx, regs(page, host.tdr));
        }
        for (offset, value) in [(0, attributes), (8, 3), (16, 4), (24, 0x1E), (40, 40)] {
            host.write(PARAMS + offset, &value.to_le_bytes());
        }
        host.ok(L::MngInit, regs(host.tdr, PARAMS));
        host.tdvpr = host.page(0);
        host.ok(L::VpCreate, regs(host.tdvpr, host.tdr));
        for _ in 0..5 {
            let page = host.page(0);
            host.ok(L::VpAddcx, regs(page, host.tdvpr));
        }
        host.ok(L::VpInit, regs(host.tdvpr, 0));
        host.ok(L::MrFinalize, regs(host.tdr, 0));
        host
    }

    /// A host page of a level.
    pub fn page(&mut self, level: u8) -> u64 {
        let size = 0x1000 << (9 * level);
        let page = self.next.next_multiple_of(size);
        self.next = page + size;
        page
    }

    pub fn write(&self, pa: u64, data: &[u8]) {
        self.p.write_memory(pa, data).expect("ram");
    }

    pub fn read(&self, pa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.p.read_memory(pa, &mut bytes).expect("ram");
        bytes
    }

    pub fn ok(&self, leaf: L, operands: ModuleRegs) -> ModuleRegs {
        self.p
            .call(0, leaf, operands)
            .unwrap_or_else(|e| panic!("{e} {operands:?}"))
    }

    pub fn status(&self, leaf: L, operands: ModuleRegs) -> Status {
        let mut r = ModuleRegs {
            rax: leaf.number(),
            ..operands
        };
        self.p.seamcall(0, &mut r).expect("executes")
    }

    /// The level and state at which a walk to `level` ends.
    pub fn entry(&self, gpa: u64, level: u8) -> (u8, SeptState) {
        let view = self.p.sept(self.tdr, gpa, level).expect("a td");
        (view.level, view.state)
    }

    /// The host page behind a private 4 KiB page.
    pub fn behind(&self, gpa: u64) -> u64 {
        let view = self.p.sept(self.tdr, gpa, 0).expect("a td");
        assert_eq!(view.state, SeptState::Mapped);
        view.entry & 0x000F_FFFF_FFFF_F000
    }

    fn tables(&mut self, gpa: u64, level: u8) {
        for l in ((level + 1)..=3).rev() {
            if self.entry(gpa, l) == (l, SeptState::Free) {
                let table = self.page(0);
                let at = gpa >> (12 + 9 * l) << (12 + 9 * l) | u64::from(l);
                self.give(L::MemSeptAdd, at, table);
            }
        }
    }

    fn give(&self, leaf: L, at: u64, page: u64) -> Status {
        let operands = ModuleRegs {
            r8: page,
            ..regs(at, self.tdr)
        };
        self.status(leaf, operands)
    }

    /// Gives `page` at a GPA.
    pub fn aug_page(&mut self, gpa: u64, level: u8, page: u64) -> Status {
        self.tables(gpa, level);
        self.give(L::MemPageAug, gpa | u64::from(level), page)
    }

    /// Gives a new page at a GPA.
    pub fn aug(&mut self, gpa: u64, level: u8) -> u64 {
        let page = self.page(level);
        assert_eq!(self.aug_page(gpa, level, page), Status::SUCCESS);
        page
    }

    /// Takes a page away, as the module wants it done.
    pub fn remove(&self, gpa: u64, level: u8) {
        let at = gpa | u64::from(level);
        self.ok(L::MemRangeBlock, regs(at, self.tdr));
        self.ok(L::MemTrack, regs(self.tdr, 0));
        self.ok(L::MemPageRemove, regs(at, self.tdr));
    }

    /// An honest host's answer to MapGPA: pages of 2 MiB where they fit and nothing is in the way.
    pub fn map_gpa(&mut self, gpa: u64, bytes: u64) {
        let shared = gpa & SHARED != 0;
        let mut at = gpa & !SHARED;
        let end = at + bytes;
        while at < end {
            let (level, state) = self.entry(at, 0);
            let present = matches!(state, SeptState::Mapped | SeptState::Pending);
            let done = match (shared, present) {
                (true, true) => {
                    self.remove(at, level);
                    level
                }
                (false, false) => {
                    let large = at.is_multiple_of(LARGE) && end - at >= LARGE && self.has_room(at);
                    self.aug(at, large.into());
                    large.into()
                }
                _ => 0,
            };
            at += 0x1000 << (9 * done);
        }
    }

    /// Returns whether nothing is mapped in the 2 MiB at a GPA, not even a table.
    fn has_room(&self, gpa: u64) -> bool {
        let (level, state) = self.entry(gpa, 1);
        level > 1 || state == SeptState::Free
    }

    fn enter(&self, answer: ModuleRegs) -> ModuleRegs {
        let mut r = ModuleRegs {
            rax: L::VpEnter.number(),
            rcx: self.tdvpr,
            ..answer
        };
        self.p.seamcall(0, &mut r).expect("executes");
        r
    }

    /// Runs the guest. `host` says what to do at each exit; the run ends with the guest's code, or
    /// when the host does not enter it again: then there is no result.
    pub fn run<R: Send>(
        &mut self,
        guest: impl FnOnce(&mut Guest) -> R + Send,
        mut host: impl FnMut(&mut Self, Exit) -> Reply,
    ) -> Option<R> {
        let (ops, from_guest) = channel();
        let (to_guest, outcomes) = channel();
        self.p.set_guest(self.tdvpr, program(from_guest, to_guest));
        let running = Running(self.p.clone(), self.tdvpr);
        std::thread::scope(|scope| {
            // Dropped before the scope waits for the thread, also where the host's code panics.
            let running = running;
            let thread = scope.spawn(move || {
                catch_unwind(AssertUnwindSafe(|| {
                    let start = outcomes.recv();
                    let mut cpu = Guest { ops, outcomes };
                    start.is_ok().then(|| guest(&mut cpu))
                }))
            });
            let mut answer = ModuleRegs::default();
            loop {
                let exit = Exit::from(self.enter(answer));
                if exit == Exit::Finished {
                    break;
                }
                answer = match host(self, exit) {
                    Reply::Enter => ModuleRegs::default(),
                    Reply::Status(status, r11) => ModuleRegs {
                        r10: status.0,
                        r11,
                        ..ModuleRegs::default()
                    },
                    Reply::Registers(regs) => regs,
                    Reply::Stop => break,
                };
            }
            drop(running);
            match thread.join().expect("caught") {
                Ok(result) => result,
                Err(cause) if cause.is::<Stopped>() => None,
                Err(cause) => resume_unwind(cause),
            }
        })
    }

    /// Runs the guest over an honest host.
    pub fn run_honestly<R: Send>(&mut self, guest: impl FnOnce(&mut Guest) -> R + Send) -> R {
        self.run(guest, |host, exit| match exit {
            Exit::MapGpa { gpa, bytes } => {
                host.map_gpa(gpa, bytes);
                Reply::Status(VmcallStatus::SUCCESS, 0)
            }
            other => panic!("unexpected {other:?}"),
        })
        .expect("an honest host lets its guest finish")
    }
}

/// The host's answer to an exit.
pub enum Reply {
    /// Enter again.
    Enter,
    /// Enter with R10 and R11.
    Status(VmcallStatus, u64),
    /// Enter with these.
    Registers(ModuleRegs),
    /// Never enter again.
    Stop,
}

/// Why the guest left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest's code ended.
    Finished,
    MapGpa {
        gpa: u64,
        bytes: u64,
    },
    Vmcall(Box<ModuleRegs>),
    /// A private page that is not there, or not as the guest wants it.
    Violation {
        gpa: u64,
        extended: u64,
    },
    /// The TD or vCPU is lost.
    Lost(Status),
    Other(Status),
}

const FINISHED: u64 = 0xF1;

impl From<ModuleRegs> for Exit {
    fn from(r: ModuleRegs) -> Self {
        const MAP_GPA: u64 = 0x10001;
        let status = Status(r.rax);
        match (status.0, r.r11, r.r12) {
            (77, 12, FINISHED) => Exit::Finished,
            (77, MAP_GPA, gpa) => Exit::MapGpa { gpa, bytes: r.r13 },
            (77, ..) => Exit::Vmcall(Box::new(r)),
            (48, ..) => Exit::Violation {
                gpa: r.r8,
                extended: r.rdx,
            },
            _ if status.0 >> 62 != 0 => Exit::Lost(status),
            _ => Exit::Other(status),
        }
    }
}

/// Carries operations out of the guest's thread and outcomes back.
fn program(
    ops: Receiver<GuestOp>,
    outcomes: Sender<Outcome>,
) -> impl FnMut(&Outcome) -> GuestOp + Send {
    move |last| {
        // The guest's code may have ended; the operation below says so.
        let _ = outcomes.send(last.clone());
        ops.recv()
            .unwrap_or_else(|_| GuestOp::vmcall(12, [FINISHED, 0, 0, 0]))
    }
}

/// A guest's program. Without it the channels close, and a guest that still waits ends.
struct Running(Arc<Platform>, u64);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.set_guest(self.1, Script::default());
    }
}

/// Ends a guest's thread whose host went away.
struct Stopped;

/// The guest's processor.
pub struct Guest {
    ops: Sender<GuestOp>,
    outcomes: Receiver<Outcome>,
}

impl Guest {
    fn execute(&self, op: GuestOp) -> Outcome {
        let sent = self.ops.send(op).map_err(|_| ());
        match sent.and_then(|()| self.outcomes.recv().map_err(|_| ())) {
            Ok(outcome) => outcome,
            Err(()) => resume_unwind(Box::new(Stopped)),
        }
    }

    /// A kernel in front of this processor.
    pub fn kernel(&mut self) -> TdGuest<&mut Self> {
        TdGuest::new(self).expect("TDG.VP.INFO")
    }

    /// Reads memory; the error is the exception.
    pub fn read(&self, gpa: u64, len: usize) -> Result<Vec<u8>, Event> {
        match self.execute(GuestOp::Read { gpa, len }) {
            Outcome::Data(data) => Ok(data),
            Outcome::Event(event) => Err(event),
            other => panic!("{other:?}"),
        }
    }

    /// Writes memory.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), Event> {
        let data = data.to_vec();
        match self.execute(GuestOp::Write { gpa, data }) {
            Outcome::Done => Ok(()),
            Outcome::Event(event) => Err(event),
            other => panic!("{other:?}"),
        }
    }

    /// Executes an instruction that causes #VE.
    pub fn instruction(&self, op: GuestOp) -> Event {
        match self.execute(op) {
            Outcome::Event(event) => event,
            other => panic!("{other:?}"),
        }
    }
}

impl TdcallPort for Guest {
    fn tdcall(&mut self, regs: &mut Regs) {
        let sent = to_module(regs);
        // An interrupt or #VE comes before the instruction; a kernel returns from its handler to it.
        loop {
            if let Outcome::Registers(r) = self.execute(GuestOp::Tdcall(sent)) {
                *regs = from_module(&r);
                return;
            }
        }
    }
}

fn to_module(r: &Regs) -> ModuleRegs {
    ModuleRegs {
        rax: r.rax,
        rcx: r.rcx,
        rdx: r.rdx,
        rbx: r.rbx,
        rsi: r.rsi,
        rdi: r.rdi,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        ..ModuleRegs::default()
    }
}

fn from_module(r: &ModuleRegs) -> Regs {
    Regs {
        rax: r.rax,
        rcx: r.rcx,
        rdx: r.rdx,
        rbx: r.rbx,
        rsi: r.rsi,
        rdi: r.rdi,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
    }
}
