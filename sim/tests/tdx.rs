//! Guest programs in trust domains, driven by raw SEAMCALLs over the ports.
#![cfg(feature = "tdx")]

#[allow(dead_code)] // Each test file uses its part.
mod common;

use std::sync::mpsc;

use common::Ram;
use kvm_ops_core::guest::{Action, GuestProgram, Outcome, Script};
use kvm_ops_core::{
    CpuId, Error, Field, Gfn, Gpa, Host, Hpa, Level, Missing, Page, PagePort, SeamPort, SeamRegs,
    SharedMask, SharedMemory, TdPort, Tech, VcpuId, Vendor, VmParams, VmPort,
};
use kvm_ops_cpu::CpuidTable;
use kvm_ops_sim::{BuildStage, SimHost, SimVm};
use soft_tdx_module::{CpuidAnswer, HostLeaf as L, Platform};

const SHARED: u64 = 1 << 47;
const TDVMCALL: u64 = 77;
const EPT_VIOLATION: u64 = 48;

/// A runnable TD of one vCPU.
struct Td {
    host: SimHost,
    vm: SimVm,
    tdr: Hpa,
    tdvpr: Hpa,
    /// The registers of the last exit.
    regs: SeamRegs,
}

fn call(host: &SimHost, leaf: L, rcx: u64, rdx: u64, r8: u64) {
    call_with(host, leaf, [rcx, rdx, r8, 0]);
}

fn call_with(host: &SimHost, leaf: L, [rcx, rdx, r8, r9]: [u64; 4]) {
    let mut regs = SeamRegs {
        rcx,
        rdx,
        r8,
        r9,
        ..SeamRegs::default()
    };
    let seam = host.seam().unwrap();
    // SAFETY: the memory is the software platform's; the host's is not touched.
    let status = unsafe { seam.seamcall(seam.this_cpu(), leaf.number(), &mut regs) };
    assert_eq!(status, Ok(0), "{}", leaf.name());
}

fn page(host: &SimHost) -> u64 {
    let page = host.pages().unwrap().alloc(Level::Size4K).unwrap();
    page.hpa().get()
}

/// A page of a TD's measured start.
struct Start {
    gpa: u64,
    contents: Vec<u8>,
}

impl Td {
    /// A TD that runs a guest program.
    fn new(attributes: u64, program: impl GuestProgram + 'static) -> Self {
        let td = Self::with(attributes, &[]);
        let mask = SharedMask::shared_bit(47).unwrap();
        td.vm
            .load_td_program(VcpuId(0), td.tdvpr, mask, Box::new(program))
            .unwrap();
        td
    }

    /// A TD that executes what lies in its memory.
    fn with(attributes: u64, start: &[Start]) -> Self {
        let host = SimHost::new(Vendor::Intel);
        let (seam, pages) = (host.seam().unwrap(), host.pages().unwrap());
        let (tdr, tdvpr, params) = (page(&host), page(&host), page(&host));
        let key = seam.key_ids().lease().unwrap();
        call(&host, L::MngCreate, tdr, key.number().into(), 0);
        for package in 0..seam.packages() {
            let on = |cpu: &CpuId| seam.package_of(*cpu).is_some_and(|p| p.0 == package);
            let cpu = (0..seam.cpus()).map(CpuId).find(on).unwrap();
            let mut regs = SeamRegs {
                rcx: tdr,
                ..SeamRegs::default()
            };
            // SAFETY: the memory is the software platform's; the host's is not touched.
            let status = unsafe { seam.seamcall(cpu, L::MngKeyConfig.number(), &mut regs) };
            assert_eq!(status, Ok(0));
        }
        (0..6).for_each(|_| call(&host, L::MngAddcx, page(&host), tdr, 0));
        for (offset, value) in [(0, attributes), (8, 3), (16, 1), (24, 0x1e), (40, 40)] {
            pages
                .write(Hpa::new(params + offset), &value.to_le_bytes())
                .unwrap();
        }
        call(&host, L::MngInit, tdr, params, 0);
        call(&host, L::VpCreate, tdvpr, tdr, 0);
        (0..5).for_each(|_| call(&host, L::VpAddcx, page(&host), tdvpr, 0));
        call(&host, L::VpInit, tdvpr, 0, 0);
        for level in [3, 2, 1] {
            call(&host, L::MemSeptAdd, level, tdr, page(&host));
        }
        if !start.is_empty() {
            // Tables of the last GiB and 2 MiB below 4 GiB.
            call(&host, L::MemSeptAdd, 0xc000_0000 | 2, tdr, page(&host));
            call(&host, L::MemSeptAdd, 0xffe0_0000 | 1, tdr, page(&host));
        }
        for Start { gpa, contents } in start {
            let source = page(&host);
            pages.write(Hpa::new(source), contents).unwrap();
            let target = page(&host);
            call_with(&host, L::MemPageAdd, [*gpa, tdr, target, source]);
        }
        call(&host, L::MrFinalize, tdr, 0, 0);
        let vm = host.create_vm(Tech::Tdx, &VmParams::new(1)).unwrap();
        let port = vm.td().unwrap();
        port.td_vcpu_created(VcpuId(0), Hpa::new(tdvpr)).unwrap();
        Self {
            host,
            vm,
            tdr: Hpa::new(tdr),
            tdvpr: Hpa::new(tdvpr),
            regs: SeamRegs::default(),
        }
    }

    fn enter(&mut self) -> u64 {
        self.regs.rcx = self.tdvpr.get();
        let seam = self.host.seam().unwrap();
        // SAFETY: the memory is the software platform's; the host's is not touched.
        unsafe { seam.seamcall(seam.this_cpu(), L::VpEnter.number(), &mut self.regs) }.unwrap()
    }

    /// Enters, and expects TDG.VP.VMCALL with these R11 to R15.
    #[track_caller]
    fn vmcall(&mut self, expected: [u64; 5]) {
        assert_eq!(self.enter(), TDVMCALL, "{:x?}", self.regs);
        let r = &self.regs;
        assert_eq!([r.r11, r.r12, r.r13, r.r14, r.r15], expected);
        self.regs.r10 = 0;
    }

    #[track_caller]
    fn violation(&mut self, gpa: u64) {
        assert_eq!((self.enter(), self.regs.r8), (EPT_VIOLATION, gpa));
    }

    fn aug(&self, gpa: u64) {
        call(
            &self.host,
            L::MemPageAug,
            gpa,
            self.tdr.get(),
            page(&self.host),
        );
    }

    /// Expects the triple fault that ends a program.
    #[track_caller]
    fn off(&mut self) {
        assert_eq!(self.enter(), 0x4000_0001_0000_0002);
    }
}

/// Does the actions, and tells every outcome.
struct Told(Script, mpsc::Sender<String>);

impl GuestProgram for Told {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        self.1.send(format!("{last:?}")).unwrap();
        self.0.step(last)
    }
}

fn td(attributes: u64, script: Script) -> (Td, mpsc::Receiver<String>) {
    let (sender, told) = mpsc::channel();
    (Td::new(attributes, Told(script, sender)), told)
}

#[test]
fn private_accesses_fault_to_the_host_page_by_page_and_are_done_once() {
    let at = Gpa::new(0x1ffe);
    let script = Script::new()
        .accept(Gpa::new(0x1000), Level::Size4K)
        .accept(Gpa::new(0x2000), Level::Size4K)
        .write(at, &[1, 2, 3, 4])
        .read(at, 4);
    let (mut td, told) = td(0, script);
    td.violation(0x1000);
    td.aug(0x1000);
    td.violation(0x2000);
    td.aug(0x2000);
    td.off();
    let told: Vec<String> = told.try_iter().collect();
    assert_eq!(told[1..], ["Done", "Done", "Done", "Data([1, 2, 3, 4])"]);
}

#[test]
fn a_page_that_was_not_accepted_is_the_guests_fault_and_the_next_one_too() {
    let script = Script::new()
        .read(Gpa::new(0x3008), 1)
        .write(Gpa::new(0x3010), &[1])
        .accept(Gpa::new(0x3000), Level::Size4K)
        .accept(Gpa::new(0x3000), Level::Size4K)
        .read(Gpa::new(0x3008), 1);
    let (mut td, told) = td(0, script);
    td.aug(0x3000);
    td.off();
    let told: Vec<String> = told.try_iter().collect();
    assert_eq!(
        told[1..],
        [
            "Fault(NotAccepted(Gpa(0x3008)))",
            "Fault(NotAccepted(Gpa(0x3010)))",
            "Done",
            "Fault(Refused(12137577578496))", // PAGE_ALREADY_ACCEPTED
            "Data([0])",
        ]
    );
}

#[test]
fn shared_accesses_reach_the_slots_and_leave_as_mmio_elsewhere() {
    let ram = Ram::new(4096);
    let script = Script::new()
        .write(Gpa::new(SHARED | 0x5000), b"seen by the host")
        .read(Gpa::new(SHARED | 0x5ffc), 4 + 7)
        .write(Gpa::new(SHARED | 0x9000), &[1, 2, 3]);
    let (mut td, told) = td(0, script);
    td.vm.set_memory_slot(&ram.slot(0, 0x5000)).unwrap();
    // 7 bytes beyond the slot: 4, 2 and 1.
    td.vmcall([48, 4, 0, SHARED | 0x6000, 0]);
    td.regs.r11 = 0xdddd_ccbb_aa99_8877;
    td.vmcall([48, 2, 0, SHARED | 0x6004, 0]);
    td.regs.r11 = 0x6655;
    td.vmcall([48, 1, 0, SHARED | 0x6006, 0]);
    td.regs.r11 = 0x44;
    td.vmcall([48, 2, 1, SHARED | 0x9000, 0x0201]);
    td.vmcall([48, 1, 1, SHARED | 0x9002, 3]);
    td.off();
    assert_eq!(ram.read(0, 16), b"seen by the host");
    let told: Vec<String> = told.try_iter().collect();
    let read = [0, 0, 0, 0, 0x77, 0x88, 0x99, 0xaa, 0x55, 0x66, 0x44];
    assert_eq!(
        told[1..],
        ["Done".into(), format!("Data({read:?})"), "Done".into()]
    );
}

#[test]
fn a_frame_that_is_not_shared_is_a_violation_until_it_is() {
    let ram = Ram::new(2 * 4096);
    let at = SHARED | 0x6ff0;
    let (mut td, _told) = td(0, Script::new().write(Gpa::new(at), &[7; 4]));
    td.vm.set_memory_slot(&ram.slot(0, 0x5000)).unwrap();
    td.vm.set_shared(Gfn::new(6), 1, false).unwrap();
    for _ in 0..10 {
        td.violation(SHARED | 0x6000);
        assert_eq!(td.regs.rcx, 2, "a write");
    }
    assert_eq!(ram.read(0x1ff0, 4), [0; 4]);
    td.vm.set_shared(Gfn::new(0), 100, true).unwrap();
    td.off();
    assert_eq!(ram.read(0x1ff0, 4), [7; 4]);
    td.vm.set_shared(Gfn::new(6), 1, false).unwrap();
    assert_eq!(td.vm.table_stats().pages_4k, 0, "unmapped at once");
}

#[test]
fn ports_hypercalls_halts_and_raw_calls_are_tdvmcalls() {
    let script = Script::new()
        .output(0x3f8, &[0xef, 0xbe])
        .input(0x60, 4)
        .input(0x61, 1)
        .hypercall(12, [1, 2, 3, 4])
        .halt()
        .tdvmcall(0x10000, [5, 6, 7, 8])
        .tdcall(1, [0; 4]);
    let (mut td, told) = td(0, script);
    td.vmcall([30, 2, 1, 0x3f8, 0xbeef]);
    td.vmcall([30, 4, 0, 0x60, 0]);
    td.regs.r11 = u64::MAX;
    td.vmcall([30, 1, 0, 0x61, 0]);
    td.regs.r10 = 1 << 63;
    assert_eq!(td.enter(), TDVMCALL);
    let r = td.regs;
    assert_eq!([r.r10, r.r11, r.r12, r.r13, r.r14], [12, 1, 2, 3, 4]);
    td.regs.r10 = 99;
    td.vmcall([12, 0, 0, 0, 0]);
    td.vmcall([12, 0, 0, 0, 0]); // Nothing came: it halts again.
    td.vm.deliver_interrupt(VcpuId(0), 33).unwrap();
    td.vmcall([0x10000, 5, 6, 7, 8]);
    (td.regs.r10, td.regs.r11, td.regs.r15) = (1, 2, 9);
    td.off();
    let told: Vec<String> = told.try_iter().collect();
    assert_eq!(
        told[1..],
        [
            "Done",
            "Data([255, 255, 255, 255])",
            "Fault(Refused(9223372036854775808))",
            "Value(99)",
            "Interrupt(33)",
            "Values([1, 2, 5, 6, 7, 9])",
            "Values([0, 48, 0, 4294967297, 0, 1])",
        ]
    );
}

#[test]
fn conversions_are_mapgpa_with_retry_and_accepts() {
    let script = Script::new()
        .share(Gpa::new(0x10000), 4)
        .unshare(Gpa::new(0x10000), 2)
        .share(Gpa::new(0x10000), 1)
        .share(Gpa::new(0x10001), 1);
    let (mut td, told) = td(0, script);
    let at = SHARED | 0x10000;
    td.vmcall([0x10001, at, 0x4000, 0, 0]);
    (td.regs.r10, td.regs.r11) = (1, at + 0x3000);
    td.vmcall([0x10001, at + 0x3000, 0x1000, 0, 0]);
    td.vmcall([0x10001, 0x10000, 0x2000, 0, 0]);
    td.violation(0x10000);
    td.aug(0x10000);
    td.aug(0x11000);
    td.vmcall([0x10001, at, 0x1000, 0, 0]);
    td.regs.r10 = 1 << 63;
    td.off();
    let told: Vec<String> = told.try_iter().collect();
    assert_eq!(
        told[1..],
        [
            "Done",
            "Done",
            "Fault(Refused(9223372036854775808))",
            "Fault(BadOperand)"
        ]
    );
}

#[test]
fn operands_that_no_td_takes_fault_and_never_leave() {
    let script = Script::new()
        .read(Gpa::new(0), 0)
        .read(Gpa::new(0), 4097)
        .read(Gpa::new(1 << 48), 1)
        .read(Gpa::new((1 << 48) - 1), 2)
        .read(Gpa::new(u64::MAX), 2)
        .input(0, 3)
        .output(0, &[])
        .accept(Gpa::new(0x1000), Level::Size2M)
        .accept(Gpa::new(0), Level::Size1G)
        .accept(Gpa::new(SHARED), Level::Size4K)
        .hypercall(0, [0; 4])
        .tdcall(0, [0; 4])
        .share(Gpa::new(SHARED), 1)
        .share(Gpa::new(0), 0)
        .unshare(Gpa::new(0x1000), u64::MAX);
    let count = script.remaining();
    let (mut td, told) = td(0, script);
    td.off();
    let told: Vec<String> = told.try_iter().collect();
    assert_eq!(told[1..], vec!["Fault(BadOperand)".to_owned(); count]);
}

#[test]
fn a_program_that_never_leaves_is_interrupted_and_threads_may_be_more_than_processors() {
    let spins = || {
        Td::new(
            0,
            kvm_ops_core::guest::FnProgram(|_: Outcome<'_>| Action::Read {
                gpa: Gpa::new(u64::MAX),
                len: 1,
            }),
        )
    };
    let mut td = spins();
    assert_eq!(td.enter(), 1, "the timer");
    let host = SimHost::builder(Vendor::Intel)
        .tdx(Platform::builder().processors([0]))
        .build()
        .unwrap();
    let seam = host.seam().unwrap();
    assert_eq!((seam.cpus(), seam.packages()), (1, 1));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let cpu = seam.this_cpu();
                    assert_eq!(cpu, CpuId(0));
                    let mut regs = SeamRegs::default();
                    // SAFETY: the memory is the software platform's; the host's is not touched.
                    let status = unsafe { seam.seamcall(cpu, L::SysInfo.number(), &mut regs) };
                    let status = status.unwrap();
                    assert_ne!(status, 0, "operands of 0 are refused by the module");
                }
            });
        }
    });
    // SAFETY: the memory is the software platform's; the host's is not touched.
    let refused = unsafe { seam.seamcall(CpuId(1), 0, &mut SeamRegs::default()) };
    assert_eq!(refused, Err(Error::Invalid(Field::Cpu, 1)));
}

#[test]
fn a_processor_that_is_offline_has_no_package_and_carries_no_thread() {
    let host = SimHost::new(Vendor::Intel);
    let (seam, platform) = (host.seam().unwrap(), host.tdx_platform().unwrap());
    let first = seam.this_cpu();
    platform.set_offline(first.0 as usize, true);
    assert_eq!(seam.package_of(first), None);
    assert_ne!(seam.this_cpu(), first);
    let mut regs = SeamRegs::default();
    // SAFETY: the memory is the software platform's; the host's is not touched.
    let refused = unsafe { seam.seamcall(first, L::SysInfo.number(), &mut regs) };
    assert_eq!(refused, Err(Error::Invalid(Field::Cpu, first.0.into())));
}

#[test]
fn ports_are_there_only_where_the_machine_has_them() {
    let amd = SimHost::new(Vendor::Amd);
    assert!(amd.seam().is_none() && amd.tdx_platform().is_none());
    assert_eq!(
        amd.create_vm(Tech::Tdx, &VmParams::new(1)).err(),
        Some(Error::unsupported(Missing::HostTech, Tech::Tdx))
    );
    let intel = SimHost::new(Vendor::Intel);
    let vm = intel.create_vm(Tech::Vmx, &VmParams::new(1)).unwrap();
    let mask = SharedMask::shared_bit(47).unwrap();
    let program = || Box::new(Script::new());
    assert!(vm.td().is_none() && vm.sev().is_none());
    let refused = vm.load_td_program(VcpuId(0), Hpa::new(0), mask, program());
    assert!(matches!(refused, Err(Error::NotOffered(_))));
    let td = intel.create_vm(Tech::Tdx, &VmParams::new(1)).unwrap();
    for (vcpu, mask, error) in [
        (1, mask, Error::NotFound(Field::Vcpu, 1)),
        (0, SharedMask::NONE, Error::Invalid(Field::Gpa, 0)),
        (
            0,
            SharedMask::private_bit(47).unwrap(),
            Error::Invalid(Field::Gpa, SHARED),
        ),
    ] {
        let refused = td.load_td_program(VcpuId(vcpu), Hpa::new(0), mask, program());
        assert_eq!(refused, Err(error));
    }
}

#[test]
fn pages_come_from_the_tdmrs_and_hold_what_the_host_writes() {
    let host = SimHost::new(Vendor::Intel);
    let pages = host.pages().unwrap();
    let (small, large) = (
        pages.alloc(Level::Size4K).unwrap(),
        pages.alloc(Level::Size2M).unwrap(),
    );
    assert_eq!(pages.frames_out(), 513);
    assert!(large.pfn().is_aligned(Level::Size2M));
    let at = small.hpa();
    assert!((1 << 30..2 << 30).contains(&at.get()));
    pages.write(at, b"data").unwrap();
    let mut data = [0; 4];
    pages.read(at, &mut data).unwrap();
    assert_eq!(&data, b"data");
    let beyond = Hpa::new(1 << 40);
    let refused = Err(Error::Invalid(Field::HostAddress, 1 << 40));
    assert_eq!(pages.write(beyond, &[0]), refused);
    assert_eq!(pages.read(beyond, &mut data), refused);
    assert_eq!(
        pages.alloc(Level::Size1G),
        Err(Error::Invalid(Field::Level, 2))
    );
    // A page of another machine comes back to its owner, and so does one that is not given out.
    let other = SimHost::new(Vendor::Intel);
    let foreign = other.pages().unwrap().alloc(Level::Size4K).unwrap();
    assert_eq!(foreign.pfn(), small.pfn());
    let foreign = pages.free(foreign).unwrap_err();
    assert_eq!(other.pages().unwrap().free(foreign), Ok(()));
    // SAFETY: no memory is reached through the page; it breaks the rule on purpose, as a back end
    // with a fault would.
    let twice = unsafe { Page::from_raw(small.pfn(), Level::Size4K, pages.id()) };
    assert_eq!(pages.free(small), Ok(()));
    assert!(pages.free(twice).is_err());
    assert_eq!(pages.frames_out(), 512);
    assert_eq!(pages.free(large), Ok(()));
    assert_eq!(pages.frames_out(), 0);
}

#[test]
fn a_machine_that_cannot_be_says_why() {
    let none = SimHost::builder(Vendor::Intel).tdx(Platform::builder().processors([]));
    let error = none.build().unwrap_err();
    assert_eq!(error.stage(), BuildStage::Machine);
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("processors"), "{source}");
}

const EXTERNAL_INTERRUPT: u64 = 1;
/// The last two pages below 4 GiB: data, and the code of the reset vector.
const TOP_DATA: u64 = 0xffff_e000;
const TOP_CODE: u64 = 0xffff_f000;

/// A TD that increments a counter for ever, in 32-bit code without paging, as it starts.
fn counting() -> Td {
    let mut code = vec![0; 4096];
    // inc dword [TOP_DATA]; jmp to it; and at the reset vector a jmp to it
    code[..8].copy_from_slice(&[0xff, 0x05, 0x00, 0xe0, 0xff, 0xff, 0xeb, 0xf8]);
    code[0xff0..0xff5].copy_from_slice(&[0xe9, 0x0b, 0xf0, 0xff, 0xff]);
    Td::with(
        0,
        &[
            Start {
                gpa: TOP_CODE,
                contents: code,
            },
            Start {
                gpa: TOP_DATA,
                contents: vec![0; 4096],
            },
        ],
    )
}

#[test]
fn a_vcpu_without_a_program_executes_its_memory_from_the_reset_vector() {
    let mut td = counting();
    // The host's timer, after a million instructions each time.
    for n in 1..=3 {
        assert_eq!(td.enter(), EXTERNAL_INTERRUPT);
        assert_eq!(td.host.instructions(), n * 1_000_000);
    }
    td.vm.close().unwrap();
    assert_eq!(td.host.live_vms(), 0);
}

#[test]
fn a_page_that_is_blocked_is_used_until_translations_are_tracked_and_not_after() {
    let mut td = counting();
    assert_eq!(td.enter(), EXTERNAL_INTERRUPT);
    call(&td.host, L::MemRangeBlock, TOP_DATA, td.tdr.get(), 0);
    // The processor still has the translation.
    assert_eq!(td.enter(), EXTERNAL_INTERRUPT);
    call(&td.host, L::MemTrack, td.tdr.get(), 0, 0);
    assert_eq!((td.enter(), td.regs.r8), (EPT_VIOLATION, TOP_DATA));
    // A read and a write; the linear address is hidden from the host.
    assert_eq!(td.regs.rcx & 0x1f82, 2);
    call(&td.host, L::MemRangeUnblock, TOP_DATA, td.tdr.get(), 0);
    assert_eq!(td.enter(), EXTERNAL_INTERRUPT);
}

/// A count of [`taking_nmis`]: turns of its loop, NMIs that it took, and turns that it had done at the first two of them.
#[derive(Clone, Copy)]
enum Count {
    Turns = 0,
    Nmis = 4,
    At = 8,
}

/// A debug TD that counts the turns of a loop, and whose handler of NMIs takes two million instructions.
fn taking_nmis() -> Td {
    let at = |offset: u64| ((TOP_DATA + offset) as u32).to_le_bytes();
    let (gdt, idt, gdtr, idtr) = (0x100, 0x200, 0x300, 0x310);
    let mut code = Vec::new();
    let mut add = |parts: &[&[u8]]| code.extend(parts.concat());
    // lgdt [gdtr]; lidt [idtr]; mov esp, TOP_CODE; jmp 8:the next; mov eax, 16; mov ss, eax
    add(&[
        &[0x0f, 0x01, 0x15],
        &at(gdtr),
        &[0x0f, 0x01, 0x1d],
        &at(idtr),
    ]);
    add(&[&[0xbc], &(TOP_CODE as u32).to_le_bytes()]);
    add(&[&[0xea], &(TOP_CODE as u32 + 26).to_le_bytes(), &[8, 0]]);
    add(&[&[0xb8, 16, 0, 0, 0, 0x8e, 0xd0]]);
    // inc dword [turns]; jmp to it
    add(&[&[0xff, 0x05], &at(Count::Turns as u64), &[0xeb, 0xf8]]);
    let handler = code.len() as u64;
    let mut add = |parts: &[&[u8]]| code.extend(parts.concat());
    // mov eax, [nmis]; mov edx, [turns]; mov [eax * 4 + at], edx; inc dword [nmis]
    add(&[&[0xa1], &at(Count::Nmis as u64)]);
    add(&[&[0x8b, 0x15], &at(Count::Turns as u64)]);
    add(&[&[0x89, 0x14, 0x85], &at(Count::At as u64)]);
    add(&[&[0xff, 0x05], &at(Count::Nmis as u64)]);
    // mov ecx, 1000000; dec ecx; jnz to it; iretd
    add(&[
        &[0xb9],
        &1_000_000u32.to_le_bytes(),
        &[0x49, 0x75, 0xfd, 0xcf],
    ]);
    code.resize(4096, 0);
    code[0xff0..0xff5].copy_from_slice(&[0xe9, 0x0b, 0xf0, 0xff, 0xff]);

    let mut data = vec![0; 4096];
    let mut put = |offset: u64, bytes: &[u8]| {
        data[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    put(gdt + 8, &0x00cf_9b00_0000_ffff_u64.to_le_bytes());
    put(gdt + 16, &0x00cf_9300_0000_ffff_u64.to_le_bytes());
    let handler = TOP_CODE + handler;
    let gate = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    put(idt + 2 * 8, &gate.to_le_bytes());
    put(gdtr, &[&[23, 0], &at(gdt)[..]].concat());
    put(idtr, &[&[0xff, 0], &at(idt)[..]].concat());
    const DEBUG: u64 = 1;
    Td::with(
        DEBUG,
        &[
            Start {
                gpa: TOP_CODE,
                contents: code,
            },
            Start {
                gpa: TOP_DATA,
                contents: data,
            },
        ],
    )
}

impl Td {
    /// One of the counts of [`taking_nmis`], as the host debugs it; `nth` after the first.
    fn count(&self, count: Count, nth: u64) -> u32 {
        let offset = count as u64 + nth * 4;
        let mut regs = SeamRegs {
            rcx: TOP_DATA + offset / 8 * 8,
            rdx: self.tdr.get(),
            ..SeamRegs::default()
        };
        let seam = self.host.seam().unwrap();
        // SAFETY: the memory is the software platform's; the host's is not touched.
        let status = unsafe { seam.seamcall(seam.this_cpu(), L::MemRd.number(), &mut regs) };
        assert_eq!(status, Ok(0));
        (regs.r8 >> (offset % 8 * 8)) as u32
    }

    /// Leaves an NMI with the module.
    fn nmi(&self) {
        const PEND_NMI: u64 = 0x2000_0000_0000_000b;
        call_with(&self.host, L::VpWr, [self.tdvpr.get(), PEND_NMI, 1, 1]);
    }
}

#[test]
fn an_nmi_that_waits_for_iret_comes_before_the_next_instruction() {
    let mut td = taking_nmis();
    assert_eq!(td.enter(), EXTERNAL_INTERRUPT);
    assert!(td.count(Count::Turns, 0) > 1_000);
    td.nmi();
    assert_eq!(td.enter(), EXTERNAL_INTERRUPT);
    assert_eq!(td.count(Count::Nmis, 0), 1, "it is in its handler");
    let turns = td.count(Count::Turns, 0);
    td.nmi();
    for _ in 0..2 {
        assert_eq!(td.enter(), EXTERNAL_INTERRUPT);
    }
    assert_eq!(td.count(Count::Nmis, 0), 2);
    let at = [td.count(Count::At, 0), td.count(Count::At, 1)];
    assert_eq!(at, [turns, turns], "no turn between the handlers");
    // Nothing waits any more, and the loop goes on.
    for _ in 0..4 {
        assert_eq!(td.enter(), EXTERNAL_INTERRUPT);
    }
    assert_eq!(td.count(Count::Nmis, 0), 2);
    assert!(td.count(Count::Turns, 0) > turns + 1_000);
}

#[test]
fn cpuid_of_a_td_has_no_feature_that_the_processor_lacks() {
    // HTT, and MD_CLEAR with the MSRs of mitigations: no instruction goes with them.
    let beside = |leaf| match leaf {
        1 => [0, 0, 0, 1 << 28],
        7 => [0, 0, 0, 1 << 10 | 0b11_1111 << 26],
        _ => [0; 4],
    };
    let td = Td::with(0, &[]);
    let platform = td.host.tdx_platform().unwrap();
    let processor = CpuidTable::intel();
    let mut found = 0;
    // The registers of features only: sizes and models are not.
    let features = [
        (1, 0, [false, false, true, true]),
        (7, 0, [false, true, true, true]),
        (7, 1, [true; 4]),
        (7, 2, [true; 4]),
        (0xd, 0, [true, false, false, true]),
        (0xd, 1, [true, false, true, true]),
        (0xd, 2, [true; 4]),
        (0x14, 0, [true; 4]),
        (0x19, 0, [true; 4]),
        (0x1d, 1, [true; 4]),
        (0x1e, 0, [true; 4]),
        (0x20, 0, [true; 4]),
        (0x8000_0001, 0, [true; 4]),
        (0x8000_0008, 0, [false, true, true, true]),
    ];
    for (leaf, subleaf, registers) in features {
        let answer = platform.guest_cpuid(td.tdvpr.get(), leaf, subleaf, 0);
        let Some(CpuidAnswer::Values(values)) = answer else {
            panic!("{leaf:#x}.{subleaf}: {answer:?}");
        };
        let has = processor.get(leaf, subleaf);
        let has = [has.eax, has.ebx, has.ecx, has.edx];
        for n in (0..4).filter(|n| registers[*n]) {
            let more = values[n] & !has[n] & !beside(leaf)[n];
            assert_eq!(more, 0, "{leaf:#x}.{subleaf} register {n}");
            found |= values[n];
        }
    }
    assert_ne!(found, 0);
    // The area of XSAVES has its legacy part and its header.
    let area = platform.guest_cpuid(td.tdvpr.get(), 0xd, 1, 0);
    assert!(
        matches!(area, Some(CpuidAnswer::Values([_, 576, ..]))),
        "{area:?}"
    );
}
