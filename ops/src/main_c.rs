//! The operations that Linux `vmx/main.c` wraps, and the place of each here.

/// The way in which `main.c` answers an operation for a TD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Both back ends are called, in a fixed order.
    Both,
    /// The call goes to the TD's back end.
    Dispatch,
    /// Nothing happens.
    Nothing,
    /// A constant.
    Constant,
    /// The caller's structure is filled with zeros.
    ZeroFilled,
    /// The call is a bug of the caller: refused, and in Linux a warning.
    Refused,
}

impl Class {
    /// The letter that stands for the class in tables.
    pub const fn letter(self) -> char {
        match self {
            Self::Both => 'B',
            Self::Dispatch => 'D',
            Self::Nothing => 'N',
            Self::Constant => 'C',
            Self::ZeroFilled => 'Z',
            Self::Refused => 'W',
        }
    }
}

/// The place of an operation of `main.c` here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// A method of [`VmOps`](crate::VmOps).
    Vm(&'static str),
    /// A method of [`VcpuOps`](crate::VcpuOps).
    Vcpu(&'static str),
    /// A method of [`Backend`](crate::Backend).
    Backend(&'static str),
    /// The host value does it, as the text says.
    Host(&'static str),
    /// Left out, for the reason given.
    LeftOut(&'static str),
}

/// A wrapped operation of `main.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MainCOp {
    /// Its name in `struct kvm_x86_ops`.
    pub name: &'static str,
    /// The answer of main.c for a TD.
    pub class: Class,
    /// Its place here.
    pub fate: Fate,
}

const fn row(name: &'static str, class: Class, fate: Fate) -> MainCOp {
    MainCOp { name, class, fate }
}

/// The 92 operations that Linux 7.1 wraps in `arch/x86/kvm/vmx/main.c`, in its order. docs/ops.md
/// shows them as a table.
#[rustfmt::skip]
pub const MAIN_C: [MainCOp; 92] = [
    row("hardware_setup", Class::Both, Fate::Host("the host value does it when it is opened (`KvmHost::open`), before any VM exists")),
    row("hardware_unsetup", Class::Both, Fate::Host("dropping the last handle of the host value does it")),
    row("disable_virtualization_cpu", Class::Both, Fate::Vm("disable_virtualization_cpu")),
    row("vm_init", Class::Dispatch, Fate::Vm("vm_init")),
    row("vm_pre_destroy", Class::Dispatch, Fate::Vm("mmu_release_hkid")),
    row("vm_destroy", Class::Dispatch, Fate::Vm("vm_free")),
    row("vcpu_precreate", Class::Constant, Fate::Backend("create_vcpu")),
    row("vcpu_create", Class::Dispatch, Fate::Backend("create_vcpu")),
    row("vcpu_free", Class::Dispatch, Fate::Vcpu("vcpu_free")),
    row("vcpu_reset", Class::Dispatch, Fate::Vcpu("vcpu_reset")),
    row("vcpu_load", Class::Dispatch, Fate::Vcpu("vcpu_load")),
    row("vcpu_put", Class::Dispatch, Fate::Vcpu("vcpu_put")),
    row("vcpu_pre_run", Class::Dispatch, Fate::LeftOut("the check is the first thing `vcpu_run` does; a caller has nothing to do between the two")),
    row("vcpu_run", Class::Dispatch, Fate::Vcpu("vcpu_run")),
    row("prepare_switch_to_guest", Class::Dispatch, Fate::LeftOut("saves the host's registers just before entry; that is inside `vcpu_run`, where no embedder code runs")),
    row("handle_exit", Class::Dispatch, Fate::LeftOut("`vcpu_run` returns the exit as an `Exit`; what to do about it is the embedder's run loop")),
    row("has_emulated_msr", Class::Dispatch, Fate::Vm("has_emulated_msr")),
    row("get_msr", Class::Dispatch, Fate::Vcpu("msrs")),
    row("set_msr", Class::Dispatch, Fate::Vcpu("set_msrs")),
    row("complete_emulated_msr", Class::Dispatch, Fate::LeftOut("the next `vcpu_run` completes the access with the embedder's `answer`")),
    row("recalc_intercepts", Class::Nothing, Fate::LeftOut("MSR filters are set on the VM below and take effect there")),
    row("update_cpu_dirty_logging", Class::Refused, Fate::Vm("dirty_log")),
    row("check_emulate_instruction", Class::Constant, Fate::LeftOut("guards KVM's instruction emulator, which the platform keeps to itself")),
    row("smi_allowed", Class::Refused, Fate::LeftOut("system-management mode is not offered to guests")),
    row("enter_smm", Class::Refused, Fate::LeftOut("system-management mode is not offered to guests")),
    row("leave_smm", Class::Refused, Fate::LeftOut("system-management mode is not offered to guests")),
    row("enable_smi_window", Class::Refused, Fate::LeftOut("system-management mode is not offered to guests")),
    row("apic_init_signal_blocked", Class::Constant, Fate::LeftOut("local APICs are the platform's; INIT reaches a vCPU as `vcpu_reset`")),
    row("set_virtual_apic_mode", Class::Nothing, Fate::LeftOut("hardware APIC virtualisation is the platform's own business")),
    row("hwapic_isr_update", Class::Nothing, Fate::LeftOut("hardware APIC virtualisation is the platform's own business")),
    row("sync_pir_to_irr", Class::Constant, Fate::LeftOut("hardware APIC virtualisation is the platform's own business")),
    row("deliver_interrupt", Class::Dispatch, Fate::Vm("deliver_interrupt")),
    row("refresh_apicv_exec_ctrl", Class::Refused, Fate::LeftOut("hardware APIC virtualisation is the platform's own business")),
    row("load_eoi_exitmap", Class::Nothing, Fate::LeftOut("hardware APIC virtualisation is the platform's own business")),
    row("set_apic_access_page_addr", Class::Nothing, Fate::LeftOut("hardware APIC virtualisation is the platform's own business")),
    row("vcpu_after_set_cpuid", Class::Nothing, Fate::Vcpu("set_cpuid")),
    row("update_exception_bitmap", Class::Nothing, Fate::Vcpu("set_guest_debug")),
    row("get_segment_base", Class::Constant, Fate::Vcpu("sregs")),
    row("get_segment", Class::ZeroFilled, Fate::Vcpu("sregs")),
    row("set_segment", Class::Nothing, Fate::Vcpu("set_sregs")),
    row("get_cpl", Class::Constant, Fate::Vcpu("sregs")),
    row("get_cpl_no_cache", Class::Constant, Fate::Vcpu("sregs")),
    row("get_cs_db_l_bits", Class::ZeroFilled, Fate::Vcpu("sregs")),
    row("is_valid_cr0", Class::Constant, Fate::Vcpu("set_sregs")),
    row("is_valid_cr4", Class::Constant, Fate::Vcpu("set_sregs")),
    row("set_cr0", Class::Nothing, Fate::Vcpu("set_sregs")),
    row("set_cr4", Class::Nothing, Fate::Vcpu("set_sregs")),
    row("set_efer", Class::Constant, Fate::Vcpu("set_sregs")),
    row("get_idt", Class::ZeroFilled, Fate::Vcpu("sregs")),
    row("get_gdt", Class::ZeroFilled, Fate::Vcpu("sregs")),
    row("set_idt", Class::Nothing, Fate::Vcpu("set_sregs")),
    row("set_gdt", Class::Nothing, Fate::Vcpu("set_sregs")),
    row("set_dr7", Class::Nothing, Fate::Vcpu("set_debug_regs")),
    row("sync_dirty_debug_regs", Class::Nothing, Fate::Vcpu("debug_regs")),
    row("cache_reg", Class::Refused, Fate::Vcpu("regs")),
    row("get_rflags", Class::Constant, Fate::Vcpu("regs")),
    row("set_rflags", Class::Nothing, Fate::Vcpu("set_regs")),
    row("get_if_flag", Class::Constant, Fate::Vcpu("regs")),
    row("flush_tlb_all", Class::Dispatch, Fate::LeftOut("a change of slots flushes before it returns, and private pages flush with `flush_private_tlb`")),
    row("flush_tlb_current", Class::Dispatch, Fate::LeftOut("a change of slots flushes before it returns, and private pages flush with `flush_private_tlb`")),
    row("flush_tlb_gva", Class::Nothing, Fate::LeftOut("guest page tables are the guest's; the platform shadows none")),
    row("flush_tlb_guest", Class::Nothing, Fate::LeftOut("guest page tables are the guest's; the platform shadows none")),
    row("inject_nmi", Class::Dispatch, Fate::Vcpu("inject_nmi")),
    row("nmi_allowed", Class::Constant, Fate::Vcpu("events")),
    row("get_nmi_mask", Class::Constant, Fate::Vcpu("events")),
    row("set_nmi_mask", Class::Nothing, Fate::Vcpu("set_events")),
    row("enable_nmi_window", Class::Nothing, Fate::LeftOut("an injected NMI waits in the platform until the guest takes it")),
    row("enable_irq_window", Class::Nothing, Fate::Vcpu("enable_irq_window")),
    row("load_mmu_pgd", Class::Dispatch, Fate::Vcpu("load_mmu_pgd")),
    row("set_interrupt_shadow", Class::Nothing, Fate::Vcpu("set_events")),
    row("get_interrupt_shadow", Class::Constant, Fate::Vcpu("events")),
    row("patch_hypercall", Class::Nothing, Fate::LeftOut("guests pick VMCALL or VMMCALL by CPUID; rewriting their code is a quirk of old KVM")),
    row("inject_irq", Class::Nothing, Fate::Vcpu("inject_irq")),
    row("inject_exception", Class::Nothing, Fate::Vcpu("set_events")),
    row("cancel_injection", Class::Nothing, Fate::Vcpu("set_events")),
    row("interrupt_allowed", Class::Dispatch, Fate::Vcpu("enable_irq_window")),
    row("get_entry_info", Class::ZeroFilled, Fate::LeftOut("what an entry injects is known to who injected it")),
    row("get_exit_info", Class::Dispatch, Fate::LeftOut("`vcpu_run` returns it decoded, as an `Exit`")),
    row("update_cr8_intercept", Class::Nothing, Fate::LeftOut("the task priority belongs to the platform's local APIC")),
    row("set_tss_addr", Class::Constant, Fate::Vm("set_tss_addr")),
    row("set_identity_map_addr", Class::Constant, Fate::Vm("set_identity_map_addr")),
    row("get_l2_tsc_offset", Class::Constant, Fate::LeftOut("nested guests are not offered")),
    row("get_l2_tsc_multiplier", Class::Constant, Fate::LeftOut("nested guests are not offered")),
    row("write_tsc_offset", Class::Nothing, Fate::Vcpu("write_tsc_offset")),
    row("write_tsc_multiplier", Class::Nothing, Fate::Vcpu("write_tsc_multiplier")),
    row("set_hv_timer", Class::Constant, Fate::LeftOut("the VMX preemption timer serves the platform's local APIC; an embedder with its own timer uses a kick")),
    row("cancel_hv_timer", Class::Nothing, Fate::LeftOut("the VMX preemption timer serves the platform's local APIC; an embedder with its own timer uses a kick")),
    row("setup_mce", Class::Nothing, Fate::Vcpu("setup_mce")),
    row("mem_enc_ioctl", Class::Dispatch, Fate::Vm("mem_enc_op")),
    row("vcpu_mem_enc_ioctl", Class::Dispatch, Fate::Vcpu("vcpu_mem_enc_op")),
    row("vcpu_mem_enc_unlocked_ioctl", Class::Dispatch, Fate::Vcpu("vcpu_mem_enc_op")),
    row("gmem_max_mapping_level", Class::Dispatch, Fate::Vm("gmem_max_mapping_level")),
];

/// A difference between the operations of Linux 7.1, which [`MAIN_C`] lists, and those of Linux 7.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MainCChange {
    /// The name of the operation.
    pub name: &'static str,
    /// The change.
    pub change: &'static str,
    /// The place of the operation here.
    pub here: &'static str,
}

/// The changes of Linux 7.3 to the operations that `main.c` wraps: 92 - 1 + 4 = 95.
pub const LINUX_7_3: [MainCChange; 5] = [
    MainCChange {
        name: "vcpu_pre_run",
        change: "gone",
        here: "was left out already",
    },
    MainCChange {
        name: "vcpu_needs_initialization",
        change: "new, TD only",
        here: "inside `vcpu_run`, which refuses a vCPU that is not initialised",
    },
    MainCChange {
        name: "tdp_has_smep",
        change: "new in the table",
        here: "left out: guest page tables are the guest's; the platform shadows none",
    },
    MainCChange {
        name: "clear_hlt",
        change: "new in the table",
        here: "`VcpuOps::set_mp_state`",
    },
    MainCChange {
        name: "unhandleable_emulation_required",
        change: "new in the table",
        here: "left out: it guards KVM's instruction emulator, which the platform keeps to itself",
    },
];
