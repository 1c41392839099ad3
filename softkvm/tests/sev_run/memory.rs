//! Memory of SEV guests: encrypted in place, kept by host address, and shared by the C-bit alone.

use iced_x86::code_asm::*;
use kvm_ops_softkvm::Process;
use kvm_ops_uapi::memory::UserspaceMemoryRegion2;
use kvm_ops_uapi::sev::{self, EncRegion, SevRange};
use kvm_ops_uapi::system::vm_type::SEV;
use kvm_ops_uapi::{U32, U64, ioctl};

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
fn memory_that_is_not_pinned_any_more_keeps_nothing_that_no_slot_shows() {
    let (guest, memory) = with_firmware();
    pin(&guest, ioctl::KVM_MEMORY_ENCRYPT_UNREG_REGION, memory);
    set_slot(&guest, memory, PAGE);
    assert_ne!(guest.says(), FIRMWARE);
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
