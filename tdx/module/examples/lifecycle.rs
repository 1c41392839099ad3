//! The life of a TD: bring-up, creation, two measured pages, a guest that accepts a page and calls the host,
//! teardown with every page and the key id back. Prints the MRTD.

use soft_tdx_module::{
    CallError, GuestOp, HkidState, HostLeaf as L, PageSize, PageType, Platform, Regs, Script,
};

/// Pages of the default machine's TDMR, given out one after the other.
struct Pages {
    next: u64,
    given: Vec<u64>,
}

impl Pages {
    fn take(&mut self) -> u64 {
        let pa = self.next;
        self.next += 0x1000;
        self.given.push(pa);
        pa
    }
}

const HKID: u16 = 33;
const PARAMS: u64 = 0x10_0000;
const SOURCE: u64 = 0x20_0000;
/// Number of pages that the example measures; page k is filled with k + 1.
pub const MEASURED_PAGES: u64 = 2;
const PENDING_GPA: u64 = 0x10_0000;
const EPT_VIOLATION: u64 = 48;
const TDCALL: u64 = 77;

/// Results of one TD's life.
pub struct Outcome {
    /// The TD's build-time measurement.
    pub mrtd: [u8; 48],
    /// Value the guest passed to the host in R12.
    pub message: u64,
    /// Pages the TD used, all of them the host's again.
    pub pages_returned: usize,
}

fn regs(rcx: u64, rdx: u64) -> Regs {
    Regs {
        rcx,
        rdx,
        ..Regs::default()
    }
}

/// Runs the life.
pub fn live() -> Result<Outcome, Box<dyn std::error::Error>> {
    let p = Platform::builder().build()?;
    p.bring_up()?;
    let mut pages = Pages {
        next: 0x4000_0000,
        given: Vec::new(),
    };

    // The TD: root page, a key on every package, six control pages, parameters.
    let tdr = pages.take();
    p.call(0, L::MngCreate, regs(tdr, HKID.into()))?;
    p.call(0, L::MngKeyConfig, regs(tdr, 0))?;
    p.call(2, L::MngKeyConfig, regs(tdr, 0))?;
    for _ in 0..6 {
        p.call(0, L::MngAddcx, regs(pages.take(), tdr))?;
    }
    // XFAM 3, 4 vCPUs; 4-level EPT, write-back; TSC at 1 GHz.
    for (offset, value) in [(8, 3u64), (16, 4), (24, 0x1E), (40, 40)] {
        p.write_memory(PARAMS + offset, &value.to_le_bytes())?;
    }
    p.call(0, L::MngInit, regs(tdr, PARAMS))?;

    // A vCPU.
    let tdvpr = pages.take();
    p.call(0, L::VpCreate, regs(tdvpr, tdr))?;
    for _ in 0..5 {
        p.call(0, L::VpAddcx, regs(pages.take(), tdvpr))?;
    }
    p.call(0, L::VpInit, regs(tdvpr, 0))?;

    // Secure EPT down to 4 KiB at GPA 0, and the measured pages.
    for level in [3, 2, 1] {
        p.call(
            0,
            L::MemSeptAdd,
            Regs {
                r8: pages.take(),
                ..regs(level, tdr)
            },
        )?;
    }
    for k in 0..MEASURED_PAGES {
        p.write_memory(SOURCE, &[k as u8 + 1; 4096])?;
        let add = Regs {
            r8: pages.take(),
            r9: SOURCE,
            ..regs(k << 12, tdr)
        };
        p.call(0, L::MemPageAdd, add)?;
        for chunk in (0..4096).step_by(256) {
            p.call(0, L::MrExtend, regs(k << 12 | chunk, tdr))?;
        }
    }
    p.call(0, L::MrFinalize, regs(tdr, 0))?;
    let mrtd = p.td(tdr).ok_or("the td is gone")?.mrtd;

    // The guest accepts a page the host has not even added yet, writes to it, and calls.
    p.set_guest(
        tdvpr,
        Script::new([
            GuestOp::accept(PENDING_GPA, 0),
            GuestOp::Write {
                gpa: PENDING_GPA,
                data: b"private".to_vec(),
            },
            GuestOp::vmcall(0x10003, [0xC0FFEE, 0, 0, 0]),
        ]),
    );
    let exit = p.call(0, L::VpEnter, regs(tdvpr, 0))?;
    assert_eq!((exit.rax & 0xFFFF, exit.r8), (EPT_VIOLATION, PENDING_GPA));
    let private = pages.take();
    p.call(
        0,
        L::MemPageAug,
        Regs {
            r8: private,
            ..regs(PENDING_GPA, tdr)
        },
    )?;
    let exit = p.call(0, L::VpEnter, regs(tdvpr, 0))?;
    assert_eq!((exit.rax & 0xFFFF, exit.r11), (TDCALL, 0x10003));
    let mut seen = [0; 7];
    p.read_memory(private, &mut seen)?;
    assert_ne!(&seen, b"private", "the host sees ciphertext");

    let pages_returned = tear_down(&p, tdr, tdvpr, &pages)?;
    Ok(Outcome {
        mrtd,
        message: exit.r12,
        pages_returned,
    })
}

/// Flush, write back, free the key id, reclaim: the TDR is the last page.
fn tear_down(p: &Platform, tdr: u64, tdvpr: u64, pages: &Pages) -> Result<usize, CallError> {
    p.call(0, L::VpFlush, regs(tdvpr, 0))?;
    p.call(0, L::MngVpflushdone, regs(tdr, 0))?;
    for lp in [0, 2] {
        p.call(lp, L::PhymemCacheWb, regs(0, 0))?;
    }
    p.call(0, L::MngKeyFreeid, regs(tdr, 0))?;
    for pa in pages.given.iter().rev() {
        p.call(0, L::PhymemPageReclaim, regs(*pa, 0))?;
    }
    let free = |pa: &&u64| {
        p.page(**pa, PageSize::Size4K)
            .is_some_and(|v| v.page_type == PageType::Nda)
    };
    assert_eq!(p.hkid(HKID).map(|h| h.state), Some(HkidState::Free));
    Ok(pages.given.iter().filter(free).count())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let outcome = live()?;
    print!("MRTD ");
    outcome.mrtd.iter().for_each(|b| print!("{b:02x}"));
    println!("\nthe guest said {:#x}", outcome.message);
    println!(
        "{} pages and key id {HKID} are the host's again",
        outcome.pages_returned
    );
    Ok(())
}
