//! Files that environment variables name.

use std::path::PathBuf;

/// The file of a variable; without it the test is skipped, and says so.
pub(crate) fn named(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.is_none() {
        println!("skipped: {variable} is not set");
    }
    path
}
