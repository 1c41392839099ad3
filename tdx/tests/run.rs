//! The exits of a TD, named by the cases of Linux's TDX self-tests (docs/tdx-run.md).

mod run_support;

use std::time::Duration;

use kvm_ops_core::guest::{Action, FnProgram, Outcome, Script};
use kvm_ops_core::{
    Answer, CpuidEntry, Exit, Field, Gpa, Irqchip, Level, PagePort, Privacy, TdParams, TdxRequest,
    VcpuId, VcpuOps, VmOps,
};
use kvm_ops_core::{Error, ExitKind, Host, Step};
use run_support::{
    INVALID_OPERAND, Load, Made, PAGE, SHARED, SUBFUNC_UNSUPPORTED, refused, td, transcript,
    values, words,
};

const IO: u64 = 30;
const RDMSR: u64 = 31;
const WRMSR: u64 = 32;
const MMIO: u64 = 48;
const GET_TD_VM_CALL_INFO: u64 = 0x10000;
const GET_QUOTE: u64 = 0x10002;
const REPORT_FATAL_ERROR: u64 = 0x10003;
const SETUP_EVENT_NOTIFY: u64 = 0x10004;

#[test]
fn lifecycle() {
    let (mut td, transcript) = td(Script::new());
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown), "it stays so");
    transcript.expect::<&str>([]);
    td.destroy();
}

#[test]
fn report_fatal_error() {
    const CODE: u64 = 0x0bad_0000_0000_0000;
    let (mut td, transcript) = td(Script::new().tdvmcall(REPORT_FATAL_ERROR, [CODE, 0, 5, 6]));
    let exit = td.vcpu().vcpu_run();
    assert_eq!(exit, Ok(Exit::SystemEvent { kind: 7 }));
    let data = words(td.vcpu().exit_data());
    assert_eq!(data.len(), 16);
    let registers = [0, REPORT_FATAL_ERROR, CODE, 0, 5, 6];
    assert_eq!(data[10..], registers, "R10 to R15");
    assert_eq!(data[1], 0xfc00, "RCX: which registers the guest shows");
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect([values([0, REPORT_FATAL_ERROR, CODE, 0, 5, 6])]);
    td.destroy();
}

#[test]
fn ioexit() {
    let (mut td, transcript) = td(Script::new().output(0x50, &[0xab]).input(0x50, 1));
    assert!(td.vcpu().exit_data().is_empty(), "before the first run");
    let (port, size, count) = (0x50, 1, 1);
    let exit = td.vcpu().vcpu_run();
    assert_eq!(exit, Ok(Exit::IoOut { port, size, count }));
    assert_eq!(td.vcpu().exit_data(), [0xab]);
    let exit = td.vcpu().vcpu_run();
    assert_eq!(exit, Ok(Exit::IoIn { port, size, count }));
    td.vcpu().exit_data()[0] = 0xac;
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    assert!(td.vcpu().exit_data().is_empty());
    transcript.expect(["Done", "Data([172])"]);
}

#[test]
fn td_cpuid_and_cpuid_tdcall_answer_what_the_td_was_created_with() {
    let entry = CpuidEntry {
        leaf: 1,
        subleaf: 0,
        subleaf_significant: false,
        // CLFLUSH lines of 8 quadwords.
        regs: [0, 0x0008_0000, 0, 0],
    };
    let mut td = Made {
        td: TdParams {
            cpuid: vec![entry],
            ..TdParams::default()
        },
        ..Made::default()
    }
    .td();
    let script = Script::new()
        .tdvmcall(10, [1, 7, 0, 0])
        .tdvmcall(10, [0x1234_5678, 0, 3, 4]);
    let (program, transcript) = transcript(script);
    td.vcpu().load(Box::new(program));
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect([
        values([0, 10, 0, 0x0008_0000, 0, 0]),
        values([0, 10, 0, 0, 0, 0]),
    ]);
}

#[test]
fn get_td_vmcall_info() {
    let script = Script::new()
        .tdvmcall(GET_TD_VM_CALL_INFO, [0, 2, 3, 4])
        .tdvmcall(GET_TD_VM_CALL_INFO, [1, 0, 0, 0])
        .tdvmcall(GET_TD_VM_CALL_INFO, [1, 0, 0, 0])
        .tdvmcall(GET_TD_VM_CALL_INFO, [2, 0, 0, 0]);
    let (mut td, transcript) = td(script);
    let info = Ok(Exit::Tdx(TdxRequest::GetTdVmCallInfo { leaf: 1 }));
    assert_eq!(td.vcpu().vcpu_run(), info, "not answered");
    assert_eq!(td.vcpu().vcpu_run(), info);
    let (status, values_of) = (0, [3, 0, 0, 9]);
    let answer = Answer::Tdx {
        status,
        values: values_of,
    };
    td.vcpu().answer(answer).unwrap();
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect([
        values([0, 0, 0, 0, 0, 4]),
        values([0, 0, 0, 0, 0, 0]),
        values([0, 3, 0, 0, 9, 0]),
        values([INVALID_OPERAND, GET_TD_VM_CALL_INFO, 2, 0, 0, 0]),
    ]);
}

#[test]
fn guest_writes() {
    let script = Script::new()
        .output(0x51, &[0xab])
        .output(0x51, &[0xcd, 0xab])
        .output(0x51, &[0xef, 0xcd, 0xab, 0xff])
        .tdvmcall(IO, [5, 1, 0x51, 0])
        .tdvmcall(IO, [4, 2, 0x51, 0])
        .tdvmcall(IO, [4, 1, 0x1_0051, 0]);
    let (mut td, transcript) = td(script);
    for expected in [&[0xab][..], &[0xcd, 0xab], &[0xef, 0xcd, 0xab, 0xff]] {
        let exit = Exit::IoOut {
            port: 0x51,
            size: expected.len() as u8,
            count: 1,
        };
        assert_eq!(td.vcpu().vcpu_run(), Ok(exit));
        assert_eq!(td.vcpu().exit_data(), expected);
    }
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    assert_eq!(
        transcript.all()[3..],
        [
            values([INVALID_OPERAND, IO, 5, 1, 0x51, 0]),
            values([INVALID_OPERAND, IO, 4, 2, 0x51, 0]),
            values([INVALID_OPERAND, IO, 4, 1, 0x1_0051, 0]),
        ]
    );
}

#[test]
fn guest_reads() {
    let script = Script::new()
        .input(0x52, 1)
        .input(0x52, 2)
        .input(0x52, 4)
        .input(0x52, 4)
        .tdvmcall(IO, [5, 0, 0x52, 0]);
    let (mut td, transcript) = td(script);
    for bytes in [&[0xab][..], &[0xcd, 0xab], &[0xef, 0xcd, 0xab, 0xff], &[]] {
        let exit = td.vcpu().vcpu_run().unwrap();
        assert!(matches!(exit, Exit::IoIn { port: 0x52, .. }), "{exit:?}");
        td.vcpu().exit_data()[..bytes.len()].copy_from_slice(bytes);
    }
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect([
        "Data([171])".into(),
        "Data([205, 171])".into(),
        "Data([239, 205, 171, 255])".into(),
        "Data([0, 0, 0, 0])".to_owned(), // Unanswered: not the value read before.
        values([INVALID_OPERAND, IO, 5, 0, 0x52, 0]),
    ]);
}

const X2APIC_ICR: u64 = 0x830;
const MISC_ENABLE: u64 = 0x1a0;
const POWER_CTL: u64 = 0x1fc;

#[test]
fn msr_writes() {
    let script = Script::new()
        .tdvmcall(WRMSR, [X2APIC_ICR, 4, 0, 0])
        .tdvmcall(WRMSR, [MISC_ENABLE, 0x1800, 0, 0])
        .tdvmcall(WRMSR, [POWER_CTL, 6, 0, 0])
        .tdvmcall(WRMSR, [1 << 32, 6, 0, 0]);
    let (mut td, transcript) = td(script);
    for (msr, written) in [(X2APIC_ICR, 4), (MISC_ENABLE, 0x1800), (POWER_CTL, 6)] {
        let (index, value) = (msr as u32, written);
        let exit = td.vcpu().vcpu_run();
        assert_eq!(exit, Ok(Exit::WriteMsr { index, value }));
        if msr == POWER_CTL {
            td.vcpu().answer(Answer::InjectGp).unwrap();
        }
    }
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect([
        values([0, WRMSR, X2APIC_ICR, 4, 0, 0]),
        values([0, WRMSR, MISC_ENABLE, 0x1800, 0, 0]),
        values([INVALID_OPERAND, WRMSR, POWER_CTL, 6, 0, 0]),
        values([INVALID_OPERAND, WRMSR, 1 << 32, 6, 0, 0]),
    ]);
}

#[test]
fn msr_reads() {
    let script = Script::new()
        .tdvmcall(RDMSR, [X2APIC_ICR, 0, 0, 0])
        .tdvmcall(RDMSR, [POWER_CTL, 0, 0, 0])
        .tdvmcall(RDMSR, [MISC_ENABLE, 0, 0, 0]);
    let (mut td, transcript) = td(script);
    for (msr, read) in [
        (X2APIC_ICR, Some(4)),
        (POWER_CTL, None),
        (MISC_ENABLE, Some(5)),
    ] {
        let index = msr as u32;
        assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::ReadMsr { index }));
        let wrong = td.vcpu().answer(Answer::Value(1));
        let kind = ExitKind::ReadMsr as u64;
        assert_eq!(wrong, Err(Error::Invalid(Field::Answer, kind)));
        let answer = read.map_or(Answer::InjectGp, Answer::Msr);
        td.vcpu().answer(answer).unwrap();
    }
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect([
        values([0, 4, X2APIC_ICR, 0, 0, 0]),
        values([INVALID_OPERAND, RDMSR, POWER_CTL, 0, 0, 0]),
        values([0, 5, MISC_ENABLE, 0, 0, 0]),
    ]);
}

#[test]
fn hlt_without_local_apics_in_the_platform_is_an_exit() {
    let (mut td, transcript) = td(Script::new().halt());
    for _ in 0..3 {
        assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Hlt), "nothing ends it");
    }
    transcript.expect::<&str>([]);
    td.destroy();
}

#[test]
fn hlt_with_local_apics_in_the_platform_waits_for_an_interrupt_and_a_kick_gets_it_out() {
    let mut td = Made {
        irqchip: Irqchip::Split,
        ..Made::default()
    }
    .td();
    let (program, transcript) = transcript(Script::new().halt().output(1, &[1]).halt());
    td.vcpu().load(Box::new(program));
    let (vm, vcpu) = (&td.vm, &mut td.vcpus[0]);
    std::thread::scope(|scope| {
        let kick = vcpu.kick_handle();
        let running = scope.spawn(|| {
            assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted));
            vcpu.vcpu_run().map(|exit| exit.kind())
        });
        std::thread::sleep(Duration::from_millis(20));
        kick.kick();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!running.is_finished(), "a halted vCPU waits");
        vm.deliver_interrupt(VcpuId(0), 0x21).unwrap();
        assert_eq!(running.join().unwrap(), Ok(ExitKind::IoOut));
    });
    // One that came before is not waited for.
    vm.deliver_interrupt(VcpuId(0), 0x22).unwrap();
    assert_eq!(vcpu.vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect(["Interrupt(33)", "Done", "Interrupt(34)"]);
    td.destroy();
}

#[test]
fn an_nmi_ends_a_halt_and_disturbs_nothing_else() {
    let mut td = Made {
        irqchip: Irqchip::Split,
        ..Made::default()
    }
    .td();
    let (program, transcript) = transcript(Script::new().input(0x60, 1).output(1, &[1]).halt());
    td.vcpu().load(Box::new(program));
    assert_eq!(td.vcpu().vcpu_run().map(|e| e.kind()), Ok(ExitKind::IoIn));
    td.vcpu().exit_data()[0] = 9;
    td.vcpu().inject_nmi().unwrap();
    assert_eq!(td.vcpu().vcpu_run().map(|e| e.kind()), Ok(ExitKind::IoOut));
    let kick = td.vcpu().kick_handle();
    let vcpu = td.vcpu();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            kick.kick();
        });
        assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted), "it halted");
    });
    vcpu.inject_nmi().unwrap();
    assert_eq!(vcpu.vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect(["Data([9])", "Done", "Interrupt(2)"]);
    td.destroy();
}

#[test]
fn mmio_reads() {
    const AT: u64 = 0x2_0000_0000;
    let script = Script::new()
        .read(Gpa::new(SHARED | AT), 1)
        .read(Gpa::new(SHARED | AT), 2)
        .read(Gpa::new(SHARED | AT), 4)
        .read(Gpa::new(SHARED | AT), 8)
        .tdvmcall(MMIO, [10, 0, SHARED | AT, 0])
        .tdvmcall(MMIO, [3, 0, SHARED | AT, 0])
        .tdvmcall(MMIO, [4, 2, SHARED | AT, 0])
        .tdvmcall(MMIO, [4, 0, AT, 0])
        .tdvmcall(MMIO, [4, 0, SHARED << 1 | SHARED, 0]);
    let (mut td, transcript) = td(script);
    for len in [1, 2, 4, 8] {
        let gpa = Gpa::new(AT);
        assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::MmioRead { gpa, len }));
        assert_eq!(td.vcpu().exit_data(), vec![0; len.into()]);
        td.vcpu().exit_data().fill(0x10 + len);
    }
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    let transcript = transcript.all();
    assert_eq!(transcript[1], "Data([18, 18])");
    assert_eq!(transcript[3], format!("Data({:?})", [0x18; 8]));
    for (i, [size, direction, gpa]) in [
        [10, 0, SHARED | AT],
        [3, 0, SHARED | AT],
        [4, 2, SHARED | AT],
        [4, 0, AT],
        [4, 0, SHARED << 1 | SHARED],
    ]
    .into_iter()
    .enumerate()
    {
        let expected = values([INVALID_OPERAND, MMIO, size, direction, gpa, 0]);
        assert_eq!(transcript[4 + i], expected);
    }
}

#[test]
fn mmio_writes() {
    const AT: u64 = 0x2_0000_0000;
    const TOP: u64 = SHARED << 1;
    let script = Script::new()
        .write(Gpa::new(SHARED | AT), &[1])
        .write(Gpa::new(SHARED | AT), &[1, 2])
        .write(Gpa::new(SHARED | AT), &[1, 2, 3, 4])
        .write(Gpa::new(SHARED | AT), &[1, 2, 3, 4, 5, 6, 7, 8])
        .tdvmcall(MMIO, [10, 1, SHARED | AT, 0])
        // From private into shared memory, and out of the address width.
        .tdvmcall(MMIO, [4, 1, SHARED - 2, 0])
        .tdvmcall(MMIO, [4, 1, TOP - 2, 0])
        .tdvmcall(MMIO, [8, 1, u64::MAX - 2, 0]);
    let (mut td, transcript) = td(script);
    for len in [1u8, 2, 4, 8] {
        let data: Vec<u8> = (1..=len).collect();
        let gpa = Gpa::new(AT);
        assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::MmioWrite { gpa, len }));
        assert_eq!(td.vcpu().exit_data(), data);
    }
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    assert_eq!(
        transcript.all()[4..],
        [
            values([INVALID_OPERAND, MMIO, 10, 1, SHARED | AT, 0]),
            values([INVALID_OPERAND, MMIO, 4, 1, SHARED - 2, 0]),
            values([INVALID_OPERAND, MMIO, 4, 1, TOP - 2, 0]),
            values([INVALID_OPERAND, MMIO, 8, 1, u64::MAX - 2, 0]),
        ]
    );
}

#[test]
fn host_reading_private_mem() {
    let secret = [0x5a; 256];
    let script = Script::new()
        .accept(Gpa::new(0x3000), Level::Size4K)
        .write(Gpa::new(0x3000), &secret)
        .read(Gpa::new(0x3000), 256);
    let (mut td, transcript) = td(script);
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect(["Done".into(), "Done".into(), format!("Data({secret:?})")]);
    let page = td.private_page(3).unwrap().base().unwrap();
    let pages = td.host.pages().unwrap();
    let (mut once, mut twice) = ([0; 256], [0; 256]);
    pages.read(page, &mut once).unwrap();
    pages.read(page, &mut twice).unwrap();
    assert_eq!(once, twice);
    assert!(!once.chunks(16).any(|block| block == [0x5a; 16]));
    assert_eq!(
        td.ram.read(0x3000, 16),
        [0; 16],
        "private memory is not the slot's"
    );
    td.destroy();
}

#[test]
fn tdcall_vp_info() {
    let mut td = Made {
        vcpus: 3,
        ..Made::default()
    }
    .td();
    let (program, transcript) = transcript(Script::new().tdcall(1, [0; 4]));
    td.vcpus[2].load(Box::new(program));
    assert_eq!(td.vcpus[2].vcpu_run(), Ok(Exit::Shutdown));
    let attributes = TdParams::default().attributes;
    transcript.expect([values([0, 48, attributes, 3 << 32 | 3, 2, 1])]);
}

#[test]
fn get_quote() {
    let script = Script::new()
        .tdvmcall(GET_QUOTE, [0x4000, PAGE, 0, 0])
        .tdvmcall(GET_QUOTE, [SHARED | 0x4000, PAGE, 0, 0])
        .tdvmcall(GET_QUOTE, [SHARED | 0x4000, PAGE, 0, 0]);
    let (mut td, transcript) = td(script);
    for answer in [Some(0), None] {
        let (gpa, bytes) = (Gpa::new(0x4000), PAGE);
        let exit = td.vcpu().vcpu_run();
        assert_eq!(exit, Ok(Exit::Tdx(TdxRequest::GetQuote { gpa, bytes })));
        if let Some(status) = answer {
            let values = [9; 4]; // The guest sees none of them.
            td.vcpu().answer(Answer::Tdx { status, values }).unwrap();
        }
    }
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    let answers = [
        (INVALID_OPERAND, 0x4000),
        (0, SHARED | 0x4000),
        (SUBFUNC_UNSUPPORTED, SHARED | 0x4000),
    ];
    transcript.expect(answers.map(|(status, gpa)| values([status, GET_QUOTE, gpa, PAGE, 0, 0])));
}

#[test]
fn setup_event_notify() {
    let script = Script::new()
        .tdvmcall(SETUP_EVENT_NOTIFY, [0x10, 0, 0, 0])
        .tdvmcall(SETUP_EVENT_NOTIFY, [0x100, 0, 0, 0])
        .tdvmcall(SETUP_EVENT_NOTIFY, [0x20, 0, 0, 0])
        .halt();
    let mut td = Made {
        irqchip: Irqchip::Split,
        ..Made::default()
    }
    .td();
    let (program, transcript) = transcript(script);
    td.vcpu().load(Box::new(program));
    let vector = 0x20;
    let exit = td.vcpu().vcpu_run();
    assert_eq!(exit, Ok(Exit::Tdx(TdxRequest::SetupEventNotify { vector })));
    let (status, values_of) = (0, [0; 4]);
    let answer = Answer::Tdx {
        status,
        values: values_of,
    };
    td.vcpu().answer(answer).unwrap();
    td.vm.deliver_interrupt(VcpuId(0), vector).unwrap();
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect([
        values([INVALID_OPERAND, SETUP_EVENT_NOTIFY, 0x10, 0, 0, 0]),
        values([INVALID_OPERAND, SETUP_EVENT_NOTIFY, 0x100, 0, 0, 0]),
        values([0, SETUP_EVENT_NOTIFY, 0x20, 0, 0, 0]),
        "Interrupt(32)".into(),
    ]);
}

#[test]
fn hypercalls_of_kvm_are_exits_and_unknown_sub_functions_are_not() {
    let script = Script::new()
        .hypercall(5, [1, 2, 3, 4])
        .hypercall(12, [0x5000, 3, 1 << 4, 0])
        .hypercall(12, [0x5000, 3, 0, 0])
        .hypercall(12, [0x5001, 3, 0, 0])
        .hypercall(12, [0x5000, 0, 0, 0])
        .hypercall(12, [0x5000, 1 << 52, 0, 0])
        .hypercall(12, [SHARED - PAGE, 2, 0, 0])
        .tdvmcall(0x10005, [1, 2, 3, 4])
        .tdvmcall(65, [1, 2, 3, 4]);
    let (mut td, transcript) = td(script);
    let (nr, args) = (5, [1, 2, 3, 4, 0, 0]);
    let exit = td.vcpu().vcpu_run();
    assert_eq!(exit, Ok(Exit::Hypercall { nr, args }));
    td.vcpu().answer(Answer::Value(77)).unwrap();
    for (to, errno) in [(Privacy::Private, 0), (Privacy::Shared, 95)] {
        let (gpa, pages) = (Gpa::new(0x5000), 3);
        let exit = td.vcpu().vcpu_run();
        assert_eq!(exit, Ok(Exit::MapGpaRange { gpa, pages, to }));
        td.vcpu().answer(Answer::Value(errno)).unwrap();
    }
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    let minus = |errno: u64| format!("Value({})", errno.wrapping_neg());
    transcript.expect([
        "Value(77)".into(),
        "Value(0)".into(),
        minus(95),
        minus(22),
        minus(22),
        minus(22),
        minus(22),
        values([SUBFUNC_UNSUPPORTED, 0x10005, 1, 2, 3, 4]),
        values([SUBFUNC_UNSUPPORTED, 65, 1, 2, 3, 4]),
    ]);
}

#[test]
fn a_refusal_of_the_module_reaches_the_guest() {
    // TDG.MEM.PAGE.ACCEPT of a page that is in use.
    let script = Script::new()
        .accept(Gpa::new(0x3000), Level::Size4K)
        .accept(Gpa::new(0x3000), Level::Size4K);
    let (mut td, transcript) = td(script);
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect(["Done".to_owned(), refused(0x0b0a_0000_0000)]);
}

#[test]
fn a_page_that_was_not_accepted_ends_a_td_that_wants_no_ve() {
    let (mut td, _told) = td(Script::new().read(Gpa::new(0x3000), 1));
    assert_eq!(td.vcpu().vcpu_run(), Err(Error::Poisoned));
    assert_eq!(td.vm.step(), Step::Poisoned);
    assert_eq!(td.vcpu().vcpu_run(), Err(Error::Poisoned));
    td.destroy();
}

#[test]
fn a_page_that_was_not_accepted_is_the_guests_ve_in_a_td_that_wants_it() {
    let mut td = Made {
        td: TdParams {
            attributes: 0,
            ..TdParams::default()
        },
        ..Made::default()
    }
    .td();
    let (program, transcript) = transcript(Script::new().read(Gpa::new(0x3008), 1));
    td.vcpu().load(Box::new(program));
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect(["Fault(NotAccepted(Gpa(0x3008)))"]);
    td.destroy();
}

#[test]
fn memory_that_the_host_tampered_with_ends_the_td_with_an_internal_error() {
    let script = Script::new()
        .accept(Gpa::new(0x3000), Level::Size4K)
        .output(1, &[1])
        .read(Gpa::new(0x3000), 1);
    let (mut td, transcript) = td(script);
    assert_eq!(td.vcpu().vcpu_run().map(|e| e.kind()), Ok(ExitKind::IoOut));
    let page = td.private_page(3).unwrap().base().unwrap();
    td.host.pages().unwrap().write(page, &[1]).unwrap();
    let exit = td.vcpu().vcpu_run();
    assert_eq!(exit, Ok(Exit::InternalError { suberror: 4 }));
    let data = words(td.vcpu().exit_data());
    // NON_RECOVERABLE_TD_NON_ACCESSIBLE with exit reason 0, and the processor.
    assert_eq!((data[0], data.len()), (0x6000_0005_0000_0000, 2));
    transcript.expect(["Done", "Done"]);
    assert_eq!(td.vm.step(), Step::Poisoned);
    assert_eq!(td.vcpu().vcpu_run(), Err(Error::Poisoned));
    td.destroy();
}

#[test]
fn a_guest_that_never_leaves_is_kicked_out_and_no_kick_is_lost() {
    let mut td = Made::default().td();
    let spin = FnProgram(|_: Outcome<'_>| Action::Read {
        gpa: Gpa::new(u64::MAX),
        len: 1,
    });
    let vcpu = td.vcpu();
    vcpu.load(Box::new(spin));
    let kick = vcpu.kick_handle();
    kick.kick();
    assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted), "one before the run");
    let (done, next) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for i in 0..300u32 {
                if i % 3 == 0 {
                    std::thread::yield_now();
                }
                kick.kick();
                next.recv().unwrap();
            }
        });
        for _ in 0..300 {
            assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted));
            done.send(()).unwrap();
        }
    });
    td.destroy();
}
