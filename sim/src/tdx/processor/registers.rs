//! The registers of a TD's processor: between `kvm-ops-cpu` and the module, which keeps them in VMCS and TDVPS.

use kvm_ops_cpu::{APIC_PAGE_BYTES, Activity, Cpu, Registers, Segment, TableRegister};
use soft_tdx_module::{ProcessorState, Regs, SegmentState, VirtualApic};

/// x2APIC registers of the virtual APIC page: task and processor priority, interrupts in service, requests.
const TPR: u32 = 0x808;
const PPR: u32 = 0x80a;
const ISR: u32 = 0x810;
const IRR: u32 = 0x820;

/// Interruptibility state (SDM vol. 3, 25.4.2): the shadow of STI, that of MOV SS, and an NMI's handler.
const AFTER_STI: u32 = 1;
const AFTER_MOV_SS: u32 = 1 << 1;
const IN_NMI: u32 = 1 << 3;

fn interruptibility(from: &Activity) -> u32 {
    // The processor has one shadow for both.
    let shadow = if from.shadow { AFTER_STI } else { 0 };
    shadow | if from.nmi_blocked { IN_NMI } else { 0 }
}

/// General registers in encoding order, as both sides have them.
pub(super) fn gprs(cpu: &Cpu) -> Regs {
    Regs::from_array(std::array::from_fn(|n| cpu.gpr(n)))
}

pub(super) fn set_gprs(cpu: &mut Cpu, from: &Regs) {
    for (n, value) in from.to_array().into_iter().enumerate() {
        cpu.set_gpr(n, value);
    }
}

fn segment(from: &Segment) -> SegmentState {
    SegmentState {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        rights: from.rights,
    }
}

fn cpu_segment(from: &SegmentState) -> Segment {
    Segment {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        rights: from.rights,
    }
}

/// What a VM exit saves.
pub(super) fn save(cpu: &Cpu) -> ProcessorState {
    let r = cpu.registers();
    let [es, cs, ss, ds, fs, gs] = &r.segments;
    ProcessorState {
        rip: r.rip,
        rflags: r.rflags,
        segments: [es, cs, ss, ds, fs, gs, &r.ldtr, &r.tr].map(segment),
        gdtr: (r.gdtr.base, r.gdtr.limit),
        idtr: (r.idtr.base, r.idtr.limit),
        cr0: r.cr0,
        cr2: r.cr2,
        cr3: r.cr3,
        cr4: r.cr4,
        efer: r.efer,
        xcr0: r.xcr0,
        breakpoints: r.breakpoints,
        dr6: r.dr6,
        dr7: r.dr7,
        interruptibility: interruptibility(&cpu.activity()),
        msrs: ProcessorState::MSRS.map(|index| cpu.read_msr(index).unwrap_or(0)),
        virtual_apic: virtual_apic(cpu),
    }
}

/// The virtual APIC page, which is the processor's local APIC.
fn virtual_apic(cpu: &Cpu) -> VirtualApic {
    let register = |index| cpu.read_msr(index).unwrap_or(0) as u32;
    let bitmap = |first: u32| std::array::from_fn(|n| register(first + n as u32));
    VirtualApic {
        task_priority: register(TPR) as u8,
        processor_priority: register(PPR) as u8,
        in_service: bitmap(ISR),
        requests: bitmap(IRR),
    }
}

/// Gives the processor the virtual APIC page. It keeps the page itself from then on.
pub(super) fn load_virtual_apic(cpu: &mut Cpu, from: &VirtualApic) {
    let Some(mut page) = cpu.apic_registers() else {
        return;
    };
    let bitmap = |first: u32, words: [u32; 8]| (first..).zip(words);
    let priority = [(TPR, from.task_priority.into())].into_iter();
    let vectors = bitmap(ISR, from.in_service).chain(bitmap(IRR, from.requests));
    for (register, value) in priority.chain(vectors) {
        put(&mut page, register, value);
    }
    cpu.set_apic_registers(&page);
}

/// Puts the register of an x2APIC MSR into a page.
fn put(page: &mut [u8; APIC_PAGE_BYTES], msr: u32, value: u32) {
    const FIRST: u32 = 0x800;
    let at = (msr - FIRST) as usize * 16;
    page[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// What VM entry loads beside the general registers. An MSR value that the processor refuses is not loaded: the module lets
/// a debugger write values that no WRMSR could.
pub(super) fn load(cpu: &mut Cpu, from: &ProcessorState) {
    let table = |(base, limit): (u64, u16)| TableRegister { base, limit };
    let [es, cs, ss, ds, fs, gs, ldtr, tr] = from.segments.each_ref().map(cpu_segment);
    let now = cpu.registers();
    cpu.set_registers(&Registers {
        rip: from.rip,
        rflags: from.rflags,
        segments: [es, cs, ss, ds, fs, gs],
        ldtr,
        tr,
        gdtr: table(from.gdtr),
        idtr: table(from.idtr),
        cr0: from.cr0,
        cr2: from.cr2,
        cr3: from.cr3,
        cr4: from.cr4,
        efer: from.efer,
        xcr0: from.xcr0,
        breakpoints: from.breakpoints,
        dr6: from.dr6,
        dr7: from.dr7,
        ..now
    });
    cpu.set_activity(Activity {
        shadow: from.interruptibility & (AFTER_STI | AFTER_MOV_SS) != 0,
        nmi_blocked: from.interruptibility & IN_NMI != 0,
        ..cpu.activity()
    });
    for (index, value) in ProcessorState::MSRS.into_iter().zip(from.msrs) {
        let _ = cpu.write_msr(index, value);
    }
}
