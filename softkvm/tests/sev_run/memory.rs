//! Memory of SEV guests: encrypted in place, kept by host address, and shared by the C-bit alone.

use std::thread;

use iced_x86::code_asm::*;
use kvm_ops_softkvm::{Process, Refusal};
use kvm_ops_uapi::memory::UserspaceMemoryRegion2;
use kvm_ops_uapi::run::{MemoryFault, exit_reason};
use kvm_ops_uapi::sev::{self, EncRegion, SevRange};
use kvm_ops_uapi::system::vm_type::{SEV, SEV_ES, SNP};
use kvm_ops_uapi::{Errno, U32, U64, ioctl};

use crate::guest::*;

/// The place of a slot that comes late, and what was encrypted for it.
const LATE_AT: u64 = 0x20_0000;
const FIRMWARE: u32 = 0x1234_5678;

fn say(a: &mut CodeAssembler, address: u64) -> Assembled {
    a.mov(rbx, address)?;
    a.mov(eax, dword_ptr(rbx))?;
    a.out(u32::from(SAY), eax)
}

fn set_slot(guest: &Guest, memory: u64, bytes: u64) {
    let region = UserspaceMemoryRegion2 {
        slot: U32::new(1),
        guest_phys_addr: U64::new(LATE_AT),
        memory_size: U64::new(bytes),
        userspace_addr: U64::new(memory),
        ..UserspaceMemoryRegion2::default()
    };
    guest.w.region(guest.vm, &region).unwrap();
}

fn pin(guest: &Guest, call: ioctl::Ioctl, memory: u64) {
    let region = EncRegion {
        addr: U64::new(memory),
        size: U64::new(PAGE),
    };
    guest.w.call(guest.vm, call, &region).unwrap();
}

fn read(guest: &Guest, address: u64) -> u32 {
    let mut word = [0; 4];
    guest.w.read(address, &mut word).unwrap();
    u32::from_le_bytes(word)
}

/// A guest that says what the late slot has, again and again, and at last what it has without the C-bit. The slot's memory,
/// whose address is returned, is pinned, and was encrypted in front of the slot.
fn with_firmware() -> (Guest, u64) {
    let guest = Guest::prepared(SEV, |a| {
        for _ in 0..3 {
            say(a, LATE_AT)?;
        }
        say(a, SHARED_VIEW + LATE_AT)
    });
    let memory = guest.w.map(PAGE);
    guest.w.write(memory, &FIRMWARE.to_le_bytes()).unwrap();
    pin(&guest, ioctl::KVM_MEMORY_ENCRYPT_REG_REGION, memory);
    guest.launch_with(0, |guest| {
        let range = SevRange {
            uaddr: U64::new(memory),
            len: U32::new(PAGE as u32),
            ..SevRange::default()
        };
        guest.command(sev::LAUNCH_UPDATE_DATA, &range).unwrap();
    });
    (guest, memory)
}

#[test]
fn firmware_that_was_encrypted_before_it_has_a_slot_is_what_the_slot_shows() {
    let (guest, memory) = with_firmware();
    let ciphertext = read(&guest, memory);
    assert_ne!(ciphertext, FIRMWARE, "encrypted in place");
    set_slot(&guest, memory, PAGE);
    assert_eq!(guest.says(), FIRMWARE);
    set_slot(&guest, memory, 0);
    set_slot(&guest, memory, PAGE);
    assert_eq!(guest.says(), FIRMWARE, "pinned memory keeps it");
    assert_eq!(guest.says(), FIRMWARE);
    assert_eq!(guest.says(), ciphertext, "without the C-bit");
}

#[test]
fn a_guest_and_a_device_share_a_page_by_the_c_bit_without_a_call() {
    let guest = Guest::new(SEV, |a| {
        a.mov(rbx, OPEN)?;
        a.mov(dword_ptr(rbx), 7)?;
        a.mov(rbx, SHARED_VIEW + OPEN)?;
        a.mov(dword_ptr(rbx), 5)?;
        for address in [OPEN, SHARED_VIEW + OPEN, OPEN] {
            say(a, address)?;
        }
        Ok(())
    });
    assert_eq!(guest.says(), 7);
    assert_eq!(read(&guest, guest.ram + OPEN), 5, "what the device sees");
    guest.write(OPEN, &9_u32.to_le_bytes());
    assert_eq!(guest.says(), 9);
    assert_eq!(guest.says(), 7, "the guest's own");
}

/// Says a word of shared memory, again and again: by a port, or by the GHCB page.
fn says_late_memory(a: &mut CodeAssembler) -> Assembled {
    for _ in 0..3 {
        say(a, SHARED_VIEW + LATE_AT)?;
    }
    Ok(())
}

fn says_late_memory_by_page(a: &mut CodeAssembler, snp: bool) -> Assembled {
    use_page(a, snp)?;
    for _ in 0..3 {
        a.mov(rbx, SHARED_VIEW + LATE_AT)?;
        a.mov(rbx, qword_ptr(rbx))?;
        say_by_page(a, rbx)?;
    }
    Ok(())
}

#[test]
fn memory_that_leaves_under_a_guest_of_sev_is_efault() {
    let codes: [(u64, Part); 3] = [
        (SEV, says_late_memory),
        (SEV_ES, |a| says_late_memory_by_page(a, false)),
        (SNP, |a| says_late_memory_by_page(a, true)),
    ];
    for (kind, code) in codes {
        let guest = Guest::new(kind, code);
        let memory = guest.w.map(PAGE);
        guest.w.write(memory, &5_u64.to_le_bytes()).unwrap();
        set_slot(&guest, memory, PAGE);
        assert_eq!(guest.says(), 5, "type {kind}");
        let own = guest.w.address_space();
        guest.w.kernel().invalidate(own, memory, PAGE);
        assert_eq!(guest.says(), 5, "type {kind}: it was lent again");
        guest.w.kernel().invalidate(own, memory, PAGE);
        guest.w.unmap(memory);
        for _ in 0..2 {
            let refused = guest.try_run().unwrap_err();
            assert_eq!(refused.errno(), Errno::EFAULT, "type {kind}");
            assert_eq!(guest.reason(), exit_reason::MEMORY_FAULT);
            let fault: MemoryFault = guest.exit();
            assert_eq!((fault.flags.get(), fault.gpa.get()), (0, LATE_AT));
        }
    }
}

#[test]
fn memory_that_two_vcpus_miss_at_once_is_there_for_both() {
    const RUNS: u32 = 20000;
    let guest = Guest::prepared(SEV, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        say(a, SHARED_VIEW + LATE_AT)?;
        a.jmp(again)
    });
    let other = guest.w.vcpu(guest.vm, 1);
    guest.set_registers(other);
    guest.launch(0);
    let memory = guest.w.map(PAGE);
    set_slot(&guest, memory, PAGE);
    let runs = |vcpu| {
        let file = guest.w.task.file(vcpu).unwrap();
        (0..RUNS).try_for_each(|_| {
            guest.w.ioctl(vcpu, ioctl::KVM_RUN, 0)?;
            let mut reason = [0; 4];
            file.run_area().unwrap().read(8, &mut reason);
            assert_eq!(u32::from_le_bytes(reason), exit_reason::IO);
            Ok::<(), Refusal>(())
        })
    };
    thread::scope(|scope| {
        let both = [guest.vcpu, other].map(|vcpu| scope.spawn(move || runs(vcpu)));
        let own = guest.w.address_space();
        while both.iter().any(|thread| !thread.is_finished()) {
            guest.w.kernel().invalidate(own, memory, PAGE);
        }
        for thread in both {
            assert_eq!(thread.join().unwrap(), Ok(()));
        }
    });
}
