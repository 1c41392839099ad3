//! Storage of a vCPU's fields that the module itself seldom uses.

use super::place::Place;
use super::table::{Key, Table};
use crate::config::MAX_L2_VMS;

/// One word for each element of TDVPS, of the VMCS, and of the VMCSs of the L2 VMs there are.
#[derive(Clone, Debug, Default)]
pub(crate) struct VcpuStore {
    vcpu: Vec<u64>,
    vmcs: Vec<u64>,
    l2: [Vec<u64>; MAX_L2_VMS as usize],
}

/// Fields of class 32, which exist once for L1 and each L2 VM: the code of L1's.
pub(crate) mod per_vm {
    pub(crate) const LAUNCHED: u32 = 0x44;
    pub(crate) const LP_HPAS_UPDATED: u32 = 0x48;
    pub(crate) const MODULE_FIELDS_UPDATED: u32 = 0x4C;
    pub(crate) const L2_CTLS: u32 = 0x50;
    pub(crate) const TSC_DEADLINE: u32 = 0x58;
    pub(crate) const SHADOW_TSC_DEADLINE: u32 = 0x5C;
    pub(crate) const CR0_MASK: u32 = 0x84;
    pub(crate) const CR0_SHADOW: u32 = 0x88;
    pub(crate) const CR4_MASK: u32 = 0x8C;
    pub(crate) const CR4_SHADOW: u32 = 0x90;
    pub(crate) const INSTRUCTION_TIMEOUT: u32 = 0x94;
    pub(crate) const POSTED_INTERRUPT_DESCRIPTOR: u32 = 0x98;
    pub(crate) const PIN_CONTROLS: u32 = 0x9C;
    pub(crate) const PLE_GAP: u32 = 0xA4;
    pub(crate) const PLE_WINDOW: u32 = 0xA8;
    pub(crate) const NOTIFICATION_VECTOR: u32 = 0xAC;
    pub(crate) const SECONDARY_CONTROLS: u32 = 0xB0;
    pub(crate) const SHARED_EPTP: u32 = 0xB4;
    pub(crate) const GUEST_STATE_GPA: u32 = 0x100;
    pub(crate) const GUEST_STATE_HPA: u32 = 0x104;
    pub(crate) const VAPIC_GPA: u32 = 0x110;
    pub(crate) const VAPIC_HPA: u32 = 0x114;
}

/// Fields of class 32 that exist once.
pub(crate) mod management {
    pub(crate) const CPUID_SUPERVISOR_VE: u32 = 0x07;
    pub(crate) const CPUID_USER_VE: u32 = 0x08;
    pub(crate) const BASE_L2_CR0_MASK: u32 = 0x80;
    pub(crate) const BASE_L2_CR0_SHADOW: u32 = 0x81;
    pub(crate) const BASE_L2_CR4_MASK: u32 = 0x82;
    pub(crate) const BASE_L2_CR4_SHADOW: u32 = 0x83;
}

/// Classes of fields.
pub(crate) mod class {
    pub(crate) const VAPIC: u8 = 0x01;
    pub(crate) const VE_INFO: u8 = 0x02;
    pub(crate) const GPR: u8 = 0x10;
    pub(crate) const STATE: u8 = 0x11;
    pub(crate) const XBUFF: u8 = 0x12;
    pub(crate) const MSR: u8 = 0x13;
    pub(crate) const MANAGEMENT: u8 = 0x20;
    pub(crate) const EPF: u8 = 0x22;
    /// The real MSR bitmaps of L2 VM 1; the ones its L1 wrote have the next class.
    pub(crate) const L2_MSR_BITMAPS: u8 = 0x25;
    /// From one L2 VM to the next.
    pub(crate) const L2_STEP: u8 = 8;
}

/// Where the words of the buffer for state components are.
fn xbuff() -> Option<core::ops::Range<usize>> {
    let (row, _) = Table::Vcpu.find((class::XBUFF, 0))?;
    let field = &Table::Vcpu.rows()[row];
    Some(field.first..field.first + field.len() as usize)
}

impl VcpuStore {
    /// All zeros, for a TD with `l2_vms` L2 VMs.
    pub(crate) fn new(l2_vms: u8) -> Self {
        let l2_vms = usize::from(l2_vms.min(MAX_L2_VMS));
        let absent = usize::from(MAX_L2_VMS) - l2_vms;
        let vmcs = |exists| {
            if exists {
                Table::L2Vmcs.elements_without(0)
            } else {
                0
            }
        };
        VcpuStore {
            vcpu: vec![0; Table::Vcpu.elements_without(3 * absent)],
            vmcs: vec![0; Table::Vmcs.elements_without(0)],
            l2: core::array::from_fn(|i| vec![0; vmcs(i < l2_vms)]),
        }
    }

    /// TDH.VP.INIT or an import has filled it.
    pub(crate) fn is_initialised(&self) -> bool {
        !self.vmcs.is_empty()
    }

    fn words(&self, table: Table, vm: u8) -> &[u64] {
        match (table, usize::from(vm)) {
            (Table::Vmcs, _) => &self.vmcs,
            (Table::L2Vmcs, vm @ 1..=3) => &self.l2[vm - 1],
            _ => &self.vcpu,
        }
    }

    fn words_mut(&mut self, table: Table, vm: u8) -> &mut [u64] {
        match (table, usize::from(vm)) {
            (Table::Vmcs, _) => &mut self.vmcs,
            (Table::L2Vmcs, vm @ 1..=3) => &mut self.l2[vm - 1],
            _ => &mut self.vcpu,
        }
    }

    /// An element; 0 before TDH.VP.INIT.
    pub(crate) fn at(&self, place: &Place) -> u64 {
        let words = self.words(place.table, place.vm);
        words.get(place.position()).copied().unwrap_or(0)
    }

    pub(crate) fn set_at(&mut self, place: &Place, value: u64) {
        let words = self.words_mut(place.table, place.vm);
        if let Some(word) = words.get_mut(place.position()) {
            *word = value;
        }
    }

    fn word(&self, table: Table, vm: u8, key: Key) -> u64 {
        let position = table.position(key);
        position
            .and_then(|at| self.words(table, vm).get(at))
            .copied()
            .unwrap_or(0)
    }

    fn set_word(&mut self, table: Table, vm: u8, key: Key, value: u64) {
        if let Some(word) = table
            .position(key)
            .and_then(|at| self.words_mut(table, vm).get_mut(at))
        {
            *word = value;
        }
    }

    /// The buffer for the state components of XSAVES.
    pub(crate) fn xbuff(&self) -> &[u64] {
        xbuff().and_then(|at| self.vcpu.get(at)).unwrap_or(&[])
    }

    pub(crate) fn xbuff_mut(&mut self) -> &mut [u64] {
        match xbuff().and_then(|at| self.vcpu.get_mut(at)) {
            Some(words) => words,
            None => &mut [],
        }
    }

    /// A field of TDVPS that is in no VMCS.
    pub(crate) fn get(&self, key: Key) -> u64 {
        self.word(Table::Vcpu, 0, key)
    }

    pub(crate) fn set(&mut self, key: Key, value: u64) {
        self.set_word(Table::Vcpu, 0, key, value);
    }

    /// A field of class 32.
    pub(crate) fn management(&self, code: u32) -> u64 {
        self.get((class::MANAGEMENT, code))
    }

    pub(crate) fn set_management(&mut self, code: u32, value: u64) {
        self.set((class::MANAGEMENT, code), value);
    }

    /// A field of class 32 of a VM.
    pub(crate) fn of_vm(&self, code: u32, vm: u8) -> u64 {
        self.management(code + u32::from(vm))
    }

    pub(crate) fn set_of_vm(&mut self, code: u32, vm: u8, value: u64) {
        self.set_management(code + u32::from(vm), value);
    }

    /// A field of the VMCS of a VM; 0 is L1.
    pub(crate) fn vmcs(&self, vm: u8, encoding: u32) -> u64 {
        let table = if vm == 0 { Table::Vmcs } else { Table::L2Vmcs };
        self.word(table, vm, (0, encoding))
    }

    pub(crate) fn set_vmcs(&mut self, vm: u8, encoding: u32, value: u64) {
        let table = if vm == 0 { Table::Vmcs } else { Table::L2Vmcs };
        self.set_word(table, vm, (0, encoding), value);
    }
}
