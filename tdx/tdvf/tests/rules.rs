//! Every rule of the metadata refuses the image that breaks it, and says where.

mod common;

use common::{bfv, memory, ovmf, pattern};
use kvm_ops_tdvf::{
    Attributes, ComposeError, MAX_GPA, Section, SectionFault as Fault, SectionKind as Kind, Tdvf,
    TdvfError as E, compose,
};

const LEN: usize = 0x2000;
/// From the end: 32 bytes, the footer, the pointer's entry, three sections, the header.
const TABLE: usize = LEN - 32 - 18 - 22;
const DESCRIPTOR: usize = TABLE - 3 * 32 - 16;
const FIRST: usize = DESCRIPTOR + 16;
const POINTER: usize = TABLE + 4;
const FOOTER: usize = TABLE + 22;

fn sections() -> [Section; 3] {
    [
        bfv(LEN as u32),
        memory(Kind::TdHob, 0x80_9000, 0x2000),
        memory(Kind::TempMem, 0x81_0000, 0x1000),
    ]
}

fn image() -> Vec<u8> {
    let mut image = pattern(LEN);
    compose(&mut image, &sections()).unwrap();
    image
}

fn patched(at: usize, bytes: &[u8]) -> Result<Vec<Section>, E> {
    let mut image = image();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    Tdvf::parse(&image).map(|tdvf| tdvf.sections().to_vec())
}

fn fault(index: usize, fault: Fault) -> E {
    E::Section {
        index,
        offset: FIRST + index * 32,
        fault,
    }
}

#[test]
fn what_was_composed_is_read() {
    let image = image();
    let tdvf = Tdvf::parse(&image).unwrap();
    assert_eq!(tdvf.sections(), sections());
    assert_eq!(tdvf.metadata_offset(), DESCRIPTOR);
}

#[test]
fn a_damaged_table_is_refused_with_its_place() {
    let length = |n: u16| n.to_le_bytes();
    for (at, bytes, error) in [
        (FOOTER + 2, &b"x"[..], E::NoTable { length: LEN }),
        (
            FOOTER,
            &length(17),
            E::EntryLength {
                offset: FOOTER,
                length: 17,
            },
        ),
        (
            FOOTER,
            &length(0),
            E::EntryLength {
                offset: FOOTER,
                length: 0,
            },
        ),
        (
            FOOTER,
            &length(0xffff),
            E::EntryLength {
                offset: FOOTER,
                length: 0xffff,
            },
        ),
        // A footer that ends in the middle of the entry before it.
        (
            FOOTER,
            &length(30),
            E::EntryLength {
                offset: FOOTER - 12,
                length: 12,
            },
        ),
        (FOOTER, &length(18), E::NoMetadata { table: FOOTER }),
        (
            POINTER,
            &length(17),
            E::EntryLength {
                offset: POINTER,
                length: 17,
            },
        ),
        (
            POINTER,
            &length(23),
            E::EntryLength {
                offset: POINTER,
                length: 23,
            },
        ),
        // An entry of the right GUID without room for the pointer, and a byte left over.
        (
            POINTER,
            &length(18),
            E::EntryLength {
                offset: POINTER,
                length: 18,
            },
        ),
        (POINTER + 2, b"x", E::NoMetadata { table: TABLE }),
        (
            TABLE,
            &0_u32.to_le_bytes(),
            E::Pointer {
                offset: TABLE,
                from_end: 0,
            },
        ),
        (
            TABLE,
            &15_u32.to_le_bytes(),
            E::Pointer {
                offset: TABLE,
                from_end: 15,
            },
        ),
        (
            TABLE,
            &[0xff; 4],
            E::Pointer {
                offset: TABLE,
                from_end: u32::MAX,
            },
        ),
        (
            TABLE,
            &(LEN as u32 + 1).to_le_bytes(),
            E::Pointer {
                offset: TABLE,
                from_end: LEN as u32 + 1,
            },
        ),
    ] {
        assert_eq!(patched(at, bytes), Err(error), "{at:#x} {bytes:x?}");
    }
}

#[test]
fn a_second_entry_for_the_metadata_is_refused() {
    let mut image = image();
    let entry = image[TABLE..FOOTER].to_vec();
    image[TABLE - 22..TABLE].copy_from_slice(&entry);
    image[FOOTER..FOOTER + 2].copy_from_slice(&(18_u16 + 44).to_le_bytes());
    let offset = TABLE - 18;
    assert_eq!(Tdvf::parse(&image), Err(E::SecondEntry { offset }));
}

#[test]
fn entries_of_others_in_the_table_are_passed_over() {
    let mut image = image();
    // An empty entry with another GUID, before ours.
    image[TABLE - 18..TABLE - 16].copy_from_slice(&18_u16.to_le_bytes());
    image[TABLE - 16..TABLE].copy_from_slice(&[0x11; 16]);
    image[FOOTER..FOOTER + 2].copy_from_slice(&(18_u16 + 22 + 18).to_le_bytes());
    // It covers the end of the descriptor, which moves to the front of the image.
    let descriptor = self::image()[DESCRIPTOR..TABLE].to_vec();
    image[..descriptor.len()].copy_from_slice(&descriptor);
    image[TABLE..TABLE + 4].copy_from_slice(&(LEN as u32).to_le_bytes());
    let tdvf = Tdvf::parse(&image).unwrap();
    assert_eq!(
        (tdvf.sections(), tdvf.metadata_offset()),
        (&sections()[..], 0)
    );
}

#[test]
fn every_truncation_of_an_image_is_refused() {
    let image = image();
    for length in 0..LEN {
        let (front, back) = (&image[..length], &image[LEN - length..]);
        assert_eq!(
            Tdvf::parse(front),
            Err(E::NoTable { length }),
            "{length:#x}"
        );
        assert!(Tdvf::parse(back).is_err(), "the last {length:#x} bytes");
    }
}

#[test]
fn a_damaged_descriptor_is_refused_with_its_place() {
    let offset = DESCRIPTOR;
    let number = |n: u32| n.to_le_bytes();
    for (at, value, error) in [
        (
            0,
            u32::from_le_bytes(*b"_TDX"),
            E::Signature {
                offset,
                found: 0x5844_545f,
            },
        ),
        (
            8,
            0,
            E::Version {
                offset: offset + 8,
                version: 0,
            },
        ),
        (
            8,
            2,
            E::Version {
                offset: offset + 8,
                version: 2,
            },
        ),
        (
            12,
            0,
            E::NoSections {
                offset: offset + 12,
            },
        ),
        (
            12,
            2,
            E::Length {
                offset: offset + 4,
                length: 112,
                sections: 2,
            },
        ),
        (
            12,
            u32::MAX,
            E::Length {
                offset: offset + 4,
                length: 112,
                sections: u32::MAX,
            },
        ),
        (
            4,
            0,
            E::Length {
                offset: offset + 4,
                length: 0,
                sections: 3,
            },
        ),
        (
            4,
            113,
            E::Length {
                offset: offset + 4,
                length: 113,
                sections: 3,
            },
        ),
    ] {
        assert_eq!(
            patched(offset + at, &number(value)),
            Err(error),
            "{at} {value:#x}"
        );
    }
    // Length and number agree, and lead out of the image.
    let mut image = image();
    let sections = 0x100_u32;
    let length = 16 + 32 * sections;
    image[offset + 4..offset + 8].copy_from_slice(&number(length));
    image[offset + 12..offset + 16].copy_from_slice(&number(sections));
    assert_eq!(Tdvf::parse(&image), Err(E::Truncated { offset, length }));
}

/// Offsets in a section's entry.
const OFFSET: usize = 0;
const RAW: usize = 4;
const ADDRESS: usize = 8;
const SIZE: usize = 16;
const KIND: usize = 24;
const ATTRIBUTES: usize = 28;

#[test]
fn a_section_that_cannot_be_meant_is_refused_with_its_value() {
    let four_gib = 1 << 32;
    let high = |kind, address, size, limit| Fault::TooHigh {
        kind,
        address,
        size,
        limit,
    };
    let outside = |offset, size| Fault::DataOutside {
        offset,
        size,
        image: LEN,
    };
    // Section, field, width, value, fault.
    for (index, at, width, value, expected) in [
        (0, KIND, 4, 7, Fault::Kind(7)),
        (2, KIND, 4, u64::MAX, Fault::Kind(u32::MAX)),
        (0, ATTRIBUTES, 4, 4, Fault::Attributes(4)),
        (1, ATTRIBUTES, 4, u64::MAX, Fault::Attributes(u32::MAX)),
        (0, ATTRIBUTES, 4, 2, Fault::Aug(Kind::Bfv)),
        (1, ATTRIBUTES, 4, 3, Fault::Aug(Kind::TdHob)),
        (
            1,
            ADDRESS,
            8,
            0x80_9001,
            Fault::MisalignedAddress(0x80_9001),
        ),
        (1, SIZE, 8, 0x1800, Fault::MisalignedSize(0x1800)),
        (1, SIZE, 8, 0, Fault::Empty),
        (
            1,
            SIZE,
            8,
            !0xfff,
            high(Kind::TdHob, 0x80_9000, !0xfff, four_gib),
        ),
        (
            2,
            ADDRESS,
            8,
            !0xfff,
            high(Kind::TempMem, !0xfff, 0x1000, four_gib),
        ),
        (
            2,
            ADDRESS,
            8,
            four_gib,
            high(Kind::TempMem, four_gib, 0x1000, four_gib),
        ),
        (
            0,
            ADDRESS,
            8,
            0xffff_f000,
            high(Kind::Bfv, 0xffff_f000, 0x2000, four_gib),
        ),
        (
            0,
            SIZE,
            8,
            0x1000,
            Fault::RawTooLong {
                raw: 0x2000,
                memory: 0x1000,
            },
        ),
        (
            0,
            RAW,
            4,
            0x2001,
            Fault::RawTooLong {
                raw: 0x2001,
                memory: 0x2000,
            },
        ),
        (0, RAW, 4, 0, Fault::NoData(Kind::Bfv)),
        (0, OFFSET, 4, 1, outside(1, 0x2000)),
        (0, OFFSET, 4, 0xffff_ffff, outside(u32::MAX, 0x2000)),
        (1, RAW, 4, 1, Fault::UnexpectedData(Kind::TdHob, 1)),
        (
            2,
            RAW,
            4,
            0x1000,
            Fault::UnexpectedData(Kind::TempMem, 0x1000),
        ),
    ] {
        let bytes = &u64::to_le_bytes(value)[..width];
        let result = patched(FIRST + index * 32 + at, bytes);
        assert_eq!(
            result,
            Err(fault(index, expected)),
            "{index} {at} {value:#x}"
        );
    }
}

/// Returns whether these sections beside a BFV are accepted.
fn compose_with(others: &[Section]) -> Result<(), E> {
    let mut sections = vec![bfv(LEN as u32)];
    sections.extend(others);
    match compose(&mut pattern(LEN), &sections) {
        Err(ComposeError::Rejected(error)) => Err(error),
        Err(other) => panic!("{other}"),
        Ok(()) => Ok(()),
    }
}

#[test]
fn permanent_memory_may_come_later_and_lie_high_but_neither_shared_nor_measured() {
    let aug = |extend| Attributes { extend, aug: true };
    let memory_at = |address, size, attributes| Section {
        attributes,
        ..memory(Kind::PermMem, address, size)
    };
    assert_eq!(
        compose_with(&[memory_at(MAX_GPA - 0x1000, 0x1000, aug(false))]),
        Ok(())
    );
    // More than may be added, but it is not added.
    assert_eq!(
        compose_with(&[memory_at(1 << 32, 1 << 40, aug(false))]),
        Ok(())
    );
    for (section, expected) in [
        (
            memory_at(MAX_GPA, 0x1000, aug(false)),
            Fault::TooHigh {
                kind: Kind::PermMem,
                address: MAX_GPA,
                size: 0x1000,
                limit: MAX_GPA,
            },
        ),
        (memory_at(0, 0x1000, aug(true)), Fault::AugAndExtend),
    ] {
        let result = compose_with(&[section]);
        assert!(
            matches!(result, Err(E::Section { index: 1, fault, .. }) if fault == expected),
            "{result:?}"
        );
    }
}

#[test]
fn what_the_sections_break_together_is_refused() {
    let temp = |address, size| memory(Kind::TempMem, address, size);
    for (others, error) in [
        (
            vec![temp(0x1000, 0x3000), temp(0x2000, 0x1000)],
            E::Overlap {
                first: 1,
                second: 2,
                gpa: 0x2000,
            },
        ),
        (
            vec![
                temp(0x8000, 0x1000),
                temp(0x2000, 0x1000),
                temp(0x1000, 0x2000),
            ],
            E::Overlap {
                first: 2,
                second: 3,
                gpa: 0x2000,
            },
        ),
        (
            vec![temp(0x1000, 0x1000), temp(0x1000, 0x1000)],
            E::Overlap {
                first: 1,
                second: 2,
                gpa: 0x1000,
            },
        ),
        (
            vec![temp(0xffff_f000, 0x1000)],
            E::Overlap {
                first: 0,
                second: 1,
                gpa: 0xffff_f000,
            },
        ),
        (
            vec![
                memory(Kind::TdHob, 0, 0x1000),
                memory(Kind::TdHob, 0x1000, 0x1000),
            ],
            E::SecondHob {
                first: 1,
                second: 2,
            },
        ),
        (
            vec![memory(Kind::PermMem, 1 << 32, 4 << 30)],
            E::TooMuch {
                bytes: (4 << 30) + LEN as u64,
            },
        ),
    ] {
        assert_eq!(compose_with(&others), Err(error), "{others:?}");
    }
    assert_eq!(
        compose_with(&[temp(0x1000, 0x1000), temp(0x2000, 0x1000)]),
        Ok(())
    );
}

#[test]
fn firmware_must_be_where_a_vcpu_begins() {
    let low = Section {
        memory_address: 0x10_0000,
        ..bfv(LEN as u32)
    };
    let mut image = pattern(LEN);
    let rejected = ComposeError::Rejected(E::NoResetVector);
    assert_eq!(compose(&mut image, &[low]), Err(rejected));
    let not_firmware = Section {
        kind: Kind::Payload,
        ..bfv(LEN as u32)
    };
    assert_eq!(compose(&mut image, &[not_firmware]), Err(rejected));
}

#[test]
fn an_image_that_is_too_short_for_its_metadata_is_not_written() {
    let needed = 16 + 32 + 22 + 18 + 32;
    for length in 0..needed {
        let mut image = vec![0; length];
        assert_eq!(
            compose(&mut image, &[bfv(0x1000)]),
            Err(ComposeError::TooShort { length, needed })
        );
        assert!(image.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn errors_say_where_and_what_in_a_line() {
    use std::error::Error;
    for (error, text) in [
        (
            patched(DESCRIPTOR, b"_TDX").unwrap_err(),
            "the TDX metadata at offset 0x1f48 begins with 0x5844545f, not with `TDVF`",
        ),
        (
            patched(FIRST + KIND, &[9]).unwrap_err(),
            "section 0 (its entry is at offset 0x1f58): unknown section type 0x9",
        ),
        (
            compose_with(&[memory(Kind::TempMem, 0xffff_f000, 0x1000)]).unwrap_err(),
            "sections 0 and 1 both have the page at gpa 0xfffff000",
        ),
    ] {
        let cause = error.source().map(|cause| format!(": {cause}"));
        assert_eq!(format!("{error}{}", cause.unwrap_or_default()), text);
    }
}

#[test]
fn debians_other_images_have_no_metadata() {
    let Some((path, _)) = ovmf() else { return };
    let other = path.with_file_name("OVMF_CODE_4M.fd");
    let other = [other, "/usr/share/OVMF/OVMF_CODE_4M.fd".into()];
    let Some(image) = other.iter().find_map(|path| std::fs::read(path).ok()) else {
        println!("skipped: no OVMF_CODE_4M.fd beside {}", path.display());
        return;
    };
    let result = Tdvf::parse(&image);
    assert!(
        matches!(result, Err(E::NoMetadata { .. } | E::NoTable { .. })),
        "{result:?}"
    );
}
