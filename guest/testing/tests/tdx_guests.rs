//! Guests with handlers, several vCPUs, other widths, and any registers.

use kvm_ops_guest::tdx::{Gpaw, TdGuest, VeKind, Vmcall, Width};
use kvm_ops_guest::{Flush, GpaRange, PageSize};
use kvm_ops_guest_test::tdx::{
    Exception, Exit, Fault, Handled, Hypervisor, Instruction, Reply, TestTd, Vcpu, hosts,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

const SHARED: u64 = 1 << 47;
const PAGE: u64 = 0x1000;
const LARGE: u64 = 2 << 20;

fn range(start: u64, bytes: u64) -> GpaRange {
    GpaRange::new(start, bytes).expect("a range")
}

fn kernel(cpu: &mut Vcpu) -> TdGuest<&mut Vcpu> {
    TdGuest::new(cpu).expect("TDG.VP.INFO")
}

fn no_flush(_: Flush) {}

/// A kernel's #VE handler: accepts at first touch, and emulates with the host's help.
fn on_ve(cpu: &mut Vcpu, exception: &Exception) -> Handled {
    let mut td = kernel(cpu);
    let gpaw = td.gpaw();
    let Ok(Some(info)) = td.ve_info() else {
        return Handled::No;
    };
    let answer = match (info.kind(gpaw), exception.access) {
        (VeKind::NotAccepted { gpa }, _) => {
            td.accept(range(gpa & !(PAGE - 1), PAGE)).expect("accepted");
            return Handled::Again;
        }
        (VeKind::Device { gpa }, Some(access)) => {
            let width = Width::from_bytes(access.len as u64).expect("a width");
            match access.is_write {
                true => td.mmio_write(gpa, width, access.data).map(|()| [0; 4]),
                false => td.mmio_read(gpa, width).map(|value| [value, 0, 0, 0]),
            }
        }
        (VeKind::Instruction(12), _) => td.vmcall(Vmcall::Halt {
            interrupts_blocked: false,
        }),
        (VeKind::Instruction(30), _) => {
            let width = Width::from_bytes((info.qualification & 7) + 1).expect("a width");
            td.io_read((info.qualification >> 16) as u16, width)
                .map(|value| [value, 0, 0, 0])
        }
        _ => return Handled::No,
    };
    answer.map_or(Handled::No, Handled::Emulated)
}

#[test]
fn a_handler_of_ve_completes_accesses_and_instructions() {
    let devices = |host: &Hypervisor<'_>, exit: &Exit| match exit {
        Exit::Vmcall(Vmcall::MmioRead { .. }) => Reply::value(0x1122_3344_5566_7788),
        Exit::Vmcall(Vmcall::In { port, .. }) => Reply::value(u64::from(*port) + 1),
        exit => host.honestly(exit),
    };
    let td = TestTd::builder()
        .attributes(0)
        .pending(0x8000..0xa000)
        .host(devices)
        .build()
        .expect("a td");
    let device = SHARED | 0xFEC0_0000;
    td.run(|cpu| {
        cpu.set_handler(on_ve);
        cpu.write(0x8ffc, b"across!!")
            .expect("accepted by the handler");
        assert_eq!(cpu.read(0x8ffc, 8).expect("ours"), b"across!!");
        assert_eq!(
            cpu.read(device, 4).expect("emulated"),
            0x5566_7788_u32.to_le_bytes()
        );
        cpu.write(device + 8, &[1, 2]).expect("emulated");
        assert_eq!(cpu.instruction(Instruction::Hlt), Ok([0; 4]));
        let read = Instruction::In {
            port: 0x3f8,
            width: Width::Two,
        };
        assert_eq!(cpu.instruction(read), Ok([0x3f9, 0, 0, 0]));
        let Err(Fault::Exception(exception)) = cpu.instruction(Instruction::Wbinvd) else {
            panic!("this kernel does not know WBINVD");
        };
        assert!(exception.is_ve());
    })
    .expect("runs to its end");
    let wrote = Exit::Vmcall(Vmcall::MmioWrite {
        gpa: 0xFEC0_0008,
        width: Width::Two,
        value: 0x201,
    });
    assert!(td.take_exits().contains(&(0, wrote)));
}

#[test]
fn the_module_answers_cpuid_and_the_guest_sees_no_ve() {
    let td = TestTd::builder().build().expect("a td");
    let cpuid = Instruction::Cpuid {
        leaf: 0x21,
        subleaf: 0,
    };
    let read = td.run(|cpu| cpu.instruction(cpuid)).expect("ends");
    let [_, ebx, ecx, edx] = read.expect("the module answers");
    let name: Vec<u8> = [ebx, edx, ecx]
        .iter()
        .flat_map(|register| (*register as u32).to_le_bytes())
        .collect();
    assert_eq!(name, b"IntelTDX    ");
    let none = Instruction::In {
        port: 0,
        width: Width::Eight,
    };
    let fault = td.run(|cpu| cpu.instruction(none)).expect("ends");
    assert_eq!(fault.expect_err("no such instruction").to_string(), "#UD");
}

#[test]
fn fifty_two_bits_have_another_shared_bit() {
    let td = TestTd::builder()
        .gpaw(Gpaw::Bits52)
        .accepted(0x8000..0x9000)
        .shared(0x9000..0xa000)
        .build()
        .expect("a td");
    td.run(|cpu| {
        assert_eq!(kernel(cpu).gpaw(), Gpaw::Bits52);
        cpu.write(1 << 51 | 0x9000, b"public").expect("shared");
        cpu.write(0x8000, b"ours").expect("accepted");
        kernel(cpu)
            .share(range(0x8000, PAGE), no_flush)
            .expect("shared");
    })
    .expect("runs to its end");
    assert_eq!(td.hypervisor().read(0x9000, 6).expect("ram"), b"public");
}

#[test]
fn measured_contents_are_there_and_in_mrtd() {
    let launch = |contents: &[u8]| {
        let td = TestTd::builder().measured(0x8000, contents);
        td.build().expect("a td")
    };
    let td = launch(b"kernel");
    let read = td.run(|cpu| cpu.read(0x8000, 8)).expect("ends");
    assert_eq!(read.expect("accepted"), b"kernel\0\0");
    assert_eq!(td.mrtd(), launch(b"kernel").mrtd());
    assert_ne!(td.mrtd(), launch(b"kernal").mrtd());
}

#[test]
fn vcpus_convert_their_memory_at_the_same_time() {
    const VCPUS: usize = 4;
    let td = TestTd::builder().vcpus(VCPUS).build().expect("a td");
    let results = td.run_all(|cpu| {
        let start = LARGE * (1 + 2 * cpu.index() as u64);
        let (all, part) = (range(start, LARGE), range(start + 2 * PAGE, 3 * PAGE));
        kernel(cpu).accept(all).expect("accepted");
        for round in 0..4_u8 {
            cpu.write(start, &[round; 16]).expect("ours");
            kernel(cpu).share(part, no_flush).expect("shared");
            cpu.write(SHARED | part.start(), &[round; 16])
                .expect("shared");
            kernel(cpu).unshare(part, no_flush).expect("private");
            assert_eq!(cpu.read(start, 16).expect("ours"), [round; 16]);
            assert_eq!(cpu.read(part.start(), 16).expect("accepted"), [0; 16]);
        }
    });
    assert_eq!(results, vec![Ok(()); VCPUS]);
}

#[test]
fn a_page_is_taken_from_under_vcpus_that_use_it() {
    let td = TestTd::builder()
        .vcpus(3)
        .accepted(0x8000..0x9000)
        .build()
        .expect("a td");
    let results = td.run_all(|cpu| match cpu.index() {
        0 => {
            for _ in 0..20 {
                kernel(cpu)
                    .share(range(0x8000, PAGE), no_flush)
                    .expect("shared");
                kernel(cpu)
                    .unshare(range(0x8000, PAGE), no_flush)
                    .expect("private");
            }
            Ok(())
        }
        // Reads fail by name while the page is shared or pending, and never otherwise.
        _ => (0..200).try_for_each(|_| cpu.read(0x8000, 8).map(|bytes| assert_eq!(bytes, [0; 8]))),
    });
    for result in results {
        if let Err(fault) = result.expect("the code ends") {
            let said = fault.to_string();
            let named = said.contains("is shared") || said.contains("is pending");
            assert!(named, "{said}");
        }
    }
}

/// A step of a guest over eight pages.
#[derive(Clone, Copy, Debug)]
enum Step {
    Share(u64, u64),
    Unshare(u64, u64),
    Write(u64, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let pages = || (0u64..8).prop_flat_map(|first| (Just(first), 1..=8 - first));
    let step = prop_oneof![
        pages().prop_map(|(first, count)| Step::Share(first, count)),
        pages().prop_map(|(first, count)| Step::Unshare(first, count)),
        (0u64..8, any::<u8>()).prop_map(|(page, byte)| Step::Write(page, byte)),
    ];
    prop::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn memory_is_what_the_guest_made_of_it(
        steps in steps(),
        piece in 1u64..4,
        large in any::<bool>(),
    ) {
        // The last pages of a large page, so that honest hosts have to split it.
        let base = 2 * LARGE - 8 * PAGE;
        let td = TestTd::builder().host(hosts::partial_map_gpa(piece * PAGE));
        let td = match large {
            true => td.pending_large(LARGE..2 * LARGE),
            false => td.pending(base..2 * LARGE),
        };
        let td = td.build().expect("a td");
        let ran = td.run(|cpu| -> Result<(), TestCaseError> {
            let first = if large { range(LARGE, LARGE) } else { range(base, 8 * PAGE) };
            kernel(cpu).accept(first).expect("accepted");
            // Private pages by number, with their first byte.
            let mut private: BTreeMap<u64, u8> = (0..8).map(|page| (page, 0)).collect();
            for step in steps {
                match step {
                    Step::Share(first, count) => {
                        let pages = first..first + count;
                        let whole = pages.clone().all(|page| private.contains_key(&page));
                        if whole {
                            let range = range(base + first * PAGE, count * PAGE);
                            kernel(cpu).share(range, no_flush).expect("shared");
                            private.retain(|page, _| !pages.contains(page));
                        }
                    }
                    Step::Unshare(first, count) => {
                        let pages = first..first + count;
                        if pages.clone().all(|page| !private.contains_key(&page)) {
                            let range = range(base + first * PAGE, count * PAGE);
                            kernel(cpu).unshare(range, no_flush).expect("private");
                            private.extend(pages.map(|page| (page, 0)));
                        }
                    }
                    Step::Write(page, byte) => {
                        let at = base + page * PAGE;
                        if let Some(held) = private.get_mut(&page) {
                            cpu.write(at, &[byte]).expect("ours");
                            *held = byte;
                        } else {
                            cpu.write(SHARED | at, &[byte]).expect("shared");
                            let seen = td.hypervisor().read(at, 1).expect("ram");
                            prop_assert_eq!(seen, [byte]);
                        }
                    }
                }
                for page in 0..8 {
                    let at = base + page * PAGE;
                    prop_assert_eq!(td.hypervisor().is_shared(at), !private.contains_key(&page));
                    if let Some(byte) = private.get(&page) {
                        prop_assert_eq!(cpu.read(at, 1).expect("ours"), [*byte]);
                    }
                }
            }
            Ok(())
        });
        ran.expect("runs to its end")?;
    }

    #[test]
    fn no_registers_and_no_addresses_break_anything(
        calls in prop::collection::vec(
            (any::<[u64; 16]>(), 0u64..32, any::<bool>(), 0u64..0x20, any::<u64>()), 1..40),
        attributes in prop_oneof![Just(0), Just(1 << 28)],
    ) {
        let td = TestTd::builder()
            .attributes(attributes)
            .memory(0x20_0000)
            .accepted(0x8000..0xa000)
            .pending(0xa000..0xb000)
            .shared(0xb000..0xd000)
            .build()
            .expect("a td");
        let _stopped = td.run(|cpu| {
            for (mut registers, leaf, tame, page, at) in calls {
                if tame {
                    registers[0] = leaf;
                    registers[1] = page * PAGE;
                    registers[2] = page * PAGE + 0x400;
                    registers[10] = 0;
                    registers[11] = 0x10000 + (at & 7);
                    registers[12] = SHARED * (at >> 3 & 1) + page * PAGE;
                    registers[13] = (at >> 4 & 3) * PAGE;
                }
                if leaf == 0 {
                    registers[1] = 0xFC00;
                }
                let _ = cpu.tdcall_registers(&mut registers);
                let _ = cpu.read(at, 3);
                let _ = cpu.write(at | SHARED, &[1; 3]);
                let _ = cpu.read(page * PAGE + 0xffe, 4);
            }
        });
        // The host is whole, whatever the guest did.
        td.hypervisor().give(0x10_0000, PageSize::Size4K).expect("given");
    }
}
