//! Dirty logs of guests that write memory of their own.

use iced_x86::code_asm::*;
use kvm_ops_uapi::memory::{DirtyLog, UserspaceMemoryRegion2};
use kvm_ops_uapi::run::exit_reason;
use kvm_ops_uapi::system::vm_type::{SEV, SEV_ES};
use kvm_ops_uapi::{U32, U64, ioctl};

use crate::guest::*;

const LOG_DIRTY_PAGES: u32 = 1;
/// A page that is encrypted at the launch.
const OWN: u64 = 0x3_0000;
/// One that is touched with the C-bit alone, and one without.
const NEW: u64 = OPEN + PAGE;
const SHARED: u64 = OPEN + 2 * PAGE;

fn log_dirty(guest: &Guest) {
    let region = UserspaceMemoryRegion2 {
        flags: U32::new(LOG_DIRTY_PAGES),
        memory_size: U64::new(RAM),
        userspace_addr: U64::new(guest.ram),
        ..UserspaceMemoryRegion2::default()
    };
    guest.w.region(guest.vm, &region).unwrap();
}

/// Which of these pages were written since the last call.
fn dirty<const N: usize>(guest: &Guest, pages: [u64; N]) -> [bool; N] {
    let at = guest.w.task.map((RAM / PAGE / 8) as usize);
    let log = DirtyLog {
        dirty_bitmap: U64::new(at),
        ..DirtyLog::default()
    };
    guest
        .w
        .call(guest.vm, ioctl::KVM_GET_DIRTY_LOG, &log)
        .unwrap();
    let bits: [u8; (RAM / PAGE / 8) as usize] = guest.w.task.get(at).unwrap();
    pages.map(|gpa| bits[(gpa / PAGE / 8) as usize] >> (gpa / PAGE % 8) & 1 != 0)
}

/// Reads a word, and writes one where it is told to.
fn touch(a: &mut CodeAssembler, address: u64, write: bool) -> Assembled {
    a.mov(rbx, address)?;
    match write {
        true => a.mov(dword_ptr(rbx), 7),
        false => a.mov(eax, dword_ptr(rbx)),
    }
}

#[test]
fn a_log_has_the_pages_that_a_guest_writes_with_and_without_the_c_bit() {
    let guest = Guest::new(SEV, |a| {
        for write in [false, true, false, true] {
            touch(a, OWN, write)?;
            touch(a, NEW, write)?;
            touch(a, SHARED_VIEW + SHARED, write)?;
            a.out(u32::from(SAY), eax)?;
        }
        Ok(())
    });
    log_dirty(&guest);
    for write in [false, true, false, true] {
        guest.says();
        assert_eq!(dirty(&guest, [OWN, NEW, SHARED]), [write; 3]);
    }
    assert_eq!(dirty(&guest, [OWN, NEW, SHARED]), [false; 3]);
}

#[test]
fn a_log_has_what_a_guest_with_secret_registers_writes() {
    let guest = Guest::new(SEV_ES, |a| {
        touch(a, OWN, true)?;
        touch(a, NEW, false)?;
        terminate(a)
    });
    log_dirty(&guest);
    assert_eq!(guest.run(), exit_reason::SYSTEM_EVENT);
    assert_eq!(dirty(&guest, [OWN, NEW]), [true, false]);
}
