//! A SEV or SEV-ES guest that counts in its memory, and its way over a byte stream to another machine.

// Each test file uses a part.
#![allow(dead_code, unreachable_pub)]

#[path = "../../../tdx/tests/migrate_support/link.rs"]
pub mod link;
#[path = "../../../tdx/tests/migrate_support/writer.rs"]
pub mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use embedded_io_adapters::std::FromStd;
use kvm_ops_core::{
    Backend, Error, Exit, FaultPlan, Gfn, Host, InjectedHost, Leaked, PspPort, Step, Tech, VcpuId,
    VcpuOps, VmOps, VmParams,
};
use kvm_ops_sev::migrate::{
    Flow, Incoming, MigrateError, Outgoing, Phase, Progress, Receiver, SendLimits, Sender,
    StreamKey,
};
use kvm_ops_sev::{Failure, SevVcpu, SevVm};
use kvm_ops_sim::{SevSetup, SimHost};
use link::{Link, Plan};
use writer::{TICK, Writer};

use crate::common::{C, PAGE, RAM, Ram, free, host_from, load, measured, page, platform, sp};

pub type Machine = InjectedHost<SimHost>;

/// Pages that the guest writes, after the one that holds its count, and those of its memory.
const WRITTEN: u64 = 3;
const PAGES: u64 = 6;
/// What lies in the last page, which is shared.
const SHARED: &[u8] = b"in the open";

/// A machine with its VM. Fields are dropped in this order.
pub struct Side {
    vcpu: SevVcpu<Machine>,
    vm: SevVm<Machine>,
    pub host: Machine,
    pub plan: Arc<FaultPlan>,
    ram: Ram,
}

impl Side {
    fn new(tech: Tech, snp: bool, seed: u64) -> Self {
        let setup = SevSetup::new(platform(seed));
        let below = host_from(if snp { setup } else { setup.without_snp() });
        let plan = Arc::new(FaultPlan::new());
        let host = InjectedHost::new(below, Arc::clone(&plan));
        let ram = Ram::new(PAGES * PAGE);
        let id = host.next_vm_id();
        let mut vm = SevVm::create(&host, id, tech, &VmParams::new(1)).unwrap();
        vm.vm_init().unwrap();
        vm.set_memory_slot(&ram.slot(0, RAM)).unwrap();
        let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        Self {
            vcpu,
            vm,
            host,
            plan,
            ram,
        }
    }

    /// Frees the VM. Returns what leaked, which is what did not come back.
    fn end(self) -> Vec<String> {
        let Self { vcpu, vm, host, .. } = self;
        drop(vcpu);
        let report = free(vm);
        let of = |kind: fn(&Leaked) -> bool| report.leaks.iter().filter(|l| kind(&l.what)).count();
        let below = host.inner();
        let pages = of(|what| matches!(what, Leaked::Page(_)));
        assert_eq!(
            below.pages().unwrap().frames_out(),
            pages as u64,
            "{report:?}"
        );
        let keys = of(|what| matches!(what, Leaked::Key(_)));
        let in_use = host.psp().unwrap().asid_pools().in_use();
        assert_eq!(in_use, keys as u32, "{report:?}");
        let handles = of(|what| matches!(what, Leaked::Handle(_)));
        assert_eq!(sp(below).snapshot().guests.len(), handles, "{report:?}");
        assert_eq!(below.live_vms(), 0);
        let leaks = report.leaks.iter().map(|leak| match leak.what {
            Leaked::Page(_) => format!("page ({})", leak.operation),
            Leaked::Key(_) => format!("ASID ({})", leak.operation),
            _ => format!("handle ({})", leak.operation),
        });
        leaks.collect()
    }
}

/// A guest at the first of two machines. It has counted.
pub struct Pair {
    pub sides: [Side; 2],
    counted: Arc<AtomicU64>,
}

/// What both ends said on the first link, and over how many links the guest went.
pub struct Journey {
    pub said: [Result<(), MigrateError>; 2],
    pub links: usize,
    /// The kinds of the frames that each end wrote on the first link.
    pub kinds: [Vec<u8>; 2],
    /// The source had given the guest up, and the target had not heard of it: it took the guest over.
    pub fenced: bool,
}

/// What an embedder does after a link that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It takes another link, where the session can go on.
    AnotherLink,
    /// There is none.
    NoLink,
}

type Ends<'a> = (
    Sender<Outgoing<'a, Machine>>,
    Receiver<Incoming<'a, Machine>>,
);

fn random(out: &mut [u8]) -> kvm_ops_core::Result<()> {
    out.fill(7);
    Ok(())
}

fn count(vcpu: &mut SevVcpu<Machine>, counted: &AtomicU64, more: u64) -> Result<(), Error> {
    let goal = counted.load(Ordering::SeqCst) + more;
    while counted.load(Ordering::SeqCst) < goal {
        match vcpu.vcpu_run()? {
            Exit::IoOut { port: TICK, .. } | Exit::Interrupted => {}
            other => panic!("{other:?}"),
        }
    }
    Ok(())
}

/// The guest's program, which goes on from what is in memory.
fn program(counted: &Arc<AtomicU64>) -> Writer {
    Writer::new(
        Gfn::containing(kvm_ops_core::Gpa::new(C | RAM)),
        WRITTEN,
        Arc::clone(counted),
    )
}

impl Pair {
    pub fn new(tech: Tech, snp: bool) -> Self {
        let mut sides = [Side::new(tech, snp, 51), Side::new(tech, snp, 52)];
        let [here, _] = &mut sides;
        for n in 0..=WRITTEN {
            let zeros = page(0);
            here.vm
                .add_initial_page(&measured(RAM + n * PAGE, &zeros))
                .unwrap();
        }
        here.vm.vm_finalize().unwrap();
        here.ram.write(((PAGES - 1) * PAGE) as usize, SHARED);
        let counted = Arc::default();
        load(&mut here.vcpu, program(&counted));
        count(&mut here.vcpu, &counted, WRITTEN + 2).unwrap();
        Self { sides, counted }
    }

    /// Runs the guest's way. What fails is mended after the first link. `at_prepared` may cancel when only SEND_FINISH is left.
    pub fn journey(
        &mut self,
        plans: [Option<Plan>; 2],
        key: Option<StreamKey>,
        then: Then,
        at_prepared: &mut dyn FnMut() -> Flow,
    ) -> Journey {
        let Self {
            sides: [here, there],
            counted,
        } = self;
        let refused = |operation, error| Journey {
            said: [
                Err(MigrateError::Failed { operation, error }),
                Err(MigrateError::WrongPhase),
            ],
            links: 0,
            kinds: [Vec::new(), Vec::new()],
            fenced: false,
        };
        let from = match here.vm.outgoing(Box::new(|vcpu| Ok(vec![vcpu.0 as u8; 9]))) {
            Ok(from) => from,
            Err(error) => return refused("outgoing", error),
        };
        let vendor = sp(there.host.inner()).vendor_certs();
        let to = match there.vm.incoming(vendor, Box::new(|_, _| Ok(()))) {
            Ok(to) => to,
            Err(error) => {
                let mut refused = refused("incoming", error);
                refused.said.reverse();
                return refused;
            }
        };
        let limits = SendLimits {
            rounds: 2,
            pages_left: 0,
        };
        let sender = Sender::new(from, limits, &mut random).map_err(|(error, _)| error);
        let mut ends = (sender.unwrap(), Receiver::new(to));
        if let Some(key) = key {
            ends.0 = ends.0.with_key(key.clone());
            ends.1 = ends.1.with_key(key, [9; 16]);
        }
        let vcpu = &mut here.vcpu;
        // The guest writes after the first round of each link.
        let mut wrote = 0;
        let mut watch = |link: usize, progress: &Progress| {
            if progress.phase == Phase::Copying && progress.left == 0 && wrote < link {
                wrote = link;
                // A fault that is armed may keep the guest from its page: it tries again later.
                let _ = count(vcpu, counted, 1);
            }
            match progress.phase {
                Phase::Prepared => at_prepared(),
                _ => Flow::GoOn,
            }
        };
        let (said, kinds) = over(&mut ends, plans, &mut |progress| watch(1, progress));
        for plan in [&here.plan, &there.plan] {
            plan.disarm();
        }
        let mut journey = Journey {
            said,
            links: 1,
            kinds,
            fenced: false,
        };
        settle(&mut ends, &mut journey, then, &mut |progress| {
            watch(2, progress)
        });
        journey
    }

    /// True if what the guest shared lies in the target's memory too.
    pub fn shared_page_came(&self) -> bool {
        let at = ((PAGES - 1) * PAGE) as usize;
        self.sides[1].ram.read(at, SHARED.len()) == SHARED
    }

    /// The side at which the guest goes on with its count, and nowhere else.
    pub fn runs_at(&mut self) -> &'static str {
        let [here, there] = &mut self.sides;
        let steps = [here.vm.step(), there.vm.step()];
        let before = self.counted.load(Ordering::SeqCst);
        let goes_on = count(&mut here.vcpu, &self.counted, 2 * WRITTEN);
        if there.vm.step() != Step::Runnable {
            assert!(there.vcpu.vcpu_run().is_err(), "{steps:?}");
            let why = goes_on.map_err(|_| here.vm.explain(Error::Poisoned).to_string());
            return match why {
                Ok(()) => "source",
                Err(why) => {
                    assert!(why.contains("destroy"), "{why}");
                    "lost"
                }
            };
        }
        assert_eq!(goes_on, Err(Error::Poisoned), "{steps:?}");
        self.counted.store(0, Ordering::SeqCst);
        load(&mut there.vcpu, program(&self.counted));
        count(&mut there.vcpu, &self.counted, 1).unwrap();
        let first = self.counted.load(Ordering::SeqCst);
        assert_eq!(first, before + 1, "no count is lost");
        count(&mut there.vcpu, &self.counted, 2 * WRITTEN).unwrap();
        "target"
    }

    /// Frees both VMs. Returns what leaked.
    pub fn end(self) -> String {
        let leaks = self.sides.map(Side::end).concat();
        match leaks.is_empty() {
            true => "nothing".into(),
            false => leaks.join(", "),
        }
    }
}

/// Both ends over one link. Returns how each ended, and the kinds of the frames that each wrote.
fn over(
    (sender, receiver): &mut Ends<'_>,
    plans: [Option<Plan>; 2],
    watch: &mut dyn FnMut(&Progress) -> Flow,
) -> ([Result<(), MigrateError>; 2], [Vec<u8>; 2]) {
    let [near, far] = Link::pair(plans);
    let (mut near, mut far) = (FromStd::new(near), FromStd::new(far));
    thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let ended = receiver.run(&mut far, &mut |_| Flow::GoOn).map(drop);
            let mut far = far.into_inner();
            // The link stays open, so that a refusal is read before the link is found broken.
            let _ = std::io::copy(&mut far, &mut std::io::sink());
            (ended, far.kinds().to_vec())
        });
        let sent = sender.run(&mut near, watch).map(drop);
        let near = near.into_inner();
        let frames = near.kinds().to_vec();
        // The peer hears that the link is over.
        drop(near);
        let (received, there) = receiving.join().unwrap();
        ([sent, received], [frames, there])
    })
}

/// What is left after the first link is the embedder's: another link, or the way back.
fn settle(
    ends: &mut Ends<'_>,
    journey: &mut Journey,
    then: Then,
    watch: &mut dyn FnMut(&Progress) -> Flow,
) {
    let mut sent = journey.said[0];
    if then == Then::AnotherLink
        && let Err(error) = &sent
        && (error.can_go_on() || ends.0.progress().phase == Phase::Committed)
    {
        journey.links += 1;
        sent = over(ends, [None, None], watch).0[0];
    }
    if sent.is_ok() {
        return;
    }
    let (sender, receiver) = ends;
    if sender.progress().phase == Phase::Committed {
        // The source's machine says that it gave the guest up: there is no other copy of it.
        journey.fenced = receiver.take_over_from_fenced_source().is_ok();
        return;
    }
    if sender.progress().phase != Phase::Cancelled {
        sender.cancel::<FromStd<Link>>(None).unwrap();
    }
    receiver.abandon().unwrap();
}

/// What an end says.
pub fn word(ended: &Result<(), MigrateError>) -> String {
    match ended {
        Ok(()) => "done".into(),
        Err(MigrateError::Failed { operation, error }) => match Failure::of(error) {
            Some(failure) if failure.operation.name() == *operation => {
                format!("{operation}: the status")
            }
            Some(failure) => format!("{operation}: the status of {}", failure.operation.name()),
            None => format!("{operation}: {error}"),
        },
        Err(MigrateError::Refused(refusal)) => format!("refused: {}", refusal.reason),
        // The other end did not begin.
        Err(MigrateError::WrongPhase) => "nothing".into(),
        Err(error) => error.to_string(),
    }
}
