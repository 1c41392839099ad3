#![doc = include_str!("../README.md")]
// The items are public as in a library, so that the compiler does not know all their uses.
#![allow(unreachable_pub)]

mod count;
mod designs;
#[cfg(feature = "report")]
mod figures;
#[cfg(feature = "report")]
mod fleet;
#[cfg(feature = "report")]
mod journeys;
#[cfg(feature = "report")]
mod kvm;
#[cfg(feature = "report")]
mod lives;
#[cfg(feature = "report")]
mod measurement;
#[cfg(feature = "report")]
mod report;
#[cfg(feature = "report")]
mod system;
#[cfg(feature = "report")]
mod time;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Compares ways to dispatch an operation to the technology that holds a VM.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Counts instructions and branches of every design under valgrind's callgrind.
    Count {
        /// Compare with the counts in this file, and fail where they differ.
        #[arg(long, value_name = "FILE", conflicts_with = "write")]
        check: Option<PathBuf>,
        /// Write the counts to this file.
        #[arg(long, value_name = "FILE")]
        write: Option<PathBuf>,
    },
    /// What callgrind runs: every design once.
    #[command(hide = true)]
    Loops,
    /// Measures every design side by side and writes the figures as JSON.
    #[cfg(feature = "report")]
    Time {
        /// Where the figures go.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// How often each loop is measured.
        #[arg(long, default_value_t = 60)]
        rounds: usize,
    },
    /// Measures lives of VMs on the software platforms and writes the figures as JSON.
    #[cfg(feature = "report")]
    Lives {
        /// Where the figures go.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Sizes of TDs in GiB.
        #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 16])]
        gib: Vec<u64>,
        /// How often the life of a small VM is measured.
        #[arg(long, default_value_t = 200)]
        rounds: usize,
    },
    /// Measures fleets of growing size, run by the program `kvm-ops`, and writes the figures as JSON.
    #[cfg(feature = "report")]
    Fleet {
        /// The program.
        #[arg(long, value_name = "FILE", default_value = "target/release/kvm-ops")]
        program: PathBuf,
        /// Where the figures go.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// How often each fleet runs.
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// The built-in guest that every VM runs.
        #[arg(long, default_value = "sieve")]
        payload: String,
    },
    /// Measures journeys of TDs between two hosts, taken by the program `kvm-ops`, and writes the figures as
    /// JSON.
    #[cfg(feature = "report")]
    Journeys {
        /// The program.
        #[arg(long, value_name = "FILE", default_value = "target/release/kvm-ops")]
        program: PathBuf,
        /// Where the figures go.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Sizes of TDs in MiB.
        #[arg(long, value_delimiter = ',', default_values_t = [64, 256, 1024])]
        mib: Vec<u64>,
        /// Working sets in MiB; those that are larger than a TD are left out for it.
        #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64])]
        sets: Vec<u64>,
    },
    /// Writes docs/benchmarks.md and docs/plots/*.svg from bench/figures and bench/counts.toml.
    #[cfg(feature = "report")]
    Report {
        /// The root of the source tree.
        #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/.."))]
        root: PathBuf,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Count {
            check: Some(file), ..
        } => count::check(&file),
        Command::Count {
            write: Some(file), ..
        } => count::write(&file),
        Command::Count { .. } => count::print(),
        Command::Loops => {
            count::loops();
            Ok(())
        }
        #[cfg(feature = "report")]
        Command::Time { out, rounds } => time::write(&out, rounds),
        #[cfg(feature = "report")]
        Command::Lives { out, gib, rounds } => lives::write(&out, &lives::Plan { gib, rounds }),
        #[cfg(feature = "report")]
        Command::Fleet {
            program,
            out,
            rounds,
            payload,
        } => fleet::write(&out, &program, rounds, &payload),
        #[cfg(feature = "report")]
        Command::Journeys {
            program,
            out,
            mib,
            sets,
        } => journeys::write(&out, &program, &mib, &sets),
        #[cfg(feature = "report")]
        Command::Report { root } => report::write(&root),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
