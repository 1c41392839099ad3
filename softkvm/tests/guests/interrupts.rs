//! Interrupts and events from outside of a guest that executes.

use kvm_ops_uapi::irq::{IoEventFd, Irqfd, ioeventfd_flags, irqfd_flags, route_type};
use kvm_ops_uapi::irqchip::{
    IoapicState, Irqchip, LapicState, PicState, PitState2, chip, pit_flags,
};
use kvm_ops_uapi::run::{IoapicEoi, exit_reason};
use kvm_ops_uapi::state::Sregs;
use kvm_ops_uapi::vm::{IrqLevel, IrqRouting, IrqRoutingEntry, Msi, PIT_SPEAKER_DUMMY, PitConfig};
use kvm_ops_uapi::{Errno, U32, U64, cap, ioctl};
use zerocopy::{FromBytes, IntoBytes};

use crate::exits::statistics;
use crate::guest::Guest;

/// Switches its local APIC on, tells by port 0x81, and halts until two interrupts came, which it tells by port
/// 0x80.
const WAITS: [u8; 30] = [
    0x66, 0xb9, 0x0f, 0x08, 0x00, 0x00, // mov ecx, 0x80f
    0x66, 0x31, 0xd2, // xor edx, edx
    0x66, 0xb8, 0xff, 0x01, 0x00, 0x00, // mov eax, 0x1ff
    0x0f, 0x30, // wrmsr
    0xe6, 0x81, // out 0x81, al
    0xfb, // sti
    0xf4, // again: hlt
    0x80, 0x3e, 0x00, 0x50, 0x02, // cmp byte [0x5000], 2
    0x75, 0xf8, // jne again
    0xe6, 0x80, // out 0x80, al
];
/// Counts, ends the interrupt, tells by port 0x82.
const HANDLER: [u8; 23] = [
    0xfe, 0x06, 0x00, 0x50, // inc byte [0x5000]
    0x66, 0xb9, 0x0b, 0x08, 0x00, 0x00, // mov ecx, 0x80b
    0x66, 0x31, 0xc0, // xor eax, eax
    0x66, 0x31, 0xd2, // xor edx, edx
    0x0f, 0x30, // wrmsr
    0xe6, 0x82, // out 0x82, al
    0xcf, // iret
    0x90, 0x90,
];
const VECTOR: u8 = 0x41;
const LEVEL: u32 = 1 << 15;

/// A guest that waits for interrupts, after its first exit.
fn waiting(full: bool) -> Guest {
    let guest = Guest::with(&WAITS, 0, |host, vm| {
        if full {
            host.ioctl(vm, ioctl::KVM_CREATE_IRQCHIP, 0).unwrap();
        } else {
            let mut args = kvm_ops_uapi::vm::EnableCap {
                cap: U32::new(cap::SPLIT_IRQCHIP),
                ..Default::default()
            };
            args.args[0] = U64::new(24);
            let at = host.task.put(&args);
            host.ioctl(vm, ioctl::KVM_ENABLE_CAP, at).unwrap();
        }
    });
    guest.write(0x2000, &HANDLER);
    guest.write(u64::from(VECTOR) * 4, &0x2000u32.to_le_bytes());
    let mut sregs: Sregs = guest.get(guest.vcpu, ioctl::KVM_GET_SREGS);
    sregs.apic_base = U64::new(sregs.apic_base.get() | 1 << 10);
    guest
        .call(guest.vcpu, ioctl::KVM_SET_SREGS, &sregs)
        .unwrap();
    assert_eq!(port(&guest), 0x81);
    guest
}

/// Runs to an access of a port.
fn port(guest: &Guest) -> u16 {
    guest.run_to_port().0.1
}

fn routes(guest: &Guest, entries: &[IrqRoutingEntry]) {
    let head = IrqRouting {
        nr: U32::new(entries.len() as u32),
        ..IrqRouting::default()
    };
    let bytes = [head.as_bytes(), entries.as_bytes()].concat();
    guest
        .call(guest.vm, ioctl::KVM_SET_GSI_ROUTING, &bytes[..])
        .unwrap();
}

fn entry(gsi: u32, kind: u32, words: &[u32]) -> IrqRoutingEntry {
    let mut entry = IrqRoutingEntry {
        gsi: U32::new(gsi),
        kind: U32::new(kind),
        ..IrqRoutingEntry::default()
    };
    for (to, word) in entry.route.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    entry
}

fn message(gsi: u32, data: u32) -> IrqRoutingEntry {
    entry(gsi, route_type::MSI, &[0xfee0_0000, 0, data])
}

fn irqfd(guest: &Guest, gsi: u32, flags: u32, events: [i32; 2]) {
    let args = Irqfd {
        fd: U32::new(events[0] as u32),
        gsi: U32::new(gsi),
        flags: U32::new(flags),
        resamplefd: U32::new(events[1] as u32),
        ..Irqfd::default()
    };
    guest.call(guest.vm, ioctl::KVM_IRQFD, &args).unwrap();
}

fn set_line(guest: &Guest, gsi: u32, level: u32) {
    let line = IrqLevel {
        irq: U32::new(gsi),
        level: U32::new(level),
    };
    guest.call(guest.vm, ioctl::KVM_IRQ_LINE, &line).unwrap();
}

fn chip_state(guest: &Guest, number: u32) -> Irqchip {
    let at = guest.host.task.put(&Irqchip {
        chip_id: U32::new(number),
        ..Irqchip::default()
    });
    guest.ioctl(guest.vm, ioctl::KVM_GET_IRQCHIP, at).unwrap();
    guest.host.task.get(at).unwrap()
}

fn ioapic(guest: &Guest) -> IoapicState {
    let state = chip_state(guest, chip::IOAPIC).state;
    IoapicState::read_from_prefix(&state).unwrap().0
}

/// Programs an input of the I/O APIC, as the guest would.
fn program(guest: &Guest, pin: usize, entry: u64) {
    let mut state = ioapic(guest);
    state.redirtbl[pin] = U64::new(entry);
    let mut args = Irqchip {
        chip_id: U32::new(chip::IOAPIC),
        ..Irqchip::default()
    };
    args.state[..216].copy_from_slice(state.as_bytes());
    guest.call(guest.vm, ioctl::KVM_SET_IRQCHIP, &args).unwrap();
}

#[test]
fn an_eventfd_interrupts_a_guest_that_halts_by_the_route_of_its_line() {
    let guest = waiting(false);
    let event = guest.host.task.open_event().unwrap();
    routes(&guest, &[message(30, VECTOR.into())]);
    irqfd(&guest, 30, 0, [event, 0]);
    guest.host.task.signal(event).unwrap();
    assert_eq!(port(&guest), 0x82);
    assert_eq!(guest.host.task.take_signals(event), Ok(0), "taken");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            guest.host.task.signal(event).unwrap();
        });
        assert_eq!(port(&guest), 0x82);
    });
    assert_eq!(port(&guest), 0x80);
    // Without the irqfd the signal stays where it is.
    irqfd(&guest, 30, irqfd_flags::DEASSIGN, [event, 0]);
    guest.host.task.signal(event).unwrap();
    assert_eq!(guest.host.task.take_signals(event), Ok(1));
}

#[test]
fn an_eventfd_that_was_signalled_before_interrupts_at_once() {
    let guest = waiting(false);
    let event = guest.host.task.open_event().unwrap();
    guest.host.task.signal(event).unwrap();
    routes(&guest, &[message(5, VECTOR.into())]);
    irqfd(&guest, 5, 0, [event, 0]);
    assert_eq!(port(&guest), 0x82);
}

#[test]
fn a_message_from_user_space_interrupts_whatever_bits_31_to_20_of_its_address_are() {
    let guest = waiting(false);
    for address in [0xfee0_0000, 0] {
        let msi = Msi {
            address_lo: U32::new(address),
            data: U32::new(VECTOR.into()),
            ..Msi::default()
        };
        assert_eq!(guest.call(guest.vm, ioctl::KVM_SIGNAL_MSI, &msi), Ok(1));
        assert_eq!(port(&guest), 0x82);
    }
    assert_eq!(port(&guest), 0x80);
}

#[test]
fn a_level_of_an_eventfd_falls_when_the_guest_ends_the_interrupt() {
    let guest = waiting(true);
    let [event, end] = [(); 2].map(|()| guest.host.task.open_event().unwrap());
    routes(
        &guest,
        &[entry(10, route_type::IRQCHIP, &[chip::IOAPIC, 10])],
    );
    program(&guest, 10, u64::from(VECTOR) | u64::from(LEVEL));
    irqfd(&guest, 10, irqfd_flags::RESAMPLE, [event, end]);
    guest.host.task.signal(event).unwrap();
    assert_eq!(ioapic(&guest).irr.get(), 1 << 10, "high");
    assert_eq!(port(&guest), 0x82);
    assert_eq!(guest.host.task.take_signals(end), Ok(0), "not told yet");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The end is told when the guest goes on, which halts then.
            while guest.host.task.take_signals(end) == Ok(0) {
                std::thread::yield_now();
            }
            assert_eq!(ioapic(&guest).irr.get(), 0, "low");
            guest.host.task.signal(event).unwrap();
        });
        assert_eq!(port(&guest), 0x82);
    });
    assert_eq!(port(&guest), 0x80);
    assert_eq!(guest.host.task.take_signals(end), Ok(1));
    assert_eq!(ioapic(&guest).irr.get(), 0, "low");
}

#[test]
fn the_end_of_a_level_of_user_spaces_io_apic_leaves() {
    let guest = waiting(false);
    routes(&guest, &[message(7, u32::from(VECTOR) | LEVEL)]);
    set_line(&guest, 7, 1);
    assert_eq!(port(&guest), 0x82);
    assert_eq!(guest.run(), exit_reason::IOAPIC_EOI);
    assert_eq!(guest.exit::<IoapicEoi>().vector, VECTOR);
    // An edge, or a line that is no input of the I/O APIC, ends without.
    routes(
        &guest,
        &[
            message(7, VECTOR.into()),
            message(24, u32::from(VECTOR) | LEVEL),
        ],
    );
    set_line(&guest, 7, 1);
    assert_eq!((port(&guest), port(&guest)), (0x82, 0x80));
}

#[test]
fn lines_lead_where_their_routes_say() {
    let guest = waiting(true);
    set_line(&guest, 20, 1);
    assert_eq!(ioapic(&guest).irr.get(), 1 << 20, "by default");
    set_line(&guest, 20, 0);
    let inputs = [
        entry(20, route_type::IRQCHIP, &[chip::IOAPIC, 3]),
        entry(20, route_type::IRQCHIP, &[chip::PIC_SLAVE, 1]),
    ];
    routes(&guest, &inputs);
    set_line(&guest, 20, 1);
    assert_eq!(ioapic(&guest).irr.get(), 1 << 3);
    let pic = chip_state(&guest, chip::PIC_SLAVE).state;
    assert_eq!(PicState::read_from_prefix(&pic).unwrap().0.last_irr, 2);
    set_line(&guest, 20, 0);
    set_line(&guest, 3, 1);
    assert_eq!(ioapic(&guest).irr.get(), 0, "line 3 leads nowhere now");
    let line = IrqLevel {
        irq: U32::new(3),
        level: U32::new(1),
    };
    let at = guest.host.task.put(&line);
    guest
        .ioctl(guest.vm, ioctl::KVM_IRQ_LINE_STATUS, at)
        .unwrap();
    let status: IrqLevel = guest.host.task.get(at).unwrap();
    assert_eq!(status.irq.get(), u32::MAX);
}

/// `KVM_IRQ_LINE_STATUS`: what became of a level.
fn status(guest: &Guest, gsi: u32, level: u32) -> i32 {
    let line = IrqLevel {
        irq: U32::new(gsi),
        level: U32::new(level),
    };
    let at = guest.host.task.put(&line);
    let set = ioctl::KVM_IRQ_LINE_STATUS;
    guest.ioctl(guest.vm, set, at).unwrap();
    let status: IrqLevel = guest.host.task.get(at).unwrap();
    status.irq.get() as i32
}

#[test]
fn the_status_of_a_line_tells_of_masked_merged_and_taken_interrupts() {
    const MASKED: u64 = 1 << 16;
    const LEVEL: u64 = 1 << 15;
    let guest = waiting(true);
    let inputs = [
        entry(20, route_type::IRQCHIP, &[chip::IOAPIC, 3]),
        entry(21, route_type::IRQCHIP, &[chip::PIC_MASTER, 1]),
        entry(22, route_type::IRQCHIP, &[chip::IOAPIC, 4]),
        entry(22, route_type::IRQCHIP, &[chip::PIC_MASTER, 4]),
    ];
    routes(&guest, &inputs);
    let levels = |gsi, levels: &[u32]| -> Vec<i32> {
        levels
            .iter()
            .map(|level| status(&guest, gsi, *level))
            .collect()
    };
    program(&guest, 3, MASKED | u64::from(VECTOR));
    assert_eq!(levels(20, &[1, 0]), [-1, 1]);
    // An edge that stays, and a level whose end the guest has not told.
    program(&guest, 3, VECTOR.into());
    assert_eq!(levels(20, &[1, 1, 0, 1, 0]), [1, 0, 1, 1, 1]);
    program(&guest, 3, LEVEL | u64::from(VECTOR));
    assert_eq!(levels(20, &[1, 1, 0, 1]), [1, 0, 1, 0]);
    // An edge that the processor did not take yet.
    assert_eq!(levels(21, &[1, 0, 1]), [1, 1, 0]);
    program(&guest, 4, VECTOR.into());
    assert_eq!(levels(22, &[1]), [2], "both chips");
}

#[test]
fn the_timer_interrupts_by_the_routes_of_line_0() {
    let guest = waiting(true);
    guest
        .call(guest.vm, ioctl::KVM_CREATE_PIT2, &PitConfig::default())
        .unwrap();
    routes(&guest, &[entry(0, route_type::IRQCHIP, &[chip::IOAPIC, 2])]);
    program(&guest, 2, VECTOR.into());
    let mut pit: PitState2 = guest.get(guest.vm, ioctl::KVM_GET_PIT2);
    assert_eq!(pit.channels[0].mode, 0xff, "not programmed");
    (pit.channels[0].mode, pit.channels[0].rw_mode) = (2, 3);
    pit.channels[0].count = U32::new(1193);
    pit.flags = U32::new(pit_flags::SPEAKER_DATA_ON);
    guest.call(guest.vm, ioctl::KVM_SET_PIT2, &pit).unwrap();
    assert_eq!((port(&guest), port(&guest)), (0x82, 0x82));
    let after: PitState2 = guest.get(guest.vm, ioctl::KVM_GET_PIT2);
    assert_eq!(after.flags, pit.flags);
    assert_eq!(after.channels[0].count, pit.channels[0].count);
}

#[test]
fn ports_of_the_timer_leave_until_it_is_created_and_port_61h_unless_that_asked_for_it() {
    // in al, 0x40; in al, 0x61; out 0x90, al
    let code = [0xe4, 0x40, 0xe4, 0x61, 0xe6, 0x90];
    let leaves = |flags: Option<u32>| {
        let guest = Guest::with(&code, 0, |host, vm| {
            host.ioctl(vm, ioctl::KVM_CREATE_IRQCHIP, 0).unwrap();
        });
        if let Some(flags) = flags {
            let config = PitConfig {
                flags: U32::new(flags),
                ..PitConfig::default()
            };
            let create = ioctl::KVM_CREATE_PIT2;
            guest.call(guest.vm, create, &config).unwrap();
        }
        let next = || guest.run_to_port().0.1;
        let mut ports = vec![next()];
        while ports.last() != Some(&0x90) {
            ports.push(next());
        }
        ports
    };
    assert_eq!(leaves(None), [0x40, 0x61, 0x90]);
    assert_eq!(leaves(Some(0)), [0x61, 0x90]);
    assert_eq!(leaves(Some(PIT_SPEAKER_DUMMY)), [0x90]);
}

/// xapic_ipi_test: each HLT of the guest is counted, and none twice, wherever it waits.
#[test]
fn halts_that_end_in_the_kernel_are_counted_once() {
    let guest = waiting(false);
    let halts = || {
        let (_, numbers) = statistics(&guest, guest.vcpu);
        let mut numbers = numbers.into_iter();
        numbers.find(|(name, _)| name == "halt_exits").unwrap().1
    };
    assert_eq!(halts(), 0);
    for expected in [1, 2] {
        // It halts, and signals end its runs.
        for _ in 0..3 {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    guest.host.task.set_signal(true);
                });
                let answer = guest.run_vcpu(guest.vcpu);
                assert_eq!(answer.unwrap_err().errno(), Errno::EINTR);
            });
            guest.host.task.set_signal(false);
        }
        assert_eq!(halts(), expected);
        let msi = Msi {
            address_lo: U32::new(0xfee0_0000),
            data: U32::new(VECTOR.into()),
            ..Msi::default()
        };
        assert_eq!(guest.call(guest.vm, ioctl::KVM_SIGNAL_MSI, &msi), Ok(1));
        assert_eq!(port(&guest), 0x82);
        assert_eq!(halts(), expected);
    }
    assert_eq!(port(&guest), 0x80);
    assert_eq!(halts(), 2);
}

/// xapic_state_test: test_icr. The guest writes the command that is in its first request words, and user space finds it
/// in the page, but for the bits that the mode does not have.
#[test]
fn commands_of_the_local_apic_are_kept_by_the_rules_of_its_mode() {
    /// Reads ECX = 820H and 821H, writes them to 830H, tells by port 0x80; a fault tells by port 0x81.
    const SENDS: [u8; 34] = [
        0xfa, // cli
        0x66, 0xb9, 0x20, 0x08, 0x00, 0x00, // again: mov ecx, 0x820
        0x0f, 0x32, // rdmsr
        0x66, 0x89, 0xc3, // mov ebx, eax
        0x66, 0x41, // inc ecx
        0x0f, 0x32, // rdmsr
        0x66, 0x89, 0xc2, // mov edx, eax
        0x66, 0x89, 0xd8, // mov eax, ebx
        0x66, 0xb9, 0x30, 0x08, 0x00, 0x00, // mov ecx, 0x830
        0x0f, 0x30, // wrmsr
        0xe6, 0x80, // out 0x80, al
        0xeb, 0xdf, // jmp again
    ];
    let guest = waiting(false);
    guest.write(0x3000, &SENDS);
    // #GP: out 0x81, al; then begin again.
    guest.write(0x2100, &[0xe6, 0x81, 0xea, 0x01, 0x30, 0x00, 0x00]);
    guest.write(13 * 4, &0x2100u32.to_le_bytes());
    let mut regs = guest.regs();
    regs.rip = U64::new(0x3000);
    guest.set_regs(&regs);
    for command in [
        0x4_4000,
        0x4_40ff,
        0x4_4001,
        0x4000,
        0x0100_0000_0000_44ff,
        0xc_4300,
        1 << 13,
        1 << 16,
        1 << 20,
        1 << 31,
        0xa5a5_a5a5_a5a5_a5a5 & !0x700,
        !0x1700,
    ] {
        let mut page: LapicState = guest.get(guest.vcpu, ioctl::KVM_GET_LAPIC);
        let before = icr(&page);
        let [low, high] = [command as u32, (command >> 32) as u32];
        page.regs[0x200..0x204].copy_from_slice(&low.to_le_bytes());
        page.regs[0x210..0x214].copy_from_slice(&high.to_le_bytes());
        guest.call(guest.vcpu, ioctl::KVM_SET_LAPIC, &page).unwrap();
        let refused = command & 0xfff3_2000 != 0;
        assert_eq!(
            port(&guest),
            if refused { 0x81 } else { 0x80 },
            "{command:#x}"
        );
        let page: LapicState = guest.get(guest.vcpu, ioctl::KVM_GET_LAPIC);
        let kept = if refused { before } else { command };
        assert_eq!(icr(&page), kept, "{command:#x}");
    }
}

/// The command, of which the page has the halves apart in both modes.
fn icr(page: &LapicState) -> u64 {
    let word = |at: usize| {
        u64::from(u32::from_le_bytes(
            page.regs[at..at + 4].try_into().unwrap(),
        ))
    };
    word(0x300) | word(0x310) << 32
}

/// xapic_state_test: test_x2apic_id.
#[test]
fn the_number_in_x2apic_mode_is_not_user_spaces_to_change() {
    let guest = waiting(false);
    for number in [0u8, 1, 0xff] {
        let mut page: LapicState = guest.get(guest.vcpu, ioctl::KVM_GET_LAPIC);
        page.regs[0x23] = number;
        guest.call(guest.vcpu, ioctl::KVM_SET_LAPIC, &page).unwrap();
        let page: LapicState = guest.get(guest.vcpu, ioctl::KVM_GET_LAPIC);
        assert_eq!(page.regs[0x20..0x24], [0; 4]);
    }
}

#[test]
fn the_local_apic_s_registers_are_read_and_written() {
    let guest = waiting(false);
    let mut page: LapicState = guest.get(guest.vcpu, ioctl::KVM_GET_LAPIC);
    assert_eq!(page.regs[0xf0..0xf2], [0xff, 1], "the guest switched it on");
    // A request: bit 1 of the third word of IRR.
    page.regs[0x220] = 2;
    guest.call(guest.vcpu, ioctl::KVM_SET_LAPIC, &page).unwrap();
    assert_eq!(port(&guest), 0x82);
}

fn event(guest: &Guest, change: impl FnOnce(&mut IoEventFd)) -> i32 {
    let fd = guest.host.task.open_event().unwrap();
    let mut args = IoEventFd {
        fd: U32::new(fd as u32),
        ..IoEventFd::default()
    };
    change(&mut args);
    guest.call(guest.vm, ioctl::KVM_IOEVENTFD, &args).unwrap();
    fd
}

#[test]
fn writes_signal_their_eventfds_and_others_leave() {
    // mov ax, 0x2000; mov ds, ax; again: out 0x80, al; out 0x80, ax; mov [0x10], al; mov [0x10], ax; mov [0x11], al
    // inc ax; jmp again
    let guest = Guest::new(&[
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xe6, 0x80, 0xe7, 0x80, 0xa2, 0x10, 0x00, 0xa3, 0x10, 0x00,
        0xa2, 0x11, 0x00, 0x40, 0xeb, 0xf0,
    ]);
    let ports = event(&guest, |args| {
        (args.addr, args.len) = (U64::new(0x80), U32::new(1));
        args.flags = U32::new(ioeventfd_flags::PIO);
    });
    let any = event(&guest, |args| args.addr = U64::new(0x2_0010));
    let one = event(&guest, |args| {
        (args.addr, args.len) = (U64::new(0x2_0011), U32::new(1));
        args.flags = U32::new(ioeventfd_flags::DATAMATCH);
        args.datamatch = U64::new(0xff01);
    });
    let taken = || [ports, any, one].map(|fd| guest.host.task.take_signals(fd).unwrap());
    // AX is 0x2000: the wide write to the port leaves, and the last one.
    assert_eq!(port(&guest), 0x80);
    assert_eq!(taken(), [1, 0, 0]);
    assert_eq!(guest.run(), exit_reason::MMIO);
    assert_eq!(taken(), [0, 2, 0]);
    // AL is 1.
    assert_eq!((port(&guest), port(&guest)), (0x80, 0x80));
    assert_eq!(taken(), [2, 2, 1]);
}
