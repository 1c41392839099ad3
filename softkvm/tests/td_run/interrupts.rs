//! Interrupts that user space sends to a TD, and writes of a TD that signal eventfds.

use iced_x86::code_asm::*;
use kvm_ops_uapi::ioctl;
use kvm_ops_uapi::irq::{IoEventFd, Irqfd, ioeventfd_flags, route_type};
use kvm_ops_uapi::run::{Mmio, exit_reason};
use kvm_ops_uapi::vm::{IrqRouting, IrqRoutingEntry, Msi};
use kvm_ops_uapi::{U32, U64};
use zerocopy::IntoBytes;

use crate::guest::*;

const VECTOR: u32 = 0x41;

/// Switches its local APIC on, says so, and waits for a request of the vector in its virtual APIC page.
fn waits(a: &mut CodeAssembler) -> Assembled {
    call(a, WRMSR, [0x80f, 0x1ff, 0, 0])?;
    say(a, r10)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.mov(ecx, 0x822)?;
    a.rdmsr()?;
    a.test(eax, 1 << (VECTOR & 31))?;
    a.jz(again)?;
    say(a, rax)
}

#[test]
fn a_message_reaches_a_td_that_executes() {
    let td = Td::new(waits);
    assert_eq!(td.says(), 0);
    let msi = Msi {
        address_lo: U32::new(0xfee0_0000),
        data: U32::new(VECTOR),
        ..Msi::default()
    };
    let sent = td.w.call(td.vm, ioctl::KVM_SIGNAL_MSI, &msi);
    assert_eq!(sent, Ok(1));
    assert_eq!(td.says(), 1 << (VECTOR & 31));
}

#[test]
fn an_eventfd_interrupts_a_td_by_its_route() {
    let td = Td::new(waits);
    assert_eq!(td.says(), 0);
    let head = IrqRouting {
        nr: U32::new(1),
        ..IrqRouting::default()
    };
    let mut entry = IrqRoutingEntry {
        gsi: U32::new(9),
        kind: U32::new(route_type::MSI),
        ..IrqRoutingEntry::default()
    };
    entry.route[..4].copy_from_slice(&0xfee0_0000u32.to_le_bytes());
    entry.route[8..12].copy_from_slice(&VECTOR.to_le_bytes());
    let table = [head.as_bytes(), entry.as_bytes()].concat();
    let at = td.w.task.put(&table[..]);
    td.w.ioctl(td.vm, ioctl::KVM_SET_GSI_ROUTING, at).unwrap();
    let event = td.w.task.open_event().unwrap();
    let args = Irqfd {
        fd: U32::new(event as u32),
        gsi: U32::new(9),
        ..Irqfd::default()
    };
    td.w.call(td.vm, ioctl::KVM_IRQFD, &args).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            td.w.task.signal(event).unwrap();
        });
        assert_eq!(td.says(), 1 << (VECTOR & 31));
    });
}

#[test]
fn a_tds_write_to_a_device_signals_its_eventfd_and_another_leaves() {
    let td = Td::new(|a| {
        call(a, MMIO, [4, 1, SHARED | DEVICE | 8, 7])?;
        call(a, MMIO, [4, 1, SHARED | DEVICE | 8, 8])?;
        say(a, r10)
    });
    let event = td.w.task.open_event().unwrap();
    let args = IoEventFd {
        datamatch: U64::new(7),
        addr: U64::new(DEVICE | 8),
        len: U32::new(4),
        fd: U32::new(event as u32),
        flags: U32::new(ioeventfd_flags::DATAMATCH),
        ..IoEventFd::default()
    };
    td.w.call(td.vm, ioctl::KVM_IOEVENTFD, &args).unwrap();
    let mmio: Mmio = td.runs_to(exit_reason::MMIO);
    assert_eq!(mmio.data[0], 8);
    assert_eq!(td.w.task.take_signals(event), Ok(1));
}
