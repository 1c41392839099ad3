//! Coalesced MMIO and ports, as the kernel's self-test coalesced_io_test goes through them.

use kvm_ops_softkvm::RunArea;
use kvm_ops_uapi::irq::{COALESCED_MMIO_MAX, CoalescedMmio, CoalescedMmioRing, CoalescedMmioZone};
use kvm_ops_uapi::run::{COALESCED_MMIO_PAGE, Mmio, exit_reason};
use kvm_ops_uapi::{U32, U64, cap, ioctl};
use std::sync::Arc;
use zerocopy::{FromZeros, IntoBytes};

use crate::guest::{CODE, Guest};

const RING: u64 = COALESCED_MMIO_PAGE * 4096;
const PORT: u64 = 0x80;
const DEVICE: u64 = 0x2_0010;
/// mov ax, 0x2000; mov ds, ax; then, again and again: inc eax; out 0x80, al; mov [0x10], ax; jmp
const WRITES: [u8; 14] = [
    0xb8, 0x00, 0x20, 0x8e, 0xd8, 0x66, 0x40, 0xe6, 0x80, 0xa3, 0x10, 0x00, 0xeb, 0xf7,
];

fn zone(guest: &Guest, call: ioctl::Ioctl, addr: u64, size: u32, pio: u32) {
    let args = CoalescedMmioZone {
        addr: U64::new(addr),
        size: U32::new(size),
        pio: U32::new(pio),
    };
    assert_eq!(guest.call(guest.vm, call, &args), Ok(0));
}

fn area(guest: &Guest, vcpu: i32) -> Arc<dyn RunArea> {
    let file = guest.host.task.file(vcpu).unwrap();
    Arc::clone(file.run_area().unwrap())
}

fn ring(area: &dyn RunArea) -> (u32, u32) {
    let mut ring = CoalescedMmioRing::new_zeroed();
    area.read(RING, ring.as_mut_bytes());
    (ring.first.get(), ring.last.get())
}

fn set_ring(area: &dyn RunArea, first: u32, last: u32) {
    let ring = CoalescedMmioRing {
        first: U32::new(first),
        last: U32::new(last),
    };
    area.write(RING, ring.as_bytes());
}

fn entry(area: &dyn RunArea, number: u32) -> CoalescedMmio {
    let mut entry = CoalescedMmio::new_zeroed();
    area.read(RING + 8 + 24 * u64::from(number), entry.as_mut_bytes());
    entry
}

#[test]
fn writes_to_zones_wait_in_the_ring_until_it_is_full_but_for_one_place() {
    let guest = Guest::new(&WRITES);
    let page = guest.ioctl(
        guest.vm,
        ioctl::KVM_CHECK_EXTENSION,
        cap::COALESCED_MMIO.into(),
    );
    assert_eq!(page, Ok(COALESCED_MMIO_PAGE as i64));
    zone(&guest, ioctl::KVM_REGISTER_COALESCED_MMIO, DEVICE, 2, 0);
    zone(&guest, ioctl::KVM_REGISTER_COALESCED_MMIO, PORT, 1, 1);
    let area = area(&guest, guest.vcpu);
    for start in [0, 1, COALESCED_MMIO_MAX - 1] {
        set_ring(&*area, start, start);
        let reason = guest.run();
        assert!(matches!(reason, exit_reason::IO | exit_reason::MMIO));
        let (first, last) = ring(&*area);
        assert_eq!((first, (last + 1) % COALESCED_MMIO_MAX), (start, start));
        let ports = (0..COALESCED_MMIO_MAX - 1).filter(|n| {
            let entry = entry(&*area, (start + n) % COALESCED_MMIO_MAX);
            let place = (entry.phys_addr.get(), entry.len.get(), entry.pio.get());
            let expected = match entry.pio.get() {
                1 => (PORT, 1, 1),
                _ => (DEVICE, 2, 0),
            };
            assert_eq!(place, expected);
            entry.pio.get() == 1
        });
        let ports = ports.count() as u32;
        // They take turns.
        assert!(ports.abs_diff(COALESCED_MMIO_MAX / 2) <= 1, "{ports}");
        // User space answers the one that found no room.
        guest.set_immediate_exit(true);
        assert!(guest.run_vcpu(guest.vcpu).is_err());
        guest.set_immediate_exit(false);
    }
}

#[test]
fn a_zone_that_is_gone_a_partial_write_and_a_bad_ring_leave_to_user_space() {
    // mov ax, 0x2000; mov ds, ax; mov [0x10], ax; hlt
    let code = [0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa3, 0x10, 0x00, 0xf4];
    let leaves = |prepare: &dyn Fn(&Guest)| {
        let guest = Guest::new(&code);
        prepare(&guest);
        match guest.run() {
            exit_reason::MMIO => {
                let mmio: Mmio = guest.exit();
                assert_eq!((mmio.phys_addr.get(), mmio.is_write), (DEVICE, 1));
                true
            }
            exit_reason::HLT => false,
            reason => panic!("{reason} at {:#x}", guest.regs().rip.get() - CODE),
        }
    };
    let register = ioctl::KVM_REGISTER_COALESCED_MMIO;
    let end = ioctl::KVM_UNREGISTER_COALESCED_MMIO;
    assert!(!leaves(&|guest| zone(guest, register, DEVICE - 8, 16, 0)));
    assert!(leaves(&|guest| zone(guest, register, DEVICE, 1, 0)));
    assert!(leaves(&|guest| zone(guest, register, DEVICE, 2, 1)));
    assert!(leaves(&|guest| zone(guest, register, u64::MAX, 2, 0)));
    // What contains the range goes, and nothing else does.
    for (addr, size, gone) in [(DEVICE, 2, true), (DEVICE + 1, 1, true), (DEVICE, 3, false)] {
        let left = leaves(&|guest| {
            zone(guest, register, DEVICE, 2, 0);
            zone(guest, end, addr, size, 0);
        });
        assert_eq!(left, gone, "{addr:#x}, {size}");
    }
    for (first, last) in [(0, COALESCED_MMIO_MAX), (0, u32::MAX), (5, 4)] {
        let left = leaves(&|guest| {
            zone(guest, register, DEVICE, 2, 0);
            set_ring(&*area(guest, guest.vcpu), first, last);
        });
        assert!(left, "{first}, {last}");
    }
}

#[test]
fn the_ring_is_one_for_all_vcpus_and_other_pages_are_not() {
    let guest = Guest::new(&[0xf4]);
    let areas = [guest.vcpu, guest.add_vcpu(1, CODE), guest.add_vcpu(2, CODE)];
    let areas = areas.map(|vcpu| area(&guest, vcpu));
    set_ring(&*areas[1], 7, 9);
    areas[1].write(4096, &[1; 8]);
    for (n, other) in areas.iter().enumerate() {
        assert_eq!(ring(&**other), (7, 9));
        let mut port_data = [0; 8];
        other.read(4096, &mut port_data);
        assert_eq!(port_data == [1; 8], n == 1);
    }
}
