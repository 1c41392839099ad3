//! Random calls on a VM that the kernel holds, each compared with what a model of the VM says.

use std::collections::{BTreeMap, BTreeSet};

use kvm_ops::kvm::KvmHost;
use kvm_ops::{
    AnyVcpu, AnyVm, EncParams, Error, Field, Gfn, Gpa, Host, HostRange, InitialPage,
    InitialPageKind, Kind, MemSlot, Privacy, Result, SevParams, SlotId, Step, Tech, VcpuId,
    VcpuOps, Vm, VmConfig, VmOps, create,
};
use vm_memory::MmapRegion;

use crate::common::{again, is_inside};
use crate::guest::{TECHS, host};

/// Rounds for each technology, and calls in each.
const ROUNDS: u64 = 6;
const CALLS: usize = 150;
/// Slots, and pages in each. They may begin at each page below `FRAMES`.
const SLOTS: usize = 3;
const PAGES: u64 = 4;
const FRAMES: u64 = 12;
const VCPUS: u32 = 2;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    SetSlot(u32, u64),
    DeleteSlot(u32),
    Convert(u64, u64, Privacy),
    PreFault(u64, u64),
    AddPage(u64),
    CreateVcpu(u32),
    Finalize,
    /// To a new VM, with as many vCPUs if their registers move along.
    Move,
}

impl Op {
    fn random(random: &mut Random, moves: bool) -> Self {
        if moves && random.below(12) == 0 {
            return Self::Move;
        }
        let (frame, pages) = (random.below(FRAMES), random.below(PAGES + 2));
        let slot = random.below(SLOTS as u64) as u32;
        match random.below(24) {
            0..=5 => Self::SetSlot(slot, frame),
            6..=7 => Self::DeleteSlot(slot),
            8..=10 => Self::Convert(frame, pages, Privacy::Private),
            11..=13 => Self::Convert(frame, pages, Privacy::Shared),
            14..=17 => Self::PreFault(frame, pages),
            18..=20 => Self::AddPage(frame),
            21..=22 => Self::CreateVcpu(random.below(u64::from(VCPUS) + 1) as u32),
            _ => Self::Finalize,
        }
    }
}

/// What the VM is, as far as it shows.
struct Model {
    tech: Tech,
    step: Step,
    /// The first frame of each slot.
    slots: BTreeMap<u32, u64>,
    private: BTreeSet<u64>,
    /// Frames with a page of the launch.
    added: BTreeSet<u64>,
    vcpus: BTreeSet<u32>,
}

impl Model {
    fn new(tech: Tech) -> Self {
        Self {
            tech,
            step: Step::Initialized,
            slots: BTreeMap::new(),
            private: BTreeSet::new(),
            added: BTreeSet::new(),
            vcpus: BTreeSet::new(),
        }
    }

    fn is_normal(&self) -> bool {
        !self.tech.is_confidential()
    }

    fn has(&self, frame: u64) -> bool {
        self.slots
            .values()
            .any(|first| (*first..first + PAGES).contains(&frame))
    }

    /// The frames from `first` on that slots have, at most `pages`.
    fn covered(&self, first: u64, pages: u64) -> Result<u64> {
        if pages == 0 {
            return Err(Error::Invalid(Field::Size, 0));
        }
        match (first..first + pages)
            .take_while(|frame| self.has(*frame))
            .count()
        {
            0 => Err(Error::NotFound(Field::Gfn, first)),
            covered => Ok(covered as u64),
        }
    }

    /// The answer to a call, which takes effect; 0 where there is no number. `None` where several errors are right.
    fn answer(&mut self, op: Op) -> Option<Result<u64>> {
        Some(match op {
            Op::SetSlot(id, first) => self.set_slot(id, first),
            Op::DeleteSlot(id) => match self.slots.remove(&id) {
                None => Err(Error::NotFound(Field::Slot, id.into())),
                Some(first) => {
                    self.added
                        .retain(|frame| !(first..first + PAGES).contains(frame));
                    Ok(0)
                }
            },
            Op::Convert(first, pages, to) => self.covered(first, pages).inspect(|covered| {
                for frame in first..first + covered {
                    match to {
                        Privacy::Private => self.private.insert(frame),
                        Privacy::Shared => self.private.remove(&frame),
                    };
                }
            }),
            Op::PreFault(..) if self.step != Step::Runnable => Err(Error::WrongState(self.step)),
            Op::PreFault(first, pages) => self.covered(first, pages).and_then(|covered| {
                let frames = first..first + covered;
                let private = frames
                    .take_while(|frame| self.private.contains(frame))
                    .count();
                match (private, self.vcpus.is_empty()) {
                    (0, _) => Err(Error::NotFound(Field::Gfn, first)),
                    (_, true) => Err(Error::Invalid(Field::VcpuCount, 0)),
                    (private, false) => Ok(private as u64),
                }
            }),
            Op::AddPage(_) if self.step != Step::Initialized => Err(Error::WrongState(self.step)),
            Op::AddPage(frame) if !self.has(frame) => Err(Error::NotFound(Field::Gpa, frame << 12)),
            Op::AddPage(frame) => return self.add_page(frame),
            Op::CreateVcpu(id) if id >= VCPUS => Err(Error::Invalid(Field::Vcpu, id.into())),
            Op::CreateVcpu(id) => {
                let secret = self.tech != Tech::Sev && !self.is_normal();
                match self.step {
                    Step::Runnable if secret => Err(Error::WrongState(self.step)),
                    _ if !self.vcpus.insert(id) => Err(Error::Exists(Field::Vcpu, id.into())),
                    _ => Ok(0),
                }
            }
            Op::Finalize if self.step != Step::Initialized => Err(Error::WrongState(self.step)),
            Op::Finalize if self.tech == Tech::Tdx && self.vcpus.is_empty() => {
                Err(Error::Invalid(Field::VcpuCount, 0))
            }
            Op::Finalize => {
                self.step = Step::Runnable;
                Ok(0)
            }
            Op::Move if self.step != Step::Runnable => return None,
            Op::Move => {
                if self.tech == Tech::Sev {
                    self.vcpus.clear();
                }
                Ok(0)
            }
        })
    }

    fn set_slot(&mut self, id: u32, first: u64) -> Result<u64> {
        match self.slots.get(&id) {
            Some(old) if *old == first => return Ok(0),
            Some(_) => return Err(Error::Exists(Field::Slot, id.into())),
            None => {}
        }
        let overlaps = |other: &u64| *other < first + PAGES && first < other + PAGES;
        if let Some((other, _)) = self.slots.iter().find(|(_, other)| overlaps(other)) {
            return Err(Error::Invalid(Field::OverlappedSlot, (*other).into()));
        }
        self.slots.insert(id, first);
        for frame in first..first + PAGES {
            match self.is_normal() {
                true => self.private.remove(&frame),
                false => self.private.insert(frame),
            };
        }
        Ok(0)
    }

    /// A page in a frame that a slot has, during the launch.
    fn add_page(&mut self, frame: u64) -> Option<Result<u64>> {
        if self.tech == Tech::Tdx && self.vcpus.is_empty() {
            return Some(Err(Error::Invalid(Field::VcpuCount, 0)));
        }
        match self.tech {
            // Memory is encrypted in place, and can be again.
            Tech::Sev | Tech::SevEs => Some(Ok(0)),
            _ if self.is_normal() => None,
            // A shared frame has no private page, and a page is there once.
            _ if !self.private.contains(&frame) || !self.added.insert(frame) => None,
            _ => Some(Ok(0)),
        }
    }
}

struct Real {
    host: KvmHost,
    vm: Vm<AnyVm<KvmHost>>,
    vcpus: Vec<AnyVcpu<KvmHost>>,
}

impl Real {
    fn run(&mut self, op: Op, memory: &[MmapRegion<()>]) -> Result<u64> {
        let vm = &mut self.vm;
        match op {
            Op::SetSlot(id, first) => {
                let region = &memory[id as usize];
                // SAFETY: the regions outlive the VM, and nothing references their contents.
                let range =
                    unsafe { HostRange::new(region.as_ptr() as u64, region.size() as u64) }?;
                vm.set_memory_slot(MemSlot::new(SlotId(id), Gpa::new(first << 12), range))?;
                Ok(0)
            }
            Op::DeleteSlot(id) => vm.delete_memory_slot(SlotId(id)).map(|()| 0),
            Op::Convert(first, pages, to) => vm.set_memory_attributes(Gfn::new(first), pages, to),
            Op::PreFault(first, pages) => vm.pre_fault_memory(Gfn::new(first), pages),
            Op::AddPage(frame) => {
                let page = InitialPage {
                    gpa: Gpa::new(frame << 12),
                    contents: &[1; 4096],
                    kind: InitialPageKind::Measured,
                };
                vm.add_initial_page(&page).map(|()| 0)
            }
            Op::CreateVcpu(id) => {
                self.vcpus.push(vm.create_vcpu(VcpuId(id))?);
                Ok(0)
            }
            Op::Finalize => vm.finalize().map(|()| 0),
            Op::Move => self.move_on().map(|()| 0),
        }
    }

    fn move_on(&mut self) -> Result<()> {
        let arrives = SevParams {
            arrives: true,
            ..SevParams::default()
        };
        let tech = self.vm.tech();
        let config = VmConfig::new(Kind::Of(tech)).enc(EncParams::Sev(Box::new(arrives)));
        let mut to = create(&self.host, &config.vcpus(VCPUS))?;
        let mut vcpus = Vec::new();
        if tech == Tech::SevEs {
            for vcpu in &self.vcpus {
                vcpus.push(to.create_vcpu(vcpu.id())?);
            }
        }
        self.vm.move_to(&mut to)?;
        self.vcpus = vcpus;
        let report = std::mem::replace(&mut self.vm, to).destroy();
        assert!(report.is_clean(), "{report:?}");
        Ok(())
    }
}

fn round(host: &KvmHost, tech: Tech, params: EncParams, seed: u64) {
    let memory: Vec<MmapRegion<()>> = (0..SLOTS)
        .map(|_| MmapRegion::new((PAGES * 4096) as usize).unwrap())
        .collect();
    let moves = matches!(&params, EncParams::Sev(sev) if sev.movable);
    let config = VmConfig::new(Kind::Of(tech)).enc(params);
    let mut real = Real {
        host: host.clone(),
        vm: create(host, &config.vcpus(VCPUS)).unwrap(),
        vcpus: Vec::new(),
    };
    let mut model = Model::new(tech);
    let mut random = Random(seed);
    for call in 0..CALLS {
        let op = Op::random(&mut random, moves);
        let place = format!("{tech}, seed {seed}, call {call}: {op:?}");
        let got = real.run(op, &memory);
        match model.answer(op) {
            Some(expected) => assert_eq!(got, expected, "{place}"),
            None => assert!(got.is_err(), "{place}: {got:?}"),
        }
        assert_eq!(real.vm.step(), model.step, "{place}");
        for frame in (0..FRAMES + PAGES).filter(|frame| model.has(*frame)) {
            let expected = match model.private.contains(&frame) {
                true => Privacy::Private,
                false => Privacy::Shared,
            };
            let got = real.vm.back_end().privacy(Gfn::new(frame));
            assert_eq!(got, expected, "{place}: frame {frame}");
        }
    }
    drop(real.vcpus);
    let report = real.vm.destroy();
    assert!(report.is_clean(), "{tech}, seed {seed}: {report:?}");
}

fn rounds(kinds: impl IntoIterator<Item = (Tech, EncParams)>) {
    let host = host();
    let files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = files();
    let normal = (Tech::normal(host.vendor()), EncParams::Private);
    for (tech, params) in kinds.into_iter().chain([normal]) {
        for seed in 0..ROUNDS {
            round(&host, tech, params.clone(), seed);
        }
    }
    assert_eq!(files(), before);
}

#[test]
fn random_calls_on_sev_guests_answer_as_a_model_says() {
    if is_inside() {
        return rounds(TECHS.map(|tech| (tech, EncParams::Default)));
    }
    again(
        "random::random_calls_on_sev_guests_answer_as_a_model_says",
        "amd",
    );
}

#[test]
fn random_calls_on_tds_answer_as_a_model_says() {
    if is_inside() {
        return rounds([(Tech::Tdx, EncParams::Default)]);
    }
    again(
        "random::random_calls_on_tds_answer_as_a_model_says",
        "intel",
    );
}

#[test]
fn random_calls_on_guests_that_move_answer_as_a_model_says() {
    if is_inside() {
        let movable = SevParams {
            ghcb_version: 1,
            movable: true,
            ..SevParams::default()
        };
        let params = EncParams::Sev(Box::new(movable));
        return rounds([Tech::Sev, Tech::SevEs].map(|tech| (tech, params.clone())));
    }
    again(
        "random::random_calls_on_guests_that_move_answer_as_a_model_says",
        "amd",
    );
}
