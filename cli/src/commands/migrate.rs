//! `kvm-ops migrate`: moves running confidential guests to another VM or host.

mod guest;
mod inside;
mod link;
mod report;

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Subcommand, ValueEnum};
use embedded_io_adapters::std::FromStd;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvm_ops::sev::SevVm;
use kvm_ops::sev::migrate::{Flow, Phase, Progress, Receiver, SendLimits, Sender, StreamKey};
use kvm_ops::sim::{SevSetup, SimHost};
use kvm_ops::{AmdVm, AnyVm, Error, Gpa, Kind, Tech, VcpuId, Vendor, Vm};
use kvm_ops_machine::{ExitContext, LaunchPage, Machine, MachineConfig, RunLimits};
use rand_core::{OsRng, RngCore};

use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::interrupt::Interrupt;
use crate::{memory, term, units};

use guest::Walker;
use link::{Bound, Link, Socket};
use report::Report;

/// Migrates confidential guests between VMs, and SEV guests between hosts while they run
///
/// The hosts are software platforms. The guest counts in its private memory and writes its pages in
/// turn. Within a host a guest with encrypted registers goes on where it was; elsewhere the VM that it
/// comes to goes on from that memory alone.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops migrate move                        from VM to VM of one host: no page is copied
  kvm-ops migrate move --tech tdx             a TD: no SEAMCALL is made
  kvm-ops migrate hosts --tech sev-es         between two hosts in this process
  kvm-ops migrate receive 127.0.0.1:4444      a host that waits for a guest, and
  kvm-ops migrate send 127.0.0.1:4444         one that sends it")]
pub(crate) struct Args {
    #[command(subcommand)]
    how: How,
}

#[derive(Debug, Subcommand)]
enum How {
    /// From VM to VM of one host
    Move(Guest),
    /// Between two hosts in this process
    Hosts(Guest),
    /// Sends a guest to a host that waits at ADDRESS
    Send {
        /// Where the host waits, as HOST:PORT
        #[arg(value_parser = link::parse_address)]
        address: String,
        #[command(flatten)]
        guest: Guest,
    },
    /// Waits at ADDRESS for a guest
    Receive {
        /// Where to wait, as HOST:PORT
        #[arg(value_parser = link::parse_address)]
        address: String,
        #[command(flatten)]
        guest: Guest,
    },
}

#[derive(Debug, clap::Args)]
struct Guest {
    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = parse_memory)]
    memory: u64,

    /// The guest's technology
    #[arg(long, value_enum, default_value_t = Kinds::Sev)]
    tech: Kinds,

    /// The longest time of the whole command. A peer that is silent for 30 s ends it earlier
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = units::parse_time)]
    timeout: Duration,

    /// A file with 32 bytes that both hosts know: only frames that are authenticated with them are
    /// taken. Without it the link must be authenticated by other means
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,

    /// Rounds of copying while the guest runs; 0 stops it first
    #[arg(long, default_value_t = 4)]
    rounds: u32,

    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// The most memory of a guest here. A host has twice as much, so that two VMs of the guest fit.
const MOST_MEMORY: u64 = 256 << 30;

fn parse_memory(text: &str) -> Result<u64, String> {
    match units::parse_memory(text)? {
        bytes @ ..=MOST_MEMORY => Ok(bytes),
        bytes => Err(format!("memory of {bytes:#x} bytes is more than 256 GiB")),
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kinds {
    /// Memory is encrypted
    Sev,
    /// Memory and registers are encrypted
    SevEs,
    /// Memory and registers are encrypted and protected by the RMP; moves within a host only
    SevSnp,
    /// A trust domain; moves within a host only
    Tdx,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let guest = args.how.guest();
    let within = matches!(args.how, How::Move(_));
    if matches!(guest.tech, Kinds::SevSnp | Kinds::Tdx) && !within {
        return Err(
            Failure::new("such a guest does not migrate between hosts here")
                .hint("move it within a host: kvm-ops migrate move")
                .code(Code::Usage),
        );
    }
    let interrupt = Interrupt::install()?;
    memory::Limits::of_system()
        .holds(args.how.memory())
        .map_err(|why| {
            Failure::because("the guest's memory is more than this system holds", why)
                .hint("give the guest less with --memory")
        })?;
    let session = Session {
        guest,
        bound: Bound::new(guest.timeout, &interrupt),
        key: guest.key()?,
        interrupt: &interrupt,
    };
    let done = match &args.how {
        How::Move(_) => session.inside(),
        How::Hosts(_) => session.between(),
        How::Send { address, .. } => session.send(address),
        How::Receive { address, .. } => session.receive(address),
    };
    // The machines are gone by now, so a signal ends in an orderly way.
    let (report, json) = match done {
        Err(failure) if interrupt.seen() => return Err(failure.code(Code::Interrupted)),
        done => (done?, guest.json),
    };
    if json {
        term::say_json(&report)?;
    } else {
        term::say(&report)?;
    }
    Ok(if report.is_whole() {
        Code::Fine
    } else {
        Code::Guest
    })
}

/// The number of counts that a guest makes before and after its migration.
const WARM_UP: u64 = 200;

impl How {
    /// The memory that is in use at once: a guest here touches all of its own.
    fn memory(&self) -> u64 {
        let each = self.guest().memory;
        match self {
            Self::Hosts(_) => each.saturating_mul(2),
            Self::Move(_) | Self::Send { .. } | Self::Receive { .. } => each,
        }
    }

    fn guest(&self) -> &Guest {
        match self {
            Self::Move(guest)
            | Self::Hosts(guest)
            | Self::Send { guest, .. }
            | Self::Receive { guest, .. } => guest,
        }
    }
}

impl Guest {
    fn pages(&self) -> u64 {
        self.memory / 4096
    }

    fn kind(&self) -> Kind {
        Kind::Of(match self.tech {
            Kinds::Sev => Tech::Sev,
            Kinds::SevEs => Tech::SevEs,
            Kinds::SevSnp => Tech::SevSnp,
            Kinds::Tdx => Tech::Tdx,
        })
    }

    fn host(&self) -> Outcome<SimHost> {
        let memory = (2 * self.memory).next_multiple_of(2 << 20) + (64 << 20);
        let platform = soft_amd_sp::Platform::builder().memory(memory);
        SimHost::builder(Vendor::Amd)
            .sev(SevSetup::new(platform))
            .build()
            .map_err(|error| Failure::because("cannot build a software host", error))
    }

    /// Builds a VM with a launched guest, and pre-faults the rest of its memory.
    fn source(&self, host: &SimHost) -> Outcome<Machine<SimHost>> {
        let first = LaunchPage::measured(Gpa::new(0), Box::new([0; 4096]));
        let config = MachineConfig::new()
            .kind(self.kind())
            .memory(self.memory)
            .launch(vec![first]);
        let machine = Machine::build(host, config)
            .map_err(|error| Failure::because("cannot build the source", error))?;
        machine
            .vm()
            .pre_fault_memory(kvm_ops::Gfn::new(1), self.memory / 4096 - 1)
            .map_err(|error| Failure::because("cannot give the guest its memory", error))?;
        Ok(machine)
    }

    fn target(&self, host: &SimHost) -> Outcome<Machine<SimHost>> {
        let config = MachineConfig::new()
            .kind(self.kind())
            .memory(self.memory)
            .awaits_guest(true);
        Machine::build(host, config)
            .map_err(|error| Failure::because("cannot build the target", error))
    }

    /// The key of the stream, from its file.
    fn key(&self) -> Outcome<Option<StreamKey>> {
        let Some(path) = &self.key else {
            return Ok(None);
        };
        let bytes = files::read("the key", path, 32)?;
        let key = <[u8; 32]>::try_from(bytes).map_err(|bytes| {
            Failure::new(format!("{} is no key", path.display()))
                .hint(format!("a key has 32 bytes; the file has {}", bytes.len()))
                .code(Code::Input)
        })?;
        Ok(Some(StreamKey::new(key)))
    }

    fn limits(&self) -> SendLimits {
        SendLimits {
            rounds: self.rounds,
            ..SendLimits::default()
        }
    }
}

fn sev(vm: &Vm<AnyVm<SimHost>>) -> Outcome<&SevVm<SimHost>> {
    match vm.back_end() {
        AnyVm::Amd(AmdVm::Sev(vm)) => Ok(vm),
        _ => Err(Failure::new("the VM is no SEV guest")),
    }
}

/// One use of the command.
struct Session<'a> {
    guest: &'a Guest,
    bound: Bound,
    key: Option<StreamKey>,
    interrupt: &'a Interrupt,
}

impl Session<'_> {
    /// Runs the guest while `work` is done, and stops it when `work` returns.
    fn run_during<T>(
        &self,
        machine: &mut Machine<SimHost>,
        work: impl FnOnce(&Vm<AnyVm<SimHost>>) -> T,
    ) -> Outcome<T> {
        let stopper = machine.stopper();
        self.interrupt.stops(stopper.clone());
        let quiet = |_: &mut ExitContext<'_>| kvm_ops_machine::Flow::Continue;
        let limits = RunLimits::none().deadline(self.guest.timeout);
        let ran = machine.run_while(&quiet, limits, |parts| {
            let done = work(parts.vm());
            stopper.stop();
            done
        });
        self.interrupt.clear();
        ran.map(|(_, done)| done)
            .map_err(|error| Failure::because("the guest does not run", error))
    }

    /// Waits until the guest has counted so far, for 20 s at most.
    fn wait_for(&self, counted: &AtomicU64, at_least: u64) {
        let start = Instant::now();
        while counted.load(Ordering::Acquire) < at_least
            && start.elapsed() < Duration::from_secs(20)
            && self.bound.check().is_ok()
        {
            thread::sleep(Duration::from_micros(50));
        }
    }

    /// Runs the guest on at its destination, and returns its first and last count there.
    fn run_on(&self, machine: &mut Machine<SimHost>) -> Outcome<(u64, u64)> {
        let counted = self.load_walker(machine)?;
        let first = self.run_during(machine, |_| {
            self.wait_for(&counted, 1);
            let first = counted.load(Ordering::Acquire);
            self.wait_for(&counted, first + WARM_UP);
            first
        })?;
        Ok((first, counted.load(Ordering::Acquire)))
    }

    /// Loads the guest's program, and returns its counter.
    fn load_walker(&self, machine: &mut Machine<SimHost>) -> Outcome<Arc<AtomicU64>> {
        let counted = Arc::new(AtomicU64::new(0));
        let accepts = matches!(self.guest.tech, Kinds::SevSnp | Kinds::Tdx);
        let walker = Walker::new(self.guest.pages(), accepts, Arc::clone(&counted));
        machine
            .load_program(VcpuId(0), Box::new(walker))
            .map_err(|error| Failure::because("cannot load the guest's program", error))?;
        Ok(counted)
    }

    fn between(&self) -> Outcome<Report> {
        let (here, there) = (self.guest.host()?, self.guest.host()?);
        let (near, far) = UnixStream::pair()?;
        let (near, far) = (self.link(near)?, self.link(far)?);
        let (mut from, mut to) = (self.guest.source(&here)?, self.guest.target(&there)?);
        let (sent, received) = thread::scope(|scope| {
            let (to, there) = (&mut to, &there);
            let mut far = Some(far);
            let receiving = scope.spawn(move || {
                self.arrive(to, there, || {
                    let gone = io::Error::from(io::ErrorKind::BrokenPipe);
                    far.take().ok_or(gone)
                })
            });
            let sent = self.depart("hosts", &mut from, near);
            (sent, receiving.join())
        });
        let mut report = sent?;
        match received {
            Ok(received) => received?,
            Err(_) => return Err(Failure::new("the receiving thread panicked")),
        };
        let (first, end) = self.run_on(&mut to)?;
        report.counts(report.count_at_source, first, end);
        report.leaks = leaks(from) + leaks(to);
        Ok(report)
    }

    fn link<S: Socket>(&self, socket: S) -> Outcome<Link<S>> {
        Ok(Link::new(socket, self.bound.clone())?)
    }

    fn send(&self, address: &str) -> Outcome<Report> {
        let link = link::connect(address, &self.bound)?;
        let host = self.guest.host()?;
        let mut from = self.guest.source(&host)?;
        let mut report = self.depart("send", &mut from, link)?;
        report.leaks = leaks(from);
        Ok(report)
    }

    fn receive(&self, address: &str) -> Outcome<Report> {
        let waiting = TcpListener::bind(address)
            .map_err(|error| Failure::because(format!("cannot wait at {address}"), error))?;
        term::complain(format!("waiting at {}", waiting.local_addr()?));
        let host = self.guest.host()?;
        let mut to = self.guest.target(&host)?;
        let start = Instant::now();
        let arrived = self.arrive(&mut to, &host, || link::accept(&waiting, &self.bound))?;
        let took = start.elapsed();
        let (first, end) = self.run_on(&mut to)?;
        let mut report = Report::new("receive", self.guest.memory, self.guest.kind());
        report.step(Phase::Done);
        report.finish(
            took,
            Duration::ZERO,
            arrived.pages,
            arrived.bytes,
            arrived.round.saturating_sub(1),
        );
        report.count_first_at_target = Some(first);
        report.count_last_at_target = Some(end);
        report.leaks = leaks(to);
        Ok(report)
    }

    /// Takes a guest from the first connection that brings one. A connection that brings garbage, or
    /// breaks, ends alone: the session goes on with the next.
    fn arrive<S: Read + Write>(
        &self,
        to: &mut Machine<SimHost>,
        host: &SimHost,
        mut next: impl FnMut() -> io::Result<S>,
    ) -> Outcome<Progress> {
        let vendor = match host.sev_platform() {
            Some(platform) => platform.vendor_certs(),
            None => return Err(Failure::new("the host has no AMD SP")),
        };
        let incoming = sev(to.vm())?
            .incoming(vendor, Box::new(|_, _| Ok(())))
            .map_err(|error| Failure::because("the target cannot take a guest", error))?;
        let mut receiver = Receiver::new(incoming);
        if let Some(key) = &self.key {
            let mut nonce = [0; 16];
            random(&mut nonce)
                .map_err(|error| Failure::because("the host has no random numbers", error))?;
            receiver = receiver.with_key(key.clone(), nonce);
        }
        loop {
            let link = next().map_err(|error| Failure::because("no guest arrived", error))?;
            match receiver.run(&mut FromStd::new(link), &mut |_| Flow::GoOn) {
                Ok(progress) => return Ok(progress),
                Err(error) => {
                    self.bound
                        .check()
                        .map_err(|error| Failure::because("no guest arrived", error))?;
                    term::complain(format!("a connection ended without a guest: {error}"));
                }
            }
        }
    }

    /// Sends the guest of a machine to another host while it runs.
    fn depart<S: Read + Write>(
        &self,
        mode: &'static str,
        from: &mut Machine<SimHost>,
        link: S,
    ) -> Outcome<Report> {
        let counted = self.load_walker(from)?;
        let mut report = Report::new(mode, self.guest.memory, self.guest.kind());
        let bar = bar(self.guest.pages(), self.guest.json);
        let sent = self.run_during(from, |vm| {
            self.wait_for(&counted, WARM_UP);
            let start = Instant::now();
            let sent = self.travel(vm, link, &mut |progress, at| {
                report.seen(progress, at);
                show(&bar, progress);
            });
            sent.map(|sent| (sent, start.elapsed()))
        });
        bar.finish_and_clear();
        let (sent, took) = sent??;
        let down = report.downtime;
        report.finish(took, down, sent.pages, sent.bytes, sent.round);
        report.count_at_source = counted.load(Ordering::Acquire);
        Ok(report)
    }

    fn travel<S: Read + Write>(
        &self,
        vm: &Vm<AnyVm<SimHost>>,
        link: S,
        seen: &mut dyn FnMut(&Progress, Instant),
    ) -> Outcome<Progress> {
        let outgoing = sev(vm)?
            .outgoing(Box::new(|_| Ok(Vec::new())))
            .map_err(|error| Failure::because("the guest cannot be sent", error))?;
        let mut sender = Sender::new(outgoing, self.guest.limits(), &mut random)
            .map_err(|(error, _)| Failure::because("the guest cannot be sent", error))?;
        if let Some(key) = &self.key {
            sender = sender.with_key(key.clone());
        }
        sender
            .run(&mut FromStd::new(link), &mut |progress| {
                seen(progress, Instant::now());
                Flow::GoOn
            })
            .map_err(|error| {
                Failure::because("the journey ended early", error)
                    .hint("the guest runs on at its source")
            })
    }
}

/// Tears a machine down, and returns the number of leaks.
fn leaks(machine: Machine<SimHost>) -> usize {
    machine.destroy().leaks.len()
}

/// The host's random numbers.
fn random(out: &mut [u8]) -> kvm_ops::Result<()> {
    OsRng.try_fill_bytes(out).map_err(|_| Error::Again)
}

fn bar(pages: u64, quiet: bool) -> ProgressBar {
    let target = if term::has_bars() && !quiet {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(pages), target);
    let template = "{bar:30} {pos}/{len} pages  {elapsed}  {msg}";
    bar.with_style(
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
    )
}

fn show(bar: &ProgressBar, progress: &Progress) {
    bar.set_length(progress.pages + progress.left);
    bar.set_position(progress.pages);
    bar.set_message(format!(
        "{}, round {}, the guest is the {}'s",
        progress.phase,
        progress.round,
        progress.phase.owner()
    ));
}
