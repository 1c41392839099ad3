//! What this process holds, by the system's account: an independent check that teardowns leave
//! nothing behind.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

/// How long the system may take to end threads that were joined: KVM keeps a kernel thread for
/// each VM, and ends it after the VM.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a process holds. `None` where the system does not tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Resources {
    /// Open file descriptors.
    descriptors: Option<usize>,
    /// Threads.
    threads: Option<usize>,
    /// Mappings of KVM files, such as the page that a vCPU shares with the kernel.
    kvm_mappings: Option<usize>,
}

impl Resources {
    /// Counts.
    pub(crate) fn now() -> Self {
        let entries = |dir: &str| fs::read_dir(dir).ok().map(Iterator::count);
        Self {
            descriptors: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            kvm_mappings: fs::read_to_string("/proc/self/maps")
                .ok()
                .map(|maps| maps.lines().filter(|line| line.contains("kvm-v")).count()),
        }
    }

    /// Counts, when no more is held than then, or after some patience.
    pub(crate) fn settled(then: &Self) -> Self {
        let start = Instant::now();
        loop {
            let now = Self::now();
            if now.more_than(then).is_empty() || start.elapsed() > PATIENCE {
                return now;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// What is held beyond what was held then, each a sentence.
    pub(crate) fn more_than(&self, then: &Self) -> Vec<String> {
        [
            ("file descriptors", self.descriptors, then.descriptors),
            ("threads", self.threads, then.threads),
            (
                "mappings of KVM files",
                self.kvm_mappings,
                then.kvm_mappings,
            ),
        ]
        .into_iter()
        .filter_map(|(what, now, then)| {
            let more = now?.checked_sub(then?).filter(|more| *more > 0)?;
            Some(format!("{more} {what} more than before"))
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_grew_is_told() {
        let held = |descriptors| Resources {
            descriptors: Some(descriptors),
            threads: Some(1),
            kvm_mappings: None,
        };
        assert!(held(3).more_than(&held(3)).is_empty());
        assert!(held(2).more_than(&held(3)).is_empty());
        assert_eq!(
            held(5).more_than(&held(3)),
            ["2 file descriptors more than before"]
        );
    }
}
