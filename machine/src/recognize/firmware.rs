//! Firmware: the code at the reset vector, OVMF's table of GUIDed entries, and firmware volumes.

use super::{FileKind, Recognition, field, hex};

/// The table ends this far before the end of the image, with its own GUID
/// (edk2 OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm).
const TABLE_END: usize = 32;
/// An entry ends in its size, 2 bytes, and its GUID.
const ENTRY_TAIL: usize = 18;

/// 96b582de-1fb2-45f7-baea-a366c55a082d
const TABLE: [u8; 16] = [
    0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d,
];
/// e47a6535-984a-4798-865e-4685a7bf8ec2
const TDX_METADATA: [u8; 16] = [
    0x35, 0x65, 0x7a, 0xe4, 0x4a, 0x98, 0x98, 0x47, 0x86, 0x5e, 0x46, 0x85, 0xa7, 0xbf, 0x8e, 0xc2,
];
/// dc886566-984a-4798-a75e-5585a7bf67cc
const SEV_METADATA: [u8; 16] = [
    0x66, 0x65, 0x88, 0xdc, 0x4a, 0x98, 0x98, 0x47, 0xa7, 0x5e, 0x55, 0x85, 0xa7, 0xbf, 0x67, 0xcc,
];
/// The file system of EFI's variables: fff12b8d-7696-4c8b-a985-2747075b4f50.
const VARIABLES: [u8; 16] = [
    0x8d, 0x2b, 0xf1, 0xff, 0x96, 0x76, 0x8b, 0x4c, 0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50,
];
/// Fields of a firmware volume's header (UEFI PI vol. 3, 3.2.1).
const VOLUME_GUID: usize = 0x10;
const VOLUME_LENGTH: usize = 0x20;
const VOLUME_SIGNATURE: usize = 0x28;

const PAGE: usize = 0x1000;
/// The smallest ROM that is recognised by its reset vector. Smaller files with a jump near their end are more often
/// something else.
const SMALLEST: usize = 0x1_0000;
/// The reset vector lies this far before the end.
const RESET: usize = 16;

pub(super) fn look(bytes: &[u8]) -> Option<Recognition> {
    if !bytes.len().is_multiple_of(PAGE) {
        return volume(bytes);
    }
    if let Some(table) = entries(bytes) {
        return Some(with_table(&table));
    }
    if bytes.len() >= SMALLEST {
        let vector = &bytes[bytes.len() - RESET..];
        if let Some(jump) = jump(vector) {
            let why = format!(
                "{:#x} bytes of whole pages, and a jump at the reset vector ({})",
                bytes.len(),
                hex(jump)
            );
            return Some(Recognition::new(FileKind::Rom, why));
        }
    }
    volume(bytes)
}

fn with_table(entries: &[[u8; 16]]) -> Recognition {
    let has = |guid| entries.contains(guid);
    let mut metadata = Vec::new();
    metadata.extend(has(&TDX_METADATA).then_some("TDX metadata"));
    metadata.extend(has(&SEV_METADATA).then_some("SEV metadata"));
    let metadata = match metadata.as_slice() {
        [] => "no metadata of confidential VMs".to_owned(),
        some => some.join(" and "),
    };
    let kind = if has(&TDX_METADATA) {
        FileKind::Tdvf
    } else {
        FileKind::Ovmf
    };
    let why = format!(
        "a table of GUIDed entries ends 32 bytes before its end ({}), with {metadata}",
        "96b582de-1fb2-45f7-baea-a366c55a082d"
    );
    Recognition::new(kind, why)
}

/// The GUIDs of the table's entries. `None` without a table; entries behind a bad one are left out.
fn entries(bytes: &[u8]) -> Option<Vec<[u8; 16]>> {
    let end = bytes.len().checked_sub(TABLE_END)?;
    let (guid, size) = tail(&bytes[..end])?;
    if guid != TABLE {
        return None;
    }
    let start = end.checked_sub(size)?;
    let mut rest = &bytes[start..end.checked_sub(ENTRY_TAIL)?.max(start)];
    let mut found = Vec::new();
    while let Some((guid, size)) = tail(rest) {
        if size < ENTRY_TAIL || size > rest.len() {
            break;
        }
        found.push(guid);
        rest = &rest[..rest.len() - size];
    }
    Some(found)
}

/// The GUID and the size of the entry that ends here.
fn tail(bytes: &[u8]) -> Option<([u8; 16], usize)> {
    let at = bytes.len().checked_sub(ENTRY_TAIL)?;
    let size = u16::from_le_bytes(field(bytes, at)?);
    Some((field(bytes, at + 2)?, size.into()))
}

/// The bytes from the reset vector to its jump, if only what firmware puts before one is there: NOP, CLI,
/// CLD, INVD, WBINVD, and a look at CR0.PE.
fn jump(vector: &[u8]) -> Option<&[u8]> {
    const BEFORE: [&[u8]; 6] = [
        &[0x90],
        &[0xfa],
        &[0xfc],
        &[0x0f, 0x08],
        &[0x0f, 0x09],
        // mov eax, cr0; test al, 1; jz +5, which skips the jump of protected mode
        &[0x0f, 0x20, 0xc0, 0xa8, 0x01, 0x74, 0x05],
    ];
    let mut rest = vector;
    while let Some(skipped) = BEFORE.iter().find_map(|code| rest.strip_prefix(*code)) {
        rest = skipped;
    }
    let size = match *rest {
        // Back into the segment: forwards lies the end of the address space.
        [0xe9, _, high, ..] if high >= 0x80 => 3,
        [0xeb, back, ..] if back >= 0x80 => 2,
        // To the ROM below 1 MiB.
        [0xea, _, _, _, segment, ..] if segment >= 0xc0 => 5,
        _ => return None,
    };
    Some(&vector[..vector.len() - rest.len() + size])
}

/// A firmware volume at the start of a file that has no code at the reset vector.
fn volume(bytes: &[u8]) -> Option<Recognition> {
    if field(bytes, VOLUME_SIGNATURE)? != *b"_FVH" {
        return None;
    }
    let variables = field(bytes, VOLUME_GUID)? == VARIABLES;
    let length = u64::from_le_bytes(field(bytes, VOLUME_LENGTH)?);
    if variables && length == bytes.len() as u64 {
        let why = format!("one firmware volume of {length:#x} bytes, for variables");
        return Some(Recognition::new(FileKind::VariableStore, why));
    }
    let why = format!(
        "a firmware volume begins it, and its {:#x} bytes do not end in code for the reset vector",
        bytes.len()
    );
    Some(Recognition::new(FileKind::CutFirmware, why))
}
