//! Calls per second per leaf, the life of a 1 GiB TD, two threads on two TDs, and memory.
//!
//! `cargo bench --bench calls [-- leaves|threads|life]`. Times are processor time of the calling thread where the
//! system reports it (Linux), so that other load disturbs less, and medians of five rounds.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{GIB, Td, large_machine, regs};
use soft_tdx_module::{
    GuestEvent, GuestLeaf, GuestOp, HostLeaf as L, Outcome, Platform, Regs, VmExit,
};
use std::hint::black_box;
use std::time::{Duration, Instant};

const ROUNDS: usize = 5;

/// Processor time this thread has used; wall-clock time where the system does not say.
fn processor_time() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    match stat.split(' ').next().and_then(|n| n.parse().ok()) {
        Some(ns) => Duration::from_nanos(ns),
        None => START.get_or_init(Instant::now).elapsed(),
    }
}

/// Median time of one of the `n` calls `f` makes.
fn nanos(n: u64, mut f: impl FnMut(u64)) -> f64 {
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = processor_time();
            (0..n).for_each(&mut f);
            (processor_time() - start).as_nanos() as f64 / n as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}

fn line(what: &str, ns: f64) {
    if ns > 0.0 {
        println!("{what:<44} {ns:>10.0} ns {:>10.2} M/s", 1000.0 / ns);
    } else {
        println!("{what:<44} below the clock's resolution");
    }
}

fn ok(p: &Platform, lp: usize, leaf: L, operands: Regs) -> Regs {
    let mut r = Regs {
        rax: leaf.number(),
        ..operands
    };
    let status = p.seamcall(lp, &mut r).expect("executes");
    assert!(!status.is_error(), "{} {status}", leaf.name());
    r
}

/// A TD with tables for its first 2 MiB and a debug attribute, so that every leaf can be tried.
fn small_td(p: &Platform, gib: u64, hkid: u16, lp: usize) -> Td {
    let mut td = Td::create(p, gib * GIB, hkid, lp, 1);
    td.tables(p, 0, 0);
    td.add(p, 0, 1);
    td
}

/// L1 and its L2 VM, event by event.
fn partitioned() {
    const STATE: u64 = 0x1000;
    const VM_1: u64 = 1 << 52;
    const L2_VAPIC: u64 = 0x2424_0003_0000_2012;
    println!("\n-- a TD with an L2 VM, one thread, memory flat");
    let p = large_machine(1, false);
    let mut td = Td::partitioned(&p, GIB, 33, 0, 0, 1);
    td.l2_tables(&p);
    for gpa in [0, STATE] {
        td.add(&p, gpa, 0);
    }
    td.finalize(&p);
    let mut r = Regs {
        rax: L::VpEnter.number(),
        ..regs(td.tdvpr, 0)
    };
    p.seamcall_step(0, &mut r).expect("executes");
    let tdcall = |leaf: GuestLeaf, [rcx, rdx, r8, r9]: [u64; 4]| {
        let registers = Regs {
            rcx,
            rdx,
            r8,
            r9,
            ..Regs::leaf(leaf.number())
        };
        let event = GuestEvent::Tdcall { mode_64bit: true };
        p.guest_event(0, registers, event, 4).expect("inside")
    };
    tdcall(GuestLeaf::VpWr, [0, L2_VAPIC, 0, u64::MAX]);
    line(
        "MEM.PAGE.ATTR.WR",
        nanos(100_000, |n| {
            let attributes = 0x8001 | (n & 1) << 1;
            black_box(tdcall(
                GuestLeaf::MemPageAttrWr,
                [0, attributes << 16, 0x7F << 16, 0],
            ));
        }),
    );
    line(
        "MEM.PAGE.ATTR.RD",
        nanos(100_000, |_| {
            black_box(tdcall(GuestLeaf::MemPageAttrRd, [0; 4]));
        }),
    );
    let halt = GuestEvent::Exit(VmExit {
        reason: 12,
        ..VmExit::default()
    });
    line(
        "TDG.VP.ENTER + exit to L1, a round trip",
        nanos(100_000, |_| {
            tdcall(GuestLeaf::VpEnter, [VM_1, STATE, 0, 0]);
            let flow = p.guest_event(0, Regs::default(), halt, 4);
            black_box(flow.expect("inside"));
        }),
    );
}

fn per_leaf(encrypt: bool) {
    println!(
        "\n-- leaves, one thread, memory {}",
        if encrypt { "encrypted" } else { "flat" }
    );
    let p = large_machine(1, encrypt);
    let mut td = small_td(&p, 1, 33, 0);
    let page = td.page();
    let run = |leaf, o| ok(&p, 0, leaf, o);
    if !encrypt {
        line(
            "SYS.RD",
            nanos(200_000, |_| {
                black_box(run(L::SysRd, regs(0, 0x0A00_0003_0000_0008)));
            }),
        );
        line(
            "PHYMEM.PAGE.RDMD",
            nanos(200_000, |_| {
                black_box(run(L::PhymemPageRdmd, regs(page, 0)));
            }),
        );
        line(
            "MNG.RD",
            nanos(200_000, |_| {
                black_box(run(L::MngRd, regs(td.tdr, 0x1110_0003_0000_0000)));
            }),
        );
        line(
            "VP.RD",
            nanos(200_000, |_| {
                black_box(run(L::VpRd, regs(td.tdvpr, 0x203C)));
            }),
        );
        line(
            "MEM.SEPT.RD",
            nanos(200_000, |_| {
                black_box(run(L::MemSeptRd, regs(0, td.tdr)));
            }),
        );
        line(
            "MEM.TRACK",
            nanos(200_000, |_| {
                run(L::MemTrack, regs(td.tdr, 0));
            }),
        );
        line(
            "RANGE.BLOCK + RANGE.UNBLOCK, each",
            nanos(100_000, |_| {
                run(L::MemRangeBlock, regs(0, td.tdr));
                run(L::MemRangeUnblock, regs(0, td.tdr));
            }) / 2.0,
        );
        line(
            "PAGE.AUG + PAGE.REMOVE, each",
            nanos(100_000, |_| {
                run(
                    L::MemPageAug,
                    Regs {
                        r8: page,
                        ..regs(0x3000, td.tdr)
                    },
                );
                run(L::MemPageRemove, regs(0x3000, td.tdr));
            }) / 2.0,
        );
        line(
            "SEPT.ADD + SEPT.REMOVE, each",
            nanos(20_000, |_| {
                run(
                    L::MemSeptAdd,
                    Regs {
                        r8: page,
                        ..regs(0x20_0001, td.tdr)
                    },
                );
                run(L::MemSeptRemove, regs(0x20_0001, td.tdr));
            }) / 2.0,
        );
    }
    line(
        "MEM.RD",
        nanos(100_000, |_| {
            black_box(run(L::MemRd, regs(8, td.tdr)));
        }),
    );
    line(
        "MEM.WR",
        nanos(100_000, |n| {
            run(
                L::MemWr,
                Regs {
                    r8: n,
                    ..regs(8, td.tdr)
                },
            );
        }),
    );
    line(
        "PAGE.ADD + PAGE.REMOVE, each",
        nanos(5_000, |_| {
            run(
                L::MemPageAdd,
                Regs {
                    r8: page,
                    r9: 0x8000,
                    ..regs(0x3000, td.tdr)
                },
            );
            run(L::MemPageRemove, regs(0x3000, td.tdr));
        }) / 2.0,
    );
    line(
        "MR.EXTEND",
        nanos(20_000, |_| {
            run(L::MrExtend, regs(0, td.tdr));
        }),
    );
    td.finalize(&p);
    if !encrypt {
        p.set_guest(td.tdvpr, |_: &Outcome| GuestOp::vmcall(12, [0; 4]));
        line(
            "VP.ENTER + VP.VMCALL, a round trip",
            nanos(50_000, |_| {
                run(L::VpEnter, regs(td.tdvpr, 0));
            }),
        );
        line(
            "MNG.CREATE of a used page (an error)",
            nanos(200_000, |_| {
                let mut r = Regs {
                    rax: L::MngCreate.number(),
                    ..regs(td.tdr, 34)
                };
                let _ = black_box(p.seamcall(0, &mut r));
            }),
        );
    }
}

/// The life of a TD that uses 262 144 pages; the time of each phase.
fn life(p: &Platform, gib: u64, hkid: u16, lp: usize) -> Vec<(&'static str, u64, Duration)> {
    const PAGES: u64 = 262_144;
    let mut phases = Vec::new();
    let mut at = processor_time();
    let mut phase = |name, calls| {
        let now = processor_time();
        phases.push((name, calls, now - at));
        at = now;
    };
    // Private pages come from the TD's own GiB, control pages and tables from the last.
    let mut td = Td::create(
        p,
        (p.config().tdmrs.len() as u64) * GIB + u64::from(hkid) * 0x100_0000,
        hkid,
        lp,
        0,
    );
    for gpa in (0..GIB).step_by(0x20_0000) {
        td.tables(p, gpa, 0);
    }
    td.finalize(p);
    phase("create, 514 tables", 540);
    let private = |n: u64| gib * GIB + (n << 12);
    for n in 0..PAGES {
        ok(
            p,
            lp,
            L::MemPageAug,
            Regs {
                r8: private(n),
                ..regs(n << 12, td.tdr)
            },
        );
    }
    phase("PAGE.AUG", PAGES);
    let mut n = 0;
    p.set_guest(td.tdvpr, move |_: &Outcome| {
        n += 1;
        if n <= PAGES {
            GuestOp::accept((n - 1) << 12, 0)
        } else {
            GuestOp::vmcall(12, [0; 4])
        }
    });
    assert_eq!(td.enter(p).rax, 77);
    phase("PAGE.ACCEPT", PAGES);
    for n in 0..PAGES {
        ok(p, lp, L::MemRangeBlock, regs(n << 12, td.tdr));
    }
    phase("RANGE.BLOCK", PAGES);
    ok(p, lp, L::MemTrack, regs(td.tdr, 0));
    for n in 0..PAGES {
        ok(p, lp, L::MemPageRemove, regs(n << 12, td.tdr));
    }
    phase("PAGE.REMOVE", PAGES);
    ok(p, lp, L::VpFlush, regs(td.tdvpr, 0));
    ok(p, lp, L::MngVpflushdone, regs(td.tdr, 0));
    for wb in [lp, (lp + 2) % 4] {
        let mut r = Regs::leaf(L::PhymemCacheWb.number());
        while p.seamcall(wb, &mut r) == Err(soft_tdx_module::LpError::Busy { lp: wb }) {}
    }
    // Two TDs torn down at once write back for each other; the last one to finish frees the id.
    let mut r = Regs {
        rax: L::MngKeyFreeid.number(),
        ..regs(td.tdr, 0)
    };
    while p.seamcall(lp, &mut r).expect("executes").is_error() {
        r = Regs {
            rax: L::MngKeyFreeid.number(),
            ..regs(td.tdr, 0)
        };
        for wb in [lp, (lp + 2) % 4] {
            let _ = p.seamcall(wb, &mut Regs::leaf(L::PhymemCacheWb.number()));
        }
    }
    td.reclaim(p);
    phase("teardown", 540);
    phases
}

fn lives() {
    for encrypt in [false, true] {
        println!(
            "\n-- life of a 1 GiB TD, memory {}",
            if encrypt { "encrypted" } else { "flat" }
        );
        let p = large_machine(2, encrypt);
        let before = resident();
        let phases = life(&p, 1, 33, 0);
        let total: Duration = phases.iter().map(|x| x.2).sum();
        for (name, calls, time) in &phases {
            line(
                &format!("{name} ({calls} calls)"),
                time.as_nanos() as f64 / *calls as f64,
            );
        }
        let entries = 262_144 + 512 + 1;
        let architecture = entries * 16 + 514 * 4096;
        println!(
            "total {total:.3?}; resident memory grew by {:.1} MiB, the architecture needs {:.1} MiB",
            (resident().saturating_sub(before)) as f64 / (1 << 20) as f64,
            f64::from(architecture) / f64::from(1 << 20)
        );
    }
}

/// Resident set in bytes; 0 where the system does not say.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm
        .split(' ')
        .nth(1)
        .and_then(|n| n.parse::<usize>().ok())
        .unwrap_or(0)
        * 4096
}

/// Calls per second of processor time of one of `threads` threads, each with a separate TD.
fn throughput(threads: u64, calls: u64, f: &(dyn Fn(&Platform, &Td, u64) + Sync)) -> f64 {
    let p = large_machine(threads, false);
    let tds: Vec<Td> = (0..threads)
        .map(|t| small_td(&p, 1 + t, 33 + t as u16, t as usize * 2))
        .collect();
    let worker = |td: &Td| {
        let start = processor_time();
        (0..calls).for_each(|n| f(&p, td, n));
        calls as f64 / (processor_time() - start).as_secs_f64()
    };
    let mut rates: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            std::thread::scope(|s| {
                let running: Vec<_> = tds.iter().map(|td| s.spawn(|| worker(td))).collect();
                let rates = running.into_iter().map(|t| t.join().expect("no panic"));
                rates.sum::<f64>() / threads as f64
            })
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[ROUNDS / 2]
}

fn scaling() {
    println!(
        "\n-- two threads on two TDs in GiBs of their own, calls per second of each thread's processor time"
    );
    let show = |name: &str, f: &(dyn Fn(&Platform, &Td, u64) + Sync)| {
        const CALLS: u64 = 1_000_000;
        let (one, two) = (throughput(1, CALLS, f), throughput(2, CALLS, f));
        println!(
            "{name:<32} alone {:>6.2} M/s, each of two {:>6.2} M/s: {:.2}x together",
            one / 1e6,
            two / 1e6,
            2.0 * two / one
        );
    };
    show("MEM.SEPT.RD", &|p, td, _| {
        ok(p, td.lp, L::MemSeptRd, regs(0, td.tdr));
    });
    show("PHYMEM.PAGE.RDMD", &|p, td, _| {
        ok(p, td.lp, L::PhymemPageRdmd, regs(td.tdr, 0));
    });
    show("RANGE.BLOCK, RANGE.UNBLOCK", &|p, td, n| {
        let leaf = if n % 2 == 0 {
            L::MemRangeBlock
        } else {
            L::MemRangeUnblock
        };
        ok(p, td.lp, leaf, regs(0, td.tdr));
    });
}

fn main() {
    let only = std::env::args().nth(1).filter(|a| !a.starts_with("--"));
    let wanted = |what: &str| only.as_deref().is_none_or(|o| o == what);
    if wanted("leaves") {
        per_leaf(false);
        per_leaf(true);
        partitioned();
    }
    if wanted("threads") {
        scaling();
    }
    if wanted("life") {
        lives();
    }
}
