//! `kvm-ops man`: the manual pages.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use roff::{Roff, roman};

use crate::args::Cli;
use crate::exit_code::{self, Code};
use crate::failure::{Failure, Outcome};

/// Prints the manual page, or writes one page a command into a directory.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops man | man -l -
  kvm-ops man --into ~/.local/share/man/man1")]
pub(crate) struct Args {
    /// Write kvm-ops.1, kvm-ops-run.1, kvm-ops-measure-snp.1 and so on into this directory, which must exist
    #[arg(long, value_name = "DIR")]
    into: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Outcome {
    // `help` gets no page: it only shows the help of other commands.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let Some(directory) = &args.into else {
        io::stdout().lock().write_all(&page(&command)?)?;
        return Ok(Code::Fine);
    };
    write_pages(directory, &command)?;
    Ok(Code::Fine)
}

/// Writes the page of a command and those of its subcommands.
fn write_pages(directory: &Path, command: &Command) -> Result<(), Failure> {
    let path = directory.join(Man::new(command.clone()).get_filename());
    fs::write(&path, page(command)?)
        .map_err(|error| Failure::because(format!("cannot write {}", path.display()), error))?;
    command
        .get_subcommands()
        .filter(|command| command.get_name() != "help")
        .try_for_each(|command| write_pages(directory, command))
}

/// Returns the page of one command. Examples and tables keep their lines; clap_mangen's own
/// sections would join them.
fn page(command: &Command) -> io::Result<Vec<u8>> {
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(text) = command.get_after_help() {
        // The table has a section of its own.
        let text = text.to_string().replace(&exit_code::help(), "");
        let mut section = Roff::new();
        section.control("SH", ["NOTES"]).control("nf", []);
        for line in text.trim_end().lines() {
            section.text([roman(line)]);
        }
        section.control("fi", []);
        section.to_writer(&mut page)?;
    }
    exit_status().to_writer(&mut page)?;
    Ok(page)
}

/// The section of exit codes, the same on every page.
fn exit_status() -> Roff {
    let mut section = Roff::new();
    section.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in exit_code::TABLE {
        let number = (code as u8).to_string();
        section.control("TP", ["5"]);
        section.text([roman(number)]).text([roman(meaning)]);
    }
    section
}
