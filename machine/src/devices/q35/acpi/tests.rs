//! The tables as firmware sees them: the script is run, and what it leaves is followed from the root pointer.

use std::collections::BTreeMap;

use super::*;

const DIRECTORY: u16 = 0x19;
const ENTRY: usize = 64;

/// The files by their names.
fn files(facts: Facts) -> BTreeMap<String, Vec<u8>> {
    let mut items = Items::new(facts.vcpus);
    put(&mut items, facts);
    let named = |entry: &[u8]| {
        let key = u16::from_be_bytes([entry[4], entry[5]]);
        (text(&entry[8..]), items.get(key).to_vec())
    };
    items.get(DIRECTORY)[4..].chunks(ENTRY).map(named).collect()
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap();
    String::from_utf8(bytes[..end].to_vec()).unwrap()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Memory after the script ran: the files by their addresses.
fn run(facts: Facts) -> BTreeMap<u32, Vec<u8>> {
    let mut files = files(facts);
    let script = files.remove(LOADER).unwrap();
    let mut places = BTreeMap::new();
    let mut next = 0xe_0000;
    for command in script.chunks(128) {
        let file = text(&command[4..60]);
        match word(command, 0) {
            1 => {
                let align = word(command, 60);
                next = u32::next_multiple_of(next, align);
                places.insert(file.clone(), next);
                next += files[&file].len() as u32;
            }
            2 => {
                let (of, at) = (
                    places[&text(&command[60..116])],
                    word(command, 116) as usize,
                );
                let pointer = &mut files.get_mut(&file).unwrap()[at..][..command[120].into()];
                let mut value = [0; 8];
                value[..pointer.len()].copy_from_slice(pointer);
                let value = u64::from_le_bytes(value) + u64::from(of);
                pointer.copy_from_slice(&value.to_le_bytes()[..pointer.len()]);
            }
            3 => {
                let [at, start, len] = [60, 64, 68].map(|at| word(command, at) as usize);
                let bytes = files.get_mut(&file).unwrap();
                assert_eq!(bytes[at], 0);
                bytes[at] = sum(&bytes[start..][..len]).wrapping_neg();
            }
            // Behind the last one.
            0 => assert_eq!(command, [0; 128]),
            other => panic!("command {other}"),
        }
    }
    places
        .into_iter()
        .map(|(file, at)| (at, files.remove(&file).unwrap()))
        .collect()
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The bytes from an address on.
fn at(memory: &BTreeMap<u32, Vec<u8>>, address: u32) -> &[u8] {
    let (start, file) = memory.range(..=address).next_back().unwrap();
    &file[(address - start) as usize..]
}

/// A table with a header, whose sum is right.
fn table(memory: &BTreeMap<u32, Vec<u8>>, address: u32) -> &[u8] {
    let bytes = at(memory, address);
    let table = &bytes[..word(bytes, 4) as usize];
    assert_eq!(sum(table), 0, "{:?}", std::str::from_utf8(&table[..4]));
    table
}

fn tables(memory: &BTreeMap<u32, Vec<u8>>) -> BTreeMap<&[u8], &[u8]> {
    let is_root = |file: &&Vec<u8>| file.starts_with(b"RSD PTR ");
    let root = memory.values().find(is_root).unwrap();
    assert_eq!((sum(&root[..20]), sum(&root[..36])), (0, 0));
    let xsdt = table(memory, word(root, 24));
    let entries = xsdt[36..]
        .chunks(8)
        .map(|entry| table(memory, word(entry, 0)));
    entries.map(|table| (&table[..4], table)).collect()
}

fn facts(vcpus: u32) -> Facts {
    Facts {
        vcpus,
        has_pic: false,
        ram_end: 0x1000_0000,
        window: Some(WINDOW),
    }
}

const WINDOW: Window = Window {
    at: 0xb000_0000,
    buses: 256,
};

#[test]
fn the_script_links_every_table_with_a_right_sum() {
    let memory = run(facts(1));
    let tables = tables(&memory);
    assert_eq!(
        tables.keys().copied().collect::<Vec<_>>(),
        [&b"APIC"[..], b"FACP", b"MCFG"]
    );
    let fadt = tables[&b"FACP"[..]];
    assert_eq!(
        table(&memory, word(fadt, FADT_DSDT as usize))[..4],
        *b"DSDT"
    );
    let facs = word(fadt, FADT_FACS as usize);
    assert_eq!((facs % 64, &at(&memory, facs)[..4]), (0, &b"FACS"[..]));
    let space = tables[&b"MCFG"[..]];
    assert_eq!(word(space, 44), WINDOW.at as u32);
    assert_eq!(space[54..56], [0, 0xff]);
}

#[test]
fn tables_in_memory_are_those_that_firmware_links() {
    let mut memory = run(facts(4));
    let (address, file) = memory.pop_last().unwrap();
    let (root, tables) = super::at(address, facts(4));
    assert_eq!(memory.into_values().collect::<Vec<_>>(), [root]);
    assert!(file.starts_with(&tables) && !tables.is_empty());
}

#[test]
fn files_keep_their_sizes_when_the_window_opens() {
    let sizes = |window| {
        let files = files(Facts { window, ..facts(4) });
        files
            .into_iter()
            .map(|(name, file)| (name, file.len()))
            .collect::<Vec<_>>()
    };
    assert_eq!(sizes(None), sizes(Some(WINDOW)));
    assert_eq!(sizes(None).len(), FILES.len());
}

#[test]
fn a_window_that_is_closed_is_in_no_table() {
    let closed = Facts {
        window: None,
        ..facts(1)
    };
    let memory = run(closed);
    let tables = tables(&memory);
    assert_eq!(
        tables.keys().copied().collect::<Vec<_>>(),
        [&b"APIC"[..], b"FACP"]
    );
}

#[test]
fn the_bridge_passes_on_what_lies_between_ram_and_interrupt_controller_but_for_the_window() {
    let pieces = |at, buses| {
        let window = (buses != 0).then_some(Window { at, buses });
        dsdt::device_memory(&Facts { window, ..facts(1) })
    };
    let all = (0x1000_0000, 0xfebf_ffff);
    assert_eq!(pieces(0, 0), [all]);
    let around = [(all.0, 0xafff_ffff), (0xc000_0000, all.1)];
    assert_eq!(pieces(0xb000_0000, 256), around);
    let to_the_end = [(all.0, 0xefff_ffff)];
    assert_eq!(pieces(0xf000_0000, 256), to_the_end);
    assert_eq!(pieces(0x1000_0000, 64), [(0x1400_0000, all.1)]);
    assert_eq!(pieces(0x8_0000_0000, 256), [all]);
}

#[test]
fn the_fixed_table_has_the_ports_that_answer() {
    let memory = run(facts(1));
    let fadt = tables(&memory)[&b"FACP"[..]];
    // PM1a event, PM1a control, timer and GPE0 blocks; none of the others, and no port for system management.
    let blocks: Vec<_> = (48..=84).step_by(4).map(|at| word(fadt, at)).collect();
    assert_eq!(blocks[1..], [0, 0x600, 0, 0x604, 0, 0, 0x608, 0x620, 0][..]);
}

#[test]
fn each_vcpu_has_its_local_apic_and_large_ids_are_x2apics() {
    for vcpus in [1, 4, 255, 256, 4096] {
        let memory = run(facts(vcpus));
        let madt = tables(&memory)[&b"APIC"[..]];
        let mut ids = Vec::new();
        let mut rest = &madt[44..];
        while let [kind, len, body @ ..] = rest {
            match kind {
                0 => ids.push(body[1].into()),
                9 => ids.push(word(body, 2)),
                1 => assert_eq!(word(body, 2), ioapic::BASE as u32),
                other => panic!("structure {other}"),
            }
            rest = &rest[usize::from(*len)..];
        }
        assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
    }
}
