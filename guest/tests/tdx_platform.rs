//! A TD's guest over the software TDX module and an honest host.

mod common;

use common::td::{Exit, Guest, Host, LARGE, Reply, SHARED};
use kvm_ops_guest::tdx::{
    Accept, AlreadyAccepted, CallError, Cause, TdError, TdInfo, VeKind, Vmcall, VmcallStatus, Width,
};
use kvm_ops_guest::{Flush, GpaRange, PageSize};
use soft_tdx_module::{GuestOp, Regs, SeptState, pending};

const DEBUG: u64 = 1;

fn range(start: u64, bytes: u64) -> GpaRange {
    GpaRange::new(start, bytes).expect("a range")
}

fn no_flush(_: Flush) {}

#[test]
fn a_page_is_accepted_written_shared_and_had_back_as_zeros() {
    let mut host = Host::new(0);
    host.aug(0x8000, 0);
    let page = range(0x8000, 0x1000);
    let mut flushes = Vec::new();
    let seen = &mut flushes;
    let found = host.run_honestly(move |cpu: &mut Guest| {
        cpu.kernel().accept(page).expect("accepted");
        cpu.write(0x8000, b"secret").expect("ours");
        let secret = cpu.read(0x8000, 6).expect("ours");

        cpu.kernel().share(page, |f| seen.push(f)).expect("shared");
        cpu.write(SHARED | 0x8000, b"public").expect("shared");

        cpu.kernel()
            .unshare(page, |f| seen.push(f))
            .expect("private");
        let zeros = cpu.read(0x8000, 6).expect("accepted");
        (secret, zeros)
    });
    assert_eq!(found, (b"secret".to_vec(), vec![0; 6]));
    assert_eq!(
        host.read(0x8000, 6),
        b"public",
        "the shared page is the host's"
    );
    let both = Flush {
        caches: true,
        tlb: true,
    };
    let tlb = Flush {
        caches: false,
        tlb: true,
    };
    assert_eq!(flushes, [both, tlb]);
}

#[test]
fn a_range_is_accepted_in_the_sizes_that_the_host_mapped() {
    let mut host = Host::new(0);
    // 4 KiB pages up to 2 MiB, one of 2 MiB, 2 MiB in small pages, and a tail.
    let start = LARGE - 0x3000;
    let bytes = 0x3000 + 2 * LARGE + 0x2000;
    for gpa in (start..LARGE).step_by(0x1000) {
        host.aug(gpa, 0);
    }
    host.aug(LARGE, 1);
    for gpa in (2 * LARGE..start + bytes).step_by(0x1000) {
        host.aug(gpa, 0);
    }
    let calls = host.run_honestly(|cpu: &mut Guest| {
        cpu.kernel().accept(range(start, bytes)).expect("accepted");
        cpu.read(start + bytes - 8, 8).expect("accepted")
    });
    assert_eq!(calls, [0; 8]);
    assert_eq!(host.entry(LARGE, 1), (1, SeptState::Mapped));
    for gpa in (start..start + bytes).step_by(0x1000) {
        assert_eq!(host.entry(gpa, 0).1, SeptState::Mapped, "{gpa:#x}");
    }
    let accepts = host.p.counts();
    // 3 + 1 + 512 + 2 pages, and one size that did not fit.
    assert_eq!(accepts.of("TDG.MEM.PAGE.ACCEPT", "SUCCESS"), 518);
    assert_eq!(accepts.of("TDG.MEM.PAGE.ACCEPT", "PAGE_SIZE_MISMATCH"), 1);
}

#[test]
fn an_unshared_range_comes_back_in_large_pages() {
    let mut host = Host::new(0);
    let whole = range(LARGE, 3 * LARGE);
    host.run_honestly(|cpu: &mut Guest| {
        cpu.kernel().unshare(whole, no_flush).expect("private");
        cpu.kernel().share(whole, no_flush).expect("shared");
        cpu.kernel().unshare(whole, no_flush).expect("private");
    });
    for gpa in [LARGE, 2 * LARGE, 3 * LARGE] {
        assert_eq!(host.entry(gpa, 1), (1, SeptState::Mapped));
    }
    let counts = host.p.counts();
    assert_eq!(counts.of("TDG.MEM.PAGE.ACCEPT", "SUCCESS"), 6);
}

#[test]
fn this_module_has_no_one_gib_pages_and_a_range_asks_once() {
    let gib = 1 << 30;
    let mut host = Host::new(0);
    host.aug(gib, 1);
    host.aug(gib + LARGE, 0);
    let error = host.run(
        |cpu: &mut Guest| cpu.kernel().accept(range(gib, gib)),
        |_, exit| match exit {
            // The first page that is not there: the host has shown enough.
            Exit::Violation { .. } => Reply::Stop,
            other => panic!("{other:?}"),
        },
    );
    assert_eq!(error, None);
    let counts = host.p.counts();
    assert_eq!(counts.of("TDG.MEM.PAGE.ACCEPT", "OPERAND_INVALID"), 1);
    assert_eq!(host.entry(gib, 1), (1, SeptState::Mapped));
    assert_eq!(host.entry(gib + LARGE, 0), (0, SeptState::Mapped));
}

#[test]
fn interrupts_in_the_middle_do_no_harm() {
    let mut host = Host::new(0);
    host.p.set_pending(0, pending::INTR);
    let mut left = 40;
    let bytes = host.run(
        |cpu: &mut Guest| {
            cpu.kernel()
                .unshare(range(LARGE, 2 * LARGE), no_flush)
                .expect("private");
            cpu.read(2 * LARGE, 8).expect("accepted")
        },
        |host, exit| {
            left -= 1;
            host.p
                .set_pending(0, if left % 3 == 0 { 0 } else { pending::INTR });
            match exit {
                Exit::MapGpa { gpa, bytes } if bytes > LARGE => {
                    host.map_gpa(gpa, LARGE);
                    Reply::Status(VmcallStatus::RETRY, gpa + LARGE)
                }
                Exit::MapGpa { gpa, bytes } => {
                    host.map_gpa(gpa, bytes);
                    Reply::Status(VmcallStatus::SUCCESS, 0)
                }
                Exit::Other(_) => Reply::Enter,
                other => panic!("{other:?}"),
            }
        },
    );
    assert_eq!(bytes, Some(vec![0; 8]));
}

#[test]
fn a_page_that_comes_late_is_waited_for() {
    let mut host = Host::new(0);
    let mut exits = 0;
    let data = host.run(
        |cpu: &mut Guest| {
            cpu.kernel()
                .accept(range(0x8000, 0x1000))
                .expect("accepted");
            cpu.read(0x8000, 4).expect("accepted")
        },
        |host, exit| {
            exits += 1;
            assert!(matches!(exit, Exit::Violation { gpa: 0x8000, .. }));
            if exits == 3 {
                host.aug(0x8000, 0);
            }
            Reply::Enter
        },
    );
    assert_eq!(data, Some(vec![0; 4]));
    assert_eq!(exits, 3);
}

#[test]
fn what_was_accepted_before_is_kept_with_its_contents_if_asked() {
    let mut host = Host::new(0);
    host.aug(0x8000, 0);
    host.aug(0x9000, 0);
    host.run_honestly(|cpu: &mut Guest| {
        cpu.kernel()
            .accept(range(0x8000, 0x1000))
            .expect("accepted");
        cpu.write(0x8000, b"firmware").expect("ours");
        let both = range(0x8000, 0x2000);

        let refused = cpu.kernel().accept(both);
        let Err(TdError::Convert(error)) = refused else {
            panic!("{refused:?}");
        };
        let size = PageSize::Size4K;
        assert_eq!(error.cause, Cause::AlreadyAccepted { size });
        assert_eq!(error.rest, both);

        let accept = Accept::new(both, cpu.kernel().gpaw()).expect("fits");
        let accept = accept.already_accepted(AlreadyAccepted::Keep);
        cpu.kernel().run_accept(accept).expect("accepted");
        assert_eq!(cpu.read(0x8000, 8).expect("ours"), b"firmware");
        assert_eq!(cpu.read(0x9000, 8).expect("ours"), [0; 8]);
    });
}

#[test]
fn the_module_tells_width_attributes_and_place() {
    let mut host = Host::new(DEBUG);
    let info = host.run_honestly(|cpu: &mut Guest| cpu.kernel().info().expect("info"));
    assert_eq!(info.gpaw.shared_bit(), SHARED);
    assert!(info.is_debug());
    assert_eq!(info.attributes & TdInfo::SEPT_VE_DISABLE, 0);
    assert_eq!((info.max_vcpus, info.vcpus, info.vcpu), (4, 1, 0));
}

#[test]
fn ve_information_says_what_to_do() {
    let mut host = Host::new(0);
    host.aug(0x8000, 0);
    let kinds = host.run_honestly(|cpu: &mut Guest| {
        let gpaw = cpu.kernel().gpaw();
        assert_eq!(cpu.kernel().ve_info(), Ok(None));
        let mut kinds = Vec::new();
        assert_eq!(cpu.instruction(GuestOp::hlt()).vector, 20);
        kinds.push(
            cpu.kernel()
                .ve_info()
                .expect("module")
                .expect("one")
                .kind(gpaw),
        );
        assert_eq!(cpu.read(0x8010, 4).expect_err("pending").vector, 20);
        kinds.push(
            cpu.kernel()
                .ve_info()
                .expect("module")
                .expect("one")
                .kind(gpaw),
        );
        assert_eq!(cpu.kernel().ve_info(), Ok(None));
        kinds
    });
    let expected = [VeKind::Instruction(12), VeKind::NotAccepted { gpa: 0x8010 }];
    assert_eq!(kinds, expected);
}

#[test]
fn a_report_carries_the_data_and_the_runtime_measurement() {
    let mut host = Host::new(0);
    host.aug(0x8000, 0);
    host.aug(0x9000, 0);
    host.run_honestly(|cpu: &mut Guest| {
        cpu.kernel()
            .accept(range(0x8000, 0x2000))
            .expect("accepted");
        cpu.write(0x8000, &[7; 64]).expect("ours");
        cpu.kernel().report(0x9000, 0x8000).expect("report");
        let before = cpu.read(0x9000, 1024).expect("ours");
        assert_eq!(before[128..192], [7; 64]);

        cpu.kernel().rtmr_extend(0x8000, 2).expect("extended");
        cpu.kernel().report(0x9000, 0x8000).expect("report");
        let after = cpu.read(0x9000, 1024).expect("ours");
        const RTMRS: usize = 512 + 16 + 4 * 48;
        let rtmr = |report: &[u8], n: usize| report[RTMRS + 48 * n..][..48].to_vec();
        assert_ne!(rtmr(&before, 2), rtmr(&after, 2));
        assert_eq!(rtmr(&before, 1), rtmr(&after, 1));
        assert!(cpu.kernel().report(0x9001, 0x8000).is_err());
        assert!(cpu.kernel().rtmr_extend(0x8000, 4).is_err());
    });
}

#[test]
fn calls_reach_the_host_and_its_answers_come_back_cut_to_size() {
    let mut host = Host::new(0);
    let mut log = Vec::new();
    host.run(
        |cpu: &mut Guest| {
            let mut kernel = cpu.kernel();
            let all = u64::MAX;
            assert_eq!(kernel.io_read(0x60, Width::One), Ok(0xFF));
            assert_eq!(kernel.mmio_read(0xFEE0_0020, Width::Four), Ok(0xFFFF_FFFF));
            assert_eq!(kernel.mmio_read(0xFEE0_0020, Width::Eight), Ok(all));
            kernel.io_write(0x80, Width::Two, 0x12_3456).expect("out");
            kernel.mmio_write(0x1000, Width::One, 0x123).expect("mmio");
            let cpuid = kernel.vmcall(Vmcall::Cpuid {
                leaf: 2,
                subleaf: 9,
            });
            assert_eq!(cpuid, Ok([0xFFFF_FFFF; 4]));
            assert_eq!(kernel.vmcall(Vmcall::RdMsr(0x10)), Ok([all, 0, 0, 0]));
            kernel.vmcall(Vmcall::WrMsr(0x10, 5)).expect("wrmsr");
            let halt = Vmcall::Halt {
                interrupts_blocked: true,
            };
            kernel.vmcall(halt).expect("hlt");
            kernel
                .vmcall(Vmcall::EventNotify { vector: 32 })
                .expect("ok");
            let quote = Vmcall::GetQuote(range(0x4000, 0x2000));
            kernel.vmcall(quote).expect("quote");
            kernel.vmcall(Vmcall::VmcallInfo { leaf: 1 }).expect("info");
        },
        |_, exit| match exit {
            Exit::Vmcall(r) => {
                log.push([r.r11, r.r12, r.r13, r.r14, r.r15]);
                Reply::Registers(Regs {
                    r10: 0,
                    r11: u64::MAX,
                    r12: u64::MAX,
                    r13: u64::MAX,
                    r14: u64::MAX,
                    r15: u64::MAX,
                    ..Regs::default()
                })
            }
            other => panic!("{other:?}"),
        },
    )
    .expect("runs to its end");
    let expected = [
        [30, 1, 0, 0x60, 0],
        [48, 4, 0, SHARED | 0xFEE0_0020, 0],
        [48, 8, 0, SHARED | 0xFEE0_0020, 0],
        [30, 2, 1, 0x80, 0x3456],
        [48, 1, 1, SHARED | 0x1000, 0x23],
        [10, 2, 9, 0, 0],
        [31, 0x10, 0, 0, 0],
        [32, 0x10, 5, 0, 0],
        [12, 1, 0, 0, 0],
        [0x10004, 32, 0, 0, 0],
        [0x10002, SHARED | 0x4000, 0x2000, 0, 0],
        [0x10000, 1, 0, 0, 0],
    ];
    assert_eq!(log, expected);
}

#[test]
fn what_the_host_must_refuse_is_not_asked() {
    let mut host = Host::new(0);
    host.run_honestly(|cpu: &mut Guest| {
        let mut kernel = cpu.kernel();
        assert_eq!(kernel.io_read(0x60, Width::Eight), Err(CallError::Operand));
        for gpa in [SHARED, SHARED | 0x1000, 0xFFD, u64::MAX] {
            let read = kernel.mmio_read(gpa, Width::Four);
            assert_eq!(read, Err(CallError::Operand), "{gpa:#x}");
        }
        let notify = Vmcall::EventNotify { vector: 31 };
        assert_eq!(kernel.vmcall(notify), Err(CallError::Operand));
        let quote = Vmcall::GetQuote(range(SHARED, 0x1000));
        assert_eq!(kernel.vmcall(quote), Err(CallError::Operand));
    });
}

#[test]
fn last_words_arrive_in_order_and_a_refusal_is_an_error() {
    let mut host = Host::new(0);
    let mut text = [0; 64];
    text[..11].copy_from_slice(b"page stolen");
    let answer = host.run(
        |cpu: &mut Guest| cpu.kernel().vmcall(Vmcall::FatalError { code: 3, text }),
        |_, exit| match exit {
            Exit::Vmcall(r) => {
                assert_eq!((r.r11, r.r12), (0x10003, 3));
                let words = [r.r14, r.r15, r.rbx, r.rdi, r.rsi, r.r8, r.r9, r.rdx];
                let shown: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                assert_eq!(shown, text);
                Reply::Status(VmcallStatus::SUBFUNC_UNSUPPORTED, 0)
            }
            other => panic!("{other:?}"),
        },
    );
    let refused = CallError::Host(VmcallStatus::SUBFUNC_UNSUPPORTED);
    assert_eq!(answer, Some(Err(refused)));
}
