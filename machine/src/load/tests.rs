//! Images good and bad, in memory without a VM.

use linux_loader::loader::bootparam::boot_params;
use proptest::prelude::*;

use super::super::layout::{ACPI_ROOT, CMDLINE, FOUR_GIB, PAGE_TABLES, ZERO_PAGE};
use super::super::samples::{bzimage, elf};
use super::{Gpa, GuestRam, Image, ImageFormat, MachineError, Start, load, rom_bytes};

const MIB: u64 = 1 << 20;
const AT: u64 = MIB;

/// Maps memory as a machine does and loads the image into it.
fn try_load(image: &Image, memory: u64) -> Result<(Start, GuestRam), MachineError> {
    let ram = GuestRam::new(memory, rom_bytes(image)?, false)?;
    load(image, &ram).map(|start| (start, ram))
}

fn error(image: Image) -> String {
    try_load(&image, 64 * MIB).unwrap_err().to_string()
}

fn read(ram: &GuestRam, at: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    ram.read(Gpa::new(at), &mut data).unwrap();
    data
}

fn zero_page(ram: &GuestRam) -> boot_params {
    let bytes = read(ram, ZERO_PAGE.get(), size_of::<boot_params>());
    // SAFETY: the structure of linux-loader is plain data, any bytes are one, and there are as many.
    unsafe { bytes.as_ptr().cast::<boot_params>().read_unaligned() }
}

fn kernel() -> Image {
    Image::from_bytes("kernel", bzimage(&[0xf4], &[0xf4], true))
}

/// A bzImage with one header field changed.
fn changed(at: usize, bytes: &[u8]) -> Image {
    let mut file = bzimage(&[0xf4], &[0xf4], true);
    file[at..at + bytes.len()].copy_from_slice(bytes);
    Image::from_bytes("kernel", file)
}

#[test]
fn a_stated_format_counts_for_all_but_blank_files() {
    let forced = Image::from_bytes("x", vec![0xea; 0x1_0000]).with_format(ImageFormat::Flat);
    assert_eq!(forced.format(), Some(ImageFormat::Flat));
    for format in ImageFormat::ALL {
        assert_eq!(ImageFormat::from_name(format.name()), Some(format));
        for byte in [0, 0xff] {
            let blank = Image::from_bytes("blank", [byte; 0x1000]).with_format(format);
            let text = format!("each of its bytes is {byte:#04x}");
            assert!(error(blank).contains(&text), "{format}");
        }
    }
}

#[test]
fn bytes_that_are_no_image_are_refused_with_their_kind_and_what_shows_it() {
    let error = try_load(&Image::from_bytes("x", *b"hello, world"), MIB).unwrap_err();
    assert_eq!(
        error.to_string(),
        "image x is a text: printable characters: \"hello, world\""
    );
    let hint = error.hint().unwrap();
    assert!(hint.contains("name an image"), "{hint}");
}

#[test]
fn a_rom_is_seen_below_4_gib_and_its_end_below_1_mib() {
    let bytes: Vec<u8> = (0..0x6_0000_u32).map(|i| (i >> 8) as u8).collect();
    let image = Image::from_bytes("rom", bytes.clone()).with_format(ImageFormat::Firmware);
    let (start, ram) = try_load(&image, 16 * MIB).unwrap();
    assert_eq!(start, Start::Reset);
    assert_eq!(read(&ram, FOUR_GIB - 0x6_0000, 0x6_0000), bytes);
    assert_eq!(read(&ram, MIB - 0x4_0000, 0x4_0000), bytes[0x2_0000..]);
    assert_eq!(read(&ram, MIB - 0x4_0001, 1), [0]);
    let slots = ram.slots(true);
    let flags: Vec<_> = slots
        .iter()
        .map(|slot| (slot.gpa.get(), slot.flags.read_only, slot.flags.log_dirty))
        .collect();
    assert_eq!(
        flags,
        [(0, false, true), (FOUR_GIB - 0x6_0000, true, false)]
    );
}

#[test]
fn roms_of_a_bad_size_are_refused() {
    let rom = |bytes: usize| {
        Image::from_bytes("rom", vec![0xea; bytes]).with_format(ImageFormat::Firmware)
    };
    assert!(error(rom(0x1_0001)).contains("is 0x10001"));
    assert!(error(rom((16 << 20) + 0x1000)).contains("needs 0x1001000 bytes"));
    assert!(error(rom(0)).contains("empty"));
    let small = try_load(&rom(0x1_0000), 0x1_0000).unwrap_err();
    assert!(
        small.to_string().contains("0x10000 bytes is less"),
        "{small}"
    );
}

#[test]
fn a_kernel_finds_memory_map_command_line_and_initrd() {
    let initrd = vec![0x5a; 0x1801];
    let image = kernel()
        .cmdline("console=ttyS0 quiet")
        .initrd(initrd.clone());
    let (start, ram) = try_load(&image, 4 << 30).unwrap();
    assert!(matches!(start, Start::Flat32 { rsi, .. } if rsi == ZERO_PAGE.get()));
    let page = zero_page(&ram);
    assert_eq!({ page.hdr.cmd_line_ptr }, CMDLINE.get() as u32);
    assert_eq!(read(&ram, CMDLINE.get(), 20), b"console=ttyS0 quiet\0");
    let at = u64::from(page.hdr.ramdisk_image);
    assert_eq!({ page.hdr.ramdisk_size }, 0x1801);
    assert_eq!(read(&ram, at, initrd.len()), initrd);
    // As high as the header allows (0x7fffffff), on a page.
    assert_eq!(at, 0x8000_0000 - 0x2000);
    let map: Vec<_> = page.e820_table[..page.e820_entries.into()]
        .iter()
        .map(|entry| (entry.addr, entry.size, entry.r#type))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (MIB, (2 << 30) - MIB, 1),
            (FOUR_GIB, 2 << 30, 1)
        ]
    );
}

#[test]
fn a_kernel_finds_the_root_pointer_of_acpi_tables_by_its_boot_parameters() {
    for kernel in [
        kernel(),
        Image::from_bytes("elf", elf(true, AT, AT, b"code", 0x1000)),
    ] {
        let (_, ram) = try_load(&kernel, 64 * MIB).unwrap();
        assert_eq!({ zero_page(&ram).acpi_rsdp_addr }, 0);
        let (_, ram) = try_load(&kernel.acpi(), 64 * MIB).unwrap();
        assert_eq!({ zero_page(&ram).acpi_rsdp_addr }, ACPI_ROOT.get());
    }
}

#[test]
fn the_page_tables_map_the_first_4_gib_to_themselves() {
    let (_, ram) = try_load(&kernel(), 64 * MIB).unwrap();
    let entry = |table: u64, index: u64| {
        u64::from_le_bytes(read(&ram, table + index * 8, 8).try_into().unwrap())
    };
    let address = |entry: u64| {
        assert_eq!(entry & 0b11, 0b11, "present and writable: {entry:#x}");
        entry & !0xfff
    };
    for gpa in (0..FOUR_GIB).step_by(2 << 20) {
        let pointers = address(entry(PAGE_TABLES.get(), gpa >> 39));
        let directory = address(entry(pointers, gpa >> 30 & 511));
        let page = entry(directory, gpa >> 21 & 511);
        assert_eq!(page, gpa | 0x83);
    }
}

#[test]
fn bad_kernels_are_refused_by_name_and_value() {
    for (image, text) in [
        (changed(0x1f1, &[0xff]), "setup sectors is 0xff"),
        (
            changed(0x214, &0x4000_0000_u32.to_le_bytes()),
            "at 0x40000000, and there are 0x0",
        ),
        (
            changed(0x214, &0x1000_u32.to_le_bytes()),
            "the kernel at 0x1000..0x1201 overlaps",
        ),
        (
            changed(0x214, &0xe_0000_u32.to_le_bytes()).acpi(),
            "the kernel at 0xe0000..0xe0201 overlaps the ACPI tables",
        ),
        (Image::flat("flat", [0xf4]).acpi(), "option ACPI tables"),
        (
            changed(0x260, &u32::MAX.to_le_bytes()),
            "needs 0xffffffff bytes at 0x1000000",
        ),
        (
            changed(0x258, &u64::MAX.to_le_bytes()),
            "at 0xffffffffffffffff",
        ),
        (
            {
                let mut file = bzimage(&[0xf4], &[0xf4], true);
                file[0x234] = 0; // not relocatable: it runs at its preferred address
                file[0x258..0x260].copy_from_slice(&0x8000_u64.to_le_bytes());
                Image::from_bytes("kernel", file)
            },
            "the unpacked kernel at 0x8000..0x108000 overlaps",
        ),
        (changed(0x211, &[0]), "not a good bzimage image"),
        (
            kernel().cmdline("x".repeat(2048)),
            "has 2048 bytes, and the kernel takes 2047",
        ),
        (
            kernel().cmdline("a\u{e9}"),
            "command line has byte 0xc3 at 1",
        ),
        (
            kernel().initrd(vec![0; 60 << 20]),
            "initrd of 0x3c00000 bytes does not fit between 0x1100000 and 0x4000000",
        ),
        (kernel().entry(Gpa::new(AT)), "option entry"),
        (kernel().load_at(Gpa::new(AT)), "option load address"),
        (
            Image::from_bytes("short", vec![0x90; 0x200]).with_format(ImageFormat::BzImage),
            "the size of the file is 0x200",
        ),
        (
            Image::from_bytes("none", vec![0x90; 0x2000]).with_format(ImageFormat::BzImage),
            "not a good bzimage image",
        ),
    ] {
        let message = error(image);
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn a_command_line_of_the_full_length_is_taken() {
    let text = "x".repeat(2047);
    let (_, ram) = try_load(&kernel().cmdline(text.clone()), 64 * MIB).unwrap();
    let stored = read(&ram, CMDLINE.get(), 2048);
    assert_eq!((&stored[..2047], stored[2047]), (text.as_bytes(), 0));
}

#[test]
fn an_elf_file_is_loaded_at_its_physical_addresses() {
    for class64 in [true, false] {
        let file = elf(class64, AT, AT + 2, b"code", 0x2000);
        let image = Image::from_bytes("elf", file);
        let (_, ram) = try_load(&image, 16 * MIB).unwrap();
        assert_eq!(read(&ram, AT, 6), *b"code\0\0");
        let entry = AT + 1;
        let (start, _) = try_load(&image.entry(Gpa::new(entry)), 16 * MIB).unwrap();
        if !class64 {
            assert!(matches!(start, Start::Flat32 { entry: at, .. } if u64::from(at) == entry));
        }
    }
}

#[test]
fn bad_elf_files_are_refused_by_name_and_value() {
    let sample = || elf(true, AT, AT, &[0xf4; 16], 16);
    let with = |at: usize, bytes: &[u8]| {
        let mut file = sample();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        Image::from_bytes("elf", file)
    };
    let program = 64;
    for (image, text) in [
        (with(16, &[1, 0]), "(e_type) is 0x1"),
        (with(18, &[0xb7, 0]), "(e_machine) is 0xb7"),
        (with(24, &0x42_u64.to_le_bytes()), "entry 0x42 of image elf"),
        (with(24, &(AT + 16).to_le_bytes()), "entry 0x100010"),
        (
            with(program + 32, &17_u64.to_le_bytes()),
            "(p_filesz) is 0x11",
        ),
        (
            with(program + 32, &u64::MAX.to_le_bytes()),
            "(p_filesz) is 0xffffffffffffffff",
        ),
        (
            with(program + 40, &15_u64.to_le_bytes()),
            "(p_memsz) is 0xf",
        ),
        (
            with(program + 40, &u64::MAX.to_le_bytes()),
            "needs 0xffffffffffffffff bytes",
        ),
        (
            with(program + 24, &(1_u64 << 40).to_le_bytes()),
            "at 0x10000000000, and there are 0x0",
        ),
        (
            with(program + 24, &0x1000_u64.to_le_bytes()),
            "a segment at 0x1000..0x1010 overlaps",
        ),
        (with(program, &[4]), "entry 0x100000 of image elf"),
        (with(32, &u64::MAX.to_le_bytes()), "not a good elf image"),
        (
            Image::from_bytes("elf", &b"\x7fELF"[..]),
            "not a good elf image",
        ),
    ] {
        // Some are recognised as something else.
        let message = error(image.with_format(ImageFormat::Elf));
        assert!(message.contains(text), "{message}");
    }
}

/// A good image of each kind.
fn samples() -> Vec<Vec<u8>> {
    let mut rom = vec![0xcc; 0x1_0000];
    rom[0xfff0] = 0xea;
    vec![
        elf(true, AT, AT, &[0xf4; 64], 0x3000),
        elf(false, AT, AT, &[0xf4; 64], 0x3000),
        bzimage(&[0xf4], &[0xf4], true),
        bzimage(&[0xf4], &[0xf4], false),
        rom,
    ]
}

/// Numbers at which sums wrap and limits lie, and any other.
fn number() -> impl Strategy<Value = u64> {
    let edges = vec![
        0,
        1,
        0x1000,
        MIB,
        16 * MIB,
        FOUR_GIB - 1,
        FOUR_GIB,
        1 << 63,
        u64::MAX,
    ];
    prop_oneof![proptest::sample::select(edges), any::<u64>(), 0..32 * MIB]
}

/// Properties of every image that is accepted.
fn check_start(start: Start, ram: &GuestRam) {
    match start {
        Start::Reset => {}
        Start::Real(entry) => assert!(entry.get() < MIB && entry < ram.low_end()),
        Start::Flat32 { entry, .. } => assert!(u64::from(entry) < ram.low_end().get()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_image_is_loaded_or_refused_and_never_panics(
        sample in 0..5_usize,
        damage in prop::collection::vec((0..0x300_usize, 1..9_usize, number()), 0..4),
        keep in prop_oneof![Just(usize::MAX), 0..0x1_0001_usize],
        pages in 1..0x1001_u64,
        initrd in prop::option::of(0..0x40_0000_usize),
    ) {
        let mut file = samples().swap_remove(sample);
        for (at, bytes, value) in damage {
            for (to, from) in file.iter_mut().skip(at).zip(value.to_le_bytes()).take(bytes) {
                *to = from;
            }
        }
        file.truncate(keep);
        let mut image = Image::from_bytes("damaged", file);
        if let Some(bytes) = initrd {
            image = image.initrd(vec![1; bytes]);
        }
        if let Ok((start, ram)) = try_load(&image, pages * 4096) {
            check_start(start, &ram);
        }
    }

    #[test]
    fn any_bytes_with_any_options_are_loaded_or_refused_and_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..0x800),
        format in prop::option::of(proptest::sample::select(&ImageFormat::ALL[..])),
        load_at in prop::option::of(number()),
        entry in prop::option::of(number()),
        cmdline in prop::option::of(".{0,300}"),
        memory in number().prop_filter("mapping all memory would be slow", |n| *n < 1 << 33 || *n > 1 << 40),
    ) {
        let mut image = Image::from_bytes("any", bytes);
        image.load_at = load_at.map(Gpa::new);
        image.entry = entry.map(Gpa::new);
        image.cmdline = cmdline;
        if let Some(format) = format {
            image = image.with_format(format);
        }
        if let Ok((start, ram)) = try_load(&image, memory & !0xfff) {
            check_start(start, &ram);
        }
    }
}
