//! The page of layouts.

use soft_amd_sp::Command;
use std::fmt::Write;

pub fn page() -> String {
    let mut out = String::from(
        "# Command buffers\n\n\
         Printed by `cargo run --example layouts` from the structures of `soft_amd_sp::command`. A\n\
         field is `offset name:length`, in hex; ← marks what the firmware writes. Bytes outside of\n\
         every field are reserved and must be 0. Integers are little-endian, addresses system\n\
         physical.\n\n\
         | id | command | length | fields | what it does |\n|---|---|---|---|---|\n",
    );
    for command in Command::ALL {
        let fields: Vec<_> = command
            .fields()
            .iter()
            .map(|f| {
                let out = if f.out { "←" } else { "" };
                format!("{:x} {}:{:x}{out}", f.offset, f.name, f.len)
            })
            .collect();
        let _ = writeln!(
            out,
            "| {:#04x} | {command} | {:#x} | {} | {} |",
            *command as u32,
            command.buffer_len(),
            fields.join(", "),
            command.purpose().trim(),
        );
    }
    out
}
