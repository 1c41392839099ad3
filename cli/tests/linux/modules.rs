//! Modules of a kernel, from its package.

use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::archive::initramfs;

/// An initial RAM file system with these modules, each the first of its places in the package that there is, and an `init`, which is
/// told their paths. `None` if one is missing.
pub(crate) fn with_modules(
    kernel: &str,
    modules: &[&[&str]],
    init: impl FnOnce(&[String]) -> Vec<u8>,
) -> Option<NamedTempFile> {
    let Some(mut files) = read(Path::new(kernel), modules) else {
        println!("skipped: no modules beside the kernel");
        return None;
    };
    let places: Vec<_> = files.iter().map(|(name, _)| format!("/{name}")).collect();
    files.push(("init".into(), init(&places)));
    let archive = NamedTempFile::new().unwrap();
    std::fs::write(archive.path(), initramfs(&files)).unwrap();
    Some(archive)
}

/// The files' names and bytes.
fn read(kernel: &Path, modules: &[&[&str]]) -> Option<Vec<(String, Vec<u8>)>> {
    let directory = directory(kernel)?;
    let read = |places: &&[&str]| {
        let mut paths = places
            .iter()
            .map(|place| directory.join("kernel").join(place));
        let path = paths.find(|path| path.is_file())?;
        let name = path.file_name()?.to_str()?.to_owned();
        Some((name, std::fs::read(path).ok()?))
    };
    modules.iter().map(read).collect()
}

/// Packages have the kernel beside its modules, or in `boot`.
fn directory(kernel: &Path) -> Option<PathBuf> {
    let directory = kernel.parent()?;
    if directory.join("kernel").is_dir() {
        return Some(directory.to_owned());
    }
    let release = kernel.file_name()?.to_str()?.strip_prefix("vmlinuz-")?;
    let places = ["lib/modules", "usr/lib/modules"];
    let places = places.map(|place| directory.with_file_name(place).join(release));
    places.into_iter().find(|place| place.is_dir())
}
