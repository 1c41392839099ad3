//! A TD's guest over the software TDX module and an honest host.

mod common;

use common::{LARGE, SHARED, kernel, no_flush, range};
use kvm_ops_guest::tdx::{
    Accept, AlreadyAccepted, CallError, Cause, Regs, TdError, TdInfo, VeKind, Vmcall, VmcallStatus,
    Width,
};
use kvm_ops_guest::{Flush, PageSize};
use kvm_ops_guest_test::tdx::module::{SeptState, pending};
use kvm_ops_guest_test::tdx::{
    Exit, Fault, Instruction, Reply, StopCause, TestTd, Vcpu, ViolationBy, hosts,
};

fn td() -> TestTd {
    TestTd::builder().build().expect("a td")
}

fn is_mapped(td: &TestTd, gpa: u64, size: PageSize) -> bool {
    let view = td.hypervisor().entry(gpa, size);
    (view.level, view.state) == (size as u8, SeptState::Mapped)
}

fn accepts(td: &TestTd, status: &str) -> u64 {
    let counts = td.hypervisor().platform().counts();
    counts.of("TDG.MEM.PAGE.ACCEPT", status)
}

#[test]
fn a_page_is_accepted_written_shared_and_had_back_as_zeros() {
    let td = TestTd::builder().pending(0x8000..0x9000).build();
    let td = td.expect("a td");
    let page = range(0x8000, 0x1000);
    let mut flushes = Vec::new();
    let found = td.run(|cpu| {
        kernel(cpu).accept(page).expect("accepted");
        cpu.write(0x8000, b"secret").expect("ours");
        let secret = cpu.read(0x8000, 6).expect("ours");

        let share = kernel(cpu).share(page, |f| flushes.push(f));
        share.expect("shared");
        cpu.write(SHARED | 0x8000, b"public").expect("shared");

        let unshare = kernel(cpu).unshare(page, |f| flushes.push(f));
        unshare.expect("private");
        let zeros = cpu.read(0x8000, 6).expect("accepted");
        (secret, zeros)
    });
    assert_eq!(found, Ok((b"secret".to_vec(), vec![0; 6])));
    let public = td.hypervisor().read(0x8000, 6).expect("ram");
    assert_eq!(public, b"public", "the shared page is the host's");
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
    // 4 KiB pages up to 2 MiB, one of 2 MiB, 2 MiB in small pages, and a tail.
    let start = LARGE - 0x3000;
    let bytes = 0x3000 + 2 * LARGE + 0x2000;
    let td = TestTd::builder()
        .pending(start..LARGE)
        .pending_large(LARGE..2 * LARGE)
        .pending(2 * LARGE..start + bytes)
        .build()
        .expect("a td");
    let last = td.run(|cpu| {
        kernel(cpu).accept(range(start, bytes)).expect("accepted");
        cpu.read(start + bytes - 8, 8).expect("accepted")
    });
    assert_eq!(last, Ok(vec![0; 8]));
    assert!(is_mapped(&td, LARGE, PageSize::Size2M));
    for gpa in (start..start + bytes).step_by(0x1000) {
        let view = td.hypervisor().entry(gpa, PageSize::Size4K);
        assert_eq!(view.state, SeptState::Mapped, "{gpa:#x}");
    }
    // 3 + 1 + 512 + 2 pages, and one size that did not fit.
    assert_eq!(accepts(&td, "SUCCESS"), 518);
    assert_eq!(accepts(&td, "PAGE_SIZE_MISMATCH"), 1);
}

#[test]
fn an_unshared_range_comes_back_in_large_pages() {
    let td = td();
    let whole = range(LARGE, 3 * LARGE);
    td.run(|cpu| {
        kernel(cpu).unshare(whole, no_flush).expect("private");
        kernel(cpu).share(whole, no_flush).expect("shared");
        kernel(cpu).unshare(whole, no_flush).expect("private");
    })
    .expect("runs to its end");
    for gpa in [LARGE, 2 * LARGE, 3 * LARGE] {
        assert!(is_mapped(&td, gpa, PageSize::Size2M));
    }
    assert_eq!(accepts(&td, "SUCCESS"), 6);
}

#[test]
fn a_part_of_a_large_page_is_shared_and_the_rest_keeps_its_contents() {
    let td = TestTd::builder().pending_large(LARGE..2 * LARGE).build();
    let td = td.expect("a td");
    let kept = td.run(|cpu| {
        kernel(cpu).accept(range(LARGE, LARGE)).expect("accepted");
        cpu.write(LARGE + 0x3000, b"kept").expect("ours");
        let part = range(LARGE + 0x1000, 0x1000);
        kernel(cpu).share(part, no_flush).expect("shared");
        cpu.write(SHARED | (LARGE + 0x1000), b"public")
            .expect("shared");
        cpu.read(LARGE + 0x3000, 4).expect("ours")
    });
    assert_eq!(kept, Ok(b"kept".to_vec()));
}

#[test]
fn this_module_has_no_one_gib_pages_and_a_range_asks_once() {
    let gib = 1 << 30;
    let td = TestTd::builder()
        .memory(2 * gib)
        .pending_large(gib..gib + LARGE)
        .pending(gib + LARGE..gib + LARGE + 0x1000)
        // The first page that is not there: the host has shown enough.
        .host(hosts::denies_service())
        .build()
        .expect("a td");
    let result = td.run(|cpu| kernel(cpu).accept(range(gib, gib)));
    let denied = Exit::Violation {
        gpa: gib + LARGE + 0x1000,
        by: ViolationBy::Accept { level: 0 },
    };
    let stopped = result.expect_err("the host stops");
    assert_eq!(stopped.cause, StopCause::Denied(Box::new(denied)));
    assert_eq!(accepts(&td, "OPERAND_INVALID"), 1);
    assert!(is_mapped(&td, gib, PageSize::Size2M));
    assert!(is_mapped(&td, gib + LARGE, PageSize::Size4K));
}

#[test]
fn interrupts_in_the_middle_do_no_harm() {
    let mut left = 40;
    let mut partial = hosts::partial_map_gpa(LARGE);
    let td = TestTd::builder()
        .host(move |host, exit| {
            left -= 1;
            let events = if left % 3 == 0 { 0 } else { pending::INTR };
            host.platform().set_pending(0, events);
            partial(host, exit)
        })
        .build()
        .expect("a td");
    td.hypervisor().platform().set_pending(0, pending::INTR);
    let bytes = td.run(|cpu| {
        let whole = range(LARGE, 2 * LARGE);
        kernel(cpu).unshare(whole, no_flush).expect("private");
        cpu.read(2 * LARGE, 8).expect("accepted")
    });
    assert_eq!(bytes, Ok(vec![0; 8]));
    let exits = td.take_exits();
    assert!(exits.iter().any(|(_, exit)| matches!(exit, Exit::Other(_))));
}

#[test]
fn a_page_that_comes_late_is_waited_for() {
    let mut exits = 0;
    let td = TestTd::builder()
        .host(move |host, exit| {
            exits += 1;
            assert!(matches!(exit, Exit::Violation { gpa: 0x8000, .. }));
            if exits == 3 {
                host.give(0x8000, PageSize::Size4K).expect("given");
            }
            Reply::Enter
        })
        .build()
        .expect("a td");
    let data = td.run(|cpu| {
        let page = range(0x8000, 0x1000);
        kernel(cpu).accept(page).expect("accepted");
        cpu.read(0x8000, 4).expect("accepted")
    });
    assert_eq!(data, Ok(vec![0; 4]));
    assert_eq!(td.take_exits().len(), 3);
}

#[test]
fn what_was_accepted_before_is_kept_with_its_contents_if_asked() {
    let td = TestTd::builder().pending(0x8000..0xa000).build();
    td.expect("a td")
        .run(|cpu| {
            let first = range(0x8000, 0x1000);
            kernel(cpu).accept(first).expect("accepted");
            cpu.write(0x8000, b"firmware").expect("ours");
            let both = range(0x8000, 0x2000);

            let refused = kernel(cpu).accept(both);
            let Err(TdError::Convert(error)) = refused else {
                panic!("{refused:?}");
            };
            let size = PageSize::Size4K;
            assert_eq!(error.cause, Cause::AlreadyAccepted { size });
            assert_eq!(error.rest, both);

            let accept = Accept::new(both, kernel(cpu).gpaw()).expect("fits");
            let accept = accept.already_accepted(AlreadyAccepted::Keep);
            kernel(cpu).run_accept(accept).expect("accepted");
            assert_eq!(cpu.read(0x8000, 8).expect("ours"), b"firmware");
            assert_eq!(cpu.read(0x9000, 8).expect("ours"), [0; 8]);
        })
        .expect("runs to its end");
}

#[test]
fn the_module_tells_width_attributes_and_place() {
    let td = TestTd::builder().attributes(TdInfo::DEBUG).vcpus(3).build();
    let infos = td
        .expect("a td")
        .run_all(|cpu| kernel(cpu).info().expect("info"));
    assert_eq!(infos.len(), 3);
    for (index, info) in (0..).zip(infos) {
        let info = info.expect("runs to its end");
        assert_eq!(info.gpaw.shared_bit(), SHARED);
        assert!(info.is_debug());
        assert_eq!(info.attributes & TdInfo::SEPT_VE_DISABLE, 0);
        assert_eq!((info.max_vcpus, info.vcpus, info.vcpu), (3, 3, index));
    }
}

#[test]
fn ve_information_says_what_to_do() {
    fn kind(cpu: &mut Vcpu) -> VeKind {
        let gpaw = kernel(cpu).gpaw();
        let info = kernel(cpu).ve_info().expect("module").expect("one");
        info.kind(gpaw)
    }
    let is_ve = |fault: Fault| match fault {
        Fault::Exception(exception) => exception.is_ve(),
        Fault::Stopped(stopped) => panic!("{stopped}"),
    };
    const DEVICE: u64 = 0xFEE0_0020;
    let td = TestTd::builder()
        .attributes(0)
        .pending(0x8000..0x9000)
        .build();
    let kinds = td.expect("a td").run(|cpu| {
        assert_eq!(kernel(cpu).ve_info(), Ok(None));
        let halt = cpu.instruction(Instruction::Hlt);
        assert!(is_ve(halt.expect_err("#VE")));
        let first = kind(cpu);
        assert!(is_ve(cpu.read(0x8010, 4).expect_err("pending")));
        let second = kind(cpu);
        let device = cpu.read(SHARED | DEVICE, 4);
        assert!(is_ve(device.expect_err("no memory")));
        let third = kind(cpu);
        assert_eq!(kernel(cpu).ve_info(), Ok(None));
        [first, second, third]
    });
    let expected = [
        VeKind::Instruction(12),
        VeKind::NotAccepted { gpa: 0x8010 },
        VeKind::Device { gpa: DEVICE },
    ];
    assert_eq!(kinds, Ok(expected));
}

#[test]
fn a_report_carries_the_data_and_the_runtime_measurement() {
    let td = TestTd::builder().accepted(0x8000..0xa000).build();
    let td = td.expect("a td");
    td.run(|cpu| {
        cpu.write(0x8000, &[7; 64]).expect("ours");
        kernel(cpu).report(0x9000, 0x8000).expect("report");
        let before = cpu.read(0x9000, 1024).expect("ours");
        assert_eq!(before[128..192], [7; 64]);

        kernel(cpu).rtmr_extend(0x8000, 2).expect("extended");
        kernel(cpu).report(0x9000, 0x8000).expect("report");
        let after = cpu.read(0x9000, 1024).expect("ours");
        const RTMRS: usize = 512 + 16 + 4 * 48;
        let rtmr = |report: &[u8], n: usize| report[RTMRS + 48 * n..][..48].to_vec();
        assert_ne!(rtmr(&before, 2), rtmr(&after, 2));
        assert_eq!(rtmr(&after, 2), td.rtmrs()[2]);
        assert_eq!(rtmr(&before, 1), rtmr(&after, 1));
        assert!(kernel(cpu).report(0x9001, 0x8000).is_err());
        assert!(kernel(cpu).rtmr_extend(0x8000, 4).is_err());
    })
    .expect("runs to its end");
}

#[test]
fn calls_reach_the_host_and_its_answers_come_back_cut_to_size() {
    const ALL: u64 = u64::MAX;
    let ones = Regs {
        r10: 0,
        r11: ALL,
        r12: ALL,
        r13: ALL,
        r14: ALL,
        r15: ALL,
        ..Regs::default()
    };
    let td = TestTd::builder()
        .host(move |_, exit| {
            assert!(matches!(exit, Exit::Vmcall(_)), "{exit}");
            Reply::Registers(Box::new(ones))
        })
        .build()
        .expect("a td");
    let out = |value| Vmcall::Out {
        port: 0x80,
        width: Width::Two,
        value,
    };
    let mmio = |width| Vmcall::MmioRead {
        gpa: 0xFEE0_0020,
        width,
    };
    let mmio_write = |value| Vmcall::MmioWrite {
        gpa: 0x1000,
        width: Width::One,
        value,
    };
    let read = Vmcall::In {
        port: 0x60,
        width: Width::One,
    };
    let cpuid = Vmcall::Cpuid {
        leaf: 2,
        subleaf: 9,
    };
    let halt = Vmcall::Halt {
        interrupts_blocked: true,
    };
    let [low, full] = [[0xFFFF_FFFF, 0, 0, 0], [ALL, 0, 0, 0]];
    let calls = [
        (read, read, [0xFF, 0, 0, 0]),
        (mmio(Width::Four), mmio(Width::Four), low),
        (mmio(Width::Eight), mmio(Width::Eight), full),
        (out(0x12_3456), out(0x3456), [0; 4]),
        (mmio_write(0x123), mmio_write(0x23), [0; 4]),
        (cpuid, cpuid, [0xFFFF_FFFF; 4]),
        (Vmcall::RdMsr(0x10), Vmcall::RdMsr(0x10), full),
        (Vmcall::WrMsr(0x10, 5), Vmcall::WrMsr(0x10, 5), [0; 4]),
        (halt, halt, [0; 4]),
    ];
    let more = [
        Vmcall::EventNotify { vector: 32 },
        Vmcall::GetQuote(range(0x4000, 0x2000)),
        Vmcall::VmcallInfo { leaf: 1 },
    ];
    td.run(|cpu| {
        let mut kernel = kernel(cpu);
        for (call, _, answer) in calls {
            assert_eq!(kernel.vmcall(call), Ok(answer), "{call:?}");
        }
        for call in more {
            kernel.vmcall(call).expect("answered");
        }
    })
    .expect("runs to its end");
    let seen: Vec<_> = td.take_exits().into_iter().map(|(_, exit)| exit).collect();
    let sent = calls.iter().map(|(_, sent, _)| *sent).chain(more);
    assert_eq!(seen, sent.map(Exit::Vmcall).collect::<Vec<_>>());
}

#[test]
fn what_the_host_must_refuse_is_not_asked() {
    let td = td();
    td.run(|cpu| {
        let mut kernel = kernel(cpu);
        assert_eq!(kernel.io_read(0x60, Width::Eight), Err(CallError::Operand));
        for gpa in [SHARED, SHARED | 0x1000, 0xFFD, u64::MAX] {
            let read = kernel.mmio_read(gpa, Width::Four);
            assert_eq!(read, Err(CallError::Operand), "{gpa:#x}");
        }
        let notify = Vmcall::EventNotify { vector: 31 };
        assert_eq!(kernel.vmcall(notify), Err(CallError::Operand));
        let quote = Vmcall::GetQuote(range(SHARED, 0x1000));
        assert_eq!(kernel.vmcall(quote), Err(CallError::Operand));
    })
    .expect("runs to its end");
    assert_eq!(td.take_exits(), []);
}

#[test]
fn last_words_arrive_in_order_and_a_refusal_is_an_error() {
    let mut text = [0; 64];
    for (n, byte) in (b'0'..).zip(&mut text) {
        *byte = n;
    }
    let last_words = Vmcall::FatalError { code: 3, text };
    let td = TestTd::builder()
        .host(move |_, exit| {
            assert_eq!(*exit, Exit::Vmcall(last_words));
            Reply::Status(VmcallStatus::SUBFUNC_UNSUPPORTED, 0)
        })
        .build()
        .expect("a td");
    let answer = td.run(|cpu| kernel(cpu).vmcall(last_words));
    let refused = CallError::Host(VmcallStatus::SUBFUNC_UNSUPPORTED);
    assert_eq!(answer, Ok(Err(refused)));
}
