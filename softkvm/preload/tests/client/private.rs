//! Normal VMs with private memory: conversions by the host and by the guest, and what becomes of the memory.

use kvm_ops::kvm::KvmHost;
use kvm_ops::{
    Answer, AnyVcpu, AnyVm, EncParams, Error, Exit, Field, Gfn, Gpa, Host, InitialPage,
    InitialPageKind, Privacy, SharedMask, Step, Tech, VcpuId, VcpuOps, Vendor, Vm, VmConfig, VmOps,
    create,
};
use vm_memory::MmapRegion;

use crate::common::again;
use crate::guest::{BYTES, FIRST, START, host, memory, slot};

type Guest = Vm<AnyVm<KvmHost>>;
type Vcpu = AnyVcpu<KvmHost>;

/// The page that the guest counts in.
const COUNTED: Gfn = Gfn::new(FIRST / 4096);
/// The offset of its first byte in the memory.
const COUNTER: usize = (FIRST - START) as usize;
/// The ports of the numbers, and of the answer to a conversion.
const NUMBER: u16 = 0x80;
const RESULT: u16 = 0x81;

/// Asks for `COUNTED` as private memory, leaves the answer, and then a number again and again, which it counts up.
fn code(vendor: Vendor) -> Vec<u8> {
    let hypercall: [u8; 3] = match vendor {
        Vendor::Amd => [0x0f, 0x01, 0xd9], // vmmcall
        _ => [0x0f, 0x01, 0xc1],           // vmcall
    };
    [
        &[0x66, 0xb8, 12, 0, 0, 0][..],        // mov eax, KVM_HC_MAP_GPA_RANGE
        &[0x66, 0xbb, 0x00, 0xc0, 0xff, 0xff], // mov ebx, the page
        &[0x66, 0xb9, 1, 0, 0, 0],             // mov ecx, pages
        &[0x66, 0xba, 0x10, 0, 0, 0],          // mov edx, "encrypted"
        &hypercall,
        &[0xe6, RESULT as u8],           // out RESULT, al
        &[0x2e, 0xa0, 0x00, 0xc0],       // again: mov al, cs:[the page]
        &[0xe6, NUMBER as u8],           // out NUMBER, al
        &[0x2e, 0xfe, 0x06, 0x00, 0xc0], // inc byte cs:[the page]
        &[0xeb, 0xf3],                   // jmp again
    ]
    .concat()
}

/// Writes into the shared memory.
fn write(memory: &MmapRegion<()>, offset: usize, bytes: &[u8]) {
    for (at, byte) in bytes.iter().enumerate() {
        // SAFETY: the callers' bytes lie in the region, and the guest does not run.
        unsafe { memory.as_ptr().add(offset + at).write_volatile(*byte) };
    }
}

fn read(memory: &MmapRegion<()>) -> u8 {
    // SAFETY: the byte lies in the region, and the guest does not run.
    unsafe { memory.as_ptr().add(COUNTER).read_volatile() }
}

fn config() -> VmConfig {
    VmConfig::normal().vcpus(2).enc(EncParams::Private)
}

/// A VM with the code, about to run.
fn counting(host: &KvmHost, memory: &MmapRegion<()>) -> (Guest, Vcpu) {
    let mut vm = create(host, &config()).unwrap();
    vm.set_memory_slot(slot(memory)).unwrap();
    let last = BYTES as usize - 4096;
    write(memory, last, &code(host.vendor()));
    write(memory, last + 0xff0, &[0xe9, 0x0d, 0xf0]);
    vm.finalize().unwrap();
    let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    (vm, vcpu)
}

fn port(vcpu: &mut Vcpu) -> (u16, u8) {
    match vcpu.vcpu_run() {
        Ok(Exit::IoOut { port, .. }) => (port, vcpu.exit_data()[0]),
        other => panic!("{other:?}"),
    }
}

fn number(vcpu: &mut Vcpu) -> u8 {
    let (from, number) = port(vcpu);
    assert_eq!(from, NUMBER);
    number
}

/// The exit of the guest's request.
fn request(vcpu: &mut Vcpu) {
    let to = Privacy::Private;
    let gpa = Gpa::new(FIRST);
    assert_eq!(vcpu.vcpu_run(), Ok(Exit::MapGpaRange { gpa, pages: 1, to }));
}

/// Runs a test under the library on a machine of each vendor.
fn on_each_vendor(test: &str, body: impl FnOnce()) {
    if crate::common::is_inside() {
        return body();
    }
    for vendor in ["amd", "intel"] {
        again(test, vendor);
    }
}

#[test]
fn each_conversion_shows_the_other_memory_and_gives_up_the_one() {
    let test = "private::each_conversion_shows_the_other_memory_and_gives_up_the_one";
    on_each_vendor(test, || {
        let (host, memory) = (host(), memory());
        let (vm, mut vcpu) = counting(&host, &memory);
        write(&memory, COUNTER, &[100]);
        assert_eq!(vm.back_end().privacy(COUNTED), Privacy::Shared);
        request(&mut vcpu);
        // The host refuses: the guest gets the number as it is, and its memory stays.
        vcpu.answer(Answer::Value(libc::EINVAL as u64)).unwrap();
        assert_eq!(port(&mut vcpu), (RESULT, libc::EINVAL as u8));
        assert_eq!([number(&mut vcpu), number(&mut vcpu)], [100, 101]);

        // Each number is counted up by the next run, in the memory that is there then.
        let convert = |to| assert_eq!(vm.set_memory_attributes(COUNTED, 1, to), Ok(1));
        convert(Privacy::Private);
        assert_eq!(read(&memory), 0, "the shared page was given back");
        assert_eq!([number(&mut vcpu), number(&mut vcpu)], [1, 2]);
        assert_eq!(read(&memory), 0, "the host does not see what is private");
        convert(Privacy::Shared);
        write(&memory, COUNTER, &[50]);
        assert_eq!(number(&mut vcpu), 51);
        convert(Privacy::Private);
        assert_eq!(number(&mut vcpu), 1, "the private page was given back");
        drop(vcpu);
        assert!(vm.destroy().is_clean());
    });
}

#[test]
fn a_guest_gets_the_private_memory_that_it_asks_for_and_it_may_be_mapped_before() {
    let test =
        "private::a_guest_gets_the_private_memory_that_it_asks_for_and_it_may_be_mapped_before";
    on_each_vendor(test, || {
        let (host, memory) = (host(), memory());
        let (vm, mut vcpu) = counting(&host, &memory);
        write(&memory, COUNTER, &[100]);
        request(&mut vcpu);
        let shared = vm.pre_fault_memory(COUNTED, 1);
        assert_eq!(shared, Err(Error::NotFound(Field::Gfn, COUNTED.get())));
        vm.set_memory_attributes(COUNTED, 1, Privacy::Private)
            .unwrap();
        assert_eq!(vm.pre_fault_memory(COUNTED, 4), Ok(1), "up to a shared one");
        vcpu.answer(Answer::Value(0)).unwrap();
        assert_eq!(port(&mut vcpu), (RESULT, 0));
        assert_eq!([number(&mut vcpu), number(&mut vcpu)], [0, 1]);
        drop(vcpu);
        assert!(vm.destroy().is_clean());
    });
}

#[test]
fn it_is_a_normal_vm_whose_registers_are_the_hosts() {
    let test = "private::it_is_a_normal_vm_whose_registers_are_the_hosts";
    on_each_vendor(test, || {
        let (host, memory) = (host(), memory());
        let (mut vm, mut vcpu) = counting(&host, &memory);
        assert_eq!(
            (vm.tech(), vm.step(), vm.shared_mask()),
            (
                Tech::normal(host.vendor()),
                Step::Runnable,
                SharedMask::NONE
            )
        );
        request(&mut vcpu);
        vcpu.answer(Answer::Value(0)).unwrap();
        assert_eq!(port(&mut vcpu), (RESULT, 0));
        let mut regs = vcpu.regs().unwrap();
        regs.rip = 0xfff0;
        vcpu.set_regs(&regs).unwrap();
        request(&mut vcpu);
        let second = vm.create_vcpu(VcpuId(1)).unwrap();
        assert_eq!(second.regs().unwrap().rip, 0xfff0);
        let page = InitialPage {
            gpa: Gpa::new(FIRST),
            contents: &[0; 4096],
            kind: InitialPageKind::Measured,
        };
        let late = vm.add_initial_page(&page);
        assert_eq!(late, Err(Error::WrongState(Step::Runnable)));
        assert!(matches!(vm.measurement(), Err(Error::NotOffered(_))));
        drop((vcpu, second));
        assert!(vm.destroy().is_clean());
    });
}

#[test]
fn a_rom_is_shared_for_ever() {
    on_each_vendor("private::a_rom_is_shared_for_ever", || {
        let (host, memory) = (host(), memory());
        let mut vm = create(&host, &config()).unwrap();
        let mut rom = slot(&memory);
        rom.flags.read_only = true;
        vm.set_memory_slot(rom).unwrap();
        write(
            &memory,
            BYTES as usize - 16,
            &[0xe6, NUMBER as u8, 0xeb, 0xfc],
        );
        vm.finalize().unwrap();
        let refused = vm.set_memory_attributes(COUNTED, 1, Privacy::Private);
        assert!(matches!(refused, Err(Error::NotOffered(_))), "{refused:?}");
        assert_eq!(vm.back_end().privacy(COUNTED), Privacy::Shared);
        let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        assert_eq!(port(&mut vcpu).0, NUMBER);
        drop(vcpu);
        assert!(vm.destroy().is_clean());
    });
}

#[test]
fn a_host_that_does_not_hold_such_vms_refuses_them() {
    let sim = kvm_ops::sim::SimHost::new(Vendor::Amd);
    let refused = create(&sim, &config()).unwrap_err();
    assert_eq!(refused.error.errno(), libc::EOPNOTSUPP, "{refused}");
    assert_eq!(sim.live_vms(), 0);
}
