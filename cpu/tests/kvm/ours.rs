//! A case on the processor of this crate.

use kvm_ops_cpu::{Cause, CodePages, Cpu, CpuidTable, Exit, Stopped};

use crate::cases::Case;
use crate::common::TestBus;
use crate::machine::{self, MEMORY, MSRS, Outcome, Stop};

/// More instructions than any case executes.
const BUDGET: u64 = 1000;

/// The features of this processor alone.
pub(crate) fn cpuid() -> CpuidTable {
    CpuidTable::intel()
}

pub(crate) fn run(case: &Case, cpuid: &CpuidTable) -> Outcome {
    let ram = machine::ram();
    machine::fill(&ram, case);
    let bus = Box::new(TestBus::new(&ram));
    let mut cpu = Cpu::new(bus, CodePages::new(MEMORY / 4096), cpuid.clone());
    cpu.set_registers(&machine::registers(case));
    for (index, value) in &case.msrs {
        cpu.write_msr(*index, *value)
            .expect("an MSR that both have");
    }
    let stop = match cpu.run(BUDGET) {
        Stopped::Halted => Stop::Halted,
        Stopped::Budget => Stop::Budget,
        Stopped::Exit(Exit {
            cause: Cause::TripleFault,
            ..
        }) => Stop::TripleFault,
        Stopped::Exit(Exit {
            cause: Cause::Io(access),
            ..
        }) => Stop::Port {
            port: access.port,
            bytes: access.size,
            write: !access.input,
        },
        other => panic!("{}: {other:?}", case.name),
    };
    let mut memory = vec![0; MEMORY];
    ram.read(0, &mut memory);
    Outcome {
        stop,
        registers: cpu.registers(),
        msrs: MSRS.map(|index| cpu.read_msr(index).unwrap_or_default()),
        memory,
    }
}
