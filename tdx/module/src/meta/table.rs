//! The tables of metadata fields: their rows and order, and the bits that each agent may read and write.
//!
//! The rows are in `tables/fields.csv`. A row is an array of *fields* of one or more *elements* each; one call
//! reads or writes an element.

use std::sync::LazyLock;

/// Bits of a field identifier.
pub(crate) mod id {
    /// Context: 0 module, 1 TD, 2 vCPU.
    pub(crate) const CONTEXT_SHIFT: u32 = 52;
    pub(crate) const CONTEXT: u64 = 7 << CONTEXT_SHIFT;
    pub(crate) const CODE: u64 = 0x00FF_FFFF;
    pub(crate) const CLASS_SHIFT: u32 = 56;
    pub(crate) const SIZE_SHIFT: u32 = 32;
    pub(crate) const LAST_ELEMENT_SHIFT: u32 = 34;
    pub(crate) const LAST_FIELD_SHIFT: u32 = 38;
    /// Must be 0 where a single element is named: 31:24, 37:34, 46:38, 49:47, 55 and 62.
    pub(crate) const RESERVED: u64 =
        0xFF << 24 | 0xF << 34 | 0x1FF << 38 | 7 << 47 | 1 << 55 | 1 << 62;
}

/// Class and code of an element.
pub(crate) type Key = (u8, u32);

/// Class and code in an identifier.
pub(crate) const fn key_of(id: u64) -> Key {
    ((id >> id::CLASS_SHIFT) as u8 & 0x3F, (id & id::CODE) as u32)
}

/// One of the tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Table {
    /// The module and the platform.
    Sys,
    /// TDR and TDCS.
    Td,
    /// TDVPS without its VMCSs.
    Vcpu,
    /// The VMCS of L1.
    Vmcs,
    /// The VMCS of an L2 VM.
    L2Vmcs,
}

/// Agent whose masks apply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Agent {
    /// The host of a production TD, or of no TD.
    Host,
    /// The host of a TD with ATTRIBUTES.DEBUG.
    HostOfDebug,
    /// The TD.
    Guest,
    /// A service TD bound to the TD.
    ServiceTd,
    /// The module: reading for an export, writing for an import.
    Migration,
}

/// Kind of address that a field holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AddressKind {
    /// None.
    None,
    /// A page of the host.
    SharedHpa,
    /// A page of the TD or the module, or any, by host physical address.
    Hpa,
    /// A private page of the TD, by guest physical address.
    PrivateGpa,
}

/// The bits of a field each agent reads and writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Masks {
    host: (u64, u64),
    host_of_debug: (u64, u64),
    guest: (u64, u64),
    service_td: (u64, u64),
    migration: (u64, u64),
}

/// A row of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Field {
    /// The architecture's name.
    pub(crate) name: &'static str,
    /// Identifier of the first element.
    pub(crate) id: u64,
    pub(crate) class: u8,
    pub(crate) code: u32,
    /// Number of fields.
    pub(crate) fields: u32,
    /// Elements of a field.
    pub(crate) elements: u32,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub(crate) size: u32,
    pub(crate) address: AddressKind,
    /// Export and import class: `NONE`, `MB`, `ME`, `CBO`...
    pub(crate) export: &'static str,
    pub(crate) import: &'static str,
    /// Position of the first element among all elements of the table.
    pub(crate) first: usize,
    masks: Masks,
}

impl Field {
    /// Returns true if the row represents a whole VMCS, whose fields have a separate table.
    fn is_vmcs(&self) -> bool {
        self.name.starts_with("L2_VMCS_")
    }

    /// All elements of all fields.
    pub(crate) const fn len(&self) -> u32 {
        self.fields * self.elements
    }

    /// Bits of an element.
    pub(crate) const fn element_mask(&self) -> u64 {
        u64::MAX >> (64 - 8 * self.size)
    }

    pub(crate) const fn read_mask(&self, agent: Agent) -> u64 {
        self.masks_of(agent).0
    }

    pub(crate) const fn write_mask(&self, agent: Agent) -> u64 {
        self.masks_of(agent).1
    }

    const fn masks_of(&self, agent: Agent) -> (u64, u64) {
        match agent {
            Agent::Host => self.masks.host,
            Agent::HostOfDebug => self.masks.host_of_debug,
            Agent::Guest => self.masks.guest,
            Agent::ServiceTd => self.masks.service_td,
            Agent::Migration => self.masks.migration,
        }
    }
}

impl Table {
    fn data(self) -> &'static Data {
        &TABLES[self as usize]
    }

    /// The rows, in the order of the next-identifier chain.
    pub(crate) fn rows(self) -> &'static [Field] {
        &self.data().rows
    }

    /// Elements of all rows but the last `without`.
    pub(crate) fn elements_without(self, without: usize) -> usize {
        let rows = self.rows();
        let used = &rows[..rows.len().saturating_sub(without)];
        let last = used.iter().rfind(|f| !f.is_vmcs());
        last.map_or(0, |f| f.first + f.len() as usize)
    }

    /// Difference between the codes of neighbouring elements.
    pub(crate) const fn stride(self) -> u32 {
        // The codes of a VMCS are its encodings, whose lowest bit means the upper half of a field.
        if self.is_vmcs() { 2 } else { 1 }
    }

    /// The row that covers a class and code, and which of its elements is meant.
    pub(crate) fn find(self, (class, code): Key) -> Option<(usize, u32)> {
        // Rows ascend by class and code, and none covers what another does.
        let data = self.data();
        let row = data
            .keys
            .partition_point(|first| *first <= packed(class, code))
            .checked_sub(1)?;
        let (f, stride) = (&data.rows[row], self.stride());
        let at = code.checked_sub(f.code)?;
        (f.class == class && at < f.len() * stride && at % stride == 0)
            .then_some((row, at / stride))
    }

    /// Position of an element among all of the table.
    pub(crate) fn position(self, key: Key) -> Option<usize> {
        if let (0, true) = (key.0, self.is_vmcs()) {
            let position = self.data().by_encoding.get(key.1 as usize)?;
            return (*position != NOWHERE).then_some(usize::from(*position));
        }
        let (row, element) = self.find(key)?;
        Some(self.rows()[row].first + element as usize)
    }

    const fn is_vmcs(self) -> bool {
        matches!(self, Table::Vmcs | Table::L2Vmcs)
    }
}

/// A table, with the first keys of its rows close together.
struct Data {
    rows: Vec<Field>,
    keys: Vec<u32>,
    /// Positions by encoding. Each exit of a TD reads and writes half a hundred fields of its VMCS.
    by_encoding: Vec<u16>,
}

/// The encoding of no field.
const NOWHERE: u16 = u16::MAX;

/// The positions of the elements of class 0 whose codes are encodings of a VMCS.
fn by_encoding(rows: &[Field]) -> Vec<u16> {
    const ENCODINGS: usize = 1 << 15;
    let mut positions = vec![NOWHERE; ENCODINGS];
    for row in rows.iter().filter(|row| row.class == 0) {
        let places = positions.iter_mut().skip(row.code as usize).step_by(2);
        for (place, position) in places.take(row.len() as usize).zip(row.first..) {
            *place = u16::try_from(position).unwrap_or(NOWHERE);
        }
    }
    positions
}

/// A class and code in one word, ordered as the rows are.
const fn packed(class: u8, code: u32) -> u32 {
    (class as u32) << 24 | code & id::CODE as u32
}

static TABLES: LazyLock<[Data; 5]> = LazyLock::new(|| {
    let names = ["SYS", "TD", "VP", "VMCS", "L2VMCS"];
    names.map(|name| {
        let mut first = 0;
        let mut rows: Vec<Field> = rows_of(name).collect();
        for field in &mut rows {
            field.first = first;
            first += if field.is_vmcs() {
                0
            } else {
                field.len() as usize
            };
        }
        let keys = rows.iter().map(|f| packed(f.class, f.code)).collect();
        Data {
            by_encoding: match name {
                "VMCS" | "L2VMCS" => by_encoding(&rows),
                _ => Vec::new(),
            },
            rows,
            keys,
        }
    })
});

const FIELDS: &str = include_str!("tables/fields.csv");

fn rows_of(table: &str) -> impl Iterator<Item = Field> {
    FIELDS.lines().filter_map(move |line| {
        let columns: Vec<&'static str> = line.split(',').collect();
        (columns.first() == Some(&table)).then(|| parse(&columns))?
    })
}

/// A number in decimal or hex; an empty column is `default`.
fn number(column: &str, default: u64) -> Option<u64> {
    match column.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None if column.is_empty() => Some(default),
        None => column.parse().ok(),
    }
}

fn parse(columns: &[&'static str]) -> Option<Field> {
    let [
        _table,
        _order,
        id,
        name,
        _context,
        class,
        code,
        fields,
        elements,
        size,
        host_rd,
        host_wr,
        debug_rd,
        debug_wr,
        guest_rd,
        guest_wr,
        service_rd,
        service_wr,
        export,
        export_mask,
        import,
        import_mask,
        _special_rd,
        _special_wr,
        address,
    ] = *columns
    else {
        return None;
    };
    let narrow = |column| number(column, 0).and_then(|n| u32::try_from(n).ok());
    let pair =
        |rd, wr, (default_rd, default_wr)| Some((number(rd, default_rd)?, number(wr, default_wr)?));
    let host = pair(host_rd, host_wr, (0, 0))?;
    let has = |what| address.split('+').any(|kind| kind == what);
    Some(Field {
        name,
        id: number(id, 0)?,
        class: number(class, 0)? as u8,
        code: narrow(code)?,
        fields: narrow(fields)?,
        elements: narrow(elements)?,
        size: narrow(size)?,
        address: match () {
            () if has("gpa") => AddressKind::PrivateGpa,
            () if has("hpa") && has("shared") => AddressKind::SharedHpa,
            () if has("hpa") => AddressKind::Hpa,
            () => AddressKind::None,
        },
        export,
        import,
        first: 0,
        masks: Masks {
            host,
            host_of_debug: pair(debug_rd, debug_wr, host)?,
            guest: pair(guest_rd, guest_wr, (0, 0))?,
            service_td: pair(service_rd, service_wr, (0, 0))?,
            migration: pair(export_mask, import_mask, (0, 0))?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Table; 5] = [
        Table::Sys,
        Table::Td,
        Table::Vcpu,
        Table::Vmcs,
        Table::L2Vmcs,
    ];

    #[test]
    fn every_line_of_the_file_is_a_row() {
        let rows: usize = ALL.iter().map(|t| t.rows().len()).sum();
        assert_eq!(rows, FIELDS.lines().count() - 1);
    }

    #[test]
    fn an_identifier_says_what_its_row_says() {
        for f in ALL.iter().flat_map(|t| t.rows()) {
            assert_eq!(key_of(f.id), (f.class, f.code), "{}", f.name);
            assert_eq!(1 << (f.id >> id::SIZE_SHIFT & 3), f.size, "{}", f.name);
            assert_eq!(f.id & (id::RESERVED), 0, "{}", f.name);
        }
    }

    #[test]
    fn every_element_is_found_at_its_position() {
        for table in ALL {
            let mut next = 0;
            for (row, f) in table.rows().iter().enumerate() {
                assert_eq!(f.first, next);
                if f.is_vmcs() {
                    continue;
                }
                next += f.len() as usize;
                for element in 0..f.len() {
                    let key = (f.class, f.code + element * table.stride());
                    assert_eq!(table.find(key), Some((row, element)), "{}", f.name);
                    assert_eq!(table.position(key), Some(f.first + element as usize));
                }
            }
        }
    }

    #[test]
    fn each_encoding_has_the_position_of_its_row_or_none() {
        for table in [Table::Vmcs, Table::L2Vmcs] {
            for code in 0..0x1_0000 {
                let place =
                    |(row, element): (usize, u32)| table.rows()[row].first + element as usize;
                let position = table.find((0, code)).map(place);
                assert_eq!(table.position((0, code)), position, "{code:#x}");
            }
        }
    }

    #[test]
    fn odd_vmcs_codes_and_unknown_codes_have_no_row() {
        assert_eq!(Table::Vmcs.find((0, 0x2011)), None);
        assert_eq!(Table::Td.find((0x11, 0x18)), None);
        assert_eq!(Table::Sys.find((0x3F, 0)), None);
    }

    #[test]
    fn whoever_may_write_bits_may_read_the_field() {
        let agents = [Agent::HostOfDebug, Agent::Guest];
        for f in ALL.iter().flat_map(|t| t.rows()) {
            for agent in agents {
                assert!(
                    f.write_mask(agent) == 0 || f.read_mask(agent) != 0,
                    "{} {agent:?}",
                    f.name
                );
            }
        }
    }
}
