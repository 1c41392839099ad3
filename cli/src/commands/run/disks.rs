//! `--disk`: the disks of a machine, and what its guest did with them.

use std::path::PathBuf;
use std::str::FromStr;

use kvm_ops_machine::{Disk, DiskCounts, MachineError, Q35};
use serde::Serialize;

use crate::failure::Failure;
use crate::units::{plural, size};

/// A disk image on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    path: PathBuf,
    read_only: bool,
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, read_only) = match text.strip_suffix(",ro") {
            Some(path) => (path, true),
            None => (text, false),
        };
        if path.is_empty() {
            return Err("a disk needs the path of its image".into());
        }
        Ok(Self {
            path: path.into(),
            read_only,
        })
    }
}

/// Opens the images.
pub(super) fn open(wanted: &[Wanted]) -> Result<Vec<Disk>, Failure> {
    let open = |disk: &Wanted| match disk.read_only {
        true => Disk::open_read_only(&disk.path),
        false => Disk::open(&disk.path),
    };
    wanted
        .iter()
        .map(|disk| open(disk).map_err(failure))
        .collect()
}

/// Puts the disks into a machine.
pub(super) fn plug(q35: Q35, disks: Vec<Disk>) -> Result<Q35, Failure> {
    let mut disks = disks.into_iter();
    disks.try_fold(q35, Q35::with_disk).map_err(failure)
}

fn failure(error: MachineError) -> Failure {
    Failure::of_machine("the disk cannot be used", error)
}

/// The things that the guest did with a disk.
#[derive(Debug, Default, Serialize)]
pub(super) struct Used {
    image: String,
    read_only: bool,
    bytes: u64,
    reads: u64,
    bytes_read: u64,
    writes: u64,
    bytes_written: u64,
    flushes: u64,
    /// Requests that were answered with an error, or as not supported.
    failed: u64,
    /// Accesses that were refused because the guest keeps the memory private.
    private: u64,
    /// Times that the driver broke the protocol.
    resets_needed: u64,
}

impl Used {
    /// Takes note of the disks before they are used.
    pub(super) fn before(disks: &[Disk]) -> Vec<Self> {
        let used = |disk: &Disk| Self {
            image: disk.path().display().to_string(),
            read_only: disk.is_read_only(),
            bytes: disk.bytes(),
            ..Self::default()
        };
        disks.iter().map(used).collect()
    }

    /// The same with what the guest did.
    pub(super) fn with(self, counts: DiskCounts) -> Self {
        Self {
            reads: counts.reads,
            bytes_read: counts.bytes_read,
            writes: counts.writes,
            bytes_written: counts.bytes_written,
            flushes: counts.flushes,
            failed: counts.failed,
            private: counts.private,
            resets_needed: counts.resets_needed,
            ..self
        }
    }

    /// The line of the report.
    pub(super) fn line(&self) -> String {
        let mut line = format!(
            "disk {}: {} ({}), {} ({}), {}",
            self.image,
            plural(self.reads, "read"),
            size(self.bytes_read),
            plural(self.writes, "write"),
            size(self.bytes_written),
            match self.flushes {
                1 => "1 flush".into(),
                flushes => format!("{flushes} flushes"),
            },
        );
        for (count, what) in [
            (self.failed, "failed"),
            (self.private, "refused, for private memory"),
            (self.resets_needed, "resets needed"),
        ] {
            if count != 0 {
                line.push_str(&format!(", {count} {what}"));
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_written_unless_the_option_ends_with_ro() {
        for (text, path, read_only) in [
            ("a.img", "a.img", false),
            ("a.img,ro", "a.img", true),
            ("a,b.img", "a,b.img", false),
            ("a.img,rw", "a.img,rw", false),
        ] {
            let path = path.into();
            assert_eq!(text.parse(), Ok(Wanted { path, read_only }), "{text}");
        }
        assert!("".parse::<Wanted>().is_err() && ",ro".parse::<Wanted>().is_err());
    }

    #[test]
    fn the_line_tells_failures_only_where_there_are_some() {
        let used = Used {
            image: "a.img".into(),
            read_only: false,
            bytes: 1 << 20,
            reads: 1,
            bytes_read: 4096,
            writes: 2,
            bytes_written: 1024,
            flushes: 1,
            ..Used::default()
        };
        let good = "disk a.img: 1 read (4K), 2 writes (1K), 1 flush";
        assert_eq!(used.line(), good);
        let bad = Used {
            failed: 3,
            private: 2,
            resets_needed: 2,
            ..used
        };
        let told = ", 3 failed, 2 refused, for private memory, 2 resets needed";
        assert_eq!(bad.line(), format!("{good}{told}"));
    }
}
