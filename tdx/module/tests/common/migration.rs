//! Two TDs of which one migrates into the other, a migration TD that serves both, and the host's lists between.

#![allow(dead_code, unreachable_pub)]

use crate::common::{GIB, Td, large_machine, regs};
use soft_tdx_module::{
    GuestLeaf, GuestOp, HostLeaf as L, OpState, Outcome, Platform, Regs, Status,
};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

const MIGRATABLE: u64 = 1 << 29;
/// Links: the backward stream and this many forward streams.
pub const FORWARD_STREAMS: u64 = 2;
const MBMD_SIZE: u64 = 0x300 << 52;
pub const MIGRATE: u64 = 1 << 52;
pub const CANCEL: u64 = 2 << 52;

/// A target of the migration TD, as it names it.
#[derive(Clone, Copy)]
struct Target {
    handle: u64,
    uuid: [u64; 4],
}

/// Shared memory for one bundle at a time.
#[derive(Clone, Copy)]
pub struct Bundle {
    base: u64,
    pub stream: u64,
}

impl Bundle {
    /// The lists of a stream.
    pub fn of_stream(stream: u64) -> Self {
        Bundle {
            base: 0x200_0000 + stream * 0x80_0000,
            stream,
        }
    }

    pub fn mbmd(&self) -> u64 {
        self.base
    }

    pub fn gpa_list(&self) -> u64 {
        self.base + 0x1000
    }

    pub fn buffer_list(&self) -> u64 {
        self.base + 0x2000
    }

    pub fn new_pages(&self) -> u64 {
        self.base + 0x3000
    }

    pub fn macs(&self, n: u64) -> u64 {
        self.base + 0x4000 + n * 0x1000
    }

    fn page_list(&self) -> u64 {
        self.base + 0x6000
    }

    pub fn buffer(&self, n: u64) -> u64 {
        self.base + 0x10_0000 + n * 0x1000
    }

    /// Writes a list of words.
    pub fn write(p: &Platform, pa: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        p.write_memory(pa, &bytes).expect("shared memory");
    }

    /// Operands of a state leaf.
    pub fn state(&self, first: u64) -> Regs {
        Regs {
            r8: self.mbmd() | MBMD_SIZE,
            r9: self.page_list() | 15 << 55,
            r10: self.stream,
            ..regs(first, 0)
        }
    }

    /// Operands of a memory leaf for a list of `n` entries.
    pub fn memory(&self, tdr: u64, n: u64) -> Regs {
        Regs {
            r8: self.mbmd() | MBMD_SIZE,
            r9: self.buffer_list(),
            r10: self.stream,
            r11: self.macs(0),
            r12: self.macs(1),
            r13: self.new_pages(),
            ..regs(self.gpa_list() | (n - 1) << 55, tdr)
        }
    }

    /// Operands of a token leaf.
    pub fn token(&self, tdr: u64) -> Regs {
        Regs {
            r8: self.mbmd() | MBMD_SIZE,
            ..regs(tdr, 0)
        }
    }
}

/// A migration under test.
pub struct Migration {
    pub p: Platform,
    pub source: Td,
    pub target: Td,
    service: Td,
    targets: [Target; 2],
}

impl Migration {
    /// A source with `pages` pages from GPA 0 on, each filled with its number, and an empty target; keys exchanged.
    pub fn new(pages: u64, encrypt: bool) -> Self {
        let p = large_machine(3, encrypt);
        let mut service = Td::create(&p, GIB, 33, 0, 0);
        service.tables(&p, 0, 0);
        service.finalize(&p);
        let mut source = Td::create(&p, 2 * GIB, 34, 1, MIGRATABLE);
        let mut target = Td::allocate(&p, 3 * GIB, 35, 2, 0);
        let targets = [&source, &target].map(|td| bind(&p, td, &service));
        for n in 0..pages {
            source.tables(&p, n << 12, 0);
            source.add(&p, n << 12, n as u8);
        }
        streams(&p, &mut source);
        streams(&p, &mut target);
        source.finalize(&p);
        let m = Migration {
            p,
            source,
            target,
            service,
            targets,
        };
        m.exchange_keys();
        m
    }

    /// The migration TD puts the encryption key of each TD into the other.
    pub fn exchange_keys(&self) {
        for (from, to) in [(0, 1), (1, 0)] {
            let (from, to) = (self.targets[from], self.targets[to]);
            let read = |n| from.call(GuestLeaf::ServtdRd, MIG_ENC_KEY + n, 0);
            let key = self.run_service((0..4).map(read).collect());
            let write = |n: u64| to.call(GuestLeaf::ServtdWr, MIG_DEC_KEY + n, key[n as usize].r8);
            self.run_service((0..4).map(write).collect());
        }
    }

    /// Runs TDCALLs in the migration TD, which all succeed, and returns the registers after each.
    fn run_service(&self, calls: Vec<Regs>) -> Vec<Regs> {
        let log = Arc::new(Mutex::new(Vec::new()));
        let into = log.clone();
        let mut calls: VecDeque<Regs> = calls.into();
        let program = move |last: &Outcome| {
            if let Outcome::Registers(r) = last {
                into.lock().expect("log").push(*r);
            }
            match calls.pop_front() {
                Some(r) => GuestOp::Tdcall(r),
                None => GuestOp::vmcall(12, [0; 4]),
            }
        };
        self.p.set_guest(self.service.tdvpr, program);
        assert_eq!(self.service.enter(&self.p).rax, 77);
        let mut log = std::mem::take(&mut *log.lock().expect("log"));
        // The first outcome may be that of the last run's VMCALL.
        log.retain(|r| matches!(r.rax >> 32, 0) && r.rcx != VMCALL_MASK);
        log
    }

    pub fn state(&self) -> [OpState; 2] {
        [&self.source, &self.target].map(|td| self.p.td(td.tdr).expect("a td").op_state)
    }

    /// Immutable state: both TDs are in a session afterwards.
    pub fn begin(&self) {
        let b = Bundle::of_stream(0);
        let list: Vec<u64> = (0..16).map(|n| b.buffer(n)).collect();
        Bundle::write(&self.p, b.page_list(), &list);
        let (from, to) = (&self.source, &self.target);
        let exported = from.ok(&self.p, L::ExportStateImmutable, b.state(from.tdr));
        let operands = sized(b.state(to.tdr), exported.rdx);
        to.ok(&self.p, L::ImportStateImmutable, operands);
    }

    /// Secure-EPT tables of the target for pages from GPA 0 on.
    pub fn target_tables(&mut self, pages: u64) {
        for gpa in (0..pages << 12).step_by(0x20_0000) {
            self.target.tables(&self.p, gpa, 0);
        }
    }

    /// The state of the TD and of its vCPU.
    pub fn state_bundles(&mut self) {
        let b = Bundle::of_stream(0);
        let list: Vec<u64> = (0..16).map(|n| b.buffer(n)).collect();
        Bundle::write(&self.p, b.page_list(), &list);
        let (p, from, to) = (&self.p, &self.source, &mut self.target);
        let exported = from.ok(p, L::ExportStateTd, b.state(from.tdr));
        to.ok(p, L::ImportStateTd, sized(b.state(to.tdr), exported.rdx));
        to.allocate_vcpu(p, 0);
        let exported = from.ok(p, L::ExportStateVp, b.state(from.tdvpr));
        to.ok(p, L::ImportStateVp, sized(b.state(to.tdvpr), exported.rdx));
    }

    /// Blocks pages for writing and waits until no vCPU has an old translation.
    pub fn block(&self, gpas: &[u64]) {
        let b = Bundle::of_stream(0);
        self.list(&b, gpas, MIGRATE);
        let r = regs(
            b.gpa_list() | (gpas.len() as u64 - 1) << 55,
            self.source.tdr,
        );
        self.source.ok(&self.p, L::ExportBlockw, r);
        self.source
            .ok(&self.p, L::MemTrack, regs(self.source.tdr, 0));
    }

    /// Writes a GPA list and the list of its buffers.
    pub fn list(&self, b: &Bundle, gpas: &[u64], operation: u64) {
        let entries: Vec<u64> = gpas.iter().map(|gpa| gpa | operation).collect();
        Bundle::write(&self.p, b.gpa_list(), &entries);
        let buffers: Vec<u64> = (0..gpas.len() as u64).map(|n| b.buffer(n)).collect();
        Bundle::write(&self.p, b.buffer_list(), &buffers);
    }

    /// Exports pages; the bundle is left in shared memory.
    pub fn export(&self, b: &Bundle, gpas: &[u64]) -> Status {
        self.list(b, gpas, MIGRATE);
        let r = b.memory(self.source.tdr, gpas.len() as u64);
        self.source.status(&self.p, L::ExportMem, r)
    }

    /// Gives the target `n` pages for an import, and returns them.
    pub fn new_pages(&mut self, b: &Bundle, n: u64) -> Vec<u64> {
        let pages: Vec<u64> = (0..n).map(|_| self.target.page()).collect();
        Bundle::write(&self.p, b.new_pages(), &pages);
        pages
    }

    /// Imports the bundle of `n` pages in shared memory.
    pub fn import(&mut self, b: &Bundle, n: u64) -> Status {
        self.new_pages(b, n);
        let r = b.memory(self.target.tdr, n);
        self.target.status(&self.p, L::ImportMem, r)
    }

    /// An epoch token, or with `start` the start token.
    pub fn token(&self, start: bool) {
        let b = Bundle::of_stream(0);
        let command = u64::from(start) << 63;
        let r = Regs {
            r10: command,
            ..b.token(self.source.tdr)
        };
        self.source.ok(&self.p, L::ExportTrack, r);
        self.target
            .ok(&self.p, L::ImportTrack, b.token(self.target.tdr));
    }
}

const MIG_DEC_KEY: u64 = 0x9810_0003_0000_0010;
const MIG_ENC_KEY: u64 = 0x9810_0003_0000_0018;
const VMCALL_MASK: u64 = 0xFC00;

impl Target {
    fn call(&self, leaf: GuestLeaf, id: u64, value: u64) -> Regs {
        let [r10, r11, r12, r13] = self.uuid;
        Regs {
            rcx: self.handle,
            rdx: id,
            r8: value,
            r9: u64::MAX,
            r10,
            r11,
            r12,
            r13,
            ..Regs::leaf(leaf.number())
        }
    }
}

/// The page list cut to the pages an export used.
fn sized(operands: Regs, pages: u64) -> Regs {
    Regs {
        r9: operands.r9 & ((1 << 55) - 1) | (pages - 1) << 55,
        ..operands
    }
}

fn bind(p: &Platform, td: &Td, service: &Td) -> Target {
    let r = service.ok(p, L::ServtdBind, regs(td.tdr, service.tdr));
    Target {
        handle: r.rcx,
        uuid: [r.r10, r.r11, r.r12, r.r13],
    }
}

fn streams(p: &Platform, td: &mut Td) {
    for _ in 0..=FORWARD_STREAMS {
        let page = td.page();
        td.ok(p, L::MigStreamCreate, regs(page, td.tdr));
    }
}
