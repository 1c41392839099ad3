//! MRTD computed off line equals the values of other programs.

use kvm_ops_tdvf::{Attributes, Launch, Mrtd, Order, Section, SectionKind, Tdvf, compose};

mod common;
use common::{bfv, memory, ovmf, pattern};

const ORDERS: [Order; 2] = [Order::SinglePass, Order::TwoPass];

/// The values of Debian 12's OVMF.fd, from programs that share no code with this crate.
#[test]
fn mrtd_of_debian_ovmf_equals_that_of_independent_tools() {
    let Some((path, image)) = ovmf() else { return };
    if image.len() != 0x20_0000 || hex::encode(&image[0x1f_f7c0..0x1f_f7c4]) != "54445646" {
        println!(
            "skipped: {} is another build than Debian 12's",
            path.display()
        );
        return;
    }
    let tdvf = Tdvf::parse(&image).unwrap();
    assert_eq!(tdvf.metadata_offset(), 0x1f_f7c0);
    assert_eq!(tdvf.launch().page_count(), 0x200 + 0x10 + 2 + 2 + 6);
    let kinds: Vec<_> = tdvf.sections().iter().map(|section| section.kind).collect();
    use SectionKind::{Bfv, Cfv, TdHob, TempMem};
    assert_eq!(kinds, [Bfv, Cfv, TempMem, TempMem, TdHob, TempMem]);
    for (order, expected) in [
        (
            Order::SinglePass,
            "4c7206f0f483c524f12c366c711e9049030a8d47c471ee5aa9c4999a08de4057\
             fb887fed0744d5631a212967fb231c47",
        ),
        (
            Order::TwoPass,
            "acccbcc870a381adab0d3919d90a7f268ac3b0364771f202ed4bb4e892d045b3\
             3db3b32e6924cba830a724eed443f7e1",
        ),
    ] {
        assert_eq!(hex::encode(tdvf.mrtd(order)), expected, "{order:?}");
    }
}

/// Four pages of firmware, of which the last three quarters of one are zeros behind the data, a
/// measured kernel without data, a hand-off block, and memory that is not there at the launch.
fn sections() -> Vec<Section> {
    let aug = Attributes {
        aug: true,
        extend: false,
    };
    vec![
        Section {
            raw_size: 0x400,
            memory_size: 0x1000,
            memory_address: 0xfffe_0000,
            ..bfv(0)
        },
        bfv(0x4000),
        memory(SectionKind::TdHob, 0x80_9000, 0x2000),
        Section {
            attributes: Attributes {
                extend: true,
                aug: false,
            },
            ..memory(SectionKind::Payload, 0x100_0000, 0x3000)
        },
        Section {
            attributes: aug,
            ..memory(SectionKind::PermMem, 0x1_0000_0000, 0x4000_0000)
        },
    ]
}

fn image() -> Vec<u8> {
    let mut image = pattern(0x4000);
    compose(&mut image, &sections()).unwrap();
    image
}

/// `tests/mrtd.py` prints these again, with hashlib and no code of this crate.
#[test]
fn mrtd_of_a_composed_image_equals_the_recorded_one() {
    let image = image();
    let tdvf = Tdvf::parse(&image).unwrap();
    for (order, expected) in ORDERS.into_iter().zip(RECORDED) {
        assert_eq!(hex::encode(tdvf.mrtd(order)), expected, "{order:?}");
    }
}

const RECORDED: [&str; 2] = [
    "6e2e015fb9d4dfedcbe4061af2fd464e1b05ee366eb0358d3057ea5a52cc12ea\
     97f94fda24da0a6af620b88c14507bd3",
    "62a096b197592ae682318a1d82393ebecf8ce585d561d61f0b6b599b11666347\
     4f006558a053c236a07694c5c40541bb",
];

#[test]
fn the_pages_of_a_launch_are_those_of_the_sections_in_their_order() {
    let image = image();
    let tdvf = Tdvf::parse(&image).unwrap();
    let launch = tdvf.launch();
    let pages: Vec<_> = launch.pages().collect();
    assert_eq!(pages.len() as u64, launch.page_count());
    let places: Vec<_> = pages
        .iter()
        .map(|p| (p.section, p.gpa, p.measured))
        .collect();
    let expected = [
        (0, 0xfffe_0000, true),
        (1, 0xffff_c000, true),
        (1, 0xffff_d000, true),
        (1, 0xffff_e000, true),
        (1, 0xffff_f000, true),
        (2, 0x80_9000, false),
        (2, 0x80_a000, false),
        (3, 0x100_0000, true),
        (3, 0x100_1000, true),
        (3, 0x100_2000, true),
    ];
    assert_eq!(places, expected);
    assert_eq!(pages[0].contents[..0x400], image[..0x400]);
    assert!(pages[0].contents[0x400..].iter().all(|byte| *byte == 0));
    for (page, chunk) in pages[1..5].iter().zip(image.chunks(4096)) {
        assert_eq!(page.contents[..], *chunk);
    }
    assert!(
        pages[5..]
            .iter()
            .all(|page| page.contents.iter().all(|byte| *byte == 0))
    );
}

#[test]
fn a_filled_section_holds_what_the_vmm_gave_and_only_a_measured_one_changes_mrtd() {
    let image = image();
    let tdvf = Tdvf::parse(&image).unwrap();
    let plain = ORDERS.map(|order| tdvf.mrtd(order));
    let mrtds = |launch: &Launch<'_>| ORDERS.map(|order| launch.mrtd(order));

    let mut launch = tdvf.launch();
    launch.fill(2, vec![0xab; 0x1800]).unwrap();
    assert_eq!(mrtds(&launch), plain, "TD_HOB is not measured");
    let hob: Vec<_> = launch.pages().filter(|page| page.section == 2).collect();
    assert!(hob[0].contents.iter().all(|byte| *byte == 0xab));
    assert!(hob[1].contents[..0x800].iter().all(|byte| *byte == 0xab));
    assert!(hob[1].contents[0x800..].iter().all(|byte| *byte == 0));

    launch.fill(3, &image[..0x1001]).unwrap();
    let (kernel, before) = (mrtds(&launch), plain);
    assert!(kernel.iter().zip(&before).all(|(new, old)| new != old));
    launch.fill(3, &[0; 0x3000][..]).unwrap();
    assert_eq!(mrtds(&launch), plain, "zeros are what was there before");
}

#[test]
fn only_the_vmms_sections_can_be_filled_and_only_as_far_as_they_reach() {
    use kvm_ops_tdvf::FillError::{NoSection, NotFillable, TooLong};
    let image = image();
    let tdvf = Tdvf::parse(&image).unwrap();
    let mut launch = tdvf.launch();
    for (section, length, error) in [
        (0, 0, NotFillable(0)),
        (4, 0, NotFillable(4)),
        (5, 0, NoSection(5)),
        (usize::MAX, 0, NoSection(usize::MAX)),
        (
            2,
            0x2001,
            TooLong {
                section: 2,
                length: 0x2001,
                memory: 0x2000,
            },
        ),
    ] {
        assert_eq!(launch.fill(section, vec![1; length]), Err(error));
    }
    assert_eq!(launch.mrtd(Order::SinglePass), tdvf.mrtd(Order::SinglePass));
}

#[test]
fn a_page_is_its_sixteen_chunks() {
    let contents: [u8; 4096] = pattern(4096).try_into().unwrap();
    let (mut whole, mut chunks) = (Mrtd::new(), Mrtd::new());
    whole.extend_page(0x7000, &contents);
    for (index, chunk) in contents.chunks_exact(256).enumerate() {
        chunks.extend(0x7000 + 256 * index as u64, chunk.try_into().unwrap());
    }
    assert_eq!(whole.value(), chunks.value());
}

#[test]
fn the_empty_launch_is_the_hash_of_nothing() {
    assert_eq!(
        hex::encode(Mrtd::new().value()),
        "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da\
         274edebfe76f65fbd51ad2f14898b95b"
    );
}
