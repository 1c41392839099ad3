//! `kvm-ops fleet`: runs the VMs of a fleet file.

use std::path::PathBuf;
use std::time::Instant;

use crate::args::HostChoice;
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::fleet::progress::Progress;
use crate::fleet::report::{self, FleetReport};
use crate::fleet::resources::Resources;
use crate::fleet::source::{self, Source};
use crate::fleet::{launch, parse, plan, print, spec};
use crate::guests;
use crate::hosts::Hosts;
use crate::interrupt::Interrupt;
use crate::term;

/// Runs the VMs that a file describes side by side, and reports on them.
///
/// Every machine is built before any starts: a file with something wrong, or with a VM that no host
/// can hold, starts nothing, and everything that is wrong is shown at once. Each VM then runs until
/// it ends or its timeout passes, is held against what the file expects of it, and is torn down.
#[derive(Debug, clap::Args)]
#[command(after_help = after_help())]
pub(crate) struct Args {
    /// The fleet file; `-` for standard input, and the built-in fleet if none is named
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,

    /// Where VMs run that name no host themselves
    #[arg(long, value_enum, default_value_t)]
    host: HostChoice,

    /// Report as JSON on standard output
    #[arg(long)]
    json: bool,

    /// Print the built-in fleet file and stop
    #[arg(long, conflicts_with_all = ["file", "json"])]
    show_default: bool,
}

fn after_help() -> String {
    let payloads: String = guests::ALL
        .iter()
        .map(|guest| format!("  {:8} {}\n", guest.name, guest.about))
        .collect();
    format!(
        "\
Built-in payloads, each as machine code for /dev/kvm and as a guest program for the software
platform, with results that are checked:
{payloads}
A fleet file:
  [defaults]                   # kind, host, vcpus, memory and timeout of VMs that do not say
  timeout = \"5s\"

  [[vm]]
  name = \"prime\"
  count = 4                    # prime-0 to prime-3
  payload = \"sieve\"

  [[vm]]
  name = \"bios\"
  image = \"bios.bin\"           # leads from the file's directory; see also the keys below
  memory = \"64M\"
  expect = {{ end = \"timeout\", console = \"SeaBIOS\" }}

  An image also takes format (flat, elf, bzimage, firmware), irqchip (none, full, split), cmdline
  and initrd; OVMF also the kernel that it starts, and allow_rbp in a TD. OVMF and kernels find a Q35, as `run` gives
  it. kind is normal, vmx, tdx, svm, sev, sev-es or sev-snp. `optional = true` leaves a
  VM out where no host can hold it. expect.end is any (but a crash), halt, shutdown, reset,
  debug-exit, timeout, or console: the run ends once expect.console is there. expect.result is what the guest writes to port 0x4f0, 4 bytes.

Examples:
  kvm-ops fleet                              run the built-in fleet
  kvm-ops fleet --host sim --json            the same on the software platform, for a script
  kvm-ops fleet --show-default > my.toml     a file to start from"
    )
}

pub(crate) fn run(args: &Args) -> Outcome {
    if args.show_default {
        term::say(source::DEFAULT.trim_end())?;
        return Ok(Code::Fine);
    }
    let source = match &args.file {
        Some(path) => Source::open(path)?,
        None => Source::built_in(),
    };
    let vms = parse::parse(&source, args.host)?;

    let interrupt = Interrupt::install()?;
    let before = Resources::now();
    let start = Instant::now();
    let (reports, firmware) = {
        let mut hosts = Hosts::open(wanted(args.host, &vms), false);
        if args.host == HostChoice::Kvm {
            // Report it once: every VM would fail for the same reason.
            if let Some(failure) = hosts.take_no_kvm() {
                return Err(failure.hint("`--host auto` falls back to the software platform"));
            }
        }
        let plan = plan::build(&source, &vms, &hosts)?;
        if let Some(failure) = hosts.no_kvm() {
            term::complain(format!(
                "note: {}; VMs run on the software platform",
                failure.in_a_line()
            ));
        }
        let progress = Progress::new(plan.ready.len(), args.json);
        let (reports, ledgers) = launch::run(plan, &interrupt, &progress);
        progress.done();
        let close = |ledger: &plan::Ledger<'_>| {
            ledger.close(report::torn_down(&reports, ledger.firmware()))
        };
        let firmware: Vec<_> = ledgers.iter().filter_map(close).collect();
        (reports, firmware)
    };
    let elapsed = start.elapsed();
    let after = Resources::settled(&before);
    let report = FleetReport::new(source.name, reports, firmware, before, after, elapsed);

    let code = report.code();
    let shown = if args.json {
        term::say_json(&report)
    } else {
        term::say(print::text(&report)).map_err(Failure::from)
    };
    match shown {
        // The guests ran, so their result decides, even if the report could not be printed.
        Ok(()) | Err(Failure::BrokenPipe) => Ok(code),
        Err(failure) => Err(failure),
    }
}

/// Returns the choice of hosts to open for these VMs.
fn wanted(host: HostChoice, vms: &[spec::VmSpec]) -> HostChoice {
    if vms.iter().all(|vm| vm.host == HostChoice::Sim) {
        return HostChoice::Sim;
    }
    match host {
        HostChoice::Sim => HostChoice::Auto,
        host => host,
    }
}
