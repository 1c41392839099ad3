//! The built-in guests: each as machine code for a processor and as a guest program for a software
//! platform. Both do the same work in guest memory and must report the same result.
//!
//! The machine code is in `cli/guests/*.s`, next to the assembled bytes.

mod device;
mod programs;

use kvm_ops::Irqchip;
use kvm_ops::guest::GuestProgram;

use crate::fleet::expect::{Expect, WantedEnd};

pub(crate) use device::Mixer;

/// The port for a guest's result, 4 bytes wide. No PC device uses it.
pub(crate) const RESULT_PORT: u16 = 0x4f0;
/// The first serial port.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// The port that ends the machine.
pub(crate) const EXIT_PORT: u16 = 0xf4;

/// A built-in guest.
pub(crate) struct Guest {
    pub(crate) name: &'static str,
    /// A short description.
    pub(crate) about: &'static str,
    /// The number of vCPUs.
    pub(crate) vcpus: u32,
    /// The minimum memory, in bytes.
    pub(crate) memory: u64,
    /// The irqchip that the machine code needs. A guest program needs none.
    pub(crate) irqchip: Irqchip,
    /// The machine code: flat, real mode, loaded at 0x7c00.
    pub(crate) code: &'static [u8],
    /// The guest programs, one for each vCPU.
    pub(crate) programs: fn() -> Vec<Box<dyn GuestProgram>>,
    console: &'static str,
    result: Option<u32>,
    end: WantedEnd,
}

impl Guest {
    /// The expected result of a run.
    pub(crate) fn expect(&self) -> Expect {
        Expect {
            end: self.end,
            console: Some(self.console.to_owned()),
            result: self.result,
        }
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// All built-in guests.
pub(crate) static ALL: [Guest; 6] = [
    Guest {
        name: "hello",
        about: "prints a line and halts",
        vcpus: 1,
        memory: 128 << 10,
        irqchip: Irqchip::None,
        code: include_bytes!("../../guests/hello.bin"),
        programs: programs::hello,
        console: "hello from a guest\n",
        result: None,
        end: WantedEnd::Halt,
    },
    Guest {
        name: "sieve",
        about: "counts the primes below 8192 in guest memory",
        vcpus: 1,
        memory: 128 << 10,
        irqchip: Irqchip::None,
        code: include_bytes!("../../guests/sieve.bin"),
        programs: programs::sieve,
        console: "primes below 8192: 1028\n",
        result: Some(1028),
        end: WantedEnd::Halt,
    },
    Guest {
        name: "crc32",
        about: "fills 1 KiB of guest memory and computes its CRC-32",
        vcpus: 1,
        memory: 128 << 10,
        irqchip: Irqchip::None,
        code: include_bytes!("../../guests/crc32.bin"),
        programs: programs::crc32,
        console: "crc of 1024 bytes reported\n",
        result: Some(CRC),
        end: WantedEnd::Halt,
    },
    Guest {
        name: "mmio",
        about: "drives a memory-mapped device at 0xe0000000",
        vcpus: 1,
        memory: 128 << 10,
        irqchip: Irqchip::None,
        code: include_bytes!("../../guests/mmio.bin"),
        programs: programs::mmio,
        console: "16 rounds with the device\n",
        result: Some(MIXED),
        end: WantedEnd::Halt,
    },
    Guest {
        name: "pair",
        about: "two vCPUs that take turns through guest memory",
        vcpus: 2,
        memory: 128 << 10,
        irqchip: Irqchip::Full,
        code: include_bytes!("../../guests/pair.bin"),
        programs: programs::pair,
        console: "two vCPUs took 16 turns each\n",
        result: Some(32),
        end: WantedEnd::DebugExit,
    },
    Guest {
        name: "spin",
        about: "runs until it is stopped, which its timeout may do",
        vcpus: 1,
        memory: 128 << 10,
        irqchip: Irqchip::None,
        code: include_bytes!("../../guests/spin.bin"),
        programs: programs::spin,
        console: "until it is stopped\n",
        result: None,
        end: WantedEnd::Timeout,
    },
];

/// The CRC-32 of the bytes that `crc32` writes.
const CRC: u32 = 0x6a19_1f4e;
/// The sum of the values that `mmio` reads.
const MIXED: u32 = 0x8afa_3c14;

/// The names of all built-in guests.
pub(crate) fn names() -> Vec<&'static str> {
    ALL.iter().map(|guest| guest.name).collect()
}

/// Finds a guest by name.
pub(crate) fn find(name: &str) -> Option<&'static Guest> {
    ALL.iter().find(|guest| guest.name == name)
}

#[cfg(test)]
mod tests;
