//! Exits, and their completion by the next run.

use kvm_ops::Vendor;
use kvm_ops_softkvm::Process;
use kvm_ops_uapi::memory::{ATTRIBUTE_PRIVATE, MemoryAttributes};
use kvm_ops_uapi::run::{Hypercall, InternalError, Mmio, exit_reason};
use kvm_ops_uapi::state::Regs;
use kvm_ops_uapi::stats::{StatsDesc, StatsHeader};
use kvm_ops_uapi::system::vm_type;
use kvm_ops_uapi::vm::{HC_MAP_GPA_RANGE, HC_SCHED_YIELD, HC_VAPIC_POLL_IRQ, quirk};
use kvm_ops_uapi::{Errno, U32, U64, cap, ioctl};

use zerocopy::FromBytes;

use crate::guest::{CODE, Guest};

#[test]
fn ports_leave_with_their_data_and_reads_are_completed_by_the_next_run() {
    // mov eax, 0x11223344; out 0x80, eax; in ax, 0x90; hlt
    let guest = Guest::new(&[
        0x66, 0xb8, 0x44, 0x33, 0x22, 0x11, 0x66, 0xe7, 0x80, 0xe5, 0x90, 0xf4,
    ]);
    let written = vec![0x44, 0x33, 0x22, 0x11];
    assert_eq!(guest.run_to_port(), ((1, 0x80, 4, 1), written));
    let (access, _) = guest.run_to_port();
    assert_eq!(access, (0, 0x90, 2, 1));
    guest.set_port_data(&[0xcd, 0xab]);
    assert_eq!(guest.run(), exit_reason::HLT);
    assert_eq!(guest.regs().rax.get(), 0x1122_abcd);
}

#[test]
fn memory_without_a_slot_leaves_as_mmio() {
    // mov ax, 0x2000; mov ds, ax; mov [0x10], ax; mov ax, [0x20]; hlt
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa3, 0x10, 0x00, 0xa1, 0x20, 0x00, 0xf4,
    ];
    let guest = Guest::new(&code);
    assert_eq!(guest.run(), exit_reason::MMIO);
    let mmio: Mmio = guest.exit();
    let place = (mmio.phys_addr.get(), mmio.len.get(), mmio.is_write);
    assert_eq!(
        (place, &mmio.data[..2]),
        ((0x2_0010, 2, 1), &[0x00, 0x20][..])
    );
    assert_eq!(guest.run(), exit_reason::MMIO);
    let mmio: Mmio = guest.exit();
    let place = (mmio.phys_addr.get(), mmio.len.get(), mmio.is_write);
    assert_eq!(place, (0x2_0020, 2, 0));
    let data = [0x34, 0x12, 0, 0, 0, 0, 0, 0];
    guest.answer(&Mmio { data, ..mmio });
    assert_eq!(guest.run(), exit_reason::HLT);
    assert_eq!(guest.regs().rax.get(), 0x1234);
}

#[test]
fn an_immediate_exit_completes_the_last_one_and_changes_nothing_else() {
    // in al, 0x10; nop; hlt
    let guest = Guest::new(&[0xe4, 0x10, 0x90, 0xf4]);
    guest.run_to_port();
    guest.set_port_data(&[7]);
    assert_eq!(guest.regs().rip.get(), CODE, "not completed yet");
    guest.set_immediate_exit(true);
    for _ in 0..2 {
        let answer = guest.run_vcpu(guest.vcpu);
        assert_eq!(answer.unwrap_err().errno(), Errno::EINTR);
        assert_eq!(
            guest.reason(guest.vcpu),
            exit_reason::IO,
            "the reason stays"
        );
        assert_eq!(guest.regs().rip.get(), CODE + 2);
    }
    guest.set_immediate_exit(false);
    assert_eq!(guest.run(), exit_reason::HLT);
    assert_eq!(guest.regs().rax.get(), 7);
}

/// userspace_io_test: RCX is changed in the middle of a repeated INS.
#[test]
fn a_repeated_read_of_a_port_ends_as_the_changed_count_says() {
    // cld; mov dx, 0x80; mov di, 0x2000; rep insb; hlt
    let code = [0xfc, 0xba, 0x80, 0x00, 0xbf, 0x00, 0x20, 0xf3, 0x6c, 0xf4];
    for (first, then) in [(2, 1), (3, 2000), (2000, 2000)] {
        let guest = Guest::new(&code);
        guest.set_regs(&Regs {
            rcx: U64::new(first),
            ..guest.regs()
        });
        let mut batches = 0;
        loop {
            if guest.run() == exit_reason::HLT {
                break;
            }
            let regs = guest.regs();
            let rcx = if batches == 0 { then } else { regs.rcx.get() };
            guest.set_port_data(&[0xaa; 4096]);
            guest.set_regs(&Regs {
                rcx: U64::new(rcx),
                ..regs
            });
            batches += 1;
        }
        assert_eq!(guest.regs().rcx.get(), 0, "{first}, {then}");
        assert_eq!(guest.regs().rdi.get(), 0x2000 + then);
        let [last, next] = guest.read(0x2000 + then - 1);
        assert_eq!((last, next), (0xaa, 0));
        assert!(batches <= 4, "a batch for each exit");
    }
}

#[test]
fn only_the_hypercall_that_was_asked_for_leaves() {
    // vmcall; hlt
    let code = [0x0f, 0x01, 0xc1, 0xf4];
    let call = |guest: &Guest, nr: u64, gpa: u64, pages: u64| {
        guest.set_regs(&Regs {
            rip: U64::new(CODE),
            rax: U64::new(nr),
            rbx: U64::new(gpa),
            rcx: U64::new(pages),
            rdx: U64::new(0x10),
            ..guest.regs()
        });
        guest.run()
    };
    // Sixteen-bit code has registers of 32 bits.
    let result = |guest: &Guest| guest.regs().rax.get() as u32 as i32;
    let guest = Guest::new(&code);
    assert_eq!(call(&guest, HC_MAP_GPA_RANGE, 0, 1), exit_reason::HLT);
    assert_eq!(result(&guest), -1000, "not enabled");
    guest.enable(cap::EXIT_HYPERCALL, 1 << HC_MAP_GPA_RANGE);
    for (nr, gpa, pages, expected) in [
        (2, 0, 1, -1000),
        (HC_VAPIC_POLL_IRQ, 0, 0, 0),
        (HC_SCHED_YIELD, 0, 0, 0),
        (HC_MAP_GPA_RANGE, 1, 1, -22),
        (HC_MAP_GPA_RANGE, 0x1000, 0, -22),
    ] {
        assert_eq!(call(&guest, nr, gpa, pages), exit_reason::HLT);
        assert_eq!(result(&guest), expected);
    }
    assert_eq!(
        call(&guest, HC_MAP_GPA_RANGE, 0x4000, 2),
        exit_reason::HYPERCALL
    );
    let exit: Hypercall = guest.exit();
    assert_eq!(exit.nr.get(), HC_MAP_GPA_RANGE);
    let args = exit.args.map(U64::get);
    assert_eq!(args, [0x4000, 2, 0x10, 0, 0, 0]);
    assert_eq!((exit.ret.get(), exit.flags.get()), (0, 0));
    guest.answer(&Hypercall {
        ret: U64::new(22),
        ..exit
    });
    assert_eq!(guest.run(), exit_reason::HLT);
    assert_eq!(guest.regs().rax.get(), 22);
}

/// fix_hypercall_test: enable_quirk, disable_quirk.
#[test]
fn the_other_vendors_hypercall_becomes_the_own_one_unless_the_quirk_is_disabled() {
    const VMCALL: [u8; 4] = [0x0f, 0x01, 0xc1, 0xf4];
    const VMMCALL: [u8; 4] = [0x0f, 0x01, 0xd9, 0xf4];
    const UD: u64 = 6;
    for (vendor, own, other) in [
        (Vendor::Intel, VMCALL, VMMCALL),
        (Vendor::Amd, VMMCALL, VMCALL),
    ] {
        for disabled in [false, true] {
            let guest = Guest::on(vendor, &other, 0, |_, _| ());
            // The handler of #UD is the HLT, too.
            let handler = [(CODE as u8) + 3, (CODE >> 8) as u8, 0, 0];
            guest.write(UD * 4, &handler);
            if disabled {
                guest.enable(cap::DISABLE_QUIRKS2, quirk::FIX_HYPERCALL_INSN);
            }
            guest.set_regs(&Regs {
                rax: U64::new(HC_SCHED_YIELD),
                ..guest.regs()
            });
            assert_eq!(guest.run(), exit_reason::HLT);
            let (result, code) = match disabled {
                true => (HC_SCHED_YIELD, other),
                false => (0, own),
            };
            assert_eq!(guest.regs().rax.get() as u32 as u64, result);
            assert_eq!(guest.read(CODE), code, "{vendor:?}, disabled: {disabled}");
        }
    }
}

/// set_memory_region_test: KVM_RUN with zero added memory regions.
#[test]
fn a_run_without_slots_is_an_internal_error() {
    let guest = Guest::new(&[0xf4]);
    guest.slot(0, 0, guest.ram, 0).unwrap();
    assert_eq!(guest.run(), exit_reason::INTERNAL_ERROR);
    let error: InternalError = guest.exit();
    assert_eq!((error.suberror.get(), error.ndata.get()), (1, 0));
}

/// set_memory_region_test: MMIO during vectoring.
#[test]
fn an_interrupt_table_in_a_device_is_an_internal_error_with_its_address() {
    // int3, with the table of real mode at 2 MiB
    let guest = Guest::new(&[0xcc]);
    let mut sregs: kvm_ops_uapi::state::Sregs = guest.get(guest.vcpu, ioctl::KVM_GET_SREGS);
    sregs.idt.base = U64::new(0x20_0000);
    guest
        .call(guest.vcpu, ioctl::KVM_SET_SREGS, &sregs)
        .unwrap();
    assert_eq!(guest.run(), exit_reason::INTERNAL_ERROR);
    let error: InternalError = guest.exit();
    assert_eq!((error.suberror.get(), error.ndata.get()), (3, 5));
    assert_eq!(error.data[3].get(), 0x20_0000 + 3 * 4);
}

#[test]
fn a_triple_fault_shuts_down_and_resets_the_vcpu_on_amd() {
    // int3, without a table
    for (vendor, rip) in [(Vendor::Intel, CODE), (Vendor::Amd, 0xfff0)] {
        let guest = Guest::on(vendor, &[0xcc], 0, |_, _| ());
        let mut sregs: kvm_ops_uapi::state::Sregs = guest.get(guest.vcpu, ioctl::KVM_GET_SREGS);
        sregs.idt.limit = kvm_ops_uapi::U16::new(0);
        guest
            .call(guest.vcpu, ioctl::KVM_SET_SREGS, &sregs)
            .unwrap();
        assert_eq!(guest.run(), exit_reason::SHUTDOWN);
        assert_eq!(guest.regs().rip.get(), rip, "{vendor:?}");
    }
}

#[test]
fn an_interrupt_waits_for_its_window_and_is_delivered() {
    // sti; nop; hlt; and a handler: out 0x90, al; iret
    let guest = Guest::new(&[0xfb, 0x90, 0xf4]);
    guest.write(0x2000, &[0xe6, 0x90, 0xcf]);
    guest.write(0x41 * 4, &[0x00, 0x20, 0x00, 0x00]);
    let ready = || guest.page_byte(12);
    guest.set_page_byte(0, 1);
    assert_eq!(guest.run(), exit_reason::IRQ_WINDOW_OPEN);
    assert_eq!((ready(), guest.page_byte(13)), (1, 1), "ready, and IF");
    guest.set_page_byte(0, 0);
    let vector = U32::new(0x41);
    guest
        .call(guest.vcpu, ioctl::KVM_INTERRUPT, &vector)
        .unwrap();
    assert_eq!(guest.run_to_port().0, (1, 0x90, 1, 1));
    assert_eq!(ready(), 0, "the handler has interrupts off");
    assert_eq!(guest.run(), exit_reason::HLT);
    assert_eq!(ready(), 1);
    let wrong = guest.call(guest.vcpu, ioctl::KVM_INTERRUPT, &U32::new(256));
    assert_eq!(wrong.unwrap_err().errno(), Errno::EINVAL);
}

#[test]
fn an_nmi_goes_to_its_handler() {
    let guest = Guest::new(&[0x90, 0xf4]);
    guest.write(0x2000, &[0xe6, 0x92, 0xcf]);
    guest.write(2 * 4, &[0x00, 0x20, 0x00, 0x00]);
    guest.ioctl(guest.vcpu, ioctl::KVM_NMI, 0).unwrap();
    assert_eq!(guest.run_to_port().0, (1, 0x92, 1, 1));
    assert_eq!(guest.run(), exit_reason::HLT);
}

/// A file, its identification, and its numbers by name.
pub(crate) fn statistics(guest: &Guest, fd: i32) -> (String, Vec<(String, u64)>) {
    let number = guest.ioctl(fd, ioctl::KVM_GET_STATS_FD, 0).unwrap();
    let file = guest.host.task.file(number as i32).unwrap();
    let mut bytes = Vec::new();
    loop {
        // In small pieces, by the position.
        let more = file.read(None, 100).unwrap();
        if more.is_empty() {
            break;
        }
        bytes.extend(more);
    }
    assert_eq!(file.read(Some(0), bytes.len() + 1).unwrap(), bytes);
    let (header, _) = StatsHeader::read_from_prefix(&bytes).unwrap();
    let text = |bytes: &[u8]| {
        let text: Vec<u8> = bytes
            .iter()
            .copied()
            .take_while(|byte| *byte != 0)
            .collect();
        String::from_utf8(text).unwrap()
    };
    let number = |place: usize| {
        let at = header.data_offset.get() as usize + place;
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    };
    let numbers = (0..header.num_desc.get() as usize).map(|n| {
        let at = header.desc_offset.get() as usize + n * 64;
        let (desc, _) = StatsDesc::read_from_prefix(&bytes[at..]).unwrap();
        (text(&desc.name), number(desc.offset.get() as usize))
    });
    let id = &bytes[header.id_offset.get() as usize..];
    (text(&id[..48]), numbers.collect())
}

#[test]
fn a_vcpu_counts_its_exits_and_tells_them_in_a_file() {
    // out 0x80, al; in al, 0x80; mov [0xffff + ds * 16], al: a device; hlt
    let guest = Guest::new(&[0xe6, 0x80, 0xe4, 0x80, 0x8e, 0xd9, 0xa2, 0xff, 0xff, 0xf4]);
    guest.set_regs(&Regs {
        rcx: U64::new(0x2000),
        ..guest.regs()
    });
    guest.run_to_port();
    guest.run_to_port();
    assert_eq!(guest.run(), exit_reason::MMIO);
    assert_eq!(guest.run(), exit_reason::HLT);
    let (id, numbers) = statistics(&guest, guest.vcpu);
    assert!(id.ends_with("/vcpu-0"), "{id}");
    let expected = [4, 2, 1, 0, 0, 1, 0];
    let found: Vec<u64> = numbers.iter().map(|(_, number)| *number).collect();
    assert_eq!(found, expected, "{numbers:?}");
    assert_eq!(numbers[1].0, "io_exits");
    let (vm, _) = statistics(&guest, guest.vm);
    assert_eq!(id, format!("{vm}/vcpu-0"));
}

#[test]
fn a_vm_counts_how_often_memory_is_taken_from_its_guest() {
    let guest = Guest::with(&[0xf4], vm_type::SW_PROTECTED, |_, _| ());
    let more = guest.host.map(0x2000);
    let flushes = || {
        let (_, numbers) = statistics(&guest, guest.vm);
        let names: Vec<&str> = numbers.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, ["remote_tlb_flush", "remote_tlb_flush_requests"]);
        assert_eq!(numbers[0].1, numbers[1].1, "each request is done");
        numbers[0].1
    };
    let set_private = || {
        let args = MemoryAttributes {
            address: U64::new(0x10_0000),
            size: U64::new(0x1000),
            attributes: U64::new(ATTRIBUTE_PRIVATE),
            ..MemoryAttributes::default()
        };
        let set = ioctl::KVM_SET_MEMORY_ATTRIBUTES;
        guest.call(guest.vm, set, &args).unwrap();
    };
    guest.slot(1, 0x10_0000, more, 0x2000).unwrap();
    assert_eq!(flushes(), 0, "a new slot takes nothing");
    guest.slot(1, 0x20_0000, more, 0x2000).unwrap();
    assert_eq!(flushes(), 1, "moved");
    set_private();
    set_private();
    assert_eq!(flushes(), 2, "once private");
    let space = guest.host.address_space();
    guest.kernel.invalidate(space, more, 0x1000);
    assert_eq!(flushes(), 3, "unmapped");
    guest.slot(1, 0, 0, 0).unwrap();
    assert_eq!(flushes(), 4, "deleted");
}
