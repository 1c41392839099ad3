//! The program `kvm-ops`.

#![forbid(unsafe_code)]

mod args;
mod bytes;
mod chipset;
mod commands;
mod confidential;
mod disassembly;
mod doctor;
mod exit_code;
mod failure;
mod files;
mod fleet;
mod guests;
mod hosts;
mod interrupt;
mod memory;
mod platform;
mod term;
mod units;
mod until;
mod vm_report;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    term::log(cli.verbose);
    let outcome = match &cli.command {
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Run(args) => commands::run::run(args),
        Command::Fleet(args) => commands::fleet::run(args),
        Command::Measure(args) => commands::measure::run(args),
        Command::Attest(args) => commands::attest::run(args),
        Command::Migrate(args) => commands::migrate::run(args),
        Command::Conform(args) => commands::conform::run(args),
        Command::With(args) => commands::with::run(args),
        Command::Completions(args) => commands::completions::run(args),
        Command::Man(args) => commands::man::run(args),
    };
    match outcome {
        Ok(code) => code.into(),
        Err(failure) => failure.report().into(),
    }
}
