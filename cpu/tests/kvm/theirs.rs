//! A case on a vCPU of `/dev/kvm`.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_msr_entry,
    kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::{Kvm as Device, VcpuExit, VcpuFd, VmFd};
use kvm_ops_cpu::{CpuidLeaf, CpuidTable, Registers, Segment, TableRegister};

use crate::cases::Case;
use crate::common::Ram;
use crate::machine::{self, MEMORY, MSRS, Outcome, Stop};

/// A KVM that runs ring 0 natively.
pub(crate) struct Kvm {
    device: Device,
    cpuid: CpuidTable,
    machine: Machine,
}

struct Machine {
    vcpu: VcpuFd,
    _vm: VmFd,
    ram: Arc<Ram>,
    start: kvm_sregs,
}

impl Kvm {
    /// A KVM that can be compared with, or why there is none.
    pub(crate) fn find() -> Result<Self, String> {
        let device = Device::new().map_err(|error| format!("/dev/kvm: {error}"))?;
        let offered = device
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| format!("KVM_GET_SUPPORTED_CPUID: {error}"))?;
        let cpuid = common_features(&offered);
        let machine =
            Machine::new(&device, &cpuid).map_err(|error| format!("/dev/kvm: {error}"))?;
        let mut kvm = Self {
            device,
            cpuid,
            machine,
        };
        // INT 30H, which emulators of ring 0 refuse or take for #UD.
        let probe = Case::new("probe", &[0xcd, 0x30]);
        let native = !on_tcg()
            && kvm.run(&probe).is_some_and(|end| {
                end.stop == Stop::Halted && end.registers.rip == machine::HANDLERS + 0x301
            });
        if native || std::env::var("KVM_OPS_CPU_KVM").is_ok_and(|which| which == "any") {
            return Ok(kvm);
        }
        Err("this KVM does not run ring 0 natively".to_owned())
    }

    /// The features that KVM and this crate's processor have, under the vendor name of the host.
    pub(crate) fn cpuid(&self) -> CpuidTable {
        self.cpuid.clone()
    }

    /// Runs a case; `None` if KVM cannot execute it.
    pub(crate) fn run(&mut self, case: &Case) -> Option<Outcome> {
        let outcome = self.machine.run(case);
        // What is pending in KVM after another end than HLT would meet the next case.
        if outcome.as_ref().is_none_or(|end| end.stop != Stop::Halted) {
            self.machine = Machine::new(&self.device, &self.cpuid).expect("as before");
        }
        outcome
    }
}

impl Machine {
    fn new(device: &Device, cpuid: &CpuidTable) -> Result<Self, kvm_ioctls::Error> {
        let vm = device.create_vm()?;
        let ram = machine::ram();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: ram.frame(0).expect("a first page").as_ptr() as u64,
        };
        // SAFETY: the frames of a `Ram` are one allocation of `MEMORY` bytes, which lives as long as the VM, both being
        // held by the machine; tests touch it while the vCPU does not run.
        unsafe { vm.set_user_memory_region(region)? };
        let vcpu = vm.create_vcpu(0)?;
        let entries: Vec<kvm_cpuid_entry2> = cpuid.leaves().map(entry).collect();
        vcpu.set_cpuid2(&CpuId::from_entries(&entries).expect("fewer entries than KVM takes"))?;
        let start = vcpu.get_sregs()?;
        Ok(Self {
            vcpu,
            _vm: vm,
            ram,
            start,
        })
    }

    fn run(&mut self, case: &Case) -> Option<Outcome> {
        machine::fill(&self.ram, case);
        self.set(&machine::registers(case), &case.msrs)?;
        let stop = match self.vcpu.run().ok()? {
            VcpuExit::Hlt => Stop::Halted,
            VcpuExit::Shutdown => Stop::TripleFault,
            VcpuExit::IoIn(port, data) => port_stop(port, data.len(), false),
            VcpuExit::IoOut(port, data) => port_stop(port, data.len(), true),
            _ => return None,
        };
        let mut memory = vec![0; MEMORY];
        self.ram.read(0, &mut memory);
        Some(Outcome {
            stop,
            registers: self.get()?,
            msrs: self.msrs()?,
            memory,
        })
    }

    fn set(&mut self, r: &Registers, msrs: &[(u32, u64)]) -> Option<()> {
        let mut s = self.start;
        let [es, cs, ss, ds, fs, gs] = r.segments.map(|segment| to_kvm(&segment));
        (s.es, s.cs, s.ss, s.ds, s.fs, s.gs) = (es, cs, ss, ds, fs, gs);
        (s.ldt, s.tr) = (to_kvm(&r.ldtr), to_kvm(&r.tr));
        (s.gdt, s.idt) = (table(&r.gdtr), table(&r.idtr));
        (s.cr0, s.cr2, s.cr3, s.cr4, s.efer) = (r.cr0, r.cr2, r.cr3, r.cr4, r.efer);
        let vcpu = &self.vcpu;
        vcpu.set_sregs(&s).ok()?;
        vcpu.set_vcpu_events(&kvm_vcpu_events::default()).ok()?;
        vcpu.set_debug_regs(&kvm_debugregs {
            db: r.breakpoints,
            dr6: r.dr6,
            dr7: r.dr7,
            ..Default::default()
        })
        .ok()?;
        let mut xcrs = vcpu.get_xcrs().ok()?;
        xcrs.xcrs[0].value = r.xcr0;
        vcpu.set_xcrs(&xcrs).ok()?;
        let mut values = MSRS.map(|index| (index, 0)).to_vec();
        values[3].1 = PAT_AT_RESET;
        values.extend(msrs);
        let entries: Vec<_> = values.into_iter().map(msr).collect();
        vcpu.set_msrs(&Msrs::from_entries(&entries).ok()?).ok()?;
        let [
            rax,
            rcx,
            rdx,
            rbx,
            rsp,
            rbp,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
        ] = r.gpr;
        let (rip, rflags) = (r.rip, r.rflags);
        vcpu.set_regs(&kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        })
        .ok()
    }

    fn get(&self) -> Option<Registers> {
        let vcpu = &self.vcpu;
        let (r, s) = (vcpu.get_regs().ok()?, vcpu.get_sregs().ok()?);
        let d = vcpu.get_debug_regs().ok()?;
        Some(Registers {
            gpr: [
                r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
                r.r12, r.r13, r.r14, r.r15,
            ],
            rip: r.rip,
            rflags: r.rflags,
            segments: [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].map(|segment| from_kvm(&segment)),
            ldtr: from_kvm(&s.ldt),
            tr: from_kvm(&s.tr),
            gdtr: TableRegister {
                base: s.gdt.base,
                limit: s.gdt.limit,
            },
            idtr: TableRegister {
                base: s.idt.base,
                limit: s.idt.limit,
            },
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8 as u8,
            efer: s.efer,
            xcr0: vcpu.get_xcrs().ok()?.xcrs[0].value,
            breakpoints: d.db,
            dr6: d.dr6,
            dr7: d.dr7,
        })
    }

    fn msrs(&self) -> Option<[u64; MSRS.len()]> {
        let mut msrs = Msrs::from_entries(&MSRS.map(|index| msr((index, 0)))).ok()?;
        let read = self.vcpu.get_msrs(&mut msrs).ok()?;
        let values: Vec<u64> = msrs.as_slice()[..read].iter().map(|msr| msr.data).collect();
        values.try_into().ok()
    }
}

const PAT_AT_RESET: u64 = 0x0007_0406_0007_0406;

fn port_stop(port: u16, bytes: usize, write: bool) -> Stop {
    Stop::Port {
        port,
        bytes: bytes as u8,
        write,
    }
}

/// True on an emulated processor of QEMU, whose own faults would be compared.
fn on_tcg() -> bool {
    // SAFETY: every x86-64 processor has the CPUID instruction. (A safe function in newer toolchains, hence the allow.)
    #[allow(unused_unsafe)]
    let leaf = unsafe { core::arch::x86_64::__cpuid(0x4000_0000) };
    [leaf.ebx, leaf.ecx, leaf.edx] == [*b"TCGT", *b"CGTC", *b"GTCG"].map(u32::from_le_bytes)
}

/// Feature words that both have; the rest of the leaf is this crate's.
fn common_features(offered: &CpuId) -> CpuidTable {
    let offered = |function, index| {
        let mut entries = offered.as_slice().iter();
        entries
            .find(|e| (e.function, e.index) == (function, index))
            .copied()
    };
    let amd = offered(0, 0).is_some_and(|e| e.ebx == u32::from_le_bytes(*b"Auth"));
    let mut table = if amd {
        CpuidTable::amd()
    } else {
        CpuidTable::intel()
    };
    for (function, index) in [(1, 0), (7, 0), (0xd, 1), (0x8000_0001, 0), (0x8000_0008, 0)] {
        let ours = table.get(function, index);
        let kvm = offered(function, index).unwrap_or_default();
        let both = match function {
            1 => CpuidLeaf {
                ecx: ours.ecx & kvm.ecx,
                edx: ours.edx & kvm.edx,
                ..ours
            },
            7 => CpuidLeaf {
                ebx: ours.ebx & kvm.ebx,
                ecx: ours.ecx & kvm.ecx,
                edx: ours.edx & kvm.edx,
                ..ours
            },
            0xd => CpuidLeaf {
                eax: ours.eax & kvm.eax,
                ..ours
            },
            0x8000_0001 => CpuidLeaf {
                ecx: ours.ecx & kvm.ecx,
                edx: ours.edx & kvm.edx,
                ..ours
            },
            // The width of addresses is the host's: its processor tells which bits of an entry are reserved.
            _ => CpuidLeaf {
                eax: kvm.eax,
                ebx: ours.ebx & kvm.ebx,
                ..ours
            },
        };
        table.set(function, index, both);
    }
    table
}

fn entry((function, index, leaf): (u32, u32, CpuidLeaf)) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        flags: u32::from(matches!(function, 4 | 7 | 0xb | 0xd)),
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        ..Default::default()
    }
}

fn msr((index, data): (u32, u64)) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn table(from: &TableRegister) -> kvm_dtable {
    kvm_dtable {
        base: from.base,
        limit: from.limit,
        ..Default::default()
    }
}

fn to_kvm(s: &Segment) -> kvm_segment {
    let bit = |n: u32| (s.rights >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.rights & 15) as u8,
        s: bit(4),
        dpl: (s.rights >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(16),
        padding: 0,
    }
}

fn from_kvm(s: &kvm_segment) -> Segment {
    let bit = |value: u8, n: u32| u32::from(value) << n;
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        rights: u32::from(s.type_)
            | bit(s.s, 4)
            | bit(s.dpl, 5)
            | bit(s.present, 7)
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15)
            | bit(s.unusable, 16),
    }
}
