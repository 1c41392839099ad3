//! Machine code on vCPUs that execute at the same time, each on its thread (`SimHostBuilder::parallel`).

#[allow(dead_code)] // Each test file uses its part.
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::Ram;
use kvm_ops_core::{
    EncParams, Exit, Gpa, Host, Irqchip, Kick, Regs, Segment, SharedMemory, Tech, VcpuId, VcpuOps,
    Vendor, VmParams, VmPort,
};
use kvm_ops_sim::{SimHost, SimVcpu, SimVm};

const CODE: usize = 0x1000;
/// Where the tests' data begins.
const DATA: usize = 0x2000;
/// The vCPUs of a test.
const VCPUS: u32 = 4;

fn host(vendor: Vendor) -> SimHost {
    SimHost::builder(vendor).parallel(true).build_lazy()
}

/// A VM with memory from address 0.
struct Guest {
    vm: SimVm,
    ram: Ram,
    irqchip: Irqchip,
    _host: SimHost,
}

impl Guest {
    fn new(code: &[u8], irqchip: Irqchip) -> Self {
        let ram = Ram::new(16 * 4096);
        let host = host(Vendor::Intel);
        let params = VmParams {
            vcpus: VCPUS,
            irqchip,
            enc: EncParams::Default,
        };
        let vm = host.create_vm(Tech::Vmx, &params).unwrap();
        vm.set_memory_slot(&ram.slot(0, 0)).unwrap();
        let guest = Self {
            vm,
            ram,
            irqchip,
            _host: host,
        };
        guest.write(CODE, code);
        guest
    }

    /// Writes memory. No vCPU runs yet.
    fn write(&self, at: usize, bytes: &[u8]) {
        self.vm.write_slot(Gpa::new(at as u64), bytes).unwrap();
    }

    fn word(&self, at: usize) -> u16 {
        let bytes = self.ram.read(at, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// The vCPUs, in real mode at `CODE` if they start by themselves, each with a stack, and its number in DX.
    fn vcpus(&self) -> Vec<SimVcpu> {
        let vcpu = |id| {
            let mut vcpu = self.vm.create_vcpu(VcpuId(id)).unwrap();
            if id == 0 || self.irqchip == Irqchip::None {
                real_mode(&mut vcpu, id);
            }
            vcpu
        };
        (0..VCPUS).map(vcpu).collect()
    }
}

fn real_mode(vcpu: &mut SimVcpu, id: u32) {
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
    // For the memory that a test replaces.
    sregs.fs = Segment {
        base: OTHER as u64,
        selector: (OTHER >> 4) as u16,
        ..data
    };
    vcpu.set_sregs(&sregs).unwrap();
    let regs = Regs {
        rip: CODE as u64,
        rsp: 0x0ff0 - u64::from(id) * 0x100,
        rdx: id.into(),
        rflags: 2,
        ..Regs::default()
    };
    vcpu.set_regs(&regs).unwrap();
}

/// A slot beside the one from address 0.
const OTHER: usize = 0x2_0000;

/// Runs each vCPU on a thread until it halts.
fn run_to_halt(vcpus: Vec<SimVcpu>) {
    std::thread::scope(|scope| {
        for mut vcpu in vcpus {
            scope.spawn(move || assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt));
        }
    });
}

#[test]
fn locked_instructions_of_all_vcpus_add_up() {
    const ROUNDS: u16 = 10_000;
    let [low, high] = ROUNDS.to_le_bytes();
    let code = [
        // mov cx, ROUNDS; lock inc word [0x2000]; lock add word [0x2fff], 1; loop -13; hlt
        &[0xb9, low, high][..],
        &[0xf0, 0xff, 0x06, 0x00, 0x20],
        &[0xf0, 0x83, 0x06, 0xff, 0x2f, 0x01],
        &[0xe2, 0xf3, 0xf4],
    ]
    .concat();
    let guest = Guest::new(&code, Irqchip::None);
    run_to_halt(guest.vcpus());
    let sum = u32::from(ROUNDS) * VCPUS;
    // The second one is across two pages.
    assert_eq!(u32::from(guest.word(DATA)), sum);
    assert_eq!(u32::from(guest.word(DATA + 0xfff)), sum);
}

#[test]
fn the_time_stamp_counter_never_goes_back_from_one_vcpu_to_another() {
    // Under a lock by XCHG at 0x2000: RDTSC, less than the last one at 0x2010? Then it counts at 0x2008.
    let code = [
        &[0xb9, 0xd0, 0x07][..],
        &[0xb0, 0x01, 0x86, 0x06, 0x00, 0x20, 0x84, 0xc0, 0x75, 0xf6],
        &[0x0f, 0x31, 0x66, 0x89, 0xc3, 0x66, 0x89, 0xd5],
        &[
            0x66, 0x2b, 0x06, 0x10, 0x20, 0x66, 0x1b, 0x16, 0x14, 0x20, 0x73, 0x04,
        ],
        &[0xff, 0x06, 0x08, 0x20],
        &[0x66, 0x89, 0x1e, 0x10, 0x20, 0x66, 0x89, 0x2e, 0x14, 0x20],
        &[0xff, 0x06, 0x18, 0x20],
        &[0xc6, 0x06, 0x00, 0x20, 0x00, 0xe2, 0xc9, 0xf4],
    ]
    .concat();
    let guest = Guest::new(&code, Irqchip::None);
    run_to_halt(guest.vcpus());
    assert_eq!(
        u32::from(guest.word(DATA + 0x18)),
        2000 * VCPUS,
        "rounds under the lock"
    );
    assert_eq!(guest.word(DATA + 8), 0, "times before the last one");
    assert_ne!(guest.ram.read(DATA + 0x10, 8), [0; 8]);
}

/// WRMSR.
fn wrmsr(msr: u32, value: u64) -> Vec<u8> {
    let (low, high) = (value as u32, (value >> 32) as u32);
    [
        &[0x66, 0xb9][..],
        &msr.to_le_bytes(),
        &[0x66, 0xb8],
        &low.to_le_bytes(),
        &[0x66, 0xba],
        &high.to_le_bytes(),
        &[0x0f, 0x30],
    ]
    .concat()
}

#[test]
fn interrupts_of_one_vcpu_start_and_wake_the_others_and_a_kick_ends_their_sleep() {
    const ROUNDS: u16 = 300;
    const OTHERS: u8 = VCPUS as u8 - 1;
    let last = ROUNDS * u16::from(OTHERS);
    let x2apic = |base: u64| [wrmsr(0x1b, base), wrmsr(0x80f, 0x1ff)].concat();
    // x2APIC; INIT and a start-up interrupt to the others, until they are ready; then a round: vector 0x40 to the
    // others, and a wait until each has counted. At last OUT.
    let [low, high] = last.to_le_bytes();
    let boot = [
        x2apic(0xfee0_0d00),
        wrmsr(0x830, 0xc_4500),
        wrmsr(0x830, 0xc_4603),
        // xor bx, bx; pause; cmp word [0x2002], OTHERS; jne -9
        vec![
            0x31, 0xdb, 0xf3, 0x90, 0x83, 0x3e, 0x02, 0x20, OTHERS, 0x75, 0xf7,
        ],
        // add bx, OTHERS
        vec![0x83, 0xc3, OTHERS],
        wrmsr(0x830, 0xc_4040),
        // pause; cmp bx, [0x2000]; jne -8; cmp bx, last; jne -37; out 0x99, al
        vec![0xf3, 0x90, 0x3b, 0x1e, 0x00, 0x20, 0x75, 0xf8],
        vec![0x81, 0xfb, low, high, 0x75, 0xdb, 0xe6, 0x99],
    ]
    .concat();
    let guest = Guest::new(&boot, Irqchip::Split);
    // x2APIC; a stack by its number; lock inc word [0x2002]; sti; hlt; jmp -4
    let other = [
        x2apic(0xfee0_0c00),
        vec![0x66, 0xb9, 0x02, 0x08, 0, 0, 0x0f, 0x32, 0xc1, 0xe0, 0x08],
        vec![0x05, 0x00, 0x40, 0x31, 0xdb, 0x8e, 0xd3, 0x89, 0xc4],
        vec![0xf0, 0xff, 0x06, 0x02, 0x20, 0xfb, 0xf4, 0xeb, 0xfc],
    ]
    .concat();
    guest.write(0x3000, &other);
    // lock inc word [0x2000]; end of interrupt; iret
    let handler = [
        vec![0xf0, 0xff, 0x06, 0x00, 0x20],
        wrmsr(0x80b, 0),
        vec![0xcf],
    ]
    .concat();
    guest.write(0x3800, &handler);
    guest.write(0x40 * 4, &[0x00, 0x38, 0x00, 0x00]);
    let mut vcpus = guest.vcpus();
    let mut boots = vcpus.remove(0);
    let kicks: Vec<_> = vcpus.iter().map(VcpuOps::kick_handle).collect();
    std::thread::scope(|scope| {
        for mut vcpu in vcpus {
            scope.spawn(move || assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted));
        }
        let left = boots.vcpu_run().unwrap();
        assert!(matches!(left, Exit::IoOut { port: 0x99, .. }), "{left:?}");
        kicks.iter().for_each(|kick| kick.kick());
    });
    assert_eq!(guest.word(DATA), last);
}

/// Ends the runs of vCPUs, whatever becomes of the work beside them.
struct End<'a> {
    ended: &'a AtomicBool,
    kicks: Vec<Arc<dyn Kick>>,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        self.kicks.iter().for_each(|kick| kick.kick());
    }
}

/// All vCPUs count in the slot at [`OTHER`], each at its own place, while the work goes on, for which there are two
/// pages to put there. Where the slot is missing, the vCPUs leave for MMIO.
fn while_all_count(work: impl FnOnce(&Guest, &[Ram; 2])) {
    // shl dx, 7; mov bx, dx; inc word fs:[bx]; lock inc word fs:[bx + 64]; jmp -9
    let code = [
        0xc1, 0xe2, 0x07, 0x89, 0xd3, 0x64, 0xff, 0x07, 0xf0, 0x64, 0xff, 0x47, 0x40, 0xeb, 0xf6,
    ];
    // Dropped after the VM.
    let rams = [Ram::new(4096), Ram::new(4096)];
    let guest = Guest::new(&code, Irqchip::None);
    let vcpus = guest.vcpus();
    let kicks = vcpus.iter().map(VcpuOps::kick_handle).collect();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for mut vcpu in vcpus {
            let ended = &ended;
            scope.spawn(move || {
                while !ended.load(Ordering::Acquire) {
                    match vcpu.vcpu_run().unwrap() {
                        Exit::MmioRead { .. } => vcpu.exit_data().fill(0),
                        Exit::MmioWrite { .. } | Exit::Interrupted => {}
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
        let _end = End {
            ended: &ended,
            kicks,
        };
        work(&guest, &rams);
    });
}

/// Waits until all vCPUs count in memory: what a count was before is another one.
fn wait_for_counts(ram: &Ram) {
    for vcpu in 0..VCPUS as usize {
        for place in [0, 64] {
            let at = vcpu * 128 + place;
            let before = ram.read(at, 2);
            while ram.read(at, 2) == before {
                std::thread::yield_now();
            }
        }
    }
}

#[test]
fn a_slot_that_is_deleted_is_not_written_any_more_while_all_vcpus_run() {
    const ROUNDS: usize = 60;
    while_all_count(|guest, rams| {
        for round in 0..ROUNDS {
            let ram = &rams[round % 2];
            guest
                .vm
                .set_memory_slot(&ram.slot(1, OTHER as u64))
                .unwrap();
            wait_for_counts(ram);
            guest
                .vm
                .delete_memory_slot(&ram.slot(1, OTHER as u64))
                .unwrap();
            let at_the_end = ram.read(0, 4096);
            std::thread::sleep(Duration::from_micros(300));
            assert!(ram.read(0, 4096) == at_the_end, "round {round}");
        }
    });
}

#[test]
fn a_dirty_log_misses_no_store_while_all_vcpus_run() {
    const ROUNDS: usize = 60;
    while_all_count(|guest, [ram, _]| {
        let mut slot = ram.slot(1, OTHER as u64);
        slot.flags.log_dirty = true;
        guest.vm.set_memory_slot(&slot).unwrap();
        wait_for_counts(ram);
        let mut bitmap = vec![0; slot.dirty_words()];
        for _ in 0..ROUNDS {
            guest.vm.dirty_log(&slot, &mut bitmap).unwrap();
            wait_for_counts(ram);
            guest.vm.dirty_log(&slot, &mut bitmap).unwrap();
            assert_eq!(bitmap, [1]);
        }
    });
}

#[test]
fn memory_that_goes_and_comes_is_missing_for_whoever_looks() {
    while_all_count(|guest, [ram, _]| {
        for _ in 0..30 {
            guest
                .vm
                .set_memory_slot(&ram.slot(1, OTHER as u64))
                .unwrap();
            wait_for_counts(ram);
            // The flags of a slot change while it is in use.
            let mut slot = ram.slot(1, OTHER as u64);
            slot.flags.read_only = true;
            guest.vm.set_memory_slot(&slot).unwrap();
            let before = ram.read(0, 4096);
            std::thread::sleep(Duration::from_micros(300));
            assert!(ram.read(0, 4096) == before);
            guest.vm.delete_memory_slot(&slot).unwrap();
        }
    });
}

#[test]
fn a_kick_ends_a_run_that_never_leaves() {
    // jmp $
    let guest = Guest::new(&[0xeb, 0xfe], Irqchip::None);
    let vcpus = guest.vcpus();
    let kicks: Vec<_> = vcpus.iter().map(VcpuOps::kick_handle).collect();
    std::thread::scope(|scope| {
        for mut vcpu in vcpus {
            scope.spawn(move || {
                for _ in 0..20 {
                    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted);
                }
            });
        }
        for _ in 0..400 {
            kicks.iter().for_each(|kick| kick.kick());
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn a_locked_access_to_a_device_is_a_read_and_a_write() {
    // xor bx, bx; lock inc word fs:[bx]; hlt
    let guest = Guest::new(&[0x31, 0xdb, 0xf0, 0x64, 0xff, 0x07, 0xf4], Irqchip::None);
    let mut vcpu = guest.vcpus().remove(0);
    let gpa = Gpa::new(OTHER as u64);
    let read = vcpu.vcpu_run().unwrap();
    assert_eq!(read, Exit::MmioRead { gpa, len: 2 });
    vcpu.exit_data().copy_from_slice(&0x41ffu16.to_le_bytes());
    let written = vcpu.vcpu_run().unwrap();
    assert_eq!(written, Exit::MmioWrite { gpa, len: 2 });
    assert_eq!(*vcpu.exit_data(), 0x4200u16.to_le_bytes());
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
}
