//! The I/O APIC of a machine whose platform has local APICs only (82093AA datasheet): each input sends the message of its
//! entry when it rises.
//!
//! **Not modelled:** the remote IRR. No device here holds a line, so an entry that is set to level does as an edge does.

use kvm_ops::Msi;

/// The register window.
pub(super) const BASE: u64 = 0xfec0_0000;
pub(super) const BYTES: u64 = 0x20;

/// Offsets in the window: the index, and the register that it selects.
const INDEX: u64 = 0x00;
const DATA: u64 = 0x10;

const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const ENTRIES: u8 = 0x10;

const INPUTS: usize = 24;
/// Version 0x11, and the number of the last input.
const VERSION_VALUE: u32 = (INPUTS as u32 - 1) << 16 | 0x11;
const ID_BITS: u32 = 0x0f00_0000;

/// Bits of an entry.
const LOGICAL: u64 = 1 << 11;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR, which are the device's.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
/// Vector, delivery mode, and trigger mode, which an MSI's data has at the same places.
const MSI_DATA: u64 = 0x87ff;
const MSI_BASE: u64 = 0xfee0_0000;
const MSI_LOGICAL: u64 = 1 << 2;

pub(super) struct IoApic {
    index: u8,
    id: u32,
    entries: [u64; INPUTS],
}

impl IoApic {
    pub(super) const fn new() -> Self {
        Self {
            index: 0,
            id: 0,
            entries: [MASKED; INPUTS],
        }
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            INDEX => self.index.into(),
            DATA => self.register(),
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, offset: u64, value: u32) {
        match offset {
            INDEX => self.index = value as u8,
            DATA => self.set_register(value),
            _ => {}
        }
    }

    /// The entry of the selected register, and how far left its half lies in it.
    fn entry(&self) -> Option<(usize, u32)> {
        let number = usize::from(self.index.checked_sub(ENTRIES)?);
        (number / 2 < INPUTS).then_some((number / 2, number as u32 % 2 * 32))
    }

    fn register(&self) -> u32 {
        match (self.index, self.entry()) {
            (ID | ARBITRATION, _) => self.id,
            (VERSION, _) => VERSION_VALUE,
            (_, Some((entry, shift))) => (self.entries[entry] >> shift) as u32,
            _ => 0,
        }
    }

    fn set_register(&mut self, value: u32) {
        match (self.index, self.entry()) {
            (ID, _) => self.id = value & ID_BITS,
            (_, Some((entry, shift))) => {
                let half = 0xffff_ffff_u64 << shift & !READ_ONLY;
                let now = &mut self.entries[entry];
                *now = *now & !half | u64::from(value) << shift & half;
            }
            _ => {}
        }
    }

    /// The message of an input that rises, unless its entry is masked.
    pub(super) fn rise(&self, input: usize) -> Option<Msi> {
        let entry = self
            .entries
            .get(input)
            .filter(|entry| *entry & MASKED == 0)?;
        let logical = if entry & LOGICAL != 0 { MSI_LOGICAL } else { 0 };
        Some(Msi {
            address: MSI_BASE | entry >> 56 << 12 | logical,
            data: (entry & MSI_DATA) as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops::VcpuId;

    fn set(chip: &mut IoApic, register: u8, value: u32) {
        chip.write(INDEX, register.into());
        chip.write(DATA, value);
    }

    fn get(chip: &mut IoApic, register: u8) -> u32 {
        chip.write(INDEX, register.into());
        chip.read(DATA)
    }

    #[test]
    fn an_input_sends_the_message_of_its_entry_unless_it_is_masked() {
        let mut chip = IoApic::new();
        assert_eq!(chip.rise(4), None);
        set(&mut chip, 0x19, 3 << 24);
        set(&mut chip, 0x18, 0x41);
        assert_eq!(chip.rise(4), Some(Msi::to(VcpuId(3), 0x41)));
        set(&mut chip, 0x18, 0x1_0041);
        assert_eq!((chip.rise(4), chip.rise(INPUTS)), (None, None));
    }

    #[test]
    fn registers_read_what_was_written_but_for_status() {
        let mut chip = IoApic::new();
        assert_eq!(get(&mut chip, 1), 0x17_0011);
        set(&mut chip, 0, u32::MAX);
        assert_eq!((get(&mut chip, 0), get(&mut chip, 2)), (ID_BITS, ID_BITS));
        for register in ENTRIES..ENTRIES + 2 * INPUTS as u8 {
            set(&mut chip, register, u32::MAX);
            let expected = if register % 2 == 0 {
                0xffff_afff
            } else {
                u32::MAX
            };
            assert_eq!(get(&mut chip, register), expected, "{register:#x}");
        }
        for beyond in [3, 0x0f, 0x40, 0xff] {
            set(&mut chip, beyond, u32::MAX);
            assert_eq!(get(&mut chip, beyond), 0, "{beyond:#x}");
        }
    }
}
