//! Each kind of file by a file that is made here; and files of distributions, where they are installed.

use proptest::prelude::*;

use super::super::samples::{bzimage, elf};
use super::{FileKind, Recognition};

const GUIDS: [(&str, [u8; 16]); 3] = [
    // 96b582de-1fb2-45f7-baea-a366c55a082d
    (
        "table",
        *b"\xde\x82\xb5\x96\xb2\x1f\xf7\x45\xba\xea\xa3\x66\xc5\x5a\x08\x2d",
    ),
    // e47a6535-984a-4798-865e-4685a7bf8ec2
    (
        "tdx",
        *b"\x35\x65\x7a\xe4\x4a\x98\x98\x47\x86\x5e\x46\x85\xa7\xbf\x8e\xc2",
    ),
    // dc886566-984a-4798-a75e-5585a7bf67cc
    (
        "sev",
        *b"\x66\x65\x88\xdc\x4a\x98\x98\x47\xa7\x5e\x55\x85\xa7\xbf\x67\xcc",
    ),
];

fn guid(name: &str) -> [u8; 16] {
    GUIDS
        .into_iter()
        .find(|(known, _)| *known == name)
        .unwrap()
        .1
}

fn kind(bytes: &[u8]) -> FileKind {
    Recognition::of(bytes).kind()
}

/// Bytes at an offset of a file of that size that has no other mark.
fn file(bytes: usize, marks: &[(usize, &[u8])]) -> Vec<u8> {
    let mut file = vec![0x11; bytes];
    for (at, mark) in marks {
        file[*at..at + mark.len()].copy_from_slice(mark);
    }
    file
}

/// A ROM with these bytes at the reset vector.
fn rom(vector: &[u8]) -> Vec<u8> {
    file(0x1_0000, &[(0xfff0, vector)])
}

/// A ROM whose table has an empty entry for each of these names.
fn with_table(names: &[&str]) -> Vec<u8> {
    let mut table = Vec::new();
    for name in names {
        table.extend([&18_u16.to_le_bytes()[..], &guid(name)].concat());
    }
    let size = table.len() as u16 + 18;
    table.extend([&size.to_le_bytes()[..], &guid("table")].concat());
    let mut rom = rom(&[0x0f, 0x20, 0xc0]);
    let end = rom.len() - 32;
    rom[end - table.len()..end].copy_from_slice(&table);
    rom
}

/// A PE file for EFI, or not.
fn pe(subsystem: u16) -> Vec<u8> {
    let subsystem = subsystem.to_le_bytes();
    file(
        0x200,
        &[
            (0, b"MZ"),
            (0x3c, &[0x40, 0, 0, 0]),
            (0x40, b"PE\0\0\x64\x86"),
            (0x9c, &subsystem),
        ],
    )
}

/// The header of a firmware volume of that length.
fn volume(variables: bool, length: u64, bytes: usize) -> Vec<u8> {
    let nv = b"\x8d\x2b\xf1\xff\x96\x76\x8b\x4c\xa9\x85\x27\x47\x07\x5b\x4f\x50";
    let guid: &[u8] = if variables { nv } else { &[0x22; 16] };
    let length = length.to_le_bytes();
    file(bytes, &[(0x10, guid), (0x20, &length), (0x28, b"_FVH")])
}

/// An ELF file of that machine, in either byte order.
fn foreign(machine: u16, big: bool) -> Vec<u8> {
    let machine = if big {
        machine.to_be_bytes()
    } else {
        machine.to_le_bytes()
    };
    let head = [0x7f, b'E', b'L', b'F', 2, 1 + u8::from(big), 1];
    file(64, &[(0, &head), (16, &[0, 2]), (18, &machine)])
}

/// The bytes of an i386 or x86-64 program that starts at 1 MiB.
fn program(long: bool) -> Vec<u8> {
    elf(long, 0x10_0000, 0x10_0000, &[0xf4], 1)
}

#[test]
fn each_kind_of_file_is_recognised() {
    let mut with_interpreter = program(true);
    with_interpreter[64] = 3; // p_type: PT_INTERP
    let mut object = program(true);
    object[16] = 1; // e_type: ET_REL
    let mut lkrn = bzimage(&[0xf4], &[0xf4], false);
    lkrn[0x214..0x218].fill(0);
    let mut efi_kernel = bzimage(&[0xf4], &[0xf4], true);
    efi_kernel[..2].copy_from_slice(b"MZ");
    let sector = file(512, &[(510, &[0x55, 0xaa])]);
    let hybrid = file(0x9000, &[(510, &[0x55, 0xaa]), (0x8001, b"CD001")]);
    let table = [
        (vec![], FileKind::Empty),
        (vec![0], FileKind::Blank),
        (vec![0; 512], FileKind::Blank),
        (vec![0xff; 0x2_0000], FileKind::Blank),
        (program(true), FileKind::Elf),
        (program(false), FileKind::Elf),
        (with_interpreter, FileKind::UserProgram),
        (object, FileKind::ObjectFile),
        (foreign(183, false), FileKind::ForeignElf),
        (foreign(20, true), FileKind::ForeignElf),
        // A big-endian file of an x86 number is none for x86.
        (foreign(62, true), FileKind::ForeignElf),
        (bzimage(&[], &[0xf4], true), FileKind::BzImage),
        (efi_kernel, FileKind::BzImage),
        (lkrn, FileKind::RealModeKernel),
        (with_table(&[]), FileKind::Ovmf),
        (with_table(&["sev"]), FileKind::Ovmf),
        (with_table(&["tdx", "sev"]), FileKind::Tdvf),
        (volume(true, 0x2_0000, 0x2_0000), FileKind::VariableStore),
        (volume(true, 0x2_0000, 0x8_0000), FileKind::CutFirmware),
        (volume(false, 0x2_0000, 0x1_1234), FileKind::CutFirmware),
        (file(0x400, &[(0, &[0x55, 0xaa, 2])]), FileKind::OptionRom),
        (pe(10), FileKind::EfiApplication),
        (pe(3), FileKind::DosProgram),
        (
            file(0x200, &[(0, b"MZ"), (8, &[4, 0])]),
            FileKind::DosProgram,
        ),
        (hybrid, FileKind::Iso9660),
        (sector.clone(), FileKind::BootSector),
        ([sector, vec![0; 512]].concat(), FileKind::Disk),
        (b"\x1f\x8b\x08\x00rest".to_vec(), FileKind::Packed),
        (b"\x28\xb5\x2f\xfdrest".to_vec(), FileKind::Packed),
        (file(0x400, &[(257, b"ustar")]), FileKind::Packed),
        (b"QFI\xfb\0\0\0\x03".to_vec(), FileKind::Disk),
        (b"070701000000".to_vec(), FileKind::Initrd),
        (b"\xd0\x0d\xfe\xed\0\0".to_vec(), FileKind::UBoot),
        (b"#!/bin/sh\n".to_vec(), FileKind::Text),
        (
            b"root:x:0:0:root:/root:/bin/bash\n".to_vec(),
            FileKind::Text,
        ),
        ("\u{e4}".repeat(0x1000).into_bytes(), FileKind::Text),
        (vec![0xf4], FileKind::Unknown),
        (b"hlt".to_vec(), FileKind::Unknown),
        (vec![0x90; 0x3000], FileKind::Unknown),
    ];
    for (bytes, expected) in table {
        let found = Recognition::of(&bytes);
        assert_eq!(found.kind(), expected, "{}", found.why());
        assert!(!found.why().is_empty() && !expected.name().is_empty());
        // Every kind that does not run has a way out.
        assert_eq!(
            expected.format().is_none(),
            !expected.advice().is_empty(),
            "{expected:?}"
        );
    }
}

#[test]
fn a_rom_has_a_jump_at_the_reset_vector_and_whole_pages() {
    let jumps: [&[u8]; 8] = [
        &[0xea, 0x5b, 0xe0, 0x00, 0xf0], // SeaBIOS
        &[0xfa, 0xfc, 0xe9, 0x0b, 0xf8], // U-Boot
        &[0x90, 0x90, 0xe9, 0x5b, 0xff], // OVMF of 4 MiB
        &[0x0f, 0x09, 0xe9, 0x00, 0xf0], // WBINVD first
        &[0x0f, 0x08, 0x90, 0xeb, 0x80], // INVD first
        &[0xeb, 0xf0],
        &[0xe9, 0x00, 0x80],
        &[
            0x0f, 0x20, 0xc0, 0xa8, 0x01, 0x74, 0x05, 0xe9, 0x28, 0xff, 0xff, 0xff,
        ], // a TDVF
    ];
    for vector in jumps {
        assert_eq!(kind(&rom(vector)), FileKind::Rom, "{vector:02x?}");
        let with_a_byte = [rom(vector), vec![0x11]].concat();
        assert_eq!(kind(&with_a_byte), FileKind::Unknown, "{vector:02x?}");
        let small = &rom(vector)[0x8000..];
        assert_eq!(kind(small), FileKind::Unknown, "{vector:02x?}");
    }
    let others: [&[u8]; 6] = [
        &[0xf4],             // no jump
        &[0xe9, 0x00, 0x10], // forwards, beyond 4 GiB
        &[0xeb, 0x10],
        &[0xea, 0x00, 0x00, 0x00, 0x10], // into RAM
        &[0xb8, 0xe9, 0x00, 0xff],       // E9 is no instruction here
        &[0x90; 16],
    ];
    for vector in others {
        assert_eq!(kind(&rom(vector)), FileKind::Unknown, "{vector:02x?}");
    }
}

#[test]
fn the_reason_names_processor_table_and_protocol() {
    for (bytes, text) in [
        (foreign(183, false), "(AARCH64), machine 0xb7"),
        (foreign(0xfeed, true), "a 64-bit header of machine 0xfeed"),
        (program(true), "it starts in long mode"),
        (program(false), "it starts in protected mode"),
        (
            with_table(&["tdx", "sev"]),
            "with TDX metadata and SEV metadata",
        ),
        (with_table(&[]), "no metadata of confidential VMs"),
        (bzimage(&[], &[0xf4], true), "boot protocol 2.15"),
        (
            rom(&[0xfa, 0xe9, 0, 0xf0]),
            "at the reset vector (fa e9 00 f0)",
        ),
        (vec![0; 16], "each of its 0x10 bytes is 0x00"),
        (b"\x1f\x8b".to_vec(), "1f 8b, as gzip does"),
    ] {
        let found = Recognition::of(&bytes);
        assert!(found.why().contains(text), "{text}: {}", found.why());
    }
}

#[test]
fn files_of_distributions_are_recognised_where_they_are_installed() {
    let mut seen = 0;
    for (path, expected) in [
        ("/usr/share/seabios/bios.bin", FileKind::Rom),
        ("/usr/share/seabios/bios-256k.bin", FileKind::Rom),
        ("/usr/share/seabios/bios-microvm.bin", FileKind::Rom),
        ("/usr/share/seabios/vgabios-stdvga.bin", FileKind::OptionRom),
        ("/usr/share/ovmf/OVMF.fd", FileKind::Tdvf),
        ("/usr/share/OVMF/OVMF_CODE.fd", FileKind::Tdvf),
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", FileKind::Ovmf),
        ("/usr/share/OVMF/OVMF_VARS.fd", FileKind::VariableStore),
        ("/usr/share/OVMF/OVMF_VARS_4M.fd", FileKind::VariableStore),
        ("/usr/lib/ipxe/ipxe.iso", FileKind::Iso9660),
        ("/boot/ipxe.lkrn", FileKind::RealModeKernel),
        ("/usr/lib/u-boot/qemu-x86_64/u-boot.rom", FileKind::Rom),
        ("/usr/lib/u-boot/qemu_arm64/uboot.elf", FileKind::ForeignElf),
        ("/bin/sh", FileKind::UserProgram),
        ("/etc/passwd", FileKind::Text),
    ] {
        let Ok(bytes) = std::fs::read(path) else {
            println!("skipped: {path} is not there");
            continue;
        };
        seen += 1;
        let found = Recognition::of(&bytes);
        assert_eq!(found.kind(), expected, "{path}: {}", found.why());
    }
    println!("{seen} files looked at");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_damage_to_a_file_makes_it_panic(
        sample in 0..6_usize,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        keep in any::<prop::sample::Index>(),
    ) {
        let samples = [
            program(true),
            bzimage(&[0xf4], &[0xf4], true),
            with_table(&["tdx", "sev"]),
            volume(true, 0x2_0000, 0x2_0000),
            pe(10),
            foreign(183, false),
        ];
        let mut file = samples[sample].clone();
        for (at, byte) in damage {
            let at = at.index(file.len());
            file[at] = byte;
        }
        let _ = Recognition::of(&file);
        file.truncate(keep.index(file.len() + 1));
        let _ = Recognition::of(&file);
    }
}
