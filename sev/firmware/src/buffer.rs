//! Command buffers, field by field.

use crate::command::{Command, Field};
use crate::platform::Platform;
use crate::status::Status;
use crate::wire::put;

/// The buffer of a command, whose fields are named as in [`Command::fields`].
///
/// ```
/// use soft_amd_sp::{Command, CommandBuffer};
///
/// let buffer = CommandBuffer::new(Command::ACTIVATE).with("handle", 1).with("asid", 100);
/// assert_eq!(buffer.bytes(), [1, 0, 0, 0, 100, 0, 0, 0]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandBuffer {
    command: Command,
    bytes: Vec<u8>,
    misnamed: bool,
}

impl CommandBuffer {
    /// A buffer of zeros.
    pub fn new(command: Command) -> Self {
        Self {
            command,
            bytes: vec![0; command.buffer_len()],
            misnamed: false,
        }
    }

    fn field(&self, name: &str) -> Option<&'static Field> {
        self.command.fields().iter().find(|f| f.name == name)
    }

    /// Sets a field to a number, cut to the field's length. A name that the command does not have
    /// makes it end with INVALID_PARAM without being carried out.
    pub fn with(self, name: &str, value: u64) -> Self {
        self.with_bytes(name, &value.to_le_bytes())
    }

    /// Sets a field to bytes, cut to the field's length.
    pub fn with_bytes(mut self, name: &str, value: &[u8]) -> Self {
        match self.field(name) {
            Some(f) => {
                let n = value.len().min(f.len);
                put(&mut self.bytes, f.offset, &value[..n]);
            }
            None => self.misnamed = true,
        }
        self
    }

    /// A field as a number; `None` for a name that the command does not have or a field longer
    /// than 8 bytes.
    pub fn get(&self, name: &str) -> Option<u64> {
        let f = self.field(name)?;
        let mut value = [0; 8];
        let bytes = self.bytes.get(f.offset..f.offset + f.len)?;
        value.get_mut(..f.len)?.copy_from_slice(bytes);
        Some(u64::from_le_bytes(value))
    }

    /// The command.
    pub fn command(&self) -> Command {
        self.command
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn run(&mut self, platform: &Platform) -> Status {
        if self.misnamed {
            return Status::INVALID_PARAM;
        }
        platform.command(self.command, &mut self.bytes)
    }
}

impl From<Command> for u32 {
    fn from(command: Command) -> u32 {
        command as u32
    }
}
