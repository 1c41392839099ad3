//! The mirror's savings: the same operations by a VMM without a mirror that reads the Secure-EPT by
//! SEAMCALL instead, once for each walk or once for each entry of it.
//!
//! A SEAMCALL is a count and a spin of the time-stamp counter; what it would do is a few array
//! accesses here.

use std::cell::{Cell, RefCell};
use std::hint::{black_box, spin_loop};

use kvm_ops_mmu::{
    EmptyTables, Error, Gfn, Level, Mirror, MirrorHooks, Page, PageKind, PrivateSpte, Removal,
    Result, SpteChange,
};

use crate::peers::{PORT, mirror, page};
use crate::report::Report;
use crate::timing::{ns, quartile};

/// Entries on the way to a page of a 4-level table.
const LEVELS: u64 = 4;
const FRAMES: u64 = 8 << 9;
const ROUNDS: usize = 5;

/// A SEAMCALL's cost, and how many there were.
struct Seam {
    cycles: u64,
    calls: Cell<u64>,
}

impl Seam {
    fn call(&self) {
        self.calls.set(self.calls.get() + 1);
        // SAFETY: every x86-64 processor has it.
        let now = || unsafe { core::arch::x86_64::_rdtsc() };
        let start = now();
        while now().wrapping_sub(start) < self.cycles {
            spin_loop();
        }
    }
}

/// The mirror's back end.
// SAFETY: no memory is behind the numbers of pages.
unsafe impl MirrorHooks for Seam {
    fn set_private_spte(&self, _: &SpteChange) -> Result<()> {
        self.call();
        Ok(())
    }
    fn remove_private_spte(&self, _: &SpteChange) -> Removal {
        // Remove, and write the cache back.
        self.call();
        self.call();
        Removal::Done
    }
    fn flush_private_tlb(&self) -> Result<()> {
        self.call();
        Ok(())
    }
    fn alloc_table(&self) -> Result<Page> {
        Ok(page(*PORT, 1))
    }
    fn free_page(&self, page: Page) {
        black_box(page.into_raw());
    }
    fn leak(&self, _: Page, _: Error) {}
}

/// A VMM without a mirror. The arrays are the firmware's tables, behind the calls.
struct NoMirror {
    /// TDH.MEM.SEPT.RD calls for a walk: 1, because the leaf walks itself, or one for each entry.
    reads: u64,
    pages: RefCell<Vec<u64>>,
    tables: RefCell<Vec<bool>>,
}

impl NoMirror {
    fn new(reads: u64) -> Self {
        Self {
            reads,
            pages: RefCell::new(vec![0; FRAMES as usize]),
            tables: RefCell::new(vec![false; (FRAMES >> 9) as usize]),
        }
    }

    fn read(&self, seam: &Seam, gfn: u64) -> u64 {
        (0..self.reads).for_each(|_| seam.call());
        self.pages.borrow()[gfn as usize]
    }

    fn fault(&self, seam: &Seam, gfn: u64) {
        if self.read(seam, gfn) != 0 {
            return;
        }
        let table = &mut self.tables.borrow_mut()[(gfn >> 9) as usize];
        if !*table {
            seam.call();
            *table = true;
        }
        seam.call();
        self.pages.borrow_mut()[gfn as usize] = gfn + 1;
    }

    /// A VMM without a mirror must ask for every frame.
    fn zap(&self, seam: &Seam, first: u64, pages: u64) {
        let present: Vec<u64> = (first..first + pages)
            .filter(|gfn| self.read(seam, *gfn) != 0)
            .collect();
        present.iter().for_each(|_| seam.call());
        seam.call();
        for gfn in present {
            seam.call();
            seam.call();
            black_box(std::mem::take(&mut self.pages.borrow_mut()[gfn as usize]));
        }
    }
}

/// The three designs.
enum Design {
    Mirror(Mirror),
    NoMirror(NoMirror),
}

impl Design {
    fn all() -> [Self; 3] {
        [
            Design::Mirror(mirror(Level::Size512G)),
            Design::NoMirror(NoMirror::new(1)),
            Design::NoMirror(NoMirror::new(LEVELS)),
        ]
    }

    fn fault(&self, seam: &Seam, gfn: u64) {
        match self {
            Design::Mirror(mirror) => {
                let done = mirror.map(seam, Gfn::new(gfn), Level::Size4K, || {
                    Ok(page(mirror.port(), gfn + 1))
                });
                black_box(done.is_ok());
            }
            Design::NoMirror(vmm) => vmm.fault(seam, gfn),
        }
    }

    fn zap(&mut self, seam: &Seam, first: u64, pages: u64) {
        match self {
            Design::Mirror(mirror) => {
                let zapped = mirror.zap(seam, Gfn::new(first), pages, EmptyTables::Keep);
                assert!(zapped.is_ok());
            }
            Design::NoMirror(vmm) => vmm.zap(seam, first, pages),
        }
    }

    fn look_up(&self, seam: &Seam, gfn: u64) -> bool {
        match self {
            Design::Mirror(mirror) => {
                matches!(mirror.lookup(Gfn::new(gfn)).entry, PrivateSpte::Mapped(_))
            }
            Design::NoMirror(vmm) => vmm.read(seam, gfn) != 0,
        }
    }
}

/// SEAMCALLs and nanoseconds for each thing done.
pub type Cost = (f64, f64);

fn count(seam: &Seam, n: u64, f: impl FnOnce()) -> Cost {
    seam.calls.set(0);
    let time = ns(n, f).0;
    (seam.calls.get() as f64 / n as f64, time)
}

/// The operations, as rows of the report.
pub const OPERATIONS: [&str; 5] = [
    "private fault, 512 of a new table",
    "spurious fault",
    "which entry maps a frame",
    "512 pages to shared, 1/8 present, each page",
    "list for the teardown, each page",
];

/// `None`: cannot be done after the key is released.
fn run(cycles: u64, mut design: Design) -> [Option<Cost>; 5] {
    let seam = Seam {
        cycles,
        calls: Cell::new(0),
    };
    // The upper tables are there, as in a guest that runs.
    design.fault(&seam, FRAMES - 1);
    let fault = count(&seam, 512, || {
        (0..512).for_each(|gfn| design.fault(&seam, gfn));
    });
    let spurious = count(&seam, 512, || {
        (0..512).for_each(|gfn| design.fault(&seam, gfn));
    });
    let level = count(&seam, 512, || {
        assert!((0..512).all(|gfn| design.look_up(&seam, gfn)));
    });
    (512..1024)
        .step_by(8)
        .for_each(|gfn| design.fault(&seam, gfn));
    let convert = count(&seam, 512, || design.zap(&seam, 512, 512));
    let list = match &mut design {
        Design::Mirror(mirror) => Some(count(&seam, 512, || {
            let mut pages = 0;
            mirror.drain(|page, held| {
                black_box(page.into_raw());
                pages += u64::from(held == PageKind::Page);
            });
            assert_eq!(pages, 513);
        })),
        Design::NoMirror(_) => None,
    };
    [
        Some(fault),
        Some(spurious),
        Some(level),
        Some(convert),
        list,
    ]
}

/// Measures every design at every cost of a SEAMCALL.
pub fn measure(report: &mut Report, cycles: &[u64]) {
    let mut tables = Vec::new();
    for &cycles in cycles {
        let mut runs: [Vec<[Option<Cost>; 5]>; 3] = Default::default();
        for _ in 0..ROUNDS {
            for (design, runs) in Design::all().into_iter().zip(&mut runs) {
                runs.push(run(cycles, design));
            }
        }
        let costs: [[Option<Cost>; 5]; 3] = runs.map(|runs| {
            core::array::from_fn(|i| {
                let (calls, _) = runs[0][i]?;
                let times: Vec<f64> = runs.iter().filter_map(|run| run[i]).map(|c| c.1).collect();
                Some((calls, quartile(&times)))
            })
        });
        tables.push((cycles, costs));
    }
    report.designs(tables);
}
