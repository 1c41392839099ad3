//! Linux with a disk: a FAT file system on a virtio block device, in a normal VM, in a TD and in an SNP guest.

use std::io::{Cursor, Read, Write};
use std::path::Path;

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use serde_json::Value;
use tempfile::NamedTempFile;

use crate::boot::{Boot, Guests, console};
use crate::common::{named, run};
use crate::init::{self, End};
use crate::modules::with_modules;

use crate::{NORMAL, figures, processor_seconds, snp, td};

/// The modules of the file system and of the disk, in the order of their loading.
const MODULES: [&[&str]; 5] = [
    &["fs/nls/nls_cp437.ko.xz"],
    &["fs/nls/nls_ascii.ko.xz"],
    &["fs/fat/fat.ko.xz"],
    &["fs/fat/vfat.ko.xz"],
    &["drivers/block/virtio_blk.ko.xz"],
];

const DISK_BYTES: usize = 8 << 20;
const TEXT: &str = "a text that only the disk has";
/// More than one request takes, and no whole number of sectors.
const BLOCKS_BYTES: usize = 600_123;

/// Bytes that do not repeat.
fn blocks() -> Vec<u8> {
    let next = |state: &u32| Some(state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    let states = std::iter::successors(Some(1), next);
    states
        .map(|state: u32| (state >> 24) as u8)
        .take(BLOCKS_BYTES)
        .collect()
}

/// A disk with the files that the guest reads.
fn disk() -> NamedTempFile {
    let mut bytes = vec![0; DISK_BYTES];
    let mut disk = Cursor::new(&mut bytes);
    fatfs::format_volume(&mut disk, FormatVolumeOptions::new()).unwrap();
    disk.set_position(0);
    let system = FileSystem::new(disk, FsOptions::new()).unwrap();
    for (name, contents) in [(init::TEXT, TEXT.as_bytes()), (init::BLOCKS, &blocks())] {
        let mut file = system.root_dir().create_file(name).unwrap();
        file.write_all(contents).unwrap();
    }
    system.unmount().unwrap();
    let image = NamedTempFile::new().unwrap();
    std::fs::write(image.path(), bytes).unwrap();
    image
}

/// The host finds the guest's file on the disk, in a file system that was unmounted, and the console has what was on the disk.
fn check(report: &Value, image: &Path) {
    let text = console(report);
    let (_, rest) = text.split_once(init::SAYS).expect("user space");
    assert_eq!(rest.lines().next().map(str::trim), Some(TEXT), "{text}");

    let bytes = std::fs::read(image).unwrap();
    let system = FileSystem::new(Cursor::new(bytes), FsOptions::new()).unwrap();
    assert!(!system.read_status_flags().unwrap().dirty());
    let mut copy = Vec::new();
    let mut file = system.root_dir().open_file(init::COPY).unwrap();
    file.read_to_end(&mut copy).unwrap();
    assert!(copy == blocks(), "{} bytes were copied", copy.len());

    let used = &report["disks"][0];
    for count in ["bytes_read", "bytes_written"] {
        assert!(used[count].as_u64() >= Some(BLOCKS_BYTES as u64), "{used}");
    }
    for count in ["failed", "private", "resets_needed"] {
        assert_eq!(used[count], 0, "{used}");
    }
}

#[test]
fn a_kernel_reads_and_writes_a_disk_and_a_second_run_leaves_the_same_bytes_there() {
    let Some(kernel) = named(td::KERNEL) else {
        return;
    };
    let init = |modules: &[String]| init::copies(modules, End::Restart);
    let Some(archive) = with_modules(&kernel, &MODULES, init) else {
        return;
    };
    let boot = || {
        let image = disk();
        let files = [
            "run",
            &kernel,
            "--initrd",
            archive.path().to_str().unwrap(),
            "--disk",
            image.path().to_str().unwrap(),
        ];
        let ran = run(&[&files[..], &NORMAL].concat());
        assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
        let report: Value = serde_json::from_str(&ran.out).unwrap();
        check(&report, image.path());
        (report, std::fs::read(image.path()).unwrap())
    };
    let began = processor_seconds();
    let (first, left) = boot();
    figures("Linux with a disk", &first, began);
    let (second, left_again) = boot();
    assert_eq!(second["instructions"], first["instructions"]);
    assert!(left == left_again, "the disks differ");
}

/// The guest's pages are private: what the device sees is what the kernel bounces through memory that it shares.
fn copies_through_shared_memory(guests: &Guests, variable: &str) {
    let init = |modules: &[String]| init::copies(modules, End::PowerOff);
    let Some(boot) = Boot::with_modules(guests, variable, &MODULES, init) else {
        return;
    };
    let image = disk();
    let began = processor_seconds();
    let report = boot.run(1, &["--disk", image.path().to_str().unwrap()]);
    check(&report, image.path());
    let text = console(&report);
    assert!(text.contains("software IO TLB: mapped"), "{text}");
    figures(
        &format!("Linux in {} with a disk", guests.name),
        &report,
        began,
    );
}

#[test]
fn a_kernel_in_a_td_reads_and_writes_a_disk_through_shared_memory() {
    copies_through_shared_memory(&td::TD, td::KERNEL);
}

#[test]
fn a_kernel_in_an_snp_guest_reads_and_writes_a_disk_through_shared_memory() {
    copies_through_shared_memory(&snp::SNP, snp::KERNEL);
}
