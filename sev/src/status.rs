//! Statuses of the firmware and of RMP instructions, and their form in an [`Error`].

use core::fmt;

use kvm_ops::{Error, FirmwareCall};

/// Statuses of the firmware.
pub use kvm_ops_uapi::status::Status;

use crate::command::Command;

/// An RMP instruction of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Instruction {
    /// RMPUPDATE.
    RmpUpdate = 0x1_0000,
    /// PSMASH.
    Psmash = 0x1_0001,
}

/// The failure codes of RMP instructions (APM vol. 3, "RMPUPDATE" and "PSMASH"; Linux `asm/sev.h`).
const RMP_CODES: [(u32, &str); 3] = [(1, "FAIL_INPUT"), (2, "FAIL_PERMISSION"), (3, "FAIL_INUSE")];

impl Instruction {
    /// The name of a code in EAX. `None` for a number that the manuals do not name.
    pub fn code_name(self, code: u32) -> Option<&'static str> {
        match (self, code) {
            (Self::RmpUpdate, 4) => Some("FAIL_OVERLAP"),
            (Self::Psmash, 4) => Some("FAIL_BADADDR"),
            _ => {
                let named = RMP_CODES.iter().find(|(number, _)| *number == code);
                named.map(|(_, name)| *name)
            }
        }
    }
}

/// A command or an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// A command of the AMD SP.
    Command(Command),
    /// An RMP instruction.
    Instruction(Instruction),
}

impl Operation {
    /// The name, as the manuals have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Command(command) => command.name(),
            Self::Instruction(Instruction::RmpUpdate) => "RMPUPDATE",
            Self::Instruction(Instruction::Psmash) => "PSMASH",
        }
    }
}

/// An operation that failed, and its code: the contents of an [`Error::Firmware`] of this back end.
///
/// The status word of the error holds the code in bits 31:0, and in bits 63:32 the command's number,
/// or 0x10000 and up for an instruction. So an error names the command without being larger.
///
/// ```
/// # extern crate kvm_ops_core as kvm_ops;
/// use kvm_ops::Error;
/// use kvm_ops_sev::Failure;
/// let error = Error::Firmware(0x0000_0021_0000_000d);
/// assert_eq!(Failure::of(&error).unwrap().to_string(), "ACTIVATE answered INVALID_ASID (0xd)");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The operation that failed.
    pub operation: Operation,
    /// The code: a [`Status`] for a command, EAX for an instruction.
    pub code: u32,
}

impl Failure {
    /// The failure in an error of the firmware or of an instruction.
    pub fn of(error: &Error) -> Option<Self> {
        let Error::Firmware(word) = error else {
            return None;
        };
        let (number, code) = ((word >> 32) as u32, *word as u32);
        let instruction = [Instruction::RmpUpdate, Instruction::Psmash]
            .into_iter()
            .find(|i| *i as u32 == number)
            .map(Operation::Instruction);
        let operation =
            instruction.or_else(|| Command::from_number(number).map(Operation::Command))?;
        Some(Self { operation, code })
    }

    /// The call by name, with the name of its code.
    pub fn call(&self) -> FirmwareCall {
        let status_name = match self.operation {
            Operation::Command(_) => Status(self.code).name(),
            Operation::Instruction(instruction) => instruction.code_name(self.code),
        };
        FirmwareCall {
            name: self.operation.name(),
            status: self.code.into(),
            status_name,
            operand: None,
        }
    }

    /// The way out, in words; empty where the code says no more than its name.
    pub fn advice(&self) -> &'static str {
        match self.operation {
            Operation::Instruction(instruction) => rmp_advice(instruction, self.code),
            Operation::Command(_) => command_advice(Status(self.code)),
        }
    }

    /// The status, if a command failed.
    pub const fn status(&self) -> Option<Status> {
        match self.operation {
            Operation::Command(_) => Some(Status(self.code)),
            Operation::Instruction(_) => None,
        }
    }
}

fn rmp_advice(instruction: Instruction, code: u32) -> &'static str {
    match (instruction, code) {
        (_, 1) => "the page is not memory that the RMP covers",
        (_, 2) => "the entry is immutable: reclaim the page first (SNP_PAGE_RECLAIM)",
        (_, 3) => "another processor holds the entry: call again",
        (Instruction::RmpUpdate, 4) => {
            "split the large page first (PSMASH), or take the pages in it back"
        }
        _ => "",
    }
}

fn command_advice(status: Status) -> &'static str {
    match status {
        Status::INVALID_PLATFORM_STATE => "initialise the platform first (INIT or SNP_INIT)",
        Status::INVALID_GUEST_STATE => {
            "the guest is at another step of its launch or migration: check the order of the calls"
        }
        Status::POLICY_FAILURE => "the guest's policy does not allow it: change the policy",
        Status::INVALID_ASID | Status::ASID_OWNED => {
            "the ASID is another guest's, or not of this kind of guest: take another"
        }
        Status::WBINVD_REQUIRED => "write the caches of every processor back first (WBINVD)",
        Status::DFFLUSH_REQUIRED => "flush the data fabric first (DF_FLUSH)",
        Status::RESOURCE_LIMIT => "destroy another guest: firmware has no room for this one",
        Status::INVALID_PAGE_STATE | Status::INVALID_PAGE_OWNER => {
            "the RMP has the page in another state, or for another owner"
        }
        Status::BAD_MEASUREMENT | Status::BAD_SIGNATURE | Status::INVALID_CERTIFICATE => {
            "the packet, its key or its certificate is not what firmware expects"
        }
        Status::INVALID_MDATA_ENTRY => {
            "the record is of another page, or its page came back before"
        }
        Status::UNSUPPORTED | Status::INVALID_COMMAND => "update the firmware of the AMD SP",
        Status::HWERROR_PLATFORM | Status::HWERROR_UNSAFE => "restart the host",
        _ => "",
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let number = match failure.operation {
            Operation::Command(command) => command as u32,
            Operation::Instruction(instruction) => instruction as u32,
        };
        Error::Firmware(u64::from(number) << 32 | u64::from(failure.code))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.call().fmt(f)
    }
}

/// The status that a command's error carries, 0 for every other error.
pub(crate) fn status_of(error: &Error) -> u64 {
    Failure::of(error)
        .and_then(|failure| failure.status())
        .map_or(0, |status| status.0.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn names_and_numbers_are_those_of_the_software_firmware() {
        for (status, name) in Status::NAMED {
            let theirs = soft_amd_sp::Status(status.0 as u16);
            assert_eq!(theirs.name(), Some(*name));
        }
        assert_eq!(Status::NAMED.len(), soft_amd_sp::Status::NAMED.len());
    }

    #[test]
    fn codes_of_rmp_instructions_are_those_of_the_software_rmp_and_have_names() {
        use Instruction::{Psmash, RmpUpdate};
        use soft_amd_sp::RmpError;
        for (instruction, error, name) in [
            (RmpUpdate, RmpError::Input, "FAIL_INPUT"),
            (RmpUpdate, RmpError::Permission, "FAIL_PERMISSION"),
            (RmpUpdate, RmpError::InUse, "FAIL_INUSE"),
            (RmpUpdate, RmpError::Overlap, "FAIL_OVERLAP"),
            (Psmash, RmpError::Input, "FAIL_INPUT"),
            (Psmash, RmpError::Permission, "FAIL_PERMISSION"),
            (Psmash, RmpError::InUse, "FAIL_INUSE"),
            (Psmash, RmpError::BadAddress, "FAIL_BADADDR"),
        ] {
            let code = error.code().unwrap();
            assert_eq!(instruction.code_name(code), Some(name));
            let operation = Operation::Instruction(instruction);
            let text = Failure { operation, code }.to_string();
            let expected = alloc::format!("{} answered {name} ({code:#x})", operation.name());
            assert_eq!(text, expected);
        }
        assert_eq!(Psmash.code_name(5), None);
    }

    #[test]
    fn every_failure_comes_back_out_of_its_error() {
        let commands = Command::ALL.iter().map(|c| Operation::Command(*c));
        let instructions =
            [Instruction::RmpUpdate, Instruction::Psmash].map(Operation::Instruction);
        for operation in commands.chain(instructions) {
            for code in [1, 0x3a, 0xffff, u32::MAX] {
                let failure = Failure { operation, code };
                assert_eq!(Failure::of(&failure.into()), Some(failure));
            }
        }
        assert_eq!(Failure::of(&Error::Firmware(7)), None);
        assert_eq!(Failure::of(&Error::Busy), None);
    }
}
