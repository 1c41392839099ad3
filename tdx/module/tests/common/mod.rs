//! A host for tests: builds TDs and hands pages out.

// Each test uses a part; the module is no interface.
#![allow(dead_code, unreachable_pub)]

use soft_tdx_module::{
    HostLeaf as L, LockMode, LockTarget, Platform, PlatformBuilder, Range, Regs, Tdmr,
};

pub const GIB: u64 = 1 << 30;

/// Operands RCX and RDX.
pub fn regs(rcx: u64, rdx: u64) -> Regs {
    Regs {
        rcx,
        rdx,
        ..Regs::default()
    }
}

/// The default machine, brought up.
pub fn machine() -> Platform {
    let p = Platform::builder().seed(1).build().expect("a machine");
    p.bring_up().expect("bring-up");
    p
}

/// A machine with `n` TDMRs of a GiB each, so that TDs can live apart.
pub fn large_machine(n: u64, encrypt: bool) -> Platform {
    let tdmrs = (0..n).map(|i| {
        Tdmr::with_pamt_at(
            Range::new((1 + i) * GIB, GIB),
            (1 + n) * GIB + i * 0x100_0000,
        )
    });
    let p = PlatformBuilder::new()
        .seed(1)
        .encrypt_memory(encrypt)
        .memory((n + 2) * GIB)
        .cmrs([Range::new(GIB, (n + 1) * GIB)])
        .tdmrs(tdmrs)
        .build()
        .expect("a machine");
    p.bring_up().expect("bring-up");
    p
}

/// A TD under construction or running, with the pages it was given.
pub struct Td {
    pub tdr: u64,
    pub tdvpr: u64,
    pub hkid: u16,
    pub lp: usize,
    next: u64,
    pub given: Vec<u64>,
    pub params: u64,
}

impl Td {
    /// A TD in op_state INITIALIZED with one vCPU, of pages from `base` up, on processor `lp`.
    pub fn create(p: &Platform, base: u64, hkid: u16, lp: usize, attributes: u64) -> Self {
        Td::partitioned(p, base, hkid, lp, attributes, 0)
    }

    /// The same with `l2_vms` L2 VMs.
    pub fn partitioned(
        p: &Platform,
        base: u64,
        hkid: u16,
        lp: usize,
        attributes: u64,
        l2_vms: u64,
    ) -> Self {
        let mut td = Td::allocate(p, base, hkid, lp, l2_vms);
        for (offset, value) in [
            (0, attributes),
            (8, 3u64),
            (16, 4 | l2_vms << 16),
            (24, 0x1E),
            (40, 40),
        ] {
            p.write_memory(td.params + offset, &value.to_le_bytes())
                .expect("params");
        }
        td.ok(p, L::MngInit, regs(td.tdr, td.params));
        td.allocate_vcpu(p, l2_vms);
        td.ok(p, L::VpInit, regs(td.tdvpr, 0));
        td
    }

    /// The pages of a vCPU.
    pub fn allocate_vcpu(&mut self, p: &Platform, l2_vms: u64) {
        self.tdvpr = self.page();
        self.ok(p, L::VpCreate, regs(self.tdvpr, self.tdr));
        for _ in 0..5 + 3 * l2_vms {
            let page = self.page();
            self.ok(p, L::VpAddcx, regs(page, self.tdvpr));
        }
    }

    /// A TD in op_state UNINITIALIZED: keys and pages, nothing else.
    pub fn allocate(p: &Platform, base: u64, hkid: u16, lp: usize, l2_vms: u64) -> Self {
        let mut td = Td {
            tdr: base,
            tdvpr: 0,
            hkid,
            lp,
            next: base,
            given: Vec::new(),
            params: 0x10_0000 + u64::from(hkid) * 0x1000,
        };
        td.tdr = td.page();
        td.ok(p, L::MngCreate, regs(td.tdr, hkid.into()));
        for package_lp in [0, 2] {
            p.call(
                if lp < 2 && package_lp == 0 || lp >= 2 && package_lp == 2 {
                    lp
                } else {
                    package_lp + 1
                },
                L::MngKeyConfig,
                regs(td.tdr, 0),
            )
            .expect("key");
        }
        for _ in 0..6 + l2_vms {
            let page = td.page();
            td.ok(p, L::MngAddcx, regs(page, td.tdr));
        }
        td
    }

    pub fn page(&mut self) -> u64 {
        let pa = self.next;
        self.next += 0x1000;
        self.given.push(pa);
        pa
    }

    /// Aligns the next page; used to take large ones.
    pub fn large_page(&mut self, size: u64) -> u64 {
        self.next = self.next.next_multiple_of(size);
        let pa = self.next;
        self.next += size;
        self.given.push(pa);
        pa
    }

    pub fn ok(&self, p: &Platform, leaf: L, operands: Regs) -> Regs {
        p.call(self.lp, leaf, operands)
            .unwrap_or_else(|e| panic!("{e} {operands:?}"))
    }

    pub fn status(&self, p: &Platform, leaf: L, operands: Regs) -> soft_tdx_module::Status {
        let mut r = Regs {
            rax: leaf.number(),
            ..operands
        };
        p.seamcall(self.lp, &mut r).expect("executes")
    }

    /// Tables down to `level` for a GPA.
    pub fn tables(&mut self, p: &Platform, gpa: u64, level: u64) {
        for l in ((level + 1)..=3).rev() {
            let at = gpa >> (12 + 9 * l) << (12 + 9 * l) | l;
            let view = p.sept(self.tdr, gpa, l as u8).expect("a td");
            if u64::from(view.level) == l && view.state == soft_tdx_module::SeptState::Free {
                let page = self.page();
                self.ok(
                    p,
                    L::MemSeptAdd,
                    Regs {
                        r8: page,
                        ..regs(at, self.tdr)
                    },
                );
            }
        }
    }

    /// Tables for the first 2 MiB, for L1 and for L2 VM 1.
    pub fn l2_tables(&mut self, p: &Platform) {
        const NO_PAGE: u64 = u64::MAX;
        for level in [3, 2, 1] {
            let mut r = Regs {
                rax: L::MemSeptAdd.number() | 1 << 16,
                r8: self.page(),
                r9: self.page(),
                r10: NO_PAGE,
                r11: NO_PAGE,
                ..regs(level, self.tdr)
            };
            let status = p.seamcall(self.lp, &mut r).expect("executes");
            assert!(!status.is_error(), "{status}");
        }
    }

    /// A measured page with the given contents.
    pub fn add(&mut self, p: &Platform, gpa: u64, fill: u8) -> u64 {
        let source = self.params + 0x10_0000;
        p.write_memory(source, &[fill; 4096]).expect("source");
        let page = self.page();
        self.ok(
            p,
            L::MemPageAdd,
            Regs {
                r8: page,
                r9: source,
                ..regs(gpa, self.tdr)
            },
        );
        page
    }

    pub fn aug(&mut self, p: &Platform, gpa: u64) -> u64 {
        let page = self.page();
        self.ok(
            p,
            L::MemPageAug,
            Regs {
                r8: page,
                ..regs(gpa, self.tdr)
            },
        );
        page
    }

    pub fn finalize(&self, p: &Platform) {
        self.ok(p, L::MrFinalize, regs(self.tdr, 0));
    }

    pub fn enter(&self, p: &Platform) -> Regs {
        let mut r = Regs {
            rax: L::VpEnter.number(),
            ..regs(self.tdvpr, 0)
        };
        p.seamcall(self.lp, &mut r).expect("executes");
        r
    }

    /// Frees the key id.
    pub fn release_key(&self, p: &Platform) {
        self.ok(p, L::VpFlush, regs(self.tdvpr, 0));
        self.ok(p, L::MngVpflushdone, regs(self.tdr, 0));
        for lp in [0, 2] {
            p.call(lp, L::PhymemCacheWb, regs(0, 0))
                .expect("write-back");
        }
        self.ok(p, L::MngKeyFreeid, regs(self.tdr, 0));
    }

    /// Reclaims every page that is still the TD's.
    pub fn reclaim(&self, p: &Platform) {
        for pa in self.given.iter().rev() {
            self.status(p, L::PhymemPageReclaim, regs(*pa, 0));
        }
    }
}

/// Holds a lock while `f` runs.
pub fn holding<R>(p: &Platform, target: LockTarget, mode: LockMode, f: impl FnOnce() -> R) -> R {
    assert!(p.hold(target, mode));
    let r = f();
    p.release(target, mode);
    r
}
