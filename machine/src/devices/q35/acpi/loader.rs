//! The script by which firmware puts tables into memory and links them (QEMU hw/acpi/bios-linker-loader.c, `etc/table-loader`).

/// Bytes of a command, and of a file's name with its zero.
const COMMAND: usize = 128;
const NAME: usize = 56;

const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;

/// The zone of an allocation.
#[derive(Clone, Copy)]
pub(super) enum Zone {
    High = 1,
    /// 0xe0000 to 0xfffff, where a BIOS puts the root pointer.
    FSegment = 2,
}

#[derive(Default)]
pub(super) struct Script(Vec<u8>);

impl Script {
    /// Allocates memory for a file and copies it there.
    pub(super) fn allocate(&mut self, file: &str, align: u32, zone: Zone) {
        self.command(
            ALLOCATE,
            &[&name(file), &align.to_le_bytes(), &[zone as u8]],
        );
    }

    /// Adds the address of a file to the pointer of `bytes` bytes at an offset in another, which holds an offset.
    pub(super) fn add_pointer(&mut self, to: &str, at: u32, bytes: u8, of: &str) {
        let parts: [&[u8]; 4] = [&name(to), &name(of), &at.to_le_bytes(), &[bytes]];
        self.command(ADD_POINTER, &parts);
    }

    /// Puts the checksum of a range into the byte at an offset of the file, which holds 0.
    pub(super) fn add_checksum(&mut self, file: &str, at: u32, start: u32, bytes: u32) {
        let numbers = [at, start, bytes].map(u32::to_le_bytes);
        self.command(ADD_CHECKSUM, &[&name(file), numbers.as_flattened()]);
    }

    fn command(&mut self, command: u32, parts: &[&[u8]]) {
        let start = self.0.len();
        self.0.extend(command.to_le_bytes());
        parts.iter().for_each(|part| self.0.extend_from_slice(part));
        self.0.resize(start + COMMAND, 0);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// A name with zeros behind it.
fn name(file: &str) -> [u8; NAME] {
    let mut name = [0; NAME];
    let len = file.len().min(NAME - 1);
    name[..len].copy_from_slice(&file.as_bytes()[..len]);
    name
}
