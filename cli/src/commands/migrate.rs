//! `kvm-ops migrate`: moves running confidential guests to another VM or host.

mod arrival;
mod beside;
mod between;
mod guest;
mod inside;
mod link;
mod meter;
mod peer;
mod report;
mod sev;
mod snp;
mod summary;
mod td;
mod threads;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Subcommand, ValueEnum};
use kvm_ops::guest::GuestProgram;
use kvm_ops::sev::migrate::StreamKey;
use kvm_ops::sim::SimHost;
use kvm_ops::{AnyVm, Error, Kind, Tech, VcpuId, Vm};
use kvm_ops_machine::{ExitContext, Machine, RunLimits};
use rand_core::{OsRng, RngCore};

use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::interrupt::Interrupt;
use crate::{memory, term, units};

use guest::{Told, Turns, Writer};
use link::{Address, Bound};

/// Migrates confidential guests between VMs and hosts, SEV guests and TDs while they run
///
/// The hosts are software platforms. The guest counts in its private memory and writes its pages in
/// turn, each full of words that depend on the count. Within a host a guest with encrypted registers goes on
/// where it was; elsewhere the VM that it comes to goes on from that memory alone, after it has looked whether
/// every page is as it was written last.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops migrate move                        from VM to VM of one host: no page is copied
  kvm-ops migrate move --tech tdx             a TD: no SEAMCALL is made
  kvm-ops migrate hosts --tech sev-es         between two hosts in this process
  kvm-ops migrate hosts --tech tdx --streams 4
  kvm-ops migrate hosts --tech tdx --post-copy   it runs there before its pages come
  kvm-ops migrate hosts --tech sev-snp        an SNP guest: swapped out here, and in there
  kvm-ops migrate receive 127.0.0.1:4444      a host that waits for a guest, and
  kvm-ops migrate send 127.0.0.1:4444         one that sends it
  kvm-ops migrate receive unix:/run/m.sock --tech tdx
  kvm-ops migrate receive unix:/run/m.sock --tech sev-snp
  kvm-ops migrate hosts --tech tdx --peer-svn 03000000000000000000000000000000
                                              from that version of the TDX module on")]
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
        /// Where the host waits, as HOST:PORT or unix:PATH
        #[arg(value_parser = link::parse_address)]
        address: Address,
        #[command(flatten)]
        guest: Guest,
    },
    /// Waits at ADDRESS for a guest
    Receive {
        /// Where to wait, as HOST:PORT or unix:PATH
        #[arg(value_parser = link::parse_address)]
        address: Address,
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
    /// taken. Without it the link must be authenticated by other means. The migration agents of SNP guests agree on a key themselves
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,

    /// Rounds of copying while the guest runs; 0 stops it first. 4 by default, 0 with --post-copy. An SNP guest has none
    #[arg(long)]
    rounds: Option<u32>,

    /// Let a TD run at its target before its pages come: those that never travelled follow, the ones that it waits for
    /// first. Both hosts state it. A TD whose pages cannot follow is lost
    #[arg(long)]
    post_copy: bool,

    /// Streams over which a TD's pages travel, 1 to 16; both hosts have as many, each with a thread at
    /// either end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    streams: Option<u16>,

    /// The memory that the guest writes again and again once it has written all of it; all by default.
    /// Both hosts state the same
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    working_set: Option<u64>,

    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    peer: peer::Peer,
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
    /// Memory and registers are encrypted and protected by the RMP. Between hosts it is stopped first, and a migration agent on
    /// each judges the other's report before keys are agreed on
    SevSnp,
    /// A trust domain. A migration TD on each host judges the other's quote before keys are exchanged
    Tdx,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let guest = args.how.guest();
    let within = matches!(args.how, How::Move(_));
    if guest.post_copy {
        guest.may_run_early(within)?;
    }
    if matches!(guest.tech, Kinds::SevSnp) {
        guest.goes_at_once()?;
    }
    if guest.streams.is_some() && (within || !matches!(guest.tech, Kinds::Tdx)) {
        let what = "only a TD that goes to another host has streams";
        return Err(Failure::new(what).code(Code::Usage));
    }
    guest.peer.fits(guest.tech, within)?;
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

/// The longest time that a guest takes for its first look at its memory, or for a migration's warm-up.
const PATIENCE: Duration = Duration::from_secs(120);

impl How {
    /// The memory that is in use at once: a guest here touches all of its own.
    fn memory(&self) -> u64 {
        let each = self.guest().memory;
        match self {
            // Both hosts keep its pages for a while beside the memory that they are for.
            Self::Hosts(Guest {
                tech: Kinds::SevSnp,
                ..
            }) => each.saturating_mul(4),
            Self::Send { guest, .. } | Self::Receive { guest, .. }
                if matches!(guest.tech, Kinds::SevSnp) =>
            {
                each.saturating_mul(2)
            }
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

    /// The order in which the guest writes its pages.
    fn turns(&self) -> Turns {
        Turns::new(self.pages(), self.working_set.map(|bytes| bytes / 4096))
    }

    fn streams(&self) -> u16 {
        self.streams.unwrap_or(1)
    }

    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.post_copy { 0 } else { 4 })
    }

    /// Refuses what does not fit a guest that is stopped before its pages travel, under a key of its migration agents.
    fn goes_at_once(&self) -> Outcome {
        let what = if self.rounds.is_some() {
            "an SNP guest is stopped before its pages travel: it has no rounds"
        } else if self.key.is_some() {
            "the migration agents of an SNP guest agree on the key of the link"
        } else {
            return Ok(Code::Fine);
        };
        Err(Failure::new(what).code(Code::Usage))
    }

    /// Refuses a guest that cannot run at its target before its pages come.
    fn may_run_early(&self, within: bool) -> Outcome<()> {
        let why = match self.tech {
            Kinds::Sev | Kinds::SevEs => {
                "firmware lets an SEV guest run only after RECEIVE_FINISH, and takes no page after it"
            }
            Kinds::SevSnp => {
                "an SNP guest is stopped first, and its pages are swapped in before it runs"
            }
            Kinds::Tdx if within => "a move within a host sends no pages that could follow",
            Kinds::Tdx => return Ok(()),
        };
        let what = "only a TD that goes to another host can run there before its pages come";
        Err(Failure::new(what).hint(why).code(Code::Usage))
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

    /// Waits until the guest has counted so far, or found its memory changed.
    fn wait_for(&self, told: &Told, at_least: u64) {
        let start = Instant::now();
        while told.count.load(Ordering::Acquire) < at_least
            && told.wrong.load(Ordering::Relaxed) == 0
            && start.elapsed() < PATIENCE
            && self.bound.check().is_ok()
        {
            thread::sleep(Duration::from_micros(50));
        }
    }

    /// Runs a guest on that came with its memory alone, and returns its first and last count there, and what
    /// it tells of its pages.
    fn run_on(&self, machine: &mut Machine<SimHost>) -> Outcome<(u64, u64, Arc<Told>)> {
        let told = Arc::<Told>::default();
        let writer = Writer::arrived(self.guest.turns(), Arc::clone(&told));
        self.load(machine, writer)?;
        let first = self.run_during(machine, |_| {
            self.wait_for(&told, 1);
            let first = told.count.load(Ordering::Acquire);
            self.wait_for(&told, first + WARM_UP);
            first
        })?;
        Ok((first, told.count.load(Ordering::Acquire), told))
    }

    /// Loads the guest's program at its start, and returns what it tells.
    fn load_writer(&self, machine: &mut Machine<SimHost>) -> Outcome<Arc<Told>> {
        let told = Arc::<Told>::default();
        let accepts = matches!(self.guest.tech, Kinds::SevSnp | Kinds::Tdx);
        let writer = Writer::new(self.guest.turns(), accepts, Arc::clone(&told));
        self.load(machine, writer)?;
        Ok(told)
    }

    fn load(
        &self,
        machine: &mut Machine<SimHost>,
        program: impl GuestProgram + 'static,
    ) -> Outcome<()> {
        machine
            .load_program(VcpuId(0), Box::new(program))
            .map_err(|error| Failure::because("cannot load the guest's program", error))
    }
}

/// Tears a machine down, and returns the number of leaks.
fn leaks(machine: Machine<SimHost>) -> usize {
    machine.destroy().leaks.len()
}

/// Random numbers of the host.
fn random_bytes<const N: usize>() -> Outcome<[u8; N]> {
    let mut bytes = [0; N];
    random(&mut bytes)
        .map_err(|error| Failure::because("the host has no random numbers", error))?;
    Ok(bytes)
}

/// Fills memory with random numbers of the host.
fn random(out: &mut [u8]) -> kvm_ops::Result<()> {
    OsRng.try_fill_bytes(out).map_err(|_| Error::Again)
}
