//! Faults on purpose: ioctls that fail without being made, and memory that calls do not get.

use std::fmt;
use std::num::NonZeroU64;

use kvm_ops::{Fault, FaultPlan};
use kvm_ops_uapi::checks::{Check, TABLES};
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::{Errno, U32, sev, tdx};
use serde::Deserialize;
use zerocopy::IntoBytes;

use crate::refusal::Result;
use crate::{Process, Refusal};

/// Ioctls that fail without being made, and memory that calls do not get, as a plan says.
///
/// A plan is TOML. Each fault names an ioctl, or a command of `KVM_MEMORY_ENCRYPT_OP`; says which of these calls it meets,
/// counted over all files and threads; and the errno that they get. The forms are those of [`Fault`]: `nth` (from 1), with
/// `times` for several in a row; `every`; or `one_in`, at random from `seed`.
///
/// A fault that has `memory` in place of `call` and `errno` meets the memory that calls take: the call is made, and fails with
/// ENOMEM at the place where the kernel allocates, after the checks in front of it. It names a call of
/// [`TABLES`] that checks for memory.
///
/// ```
/// use kvm_ops::Vendor;
/// use kvm_ops::sim::SimHost;
/// use kvm_ops_softkvm::{Faults, Kernel, Task};
/// use kvm_ops_uapi::{Errno, ioctl};
///
/// let faults = Faults::parse(r#"
///     [[fault]]
///     call = "KVM_CREATE_VCPU"
///     nth = 2
///     errno = "ENOMEM"
///
///     [[fault]]
///     call = "KVM_SEV_LAUNCH_START"
///     every = 3
///     errno = "EIO"
/// "#)?;
/// let kernel = Kernel::with_faults(SimHost::new(Vendor::Amd), faults);
/// let task = Task::new();
/// let kvm = task.open(kernel.open_kvm())?;
/// let vm = task.ioctl(kvm, ioctl::KVM_CREATE_VM, 0)? as i32;
/// task.ioctl(vm, ioctl::KVM_CREATE_VCPU, 0)?;
/// let refusal = task.ioctl(vm, ioctl::KVM_CREATE_VCPU, 1).unwrap_err();
/// assert!(refusal.errno() == Errno::ENOMEM && refusal.is_injected());
/// assert_eq!(kernel.faults().happened(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct Faults {
    plan: FaultPlan,
    /// False if there is no fault, so that calls need not be counted.
    is_armed: bool,
}

/// A plan of faults that cannot be read. Its text names the place.
#[derive(Debug)]
pub struct FaultsError(Box<toml::de::Error>);

impl fmt::Display for FaultsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The parser's text ends its last line.
        f.write_str(self.0.to_string().trim_end())
    }
}

impl std::error::Error for FaultsError {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Plan {
    #[serde(default)]
    fault: Vec<Entry>,
}

/// A fault, as the plan spells it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spelled {
    call: Option<Call>,
    memory: Option<Memory>,
    nth: Option<NonZeroU64>,
    times: Option<NonZeroU64>,
    every: Option<NonZeroU64>,
    one_in: Option<NonZeroU64>,
    seed: Option<u64>,
    errno: Option<Named>,
}

#[derive(Deserialize)]
#[serde(try_from = "Spelled")]
struct Entry(Fault);

impl TryFrom<Spelled> for Entry {
    type Error = &'static str;

    fn try_from(from: Spelled) -> Result<Self, Self::Error> {
        let fault = match (from.nth, from.every, from.one_in) {
            (Some(nth), None, None) => {
                Fault::nth(nth.get()).times(from.times.map_or(1, NonZeroU64::get))
            }
            (None, Some(every), None) => Fault::every(every.get()),
            (None, None, Some(one_in)) => Fault::random(from.seed.unwrap_or(0), one_in.get()),
            _ => return Err("a fault has one of `nth`, `every` and `one_in`"),
        };
        if from.times.is_some() && from.nth.is_none() {
            return Err("`times` goes with `nth`");
        }
        if from.seed.is_some() && from.one_in.is_none() {
            return Err("`seed` goes with `one_in`");
        }
        let (code, errno) = match (from.call, from.memory, from.errno) {
            (Some(call), None, Some(errno)) => (call.0, errno.0),
            (None, Some(memory), None) => (memory.0, Errno::ENOMEM),
            _ => return Err("a fault has `call` and `errno`, or `memory`"),
        };
        Ok(Self(fault.of(code).status(errno.0 as u64)))
    }
}

/// The number of a call in the plan: the ioctl's, and above it the command's plus 1, if it has one.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct Call(u64);

impl Call {
    fn new(ioctl: Ioctl, command: Option<u32>) -> Self {
        let command = command.map_or(0, |id| u64::from(id) + 1);
        Self(command << 32 | u64::from(ioctl.number()))
    }
}

/// The number of a call's memory in the plan: its place among the checks for memory, above all calls.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct Memory(u64);

impl Memory {
    const FIRST: u64 = 1 << 48;

    fn find(is_meant: impl Fn(&Check) -> bool) -> Option<Self> {
        let mut checks = TABLES
            .iter()
            .copied()
            .flatten()
            .filter(|check| check.name == "MEMORY");
        let index = checks.position(is_meant)?;
        Some(Self(Self::FIRST + index as u64))
    }
}

impl TryFrom<String> for Memory {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let found = Self::find(|check| check.call == name);
        found.ok_or_else(|| format!("no check for memory is known of `{name}`"))
    }
}

/// Numbers of commands are below.
const COMMANDS: u32 = 256;

/// The command with a name that begins as its family's do.
fn command(name: &str) -> Option<u32> {
    let (name, named): (_, fn(u32) -> Option<&'static str>) = match name.strip_prefix("KVM_SEV_") {
        Some(name) => (name, sev::command_name),
        None => (name.strip_prefix("KVM_TDX_")?, tdx::command_name),
    };
    (0..COMMANDS).find(|id| named(*id) == Some(name))
}

impl TryFrom<String> for Call {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        if let Some(ioctl) = ioctl::ALL.iter().find(|ioctl| ioctl.name() == name) {
            return Ok(Self::new(*ioctl, None));
        }
        let id = command(&name).ok_or_else(|| format!("`{name}` is no ioctl and no command"))?;
        Ok(Self::new(ioctl::KVM_MEMORY_ENCRYPT_OP, Some(id)))
    }
}

/// An errno by its name.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Named(Errno);

impl TryFrom<String> for Named {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let mut all = (1..4096).map(Errno);
        let found = all.find(|errno| errno.name() == Some(&name));
        found
            .map(Self)
            .ok_or_else(|| format!("`{name}` is no errno of KVM's calls"))
    }
}

impl Faults {
    /// Reads a plan.
    ///
    /// # Errors
    /// Text that is not TOML, a key or name that is not known, or a fault that does not say which calls it meets. The error
    /// names the line.
    pub fn parse(text: &str) -> Result<Self, FaultsError> {
        let plan: Plan = toml::from_str(text).map_err(|error| FaultsError(Box::new(error)))?;
        let faults = Self {
            is_armed: !plan.fault.is_empty(),
            plan: FaultPlan::new(),
        };
        for Entry(fault) in plan.fault {
            faults.plan.arm(fault);
        }
        Ok(faults)
    }

    /// The number of calls that failed so far.
    pub fn happened(&self) -> u64 {
        self.plan.happened()
    }

    /// Counts a call, and fails it if the plan says so.
    pub(crate) fn check(
        &self,
        process: &dyn Process,
        ioctl: Option<Ioctl>,
        argument: u64,
    ) -> Result<()> {
        let Some(ioctl) = ioctl.filter(|_| self.is_armed) else {
            return Ok(());
        };
        self.count(Call::new(ioctl, None))?;
        if ioctl == ioctl::KVM_MEMORY_ENCRYPT_OP {
            // The command's number is the first word of its structure. One that cannot be read has none.
            let mut id = U32::ZERO;
            if process.read(argument, id.as_mut_bytes()).is_ok() {
                self.count(Call::new(ioctl, Some(id.get())))?;
            }
        }
        Ok(())
    }

    /// Counts memory that a call takes, by the check that there is some, and fails with the check if the plan says so.
    pub(crate) fn allocate(&self, check: Check) -> Result<()> {
        if !self.is_armed {
            return Ok(());
        }
        let Some(memory) = Memory::find(|known| *known == check) else {
            return Ok(());
        };
        match self.plan.status(memory.0)? {
            Some(_) => Err(check.into()),
            None => Ok(()),
        }
    }

    fn count(&self, call: Call) -> Result<()> {
        match self.plan.status(call.0)? {
            Some(errno) => Err(Refusal::injected(Errno(errno as i32))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ioctl_and_command_can_be_named() {
        let sev = (0..COMMANDS).filter_map(sev::command_name);
        let tdx = (0..COMMANDS).filter_map(tdx::command_name);
        let commands = sev.map(|name| format!("KVM_SEV_{name}"));
        let commands = commands.chain(tdx.map(|name| format!("KVM_TDX_{name}")));
        let ioctls = ioctl::ALL.iter().map(|ioctl| ioctl.name().to_owned());
        let mut found = 0;
        for name in commands.chain(ioctls) {
            let text = format!("[[fault]]\ncall = \"{name}\"\nnth = 1\nerrno = \"EIO\"");
            assert!(Faults::parse(&text).is_ok(), "{name}");
            found += 1;
        }
        assert!(found > ioctl::ALL.len());
    }

    #[test]
    fn what_is_wrong_in_a_plan_is_named_with_its_line() {
        let fault = |rest: &str| format!("[[fault]]\ncall = \"KVM_RUN\"\n{rest}");
        for (text, expected) in [
            ("[fault".to_owned(), "line 1"),
            ("[[faults]]".to_owned(), "unknown field `faults`"),
            (
                fault("errno = \"EIO\""),
                "one of `nth`, `every` and `one_in`",
            ),
            (
                fault("nth = 1\nevery = 2\nerrno = \"EIO\""),
                "one of `nth`, `every` and `one_in`",
            ),
            (fault("nth = 0\nerrno = \"EIO\""), "line 3"),
            (
                fault("every = 2\ntimes = 2\nerrno = \"EIO\""),
                "`times` goes with",
            ),
            (
                fault("nth = 2\nseed = 2\nerrno = \"EIO\""),
                "`seed` goes with",
            ),
            (fault("nth = 1"), "has `call` and `errno`, or `memory`"),
            (
                fault("memory = \"KVM_CREATE_VM\"\nnth = 1\nerrno = \"EIO\""),
                "has `call` and `errno`, or `memory`",
            ),
            (
                "[[fault]]\nmemory = \"KVM_RUN\"\nnth = 1".to_owned(),
                "no check for memory is known of `KVM_RUN`",
            ),
            (fault("nth = 1\nerrno = \"EKVM\""), "`EKVM` is no errno"),
            (
                "[[fault]]\ncall = \"KVM_SEV_FLY\"\nnth = 1\nerrno = \"EIO\"".to_owned(),
                "`KVM_SEV_FLY` is no ioctl",
            ),
        ] {
            let error = Faults::parse(&text).map(drop).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}\n{error}");
        }
        assert!(Faults::parse("").is_ok(), "no faults");
    }
}
