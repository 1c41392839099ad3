//! The DSDT: the root bridge with what it passes on, the serial line, the clock, and how to switch off.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, PackageBuilder, ResourceTemplate, Scope,
};

use super::super::pci::{self, Window};
use super::super::{cards, ioapic, power};
use super::{Facts, osc};
use crate::Devices;
use crate::layout::FOUR_GIB;

/// Ports of the configuration registers, which are the bridge's own.
const PCI_PORTS: u16 = pci::ADDRESS;
const PCI_PORTS_BYTES: u8 = 8;
const CMOS_PORTS: u16 = 0x70;
const SERIAL_PORTS: u16 = 0x3f8;

/// The AML code of the table, behind its header.
pub(super) fn code(facts: &Facts) -> Vec<u8> {
    let mut code = Vec::new();
    // SLP_TYPa and SLP_TYPb of S5, and two reserved values.
    let off = Package::new(vec![&0_u8, &0_u8, &0_u8, &0_u8]);
    Name::new("_S5_".into(), &off).to_aml_bytes(&mut code);

    let (bridge, ports) = (root_bridge(facts), platform_ports(facts.window));
    let (clock, serial) = (clock(), serial());
    let devices: Vec<&dyn Aml> = vec![&bridge, &ports, &clock, &serial];
    Scope::new("_SB_".into(), devices).to_aml_bytes(&mut code);
    code
}

/// A device that is made already.
struct Made(Vec<u8>);

impl Aml for Made {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn device(name: &str, id: &str, more: &[&dyn Aml], resources: Vec<&dyn Aml>) -> Made {
    let id = Name::new("_HID".into(), &EISAName::new(id));
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let mut children: Vec<&dyn Aml> = vec![&id, &resources];
    children.extend(more);
    let mut bytes = Vec::new();
    Device::new(name.into(), children).to_aml_bytes(&mut bytes);
    Made(bytes)
}

/// What lies between RAM and I/O APIC without the configuration space: first and last address of each piece.
pub(super) fn device_memory(facts: &Facts) -> Vec<(u32, u32)> {
    let (start, end) = (u64::from(facts.ram_end), ioapic::BASE);
    let (before, behind) = match facts.window {
        Some(window) if window.at < end => (window.at, window.end()),
        _ => (end, end),
    };
    let pieces = [(start, before), (behind.max(start), end)];
    let there = pieces.into_iter().filter(|(from, to)| from < to);
    there
        .map(|(from, to)| (from as u32, (to - 1) as u32))
        .collect()
}

fn root_bridge(facts: &Facts) -> Made {
    let memory: Vec<_> = device_memory(facts)
        .into_iter()
        .map(|(first, last)| {
            AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None)
        })
        .collect();
    let buses = AddressSpace::new_bus_number(0_u16, 0xff);
    let own = IO::new(PCI_PORTS, PCI_PORTS, 1, PCI_PORTS_BYTES);
    let below = AddressSpace::new_io(0_u16, PCI_PORTS - 1, None);
    let above = AddressSpace::new_io(PCI_PORTS + u16::from(PCI_PORTS_BYTES), 0xffff, None);
    let compatible = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let number = Name::new("_UID".into(), &0_u8);
    let lines = Name::new("_PRT".into(), &interrupt_lines());
    let mut resources: Vec<&dyn Aml> = vec![&buses, &own, &below, &above];
    resources.extend(memory.iter().map(|piece| piece as &dyn Aml));
    let control = Made(osc::method());
    let more: [&dyn Aml; 4] = [&compatible, &number, &lines, &control];
    device("PCI0", "PNP0A08", &more, resources)
}

/// The inputs of the I/O APIC to which INTA of the slots leads.
fn interrupt_lines() -> Made {
    const ANY_FUNCTION: u32 = 0xffff;
    const INTA: u8 = 0;
    const NO_LINK: u8 = 0;
    let slots = (cards::FIRST_SLOT..).zip(cards::FIRST_LINE..);
    let mut entries = PackageBuilder::new();
    for (slot, line) in slots.take(cards::SLOTS.into()) {
        let address = u32::from(slot) << 16 | ANY_FUNCTION;
        entries.add_element(&Package::new(vec![&address, &INTA, &NO_LINK, &line]));
    }
    let mut bytes = Vec::new();
    entries.to_aml_bytes(&mut bytes);
    Made(bytes)
}

/// Resources that no driver may take: the memory window of the configuration space, and the ports of power management.
fn platform_ports(window: Option<Window>) -> Made {
    let bytes = (power::LAST - power::BASE + 1) as u8;
    let power = IO::new(power::BASE, power::BASE, 1, bytes);
    // Firmware keeps the window below 4 GiB.
    let window = window.filter(|window| window.end() <= FOUR_GIB);
    let window =
        window.map(|window| Memory32Fixed::new(true, window.at as u32, window.bytes() as u32));
    let mut resources: Vec<&dyn Aml> = vec![&power];
    resources.extend(window.iter().map(|window| window as &dyn Aml));
    device("MRES", "PNP0C02", &[], resources)
}

fn clock() -> Made {
    let ports = IO::new(CMOS_PORTS, CMOS_PORTS, 1, 2);
    device("RTC_", "PNP0B00", &[], vec![&ports])
}

fn serial() -> Made {
    let ports = IO::new(SERIAL_PORTS, SERIAL_PORTS, 1, 8);
    let line = Interrupt::new(true, true, false, false, Devices::SERIAL_LINE);
    let number = Name::new("_UID".into(), &1_u8);
    device("COM1", "PNP0501", &[&number], vec![&ports, &line])
}
