//! The instruction at which a guest stands, in bytes and in words.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use kvm_ops::{Error, Result};
use kvm_ops_machine::{CodeMode, Position};
use serde::Serialize;

/// An instruction.
#[derive(Debug, PartialEq, Eq)]
struct Instruction {
    /// Its bytes in hex; of bytes that are none, all that were looked at.
    bytes: String,
    /// Its text in Intel's notation.
    text: String,
}

impl Instruction {
    /// The instruction at a position; `None` where there are no bytes to look at.
    fn at(position: &Position) -> Option<Self> {
        if position.bytes.is_empty() {
            return None;
        }
        let ip = match position.mode {
            // As jumps count: from the start of the segment.
            CodeMode::Real | CodeMode::Protected16 => position.rip,
            CodeMode::Protected32 | CodeMode::Long => position.linear,
        };
        let bits = position.mode.bits();
        let bytes = &position.bytes;
        let mut decoder = Decoder::with_ip(bits, bytes, ip, DecoderOptions::NONE);
        let decoded = decoder.decode();
        if decoded.is_invalid() {
            return Some(Self {
                bytes: hex(bytes),
                text: "(no instruction)".into(),
            });
        }
        let mut text = String::new();
        IntelFormatter::new().format(&decoded, &mut text);
        Some(Self {
            bytes: hex(&bytes[..decoded.len()]),
            text,
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    let words: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    words.join(" ")
}

/// The place of a vCPU, to follow its name in a line: address, mode, bytes and instruction, or the
/// reason why there is none to show.
pub(crate) fn line(position: &Result<Position>) -> String {
    match position {
        Ok(position) => match Instruction::at(position) {
            Some(Instruction { bytes, text }) => format!(" at {position}: {bytes}  {text}"),
            None => format!(" at {position}: no code can be read there"),
        },
        Err(Error::Protected(_)) => {
            ": its registers are protected from the host, so no instruction can be shown".into()
        }
        Err(error) => format!(": its registers cannot be read: {error}"),
    }
}

/// The same for JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Place {
    cs: u16,
    rip: u64,
    linear: u64,
    mode: &'static str,
    /// The bytes of the instruction, in hex.
    bytes: Option<String>,
    instruction: Option<String>,
}

impl Place {
    /// The place of a vCPU that shows it.
    pub(crate) fn new(position: &Position) -> Self {
        let (bytes, instruction) = Instruction::at(position)
            .map(|found| (found.bytes, found.text))
            .unzip();
        Self {
            cs: position.cs,
            rip: position.rip,
            linear: position.linear,
            mode: position.mode.name(),
            bytes,
            instruction,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops::OpName;

    fn position(mode: CodeMode, bytes: &[u8]) -> Result<Position> {
        Ok(Position {
            cs: 0,
            rip: 0x7c00,
            linear: 0x7c00,
            mode,
            bytes: bytes.to_vec(),
        })
    }

    #[test]
    fn bytes_are_decoded_in_their_mode() {
        for (mode, bytes, text) in [
            (
                CodeMode::Real,
                &[0x0f, 0x0b, 0xf4][..],
                "(real mode, 16-bit): 0f 0b  ud2",
            ),
            (CodeMode::Real, &[0xeb, 0xfe], ": eb fe  jmp short 7C00h"),
            (CodeMode::Protected32, &[0x48, 0x90], ": 48  dec eax"),
            (CodeMode::Long, &[0x48, 0xff, 0xc0], ": 48 ff c0  inc rax"),
            (CodeMode::Long, &[0x06, 0x07], ": 06 07  (no instruction)"),
            (CodeMode::Long, &[], ": no code can be read there"),
        ] {
            let line = line(&position(mode, bytes));
            assert!(line.contains(text), "{text}: {line}");
        }
    }

    #[test]
    fn protected_registers_are_said_to_be() {
        static REGS: OpName = OpName("regs");
        let secret = line(&Err(Error::Protected(&REGS)));
        assert!(secret.contains("protected from the host"), "{secret}");
    }
}
