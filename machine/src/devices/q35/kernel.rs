//! ACPI tables in memory, for a kernel that starts without firmware.

use kvm_ops::Irqchip;

use super::acpi;
use super::pci::Window;
use crate::layout::{ACPI_ROOT, ACPI_TABLES, ONE_MIB, RAM_HOLE};
use crate::{GuestRam, MachineError};

/// The memory window of PCI configuration space, which no firmware opens: right where RAM ends at the latest.
pub(super) const WINDOW: Window = Window {
    at: RAM_HOLE,
    buses: 256,
};

/// Writes the tables. They describe a [`Q35`](super::Q35) whose window is open.
pub(crate) fn describe(ram: &GuestRam, vcpus: u32, irqchip: Irqchip) -> Result<(), MachineError> {
    if ram.low_end().get() < ONE_MIB {
        return Err(MachineError::MemorySize {
            bytes: ram.size(),
            problem: "less than the 1 MiB at whose end ACPI tables lie",
        });
    }
    let facts = acpi::Facts {
        window: Some(WINDOW),
        ..acpi::Facts::new(ram, vcpus, irqchip)
    };
    let (root, tables) = acpi::at(ACPI_TABLES.get() as u32, facts);
    ram.write(ACPI_ROOT, &root)?;
    ram.write(ACPI_TABLES, &tables)
}

#[cfg(test)]
mod tests {
    use super::*;

    use kvm_ops::{Gpa, MAX_VCPUS};

    fn word(ram: &GuestRam, at: Gpa, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        ram.read(Gpa::new(at.get() + offset), &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_kernel_comes_from_the_root_pointer_to_each_table() {
        let ram = GuestRam::new(16 << 20, 0, false).unwrap();
        describe(&ram, 4, Irqchip::Full).unwrap();
        let pointer = |at: Gpa, offset| Gpa::new(word(&ram, at, offset).into());
        let name = |at| word(&ram, at, 0).to_le_bytes();
        let list = pointer(ACPI_ROOT, 24);
        let tables = [36, 44, 52].map(|entry| pointer(list, entry));
        assert_eq!(name(list), *b"XSDT");
        assert_eq!(tables.map(name), [*b"FACP", *b"APIC", *b"MCFG"]);
        assert_eq!(word(&ram, list, 4), 36 + 3 * 8);
        assert_eq!(name(pointer(tables[0], 40)), *b"DSDT");
        assert_eq!(u64::from(word(&ram, tables[2], 44)), WINDOW.at);
    }

    #[test]
    fn tables_of_the_most_vcpus_end_before_the_root_pointer() {
        let ram = GuestRam::new(16 << 20, 0, false).unwrap();
        let facts = acpi::Facts {
            window: Some(WINDOW),
            ..acpi::Facts::new(&ram, MAX_VCPUS, Irqchip::Full)
        };
        let (_, tables) = acpi::at(ACPI_TABLES.get() as u32, facts);
        assert!(tables.len() as u64 <= ACPI_ROOT.get() - ACPI_TABLES.get());
    }

    #[test]
    fn memory_without_a_place_for_tables_is_refused_with_its_size() {
        let ram = GuestRam::new(0x8_0000, 0, false).unwrap();
        let error = describe(&ram, 1, Irqchip::Full).unwrap_err();
        assert!(
            error.to_string().contains("0x80000 bytes is less"),
            "{error}"
        );
    }
}
