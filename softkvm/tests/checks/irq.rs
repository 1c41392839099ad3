//! Interrupts and events.

use crate::common::{Answer, World};
use crate::support::*;
use kvm_ops::Vendor;
use kvm_ops_uapi::checks::*;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::irq::{
    CoalescedMmioZone, IoEventFd, Irqfd, ioeventfd_flags, irqfd_flags, route_type,
};
use kvm_ops_uapi::irqchip::{Irqchip, LapicState, PitState2};
use kvm_ops_uapi::state::Sregs;
use kvm_ops_uapi::vm::{IrqLevel, IrqRouting, IrqRoutingEntry, Msi, PitConfig};
use kvm_ops_uapi::{U32, U64, cap};
use zerocopy::{Immutable, IntoBytes};

/// A VM with a full irqchip.
fn full_chips(w: &World) -> i32 {
    let vm = w.vm(0);
    w.ioctl(vm, ioctl::KVM_CREATE_IRQCHIP, 0).unwrap();
    vm
}

fn split_chips(w: &World) -> i32 {
    let vm = w.vm(0);
    w.enable(vm, cap::SPLIT_IRQCHIP, 24).unwrap();
    vm
}

fn entry(gsi: u32, kind: u32, route: &[u32]) -> IrqRoutingEntry {
    let mut entry = IrqRoutingEntry {
        gsi: U32::new(gsi),
        kind: U32::new(kind),
        ..IrqRoutingEntry::default()
    };
    for (to, word) in entry.route.chunks_exact_mut(4).zip(route) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    entry
}

fn input(gsi: u32, chip: u32, pin: u32) -> IrqRoutingEntry {
    entry(gsi, route_type::IRQCHIP, &[chip, pin])
}

fn message(gsi: u32, high: u32) -> IrqRoutingEntry {
    entry(gsi, route_type::MSI, &[0xfee0_0000, high, 0x41])
}

fn routes(w: &World, vm: i32, nr: u32, flags: u32, entries: &[IrqRoutingEntry]) -> Answer {
    let head = IrqRouting {
        nr: U32::new(nr),
        flags: U32::new(flags),
    };
    let bytes = [head.as_bytes(), entries.as_bytes()].concat();
    w.ioctl(vm, ioctl::KVM_SET_GSI_ROUTING, w.task.put(&bytes[..]))
}

fn table(w: &World, vm: i32, entries: &[IrqRoutingEntry]) -> Answer {
    routes(w, vm, entries.len() as u32, 0, entries)
}

fn x2apic(w: &World, vm: i32) -> i32 {
    w.enable(vm, cap::X2APIC_API, 1).unwrap();
    vm
}

fn msi(high: u32, flags: u32) -> Msi {
    Msi {
        address_lo: U32::new(0xfee0_0000),
        address_hi: U32::new(high),
        data: U32::new(0x41),
        flags: U32::new(flags),
        ..Msi::default()
    }
}

fn irqfd_with(w: &World, vm: i32, change: impl FnOnce(&mut Irqfd)) -> Answer {
    let mut args = Irqfd {
        fd: U32::new(w.task.open_event()? as u32),
        gsi: U32::new(5),
        ..Irqfd::default()
    };
    change(&mut args);
    w.call(vm, ioctl::KVM_IRQFD, &args)
}

fn event_with(w: &World, vm: i32, change: impl FnOnce(&mut IoEventFd)) -> Answer {
    let mut args = IoEventFd {
        addr: U64::new(0xd000),
        len: U32::new(2),
        fd: U32::new(w.task.open_event()? as u32),
        ..IoEventFd::default()
    };
    change(&mut args);
    w.call(vm, ioctl::KVM_IOEVENTFD, &args)
}

fn ends(args: &mut IoEventFd) {
    args.flags = U32::new(ioeventfd_flags::DEASSIGN);
}

fn chip(number: u32) -> Irqchip {
    Irqchip {
        chip_id: U32::new(number),
        ..Irqchip::default()
    }
}

/// A structure that can be read and not written.
fn read_only<T: IntoBytes + Immutable>(w: &World, fd: i32, ioctl: Ioctl, value: &T) -> Answer {
    let at = w.task.put(value);
    w.task.protect(at);
    w.ioctl(fd, ioctl, at)
}

const CLOSED: u32 = 99;

/// `KVM_REGISTER_COALESCED_MMIO` of 8 bytes at 0.
fn zone(w: &World, vm: i32, change: impl FnOnce(&mut CoalescedMmioZone)) -> Answer {
    let mut args = CoalescedMmioZone {
        size: U32::new(8),
        ..CoalescedMmioZone::default()
    };
    change(&mut args);
    w.call(vm, ioctl::KVM_REGISTER_COALESCED_MMIO, &args)
}

pub(crate) const CASES: &[Case] = &[
    (gsi_routing::COPY, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_SET_GSI_ROUTING, NOWHERE)
    }),
    (gsi_routing::IRQCHIP, |w| routes(w, w.vm(0), 5000, 1, &[])),
    (gsi_routing::COUNT, |w| {
        routes(w, split_chips(w), 4097, 1, &[])
    }),
    (gsi_routing::FLAGS, |w| routes(w, split_chips(w), 1, 1, &[])),
    (gsi_routing::ENTRIES, |w| {
        routes(w, split_chips(w), 2, 0, &[message(4096, 0)])
    }),
    (gsi_routing::GSI, |w| {
        let mut wrong = message(1, 0);
        wrong.flags = U32::new(2);
        table(w, split_chips(w), &[wrong, message(4096, 0)])
    }),
    (gsi_routing::ENTRY_FLAGS, |w| {
        let mut wrong = input(1, 9, 0);
        wrong.flags = U32::new(1);
        table(w, full_chips(w), &[wrong])
    }),
    (gsi_routing::ENTRY_FLAGS, |w| {
        let mut fine = message(1, 0);
        fine.flags = U32::new(1);
        let vm = split_chips(w);
        table(w, vm, &[fine])?;
        fine.flags = U32::new(3);
        table(w, vm, &[fine])
    }),
    (gsi_routing::ONCE, |w| {
        table(w, full_chips(w), &[input(1, 2, 4), input(1, 2, 99)])
    }),
    (gsi_routing::ONCE, |w| {
        table(w, full_chips(w), &[input(1, 2, 4), message(1, 0)])
    }),
    (gsi_routing::ONCE, |w| {
        table(w, full_chips(w), &[message(1, 0), entry(1, 7, &[])])
    }),
    (gsi_routing::KNOWN, |w| {
        table(w, full_chips(w), &[entry(1, 3, &[])])
    }),
    (gsi_routing::SPLIT, |w| {
        table(w, split_chips(w), &[input(1, 9, 9)])
    }),
    (gsi_routing::CHIP, |w| {
        table(w, full_chips(w), &[input(1, 0, 8)])
    }),
    (gsi_routing::CHIP, |w| {
        table(w, full_chips(w), &[input(1, 2, 24)])
    }),
    (gsi_routing::CHIP, |w| {
        table(w, full_chips(w), &[input(1, 3, 0)])
    }),
    (gsi_routing::ADDRESS, |w| {
        let vm = split_chips(w);
        table(w, vm, &[message(1, 1)])?;
        table(w, x2apic(w, vm), &[message(1, 1)])
    }),
    (signal_msi::COPY, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_SIGNAL_MSI, NOWHERE)
    }),
    (signal_msi::IRQCHIP, |w| {
        w.call(w.vm(0), ioctl::KVM_SIGNAL_MSI, &msi(0, 2))
    }),
    (signal_msi::FLAGS, |w| {
        w.call(split_chips(w), ioctl::KVM_SIGNAL_MSI, &msi(1, 2))
    }),
    (signal_msi::ADDRESS, |w| {
        let vm = x2apic(w, split_chips(w));
        w.call(vm, ioctl::KVM_SIGNAL_MSI, &msi(1, 0))
    }),
    (signal_msi::TARGET, |w| {
        let vm = split_chips(w);
        w.vcpu(vm, 1);
        w.call(vm, ioctl::KVM_SIGNAL_MSI, &msi(0, 1))
    }),
    (irq_line::COPY, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_IRQ_LINE, NOWHERE)
    }),
    (irq_line::IRQCHIP, |w| {
        w.call(w.vm(0), ioctl::KVM_IRQ_LINE, &IrqLevel::default())
    }),
    (irq_line::COPY_BACK, |w| {
        let line = IrqLevel::default();
        read_only(w, full_chips(w), ioctl::KVM_IRQ_LINE_STATUS, &line)
    }),
    (irqfd::COPY, |w| w.ioctl(w.vm(0), ioctl::KVM_IRQFD, NOWHERE)),
    (irqfd::FLAGS, |w| {
        irqfd_with(w, w.vm(0), |args| args.flags = U32::new(6))
    }),
    (irqfd::RESAMPLE, |w| {
        irqfd_with(w, split_chips(w), |args| {
            args.flags = U32::new(irqfd_flags::RESAMPLE);
            args.fd = U32::new(CLOSED);
        })
    }),
    (irqfd::DESCRIPTOR, |w| {
        irqfd_with(w, w.vm(0), |args| args.fd = U32::new(CLOSED))
    }),
    (irqfd::DESCRIPTOR, |w| {
        irqfd_with(w, w.vm(0), |args| {
            args.flags = U32::new(irqfd_flags::DEASSIGN);
            args.fd = U32::new(CLOSED);
        })
    }),
    (irqfd::EVENT, |w| {
        irqfd_with(w, w.vm(0), |args| args.fd = U32::new(w.kvm as u32))
    }),
    (irqfd::RESAMPLE_DESCRIPTOR, |w| {
        irqfd_with(w, full_chips(w), |args| {
            args.flags = U32::new(irqfd_flags::RESAMPLE);
            args.resamplefd = U32::new(CLOSED);
        })
    }),
    (irqfd::RESAMPLE_EVENT, |w| {
        irqfd_with(w, full_chips(w), |args| {
            args.flags = U32::new(irqfd_flags::RESAMPLE);
            args.resamplefd = U32::new(w.kvm as u32);
        })
    }),
    (irqfd::UNUSED, |w| {
        let event = U32::new(w.task.open_event()? as u32);
        irqfd_with(w, split_chips(w), |args| args.fd = event)?;
        // Of another VM, too.
        irqfd_with(w, split_chips(w), |args| {
            (args.fd, args.gsi) = (event, U32::new(6));
        })
    }),
    (ioeventfd::COPY, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_IOEVENTFD, NOWHERE)
    }),
    (ioeventfd::LENGTH, |w| {
        event_with(w, w.vm(0), |args| {
            (args.len, args.addr) = (U32::new(3), U64::new(!0));
        })
    }),
    (ioeventfd::WRAP, |w| {
        event_with(w, w.vm(0), |args| {
            (args.addr, args.flags) = (U64::new(!0), U32::new(16));
        })
    }),
    (ioeventfd::FLAGS, |w| {
        event_with(w, w.vm(0), |args| {
            (args.len, args.flags) = (U32::ZERO, U32::new(17));
        })
    }),
    (ioeventfd::MATCH, |w| {
        event_with(w, w.vm(0), |args| {
            (args.len, args.flags) = (U32::ZERO, U32::new(ioeventfd_flags::DATAMATCH));
            args.fd = U32::new(CLOSED);
        })
    }),
    (ioeventfd::DESCRIPTOR, |w| {
        event_with(w, w.vm(0), |args| args.fd = U32::new(CLOSED))
    }),
    (ioeventfd::EVENT, |w| {
        event_with(w, w.vm(0), |args| args.fd = U32::new(w.kvm as u32))
    }),
    (ioeventfd::UNUSED, |w| {
        let vm = w.vm(0);
        let value = |value: u64| {
            move |args: &mut IoEventFd| {
                args.flags = U32::new(ioeventfd_flags::DATAMATCH);
                args.datamatch = U64::new(value);
            }
        };
        // Other values, lengths and buses are other events.
        event_with(w, vm, value(0))?;
        event_with(w, vm, value(1))?;
        event_with(w, vm, |args| args.len = U32::new(4))?;
        event_with(w, vm, |args| args.flags = U32::new(ioeventfd_flags::PIO))?;
        event_with(w, vm, value(1))
    }),
    (ioeventfd::UNUSED, |w| {
        let vm = w.vm(0);
        event_with(w, vm, |args| args.len = U32::ZERO)?;
        event_with(w, vm, |_| ())
    }),
    (ioeventfd::ROOM, |w| {
        let vm = w.vm(0);
        for address in 0..1000 {
            zone(w, vm, |zone| zone.addr = U64::new(8 * address))?;
        }
        event_with(w, vm, |_| ())
    }),
    (coalesced_mmio::COPY, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_REGISTER_COALESCED_MMIO, NOWHERE)
    }),
    (coalesced_mmio::COPY, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_UNREGISTER_COALESCED_MMIO, NOWHERE)
    }),
    (coalesced_mmio::PIO, |w| {
        zone(w, w.vm(0), |zone| zone.pio = U32::new(2))
    }),
    (coalesced_mmio::PIO, |w| {
        let wrong = CoalescedMmioZone {
            pio: U32::new(!0),
            ..CoalescedMmioZone::default()
        };
        w.call(w.vm(0), ioctl::KVM_UNREGISTER_COALESCED_MMIO, &wrong)
    }),
    (coalesced_mmio::MEMORY, |_| {
        let call = |w: &World, vm: &i32| zone(w, *vm, |_| ());
        short_of_memory(Vendor::Amd, coalesced_mmio::MEMORY, |w| w.vm(0), call)
    }),
    (coalesced_mmio::ROOM, |w| {
        let vm = w.vm(0);
        // Ports have a bus of their own, and eventfds do not count.
        event_with(w, vm, |_| ())?;
        zone(w, vm, |zone| zone.pio = U32::new(1))?;
        for _ in 0..1000 {
            zone(w, vm, |_| ())?;
        }
        zone(w, vm, |zone| zone.pio = U32::new(1))?;
        zone(w, vm, |_| ())
    }),
    (ioeventfd_end::DESCRIPTOR, |w| {
        event_with(w, w.vm(0), |args| {
            ends(args);
            args.fd = U32::new(CLOSED);
        })
    }),
    (ioeventfd_end::EVENT, |w| {
        event_with(w, w.vm(0), |args| {
            ends(args);
            args.fd = U32::new(w.kvm as u32);
        })
    }),
    (ioeventfd_end::FOUND, |w| {
        let (vm, event) = (w.vm(0), U32::new(w.task.open_event()? as u32));
        event_with(w, vm, |args| args.fd = event)?;
        let end = |change: fn(&mut IoEventFd)| {
            event_with(w, vm, |args| {
                ends(args);
                args.fd = event;
                change(args);
            })
        };
        // Another length, value or address is another event.
        for change in [
            (|args| args.len = U32::new(4)) as fn(&mut IoEventFd),
            |args| args.flags = U32::new(args.flags.get() | ioeventfd_flags::DATAMATCH),
            |args| args.addr = U64::new(0xd001),
        ] {
            assert_eq!(end(change).unwrap_err().check(), Some(ioeventfd_end::FOUND));
        }
        end(|_| ())?;
        end(|_| ())
    }),
    (irqchip::COPY, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_SET_IRQCHIP, NOWHERE)
    }),
    (irqchip::FULL, |w| {
        w.call(split_chips(w), ioctl::KVM_GET_IRQCHIP, &chip(9))
    }),
    (irqchip::CHIP, |w| {
        w.call(full_chips(w), ioctl::KVM_GET_IRQCHIP, &chip(3))
    }),
    (irqchip::COPY_BACK, |w| {
        read_only(w, full_chips(w), ioctl::KVM_GET_IRQCHIP, &chip(0))
    }),
    (pit2::COPY, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_SET_PIT2, NOWHERE)
    }),
    (pit2::EXISTS, |w| {
        w.call(full_chips(w), ioctl::KVM_SET_PIT2, &PitState2::default())
    }),
    (pit2::COPY_BACK, |w| {
        let vm = full_chips(w);
        w.call(vm, ioctl::KVM_CREATE_PIT2, &PitConfig::default())?;
        w.ioctl(vm, ioctl::KVM_GET_PIT2, NOWHERE)
    }),
    (lapic::APIC, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_SET_LAPIC, NOWHERE)
    }),
    (lapic::COPY, |w| {
        w.ioctl(w.vcpu(split_chips(w), 0), ioctl::KVM_SET_LAPIC, NOWHERE)
    }),
    (lapic::PROTECTED, |_| {
        let w = World::intel();
        let vm = w.td();
        let vcpu = w.td_vcpu(vm, 0, 0);
        w.call(vcpu, ioctl::KVM_SET_LAPIC, &LapicState::default())
    }),
    (lapic::ID, |w| {
        let vcpu = w.vcpu(x2apic(w, split_chips(w)), 0);
        let mut sregs: Sregs = w.fetch(vcpu, ioctl::KVM_GET_SREGS)?;
        sregs.apic_base = U64::new(sregs.apic_base.get() | 1 << 10);
        w.call(vcpu, ioctl::KVM_SET_SREGS, &sregs)?;
        let mut page: LapicState = w.fetch(vcpu, ioctl::KVM_GET_LAPIC)?;
        w.call(vcpu, ioctl::KVM_SET_LAPIC, &page)?;
        page.regs[0x20] = 7;
        w.call(vcpu, ioctl::KVM_SET_LAPIC, &page)
    }),
    (lapic::COPY_BACK, |w| {
        w.ioctl(w.vcpu(split_chips(w), 0), ioctl::KVM_GET_LAPIC, NOWHERE)
    }),
    (x2apic_api::FLAGS, |w| w.enable(w.vm(0), cap::X2APIC_API, 4)),
];
