//! The log: a line for each ioctl, in strace's manner, with the check that failed.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

use kvm_ops_softkvm::Refusal;
use kvm_ops_uapi::cap;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::sev::{self, SevCmd};
use kvm_ops_uapi::tdx::{self, TdxCmd};
use libc::c_int;
use zerocopy::IntoBytes;

use crate::{files, memory};

fn file() -> Option<&'static File> {
    static FILE: OnceLock<Option<File>> = OnceLock::new();
    let file = FILE.get_or_init(|| {
        let path = std::env::var_os("KVM_OPS_LOG")?;
        OpenOptions::new().create(true).append(true).open(path).ok()
    });
    file.as_ref()
}

/// A command and the firmware's status, as the call left them.
fn sev_command(address: u64) -> String {
    let mut cmd = SevCmd::default();
    if memory::read(address, cmd.as_mut_bytes()).is_err() {
        return format!("{address:#x}");
    }
    let (id, error) = (cmd.id.get(), cmd.error.get());
    let name =
        sev::command_name(id).map_or_else(|| id.to_string(), |name| format!("KVM_SEV_{name}"));
    format!("{{{name}, data={:#x}, error={error:#x}}}", cmd.data.get())
}

/// A command and the module's status, as the call left them.
fn tdx_command(address: u64) -> String {
    let mut cmd = TdxCmd::default();
    if memory::read(address, cmd.as_mut_bytes()).is_err() {
        return format!("{address:#x}");
    }
    let id = cmd.id.get();
    let name =
        tdx::command_name(id).map_or_else(|| id.to_string(), |name| format!("KVM_TDX_{name}"));
    let (flags, data, error) = (cmd.flags.get(), cmd.data.get(), cmd.hw_error.get());
    format!("{{{name}, flags={flags:#x}, data={data:#x}, hw_error={error:#x}}}")
}

/// Writes the line of a call. One write, so that lines of threads do not mix.
pub(crate) fn ioctl(fd: c_int, number: u32, argument: u64, answer: &Result<i64, Refusal>) {
    let Some(mut file) = file() else {
        return;
    };
    let ioctl = Ioctl::from_number(number);
    let name = ioctl.map_or_else(|| format!("{number:#x}"), |ioctl| ioctl.name().to_owned());
    let number = u32::try_from(argument).ok();
    let argument = match number.and_then(cap::name) {
        Some(name) if ioctl == Some(ioctl::KVM_CHECK_EXTENSION) => format!("KVM_CAP_{name}"),
        _ if ioctl == Some(ioctl::KVM_MEMORY_ENCRYPT_OP) => match files::is_intel() {
            true => tdx_command(argument),
            false => sev_command(argument),
        },
        _ => format!("{argument:#x}"),
    };
    let result = match answer {
        Ok(value) => value.to_string(),
        Err(refusal) if refusal.check().is_some() => format!("-1 {} ({refusal})", refusal.errno()),
        Err(refusal) => format!("-1 {refusal}"),
    };
    // A log that cannot be written is no reason to fail the program.
    let _ = file.write_all(format!("ioctl({fd}, {name}, {argument}) = {result}\n").as_bytes());
}
