//! Reading files that others name: of bounded size, and never waiting.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::MachineError;

/// Reads a regular file of at most `limit` bytes.
///
/// Pipes and devices are refused unread: opening a pipe without a writer would wait for ever, and
/// `/dev/zero` has no end.
///
/// # Errors
/// [`MachineError::Read`], [`MachineError::NotAFile`] or [`MachineError::FileTooLarge`].
pub fn read_file(path: impl AsRef<Path>, limit: u64) -> Result<Vec<u8>, MachineError> {
    let path = path.as_ref();
    let failed = |source| MachineError::Read {
        path: path.to_owned(),
        source,
    };
    let too_large = |bytes| MachineError::FileTooLarge {
        path: path.to_owned(),
        bytes,
        limit,
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(MachineError::NotAFile {
            path: path.to_owned(),
        });
    }
    if metadata.len() > limit {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::new();
    // One byte more than allowed, so that a file that grew meanwhile is seen to be too large.
    let mut limited = File::open(path)
        .map_err(failed)?
        .take(limit.saturating_add(1));
    limited.read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_regular_file_is_read_up_to_the_limit() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"four").unwrap();
        assert_eq!(read_file(file.path(), 4).unwrap(), b"four");
        let large = read_file(file.path(), 3).unwrap_err();
        let text = "has 0x4 bytes, more than the 0x3 that it may have";
        assert!(large.to_string().ends_with(text), "{large}");
        // A file with a hole: nothing is read, so nothing is allocated.
        file.as_file().set_len(1 << 40).unwrap();
        let large = read_file(file.path(), 1 << 30).unwrap_err();
        assert!(matches!(large, MachineError::FileTooLarge { .. }));
    }

    #[test]
    fn what_is_no_regular_file_is_refused_without_waiting() {
        for path in ["/dev/null", "/dev/zero", "/"] {
            let error = read_file(path, 16).unwrap_err();
            assert!(matches!(error, MachineError::NotAFile { .. }), "{error}");
        }
        let error = read_file("/nonexistent", 16).unwrap_err();
        assert!(std::error::Error::source(&error).is_some());
        assert_eq!(error.to_string(), "cannot read /nonexistent");
    }
}
