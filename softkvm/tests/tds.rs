//! TDs that a program makes by the kernel's calls: what they measure, how far a failed call came, and that
//! nothing is left of them.

mod common;

use common::World;
use common::td::{entry, init_args};
use kvm_ops::sim::SimHost;
use kvm_ops::{
    EncParams, Gpa, Host, HostRange, InitialPage, InitialPageKind, Kind, MemSlot, SeamPort, SlotId,
    TdParams, Tech, VcpuId, Vendor, VmConfig, create,
};
use kvm_ops_softkvm::{Kernel, Process};
use kvm_ops_uapi::checks::tdx_init_vm;
use kvm_ops_uapi::memory::PreFaultMemory;
use kvm_ops_uapi::state::{Regs, Sregs};
use kvm_ops_uapi::system::{Cpuid2, CpuidEntry2, MsrEntry, vm_type};
use kvm_ops_uapi::tdx::{self as uapi, TdxCapabilities, TdxInitVm};
use kvm_ops_uapi::{Errno, U32, U64, cap, ioctl};
use soft_tdx_module::{PageSize, PageType};
use zerocopy::{FromZeros, IntoBytes};

const PAGE: u64 = 4096;
const BASE: u64 = 0x10_0000;

fn own_machine() -> (SimHost, World) {
    let host = SimHost::new(Vendor::Intel);
    let world = World::of(&Kernel::new(host.clone()));
    (host, world)
}

/// What a machine has given out: KeyIDs and pages.
fn taken(host: &SimHost) -> (u32, u64) {
    let keys = host.seam().unwrap().key_ids().in_use();
    (keys, host.pages().unwrap().frames_out())
}

/// MRTD of the machine's only TD.
fn mrtd(host: &SimHost) -> [u8; 48] {
    let platform = host.tdx_platform().unwrap();
    let tdmrs = platform.config().tdmrs.iter();
    let mut pages = tdmrs.flat_map(|tdmr| (tdmr.range.base..tdmr.range.end()).step_by(4096));
    let is_tdr = |pa: &u64| {
        let page = platform.page(*pa, PageSize::Size4K);
        page.is_some_and(|page| page.page_type == PageType::Tdr)
    };
    platform.td(pages.find(is_tdr).expect("a TD")).unwrap().mrtd
}

/// Contents of a page that tell it from others.
fn contents(seed: u64) -> [u8; 4096] {
    std::array::from_fn(|index| (seed as u8).wrapping_mul(31) ^ index as u8)
}

#[test]
fn a_td_made_by_calls_measures_as_one_made_of_the_same_pages_by_the_library() {
    let (host, w) = own_machine();
    let before = taken(&host);
    let vm = w.td_vm();
    let mut args = init_args();
    args.0.mrconfigid = [1; 48];
    w.init_vm(vm, &args).0.unwrap();
    w.private_slot(vm, 1, BASE, 0x20_0000);
    let vcpu = w.td_vcpu(vm, 0, 0x1234);
    let source = w.task.map(3 * 4096);
    for page in 0..3 {
        w.write(source + page * PAGE, &contents(page)).unwrap();
    }
    for (flags, place) in [
        (1, (source, BASE, 2)),
        (0, (source + 2 * PAGE, BASE + 8 * PAGE, 1)),
    ] {
        let (answer, left) = w.add_memory(vcpu, flags, place);
        answer.unwrap();
        assert_eq!(left.nr_pages.get(), 0);
        assert_eq!(left.gpa.get(), place.1 + place.2 * PAGE);
    }
    assert_eq!(w.finalize(vm), (Ok(0), 0));
    let made = mrtd(&host);
    assert_ne!(made, [0; 48]);

    // The same by the library: no file, no call.
    let other = SimHost::new(Vendor::Intel);
    let params = TdParams {
        mrconfigid: [1; 48],
        ..TdParams::default()
    };
    let config = VmConfig::new(Kind::Of(Tech::Tdx)).enc(EncParams::Td(Box::new(params)));
    let mut td = create(&other, &config).unwrap();
    let memory = w.map(0x20_0000);
    // SAFETY: the memory lives as long as the world, and is only accessed by pointer.
    let range = unsafe { HostRange::new(memory, 0x20_0000) }.unwrap();
    td.set_memory_slot(MemSlot::new(SlotId(0), Gpa::new(BASE), range))
        .unwrap();
    let handle = td.create_vcpu(VcpuId(0)).unwrap();
    for (page, at, kind) in [
        (0, 0, InitialPageKind::Measured),
        (1, 1, InitialPageKind::Measured),
        (2, 8, InitialPageKind::Unmeasured),
    ] {
        let gpa = Gpa::new(BASE + at * PAGE);
        let contents = &contents(page);
        td.add_initial_page(&InitialPage {
            gpa,
            contents,
            kind,
        })
        .unwrap();
    }
    td.finalize().unwrap();
    assert_eq!(&made, td.measurement().unwrap().bytes());
    drop(handle);
    assert!(td.destroy().is_clean());

    drop(w);
    assert_eq!(taken(&host), before, "KeyIDs and pages");
    assert_eq!(host.live_vms(), 0);
}

#[test]
fn a_td_ends_in_every_state_with_nothing_left() {
    let (host, w) = own_machine();
    let before = taken(&host);
    for steps in 0..6 {
        let vm = w.td_vm();
        if steps > 0 {
            w.init_vm(vm, &init_args()).0.unwrap();
            w.private_slot(vm, 1, BASE, 0x20_0000);
        }
        if steps > 1 {
            let vcpu = w.vcpu(vm, 0);
            w.set_cpuid(vcpu);
            if steps > 2 {
                w.tdx(vcpu, uapi::INIT_VCPU, 0, 0).0.unwrap();
            }
            if steps > 3 {
                let source = w.task.map(4096);
                w.add_memory(vcpu, 1, (source, BASE, 1)).0.unwrap();
            }
            if steps > 4 {
                w.finalize(vm).0.unwrap();
                let range = PreFaultMemory {
                    gpa: U64::new(BASE),
                    size: U64::new(16 * PAGE),
                    ..PreFaultMemory::new_zeroed()
                };
                w.call(vcpu, ioctl::KVM_PRE_FAULT_MEMORY, &range).unwrap();
            }
        }
        assert_ne!(taken(&host) == before, steps > 0, "{steps} steps");
        for number in 3..64 {
            if number != w.kvm {
                let _ = w.task.close(number);
            }
        }
        assert_eq!(taken(&host), before, "{steps} steps");
    }
}

#[test]
fn key_ids_run_out_and_come_back() {
    let (host, w) = own_machine();
    let mut tds = Vec::new();
    let last = w.td_vm();
    let refused = loop {
        let vm = w.td_vm();
        match w.init_vm(vm, &init_args()).0 {
            Ok(_) => tds.push(vm),
            Err(refusal) => break refusal,
        }
    };
    assert_eq!(refused.check(), Some(tdx_init_vm::KEY_ID));
    assert_eq!(tds.len() as u32, taken(&host).0);
    w.task.close(tds.pop().unwrap()).unwrap();
    w.init_vm(last, &init_args())
        .0
        .expect("a KeyID is free, and the VM may be tried again");
}

#[test]
fn a_list_that_is_too_short_is_refused_without_a_number_and_doubling_finds_one() {
    let w = World::intel();
    let vm = w.td_vm();
    let mut room = 1u32;
    let head = loop {
        let bytes = size_of::<TdxCapabilities>() + room as usize * size_of::<CpuidEntry2>();
        let at = w.task.map(bytes);
        let nent = std::mem::offset_of!(TdxCapabilities, nent) as u64;
        w.write(at + nent, &room.to_le_bytes()).unwrap();
        match w.tdx(vm, uapi::CAPABILITIES, 0, at).0 {
            Ok(_) => break w.get::<TdxCapabilities>(at),
            Err(refusal) => {
                assert_eq!(refusal.errno(), Errno::E2BIG);
                let untouched = TdxCapabilities {
                    nent: U32::new(room),
                    ..TdxCapabilities::default()
                };
                assert_eq!(w.get::<TdxCapabilities>(at), untouched);
            }
        }
        room *= 2;
    };
    assert_eq!((room, head.nent.get()), (32, 18));
    assert_eq!(head.supported_attrs.get(), 1 << 28);
    assert_eq!(head.supported_xfam.get(), 0x207, "the processor's states");
    assert_eq!(head.user_tdvmcallinfo_1_r11.get(), 2);
    assert_eq!(head.kernel_tdvmcallinfo_1_r11.get(), 0);
}

/// GET_CPUID with room for as many entries.
fn cpuid_of(w: &World, vcpu: i32, room: u32) -> (common::Answer, Vec<CpuidEntry2>) {
    let head = Cpuid2 {
        nent: U32::new(room),
        ..Cpuid2::default()
    };
    let list = vec![CpuidEntry2::default(); room as usize];
    let at = w.task.put(&[head.as_bytes(), list.as_bytes()].concat()[..]);
    let answer = w.tdx(vcpu, uapi::GET_CPUID, 0, at).0;
    let nent = w.get::<Cpuid2>(at).nent.get();
    let read = |index: u32| w.get(at + 8 + u64::from(index) * 40);
    let list = match answer {
        Ok(_) => (0..nent).map(read).collect(),
        Err(_) => vec![CpuidEntry2::default(); nent as usize],
    };
    (answer, list)
}

#[test]
fn the_cpuid_of_a_td_is_what_it_was_made_with_and_its_length_is_told() {
    let w = World::intel();
    let vm = w.td_vm();
    let (mut head, mut list) = init_args();
    // Family 6, model 143, stepping 8.
    list.push(entry(1, 0, [0x0008_06f8, 0, 0, 0]));
    head.nent = U32::new(2);
    w.init_vm(vm, &(head, list)).0.unwrap();
    let vcpu = w.vcpu(vm, 0);
    let (answer, needed) = cpuid_of(&w, vcpu, 3);
    assert_eq!(answer.unwrap_err().errno(), Errno::E2BIG);
    let (answer, list) = cpuid_of(&w, vcpu, needed.len() as u32);
    answer.unwrap();
    let leaf = |number: u32| list.iter().find(|entry| entry.function.get() == number);
    assert_eq!(leaf(1).unwrap().eax.get(), 0x0008_06f8);
    assert_eq!(leaf(0).unwrap().ebx.get(), u32::from_le_bytes(*b"Genu"));
    assert_eq!(leaf(0x8000_0008).unwrap().eax.get() >> 16 & 0xff, 48);
    let subleaves = list.iter().filter(|entry| entry.function.get() == 4);
    let indices: Vec<u32> = subleaves.map(|entry| entry.index.get()).collect();
    assert_eq!(indices, Vec::from_iter(0..indices.len() as u32));
    assert!(indices.len() > 1);
    assert!(leaf(0x4000_0000).is_none());
}

#[test]
fn the_width_that_supported_cpuid_tells_is_one_that_init_vm_takes() {
    let w = World::intel();
    let head = Cpuid2 {
        nent: U32::new(256),
        ..Cpuid2::default()
    };
    let list = vec![CpuidEntry2::default(); 256];
    let at = w.task.put(&[head.as_bytes(), list.as_bytes()].concat()[..]);
    w.ioctl(w.kvm, ioctl::KVM_GET_SUPPORTED_CPUID, at).unwrap();
    let nent = u64::from(w.get::<Cpuid2>(at).nent.get());
    let mut entries = (0..nent).map(|index| w.get::<CpuidEntry2>(at + 8 + index * 40));
    let addresses = entries.find(|entry| entry.function.get() == 0x8000_0008);
    let width = addresses.unwrap().eax.get() & 0xff << 16;
    let (head, _) = init_args();
    let list = vec![entry(0x8000_0008, 0, [width, 0, 0, 0])];
    w.init_vm(w.td_vm(), &(head, list)).0.unwrap();
}

#[test]
fn a_region_that_stops_says_what_is_left_and_goes_on() {
    let w = World::intel();
    let vm = w.td();
    w.private_slot(vm, 1, BASE, 0x20_0000);
    let vcpu = w.td_vcpu(vm, 0, 0);
    // Two pages of three can be read.
    let source = w.task.map(2 * 4096);
    let (answer, left) = w.add_memory(vcpu, 1, (source, BASE, 3));
    assert_eq!(answer.unwrap_err().errno(), Errno::EFAULT);
    let at = [left.source_addr, left.gpa, left.nr_pages].map(U64::get);
    assert_eq!(at, [source + 2 * PAGE, BASE + 2 * PAGE, 1]);
    let more = w.task.map(4096);
    w.task.set_signal(true);
    let (answer, left) = w.add_memory(vcpu, 1, (more, BASE + 2 * PAGE, 1));
    assert_eq!(answer.unwrap_err().errno(), Errno::EINTR);
    w.task.set_signal(false);
    let place = (left.source_addr.get(), left.gpa.get(), left.nr_pages.get());
    w.add_memory(vcpu, 1, place).0.unwrap();
    w.finalize(vm).0.unwrap();
}

#[test]
fn values_that_the_module_refuses_leave_the_vm_to_be_tried_again() {
    let w = World::intel();
    let vm = w.td_vm();
    let (mut head, mut list) = init_args();
    // A bit of leaf 1 that is not the host's to choose.
    list.push(entry(1, 0, [1 << 31, 0, 0, 0]));
    head.nent = U32::new(2);
    let answer = w.init_vm(vm, &(head, list)).0;
    assert_eq!(answer.unwrap_err().errno(), Errno::EINVAL);
    // 75 MHz: below what a TD's TSC can be.
    w.ioctl(vm, ioctl::KVM_SET_TSC_KHZ, 75_000).unwrap();
    let answer = w.init_vm(vm, &init_args()).0;
    assert_eq!(answer.unwrap_err().errno(), Errno::EINVAL);
    w.ioctl(vm, ioctl::KVM_SET_TSC_KHZ, 2_596_120).unwrap();
    w.init_vm(vm, &init_args()).0.expect("in units of 25 MHz");
}

#[test]
fn a_measurement_without_vcpu_is_the_modules_refusal_and_the_vms_end() {
    let w = World::intel();
    let vm = w.td();
    let (answer, hw_error) = w.finalize(vm);
    assert_eq!(answer.unwrap_err().errno(), Errno::EIO);
    assert_eq!(hw_error >> 32, 0xc000_0609, "TDX_NO_VCPUS");
    let dead = w.ioctl(vm, ioctl::KVM_CHECK_EXTENSION, 0).unwrap_err();
    assert_eq!(dead.check(), Some(kvm_ops_uapi::checks::any::ALIVE));
}

#[test]
fn registers_of_a_td_are_its_secret_and_some_msrs_are_not() {
    let w = World::intel();
    let vcpu = w.td_vcpu(w.td(), 0, 0);
    for (ioctl, bytes) in [
        (ioctl::KVM_GET_REGS, size_of::<Regs>()),
        (ioctl::KVM_SET_REGS, size_of::<Regs>()),
        (ioctl::KVM_GET_SREGS, size_of::<Sregs>()),
        (ioctl::KVM_SET_SREGS, size_of::<Sregs>()),
    ] {
        let answer = w.ioctl(vcpu, ioctl, w.task.map(bytes));
        assert_eq!(
            answer.unwrap_err().errno(),
            Errno::EINVAL,
            "{}",
            ioctl.name()
        );
    }
    // The microcode's revision, as VMMs set it; then the instruction pointer of SYSENTER, which is the guest's.
    let msr = |index: u32, value: u64| MsrEntry {
        index: U32::new(index),
        data: U64::new(value),
        ..MsrEntry::default()
    };
    let msrs = |list: [MsrEntry; 2]| {
        w.task
            .put(&[&[2, 0, 0, 0, 0, 0, 0, 0], list.as_bytes()].concat()[..])
    };
    let set = msrs([msr(0x8b, 0x1_0000_0065), msr(0x176, 1)]);
    assert_eq!(w.ioctl(vcpu, ioctl::KVM_SET_MSRS, set), Ok(1));
    let get = msrs([msr(0x8b, 0), msr(0xc000_0102, 0)]);
    assert_eq!(w.ioctl(vcpu, ioctl::KVM_GET_MSRS, get), Ok(1));
    assert_eq!(w.get::<MsrEntry>(get + 8).data.get(), 0x1_0000_0065);
    // EFER is shown, and not taken.
    let efer = msrs([msr(0xc000_0080, 0), msr(0x8b, 0)]);
    assert_eq!(w.ioctl(vcpu, ioctl::KVM_GET_MSRS, efer), Ok(2));
    assert_eq!(w.ioctl(vcpu, ioctl::KVM_SET_MSRS, efer), Ok(0));
}

#[test]
fn a_td_answers_about_itself_by_its_type() {
    let w = World::intel();
    let vm = w.td_vm();
    let ask = |fd: i32, cap: u32| w.ioctl(fd, ioctl::KVM_CHECK_EXTENSION, cap.into()).unwrap();
    for (cap, expected) in [
        (cap::MEMORY_ATTRIBUTES, 8),
        (cap::GUEST_MEMFD_FLAGS, 1),
        (cap::READONLY_MEM, 0),
        (cap::MULTI_ADDRESS_SPACE, 1),
        (cap::SYNC_REGS, 0),
        (cap::MAX_VCPUS, 4),
    ] {
        assert_eq!(ask(vm, cap), expected, "{cap}");
    }
    assert_eq!(ask(w.kvm, cap::MAX_VCPUS), 1024, "of the system");
    assert_eq!(
        w.task.file(vm).unwrap().kind(),
        kvm_ops_softkvm::FileKind::Vm
    );
    assert_ne!(ask(w.kvm, cap::VM_TYPES) >> vm_type::TDX & 1, 0);
}

#[test]
fn numbers_of_vcpus_may_have_gaps() {
    let w = World::intel();
    let vm = w.td();
    for id in [9, 2, 4095] {
        w.td_vcpu(vm, id, id);
    }
    w.finalize(vm).0.unwrap();
}

#[test]
fn private_pages_go_with_their_attribute_their_hole_their_file_and_their_slot() {
    let (host, w) = own_machine();
    let vm = w.td();
    let (gmem, _) = w.private_slot(vm, 1, BASE, 0x20_0000);
    let vcpu = w.td_vcpu(vm, 0, 0);
    w.finalize(vm).0.unwrap();
    let fault_in = |pages: u64| {
        let range = PreFaultMemory {
            gpa: U64::new(BASE),
            size: U64::new(pages * PAGE),
            ..PreFaultMemory::new_zeroed()
        };
        w.call(vcpu, ioctl::KVM_PRE_FAULT_MEMORY, &range)
    };
    fault_in(1).unwrap();
    let one = taken(&host).1;
    fault_in(8).unwrap();
    assert_eq!(taken(&host).1, one + 7);
    // Its tables stay.
    w.set_private(vm, BASE + 4 * PAGE, 4 * PAGE, false);
    assert_eq!(taken(&host).1, one + 3, "shared");
    let file = w.task.file(gmem).unwrap();
    file.check_fallocate(3, PAGE as i64, PAGE as i64).unwrap();
    assert_eq!(taken(&host).1, one + 2, "a hole");
    fault_in(2).unwrap();
    assert_eq!(taken(&host).1, one + 3, "and a new page in it");
    drop(file);
    w.task.close(gmem).unwrap();
    assert_eq!(taken(&host).1, one - 1, "the file is closed");
    assert_eq!(fault_in(1).unwrap_err().errno(), Errno::EFAULT);
}

#[test]
fn slots_and_attributes_may_come_before_the_td() {
    let w = World::intel();
    let vm = w.td_vm();
    w.private_slot(vm, 1, BASE, 0x20_0000);
    w.init_vm(vm, &init_args()).0.unwrap();
    let vcpu = w.td_vcpu(vm, 0, 0);
    let source = w.task.map(4096);
    w.add_memory(vcpu, 1, (source, BASE, 1)).0.unwrap();
    w.finalize(vm).0.unwrap();
}

/// Every mistake in INIT_VM's numbers before every other: the kernel's first is told.
#[test]
fn of_two_mistakes_in_init_vm_the_first_in_order_is_told() {
    type Mistake = (
        kvm_ops_uapi::checks::Check,
        fn(&mut TdxInitVm, &mut Vec<CpuidEntry2>),
    );
    let mistakes: [Mistake; 6] = [
        (tdx_init_vm::RESERVED, |head, _| {
            head.reserved[0] = U64::new(1)
        }),
        (tdx_init_vm::PADDING, |head, _| head.padding = U32::new(1)),
        (tdx_init_vm::ATTRIBUTES, |head, _| {
            head.attributes = U64::new(1 << 63)
        }),
        (tdx_init_vm::XFAM, |head, _| head.xfam = U64::new(1 << 17)),
        (tdx_init_vm::WIDTH, |_, list| {
            list[0].eax = U32::new(40 << 16)
        }),
        (tdx_init_vm::LEAVES, |head, list| {
            list.push(entry(0x8000_0000, 0, [0; 4]));
            head.nent = U32::new(2);
        }),
    ];
    let w = World::intel();
    let vm = w.td_vm();
    for (first, (check, make)) in mistakes.iter().enumerate() {
        for (later, make_later) in &mistakes[first..] {
            let mut args = init_args();
            make_later(&mut args.0, &mut args.1);
            make(&mut args.0, &mut args.1);
            let refusal = w.init_vm(vm, &args).0.unwrap_err();
            assert_eq!(refusal.check(), Some(*check), "with {later}");
        }
    }
}
