//! Safe calls in random order: VMs, vCPU handles that outlive them, ports and whole slots, on the
//! software platform. Nothing may crash, and at the end every page and key is returned or reported.
//!
//! Runs some thousand calls by default. `KVM_OPS_RANDOM_SECONDS=300` runs for five minutes, with a
//! new seed each round. A failure prints its seed, and `KVM_OPS_RANDOM_SEED=n` repeats it.
#![cfg(all(feature = "sim", feature = "intel", feature = "amd"))]

use std::time::{Duration, Instant};

use kvm_ops::guest::Script;
use kvm_ops::sim::SimHost;
use kvm_ops::{
    AnyVcpu, AnyVm, Backend, CpuId, EncCmd, EncRegion, Events, FreeReport, Gfn, Gpa, GuestDebug,
    Host, HostRange, InitialPage, InitialPageKind, KeyPool, Kind, Leaked, MemSlot, Msr, Pfn,
    Privacy, PspPort, SeamPort, SlotId, Tech, VcpuId, VcpuOps, Vendor, Vm, VmConfig, VmOps, create,
};
use vm_memory::MmapRegion;

const PAGES: usize = 16;

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

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn gpa(&mut self) -> Gpa {
        match self.below(8) {
            0 => Gpa::new(self.next()),
            1 => Gpa::new(!0xfff),
            _ => Gpa::new((self.next() % (2 * PAGES as u64)) << 12),
        }
    }

    fn pages(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => self.next(),
            _ => 1 + self.next() % PAGES as u64,
        }
    }

    fn privacy(&mut self) -> Privacy {
        [Privacy::Private, Privacy::Shared][self.below(2)]
    }

    fn script(&mut self) -> Script {
        (0..self.below(6)).fold(Script::new(), |script, _| match self.below(6) {
            0 => script.read(self.gpa(), 8),
            1 => script.write(self.gpa(), b"random"),
            2 => script.share(self.gpa(), self.pages()),
            3 => script.unshare(self.gpa(), self.pages()),
            4 => script.hypercall(self.next(), [1; 4]),
            _ => script.output(0x80, &[1]),
        })
    }
}

/// The VMs of one machine, and handles that outlived others.
struct World<'a> {
    host: &'a SimHost,
    memory: &'a [MmapRegion<()>],
    vms: Vec<Vm<AnyVm<SimHost>>>,
    vcpus: Vec<AnyVcpu<SimHost>>,
    leaked: u64,
}

impl World<'_> {
    fn slot(&self, random: &mut Random) -> MemSlot {
        let region = &self.memory[random.below(self.memory.len())];
        // SAFETY: the regions outlive the world, and there is no reference into them.
        let range = unsafe { HostRange::new(region.as_ptr() as u64, region.size() as u64) };
        let id = SlotId(random.below(3) as u32);
        MemSlot::new(id, random.gpa(), range.expect("whole pages"))
    }

    fn note(&mut self, report: &FreeReport) {
        let pages = report.leaks.iter();
        self.leaked += pages
            .filter(|leak| matches!(leak.what, Leaked::Page(_)))
            .count() as u64;
    }

    fn create(&mut self, random: &mut Random) {
        let techs: Vec<_> = Tech::ALL
            .into_iter()
            .filter(|tech| tech.vendor() == Some(self.host.vendor()))
            .collect();
        let kind = Kind::Of(techs[random.below(techs.len())]);
        let config = VmConfig::new(kind).vcpus(1 + random.below(3) as u32);
        match create(self.host, &config) {
            Ok(mut vm) => {
                if random.below(4) > 0 {
                    let mut slot = self.slot(random);
                    (slot.id, slot.gpa) = (SlotId(0), Gpa::new(0));
                    let _ = vm.set_memory_slot(slot);
                }
                self.vms.push(vm);
            }
            Err(failed) => {
                if let Some(report) = failed.report {
                    self.note(&report);
                }
            }
        }
    }

    fn step(&mut self, random: &mut Random) {
        if self.vms.is_empty() || random.below(24) == 0 {
            self.create(random);
            return;
        }
        let at = random.below(self.vms.len());
        match random.below(26) {
            0 => {
                let report = self.vms.swap_remove(at).destroy();
                self.note(&report);
            }
            // A teardown by hand: tokens are lost, repeated, or of another VM.
            1 => self.tear_down_by_hand(at, random),
            2 => {
                let other = random.below(self.vms.len());
                let (low, high) = (at.min(other), at.max(other));
                if low != high {
                    let (left, right) = self.vms.split_at_mut(high);
                    let (a, b) = (&mut left[low], &mut right[0]);
                    let (from, to) = if at < other { (a, b) } else { (b, a) };
                    let _ = match random.below(2) {
                        0 => from.move_to(to),
                        _ => from.copy_to(to),
                    };
                }
            }
            3 => {
                let other = random.below(self.vms.len());
                self.vms.swap(at, other);
            }
            4 | 5 => {
                let id = VcpuId(random.below(4) as u32);
                if let Ok(vcpu) = self.vms[at].create_vcpu(id) {
                    self.vcpus.push(vcpu);
                }
            }
            6 => {
                let slot = self.slot(random);
                let _ = self.vms[at].set_memory_slot(slot);
            }
            7 => {
                let id = SlotId(random.below(3) as u32);
                let _ = self.vms[at].delete_memory_slot(id);
            }
            8 => {
                let slot = self.slot(random);
                let _ = self.vms[at].back_end().delete_memory_slot(&slot);
            }
            9 => {
                let page = InitialPage {
                    gpa: random.gpa(),
                    contents: &[7; 4096],
                    kind: InitialPageKind::Measured,
                };
                let _ = self.vms[at].add_initial_page(&page);
            }
            10 => {
                let _ = self.vms[at].finalize();
            }
            11 | 12 => {
                let first = Gfn::containing(random.gpa());
                let (pages, to) = (random.pages(), random.privacy());
                let _ = self.vms[at].set_memory_attributes(first, pages, to);
            }
            13 => {
                let first = Gfn::containing(random.gpa());
                let _ = self.vms[at].pre_fault_memory(first, random.pages() % 64);
            }
            14 => {
                let mut data = [0xff; 256];
                let mut cmd = EncCmd {
                    id: random.next() as u32 % 64,
                    flags: 0,
                    data: &mut data[..random.below(257)],
                    firmware_status: 0,
                };
                let _ = self.vms[at].mem_enc_op(&mut cmd);
            }
            15 => {
                let region = EncRegion {
                    address: random.gpa().get(),
                    bytes: random.pages() << 12,
                };
                let _ = self.vms[at].register_region(region);
                let _ = self.vms[at].unregister_region(region);
            }
            16 => {
                let vm = self.vms[at].back_end();
                let _ = vm.deliver_interrupt(VcpuId(0), random.next() as u8);
                let _ = vm.flush_private_tlb();
                let _ = vm.disable_virtualization_cpu(CpuId(random.below(5) as u32));
                let _ = vm.measurement();
                let _ = vm.gmem_max_mapping_level(Pfn::new(random.next()), random.privacy());
            }
            _ => self.vcpu_step(random),
        }
    }

    fn tear_down_by_hand(&mut self, at: usize, random: &mut Random) {
        let mut vm = self.vms.swap_remove(at).into_back_end();
        for _ in 0..random.below(3) {
            let _lost = vm.mmu_release_hkid();
        }
        let report = match vm.mmu_release_hkid() {
            Err(error) => vm.vm_abandon(error),
            Ok(token) => match vm.drain_private(token) {
                Err((error, _)) => vm.vm_abandon(error),
                Ok(_lost) => {
                    let again = vm.mmu_release_hkid().expect("a token that was given once");
                    let drained = vm.drain_private(again).map_err(|(error, _)| error);
                    vm.vm_free(drained.expect("a VM that was drained once"))
                }
            },
        };
        self.note(&report);
    }

    fn vcpu_step(&mut self, random: &mut Random) {
        if self.vcpus.is_empty() {
            return;
        }
        let at = random.below(self.vcpus.len());
        let vcpu = &mut self.vcpus[at];
        match random.below(14) {
            0 => {
                let _ = self.vcpus.swap_remove(at).vcpu_free();
            }
            1 | 2 => {
                let script = random.script();
                if let Some(programs) = vcpu.programs() {
                    let _ = programs.load_program(Box::new(script));
                }
            }
            3..=7 => {
                // A waiting guest leaves at once.
                vcpu.kick_handle().kick();
                let _ = vcpu.vcpu_run();
                let data = vcpu.exit_data();
                data.fill(random.next() as u8);
                let _ = vcpu.answer(kvm_ops::Answer::Value(random.next()));
            }
            8 => {
                let _ = (vcpu.vcpu_reset(false), vcpu.vcpu_load(CpuId(0)));
                vcpu.vcpu_put();
            }
            9 => {
                let _ = vcpu.regs().and_then(|regs| vcpu.set_regs(&regs));
                let _ = vcpu.sregs().and_then(|sregs| vcpu.set_sregs(&sregs));
                let _ = vcpu.xsave().and_then(|xsave| vcpu.set_xsave(&xsave));
                let _ = vcpu.set_events(&Events::default());
                let _ = vcpu.set_msrs(&[Msr::write(random.next() as u32, 1)]);
            }
            10 => {
                let _ = (vcpu.inject_irq(random.next() as u8), vcpu.inject_nmi());
                let _ = vcpu.enable_irq_window();
                let _ = vcpu.set_guest_debug(GuestDebug::default());
            }
            _ => {
                let mut data = [0xff; 128];
                let mut cmd = EncCmd {
                    id: random.next() as u32 % 64,
                    flags: 0,
                    data: &mut data,
                    firmware_status: 0,
                };
                let _ = vcpu.vcpu_mem_enc_op(&mut cmd);
            }
        }
    }
}

/// The number of keys in use, of the kind that the host has.
fn keys_out(host: &SimHost) -> u32 {
    let hkids = host
        .seam()
        .map(SeamPort::key_ids)
        .map_or(0, KeyPool::in_use);
    let asids = host.psp().map_or(0, |psp| psp.asid_pools().in_use());
    hkids + asids
}

fn round(seed: u64, steps: usize) {
    let memory: Vec<_> = (0..4)
        .map(|_| MmapRegion::<()>::new(PAGES << 12).expect("memory"))
        .collect();
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let host = SimHost::new(vendor);
        let mut random = Random(seed);
        let mut world = World {
            host: &host,
            memory: &memory,
            vms: Vec::new(),
            vcpus: Vec::new(),
            leaked: 0,
        };
        for _ in 0..steps {
            world.step(&mut random);
        }
        for vm in std::mem::take(&mut world.vms) {
            let report = vm.destroy();
            world.note(&report);
        }
        // Handles that outlived their VMs.
        for _ in 0..world.vcpus.len().min(32) {
            world.vcpu_step(&mut random);
        }
        world.vcpus.clear();
        let out = host.pages().map_or(0, |pages| pages.frames_out());
        assert_eq!(
            out, world.leaked,
            "{vendor}, seed {seed}: pages out and reported"
        );
        if world.leaked == 0 {
            assert_eq!(keys_out(&host), 0, "{vendor}, seed {seed}: keys");
            assert_eq!(host.live_vms(), 0, "{vendor}, seed {seed}: VMs");
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn safe_calls_in_any_order_neither_crash_nor_lose_a_page() {
    if let Some(seed) = number("KVM_OPS_RANDOM_SEED") {
        return round(seed, 4_000);
    }
    let until = number("KVM_OPS_RANDOM_SECONDS").map(Duration::from_secs);
    let start = Instant::now();
    for seed in 0.. {
        if until.map_or(seed >= 12, |until| start.elapsed() >= until) {
            println!("{seed} rounds of 4000 calls on two machines");
            break;
        }
        round(seed, 4_000);
    }
}

/// Embedders call the enum, so it must implement `Backend` as each back end does.
const _: fn() = || {
    fn is_back_end<B: Backend>() {}
    is_back_end::<AnyVm<SimHost>>();
};
