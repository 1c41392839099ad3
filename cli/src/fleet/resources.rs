//! The resources of this process as the system counts them: an independent check for leaks of
//! teardowns.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

/// The time limit for joined threads to disappear. KVM has a kernel thread for each VM, which ends
/// after the VM.
const PATIENCE: Duration = Duration::from_secs(5);

/// Resources of a process. `None` if the system does not show the number.
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
    /// Counts the resources now.
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

    /// Counts the resources, and waits up to `PATIENCE` until there are no more than at `then`.
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

    /// Returns the resources beyond those of `then`, one sentence each.
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
