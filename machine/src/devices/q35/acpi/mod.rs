//! ACPI tables (ACPI 6.5), as files of the configuration device, from which firmware installs them.
//!
//! FACS, DSDT, FADT, MADT, MCFG and XSDT lie in one file one behind the other, the root pointer in a second, and a third has
//! the script that links them.

mod dsdt;
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

use super::fw_cfg::Items;
use super::pci::Window;
use super::{ioapic, power};
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
const CHECKSUM: usize = 9;
const ALIGN: usize = 64;

/// Offsets in the FADT: pointers of 32 bits to FACS and DSDT.
const FADT_FACS: usize = 36;
const FADT_DSDT: usize = 40;
/// Offsets in the root pointer: checksums of the first part and of all, the XSDT's address.
const ROOT_CHECKSUM: usize = 8;
const ROOT_FIRST_PART: u32 = 20;
const ROOT_XSDT: usize = 24;
const ROOT_EXTENDED: usize = 32;

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

/// Puts the tables into the files of the configuration device.
pub(super) fn put(items: &mut Items, facts: Facts) {
    let mut image = Image::default();
    let facs = image.add(&bytes(&FACS::new()));
    let dsdt = image.add(&sdt(*b"DSDT", 2, &dsdt::code(&facts)));
    let fadt = image.add(&bytes(&fixed(facs, dsdt)));
    let madt = image.add(&interrupts(facts));
    let mut listed = vec![&fadt, &madt];
    let mcfg = facts.window.map(|window| image.add(&space(window)));
    listed.extend(&mcfg);
    let mut list = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    listed
        .iter()
        .for_each(|table| list.add_entry(table.at.into()));
    let xsdt = image.add(&bytes(&list));
    let mut root = bytes(&Rsdp::new(OEM, xsdt.at.into()));

    let mut script = Script::default();
    script.allocate(ROOT, 16, Zone::FSegment);
    script.allocate(TABLES, ALIGN as u32, Zone::High);
    for at in [FADT_FACS, FADT_DSDT] {
        script.add_pointer(TABLES, fadt.at + at as u32, 4, TABLES);
    }
    image.seal(&mut script, &fadt);
    for entry in 0..listed.len() as u32 {
        script.add_pointer(TABLES, xsdt.at + HEADER + 8 * entry, 8, TABLES);
    }
    image.seal(&mut script, &xsdt);
    script.add_pointer(ROOT, ROOT_XSDT as u32, 8, TABLES);
    for (at, covered) in [
        (ROOT_CHECKSUM, ROOT_FIRST_PART),
        (ROOT_EXTENDED, root.len() as u32),
    ] {
        root[at] = 0;
        script.add_checksum(ROOT, at as u32, 0, covered);
    }

    let pages = |mut file: Vec<u8>| {
        file.resize(file.len().next_multiple_of(PAGE), 0);
        file
    };
    items.put_file(ROOT, root);
    items.put_file(TABLES, pages(image.0));
    items.put_file(LOADER, pages(script.into_bytes()));
}

/// A table's place in the file.
struct Placed {
    at: u32,
    bytes: u32,
}

/// The file of tables.
#[derive(Default)]
struct Image(Vec<u8>);

impl Image {
    fn add(&mut self, table: &[u8]) -> Placed {
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
        let at = self.0.len() as u32;
        self.0.extend_from_slice(table);
        let bytes = table.len() as u32;
        Placed { at, bytes }
    }

    /// Leaves a table's checksum to the script: pointers change it.
    fn seal(&mut self, script: &mut Script, table: &Placed) {
        let at = table.at as usize + CHECKSUM;
        self.0[at] = 0;
        script.add_checksum(TABLES, at as u32, table.at, table.bytes);
    }
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
fn fixed(facs: Placed, dsdt: Placed) -> impl Aml {
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs.at)
        .dsdt_32(dsdt.at)
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
