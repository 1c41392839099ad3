//! The checks of each call, in the order in which Linux 7.3.4 makes them.
//!
//! A module is a call, a constant in it one check: the condition that must hold, and the errno
//! otherwise. Numbers follow the kernel's order within a call; conditions that the kernel checks
//! together share one. Checks whose errno is another call's (firmware, control groups) are not here,
//! for they are not KVM's to order, and neither is memory for the kernel's copy of a structure.

mod encrypt;
mod irq;
mod memory;
mod objects;
mod psp;
mod sev;
mod snp;
mod tdx;

use core::fmt;

use crate::Errno;

pub use encrypt::{
    copy, encrypt_sev, encrypt_tdx, encrypt_tdx_vcpu, move_, reg_region, unreg_region,
};
pub use irq::{
    apic_bus_cycles, coalesced_mmio, gsi_routing, ioeventfd, ioeventfd_end, irq_line, irqchip,
    irqfd, lapic, pit2, setup_mce, signal_msi, x2apic_api,
};
pub use memory::{
    attributes, dirty_log, dirty_log_protect, gmem, gmem_fallocate, gmem_mmap, pre_fault, region,
};
pub use objects::{
    any, create_irqchip, create_vcpu, create_vm, device_attr, disable_quirks, enable_cap,
    exit_hypercall, guest_debug, kvmclock_ctrl, max_vcpu_id, msr_filter, one_reg, reg_list, run,
    set_cpuid2, set_sregs2, signal_mask, split_irqchip, stats_fd, tpr_access, user_space_msr,
    vapic_addr, vcpu_attr, vcpu_tsc_khz,
};
pub use psp::{
    factory_reset, get_id, get_id2, issue, key_gen, pdh_cert_export, pek_cert_import, pek_csr,
    platform_status, snp_platform_status, snp_set_config, snp_vlek_load,
};
pub use sev::{
    dbg, es_init, guest_status, init, init_any, init2, launch_finish, launch_measure,
    launch_secret, launch_start, launch_update_data, launch_update_vmsa, local_receive, local_send,
    receive_finish, receive_start, receive_update_data, send_end, send_start, send_update_data,
};
pub use snp::{snp_enable_req_certs, snp_launch_finish, snp_launch_start, snp_launch_update};
pub use tdx::{
    tdx_capabilities, tdx_finalize_vm, tdx_get_cpuid, tdx_init_mem_region, tdx_init_vcpu,
    tdx_init_vm,
};

/// One check of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Check {
    /// The call: an ioctl, a command of `KVM_MEMORY_ENCRYPT_OP`, or a capability.
    pub call: &'static str,
    /// Its place in the call's order, from 1.
    pub number: u8,
    /// The name of the constant.
    pub name: &'static str,
    /// What must hold.
    pub condition: &'static str,
    /// The condition as the kernel's demand, for an error's text.
    pub demand: &'static str,
    /// The errno where it does not.
    pub errno: Errno,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            call,
            number,
            name,
            condition,
            errno,
            ..
        } = self;
        write!(
            f,
            "{call} check {number} ({name}): {condition}, else {errno}"
        )
    }
}

macro_rules! table {
    ($(#[$doc:meta])* $module:ident $call:literal {
        $($number:literal $name:ident $errno:ident $condition:literal;)*
    }) => {
        $(#[$doc])*
        pub mod $module {
            use crate::Errno;
            use crate::checks::Check;

            $(
                #[doc = concat!($condition, ".")]
                pub const $name: Check = Check {
                    call: $call,
                    number: $number,
                    name: stringify!($name),
                    condition: $condition,
                    demand: concat!("the kernel demands that ", $condition),
                    errno: Errno::$errno,
                };
            )*

            /// All checks, in order.
            pub const ALL: &[Check] = &[$($name),*];
        }
    };
}

use table;

/// Every table.
pub const TABLES: &[&[Check]] = &[
    any::ALL,
    create_vm::ALL,
    create_vcpu::ALL,
    split_irqchip::ALL,
    create_irqchip::ALL,
    enable_cap::ALL,
    disable_quirks::ALL,
    exit_hypercall::ALL,
    max_vcpu_id::ALL,
    user_space_msr::ALL,
    msr_filter::ALL,
    device_attr::ALL,
    vcpu_attr::ALL,
    one_reg::ALL,
    reg_list::ALL,
    set_cpuid2::ALL,
    run::ALL,
    gsi_routing::ALL,
    signal_msi::ALL,
    irq_line::ALL,
    irqfd::ALL,
    ioeventfd::ALL,
    ioeventfd_end::ALL,
    coalesced_mmio::ALL,
    irqchip::ALL,
    pit2::ALL,
    lapic::ALL,
    x2apic_api::ALL,
    apic_bus_cycles::ALL,
    setup_mce::ALL,
    dirty_log::ALL,
    dirty_log_protect::ALL,
    tpr_access::ALL,
    vapic_addr::ALL,
    kvmclock_ctrl::ALL,
    guest_debug::ALL,
    set_sregs2::ALL,
    vcpu_tsc_khz::ALL,
    stats_fd::ALL,
    signal_mask::ALL,
    region::ALL,
    gmem::ALL,
    gmem_mmap::ALL,
    gmem_fallocate::ALL,
    attributes::ALL,
    pre_fault::ALL,
    encrypt_sev::ALL,
    encrypt_tdx::ALL,
    encrypt_tdx_vcpu::ALL,
    reg_region::ALL,
    unreg_region::ALL,
    move_::ALL,
    copy::ALL,
    init::ALL,
    es_init::ALL,
    init2::ALL,
    init_any::ALL,
    launch_start::ALL,
    launch_update_data::ALL,
    launch_update_vmsa::ALL,
    launch_secret::ALL,
    launch_measure::ALL,
    launch_finish::ALL,
    guest_status::ALL,
    dbg::ALL,
    send_start::ALL,
    send_update_data::ALL,
    send_end::ALL,
    receive_start::ALL,
    receive_update_data::ALL,
    receive_finish::ALL,
    local_send::ALL,
    local_receive::ALL,
    snp_launch_start::ALL,
    snp_launch_update::ALL,
    snp_launch_finish::ALL,
    snp_enable_req_certs::ALL,
    issue::ALL,
    factory_reset::ALL,
    platform_status::ALL,
    key_gen::ALL,
    pek_csr::ALL,
    pek_cert_import::ALL,
    pdh_cert_export::ALL,
    get_id::ALL,
    get_id2::ALL,
    snp_platform_status::ALL,
    snp_set_config::ALL,
    snp_vlek_load::ALL,
    tdx_capabilities::ALL,
    tdx_init_vm::ALL,
    tdx_init_vcpu::ALL,
    tdx_init_mem_region::ALL,
    tdx_finalize_vm::ALL,
    tdx_get_cpuid::ALL,
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_table_is_in_order_and_belongs_to_one_call() {
        for table in TABLES {
            assert!(!table.is_empty());
            assert!(table.iter().all(|check| check.call == table[0].call));
            assert_eq!(table[0].number, 1, "{}", table[0]);
            for pair in table.windows(2) {
                let step = pair[1].number.checked_sub(pair[0].number);
                assert!(matches!(step, Some(0 | 1)), "{} after {}", pair[1], pair[0]);
            }
        }
    }

    #[test]
    fn a_check_is_named_by_its_call_and_its_name() {
        let all = TABLES.iter().copied().flatten();
        let names: BTreeSet<_> = all.clone().map(|check| (check.call, check.name)).collect();
        assert_eq!(names.len(), all.count());
    }

    #[test]
    fn every_errno_has_a_name() {
        for check in TABLES.iter().copied().flatten() {
            assert!(check.errno.name().is_some(), "{check}");
        }
    }
}
