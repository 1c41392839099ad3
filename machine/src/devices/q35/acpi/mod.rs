//! ACPI tables (ACPI 6.5): as files of the configuration device, from which firmware installs them, or in memory for a kernel
//! that starts without firmware.
//!
//! FACS, DSDT, FADT, MADT, MCFG and XSDT lie one behind the other, the root pointer apart. Of files a third one has the script
//! that links them.

mod dsdt;
mod linked;
mod loader;
mod osc;

use acpi_tables::aml::Word;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use kvm_ops::Irqchip;

use super::fw_cfg::Items;
use super::pci::Window;
use super::{ioapic, power};
use crate::GuestRam;
use linked::{ALIGN, Link, Linked, Piece};
use loader::{Script, Zone};

const TABLES: &str = "etc/acpi/tables";
const ROOT: &str = "etc/acpi/rsdp";
const LOADER: &str = "etc/table-loader";

/// The three of them.
pub(super) const FILES: [&str; 3] = [TABLES, ROOT, LOADER];
/// Files are whole pages, as QEMU's: their sizes, which firmware reads in the directory, do not change with the tables.
const PAGE: usize = 4096;

const OEM: [u8; 6] = *b"KVMOPS";
const OEM_TABLE: [u8; 8] = *b"MACHINE ";
const OEM_REVISION: u32 = 1;
const HEADER: u32 = 36;
/// The checksum's place in a table's header.
const CHECKSUM: u32 = 9;

/// Offsets in the FADT: pointers of 32 bits to FACS and DSDT.
const FADT_FACS: u32 = 36;
const FADT_DSDT: u32 = 40;
/// Offsets in the root pointer: checksums of the first part and of all, the XSDT's address.
const ROOT_CHECKSUM: u32 = 8;
const ROOT_FIRST_PART: u32 = 20;
const ROOT_XSDT: u32 = 24;
const ROOT_EXTENDED: u32 = 32;

/// The line of power management's interrupt.
const SCI: Word = 9;
/// The CMOS register of the century.
const CENTURY: u8 = 0x32;
/// IAPC_BOOT_ARCH: no VGA. There is no keyboard controller either, which is another bit that is not set.
const NO_VGA: u16 = 1 << 2;
const RESET_PORT: u64 = 0xcf9;
const RESET_VALUE: u8 = 6;

/// The facts that the tables tell.
#[derive(Clone, Copy)]
pub(super) struct Facts {
    pub(super) vcpus: u32,
    /// The platform has a pair of 8259A interrupt controllers.
    pub(super) has_pic: bool,
    /// The end of the RAM below 4 GiB.
    pub(super) ram_end: u32,
    /// The memory window of PCI configuration space, once firmware has opened it.
    pub(super) window: Option<Window>,
}

impl Facts {
    /// The facts of a machine before its firmware has run.
    pub(super) fn new(ram: &GuestRam, vcpus: u32, irqchip: Irqchip) -> Self {
        Self {
            vcpus,
            has_pic: irqchip == Irqchip::Full,
            ram_end: u32::try_from(ram.low_end().get()).unwrap_or(u32::MAX),
            window: None,
        }
    }
}

/// Puts the tables into the files of the configuration device.
pub(super) fn put(items: &mut Items, facts: Facts) {
    let linked = tables(facts);
    let mut script = Script::default();
    script.allocate(ROOT, 16, Zone::FSegment);
    script.allocate(TABLES, ALIGN as u32, Zone::High);
    let file = |piece| match piece {
        Piece::Root => ROOT,
        Piece::Tables => TABLES,
    };
    for link in &linked.links {
        match *link {
            Link::Pointer { piece, at, bytes } => {
                script.add_pointer(file(piece), at, bytes, TABLES);
            }
            Link::Sum {
                piece,
                at,
                start,
                bytes,
            } => script.add_checksum(file(piece), at, start, bytes),
        }
    }
    let pages = |mut file: Vec<u8>| {
        file.resize(file.len().next_multiple_of(PAGE), 0);
        file
    };
    items.put_file(ROOT, linked.root);
    items.put_file(TABLES, pages(linked.tables));
    items.put_file(LOADER, pages(script.into_bytes()));
}

/// Root pointer and tables, for tables at an address.
pub(super) fn at(address: u32, facts: Facts) -> (Vec<u8>, Vec<u8>) {
    tables(facts).at(address)
}

fn tables(facts: Facts) -> Linked {
    let mut linked = Linked::default();
    let facs = linked.add(&bytes(&FACS::new()));
    let dsdt = linked.add(&sdt(*b"DSDT", 2, &dsdt::code(&facts)));
    let fadt = linked.add(&bytes(&fixed(facs.at, dsdt.at)));
    let madt = linked.add(&interrupts(facts));
    let mut listed = vec![fadt.at, madt.at];
    listed.extend(facts.window.map(|window| linked.add(&space(window)).at));
    let mut list = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    listed.iter().for_each(|at| list.add_entry((*at).into()));
    let xsdt = linked.add(&bytes(&list));
    linked.root = bytes(&Rsdp::new(OEM, xsdt.at.into()));

    let tables = Piece::Tables;
    for at in [FADT_FACS, FADT_DSDT] {
        linked.point(tables, fadt.at + at, 4);
    }
    linked.seal(tables, fadt.at + CHECKSUM, fadt.at, fadt.bytes);
    for entry in 0..listed.len() as u32 {
        linked.point(tables, xsdt.at + HEADER + 8 * entry, 8);
    }
    linked.seal(tables, xsdt.at + CHECKSUM, xsdt.at, xsdt.bytes);
    linked.point(Piece::Root, ROOT_XSDT, 8);
    let whole = linked.root.len() as u32;
    for (at, covered) in [(ROOT_CHECKSUM, ROOT_FIRST_PART), (ROOT_EXTENDED, whole)] {
        linked.seal(Piece::Root, at, 0, covered);
    }
    linked
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn sdt(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(signature, HEADER, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table.as_slice().to_vec()
}

/// The FADT: power management at its ports, and no system management mode.
fn fixed(facs: u32, dsdt: u32) -> impl Aml {
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .dsdt_32(dsdt)
        .gpe_info(power::GPE0.into(), 0, power::GPE0_BYTES, 0, 0)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    table.sci_int = SCI.into();
    table.pm1a_evt_blk = u32::from(power::PM1A_EVENT).into();
    table.pm1_evt_len = power::PM1A_EVENT_BYTES;
    table.pm1a_cnt_blk = u32::from(power::PM1A_CONTROL).into();
    table.pm1_cnt_len = power::PM1A_CONTROL_BYTES;
    table.pm_tmr_blk = u32::from(power::TIMER).into();
    table.pm_tmr_len = power::TIMER_BYTES;
    // Latencies of states that there are not.
    table.p_lvl2_lat = 0xfff.into();
    table.p_lvl3_lat = 0xfff.into();
    table.century = CENTURY;
    table.iapc_boot_arch = NO_VGA.into();
    let port = AddressSpace::SystemIo;
    table.reset_reg = GAS::new(port, 8, 0, AccessSize::ByteAccess, RESET_PORT);
    table.reset_value = RESET_VALUE;
    table.finalize()
}

/// The MCFG: the memory window of PCI configuration space.
fn space(window: Window) -> Vec<u8> {
    let mut table = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    table.add_ecam(window.at, 0, 0, (window.buses - 1) as u8);
    bytes(&table)
}

/// The MADT: local APICs, of which those with large ids are x2APICs, and the I/O APIC.
fn interrupts(facts: Facts) -> Vec<u8> {
    const LOCAL_APIC: u32 = 0xfee0_0000;
    const LOCAL_X2APIC: u8 = 9;
    const ENABLED: u32 = 1;
    let mut body = [LOCAL_APIC, u32::from(facts.has_pic)]
        .map(u32::to_le_bytes)
        .as_flattened()
        .to_vec();
    for id in 0..facts.vcpus {
        match u8::try_from(id) {
            Ok(id) if id != 0xff => {
                ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            _ => {
                body.vec(&[LOCAL_X2APIC, 16, 0, 0]);
                body.vec([id, ENABLED, id].map(u32::to_le_bytes).as_flattened());
            }
        }
    }
    IoApic::new(0, ioapic::BASE as u32, 0).to_aml_bytes(&mut body);
    sdt(*b"APIC", 5, &body)
}

#[cfg(test)]
mod tests;
