//! Interrupts into the guest and events out of it.

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::{Memory, real_mode_vm};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi,
};
use kvm_ops_core::{
    Error, Events, Exception, Exit, Field, Gpa, Irqchip, Msi, VcpuId, VcpuOps, VmPort,
};
use kvm_ops_kvm::{EventFd, IoEvent, IoEventMatch, KvmHost, KvmVcpu, KvmVm};

fn event() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

/// A guest whose interrupt handler for `vector` writes the vector to port 0x99 and halts; the
/// main program is `code`, which runs with interrupts enabled after `sti`.
fn guest_with_handler(
    host: &KvmHost,
    memory: &Memory,
    code: &[u8],
    vector: u8,
    irqchip: Irqchip,
) -> (KvmVm, KvmVcpu) {
    // Real mode: entry `vector` of the table at 0 is offset and segment of the handler.
    memory.write(usize::from(vector) * 4, &[0x00, 0x30, 0x00, 0x00]);
    // mov al, vector; out 0x99, al; iret
    memory.write(0x3000, &[0xb0, vector, 0xe6, 0x99, 0xcf]);
    real_mode_vm(host, memory, code, irqchip)
}

/// Runs until the handler of that vector wrote it to its port.
#[track_caller]
fn expect_handler(vcpu: &mut KvmVcpu, vector: u8) {
    common::expect_out(vcpu, 0x99, &[vector]);
}

#[test]
fn ioeventfds_take_exactly_the_writes_that_they_match() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    // mov al, 7; out 0x20, al; mov al, 8; out 0x20, al; out 0x21, al; hlt
    let code = [0xb0, 7, 0xe6, 0x20, 0xb0, 8, 0xe6, 0x20, 0xe6, 0x21, 0xf4];
    let (vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    let (seven, any) = (event(), event());
    let at = IoEvent::Port(0x20);
    vm.register_ioevent(&seven, at, IoEventMatch::U8(7))
        .unwrap();
    vm.register_ioevent(&any, IoEvent::Port(0x21), IoEventMatch::Any)
        .unwrap();
    assert!(matches!(
        vm.register_ioevent(&seven, at, IoEventMatch::U8(7)),
        Err(Error::Sys(_, libc::EEXIST))
    ));
    common::expect_out(&mut vcpu, 0x20, &[8]);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!((seven.read().unwrap(), any.read().unwrap()), (1, 1));

    vm.unregister_ioevent(&seven, at, IoEventMatch::U8(7))
        .unwrap();
    assert!(matches!(
        vm.unregister_ioevent(&seven, at, IoEventMatch::U8(7)),
        Err(Error::Sys(_, libc::ENOENT))
    ));
    common::real_mode(&mut vcpu);
    common::expect_out(&mut vcpu, 0x20, &[7]);
}

#[test]
fn an_event_of_the_port_takes_writes_until_its_last_handle_is_dropped() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    // mov al, 7; out 0x20, al; hlt
    let code = [0xb0, 7, 0xe6, 0x20, 0xf4];
    let (vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    let new = || {
        let port = vm.devices().unwrap();
        port.io_event(IoEvent::Port(0x20), IoEventMatch::U8(7))
    };
    let bell = new().unwrap();
    let again = new().err();
    assert!(
        matches!(again, Some(Error::Sys(_, libc::EEXIST))),
        "{again:?}"
    );
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!((bell.wait(), bell.take()), (Ok(1), Ok(0)));
    bell.signal().unwrap();
    assert_eq!(bell.take(), Ok(1));
    assert!(bell.raw_fd().is_some());
    let other = bell.clone();
    drop(bell);
    assert!(new().is_err(), "a handle is left");
    drop(other);
    common::real_mode(&mut vcpu);
    common::expect_out(&mut vcpu, 0x20, &[7]);
    // A handle may outlive its VM.
    let left = new().unwrap();
    drop((vcpu, vm));
    assert_eq!(left.take(), Ok(0));
}

#[test]
fn an_mmio_ioeventfd_signals_without_an_exit() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    // mov ax, 0x2000; mov ds, ax; mov [0x10], ax; hlt
    let code = [0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa3, 0x10, 0x00, 0xf4];
    let (vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    let bell = event();
    let at = IoEvent::Mmio(Gpa::new(0x20010));
    vm.register_ioevent(&bell, at, IoEventMatch::U16(0x2000))
        .unwrap();
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!(bell.read().unwrap(), 1);
}

/// sti; hlt; jmp back: sleeps until interrupts come.
const SLEEPER: [u8; 4] = [0xfb, 0xf4, 0xeb, 0xfd];

#[test]
fn lines_and_irqfds_interrupt_a_sleeping_guest_through_the_pic() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    // The PIC as firmware leaves it: ICW1 0x11, ICW2 0x20, ICW3 4, ICW4 1, then all masked but 5.
    let mut code = Vec::new();
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xdf),
    ] {
        code.extend([0xb0, value, 0xe6, port]);
    }
    code.extend([0xe6, 0x98]); // out 0x98, al: ready
    code.extend(SLEEPER);
    let (vm, mut vcpu) = guest_with_handler(&host, &memory, &code, 0x25, Irqchip::Full);
    // The handler ends the interrupt: mov al, 0x20; out 0x20, al before iret.
    memory.write(
        0x3000,
        &[0xb0, 0x25, 0xe6, 0x99, 0xb0, 0x20, 0xe6, 0x20, 0xcf],
    );
    match vcpu.vcpu_run().unwrap() {
        Exit::IoOut { port, .. } => assert_eq!(port, 0x98),
        exit => panic!("{exit:?}"),
    }
    let line = event();
    vm.register_irqfd(&line, 5).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(5));
            line.write(1).unwrap();
        });
        expect_handler(&mut vcpu, 0x25);
    });
    vm.unregister_irqfd(&line, 5).unwrap();
    // A route elsewhere leaves the pins as they were.
    let port = vm.devices().unwrap();
    port.set_gsi_route(24, Msi::to(VcpuId(0), 0x41)).unwrap();
    vm.set_irq_line(5, true).unwrap();
    vm.set_irq_line(5, false).unwrap();
    expect_handler(&mut vcpu, 0x25);

    // Unregistered, the event does nothing: the guest sleeps until it is kicked.
    line.write(1).unwrap();
    let handle = vcpu.kick_handle();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(30));
            handle.kick();
        });
        let start = Instant::now();
        assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted);
        assert!(start.elapsed() > Duration::from_millis(15));
    });
}

#[test]
fn interrupt_messages_reach_an_apic_that_the_guest_enabled() {
    let Some(host) = common::host() else { return };
    for irqchip in [Irqchip::Full, Irqchip::Split] {
        let memory = Memory::new(4);
        // out 0x98, al; then sleep
        let mut code = vec![0xe6, 0x98];
        code.extend(SLEEPER);
        let (vm, mut vcpu) = guest_with_handler(&host, &memory, &code, 0x41, irqchip);
        assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoOut { .. }));
        // After power-on the APIC is software-disabled, and drops it.
        assert_eq!(vm.signal_msi(0xfee0_0000, 0x41), Ok(false));
        // SVR (offset 0xf0): enabled, spurious vector 0xff.
        let mut apic = vcpu.fd().get_lapic().unwrap();
        apic.regs[0xf0] = 0xffu8 as _;
        apic.regs[0xf1] = 1;
        vcpu.fd().set_lapic(&apic).unwrap();
        vm.deliver_interrupt(VcpuId(0), 0x41).unwrap();
        expect_handler(&mut vcpu, 0x41);
        for absent in [1, 7, 300] {
            assert_eq!(
                vm.deliver_interrupt(VcpuId(absent), 0x41),
                Err(Error::NotFound(Field::Vcpu, absent.into()))
            );
        }
    }
}

#[test]
fn an_irqfd_of_the_split_irqchip_goes_where_its_route_says() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let mut code = vec![0xe6, 0x98];
    code.extend(SLEEPER);
    let (vm, mut vcpu) = guest_with_handler(&host, &memory, &code, 0x42, Irqchip::Split);
    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoOut { .. }));
    let mut apic = vcpu.fd().get_lapic().unwrap();
    apic.regs[0xf0] = 0xffu8 as _;
    apic.regs[0xf1] = 1;
    vcpu.fd().set_lapic(&apic).unwrap();
    let mut route = kvm_irq_routing_entry {
        gsi: 7,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    route.u.msi = kvm_irq_routing_msi {
        address_lo: 0xfee0_0000,
        data: 0x42,
        ..Default::default()
    };
    let routes = KvmIrqRouting::from_entries(&[route]).unwrap();
    vm.fd().set_gsi_routing(&routes).unwrap();
    let line = event();
    vm.register_irqfd(&line, 7).unwrap();
    line.write(1).unwrap();
    expect_handler(&mut vcpu, 0x42);

    let port = vm.devices().unwrap();
    port.set_gsi_route(9, Msi::to(VcpuId(0), 0x42)).unwrap();
    let event = port.irq_event(9).unwrap();
    assert!(event.raw_fd().is_some());
    event.signal().unwrap();
    expect_handler(&mut vcpu, 0x42);
}

#[test]
fn without_an_irqchip_the_embedder_injects_and_asks_for_a_window() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    // in al, 0x10; sti; jmp $
    let code = [0xe4, 0x10, 0xfb, 0xeb, 0xfe];
    let (_vm, mut vcpu) = guest_with_handler(&host, &memory, &code, 0x50, Irqchip::None);
    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoIn { .. }));
    assert!(!vcpu.regs().unwrap().interrupts_enabled());
    vcpu.enable_irq_window().unwrap();
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::IrqWindow);
    assert!(vcpu.regs().unwrap().interrupts_enabled());
    assert!(!vcpu.events().unwrap().shadow.any());
    vcpu.inject_irq(0x50).unwrap();
    assert_eq!(
        vcpu.inject_irq(0x51),
        Err(Error::Exists(Field::Vector, 0x50))
    );
    expect_handler(&mut vcpu, 0x50);
}

#[test]
fn a_cancelled_interrupt_is_not_delivered() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let code = [0xfb, 0x90, 0x90, 0xf4];
    let (_vm, mut vcpu) = guest_with_handler(&host, &memory, &code, 0x50, Irqchip::None);
    let mut regs = vcpu.regs().unwrap();
    regs.rflags = 0x202;
    vcpu.set_regs(&regs).unwrap();
    vcpu.inject_irq(0x50).unwrap();
    let events = vcpu.events().unwrap();
    let vector = events.interrupt.map(|interrupt| interrupt.vector);
    assert_eq!(vector, Some(0x50));
    vcpu.set_events(&events.without_injections()).unwrap();
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
}

#[test]
fn exceptions_and_nmis_reach_their_handlers() {
    let Some(host) = common::host() else { return };
    for vector in [0, 6, 13] {
        let memory = Memory::new(4);
        let (_vm, mut vcpu) = guest_with_handler(&host, &memory, &[0xf4], vector, Irqchip::None);
        let events = Events::default().with_exception(Exception::new(vector, None));
        vcpu.set_events(&events.unwrap()).unwrap();
        let seen = vcpu.events().unwrap().exception;
        assert_eq!(seen.map(|exception| exception.vector), Some(vector));
        expect_handler(&mut vcpu, vector);
        assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    }
    let memory = Memory::new(4);
    let (_vm, mut vcpu) = guest_with_handler(&host, &memory, &[0xf4], 2, Irqchip::None);
    vcpu.inject_nmi().unwrap();
    expect_handler(&mut vcpu, 2);
    for vector in [2, 32, 255] {
        let events = Events {
            exception: Some(Exception::new(vector, None)),
            ..Events::default()
        };
        let refused = Err(Error::Invalid(Field::Vector, vector.into()));
        assert_eq!(vcpu.set_events(&events), refused);
    }
}

#[test]
fn what_needs_an_irqchip_says_so_without_one_and_the_other_way_round() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let (vm, _vcpu) = real_mode_vm(&host, &memory, &[0xf4], Irqchip::None);
    let unsupported = |result: kvm_ops_core::Result<()>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::NotOffered(_)), "{error}");
        assert!(error.to_string().contains("irqchip"), "{error}");
    };
    unsupported(vm.register_irqfd(&event(), 5));
    unsupported(vm.unregister_irqfd(&event(), 5));
    unsupported(vm.set_irq_line(5, true));
    unsupported(vm.signal_msi(0xfee0_0000, 0x41).map(drop));
    unsupported(vm.deliver_interrupt(VcpuId(0), 0x41));
    let port = vm.devices().unwrap();
    unsupported(port.irq_event(5).map(drop));
    unsupported(port.set_gsi_route(5, Msi::to(VcpuId(0), 0x41)));
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xf4], Irqchip::Full);
    unsupported(vcpu.inject_irq(0x41));
    unsupported(vcpu.enable_irq_window());
}
