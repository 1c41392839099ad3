//! `kvm-ops with`: an unmodified program on a software /dev/kvm.

use std::env;
use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvm_ops_softkvm::{Faults, Player};

use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::{files, term};

/// Runs a program that finds a software /dev/kvm and /dev/sev.
///
/// The program is dynamically linked and otherwise as it is: a library in front of libc answers its
/// ioctls as Linux does. It takes the place of this program, and its exit code is the answer.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops with --amd -- ./sev_migrate_tests
  kvm-ops with --amd --log calls.log -- ./my-vmm   each ioctl, and the check that failed
  kvm-ops with --amd --record run.txt -- ./my-vmm  then, as a test of my-vmm without a machine:
  kvm-ops with --replay run.txt -- ./my-vmm
  kvm-ops with --amd --inject plan.toml -- ./my-vmm   chosen ioctls fail; a plan is a list of faults:
    [[fault]]
    call = \"KVM_CREATE_VCPU\"   or a command: \"KVM_SEV_LAUNCH_START\", \"KVM_TDX_INIT_VM\"
    nth = 2                    counted from 1; with `times`, so many in a row; or `every = N`, or
                               `one_in = N` at random from `seed`
    errno = \"ENOMEM\"
  or, in place of `call` and `errno`, what a call allocates: memory = \"KVM_CREATE_VCPU\"")]
pub(crate) struct Args {
    /// An Intel machine: normal and software-protected VMs, and TDs
    #[arg(long, conflicts_with = "amd")]
    intel: bool,

    /// An AMD machine, the default: also SEV, SEV-ES and SNP guests
    #[arg(long)]
    amd: bool,

    /// Append a line for each ioctl
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,

    /// Fail the calls that a plan of faults names, without making them
    #[arg(long, value_name = "PLAN")]
    inject: Option<PathBuf>,

    /// Write a record of the run: each call, what it read of the program's memory and wrote to it, and its answer
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,

    /// Serve the program from a record, without a machine; the first call that differs ends it with exit code 3
    #[arg(long, value_name = "FILE", conflicts_with_all = ["record", "inject", "intel", "amd"])]
    replay: Option<PathBuf>,

    /// The library libkvm_ops_preload.so, if it is not beside this program
    #[arg(long, value_name = "FILE")]
    library: Option<PathBuf>,

    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

const LIBRARY: &str = "libkvm_ops_preload.so";

pub(crate) fn run(args: &Args) -> Outcome {
    let library = library(args.library.as_deref())?;
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(Failure::new("no program").code(Code::Usage));
    };
    if find(program).is_some_and(|path| is_static(&path)) {
        term::complain(format!(
            "warning: {} looks static: a library cannot reach its system calls; run a dynamic build \
             (a loader that is started by hand is fine)",
            program.display()
        ));
    }
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LD_PRELOAD", preloads(&library));
    command.env("KVM_OPS_WITH", if args.intel { "intel" } else { "amd" });
    if let Some(log) = &args.log {
        command.env("KVM_OPS_LOG", absolute(log)?);
    }
    if let Some(plan) = &args.inject {
        check_plan(plan)?;
        command.env("KVM_OPS_INJECT", absolute(plan)?);
    }
    if let Some(record) = &args.record {
        command.env("KVM_OPS_RECORD", absolute(record)?);
        remove_old(record)?;
    }
    if let Some(record) = &args.replay {
        check_record(record)?;
        command.env("KVM_OPS_REPLAY", absolute(record)?);
    }
    // Returns only if it fails.
    let error = command.exec();
    let failure = Failure::because(format!("cannot run {}", program.display()), error);
    Err(failure.code(Code::Input))
}

/// A path for the program, which may change its directory.
fn absolute(path: &Path) -> Outcome<PathBuf> {
    std::path::absolute(path)
        .map_err(|error| Failure::because(format!("cannot find {}", path.display()), error))
}

/// The most bytes of a plan.
const PLAN: u64 = 1 << 20;

/// Tells of a mistake in a file that the library is to read, before the program starts.
fn check<E: Error + Send + Sync + 'static>(
    name: &str,
    kind: &str,
    path: &Path,
    limit: u64,
    parse: impl FnOnce(&str) -> Result<(), E>,
) -> Outcome<()> {
    let bytes = files::read(name, path, limit)?;
    let wrong = |error: Box<dyn Error + Send + Sync>| {
        Failure::because(format!("{} is no {kind}", path.display()), error).code(Code::Usage)
    };
    let text = String::from_utf8(bytes).map_err(|error| wrong(error.into()))?;
    parse(&text).map_err(|error| wrong(error.into()))
}

fn check_plan(path: &Path) -> Outcome<()> {
    check("the plan", "plan of faults", path, PLAN, |text| {
        Faults::parse(text).map(drop)
    })
}

/// Removes the record of an earlier run: the library writes to a new file only.
fn remove_old(path: &Path) -> Outcome<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            let failure = Failure::because(format!("cannot replace {}", path.display()), error);
            Err(failure.code(Code::Input))
        }
        _ => Ok(()),
    }
}

/// The most bytes of a record.
const RECORD: u64 = 4 << 30;

fn check_record(path: &Path) -> Outcome<()> {
    check("the record", "record of a run", path, RECORD, |text| {
        Player::new(text, |_| ()).map(drop)
    })
}

/// The library's path, absolute.
fn library(given: Option<&Path>) -> Outcome<PathBuf> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => {
            let own = env::current_exe()
                .map_err(|error| Failure::because("cannot find this program's folder", error))?;
            own.with_file_name(LIBRARY)
        }
    };
    path.canonicalize().map_err(|error| {
        Failure::because(format!("cannot read {}", path.display()), error)
            .hint("build it with `cargo build --release -p kvm-ops-preload`, or name it with --library")
            .code(Code::Input)
    })
}

/// The library in front of those that are preloaded already.
fn preloads(library: &Path) -> OsString {
    let mut list = library.as_os_str().to_owned();
    if let Some(others) = env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        list.push(":");
        list.push(others);
    }
    list
}

/// The file that a program's name stands for.
fn find(program: &OsStr) -> Option<PathBuf> {
    let path = Path::new(program);
    if path.components().count() > 1 {
        return Some(path.to_owned());
    }
    let folders = env::var_os("PATH")?;
    env::split_paths(&folders)
        .map(|folder| folder.join(path))
        .find(|path| path.is_file())
}

/// True for a 64-bit ELF file that asks for no loader.
fn is_static(path: &Path) -> bool {
    // Program headers follow the file's header in every linker's output.
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(4096).read_to_end(&mut head));
    read.is_ok() && asks_for_no_loader(&head)
}

/// PT_INTERP.
const INTERPRETER: [u8; 4] = [3, 0, 0, 0];

fn asks_for_no_loader(head: &[u8]) -> bool {
    let number = |at: usize| {
        head.get(at..at + 2)
            .map(|b| usize::from(b[0]) | usize::from(b[1]) << 8)
    };
    let is_elf64 = head.starts_with(b"\x7fELF\x02");
    let (Some(start), Some(size), Some(count)) = (number(32), number(54), number(56)) else {
        return false;
    };
    let mut headers = (0..count).map(|index| start + index * size);
    is_elf64 && !headers.any(|at| head.get(at..at + 4) == Some(&INTERPRETER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_without_a_loader_is_static() {
        let own = env::current_exe().expect("a path");
        assert!(!is_static(&own), "tests are dynamic");
        let mut head = std::fs::read(own).expect("the test");
        head.truncate(4096);
        assert!(!asks_for_no_loader(&head));
        // Without its program headers.
        head[56..58].fill(0);
        assert!(asks_for_no_loader(&head));
        assert!(
            !asks_for_no_loader(b"#!/bin/sh\n"),
            "its interpreter is a program"
        );
        for len in 0..64 {
            assert!(!asks_for_no_loader(&head[..len.min(57)]));
        }
    }
}
