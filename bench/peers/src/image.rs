//! The firmware image of the measurement.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use kvm_ops_tdvf::{Attributes, Section, SectionKind, Tdvf, compose};
use soft_amd_sp::measure::Ovmf;

/// The image of Debian's package `ovmf`.
const DEBIAN: &str = "/usr/share/ovmf/OVMF.fd";
const LENGTH: usize = 2 << 20;

/// An image for SEV and one for TDX: the same file if it has metadata for both.
#[derive(Debug)]
pub(crate) struct Image {
    /// The image's name in the tables.
    pub(crate) name: String,
    /// The file measured for SEV.
    pub(crate) file: PathBuf,
    /// The file measured for TDX.
    pub(crate) tdx_file: PathBuf,
}

impl Image {
    /// Returns the given file, or Debian's, or one composed in `directory`.
    pub(crate) fn find(given: Option<&Path>, directory: &Path) -> Result<Self, Box<dyn Error>> {
        let real = given.unwrap_or(Path::new(DEBIAN));
        if given.is_some() || has_both(real) {
            return Ok(Self {
                name: real.display().to_string(),
                file: real.to_owned(),
                tdx_file: real.to_owned(),
            });
        }
        println!("{DEBIAN} is not there, or has no metadata: an image is made up");
        let image = |file: &str, bytes: Vec<u8>| {
            let path = directory.join(file);
            fs::write(&path, bytes).map(|()| path)
        };
        Ok(Self {
            name: "made up, 2 MiB".to_owned(),
            file: image("sev.fd", sev_image())?,
            tdx_file: image("tdx.fd", tdx_image()?)?,
        })
    }
}

fn has_both(file: &Path) -> bool {
    fs::read(file).is_ok_and(|image| {
        let sev = Ovmf::parse(&image).is_ok_and(|ovmf| ovmf.reset_eip().is_some());
        sev && Tdvf::parse(&image).is_ok()
    })
}

/// Bytes without a pattern, so that no hash can take a shortcut.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..LENGTH).map(|_| next()).collect()
}

/// The GUIDs in the table's byte order: sev metadata, reset block, footer.
const METADATA: [u8; 16] = *b"\x66\x65\x88\xdc\x4a\x98\x98\x47\xa7\x5e\x55\x85\xa7\xbf\x67\xcc";
const RESET: [u8; 16] = *b"\xde\x71\xf7\x00\x7e\x1a\xcb\x4f\x89\x0e\x68\xc7\x7e\x2f\xb4\x4e";
const FOOTER: [u8; 16] = *b"\xde\x82\xb5\x96\xb2\x1f\xf7\x45\xba\xea\xa3\x66\xc5\x5a\x08\x2d";

/// An image with the sections and the reset block of Debian's image.
fn sev_image() -> Vec<u8> {
    let mut image = noise();
    let sections = [
        (0x80_0000_u32, 0x9000_u32, 1_u32),
        (0x80_a000, 0x3000, 1),
        (0x80_d000, 0x1000, 2),
        (0x80_e000, 0x1000, 3),
        (0x81_0000, 0x1_0000, 1),
    ];
    let mut metadata = b"ASEV".to_vec();
    for n in [16 + 12 * sections.len() as u32, 1, sections.len() as u32] {
        metadata.extend(n.to_le_bytes());
    }
    for field in sections
        .iter()
        .flat_map(|(gpa, size, kind)| [gpa, size, kind])
    {
        metadata.extend(field.to_le_bytes());
    }
    let at = LENGTH - 0x400;
    image[at..at + metadata.len()].copy_from_slice(&metadata);

    let mut table = Vec::new();
    for (data, guid) in [(0x400_u32, METADATA), (0x80_b004, RESET)] {
        table.extend(data.to_le_bytes());
        table.extend(22_u16.to_le_bytes());
        table.extend(guid);
    }
    table.extend((table.len() as u16 + 18).to_le_bytes());
    table.extend(FOOTER);
    let end = LENGTH - 32;
    image[end - table.len()..end].copy_from_slice(&table);
    image
}

/// An image with one measured section, which covers all of it.
fn tdx_image() -> Result<Vec<u8>, Box<dyn Error>> {
    let mut image = noise();
    let section = Section {
        data_offset: 0,
        raw_size: LENGTH as u32,
        memory_address: (1 << 32) - LENGTH as u64,
        memory_size: LENGTH as u64,
        kind: SectionKind::Bfv,
        attributes: Attributes {
            extend: true,
            aug: false,
        },
    };
    compose(&mut image, &[section])?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_images_have_the_metadata_they_are_for() {
        let ovmf = Ovmf::parse(&sev_image()).expect("tables");
        assert_eq!(ovmf.reset_eip(), Some(0x80_b004));
        assert_eq!(ovmf.sections().len(), 5);
        let image = tdx_image().expect("room for a section");
        assert_eq!(Tdvf::parse(&image).expect("metadata").sections().len(), 1);
    }
}
