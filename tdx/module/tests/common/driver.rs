//! Interprets bytes as calls, guest events, faults and memory writes, so that random bytes become sequences that
//! now and then make sense; and audits the platform afterwards. Shared with the fuzz target.

use soft_tdx_module::{
    Fault, GuestEvent, GuestFlow, GuestLeaf, HostLeaf, KeyEngineFault, LockMode, LockTarget,
    LpError, PageSize, PageType, Platform, PlatformBuilder, Range, Regs, Tdmr, VmExit,
};

/// Pages the driver plays with: 4K pages of one 2 MiB region, and two large ones.
const BASE: u64 = 0x4000_0000;
const SMALL_PAGES: u64 = 40;
const PARAMS: u64 = 0x10_0000;
/// The same with an L2 VM.
const PARTITIONED_PARAMS: u64 = 0x11_0000;

/// A small machine: 3 processors, 1 package, 4 private key ids, tiny memory.
pub fn machine() -> Platform {
    let gib = 1 << 30;
    let p = PlatformBuilder::new()
        .processors([0, 0, 0])
        .keyids(3, (4, 7), 4)
        .memory(3 * gib)
        .cmrs([Range::new(gib, 2 * gib)])
        .tdmrs([Tdmr::with_pamt_at(Range::new(gib, gib), 2 * gib)])
        .guest_steps_per_entry(50)
        .seed(7)
        .build()
        .expect("a machine");
    p.bring_up().expect("bring-up");
    for (params, l2_vms) in [(PARAMS, 0u64), (PARTITIONED_PARAMS, 1)] {
        for (offset, value) in [(8, 3), (16, 3 | l2_vms << 16), (24, 0x1E), (40, 40)] {
            p.write_memory(params + offset, &value.to_le_bytes())
                .expect("params");
        }
    }
    p
}

/// A source of values from bytes; zeros at the end.
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().map_or((0, self.0), |(f, r)| (*f, r));
        self.0 = rest;
        first
    }

    fn word(&mut self) -> u64 {
        (0..8).fold(0, |w, _| w << 8 | u64::from(self.byte()))
    }

    fn page(&mut self) -> u64 {
        BASE + u64::from(self.byte()) % SMALL_PAGES * 0x1000
    }

    /// A register value: mostly something that means something.
    fn value(&mut self) -> u64 {
        match self.byte() % 16 {
            0..=3 => self.page(),
            4 => BASE,
            5 => BASE + 0x20_0000 * (1 + u64::from(self.byte() % 2)),
            6 => u64::from(self.byte() % 8) << 12 | u64::from(self.byte() % 5),
            7 => u64::from(self.byte() % 5),
            8 => 0x20_0000 * u64::from(self.byte() % 3) + u64::from(self.byte() % 3),
            9 => PARAMS,
            10 => 4 + u64::from(self.byte() % 4),
            11 => u64::MAX,
            12 => 1 << (self.byte() % 64),
            13 => self.page() | 1 << 52,
            14 => 0,
            _ => self.word(),
        }
    }
}

fn regs(b: &mut Bytes<'_>, rax: u64) -> Regs {
    Regs {
        rax,
        rcx: b.value(),
        rdx: b.value(),
        r8: b.value(),
        r9: b.value(),
        r10: b.value(),
        ..Regs::default()
    }
}

/// A step of a life: a SEAMCALL by its RAX and operands, or what the guest on processor 0 does.
#[derive(Clone, Copy)]
enum Step {
    Seamcall(Regs),
    Guest(Regs, GuestEvent),
}

/// A SEAMCALL with RCX, RDX and R8; R9 is a shared page.
fn seamcall((leaf, rcx, rdx, r8): (HostLeaf, u64, u64, u64)) -> Step {
    Step::Seamcall(Regs {
        rcx,
        rdx,
        r8,
        r9: PARAMS,
        ..Regs::leaf(leaf.number())
    })
}

/// The life of a TD with an L2 VM, on pages from `BASE` on.
fn partitioned_life() -> Vec<Step> {
    use HostLeaf as L;
    const NO_PAGE: u64 = u64::MAX;
    const L2_VAPIC: u64 = 0x2424_0003_0000_2012;
    const VM_1: u64 = 1 << 52;
    let (tdr, tdvpr) = (BASE, BASE + 0x8000);
    let page = |n: u64| BASE + n * 0x1000;
    let mut life: Vec<(HostLeaf, u64, u64, u64)> =
        vec![(L::MngCreate, tdr, 5, 0), (L::MngKeyConfig, tdr, 0, 0)];
    life.extend((1..=7).map(|n| (L::MngAddcx, page(n), tdr, 0)));
    life.extend([
        (L::MngInit, tdr, PARTITIONED_PARAMS, 0),
        (L::VpCreate, tdvpr, tdr, 0),
    ]);
    life.extend((9..=16).map(|n| (L::VpAddcx, page(n), tdvpr, 0)));
    life.push((L::VpInit, tdvpr, 0, 0));
    let mut steps: Vec<Step> = life.into_iter().map(seamcall).collect();
    let versioned = |leaf: HostLeaf, rcx, pages: [u64; 2]| {
        Step::Seamcall(Regs {
            rcx,
            rdx: tdr,
            r8: pages[0],
            r9: pages[1],
            r10: NO_PAGE,
            r11: NO_PAGE,
            ..Regs::leaf(leaf.number() | 1 << 16)
        })
    };
    let tables = [3, 2, 1].map(|level| {
        let first = 17 + (3 - level) * 2;
        versioned(L::MemSeptAdd, level, [page(first), page(first + 1)])
    });
    steps.extend(tables);
    let guest = |leaf: GuestLeaf, rcx, rdx, r8, r9| {
        let registers = Regs {
            rcx,
            rdx,
            r8,
            r9,
            ..Regs::leaf(leaf.number())
        };
        Step::Guest(registers, GuestEvent::Tdcall { mode_64bit: true })
    };
    let exit = |reason| {
        let exit = VmExit {
            reason,
            gpa: 0x1000,
            ..VmExit::default()
        };
        Step::Guest(Regs::default(), GuestEvent::Exit(exit))
    };
    let enter_l2 = guest(GuestLeaf::VpEnter, VM_1, 0, 0, 0);
    let enter = seamcall((L::VpEnter, tdvpr, 0, 0));
    let run = [
        seamcall((L::MemPageAdd, 0, tdr, page(23))),
        seamcall((L::MemPageAdd, 0x1000, tdr, page(24))),
        seamcall((L::MrFinalize, tdr, 0, 0)),
        enter,
        guest(GuestLeaf::VpWr, 0, L2_VAPIC, 0, u64::MAX),
        guest(
            GuestLeaf::MemPageAttrWr,
            0x1000,
            0x8003 << 16,
            0x7F << 16,
            0,
        ),
        guest(GuestLeaf::MemPageAttrRd, 0x1000, 0, 0, 0),
        enter_l2,
        exit(12),
        enter_l2,
        exit(48),
        enter_l2,
        exit(1),
        seamcall((L::VpEnter, tdvpr | 1 << 53, 0, 0)),
        enter_l2,
        exit(1),
        seamcall((L::MemRangeBlock, 0, tdr, 0)),
        seamcall((L::MemTrack, tdr, 0, 0)),
        enter,
        seamcall((L::MemRangeUnblock, 0, tdr, 0)),
        enter,
        exit(1),
        seamcall((L::MemRangeBlock, 0x20_0001, tdr, 0)),
    ];
    steps.extend(run);
    steps.extend(
        [
            (L::VpFlush, tdvpr, 0, 0),
            (L::MngVpflushdone, tdr, 0, 0),
            (L::PhymemCacheWb, 0, 0, 0),
            (L::PhymemCacheWb, 1, 0, 0),
            (L::MngKeyFreeid, tdr, 0, 0),
        ]
        .map(seamcall),
    );
    let reclaim = |n| seamcall((L::PhymemPageReclaim, page(n), 0, 0));
    steps.extend((0..25).rev().map(reclaim));
    steps
}

/// A plausible life on page `BASE`, a leaf and its RCX, RDX, R8 at a time, so that deep states are reached.
fn life() -> Vec<(HostLeaf, u64, u64, u64)> {
    use HostLeaf as L;
    let (tdr, tdvpr) = (BASE, BASE + 0x8000);
    let mut life = vec![(L::MngCreate, tdr, 5, 0), (L::MngKeyConfig, tdr, 0, 0)];
    life.extend((1..=6).map(|n| (L::MngAddcx, tdr + n * 0x1000, tdr, 0)));
    life.extend([(L::MngInit, tdr, PARAMS, 0), (L::VpCreate, tdvpr, tdr, 0)]);
    life.extend((1..=5).map(|n| (L::VpAddcx, tdvpr + n * 0x1000, tdvpr, 0)));
    life.extend([
        (L::VpInit, tdvpr, 0, 0),
        (L::MemSeptAdd, 3, tdr, BASE + 0xF000),
        (L::MemSeptAdd, 2, tdr, BASE + 0x1_0000),
        (L::MemSeptAdd, 1, tdr, BASE + 0x1_1000),
        (L::MemPageAdd, 0, tdr, BASE + 0x1_2000),
        (L::MrFinalize, tdr, 0, 0),
        (L::MemPageAug, 0x20_0001, tdr, BASE + 0x20_0000),
        (L::VpEnter, tdvpr, 0, 0),
        (L::MemRangeBlock, 0x20_0001, tdr, 0),
        (L::MemTrack, tdr, 0, 0),
        (L::VpEnter, tdvpr, 0, 0),
        (L::MemPageDemote, 0x20_0001, tdr, BASE + 0x1_3000),
        (L::MemRangeBlock, 0x20_0001, tdr, 0),
        (L::MemTrack, tdr, 0, 0),
        (L::MemPagePromote, 0x20_0001, tdr, 0),
        (L::VpEnter, tdvpr, 0, 0),
        (L::VpFlush, tdvpr, 0, 0),
        (L::MngVpflushdone, tdr, 0, 0),
        (L::PhymemCacheWb, 0, 0, 0),
        (L::PhymemCacheWb, 1, 0, 0),
        (L::MngKeyFreeid, tdr, 0, 0),
    ]);
    life.extend(
        (0..0x14)
            .rev()
            .map(|n| (L::PhymemPageReclaim, tdr + n * 0x1000, 0, 0)),
    );
    life.extend([
        (L::PhymemPageReclaim, BASE + 0x20_0000, 0, 0),
        (L::PhymemPageReclaim, tdr, 0, 0),
    ]);
    life
}

/// Runs steps on a platform.
pub struct Driver {
    p: Platform,
    life: Vec<Step>,
    at: usize,
}

impl Driver {
    pub fn new() -> Self {
        Driver::of(life().into_iter().map(seamcall).collect())
    }

    /// One whose TDs have an L2 VM.
    pub fn partitioned() -> Self {
        Driver::of(partitioned_life())
    }

    fn of(life: Vec<Step>) -> Self {
        Driver {
            p: machine(),
            life,
            at: 0,
        }
    }

    pub fn platform(&self) -> &Platform {
        &self.p
    }

    pub fn run(&mut self, bytes: &[u8]) {
        let mut b = Bytes(bytes);
        while !b.is_empty() {
            if b.byte() % 4 != 0 {
                self.live(&mut b);
            } else {
                step(&self.p, &mut b);
            }
        }
        audit(&self.p);
    }

    /// The `n`th call of a life repeated for ever, on processor 0.
    pub fn live_step(&self, n: usize) {
        match self.life[n % self.life.len()] {
            Step::Seamcall(mut r) => {
                let _ = self.p.seamcall_step(0, &mut r);
            }
            Step::Guest(r, event) => {
                let _ = self.p.guest_event(0, r, event, 4);
            }
        }
    }

    /// The next call of the life, now and then one repeated or left out.
    fn live(&mut self, b: &mut Bytes<'_>) {
        self.live_step(self.at);
        self.at += match b.byte() % 32 {
            0 => 0,
            1 => 2,
            _ => 1,
        };
    }
}

/// One step. The results of calls are ignored: none of them is an error of the test.
pub fn step(p: &Platform, b: &mut Bytes<'_>) {
    let lp = usize::from(b.byte() % 4);
    match b.byte() % 16 {
        0..=8 => {
            let version = u64::from(b.byte().is_multiple_of(16)) << 16;
            let rax = u64::from(b.byte() % 56) | version;
            if rax == HostLeaf::SysShutdown.number() && !b.byte().is_multiple_of(16) {
                return;
            }
            let mut r = regs(b, rax);
            let _ = p.seamcall_step(lp, &mut r);
        }
        9 => {
            let rax = b.word();
            let mut r = regs(b, rax);
            let _ = p.seamcall(lp, &mut r);
        }
        10 | 11 => {
            let rax = u64::from(b.byte() % 30);
            let r = regs(b, rax);
            let _ = p.guest_event(
                lp,
                r,
                GuestEvent::Tdcall {
                    mode_64bit: b.byte() != 0,
                },
                8,
            );
        }
        12 => {
            let exit = VmExit {
                reason: u16::from(b.byte() % 80),
                qualification: b.value(),
                gpa: b.value(),
                gla: b.value(),
                info: b.value(),
                idt_vectoring: if b.byte().is_multiple_of(8) {
                    b.word()
                } else {
                    0
                },
                cpl: b.byte() % 4,
                ..VmExit::default()
            };
            let r = regs(b, 0);
            let _ = p.guest_event(lp, r, GuestEvent::Exit(exit), b.word());
        }
        13 => {
            let data: Vec<u8> = (0..b.byte() % 64).map(|_| b.byte()).collect();
            let _ = p.write_memory(b.value(), &data);
            let mut buf = [0; 100];
            let _ = p.read_memory(b.value(), &mut buf);
            let _ = p.peek_memory(b.value(), &mut buf);
        }
        14 => {
            p.set_pending(lp, b.byte());
            p.set_interrupts_enabled(lp, b.byte().is_multiple_of(2));
        }
        _ => p.inject(match b.byte() % 6 {
            0 => Fault::Rdrand { count: 1 },
            1 => Fault::Rdseed {
                count: u32::from(b.byte() % 5),
            },
            2 => Fault::KeyEngine {
                outcome: KeyEngineFault::Busy,
                count: 1,
            },
            3 => Fault::TscAdjust(u64::from(b.byte().is_multiple_of(32))),
            4 => Fault::LimitCpuidMaxval(b.byte().is_multiple_of(32)),
            _ => Fault::TscAdd(i64::from(b.byte())),
        }),
    }
}

/// Brings every processor back to the host, then checks what must hold between calls: no lock is held, and
/// every TD has as many pages as it counts.
pub fn audit(p: &Platform) {
    for lp in 0..3 {
        let exit = GuestEvent::Exit(VmExit {
            reason: 1,
            ..VmExit::default()
        });
        match p.guest_event(lp, Regs::default(), exit, 0) {
            Ok(GuestFlow::Exit { .. }) | Err(LpError::OutsideTd { .. }) => {}
            other => panic!("an interrupt leaves the TD: {other:?}"),
        }
    }
    let mut pages: Vec<(u64, PageSize)> = (0..512)
        .map(|i| (BASE + i * 0x1000, PageSize::Size4K))
        .collect();
    for large in 0..4 {
        let at = BASE + large * 0x20_0000;
        pages.push((at, PageSize::Size2M));
        pages.extend(
            (0..512)
                .filter(|_| large > 0)
                .map(|i| (at + i * 0x1000, PageSize::Size4K)),
        );
    }
    let mut owned = std::collections::HashMap::<u64, u64>::new();
    let mut tds = Vec::new();
    for (pa, size) in pages {
        assert_free(p, LockTarget::Pamt { pa, size });
        let view = p.page(pa, size).expect("in a tdmr");
        match view.page_type {
            PageType::Nda | PageType::Rsvd => {}
            PageType::Tdr => tds.push(pa),
            _ => *owned.entry(view.owner).or_default() += size.pages(),
        }
    }
    for tdr in tds {
        let td = p.td(tdr).expect("a td");
        assert_eq!(
            td.chldcnt,
            owned.remove(&tdr).unwrap_or(0),
            "chldcnt of {tdr:#x}"
        );
        for target in [
            LockTarget::OpState { tdr },
            LockTarget::SeptTree { tdr },
            LockTarget::TdEpoch { tdr },
            LockTarget::Rtmr { tdr },
        ] {
            assert_free(p, target);
        }
    }
    assert!(
        owned.is_empty(),
        "pages of TDs that do not exist: {owned:x?}"
    );
    for target in [
        LockTarget::Global,
        LockTarget::Kot,
        LockTarget::Wbt { package: 0 },
    ] {
        assert_free(p, target);
    }
}

fn assert_free(p: &Platform, target: LockTarget) {
    assert!(
        p.hold(target, LockMode::Exclusive),
        "{target:x?} is still held"
    );
    p.release(target, LockMode::Exclusive);
}
