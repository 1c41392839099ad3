//! Images to read.

#![allow(dead_code)] // Each test file uses a part of it.

use std::path::PathBuf;

use kvm_ops_tdvf::{Attributes, Section, SectionKind};

/// A real image with metadata: the file of `KVM_OPS_OVMF`, or one that a distribution installs.
/// Prints the reason if a test is skipped.
pub(crate) fn ovmf() -> Option<(PathBuf, Vec<u8>)> {
    let named = std::env::var_os("KVM_OPS_OVMF").map(PathBuf::from);
    let known = ["/usr/share/ovmf/OVMF.fd", "/usr/share/OVMF/OVMF.fd"].map(PathBuf::from);
    let found = named
        .into_iter()
        .chain(known)
        .find_map(|path| std::fs::read(&path).ok().map(|image| (path, image)));
    if found.is_none() {
        println!("skipped: no OVMF image; install the package ovmf or set KVM_OPS_OVMF");
    }
    found
}

/// Bytes that repeat nowhere soon.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    let mut x: u32 = 7;
    (0..length)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        })
        .collect()
}

/// Measured firmware that ends at 4 GiB, the first `size` bytes of the image.
pub(crate) fn bfv(size: u32) -> Section {
    Section {
        kind: SectionKind::Bfv,
        data_offset: 0,
        raw_size: size,
        memory_address: (1 << 32) - u64::from(size),
        memory_size: size.into(),
        attributes: Attributes {
            extend: true,
            aug: false,
        },
    }
}

/// Memory without data.
pub(crate) fn memory(kind: SectionKind, memory_address: u64, memory_size: u64) -> Section {
    Section {
        kind,
        data_offset: 0,
        raw_size: 0,
        memory_address,
        memory_size,
        attributes: Attributes::default(),
    }
}
