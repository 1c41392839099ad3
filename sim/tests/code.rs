//! Machine code on vCPUs of normal VMs: exits, answers, events, time, and changes of memory.

#[allow(dead_code)] // Each test file uses its part.
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::{Ram, vm_with};
use kvm_ops_core::{
    Answer, CpuidEntry, DebugRegs, DescTable, Error, Events, Exception, Exit, Field, Gfn, Gpa,
    GuestDebug, Host, Irqchip, MpState, Msi, Msr, Privacy, Regs, Segment, SlotFlags, Sregs, Tech,
    VcpuId, VcpuOps, Vendor, VmParams, VmPort, Xcrs, Xsave,
};
use kvm_ops_sim::{SimHost, SimVcpu, SimVm};

const CODE: usize = 0x1000;

/// Puts the vCPU into real mode at `CODE`, with segments at 0 and a stack below the code.
fn real_mode(vcpu: &mut SimVcpu) {
    let data = Segment {
        limit: 0xffff,
        kind: 3,
        present: true,
        s: true,
        ..Segment::default()
    };
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cs = Segment { kind: 11, ..data };
    vcpu.set_sregs(&sregs).unwrap();
    let regs = Regs {
        rip: CODE as u64,
        rsp: 0x0ff0,
        rflags: 2,
        ..Regs::default()
    };
    vcpu.set_regs(&regs).unwrap();
}

/// A VM with memory from address 0, whose vCPU 0 starts `code` in real mode.
struct Guest {
    cpu: SimVcpu,
    vm: SimVm,
    host: SimHost,
    ram: Ram,
}

impl Guest {
    fn new(code: &[u8], irqchip: Irqchip) -> Self {
        Self::with(code, irqchip, 1)
    }

    fn with(code: &[u8], irqchip: Irqchip, vcpus: u32) -> Self {
        let ram = Ram::new(16 * 4096);
        let (host, vm) = vm_with(irqchip, vcpus);
        vm.set_memory_slot(&ram.slot(0, 0)).unwrap();
        let mut cpu = vm.create_vcpu(VcpuId(0)).unwrap();
        real_mode(&mut cpu);
        let guest = Self { cpu, vm, host, ram };
        guest.write(CODE, code);
        guest
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        let range = self.ram.range();
        assert!(at + bytes.len() <= range.bytes() as usize);
        let base = range.address() as *mut u8;
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: inside of the region, which `self` keeps mapped and to which there are no
            // references.
            unsafe { base.add(at + i).write_volatile(*byte) };
        }
    }

    /// A handler of `vector` in real mode that writes the vector to port 0x99.
    fn handler(&self, vector: u8) {
        self.write(usize::from(vector) * 4, &[0x00, 0x30, 0x00, 0x00]);
        // mov al, vector; out 0x99, al; iret
        self.write(0x3000, &[0xb0, vector, 0xe6, 0x99, 0xcf]);
    }

    #[track_caller]
    fn expect_out(&mut self, port: u16, data: &[u8]) {
        let exit = self.cpu.vcpu_run().unwrap();
        assert!(
            matches!(exit, Exit::IoOut { port: p, .. } if p == port),
            "{exit:x?}"
        );
        assert_eq!(self.cpu.exit_data(), data);
    }

    #[track_caller]
    fn expect(&mut self, exit: Exit) {
        assert_eq!(self.cpu.vcpu_run().unwrap(), exit);
    }
}

fn mmio_read(gpa: u64, len: u8) -> Exit {
    let gpa = Gpa::new(gpa);
    Exit::MmioRead { gpa, len }
}

fn mmio_write(gpa: u64, len: u8) -> Exit {
    let gpa = Gpa::new(gpa);
    Exit::MmioWrite { gpa, len }
}

#[test]
fn ports_leave_in_every_width_and_take_the_embedders_answer() {
    // in al, 0x10; in ax, 0x11; in eax, 0x12; out 0x13, eax; hlt; hlt
    let code = [
        0xe4, 0x10, 0xe5, 0x11, 0x66, 0xe5, 0x12, 0x66, 0xe7, 0x13, 0xf4, 0xf4,
    ];
    let mut guest = Guest::new(&code, Irqchip::None);
    for (port, size) in [(0x10, 1), (0x11, 2), (0x12, 4)] {
        let count = 1;
        guest.expect(Exit::IoIn { port, size, count });
        guest.cpu.exit_data().fill(0xa0 + size);
    }
    guest.expect_out(0x13, &[0xa4; 4]);
    guest.expect(Exit::Hlt);
    assert_eq!(guest.cpu.regs().unwrap().rip, (CODE + 11) as u64);
    guest.expect(Exit::Hlt);
    assert_eq!(guest.cpu.instructions(), Some(6));
    assert_eq!(guest.host.instructions(), 6);
}

#[test]
fn string_ports_are_written_item_by_item_and_read_a_batch_at_a_time() {
    // cld; mov si, 0x2000; mov di, 0x2100; mov dx, 0x80; mov cx, 3; rep outsw; mov cx, 2; rep insb;
    // hlt
    let code = [
        0xfc, 0xbe, 0x00, 0x20, 0xbf, 0x00, 0x21, 0xba, 0x80, 0x00, 0xb9, 3, 0, 0xf3, 0x6f, 0xb9,
        2, 0, 0xf3, 0x6c, 0xf4,
    ];
    let mut guest = Guest::new(&code, Irqchip::None);
    guest.write(0x2000, &[1, 2, 3, 4, 5, 6]);
    for item in [[1, 2], [3, 4], [5, 6]] {
        guest.expect_out(0x80, &item);
    }
    let (port, size, count) = (0x80, 1, 2);
    guest.expect(Exit::IoIn { port, size, count });
    guest.cpu.exit_data().copy_from_slice(&[7, 8]);
    guest.expect(Exit::Hlt);
    assert_eq!(guest.ram.read(0x2100, 2), [7, 8]);
}

#[test]
fn a_batch_of_items_ends_with_its_page_and_with_what_the_registers_have_room_for() {
    // cld; mov di, 0x2ffe; mov dx, 0x80; mov cx, 5; rep insb; hlt
    let code = [
        0xfc, 0xbf, 0xfe, 0x2f, 0xba, 0x80, 0x00, 0xb9, 5, 0, 0xf3, 0x6c, 0xf4,
    ];
    let mut guest = Guest::new(&code, Irqchip::None);
    let (port, size) = (0x80, 1);
    let count = 2;
    guest.expect(Exit::IoIn { port, size, count });
    guest.cpu.exit_data().copy_from_slice(&[1, 2]);
    let count = 3;
    guest.expect(Exit::IoIn { port, size, count });
    guest.cpu.exit_data().copy_from_slice(&[3, 4, 5]);
    // The embedder lets it end sooner.
    let regs = guest.cpu.regs().unwrap();
    assert_eq!((regs.rcx, regs.rdi), (3, 0x3000));
    guest.cpu.set_regs(&Regs { rcx: 2, ..regs }).unwrap();
    guest.expect(Exit::Hlt);
    assert_eq!(guest.ram.read(0x2ffe, 5), [1, 2, 3, 4, 0]);
    assert_eq!(guest.cpu.regs().unwrap().rcx, 0);
}

#[test]
fn an_exit_goes_on_with_new_registers_unless_they_are_at_another_instruction() {
    // in al, 0x10; hlt; nop; hlt
    let code = [0xe4, 0x10, 0xf4, 0x90, 0xf4];
    let (port, size, count) = (0x10, 1, 1);
    for (rip, rax, end) in [(CODE, 0x12aa, CODE + 3), (CODE + 3, 0x1234, CODE + 5)] {
        let mut guest = Guest::new(&code, Irqchip::None);
        guest.expect(Exit::IoIn { port, size, count });
        guest.cpu.exit_data()[0] = 0xaa;
        let regs = Regs {
            rip: rip as u64,
            rax: 0x1234,
            ..guest.cpu.regs().unwrap()
        };
        guest.cpu.set_regs(&regs).unwrap();
        guest.expect(Exit::Hlt);
        let regs = guest.cpu.regs().unwrap();
        assert_eq!((regs.rax, regs.rip), (rax, end as u64));
    }
}

#[test]
fn a_kick_lets_the_instruction_of_an_answered_access_end_first() {
    // mov ax, 0x2000; mov ds, ax; mov ax, [0x10]; hlt
    let code = [0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa1, 0x10, 0x00, 0xf4];
    let mut guest = Guest::new(&code, Irqchip::None);
    guest.expect(mmio_read(0x2_0010, 2));
    guest.cpu.exit_data().copy_from_slice(&[0x34, 0x12]);
    guest.cpu.kick_handle().kick();
    guest.expect(Exit::Interrupted);
    let regs = guest.cpu.regs().unwrap();
    assert_eq!((regs.rax, regs.rip), (0x1234, CODE as u64 + 8));
    guest.expect(Exit::Hlt);
}

#[test]
fn memory_that_is_missing_leaves_as_a_fault_until_it_is_there() {
    // mov ax, 0x2000; mov ds, ax; mov ax, [0x10]; hlt
    let code = [0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa1, 0x10, 0x00, 0xf4];
    let mut guest = Guest::new(&code, Irqchip::None);
    let (first, pages) = (Gfn::new(0x20), 1);
    for access in [Privacy::Private, Privacy::Shared] {
        guest.vm.set_missing(first, pages, Some(access));
        for _ in 0..2 {
            guest.expect(Exit::MemoryFault {
                gpa: Gpa::new(0x2_0000),
                bytes: 4096,
                access,
            });
        }
    }
    guest.vm.set_missing(first, pages, None);
    guest.expect(mmio_read(0x2_0010, 2));
    // The access is given up with its registers, and made again where memory is.
    let regs = guest.cpu.regs().unwrap();
    guest.cpu.set_regs(&Regs { rip: 0, ..regs }).unwrap();
    guest.cpu.set_regs(&regs).unwrap();
    guest.vm.set_missing(first, pages, Some(Privacy::Private));
    let more = Ram::new(4096);
    guest.vm.set_memory_slot(&more.slot(1, 0x2_0000)).unwrap();
    guest.expect(Exit::Hlt);
    assert_eq!(guest.cpu.regs().unwrap().rax, 0);
}

#[test]
fn a_source_of_interruptions_is_asked_while_the_guest_executes_and_while_it_sleeps() {
    // loop: jmp loop, and sti; hlt
    for code in [&[0xeb, 0xfe][..], &[0xfb, 0xf4]] {
        let mut guest = Guest::new(code, Irqchip::Full);
        let asked = Arc::new(AtomicU32::new(0));
        let own = Arc::clone(&asked);
        let source = move || own.fetch_add(1, Ordering::Relaxed) == 3;
        guest.cpu.set_interrupt_source(source);
        guest.expect(Exit::Interrupted);
        assert_eq!(asked.load(Ordering::Relaxed), 4);
    }
}

#[test]
fn an_instruction_with_several_device_accesses_makes_each_once_and_in_order() {
    // mov ax, 0x2000; mov ds, ax; inc word [0x10]; mov si, 0x20; mov di, 0x2200; mov cx, 3;
    // rep movsb; mov ax, [0x3e]; hlt
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xff, 0x06, 0x10, 0x00, 0xbe, 0x20, 0x00, 0xbf, 0x00, 0x22,
        0xb9, 3, 0, 0xf3, 0xa4, 0xa1, 0x3e, 0x00, 0xf4,
    ];
    let mut guest = Guest::new(&code, Irqchip::None);
    guest.expect(mmio_read(0x2_0010, 2));
    guest.cpu.exit_data().copy_from_slice(&[0xff, 0x12]);
    guest.expect(mmio_write(0x2_0010, 2));
    assert_eq!(guest.cpu.exit_data(), [0x00, 0x13]);
    for n in 0..3 {
        guest.expect(mmio_read(0x2_0020 + n, 1));
        guest.cpu.exit_data()[0] = 0x40 + n as u8;
    }
    guest.expect(mmio_read(0x2_003e, 2));
    guest.cpu.exit_data().copy_from_slice(&[0x78, 0x56]);
    guest.expect(Exit::Hlt);
    assert_eq!(guest.ram.read(0x2200, 3), [0x40, 0x41, 0x42]);
    assert_eq!(guest.cpu.regs().unwrap().rax, 0x5678);
}

#[test]
fn a_poll_of_one_register_reads_it_anew_each_time() {
    // mov ax, 0x2000; mov ds, ax; l: test byte [0], 1; jz l; hlt
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xf6, 0x06, 0x00, 0x00, 0x01, 0x74, 0xf9, 0xf4,
    ];
    let mut guest = Guest::new(&code, Irqchip::None);
    for value in [0, 2, 4, 1] {
        guest.expect(mmio_read(0x2_0000, 1));
        guest.cpu.exit_data()[0] = value;
    }
    guest.expect(Exit::Hlt);
}

#[test]
fn code_outside_of_memory_is_an_internal_error_and_a_triple_fault_a_shutdown() {
    // jmp 0x4000:0
    let mut guest = Guest::new(&[0xea, 0, 0, 0, 0x40], Irqchip::None);
    guest.expect(Exit::InternalError { suberror: 1 });
    assert_eq!(guest.cpu.exit_data(), [0; 0]);
    let mut guest = Guest::new(&[0x0f, 0x0b], Irqchip::None);
    let mut sregs = guest.cpu.sregs().unwrap();
    sregs.idt = DescTable { base: 0, limit: 0 };
    guest.cpu.set_sregs(&sregs).unwrap();
    guest.expect(Exit::Shutdown);
    guest.expect(Exit::Shutdown);
    assert_eq!(guest.cpu.regs().unwrap().rip, CODE as u64);
}

#[test]
fn code_that_the_host_writes_between_two_exits_is_run() {
    // out 0x10, al; mov al, 1; jmp back
    let mut guest = Guest::new(&[0xe6, 0x10, 0xb0, 1, 0xeb, 0xfa], Irqchip::None);
    guest.expect_out(0x10, &[0]);
    for value in [1, 2, 3] {
        guest.write(CODE + 3, &[value]);
        guest.expect_out(0x10, &[value]);
    }
}

#[test]
fn slots_that_change_are_seen_at_once_while_a_vcpu_runs() {
    // mov ax, 0x2000; mov ds, ax; l: mov al, [0]; jmp l
    let code = [0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa0, 0x00, 0x00, 0xeb, 0xfb];
    let mut guest = Guest::new(&code, Irqchip::None);
    let more = Ram::new(4096);
    let slot = more.slot(1, 0x2_0000);
    guest.vm.set_memory_slot(&slot).unwrap();
    let (cpu, vm) = (&mut guest.cpu, &guest.vm);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| cpu.vcpu_run().unwrap());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!running.is_finished());
        vm.delete_memory_slot(&slot).unwrap();
        assert_eq!(running.join().unwrap(), mmio_read(0x2_0000, 1));
    });
}

#[test]
fn dirty_logs_name_the_written_pages_and_read_only_slots_leave() {
    // mov ax, 0x2000; mov ds, ax; l: mov [0x1000], al; out 0x10, al; jmp l
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa2, 0x00, 0x10, 0xe6, 0x10, 0xeb, 0xf9,
    ];
    let mut guest = Guest::new(&code, Irqchip::None);
    let more = Ram::new(3 * 4096);
    let mut slot = more.slot(1, 0x2_0000);
    slot.flags.log_dirty = true;
    guest.vm.set_memory_slot(&slot).unwrap();
    for _ in 0..3 {
        guest.expect_out(0x10, &[0]);
        let mut bitmap = [0];
        guest.vm.dirty_log(&slot, &mut bitmap).unwrap();
        assert_eq!(bitmap, [0b10]);
        guest.vm.dirty_log(&slot, &mut bitmap).unwrap();
        assert_eq!(bitmap, [0]);
    }
    guest.vm.delete_memory_slot(&slot).unwrap();
    slot.flags = SlotFlags {
        read_only: true,
        log_dirty: false,
    };
    guest.vm.set_memory_slot(&slot).unwrap();
    guest.expect(mmio_write(0x2_1000, 1));
    guest.expect_out(0x10, &[0]);
}

#[test]
fn a_kick_stops_a_spinning_vcpu_and_is_never_lost() {
    let mut guest = Guest::new(&[0xeb, 0xfe], Irqchip::None);
    let kick = guest.cpu.kick_handle();
    kick.kick();
    guest.expect(Exit::Interrupted);
    let cpu = &mut guest.cpu;
    std::thread::scope(|scope| {
        let running = scope.spawn(|| cpu.vcpu_run().unwrap());
        std::thread::sleep(Duration::from_millis(10));
        kick.kick();
        assert_eq!(running.join().unwrap(), Exit::Interrupted);
    });
    assert_eq!(guest.cpu.regs().unwrap().rip, CODE as u64);
}

#[test]
fn without_an_irqchip_the_embedder_injects_and_asks_for_a_window() {
    // in al, 0x10; sti; jmp $
    let mut guest = Guest::new(&[0xe4, 0x10, 0xfb, 0xeb, 0xfe], Irqchip::None);
    guest.handler(0x50);
    assert!(matches!(guest.cpu.vcpu_run(), Ok(Exit::IoIn { .. })));
    guest.cpu.enable_irq_window().unwrap();
    guest.expect(Exit::IrqWindow);
    assert!(guest.cpu.regs().unwrap().interrupts_enabled());
    assert!(!guest.cpu.events().unwrap().shadow.any());
    guest.cpu.inject_irq(0x50).unwrap();
    let twice = guest.cpu.inject_irq(0x51);
    assert_eq!(twice, Err(Error::Exists(Field::Vector, 0x50)));
    guest.expect_out(0x99, &[0x50]);
    // The local APIC's page is not there.
    let mut apic = [Msr::read(0x802)];
    let refused = Err(Error::Invalid(Field::Msr, 0x802));
    assert_eq!(guest.cpu.msrs(&mut apic), refused);
}

#[test]
fn exceptions_and_nmis_reach_their_handlers_and_a_cancelled_interrupt_does_not() {
    for vector in [0, 6, 13] {
        let mut guest = Guest::new(&[0xf4], Irqchip::None);
        guest.handler(vector);
        let events = Events::default().with_exception(Exception::new(vector, None));
        guest.cpu.set_events(&events.unwrap()).unwrap();
        let seen = guest.cpu.events().unwrap().exception;
        assert_eq!(seen.map(|exception| exception.vector), Some(vector));
        guest.expect_out(0x99, &[vector]);
        guest.expect(Exit::Hlt);
    }
    let mut guest = Guest::new(&[0xf4], Irqchip::None);
    guest.handler(2);
    guest.cpu.inject_nmi().unwrap();
    guest.expect_out(0x99, &[2]);
    let mut guest = Guest::new(&[0xfb, 0x90, 0x90, 0xf4], Irqchip::None);
    guest.cpu.inject_irq(0x50).unwrap();
    let events = guest.cpu.events().unwrap().without_injections();
    guest.cpu.set_events(&events).unwrap();
    guest.expect(Exit::Hlt);
}

/// sti; hlt; jmp back: sleeps until interrupts come.
const SLEEPER: [u8; 4] = [0xfb, 0xf4, 0xeb, 0xfd];

/// The PIC as firmware leaves it, with these lines masked.
fn pic(masked: u8) -> Vec<u8> {
    let words = [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, masked),
    ];
    let mut code = Vec::new();
    for (port, value) in words {
        code.extend([0xb0, value, 0xe6, port]);
    }
    code
}

#[test]
fn lines_interrupt_a_sleeping_guest_through_the_pic() {
    let code = [&pic(0xdf), &[0xe6, 0x98][..], &SLEEPER].concat();
    let mut guest = Guest::new(&code, Irqchip::Full);
    guest.handler(0x25);
    // mov al, 0x25; out 0x99, al; mov al, 0x20; out 0x20, al; iret
    let handler = [0xb0, 0x25, 0xe6, 0x99, 0xb0, 0x20, 0xe6, 0x20, 0xcf];
    guest.write(0x3000, &handler);
    guest.expect_out(0x98, &[0xdf]);
    for _ in 0..2 {
        let (cpu, vm) = (&mut guest.cpu, &guest.vm);
        std::thread::scope(|scope| {
            let running = scope.spawn(|| cpu.vcpu_run().unwrap());
            std::thread::sleep(Duration::from_millis(5));
            vm.set_irq_line(5, true).unwrap();
            vm.set_irq_line(5, false).unwrap();
            assert!(matches!(
                running.join().unwrap(),
                Exit::IoOut { port: 0x99, .. }
            ));
        });
    }
    // A line that rose while interrupts were off ends the first halt.
    let code = [&pic(0xdf), &[0xe6, 0x98, 0xe6, 0x98][..], &SLEEPER].concat();
    let mut early = Guest::new(&code, Irqchip::Full);
    early.handler(0x25);
    early.expect_out(0x98, &[0xdf]);
    early.vm.set_irq_line(5, true).unwrap();
    early.expect_out(0x98, &[0xdf]);
    early.expect_out(0x99, &[0x25]);
    let unknown = guest.vm.set_irq_line(24, true);
    assert_eq!(unknown, Err(Error::NotFound(Field::Gsi, 24)));
    let (_host, without) = vm_with(Irqchip::Split, 1);
    assert!(matches!(
        without.set_irq_line(5, true),
        Err(Error::NotOffered(_))
    ));
}

#[test]
fn the_timer_of_the_platform_wakes_a_guest_at_its_ticks_without_waiting() {
    // Timer 0, rate generator, 0xffff ticks; then sleep.
    let mut code = pic(0xfe);
    for (port, value) in [(0x43, 0x34), (0x40, 0xff), (0x40, 0xff)] {
        code.extend([0xb0, value, 0xe6, port]);
    }
    code.extend(SLEEPER);
    let run = || {
        let mut guest = Guest::new(&code, Irqchip::Full);
        guest.handler(0x20);
        let handler = [0xb0, 0x20, 0xe6, 0x99, 0xe6, 0x20, 0xcf];
        guest.write(0x3000, &handler);
        let mut tsc = [Msr::read(0x10)];
        let ticks: Vec<u64> = (0..100)
            .map(|_| {
                guest.expect_out(0x99, &[0x20]);
                guest.cpu.msrs(&mut tsc).unwrap();
                tsc[0].value
            })
            .collect();
        (ticks, guest.host.instructions())
    };
    let (ticks, instructions) = run();
    for pair in ticks.windows(2) {
        // 65535 / 1.193182 MHz in ticks of 1 ns, and some instructions.
        let period = pair[1] - pair[0];
        assert!((54_924_000..54_925_500).contains(&period), "{period}");
    }
    assert_eq!(run(), (ticks, instructions), "the same each time");
}

/// tsc_msrs_test of the kernel: the guest's writes change both MSRs, the host's each alone.
#[test]
fn a_time_stamp_counter_that_the_host_sets_keeps_the_guests_adjustment() {
    const STEP: u64 = 1 << 40;
    // mov ecx, 0x10; mov edx, 1 << 8; xor eax, eax; wrmsr; out 0x98, al; then TSC_ADJUST is 0; out 0x99, al.
    let code = [
        0x66, 0xb9, 0x10, 0, 0, 0, 0x66, 0xba, 0, 1, 0, 0, 0x66, 0x31, 0xc0, 0x0f, 0x30, 0xe6,
        0x98, 0x66, 0x31, 0xd2, 0xb1, 0x3b, 0x0f, 0x30, 0xe6, 0x99, 0xf4,
    ];
    let mut guest = Guest::new(&code, Irqchip::None);
    let expect = |guest: &Guest, tsc: u64, adjust: u64| {
        let mut msrs = [Msr::read(0x10), Msr::read(0x3b)];
        guest.cpu.msrs(&mut msrs).unwrap();
        let near = |value: u64, wanted: u64| value.wrapping_sub(wanted) < STEP / 2;
        // What the guest adds to reach a value is a little less than that.
        let reached = [
            near(msrs[0].value, tsc),
            near(msrs[1].value + STEP / 4, adjust),
        ];
        assert_eq!(reached, [true; 2], "{msrs:x?}");
    };
    guest.expect_out(0x98, &[0]);
    expect(&guest, STEP, STEP);
    guest.cpu.set_msrs(&[Msr::write(0x10, 5 * STEP)]).unwrap();
    expect(&guest, 5 * STEP, STEP);
    guest.cpu.set_msrs(&[Msr::write(0x3b, 9 * STEP)]).unwrap();
    expect(&guest, 5 * STEP, 9 * STEP);
    guest.cpu.set_msrs(&[Msr::write(0x3b, STEP)]).unwrap();
    guest.expect_out(0x99, &[0]);
    expect(&guest, 4 * STEP, 0);
}

#[test]
fn interrupts_reach_an_apic_that_the_guest_enabled() {
    for irqchip in [Irqchip::Full, Irqchip::Split] {
        let code = [&[0xe6, 0x98][..], &SLEEPER].concat();
        let mut guest = Guest::new(&code, irqchip);
        guest.handler(0x41);
        guest.expect_out(0x98, &[0]);
        // x2APIC mode, for its MSRs; SVR enabled.
        let x2 = 0xfee0_0d00;
        let enable = [Msr::write(0x1b, x2), Msr::write(0x80f, 0x1ff)];
        guest.cpu.set_msrs(&enable).unwrap();
        guest.vm.deliver_interrupt(VcpuId(0), 0x41).unwrap();
        guest.expect_out(0x99, &[0x41]);
        let absent = guest.vm.deliver_interrupt(VcpuId(1), 0x41);
        assert_eq!(absent, Err(Error::NotFound(Field::Vcpu, 1)));
    }
}

#[test]
fn messages_routed_lines_and_events_of_devices_reach_the_local_apic() {
    let code = [&[0xe6, 0x98][..], &SLEEPER].concat();
    let mut guest = Guest::new(&code, Irqchip::Full);
    guest.handler(0x41);
    guest.expect_out(0x98, &[0]);
    // x2APIC mode; SVR enabled.
    let enable = [Msr::write(0x1b, 0xfee0_0d00), Msr::write(0x80f, 0x1ff)];
    guest.cpu.set_msrs(&enable).unwrap();
    let port = guest.vm.devices().unwrap();
    let msi = Msi::to(VcpuId(0), 0x41);
    assert_eq!(port.signal_msi(msi), Ok(true));
    assert_eq!(port.signal_msi(Msi::to(VcpuId(3), 0x41)), Ok(false));
    let bad = Msi { address: 0, ..msi };
    assert_eq!(port.signal_msi(bad), Err(Error::Invalid(Field::Msi, 0)));
    let unknown = Error::NotFound(Field::Gsi, 40);
    assert_eq!(port.irq_event(40).err(), Some(unknown));
    port.set_gsi_route(40, msi).unwrap();
    let event = port.irq_event(40).unwrap();
    guest.expect_out(0x99, &[0x41]);
    // The handler ends no interrupt, so each one after it waits until the test does.
    let end = [Msr::write(0x80b, 0)];
    guest.cpu.set_msrs(&end).unwrap();
    for raise in [true, false] {
        let port = guest.vm.devices().unwrap();
        match raise {
            true => port.set_irq_line(40, true).unwrap(),
            false => {
                port.set_irq_line(40, true).unwrap();
                port.set_irq_line(40, false).unwrap();
                event.signal().unwrap();
            }
        }
        guest.expect_out(0x99, &[0x41]);
        guest.cpu.set_msrs(&end).unwrap();
    }
    let kick = guest.cpu.kick_handle();
    kick.kick();
    guest.expect(Exit::Interrupted);
    let Guest { cpu, vm, .. } = guest;
    drop((cpu, vm));
    assert_eq!(event.signal(), Ok(()), "the VM is gone");
    for (irqchip, tech, has_pins) in [
        (Irqchip::Split, Tech::Vmx, false),
        (Irqchip::Full, Tech::Sev, true),
    ] {
        let vendor = tech.vendor().unwrap();
        let mut params = VmParams::new(1);
        params.irqchip = irqchip;
        if let Ok(vm) = SimHost::new(vendor).create_vm(tech, &params) {
            assert_eq!(vm.devices().is_some(), has_pins);
        }
    }
}

#[test]
fn hypercalls_of_the_vendor_leave_and_those_of_the_other_are_undefined() {
    const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
    const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
    for (vendor, own, other) in [
        (Vendor::Intel, VMCALL, VMMCALL),
        (Vendor::Amd, VMMCALL, VMCALL),
    ] {
        let ram = Ram::new(16 * 4096);
        let host = SimHost::new(vendor);
        let vm = host
            .create_vm(Tech::normal(vendor), &VmParams::new(1))
            .unwrap();
        vm.set_memory_slot(&ram.slot(0, 0)).unwrap();
        let mut cpu = vm.create_vcpu(VcpuId(0)).unwrap();
        real_mode(&mut cpu);
        let guest = Guest { cpu, vm, host, ram };
        let mut guest = guest;
        guest.handler(6);
        guest.write(CODE, &[&own[..], &other].concat());
        let regs = Regs {
            rax: 7,
            rbx: 1,
            rcx: 2,
            rdx: 3,
            rsi: 4,
            ..guest.cpu.regs().unwrap()
        };
        guest.cpu.set_regs(&regs).unwrap();
        guest.expect(Exit::Hypercall {
            nr: 7,
            args: [1, 2, 3, 4, 0, 0],
        });
        guest.cpu.answer(Answer::Value(99)).unwrap();
        guest.expect_out(0x99, &[6]);
        assert_eq!(guest.cpu.regs().unwrap().rip, 0x3002);
    }
}

#[test]
fn cpuid_answers_what_the_embedder_set() {
    // xor eax, eax; cpuid; hlt
    let mut guest = Guest::new(&[0x66, 0x31, 0xc0, 0x0f, 0xa2, 0xf4], Irqchip::None);
    let leaf = CpuidEntry {
        leaf: 0,
        regs: [0, 0x1111, 0x2222, 0x3333],
        ..CpuidEntry::default()
    };
    guest.cpu.set_cpuid(&[leaf]).unwrap();
    guest.expect(Exit::Hlt);
    let regs = guest.cpu.regs().unwrap();
    assert_eq!((regs.rbx, regs.rcx, regs.rdx), (0x1111, 0x2222, 0x3333));
}

#[test]
fn state_that_no_such_processor_can_hold_is_refused_by_name() {
    let mut guest = Guest::new(&[0xf4], Irqchip::None);
    let cpu = &mut guest.cpu;
    let before = cpu.sregs().unwrap();
    let mut refused = |change: &dyn Fn(&mut Sregs)| {
        let mut sregs = before;
        change(&mut sregs);
        cpu.set_sregs(&sregs).unwrap_err()
    };
    for cr0 in [1 << 31, 1 << 29, 1 << 32] {
        let error = refused(&|sregs| sregs.cr0 = cr0);
        assert_eq!(error, Error::Invalid(Field::Cr0, cr0));
    }
    // VMXE, SMXE and what no processor has.
    for cr4 in [1 << 13, 1 << 14, 1 << 15, 1 << 63] {
        let error = refused(&|sregs| sregs.cr4 = cr4);
        assert_eq!(error, Error::Invalid(Field::Cr4, cr4));
    }
    let error = refused(&|sregs| {
        (sregs.efer, sregs.cr0, sregs.cr4) = (1 << 8, 1 << 31 | 0x11, 0x10);
    });
    assert_eq!(error, Error::Invalid(Field::Cr4, 0x10));
    let error = refused(&|sregs| sregs.efer = 2);
    assert_eq!(error, Error::Invalid(Field::Msr, 0xc000_0080));
    assert_eq!(cpu.sregs(), Ok(before), "nothing was written");

    let mut xsave = cpu.xsave().unwrap();
    xsave.as_bytes_mut()[160..176].fill(0xa5);
    xsave.as_bytes_mut()[512] = 0b11;
    cpu.set_xsave(&xsave).unwrap();
    assert_eq!(cpu.xsave().unwrap().as_bytes()[160..176], [0xa5; 16]);
    let short = Xsave::new(Xsave::initial().as_bytes()[..576].into()).unwrap();
    cpu.set_xsave(&short).unwrap();
    xsave.as_bytes_mut()[519] = 0x40;
    let components = Err(Error::Invalid(Field::Xstate, 0x4000_0000_0000_0003));
    assert_eq!(cpu.set_xsave(&xsave), components);
    assert_eq!(cpu.set_xcrs(&Xcrs { xcr0: 7 }), Ok(()));
    let missing = Err(Error::Invalid(Field::Xcr0, 15));
    assert_eq!(cpu.set_xcrs(&Xcrs { xcr0: 15 }), missing);
    let armed = DebugRegs {
        dr7: 0x402,
        ..DebugRegs::default()
    };
    assert_eq!(cpu.set_debug_regs(&armed), Ok(()));
    let wide = 1 << 32 | 0x400;
    let reserved = DebugRegs { dr7: wide, ..armed };
    let refused = Err(Error::Invalid(Field::Dr7, wide));
    assert_eq!(cpu.set_debug_regs(&reserved), refused);
    for vector in [2, 32, 255] {
        let events = Events {
            exception: Some(Exception::new(vector, None)),
            ..Events::default()
        };
        let refused = Err(Error::Invalid(Field::Vector, vector.into()));
        assert_eq!(cpu.set_events(&events), refused);
    }
}

#[test]
fn a_reset_starts_over_and_other_processors_wait_for_their_start() {
    let mut guest = Guest::with(&[0xf4], Irqchip::Full, 2);
    let fresh = guest.vm.create_vcpu(VcpuId(1)).unwrap();
    assert_eq!(fresh.mp_state(), Ok(MpState::Uninitialized));
    let msrs = [Msr::write(0xc000_0082, 0x1234)];
    guest.cpu.set_msrs(&msrs).unwrap();
    let read = |cpu: &SimVcpu| {
        let mut msr = [Msr::read(0xc000_0082)];
        cpu.msrs(&mut msr).unwrap();
        msr[0].value
    };
    guest.cpu.vcpu_reset(true).unwrap();
    assert_eq!(guest.cpu.regs().unwrap().rip, 0xfff0);
    assert_eq!(
        (read(&guest.cpu), guest.cpu.mp_state()),
        (0x1234, Ok(MpState::Runnable))
    );
    guest.cpu.vcpu_reset(false).unwrap();
    assert_eq!(read(&guest.cpu), 0);
    for state in [MpState::Halted, MpState::InitReceived, MpState::Runnable] {
        guest.cpu.set_mp_state(state).unwrap();
        assert_eq!(guest.cpu.mp_state(), Ok(state));
    }
}

#[test]
fn a_closed_vm_runs_nothing_and_reaches_no_memory() {
    let Guest {
        mut cpu, vm, ram, ..
    } = Guest::new(&[0xe4, 0x10, 0xf4], Irqchip::None);
    assert!(matches!(cpu.vcpu_run(), Ok(Exit::IoIn { .. })));
    drop(vm);
    drop(ram);
    assert!(matches!(cpu.vcpu_run(), Err(Error::WrongState(_))));
    cpu.set_regs(&Regs::default()).unwrap();
}

#[test]
fn a_debugged_guest_leaves_at_int3_at_breakpoints_and_behind_each_step() {
    // nop; int3; nop; hlt
    let code = [0x90, 0xcc, 0x90, 0xf4];
    let mut guest = Guest::new(&code, Irqchip::None);
    let at = |offset: u64, exception| Exit::Debug {
        rip: CODE as u64 + offset,
        exception,
    };
    let mut debug = GuestDebug {
        enabled: true,
        single_step: true,
        hardware: None,
    };
    guest.cpu.set_guest_debug(debug).unwrap();
    assert_eq!(guest.cpu.vcpu_run(), Ok(at(1, 1)));
    let words = [0xffff_4ff0_u64, 0x400].map(u64::to_le_bytes).concat();
    assert_eq!(guest.cpu.exit_data(), words, "DR6 and DR7");
    assert_eq!(guest.cpu.vcpu_run(), Ok(at(1, 3)));

    let mut regs = guest.cpu.regs().unwrap();
    regs.rip += 1;
    guest.cpu.set_regs(&regs).unwrap();
    let third = CODE as u64 + 3;
    debug = GuestDebug {
        single_step: false,
        hardware: Some([0, third, 0, 0, 0x408]),
        ..debug
    };
    guest.cpu.set_guest_debug(debug).unwrap();
    assert_eq!(guest.cpu.vcpu_run(), Ok(at(3, 1)));
    let own = guest.cpu.debug_regs().unwrap();
    assert_eq!(own, DebugRegs::default(), "the guest's are its own");
    guest.cpu.set_guest_debug(GuestDebug::default()).unwrap();
    assert_eq!(guest.cpu.vcpu_run(), Ok(Exit::Hlt));
}
