//! A guest that counts in its memory, and two VMs of its host, of which the first has it.

// Each test file uses a part.
#![allow(dead_code, unreachable_pub)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvm_ops_core::guest::{Action, GuestProgram, Outcome};
use kvm_ops_core::moves::{MoveToken, StagingTable};
use kvm_ops_core::{
    Backend, Error, Exit, Field, FreeReport, Gfn, Host, KeyLease, Result, Step, VcpuId, VcpuOps,
    VmOps, VmParams,
};
use kvm_ops_tdx::TdxVm;

use crate::common::TestHost;
use crate::common::audit::{all_accounted, mirror_equals_secure_ept};
use crate::common::life::{self, destroy, initial_page};
use crate::migrate_support::keys::Keeper;
use crate::migrate_support::writer::{TICK, Writer};
use crate::migrate_support::{Pair, Vcpu, Vm};

/// Pages that the guest writes, after the one that holds its count.
const PAGES: u64 = 4;
/// The port that the guest reads where it is told to ask.
const ASK: u16 = 0x72;
/// A frame that the guest does not use, under tables of its own.
pub const FAR: Gfn = Gfn::new(0x3_0000);

/// Counts, and asks the host for a byte in place of telling it a count while `asks` is set.
struct Guest {
    writer: Writer,
    asks: Arc<AtomicBool>,
}

impl GuestProgram for Guest {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        let asks = self.asks.load(Ordering::SeqCst);
        match self.writer.step(last) {
            Action::Out { .. } if asks => Action::In { port: ASK, size: 1 },
            action => action,
        }
    }
}

/// An error without the numbers of this run.
pub fn in_words(error: Error) -> String {
    match error {
        Error::Busy => "`Busy`".into(),
        Error::Again => "`Again`".into(),
        Error::Poisoned => "`Poisoned`".into(),
        Error::NoMemory => "`NoMemory`".into(),
        Error::Exists(..) => "`Exists`".into(),
        Error::NotFound(..) => "`NotFound`".into(),
        Error::Firmware(_) => "`Firmware(status)`".into(),
        Error::Invalid(Field::Vm, _) => "`Invalid(Vm)`".into(),
        Error::Invalid(Field::VcpuCount, _) => "`Invalid(VcpuCount)`".into(),
        Error::Invalid(..) => "the port's error".into(),
        other => format!("`{other}`"),
    }
}

/// Runs a vCPU until the guest has counted so much more; else says why it did not.
pub fn run(vcpu: &mut Vcpu, counted: &AtomicU64, more: u64) -> Result<(), String> {
    let goal = counted.load(Ordering::SeqCst) + more;
    while counted.load(Ordering::SeqCst) < goal {
        match vcpu.vcpu_run() {
            Ok(Exit::IoOut { port: TICK, .. }) => {}
            Ok(Exit::InternalError { .. }) => return Err("`Exit::InternalError`".into()),
            Ok(exit) => return Err(format!("`Exit::{exit:?}`")),
            Err(error) => return Err(in_words(error)),
        }
    }
    Ok(())
}

/// A guest of a host, in the first of two VMs. Fields are dropped in this order.
pub struct World {
    /// The vCPU of the source, and that of the VM that the guest is known to have gone to.
    pub old: Option<Vcpu>,
    pub elsewhere: Option<Vcpu>,
    pub from: Vm,
    pub to: Vm,
    /// VMs of this host that are of no more use to the move.
    pub others: Vec<Vm>,
    /// Migration TDs, where the guest has one.
    pub keepers: Vec<Keeper>,
    /// KeyIDs that are somebody else's.
    pub leases: Vec<KeyLease>,
    /// Reports of VMs that ended.
    pub reports: Vec<FreeReport>,
    pub host: TestHost,
    /// The machine of the target, if that is another one.
    pub abroad: Option<TestHost>,
    /// The move goes by token.
    pub staged: bool,
    pub table: Arc<StagingTable>,
    /// The table that the target looks its token up in.
    pub asked: Arc<StagingTable>,
    pub token: Option<MoveToken>,
    /// The host's random numbers, and whether token and name reach their receivers.
    pub random: fn(&mut [u8]) -> Result<()>,
    pub delivers: [Result<()>; 2],
    pub counted: Arc<AtomicU64>,
    pub asks: Arc<AtomicBool>,
}

/// Numbers of which no two are equal.
pub fn distinct(out: &mut [u8]) -> Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes();
    let bytes = number.iter().cycle();
    out.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    Ok(())
}

/// A VM for a guest of one vCPU that the module knows nothing of.
pub fn created(host: &TestHost) -> Vm {
    TdxVm::create(host, host.next_vm_id(), &VmParams::new(1)).unwrap()
}

/// The same with a TD that is not used, and the guest's slot.
pub fn waiting(host: &TestHost) -> Vm {
    let mut vm = created(host);
    vm.vm_init().unwrap();
    vm.set_memory_slot(&life::slot(host)).unwrap();
    vm
}

impl World {
    /// A guest that has counted, and a target that waits for it.
    pub fn new(staged: bool) -> Self {
        let host = TestHost::new();
        let mut world = Self::of(staged, &host, created(&host));
        world.prepare();
        world.start();
        world
    }

    /// The same with a guest that a migration to another host could take, and has taken on its way; `pair` is on one machine.
    pub fn of_pair(staged: bool, pair: Pair) -> Self {
        let Pair {
            vcpus,
            source,
            target,
            keepers,
            hosts: [host, _],
            counted,
            ..
        } = pair;
        let mut world = Self::of(staged, &host, source);
        world.old = vcpus.into_iter().next();
        world.others.push(target);
        world.keepers.extend(keepers);
        world.counted = counted;
        world
    }

    fn of(staged: bool, host: &TestHost, from: Vm) -> Self {
        let table = Arc::new(StagingTable::new());
        Self {
            old: None,
            elsewhere: None,
            from,
            to: waiting(host),
            others: Vec::new(),
            keepers: Vec::new(),
            leases: Vec::new(),
            reports: Vec::new(),
            host: host.clone(),
            abroad: None,
            staged,
            asked: Arc::clone(&table),
            table,
            token: None,
            random: distinct,
            delivers: [Ok(()), Ok(())],
            counted: Arc::default(),
            asks: Arc::default(),
        }
    }

    /// The source up to its last step before it may run.
    pub fn prepare(&mut self) {
        self.from.vm_init().unwrap();
        self.from.set_memory_slot(&life::slot(&self.host)).unwrap();
        self.old = Some(self.from.create_vcpu(VcpuId(0)).unwrap());
        for page in 0..=PAGES {
            let kind = kvm_ops_core::InitialPageKind::Unmeasured;
            let page = kvm_ops_core::InitialPage {
                contents: &[0; 4096],
                ..initial_page(page << 12, kind)
            };
            self.from.add_initial_page(&page).unwrap();
        }
    }

    /// That step, and the guest's first counts.
    pub fn start(&mut self) {
        self.from.vm_finalize().unwrap();
        let guest = Guest {
            writer: Writer::new(Gfn::new(0), PAGES, Arc::clone(&self.counted)),
            asks: Arc::clone(&self.asks),
        };
        let vcpu = self.old.as_mut().unwrap();
        let programs = vcpu.programs().unwrap();
        programs.load_program(Box::new(guest)).unwrap();
        run(vcpu, &self.counted, PAGES + 3).unwrap();
    }

    /// Puts another VM in the place of the source, whose end is told.
    pub fn end_source(&mut self, new: Vm) {
        self.old = None;
        self.reports
            .push(destroy(std::mem::replace(&mut self.from, new)));
    }

    /// Puts another VM of this host in the place of the target.
    pub fn renew_target(&mut self, new: Vm) {
        let old = std::mem::replace(&mut self.to, new);
        match self.abroad.take() {
            Some(abroad) => all_accounted(&abroad, &clean(destroy(old))),
            None => self.others.push(old),
        }
    }

    /// Stages the guest. A token of a staging that failed is of no use.
    pub fn send(&mut self) -> Result<()> {
        let (mut token, delivers) = (None, self.delivers[0]);
        let mut random = self.random;
        let sent = self.from.local_send(&self.table, &mut random, &mut |made| {
            delivers?;
            token = Some(*made);
            Ok(())
        });
        self.token = token.filter(|_| sent.is_ok());
        sent
    }

    /// The move; of one by token, what is left of it.
    pub fn attempt(&mut self) -> Result<()> {
        if !self.staged {
            return TdxVm::move_context(&mut self.from, &mut self.to);
        }
        if self.token.is_none() {
            self.send()?;
        }
        let (token, delivers) = (self.token.unwrap(), self.delivers[1]);
        self.to
            .local_receive(&self.asked, &token, &mut |_| delivers)
            .map(drop)
    }

    /// TDs and private pages of both VMs.
    pub fn tds(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        [&self.from, &self.to].map(|vm| (vm.tdr(), vm.private_stats().pages_4k))
    }

    pub fn steps(&self) -> [Step; 2] {
        [self.from.step(), self.to.step()]
    }

    /// Where the guest goes on with its count, and nowhere else.
    pub fn runs_at(&mut self) -> &'static str {
        // A migration to another host leaves pages in states of its own.
        let migrates = !self.keepers.is_empty();
        for (vm, skipped) in [(&self.from, migrates), (&self.to, self.abroad.is_some())] {
            if vm.step() == Step::Runnable && !skipped {
                mirror_equals_secure_ept(&self.host, vm);
            }
        }
        let goes_on = |vcpu: &mut Option<Vcpu>| {
            vcpu.as_mut()
                .is_some_and(|vcpu| run(vcpu, &self.counted, 3 * PAGES).is_ok())
        };
        let here = goes_on(&mut self.old);
        let elsewhere = goes_on(&mut self.elsewhere);
        let mut arrived = match self.to.step() {
            Step::Runnable => self.to.create_vcpu(VcpuId(0)).ok(),
            _ => None,
        };
        let there = goes_on(&mut arrived);
        match [here, there, elsewhere] {
            [true, false, false] => "source",
            [false, true, false] => "target",
            [false, false, true] => "another VM",
            [false, false, false] => "nowhere",
            sides => panic!("it runs at several VMs: {sides:?}"),
        }
    }

    /// Takes a token back, so that the source's guest may run.
    pub fn take_back(&mut self) {
        if self.from.step() == Step::Poisoned && !self.table.is_empty() {
            self.from.local_cancel().unwrap();
        }
    }

    /// Ends all VMs, the source first or last: every page and key of each machine is given back.
    pub fn end(self, source_first: bool) {
        let Self {
            old,
            elsewhere,
            from,
            to,
            others,
            keepers,
            leases,
            mut reports,
            host,
            abroad,
            table,
            ..
        } = self;
        drop((old, elsewhere));
        host.heal();
        let to = match &abroad {
            Some(abroad) => {
                all_accounted(abroad, &clean(destroy(to)));
                None
            }
            None => Some(to),
        };
        let mut vms: Vec<_> = [from].into_iter().chain(to).collect();
        if !source_first {
            vms.reverse();
        }
        vms.extend(others);
        let bound = !keepers.is_empty();
        reports.extend(vms.into_iter().map(destroy));
        keepers.into_iter().for_each(Keeper::destroy);
        for lease in leases {
            host.key_pool().give_back(lease).unwrap();
        }
        let sum = clean(life::sum(reports));
        match bound {
            // The reports of migration TDs are their keepers'.
            true => assert_eq!(host.live(), 0),
            false => all_accounted(&host, &sum),
        }
        assert!(table.is_empty());
    }
}

fn clean(report: FreeReport) -> FreeReport {
    assert!(report.is_clean(), "{report:?}");
    report
}
