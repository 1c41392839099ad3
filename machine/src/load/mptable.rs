//! The MultiProcessor table (Intel MultiProcessor Specification 1.4), by which a kernel that no
//! firmware started finds the other vCPUs and the interrupt lines.

use super::super::layout::{MP_TABLE, ONE_MIB};
use super::{GuestRam, MachineError};

/// Local APIC ids have eight bits, of which 255 is the broadcast; one id is the IOAPIC's.
const MAX_VCPUS: u32 = 254;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
/// Version numbers that KVM's APICs answer.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const SPEC_1_4: u8 = 4;
/// A family 6 processor with FPU and APIC; kernels ask CPUID for more.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// Kinds of entries.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Kinds of interrupts.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
const ISA_BUS: u8 = 0;
const ISA_LINES: u8 = 16;
const ALL_APICS: u8 = 0xff;

const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;

/// Writes the table for a machine whose platform has an IOAPIC, where there is memory for it.
///
/// ISA line n is pin n of the IOAPIC, as KVM routes it unless told otherwise. Of more vCPUs than
/// the table can name, it names the first.
pub(crate) fn write(ram: &GuestRam, vcpus: u32) -> Result<(), MachineError> {
    if ram.size() < ONE_MIB {
        return Ok(());
    }
    ram.write(MP_TABLE, &table(MP_TABLE.get() as u32, vcpus))
}

/// The floating pointer, and the configuration table right behind it.
fn table(at: u32, vcpus: u32) -> Vec<u8> {
    let (entries, count) = entries(vcpus.min(MAX_VCPUS) as u8);

    let mut pointer = b"_MP_".to_vec();
    pointer.extend((at + POINTER_BYTES as u32).to_le_bytes());
    pointer.extend([1, SPEC_1_4]); // its length in 16 bytes
    pointer.resize(POINTER_BYTES, 0);
    seal(&mut pointer, 10);

    let mut config = b"PCMP".to_vec();
    config.extend(((HEADER_BYTES + entries.len()) as u16).to_le_bytes());
    config.extend([SPEC_1_4, 0]);
    config.extend(b"KVM-OPS ");
    config.extend(b"MACHINE     ");
    config.extend([0; 6]); // no OEM table
    config.extend(count.to_le_bytes());
    config.extend(LOCAL_APIC.to_le_bytes());
    config.resize(HEADER_BYTES, 0);
    config.extend(entries);
    seal(&mut config, 7);

    pointer.extend(config);
    pointer
}

/// The entries in the order of their kinds, as the specification wants them, and their number.
fn entries(vcpus: u8) -> (Vec<u8>, u16) {
    let mut bytes = Vec::new();
    let mut count = 0;
    let mut add = |entry: &[u8]| {
        bytes.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let boot = if id == 0 { CPU_BOOT } else { 0 };
        let mut entry = vec![PROCESSOR, id, LOCAL_APIC_VERSION, CPU_ENABLED | boot];
        entry.extend(CPU_SIGNATURE.to_le_bytes());
        entry.extend(CPU_FEATURES.to_le_bytes());
        entry.resize(20, 0);
        add(&entry);
    }
    add(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let ioapic = vcpus;
    let [a, b, c, d] = IOAPIC.to_le_bytes();
    add(&[IO_APIC, ioapic, IOAPIC_VERSION, 1, a, b, c, d]);
    for line in 0..ISA_LINES {
        add(&[IO_INTERRUPT, INT, 0, 0, ISA_BUS, line, ioapic, line]);
    }
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL_APICS, 1]);
    (bytes, count)
}

/// Sets the checksum at `at`, so that all bytes sum to zero.
fn seal(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = bytes[at].wrapping_sub(sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_table_sums_to_zero_and_names_each_vcpu_once() {
        for vcpus in [1, 2, 17, 254, 4096] {
            let table = table(0xf_0000, vcpus);
            let (pointer, config) = table.split_at(POINTER_BYTES);
            assert_eq!((&pointer[..4], sum(pointer)), (&b"_MP_"[..], 0));
            assert_eq!(pointer[4..8], 0xf_0010_u32.to_le_bytes());
            assert_eq!((&config[..4], sum(config)), (&b"PCMP"[..], 0));
            assert_eq!(config[4..6], (config.len() as u16).to_le_bytes());
            // It ends before 1 MiB.
            assert!(table.len() <= 0x1_0000);

            let mut entries = &config[HEADER_BYTES..];
            let (mut ids, mut count, mut kinds) = (Vec::new(), 0_u16, Vec::new());
            while let Some(kind) = entries.first() {
                let len = if *kind == PROCESSOR { 20 } else { 8 };
                if *kind != LOCAL_INTERRUPT && *kind != IO_INTERRUPT && *kind != BUS {
                    ids.push(entries[1]);
                }
                kinds.push(*kind);
                count += 1;
                entries = &entries[len..];
            }
            assert_eq!(config[34..36], count.to_le_bytes());
            assert!(kinds.is_sorted());
            let named = vcpus.min(MAX_VCPUS) as u8;
            assert_eq!(ids, (0..=named).collect::<Vec<_>>(), "APIC ids are unique");
        }
    }
}
