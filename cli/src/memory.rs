//! The memory that this system gives, as far as it is known before a VM is built.

use std::fs;

/// The hole below 4 GiB: of so much RAM all but 2 GiB lies behind it.
const WITH_HOLE: u64 = 0xb000_0000;
const HOLE_BYTES: u64 = 2 << 30;

/// The limits of this system. A limit that it does not tell is none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Limits {
    /// Bits of physical addresses of its processors.
    address_bits: Option<u32>,
    /// Bytes that this process may still map (`ulimit -v`).
    address_space: Option<u64>,
    /// Bytes that may still be promised, on a system that never promises more than it has
    /// (`vm.overcommit_memory` = 2).
    promised: Option<u64>,
    /// Bytes that can be used without taking them from others.
    available: Option<u64>,
}

impl Limits {
    /// Asks Linux; any other system tells nothing.
    pub(crate) fn of_system() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self::parse(&Sources {
            cpuinfo: read("/proc/cpuinfo"),
            limits: read("/proc/self/limits"),
            status: read("/proc/self/status"),
            meminfo: read("/proc/meminfo"),
            overcommit: read("/proc/sys/vm/overcommit_memory"),
        })
    }

    fn parse(sources: &Sources) -> Self {
        let meminfo = |key| bytes_of(&sources.meminfo, key);
        let bits = |line: &str| {
            let (_, rest) = line.strip_prefix("address sizes")?.split_once(':')?;
            rest.split_whitespace().next()?.parse().ok()
        };
        let space = |line: &str| {
            let soft = line
                .strip_prefix("Max address space")?
                .split_whitespace()
                .next()?;
            soft.parse::<u64>().ok()
        };
        let strict = sources.overcommit.trim() == "2";
        Self {
            address_bits: sources.cpuinfo.lines().find_map(bits),
            address_space: sources.limits.lines().find_map(space).map(|limit| {
                limit.saturating_sub(bytes_of(&sources.status, "VmSize:").unwrap_or(0))
            }),
            promised: meminfo("CommitLimit:")
                .zip(meminfo("Committed_AS:"))
                .map(|(limit, used)| limit.saturating_sub(used))
                .filter(|_| strict),
            available: meminfo("MemAvailable:")
                .map(|free| free.saturating_add(meminfo("SwapFree:").unwrap_or(0))),
        }
    }

    /// Checks that so much memory can be mapped, whether or not it is ever used.
    pub(crate) fn maps(&self, bytes: u64) -> Result<(), String> {
        let over = |limit: Option<u64>| limit.filter(|limit| bytes > *limit);
        if let Some(limit) = over(self.address_space) {
            return Err(format!(
                "{bytes:#x} bytes of memory are more than the {limit:#x} that this process may map \
                 (ulimit -v)"
            ));
        }
        if let Some(limit) = over(self.promised) {
            return Err(format!(
                "{bytes:#x} bytes of memory are more than the {limit:#x} that this system promises \
                 (vm.overcommit_memory is 2)"
            ));
        }
        Ok(())
    }

    /// Checks that guest-physical addresses on this processor reach so much memory.
    pub(crate) fn addresses(&self, bytes: u64) -> Result<(), String> {
        let hole = if bytes >= WITH_HOLE { HOLE_BYTES } else { 0 };
        match self.address_bits {
            Some(bits) if bits < 64 && bytes.saturating_add(hole) > 1 << bits => Err(format!(
                "{bytes:#x} bytes of memory are beyond the {bits}-bit addresses of this processor"
            )),
            _ => Ok(()),
        }
    }

    /// Checks that so much memory can be used at once.
    pub(crate) fn holds(&self, bytes: u64) -> Result<(), String> {
        self.maps(bytes)?;
        match self.available {
            Some(free) if bytes > free => Err(format!(
                "{bytes:#x} bytes of memory are needed, and {free:#x} are available"
            )),
            _ => Ok(()),
        }
    }
}

/// The most memory in bytes that this process ever had in RAM (`VmHWM` in proc(5)).
pub(crate) fn peak() -> Option<u64> {
    bytes_of(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// A number that a file of /proc tells in kB.
fn bytes_of(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1 << 10)
}

/// The files that tell the limits.
struct Sources {
    cpuinfo: String,
    limits: String,
    status: String,
    meminfo: String,
    overcommit: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(overcommit: &str) -> Limits {
        Limits::parse(&Sources {
            cpuinfo: "processor\t: 0\naddress sizes\t: 36 bits physical, 48 bits virtual\n".into(),
            limits: "Max address space         8589934592           unlimited            bytes\n"
                .into(),
            status: "VmPeak:\t  100 kB\nVmSize:\t    4096 kB\n".into(),
            meminfo: "MemAvailable:    1048576 kB\nSwapFree:  1024 kB\nCommitLimit: 2097152 kB\n\
                      Committed_AS: 1048576 kB\n"
                .into(),
            overcommit: overcommit.into(),
        })
    }

    #[test]
    fn what_cannot_be_mapped_is_told_with_the_limit() {
        let free = limits("0\n");
        let space = (8 << 30) - (4 << 20);
        assert_eq!(free.maps(space), Ok(()));
        let refused = free.maps(space + 1).unwrap_err();
        assert!(
            refused.contains("0x1ffc00000") && refused.contains("ulimit -v"),
            "{refused}"
        );
        let strict = limits("2\n");
        assert_eq!(strict.maps(1 << 30), Ok(()));
        assert!(
            strict
                .maps((1 << 30) + 1)
                .unwrap_err()
                .contains("overcommit")
        );
    }

    #[test]
    fn numbers_of_proc_are_read_in_bytes() {
        let status = "Name:\tkvm-ops\nVmPeak:\t  90 kB\nVmHWM:\t    3072 kB\n";
        assert_eq!(bytes_of(status, "VmHWM:"), Some(3 << 20));
        assert_eq!(bytes_of("VmHWM: 3 MB\n", "VmHWM:"), None);
        assert_eq!(bytes_of("", "VmHWM:"), None);
    }

    #[test]
    fn addresses_count_the_hole_below_4_gib() {
        let limits = limits("0");
        assert_eq!(limits.addresses(62 << 30), Ok(()));
        let refused = limits.addresses((62 << 30) + 4096).unwrap_err();
        assert!(refused.contains("36-bit"), "{refused}");
    }

    #[test]
    fn what_is_used_at_once_must_be_available() {
        let limits = limits("0");
        let free = (1 << 30) + (1 << 20);
        assert_eq!(limits.holds(free), Ok(()));
        assert!(limits.holds(free + 1).is_err());
    }

    #[test]
    fn a_system_that_tells_nothing_has_no_limits() {
        let none = Limits::default();
        assert_eq!(none.holds(u64::MAX), Ok(()));
        assert_eq!(none.addresses(u64::MAX), Ok(()));
    }
}
